"""Depthwise convolution with large kernels: one function, and the implementation that is fastest for the tensor at hand.

`depthwise_conv2d` is F.conv2d(x, weight, bias, padding=K // 2, groups=C), computed faster where one of the implementations
applies: cpu.py on CPUs, triton_conv.py on GPUs. It is made of torch operators, so torch.compile, torch.export, autocast and
DistributedDataParallel take it. external.py is apart: a layer of the authors' CUDA extension, for those who built it.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.flop_counter import register_flop_formula

from large_kernel_conv import cpu, triton_conv

__all__ = ['DECOMPOSITIONS', 'DepthwiseConv2d', 'FrozenDepthwiseConv2d', 'depthwise_conv2d', 'implementation']
CPU = torch.device('cpu')  # devices are compared in a quarter of the time that asking for their type takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the implementations that are not F.conv2d


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own K x K kernel: stride 1, zero padding K // 2.

    x (N, C, H, W), any float dtype, memory format and device; weight (C, 1, K, K), K odd; bias (C,).
    Returns (N, C, H, W) in x's dtype (autocast's, where that is on) and memory format. Differentiable once.
    Raises ValueError where shapes, dtypes or devices do not fit.

    Errors are those of float32 sums, relative to the largest value; on GPUs where torch allows TF32, its default, those of TF32.
    Where a CPU uses Fourier transforms, the largest value is that of an image's pair of channels: a channel of much smaller
    values than its partner's, 16 channels away on AVX-512, has as many digits less.

    torch.fx records one call of this function; torch.jit.trace and torch.onnx.export F.conv2d's operator, which runs where this
    package is not.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(depthwise_conv2d, (x, weight), x, weight, bias)
    if torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()):
        return _traced_conv2d(x, weight, bias)
    _check(x, weight, bias)
    _check_dtypes(x, weight, bias)
    if _refusal(x, weight) is not None:
        return _pytorch_conv2d(x, weight, bias)
    device = 'cuda' if x.is_cuda else 'cpu'
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))  # the operators take a weight of any of their dtypes
    if not x.is_contiguous() and x.stride(1) == 1:
        x = x.contiguous(memory_format=torch.channels_last)  # a slice of a channels_last map, say; else nothing is copied
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and not _is_for_triton(x) and _constants_are_folded():
        spectra = torch.ops.large_kernel_conv.prepared_spectra(weight, x.shape[2], x.shape[3])
        return torch.ops.large_kernel_conv.depthwise_conv2d_prepared(x, weight, spectra, bias, False)
    return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, not _trained(weight))


def implementation(x: Tensor, weight: Tensor) -> tuple[str, str]:
    """Return (name, reason): which implementation depthwise_conv2d(x, weight) would run now, and why.

    Names: 'cpu fft', 'cpu direct', 'triton', 'pytorch'. Shapes and errors are depthwise_conv2d's.
    """
    _check(x, weight, None)
    _check_dtypes(x, weight, None)
    refusal = _refusal(x, weight)
    if refusal is not None:
        return 'pytorch', refusal
    if _is_for_triton(x):
        precision = {'tf32': ', in TF32', 'tf32x3': ', in three products of TF32', 'ieee': ''}[triton_conv.precision()]
        return 'triton', 'as matrix products on tensor cores' + (precision if x.dtype == torch.float32 else '')
    return cpu.plan(weight.shape[0], x.shape[2], x.shape[3], weight.shape[2])


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d of `channels` groups, stride 1 and padding kernel_size // 2, computed by depthwise_conv2d.

    Its state dict and attributes are nn.Conv2d's. kernel_size must be odd. x (N, C, H, W) to (N, C, H, W).
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True):
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be an odd number, not {kernel_size}')
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


class FrozenDepthwiseConv2d(nn.Module):
    """A DepthwiseConv2d for inference, with a ReLU behind it if asked: x (N, C, H, W), of any dtype, to the same.

    What is computed from the weight, for maps of one size, is kept as long as that size stays. A weight that is loaded, moved,
    cast or changed in place is seen; one that is changed through .data, which no version counter follows, is not.
    """

    def __init__(self, conv: DepthwiseConv2d, relu: bool = False):
        super().__init__()
        self.register_buffer('weight', conv.weight.detach())
        self.register_buffer('bias', None if conv.bias is None else conv.bias.detach())
        self.relu = relu
        self.prepared = None, None  # what the spectra were made for, and they
        self.prepared_weight = None  # whose memory must not become another weight's, which would look the same

    def __getstate__(self) -> dict:
        # another CPU, or another version, may lay spectra out otherwise
        return {**self.__dict__, 'prepared': (None, None), 'prepared_weight': None}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        recorded = has_torch_function_variadic(x) or torch.jit.is_tracing()
        if not recorded:
            _check(x, weight, self.bias)
        # an inference tensor has no version: depthwise_conv2d knows it by its content
        if recorded or weight.is_inference() or _is_for_triton(x) or _refusal(x, weight) is not None:
            y = depthwise_conv2d(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            return y.relu_() if self.relu else y
        made_for, spectra = self.prepared
        wanted = x.shape[2:], weight.data_ptr(), weight._version
        if made_for != wanted:
            spectra = torch.ops.large_kernel_conv.prepared_spectra(weight, *x.shape[2:])
            self.prepared, self.prepared_weight = (wanted, spectra), weight.detach()
        return torch.ops.large_kernel_conv.depthwise_conv2d_prepared(x, weight, spectra, self.bias, self.relu)


def _pytorch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _traced_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with warnings.catch_warnings():  # of sizes that become constants: the weight's do, rightly
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        _check(x, weight, bias)
        _check_dtypes(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=int(weight.shape[-1]) // 2, groups=int(weight.shape[0]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    size, weight_size = x.shape, weight.shape  # each look at a shape makes a new one
    if len(size) != 4:
        raise ValueError(f'x must be (N, C, H, W), not {tuple(size)}')
    channels, k = size[1], weight_size[-1] if weight_size else 0
    if weight_size != (channels, 1, k, k) or k % 2 == 0:
        raise ValueError(f'weight must be (C, 1, K, K) with odd K and the C = {channels} channels of x {tuple(size)}, '
                         f'not {tuple(weight_size)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'bias must be (C,) with the C = {channels} channels of x {tuple(size)}, not {tuple(bias.shape)}')
    for tensor in (weight,) if bias is None else (weight, bias):
        if tensor.device != x.device:
            raise ValueError(f'x, weight and bias must be on one device, not on {x.device} and {tensor.device}')


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for tensor in (weight,) if bias is None else (weight, bias):
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f'x, weight and bias must have one dtype, not {x.dtype} and {tensor.dtype}')


def _trained(weight: Tensor) -> bool:
    return torch.is_grad_enabled() and weight.requires_grad


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why F.conv2d computes this, or None where a faster implementation does."""
    for_triton = _is_for_triton(x)
    if x.layout is not torch.strided or not (for_triton or x.device == CPU):
        return f'there is no other implementation for {x.layout} tensors on {x.device.type}'
    for tensor in (x, weight):
        if tensor.dtype not in DTYPES:
            return f'{tensor.dtype} is left to F.conv2d'
    if _in_function_transform():
        return 'forward-mode derivatives and torch.func are left to F.conv2d'
    if for_triton:
        return triton_conv.refusal(x, weight.shape[-1])
    if not x.is_contiguous() and x.dtype == torch.float32 and weight.shape[-1] <= 3:
        return 'F.conv2d is as fast for float32 kernels up to 3 x 3 in channels_last'  # it need not gather the channels
    return cpu.problem()


