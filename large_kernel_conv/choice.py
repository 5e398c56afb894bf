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
    if not x.is_contiguous() and x.dtype == torch.float32 and geometry.largest_side <= 3:
        # it need not gather the channels
        return 'F.conv2d is as fast for float32 kernels up to 3 x 3 in channels_last'
    return None


def load(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Load what computes this faster than F.conv2d, compiling it if need be; False where nothing does."""
    return refusal(x, weight, geometry) is None and (is_for_triton(x) or cpu.load() is None)
