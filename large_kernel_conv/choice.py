"""Which implementation computes a convolution: asked of its tensors, before anything is loaded."""
import torch
from torch import Tensor

from large_kernel_conv import cpu, triton_conv
from large_kernel_conv.geometry import Geometry
from large_kernel_conv.tracing import in_function_transform

CPU = torch.device('cpu')  # devices are compared in a quarter of the time that asking for their type takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the implementations that are not F.conv2d


def is_for_triton(x: Tensor) -> bool:
    """Whether the GPU implementation is the one to ask."""
    return x.is_cuda or triton_conv.INTERPRETED


def refusal(x: Tensor, weight: Tensor, geometry: Geometry) -> str | None:
    """Why F.conv2d computes this, or None where a faster implementation does, if it can be loaded."""
    for_triton = is_for_triton(x)
    if x.layout is not torch.strided or not (for_triton or x.device == CPU):
        return f'there is no other implementation for {x.layout} tensors on {x.device.type}'
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f'{weight.dtype if x.dtype in DTYPES else x.dtype} is left to F.conv2d'
    if in_function_transform():
        return 'forward-mode derivatives and torch.func are left to F.conv2d'
    if for_triton:
        return triton_conv.refusal(x, geometry)
    return None if x.is_contiguous() else _refusal_in_channels_last(x, weight, geometry)


def _refusal_in_channels_last(x: Tensor, weight: Tensor, geometry: Geometry) -> str | None:
    """The same in channels_last on a CPU, where F.conv2d is at its best: it need not gather the channels.

    The bounds are those beyond which ours was the faster one, on an Intel Xeon with AVX-512.
    """
    height, width = geometry[:2]
    in_float32, dilated = x.dtype == torch.float32, geometry.is_dilated
    if height == width and height % 2 and not dilated:
        return ('F.conv2d is as fast for float32 kernels up to 3 x 3 in channels_last'
                if in_float32 and height <= 3 else None)
    if width <= 3 and height < 31 and not dilated:
        return 'F.conv2d is as fast for kernels of up to 3 columns in channels_last'
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    few = height * width <= (49 if in_float32 else 10)
    if few and not trained and (not dilated or max(geometry.reach) < 18):
        return 'F.conv2d is as fast for kernels of few taps in channels_last, without gradients'
    return None


def load(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Load what computes this faster than F.conv2d, compiling it if need be; False where nothing does."""
    return refusal(x, weight, geometry) is None and (is_for_triton(x) or cpu.load() is None)
