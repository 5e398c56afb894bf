"""The torch operators: schemas, shapes, gradients, FLOPs, and values where the CPU kernels compute none."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from large_kernel_conv import choice, cpu, triton_conv
from large_kernel_conv.geometry import Geometry

# Zeros around the map: top, bottom, left, right, each up to (kernel - 1) * dilation; dilation: down, across.
# Six numbers, since a list of two takes longer to hand on than a small convolution's sums.
WHERE = 'int top, int bottom, int left, int right, int down, int across'
# keep: whether the weight's spectra are kept for the next call, which pays where the weight is not trained
torch.library.define('large_kernel_conv::depthwise_conv2d',
                     f'(Tensor x, Tensor weight, Tensor? bias, {WHERE}, bool keep) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_backward',
                     f'(Tensor grad, Tensor x, Tensor weight, {WHERE}, bool want_x, bool want_weight, '
                     'bool keep) -> (Tensor, Tensor)')
# for compiled models whose weights are constants: the first is folded into a constant of its own
torch.library.define('large_kernel_conv::prepared_spectra',
                     f'(Tensor weight, int height, int width, {WHERE}) -> Tensor')
torch.library.define('large_kernel_conv::depthwise_conv2d_prepared',
                     f'(Tensor x, Tensor weight, Tensor spectra, Tensor? bias, {WHERE}, bool relu) -> Tensor')
# pixels x (P, C) as levels 0 ... 255 in uint8, x * scale + shift, for int8 products before and after
torch.library.define('large_kernel_conv::quantize_pixels', '(Tensor x, Tensor scale, Tensor shift) -> Tensor')


def _geometry(weight: Tensor, where: tuple[int, ...]) -> Geometry:
    return Geometry(*weight.shape[2:], *where)


# ---- Shapes ------------------------------------------------------------------------------------------------


def _empty(x: Tensor, size: tuple[int, int]) -> Tensor:
    """For maps of `size`, of x's type and memory format."""
    in_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *where_keep: int) -> Tensor:
    return _empty(x, _geometry(weight, where_keep[:6]).output_size(*x.shape[2:]))


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_backward')
def _(grad: Tensor, x: Tensor, weight: Tensor, *where_wants_keep: int) -> tuple[Tensor, Tensor]:
    want_x, want_weight, _ = where_wants_keep[6:]
    # what is not wanted comes back without elements
    shape = weight.shape if want_weight else (0, *weight.shape[1:])
    grad_weight = weight.new_empty(shape, dtype=torch.float32)
    return _empty(x, x.shape[2:]) if want_x else x.new_empty(0), grad_weight


@torch.library.register_fake('large_kernel_conv::prepared_spectra')
def _(weight: Tensor, height: int, width: int, *where: int) -> Tensor:
    size = cpu.spectra_size(weight.shape[0], int(height), int(width), _geometry(weight, where))
    return weight.new_empty(size, dtype=torch.float32)


@torch.library.register_fake('large_kernel_conv::depthwise_conv2d_prepared')
def _(x: Tensor, weight: Tensor, spectra: Tensor, bias: Tensor | None, *where_relu: int) -> Tensor:
    return _empty(x, _geometry(weight, where_relu[:6]).output_size(*x.shape[2:]))


# ---- Values, where no implementation has registered itself -------------------------------------------------
# That is on GPUs, on other devices, in a program that was exported from another process (the CPU kernels are
# not loaded before they are needed), or without a compiler.


def pytorch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
                   channels: int | None = None) -> Tensor:
    """F.conv2d of the same; `channels` where a trace must not ask the weight."""
    padding = geometry.top, geometry.left
    if not geometry.is_symmetric:  # which F.conv2d cannot add
        x, padding = F.pad(x, (geometry.left, geometry.right, geometry.top, geometry.bottom)), 0
    return F.conv2d(x, weight, bias, padding=padding, dilation=geometry[6:8],
                    groups=weight.shape[0] if channels is None else channels)


