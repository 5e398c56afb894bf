"""The depthwise convolution as a function, and which implementation it would run."""
import warnings

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from large_kernel_conv import choice, cpu, triton_conv
from large_kernel_conv.geometry import Geometry, check_shapes
from large_kernel_conv.operators import pytorch_conv2d
from large_kernel_conv.tracing import constants_are_folded


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own K x K kernel: stride 1, zero padding K // 2.

    x (N, C, H, W), any float dtype, memory format and device; weight (C, 1, K, K), K odd; bias (C,).
    Returns (N, C, H, W) in x's dtype (autocast's, where that is on) and memory format. Differentiable once.
    Raises ValueError where shapes, dtypes or devices do not fit.

    Errors are those of float32 sums, relative to the largest value; on GPUs where torch allows TF32, its
    default, those of TF32. Where a CPU uses Fourier transforms, the largest value is that of an image's pair
    of channels: a channel of much smaller values than its partner's, 16 channels away on AVX-512, has as many
    digits less.

    torch.fx records one call of this function; torch.jit.trace and torch.onnx.export F.conv2d's operator,
    which runs where this package is not.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(depthwise_conv2d, (x, weight), x, weight, bias)
    if torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()):
        return _traced_conv2d(x, weight, bias)
    geometry = check_shapes(x, weight, bias)
    _check_dtypes(x, weight, bias)
    if not choice.load(x, weight, geometry):
        return pytorch_conv2d(x, weight, bias, geometry)
    device = 'cuda' if x.is_cuda else 'cpu'
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))  # the operators take a weight of any of their dtypes
    if not x.is_contiguous() and x.stride(1) == 1:
        # a slice of a channels_last map, say; else nothing is copied
        x = x.contiguous(memory_format=torch.channels_last)
    if (torch.compiler.is_compiling() and not torch.is_grad_enabled() and not choice.is_for_triton(x)
            and constants_are_folded()):
        spectra = torch.ops.large_kernel_conv.prepared_spectra(weight, x.shape[2], x.shape[3])
        return torch.ops.large_kernel_conv.depthwise_conv2d_prepared(x, weight, spectra, bias, False)
    # the weight's spectra are kept for the next call where it is not trained
    keep = not (torch.is_grad_enabled() and weight.requires_grad)
    return torch.ops.large_kernel_conv.depthwise_conv2d(x, weight, bias, keep)


def implementation(x: Tensor, weight: Tensor) -> tuple[str, str]:
    """Return (name, reason): which implementation depthwise_conv2d(x, weight) would run now, and why.

    Names: 'cpu fft', 'cpu direct', 'triton', 'pytorch'; 'cpu' where the CPU kernels, which choose between the
    first two, are not compiled yet: asking does not compile them. Shapes and errors are depthwise_conv2d's.
    """
    geometry = check_shapes(x, weight, None)
    _check_dtypes(x, weight, None)
    refusal = choice.refusal(x, weight, geometry)
    if refusal is not None:
        return 'pytorch', refusal
    if choice.is_for_triton(x):
        precision = {'tf32': ', in TF32', 'tf32x3': ', in three products of TF32', 'ieee': ''}
        how = precision[triton_conv.precision()] if x.dtype == torch.float32 else ''
        return 'triton', 'as matrix products on tensor cores' + how
    return cpu.implementation(*x.shape[1:], geometry)


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype = x.dtype
    if ((weight.dtype != dtype or (bias is not None and bias.dtype != dtype))
            and not torch.is_autocast_enabled(x.device.type)):
        other = weight if weight.dtype != dtype else bias
        raise ValueError(f'x, weight and bias must have one dtype, not {dtype} and {other.dtype}')


def _traced_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with warnings.catch_warnings():  # of sizes that become constants: the weight's do, rightly
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        check_shapes(x, weight, bias)
        _check_dtypes(x, weight, bias)
        return pytorch_conv2d(x, weight, bias, Geometry(*map(int, weight.shape[2:])), int(weight.shape[0]))
