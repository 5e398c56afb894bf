"""The GPU implementation: the Triton kernels of triton_kernels.py, launched. Nothing is built at install.

Triton comes with torch's CUDA and ROCm wheels; it compiles a kernel when it first meets a shape. Importing this needs neither.
"""
import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

MAX_CHANNELS = 65535  # the second axis of a CUDA grid
PROGRAMS = 1024  # that keep a GPU of some hundred multiprocessors busy
# In channels_last cuDNN needs no copy, ours two: they pay from some size on. An estimate; it was never measured.
CHANNELS_LAST_KERNEL = 13
# Triton's interpreter runs the kernels, on tensors of any device. For checks; it is slow. Triton too reads this at import.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def refusal(x: Tensor, kernel: int) -> str | None:
    """Why F.conv2d computes a convolution of x (N, C, H, W) on a GPU, or None where the kernels do."""
    if kernel <= 5:
        return 'F.conv2d is left kernels up to 5 x 5: as a matrix product they would multiply mostly zeros'
    if kernel < CHANNELS_LAST_KERNEL and x.stride(1) == 1 and not x.is_contiguous():
        return f'F.conv2d is left kernels smaller than {CHANNELS_LAST_KERNEL} x {CHANNELS_LAST_KERNEL} in channels_last'
    if x.shape[1] > MAX_CHANNELS:
        return f'a GPU kernel takes at most {MAX_CHANNELS} channels'
    return problem(x.device)


