"""The torch operators: schemas, shapes, gradients, FLOPs, and values where the CPU kernels compute none."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from large_kernel_conv import choice, cpu, triton_conv
from large_kernel_conv.geometry import Geometry, geometry_of

# keep: whether the weight's spectra are kept for the next call, which pays where the weight is not trained
torch.library.define('large_kernel_conv::depthwise_conv2d',
                     '(Tensor x, Tensor weight, Tensor? bias, bool keep) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_backward',
                     '(Tensor grad, Tensor x, Tensor weight, bool want_x, bool want_weight, bool keep) '
                     '-> (Tensor, Tensor)')
# for compiled models whose weights are constants: the first is folded into a constant of its own
torch.library.define('large_kernel_conv::prepared_spectra',
                     '(Tensor weight, int height, int width) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_prepared',
                     '(Tensor x, Tensor weight, Tensor spectra, Tensor? bias, bool relu) -> Tensor')


# ---- Shapes ------------------------------------------------------------------------------------------------


def _empty_like(x: Tensor) -> Tensor:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x) if dense else x.new_empty(x.shape)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    return _empty_like(x)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_backward')
def _(grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool,
      keep: bool) -> tuple[Tensor, Tensor]:
    # what is not wanted comes back without elements
    shape = weight.shape if want_weight else (0, *weight.shape[1:])
    grad_weight = weight.new_empty(shape, dtype=torch.float32)
    return _empty_like(x) if want_x else x.new_empty(0), grad_weight


@torch.library.register_fake('large_kernel_conv::prepared_spectra')
def _(weight: Tensor, height: int, width: int) -> Tensor:
    size = cpu.spectra_size(weight.shape[0], int(height), int(width), geometry_of(weight))
    return weight.new_empty(size, dtype=torch.float32)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_prepared')
def _(x: Tensor, weight: Tensor, spectra: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return _empty_like(x)


# ---- Values, where no implementation has registered itself -------------------------------------------------
# That is on GPUs, on other devices, in a program that was exported from another process (the CPU kernels are
# not loaded before they are needed), or without a compiler.


def pytorch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
                   channels: int | None = None) -> Tensor:
    """F.conv2d of the same; `channels` where a trace must not ask the weight."""
    return F.conv2d(x, weight, bias, padding=geometry.pads, dilation=geometry.dilation,
                    groups=weight.shape[0] if channels is None else channels)


def _as_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    y = pytorch_conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry_of(weight))
    return _laid_out_like(y, x)


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.impl('large_kernel_conv::depthwise_conv2d', 'default')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    if not choice.load(x, weight, geometry_of(weight)):
        return _as_conv2d(x, weight, bias, keep)
    if not choice.is_for_triton(x):
        # now the CPU kernels' own, which are loaded
        return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, keep)
    y = triton_conv.convolve(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    return _laid_out_like(y, x)


@torch.library.impl('large_kernel_conv::depthwise_conv2d_backward', 'default')
def _(grad: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool,
      keep: bool) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = x.new_empty(0), weight.new_empty((0, *weight.shape[1:]), dtype=torch.float32)
    geometry = geometry_of(weight)
    if not choice.load(x, weight, geometry):
        found_x, found_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), None, (1, 1), geometry.pads,
            (geometry.dilation, geometry.dilation), False, (0, 0), weight.shape[0],
            (want_x, want_weight, False))
        return found_x if want_x else grad_x, found_weight.float() if want_weight else grad_weight
    if not choice.is_for_triton(x):
        return torch.ops.large_kernel_conv.depthwise_conv2d_backward(
            grad, x, weight, want_x, want_weight, keep)
    grad = grad.contiguous()
    if want_x:
        grad_x = _laid_out_like(triton_conv.convolve(grad, weight.contiguous(), turned=True), x)
    if want_weight:
        grad_weight = triton_conv.weight_gradient(x.contiguous(), grad, geometry)
    return grad_x, grad_weight


# ---- Gradients ---------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, want_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if want_x or want_weight:
        grad_x, grad_weight = torch.ops.large_kernel_conv.depthwise_conv2d_backward(
            grad, x, weight, want_x, want_weight, not want_weight)
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if want_bias else None
    return grad_x if want_x else None, grad_weight.to(weight.dtype) if want_weight else None, grad_bias, None


def _no_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError('depthwise_conv2d can be differentiated once only: compute in float64, or use '
                              'F.conv2d (for a model: set LARGE_KERNEL_CONV_IMPL=pytorch before it is built)')


torch.library.register_autograd('large_kernel_conv::depthwise_conv2d', _backward,
                                setup_context=_setup_context)
torch.library.register_autograd('large_kernel_conv::depthwise_conv2d_backward', _no_second_derivative)


# ---- For other tools ---------------------------------------------------------------------------------------

# For ExportedProgram.run_decompositions: F.conv2d's operator in place of ours, for programs that run where
# this package is not. Not in torch's own table: where CI is set, as in most continuous integration,
# torch.compile refuses an operator that is there.
DECOMPOSITIONS = {torch.ops.large_kernel_conv.depthwise_conv2d.default: _as_conv2d}


@register_flop_formula([torch.ops.large_kernel_conv.depthwise_conv2d,
                        torch.ops.large_kernel_conv.depthwise_conv2d_prepared])
def _forward_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Two for each tap and pixel, in the padding too: what F.conv2d counts as, whatever is computed."""
    return 2 * math.prod(x) * weight[-2] * weight[-1]


@register_flop_formula(torch.ops.large_kernel_conv.depthwise_conv2d_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, want_x: bool, want_weight: bool,
                    *_: object, **__: object) -> int:
    return (want_x + want_weight) * _forward_flops(x, weight)