def _as_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *where_keep: int) -> Tensor:
    y = pytorch_conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype),
                       _geometry(weight, where_keep[:6]))
    return _laid_out_like(y, x)


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.library.impl('large_kernel_conv::quantize_pixels', 'default')
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x.float(), scale).round_().clamp_(0, 255).to(torch.uint8)


@torch.library.impl('large_kernel_conv::depthwise_conv2d', 'default')
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *where_keep: int) -> Tensor:
    geometry = _geometry(weight, where_keep[:6])
    if not choice.load(x, weight, geometry):
        return _as_conv2d(x, weight, bias, *where_keep)
    if not choice.is_for_triton(x):
        # now the CPU kernels' own, which are loaded
        return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, *where_keep)
    y = triton_conv.convolve(x.contiguous(), weight.contiguous(), geometry,
                             None if bias is None else bias.contiguous())
    return _laid_out_like(y, x)


@torch.library.impl('large_kernel_conv::depthwise_conv2d_backward', 'default')
def _(grad: Tensor, x: Tensor, weight: Tensor, *where_wants_keep: int) -> tuple[Tensor, Tensor]:
    where, (want_x, want_weight, _) = where_wants_keep[:6], where_wants_keep[6:]
    grad_x, grad_weight = x.new_empty(0), weight.new_empty((0, *weight.shape[1:]), dtype=torch.float32)
    geometry = _geometry(weight, where)
    if not choice.load(x, weight, geometry):
        found_x, found_weight = _conv2d_backward(grad, x, weight.to(x.dtype), geometry, want_x, want_weight)
        return found_x if want_x else grad_x, found_weight.float() if want_weight else grad_weight
    if not choice.is_for_triton(x):
        return torch.ops.large_kernel_conv.depthwise_conv2d_backward(grad, x, weight, *where_wants_keep)
    grad = grad.contiguous()
    if want_x:
        found = triton_conv.convolve(grad, weight.contiguous(), geometry.reversed(), turned=True)
        grad_x = _laid_out_like(found, x)
    if want_weight:
        grad_weight = triton_conv.weight_gradient(x.contiguous(), grad, geometry)
    return grad_x, grad_weight


def _conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want_x: bool,
                     want_weight: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of weight by pytorch_conv2d."""
    inputs, padding = x, [geometry.top, geometry.left]
    if not geometry.is_symmetric:
        inputs = F.pad(x, (geometry.left, geometry.right, geometry.top, geometry.bottom))
        padding = [0, 0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, inputs, weight, None, (1, 1), padding, geometry[6:8], False, (0, 0), weight.shape[0],
        (want_x, want_weight, False))
    if want_x and not geometry.is_symmetric:
        height, width = x.shape[2:]
        grad_x = grad_x[:, :, geometry.top:geometry.top + height, geometry.left:geometry.left + width]
        grad_x = _laid_out_like(grad_x, x)
    return grad_x, grad_weight


# ---- Gradients ---------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *where, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.where = where
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = None
    if want_x or want_weight:
        grad_x, grad_weight = torch.ops.large_kernel_conv.depthwise_conv2d_backward(
            grad, x, weight, *ctx.where, want_x, want_weight, not want_weight)
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if want_bias else None
    grad_weight = grad_weight.to(weight.dtype) if want_weight else None
    return grad_x if want_x else None, grad_weight, grad_bias, *[None] * 7


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


def _flops(outputs: torch.Size, weight: torch.Size) -> int:
    """Two for each tap and output, in the padding too: what F.conv2d counts as, whatever is computed."""
    return 2 * math.prod(outputs) * weight[-2] * weight[-1]


@register_flop_formula([torch.ops.large_kernel_conv.depthwise_conv2d,
                        torch.ops.large_kernel_conv.depthwise_conv2d_prepared])
def _forward_flops(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return _flops(out_shape, weight)


@register_flop_formula(torch.ops.large_kernel_conv.depthwise_conv2d_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, *where_wants_keep: int,
                    **_: object) -> int:
    return sum(where_wants_keep[6:8]) * _flops(grad, weight)