@torch.compiler.assume_constant_result
def problem(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU, or None."""
    return _problem(device)


@functools.cache
def _problem(device: torch.device) -> str | None:
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return None  # only a tensor without values can be here, of a model that is traced for another machine
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        if not name.startswith(('gfx90a', 'gfx94', 'gfx95')):
            return f'{name} has no matrix cores for float32: the kernels serve gfx90a, gfx942, gfx950'
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0, the first whose tensor cores serve'
    try:
        import triton
        _ = triton.runtime.driver.active.utils  # compiles what launches kernels, which needs a C compiler and Python's headers
    except Exception as error:
        reason = f'Triton does not start ({type(error).__name__}: {error})'
        warnings.warn(f'large-kernel convolutions run as F.conv2d: {reason}', stacklevel=2)
        return reason
    return None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, turned: bool = False) -> Tensor:
    """y (N, C, H, W) of x (N, C, H, W), weight (C, 1, K, K) and bias (C,), all contiguous, x and weight of one dtype.

    turned: with the kernels turned by 180 degrees, which makes it the gradient of x from that of y.
    """
    y = torch.empty_like(x)
    images, channels, height, width = x.shape
    sizes = {} if autotuned() else convolve_tiles(*x.shape, x.dtype)

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        across, down = math.ceil(width / tile['COLUMNS']), math.ceil(height / tile['ROWS'])
        return across * down * math.ceil(images / tile['IMAGES']), channels

    if x.numel():
        with _on_device_of(x):
            _kernel('convolve', autotuned())[grid](
                x, weight, bias, y, images, channels, height, width // alignment(width), K=weight.shape[-1],
                ALIGN=alignment(width), TURNED=turned, HAS_BIAS=bias is not None, PRECISION=precision(),
                IN_FLOAT32=INTERPRETED, **sizes)
    return y


def weight_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """The gradient (C, 1, K, K), float32, of the weight, from x and the gradient of y (N, C, H, W), contiguous, of one dtype.

    The parts of the images are added up by themselves and then together: the same sums, in the same order, each time.
    """
    images, channels, height, width = x.shape
    if not x.numel():
        return x.new_zeros((channels, 1, kernel, kernel), dtype=torch.float32)
    tile = weight_gradient_tiles(*x.shape, x.dtype)
    parts = weight_gradient_parts(images, channels, kernel, tile)
    sums = torch.empty((parts, channels, kernel, kernel), dtype=torch.float32, device=x.device)

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return math.ceil(kernel / tile['KERNEL_ROWS']), channels, parts

    with _on_device_of(x):
        _kernel('weight_gradient', autotuned())[grid](
            x, grad, sums, images, channels, height, width // alignment(width), parts, K=kernel, TAPS=power_of_two(kernel),
            ALIGN=alignment(width), PRECISION=precision(), IN_FLOAT32=INTERPRETED, **({} if autotuned() else tile))
    return sums.sum(0).unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is no smaller than n, nor than the least that tensor cores take."""
    return max(least, 1 << (n - 1).bit_length())


def alignment(width: int) -> int:
    """The largest power of two up to 16 that divides a width: rows start at multiples of it."""
    return math.gcd(width, 16)


def convolve_tiles(images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes of triton_kernels.convolve, and the launch options that go with them.

    A product is as wide as a tile of the map, 32 columns (64 where that is the whole map: fewer columns are read twice), and
    its rows are few rows (each meets other kernel rows in the padding, for nothing) of as many images as there are, at most 64.
    float32 takes twice the shared memory and registers: half the rows.
    """
    half = dtype != torch.float32
    columns = 64 if half and 32 < width <= 64 else min(32, power_of_two(width))
    product_rows = 256 if half else 128
    tile_images = _images_within_32_bits(min(product_rows // 4, power_of_two(images, 1)), channels * height * width)
    rows = min(product_rows // tile_images, power_of_two(height, 1), 64)
    rows = max(rows, 16 // tile_images)  # a product has 16 rows at least
    large = tile_images * rows == 256
    return {'IMAGES': tile_images, 'ROWS': rows, 'COLUMNS': columns, 'DEPTH': min(32, power_of_two(width)),
            'num_warps': 8 if large or not half else 4, 'num_stages': 3 if half else 2}


def weight_gradient_tiles(images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile sizes of triton_kernels.weight_gradient, and the launch options that go with them.

    Four kernel rows times a tile's columns make the product's rows; it sums over 32 rows of the map, of one image if it has as
    many. float32 is shared out among twice the warps: with four, three products of TF32 take more registers than there are.
    """
    half = dtype != torch.float32
    columns = min(32, power_of_two(width))
    rows = min(32, power_of_two(height, 1))
    tile_images = _images_within_32_bits(min(32 // rows, power_of_two(images, 1)), channels * height * width)
    rows = max(rows, 16 // tile_images)
    return {'KERNEL_ROWS': 4, 'IN_COLUMNS': columns, 'OUT_COLUMNS': columns, 'IMAGES': tile_images, 'ROWS': rows,
            'num_warps': 4 if half else 8, 'num_stages': 3 if half else 2}


def weight_gradient_parts(images: int, channels: int, kernel: int, tile: dict[str, int]) -> int:
    """Into how many parts the images are shared out, so that there are enough programs."""
    programs = math.ceil(kernel / tile['KERNEL_ROWS']) * channels
    return min(math.ceil(PROGRAMS / programs), math.ceil(images / tile['IMAGES']))


def _images_within_32_bits(tile_images: int, per_image: int) -> int:
    """As many images of `per_image` values as a tile's offsets, of 32 bits, reach; at most tile_images."""
    while tile_images > 1 and tile_images * per_image >= 2 ** 31:
        tile_images //= 2
    return tile_images


def autotuned() -> bool:
    """Whether Triton times some sizes at the first call with a shape and keeps the fastest: LARGE_KERNEL_CONV_AUTOTUNE=1.

    That takes seconds a shape, and results may then differ between runs by the rounding of another order of summation.
    """
    return os.environ.get('LARGE_KERNEL_CONV_AUTOTUNE') == '1'


@functools.cache
def _kernel(name: str, tuned: bool) -> Callable:
    """A kernel of triton_kernels, or, tuned, one that chooses its own tile sizes."""
    import triton

    from large_kernel_conv import triton_kernels
    kernel = getattr(triton_kernels, name)
    if not tuned:
        return kernel
    if name == 'convolve':
        sizes = [{'IMAGES': images, 'ROWS': rows, 'COLUMNS': columns, 'DEPTH': depth}
                 for images, rows in ((64, 4), (32, 4), (8, 16), (1, 64))
                 for columns, depth in ((16, 16), (32, 16), (32, 32), (64, 32))]
    else:
        sizes = [{'IMAGES': images, 'ROWS': rows, 'IN_COLUMNS': columns, 'OUT_COLUMNS': columns, 'KERNEL_ROWS': kernel_rows}
                 for images, rows in ((8, 4), (2, 16), (1, 32)) for columns in (16, 32) for kernel_rows in (2, 4, 8)]
    configs = [triton.Config(size, num_warps=warps, num_stages=3) for size in sizes for warps in (4, 8)]
    return triton.autotune(configs, key=['images', 'channels', 'height', 'width_by_align', 'ALIGN', 'K', 'PRECISION'],
                           prune_configs_by={'early_config_prune': _within_32_bits})(kernel)


def _within_32_bits(configs: list, arguments: dict, **constants) -> list:
    """The configurations whose tiles' offsets 32 bits reach."""
    per_image = math.prod(arguments[name] for name in ('channels', 'height', 'width_by_align')) * constants['ALIGN']
    return [config for config in configs if config.kwargs['IMAGES'] in (1, _images_within_32_bits(
        config.kwargs['IMAGES'], per_image))]


def precision() -> str:
    """How matrix products multiply float32: in TF32 where torch allows cuDNN's convolutions to, else in three products of it.

    TF32 has 10 bits of mantissa. The matrix cores of AMD's CDNA multiply float32 itself.
    """
    if torch.version.hip is not None:
        return 'ieee'
    return 'tf32' if torch.backends.cudnn.conv.fp32_precision == 'tf32' else 'tf32x3'


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()  # Triton launches on the current device
