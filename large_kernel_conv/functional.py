"""The depthwise convolution as a function, and which implementation it would run."""
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from large_kernel_conv import choice, cpu, triton_conv
from large_kernel_conv.geometry import (
    Geometry,
    Padding,
    Padding1d,
    Pair,
    check_shapes,
    make_geometry,
    of_one_row,
)
from large_kernel_conv.operators import pytorch_conv2d
from large_kernel_conv.tracing import constants_are_folded


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: Padding = None,
                     dilation: Pair = 1) -> Tensor:
    """Convolve each channel with its own kernel, with stride 1 and zero padding: F.conv2d of C groups.

    x (N, C, H, W), any float dtype, memory format and device; weight (C, 1, Kh, Kw); bias (C,). padding:
    None keeps the map's size (odd kernels: Kh // 2 * dilation rows above and below, Kw // 2 * dilation
    columns left and right); else what F.conv2d takes, or ((top, bottom), (left, right)). dilation: an int or
    (vertical, horizontal). Returns (N, C, H', W'), sizes as F.conv2d's, in x's dtype (autocast's, where that
    is on) and memory format. Differentiable once. Raises ValueError where shapes, dtypes, devices, padding or
    dilation do not fit.

    Errors are those of float32 sums, relative to the largest value; on GPUs where torch allows TF32, its
    default, those of TF32. Where a CPU uses Fourier transforms, the largest value is that of an image's pair
    of channels: a channel of much smaller values than its partner's, 16 channels away on AVX-512, has as many
    digits less.

    torch.fx records one call of this function; torch.jit.trace and torch.onnx.export F.conv2d's operator,
    which runs where this package is not.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(depthwise_conv2d, (x, weight), x, weight, bias, padding, dilation)
    if torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()):
        return _traced_conv2d(x, weight, bias, padding, dilation)
    geometry = check_shapes(x, weight, bias, padding, dilation)
    _check_dtypes(x, weight, bias)
    if not choice.load(x, weight, geometry):
        return pytorch_conv2d(x, weight, bias, geometry)
    if geometry.surplus:  # outputs that meet zeros alone
        y = F.pad(_convolve(x, weight, None, geometry.without_surplus()), geometry.surplus)
        return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    return _convolve(x, weight, bias, geometry)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """By an operator of ours, which has been loaded."""
    device = 'cuda' if x.is_cuda else 'cpu'
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))  # the operators take a weight of any of their dtypes
    if not x.is_contiguous() and x.stride(1) == 1:
        # a slice of a channels_last map, say; else nothing is copied
        x = x.contiguous(memory_format=torch.channels_last)
    where = geometry.where
    if (torch.compiler.is_compiling() and not torch.is_grad_enabled() and not choice.is_for_triton(x)
            and constants_are_folded()):
        spectra = torch.ops.large_kernel_conv.prepared_spectra(weight, x.shape[2], x.shape[3], *where)
        return torch.ops.large_kernel_conv.depthwise_conv2d_prepared(x, weight, spectra, bias, *where, False)
    # the weight's spectra are kept for the next call where it is not trained
    keep = not (torch.is_grad_enabled() and weight.requires_grad)
    return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, *where, keep)


def depthwise_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: Padding1d = None,
                     dilation: int = 1) -> Tensor:
    """Convolve each channel of a sequence with its own kernel: depthwise_conv2d of maps of one row.

    x (N, C, T), of any length; weight (C, 1, K); bias (C,). padding: None, an int, 'same', 'valid', or
    (before, after): (K - 1, 0) makes it causal. Returns (N, C, T'); T' = T where padding is None, 'same' or
    causal. What depthwise_conv2d says of dtypes, devices, accuracy and errors holds here.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(depthwise_conv1d, (x, weight), x, weight, bias, padding, dilation)
    if x.dim() != 3 or weight.dim() != 3:
        raise ValueError(f'x must be (N, C, T) and weight (C, 1, K), not {tuple(x.shape)} and '
                         f'{tuple(weight.shape)}')
    across = dilation[0] if isinstance(dilation, (list, tuple)) and len(dilation) == 1 else dilation
    y = depthwise_conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, of_one_row(padding), (1, across))
    return y.squeeze(2)


def implementation(x: Tensor, weight: Tensor, padding: Padding = None, dilation: Pair = 1) -> tuple[str, str]:
    """Return (name, reason): which implementation depthwise_conv2d of these would run now, and why.

    Names: 'cpu fft', 'cpu direct', 'triton', 'pytorch'; 'cpu' where the CPU kernels, which choose between the
    first two, are not compiled yet: asking does not compile them. Shapes and errors are depthwise_conv2d's.
    """
    geometry = check_shapes(x, weight, None, padding, dilation)
    _check_dtypes(x, weight, None)
    refusal = choice.refusal(x, weight, geometry)
    if refusal is not None:
        return 'pytorch', refusal
    if choice.is_for_triton(x):
        precision = {'tf32': ', in TF32', 'tf32x3': ', in three products of TF32', 'ieee': ''}
        how = precision[triton_conv.precision()] if x.dtype == torch.float32 else ''
        return 'triton', 'as matrix products on tensor cores' + how
    return cpu.implementation(*x.shape[1:], geometry.without_surplus())


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype = x.dtype
    if ((weight.dtype != dtype or (bias is not None and bias.dtype != dtype))
            and not torch.is_autocast_enabled(x.device.type)):
        other = weight if weight.dtype != dtype else bias
        raise ValueError(f'x, weight and bias must have one dtype, not {dtype} and {other.dtype}')


def _traced_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding,
                   dilation: Pair) -> Tensor:
    with warnings.catch_warnings():  # of sizes that become constants: the weight's do, rightly
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        check_shapes(x, weight, bias, padding, dilation)
        _check_dtypes(x, weight, bias)
        kernel = map(int, weight.shape[2:])
        return pytorch_conv2d(x, weight, bias, make_geometry(*kernel, padding, dilation),
                              int(weight.shape[0]))