def _is_for_triton(x: Tensor) -> bool:
    return x.is_cuda or triton_conv.INTERPRETED


def _in_function_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the operators have no formulas."""
    return (not torch.compiler.is_compiling()
            and (torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0))


@torch.compiler.assume_constant_result
def _constants_are_folded() -> bool:
    return torch._inductor.config.freezing


# The operators. keep: whether the weight's spectra are kept for the next call, which pays where the weight is not trained.
torch.library.define('large_kernel_conv::depthwise_conv2d', '(Tensor x, Tensor weight, Tensor? bias, bool keep) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_backward',
                     '(Tensor grad, Tensor x, Tensor weight, bool want_x, bool want_weight, bool keep) -> (Tensor, Tensor)')
# For compiled models whose weights are constants: the first is folded into a constant of its own.
torch.library.define('large_kernel_conv::prepared_spectra', '(Tensor weight, int height, int width) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_prepared',
                     '(Tensor x, Tensor weight, Tensor spectra, Tensor? bias, bool relu) -> Tensor')


def _empty_like(x: Tensor) -> Tensor:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    return _empty_like(x)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_backward')
def _(grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, keep: bool) -> tuple[Tensor, Tensor]:
    # what is not wanted comes back without elements
    grad_weight = weight.new_empty(weight.shape if want_weight else (0, *weight.shape[1:]), dtype=torch.float32)
    return _empty_like(x) if want_x else x.new_empty(0), grad_weight


@torch.library.register_fake('large_kernel_conv::prepared_spectra')
def _(weight: Tensor, height: int, width: int) -> Tensor:
    return weight.new_empty(cpu.spectra_size(weight.shape[0], int(height), int(width), weight.shape[2]), dtype=torch.float32)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_prepared')
def _(x: Tensor, weight: Tensor, spectra: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return _empty_like(x)


# What the operators do where no implementation has registered itself: on GPUs, on other devices, in a program that was exported
# from another process (the CPU kernels are not loaded before they are needed), or without a compiler.
@torch.library.impl('large_kernel_conv::depthwise_conv2d', 'default')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    if _refusal(x, weight) is not None:
        return _as_conv2d(x, weight, bias, keep)
    if not _is_for_triton(x):
        return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, keep)
    y = triton_conv.convolve(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    return _laid_out_like(y, x)


@torch.library.impl('large_kernel_conv::depthwise_conv2d_backward', 'default')
def _(grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, keep: bool) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = x.new_empty(0), weight.new_empty((0, *weight.shape[1:]), dtype=torch.float32)
    if _refusal(x, weight) is not None:
        padding = weight.shape[-1] // 2
        found_x, found_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), None, (1, 1), (padding, padding), (1, 1), False, (0, 0), weight.shape[0],
            (want_x, want_weight, False))
        return found_x if want_x else grad_x, found_weight.float() if want_weight else grad_weight
    if not _is_for_triton(x):
        return torch.ops.large_kernel_conv.depthwise_conv2d_backward(grad, x, weight, want_x, want_weight, keep)
    grad = grad.contiguous()
    if want_x:
        grad_x = _laid_out_like(triton_conv.convolve(grad, weight.contiguous(), turned=True), x)
    if want_weight:
        grad_weight = triton_conv.weight_gradient(x.contiguous(), grad, weight.shape[-1])
    return grad_x, grad_weight


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _as_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    y = _pytorch_conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _laid_out_like(y, x)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, want_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if want_x or want_weight:
        grad_x, grad_weight = torch.ops.large_kernel_conv.depthwise_conv2d_backward(grad, x, weight, want_x, want_weight,
                                                                                    not want_weight)
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if want_bias else None
    return grad_x if want_x else None, grad_weight.to(weight.dtype) if want_weight else None, grad_bias, None


def _no_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError('depthwise_conv2d can be differentiated once only: compute in float64, or use F.conv2d (for a '
                              'model: set LARGE_KERNEL_CONV_IMPL=pytorch before it is built)')


torch.library.register_autograd('large_kernel_conv::depthwise_conv2d', _backward, setup_context=_setup_context)
torch.library.register_autograd('large_kernel_conv::depthwise_conv2d_backward', _no_second_derivative)


# For ExportedProgram.run_decompositions: F.conv2d's operator in place of ours, for programs that run where this package is not.
# Not in torch's own table: where CI is set, as in most continuous integration, torch.compile refuses an operator that is there.
DECOMPOSITIONS = {torch.ops.large_kernel_conv.depthwise_conv2d.default: _as_conv2d}


@register_flop_formula([torch.ops.large_kernel_conv.depthwise_conv2d, torch.ops.large_kernel_conv.depthwise_conv2d_prepared])
def _forward_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Two for each tap and pixel, those in the padding included: what F.conv2d is counted as, whatever is computed."""
    return 2 * math.prod(x) * weight[-2] * weight[-1]


@register_flop_formula(torch.ops.large_kernel_conv.depthwise_conv2d_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, want_x: bool, want_weight: bool, *_: object,
                    **__: object) -> int:
    return (want_x + want_weight) * _forward_flops(x, weight)
