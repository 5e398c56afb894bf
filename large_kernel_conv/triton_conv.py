"""The GPU implementation: the Triton kernels of triton_kernels.py, launched. Nothing is built at install.

Triton comes with torch's CUDA and ROCm wheels; it compiles a kernel when it first meets a shape. Importing
this needs neither.
"""
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from large_kernel_conv.geometry import Geometry, make_geometry
from large_kernel_conv.tracing import assume_constant_result

Shape = tuple[int, int, int, int]  # N, C, H, W
MAX_CHANNELS = 65535  # the second axis of a CUDA grid
PROGRAMS = 1024  # that keep a GPU of some hundred multiprocessors busy
# In channels_last cuDNN needs no copy, ours two. On an H100 (64 x 512 x 14 x 14, float16) it took cuDNN
# 0.06 ms at K 7, 0.9 at 9.
CHANNELS_LAST_KERNEL = 9
# Triton's interpreter runs the kernels, on tensors of any device. For checks; it is slow. Triton too reads
# this at import.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def refusal(x: Tensor, geometry: Geometry) -> str | None:
    """Why F.conv2d computes a convolution of x (N, C, H, W) on a GPU, or None where the kernels do."""
    if geometry.largest_side <= 5:
        return 'F.conv2d is left kernels up to 5 x 5: as a matrix product they would multiply mostly zeros'
    if geometry.largest_side < CHANNELS_LAST_KERNEL and x.stride(1) == 1 and not x.is_contiguous():
        least = make_geometry(CHANNELS_LAST_KERNEL, CHANNELS_LAST_KERNEL)
        return f'F.conv2d is left kernels smaller than {least} in channels_last'
    if x.shape[1] > MAX_CHANNELS:
        return f'a GPU kernel takes at most {MAX_CHANNELS} channels'
    return problem(x.device)


@assume_constant_result
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
        return (f'{torch.cuda.get_device_name(device)} is older than compute capability 8.0, '
                'the first whose tensor cores serve')
    try:
        import triton
        # compiles what launches kernels, which needs a C compiler and Python's headers
        _ = triton.runtime.driver.active.utils
    except Exception as error:
        reason = f'Triton does not start ({type(error).__name__}: {error})'
        warnings.warn(f'large-kernel convolutions run as F.conv2d: {reason}', stacklevel=2)
        return reason
    return None


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None,
             turned: bool = False) -> Tensor:
    """y (N, C, H', W') of x (N, C, H, W), weight (C, 1, Kh, Kw), of any dtype, bias (C,), all contiguous.

    turned: with the kernels turned by 180 degrees, which makes it the gradient of x from that of y, in the
    reversed geometry.
    """
    images, channels, height, width = x.shape
    out_height, out_width = geometry.output_size(height, width)
    y = torch.empty((images, channels, out_height, out_width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    run, sizes, (top, bottom, left, right) = _convolve_plan(
        x.shape, x.dtype, geometry, precision(), warps(_capability(x.device)), autotuned())
    size = channels, taps_height, taps_width, pack = taps_shape(
        channels, geometry, top, bottom, left, right, x.dtype)
    taps = torch.empty(size, dtype=x.dtype, device=x.device)

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        across = math.ceil(out_width / (tile['COLUMNS'] or out_width))
        down = math.ceil(out_height / (tile['BANDS'] * tile['ROWS']))
        return across * down * math.ceil(images / tile['IMAGES']), channels

    with _on_device_of(x):
        _kernel('lay_out_taps')[math.ceil(taps[0].numel() / 1024), channels](
            weight, taps, taps_height, taps_width, top, left, **taps_constants(geometry), PACK=pack,
            TURNED=turned, BLOCK=1024)
        run[grid](
            x, taps if pack == 1 else taps.view(torch.int64), bias, y, images, channels,
            height, width // alignment(width), out_height, out_width // alignment(out_width),
            taps_height, taps_width, top, left,
            **convolve_constants(geometry), ALIGN=alignment(width), OUT_ALIGN=alignment(out_width),
            HAS_BIAS=bias is not None, PRECISION=precision(), IN_FLOAT32=INTERPRETED, **sizes)
    return y


def weight_gradient(x: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """The gradient (C, 1, Kh, Kw), float32, of the weight, from x (N, C, H, W) and that of y (N, C, H', W').

    Both are contiguous, of one dtype. The parts of the images are added up by themselves and then together:
    the same sums, in the same order, each time.
    """
    images, channels, height, width = x.shape
    out_height, out_width = grad.shape[2:]
    if not grad.numel():
        return x.new_zeros((channels, 1, *geometry[:2]), dtype=torch.float32)
    run, sizes, parts = _weight_gradient_plan(
        x.shape, x.dtype, geometry, warps(_capability(x.device)), autotuned())
    sums = torch.empty((parts, channels, *geometry[:2]), dtype=torch.float32, device=x.device)

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return math.ceil(geometry.kernel_height / tile['KERNEL_ROWS']), channels, parts

    with _on_device_of(x):
        run[grid](
            x, grad, sums, images, channels,
            height, width // alignment(width), out_height, out_width // alignment(out_width), parts,
            **weight_gradient_constants(geometry), ALIGN=alignment(width), OUT_ALIGN=alignment(out_width),
            PRECISION=weight_gradient_precision(), IN_FLOAT32=INTERPRETED, **sizes)
    return (sums.sum(0) if parts > 1 else sums[0]).unsqueeze(1)


# ---- What the kernels are compiled for ---------------------------------------------------------------------


def taps_constants(geometry: Geometry) -> dict[str, int]:
    """Those of triton_kernels.lay_out_taps that the geometry gives."""
    return {'KERNEL_HEIGHT': geometry.kernel_height, 'KERNEL_WIDTH': geometry.kernel_width,
            'LEFT': geometry.left, 'DOWN': geometry.dilation_height, 'ACROSS': geometry.dilation_width}


def convolve_constants(geometry: Geometry) -> dict[str, int]:
    """Those of triton_kernels.convolve."""
    down, across = geometry.reach
    return {'REACH_DOWN': down, 'REACH_ACROSS': across, 'TOP': geometry.top, 'LEFT': geometry.left}


def weight_gradient_constants(geometry: Geometry) -> dict[str, int]:
    """Those of triton_kernels.weight_gradient."""
    return {**taps_constants(geometry), 'TAPS': power_of_two(geometry.kernel_width), 'TOP': geometry.top}


# ---- Sizes -------------------------------------------------------------------------------------------------


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is no smaller than n, nor than the least that tensor cores take."""
    return max(least, 1 << (n - 1).bit_length())


def alignment(width: int) -> int:
    """The largest power of two up to 16 that divides a width: rows start at multiples of it."""
    return math.gcd(width, 16)


def convolve_tile(shape: Shape, dtype: torch.dtype, precision: str, pixels: int | None = None,
                  columns: int | None = None, depth: int | None = None, warps: int = 4,
                  values: int = 0) -> dict[str, int]:
    """The tile sizes of triton_kernels.convolve for y (N, C, H, W), and the launch options that go with them.

    A product has up to 64 rows, one image's band each, or several bands of few images. It is as wide as
    registers allow, since each value of x that is loaded serves a whole band: 256 pixels, in TF32 half of
    that, and a quarter where float32 is three products. On an H100, in float16, maps of up to 32 columns are
    fastest as whole rows, wider ones as tiles of 32. pixels, columns, depth and warps replace what is chosen
    here. values: of an image of x, where that is more than one of y has.
    """
    images, channels, height, width = shape
    half, once = dtype != torch.float32, precision == 'tf32'
    pixels = pixels or (256 if half else 128 if once else 64)
    columns = (0 if width <= 32 else 32) if columns is None else columns
    # narrow blocks miss fewer of the taps
    depth = depth or (16 if width > 32 else min(32, power_of_two(width, 8)))
    tile_images = _images_within_32_bits(min(64, power_of_two(images, 1)),
                                         max(values, channels * height * width))
    # 16 rows at least
    bands = max(min(64 // tile_images, power_of_two(height, 1) // 2), math.ceil(16 / tile_images))
    tile_width = columns or width
    rows = max(1, min(pixels // tile_width, math.ceil(height / bands)))
    return {'IMAGES': tile_images, 'BANDS': bands, 'ROWS': rows, 'COLUMNS': columns,
            'PIXELS': power_of_two(rows * tile_width), 'DEPTH': depth,
            'IN_ROWS': max(1, (32 if half or once else 16) // depth), 'num_warps': warps, 'num_stages': 3}


def warps(capability: tuple[int, int]) -> int:
    """How many warps share a tile: 4 where tensor cores take both operands from shared memory (9.x, 10.x).

    Elsewhere tiles of this size take more registers than four warps have. On an H100 convolve took twice as
    long with 8.
    """
    return 4 if capability[0] in (9, 10) else 8


def taps_margins(geometry: Geometry, width: int, tile: dict[str, int]) -> tuple[int, int, int, int]:
    """What a tile reads of a map of this width: rows of zeros above and below a kernel, and columns left and
    right of that of an output's own pixel."""
    _, across = geometry.reach
    _, out_width = geometry.output_size(1, width)
    block, depth = tile['COLUMNS'] or out_width, tile['DEPTH']
    left = min(math.ceil(out_width / block) * block, geometry.left + depth - 1 + block) - 1
    right = min(math.ceil(width / depth) * depth, across - geometry.left + depth - 1 + block) - 1
    return tile['ROWS'] - 1, tile['ROWS'] - 1 + tile['IN_ROWS'] - 1, left, right


def taps_shape(channels: int, geometry: Geometry, top: int, bottom: int, left: int, right: int,
               dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The shape of what triton_kernels.lay_out_taps writes, with these margins, for an x of dtype."""
    pack = 1 if dtype == torch.float32 else 4
    return channels, top + geometry.reach[0] + 1 + bottom, left + 1 + right, pack


def weight_gradient_tile(shape: Shape, dtype: torch.dtype, kernel_rows: int | None = None,
                         columns: tuple[int, int] | None = None, warps: int = 4,
                         values: int = 0) -> dict[str, int]:
    """The tile sizes of triton_kernels.weight_gradient for y (N, C, H, W), and their launch options.

    Some kernel rows times a tile's input columns make the product's rows, output columns its columns; it sums
    over 32 rows of maps, of as many images as there are: rows of one image meet the padding sooner.
    kernel_rows, columns and warps replace what is chosen here. values: as for convolve_tile.
    """
    images, channels, height, width = shape
    half = dtype != torch.float32
    out_columns = min(64, power_of_two(width))
    in_columns, out_columns = columns or (out_columns if width <= 64 else 32, out_columns)
    kernel_rows = kernel_rows or (4 if half or in_columns * out_columns <= 1024 else 2)
    tile_images = _images_within_32_bits(min(32, power_of_two(images, 1)),
                                         max(values, channels * height * width))
    rows = max(min(32 // tile_images, power_of_two(height, 1)), math.ceil(16 / tile_images))
    return {'KERNEL_ROWS': kernel_rows, 'IN_COLUMNS': in_columns, 'OUT_COLUMNS': out_columns,
            'IMAGES': tile_images, 'ROWS': rows, 'num_warps': warps, 'num_stages': 3 if half else 2}


def weight_gradient_parts(images: int, channels: int, geometry: Geometry, tile: dict[str, int]) -> int:
    """Into how many parts the images are shared out, so that there are enough programs."""
    programs = math.ceil(geometry.kernel_height / tile['KERNEL_ROWS']) * channels
    return min(math.ceil(PROGRAMS / programs), math.ceil(images / tile['IMAGES']))


def _images_within_32_bits(tile_images: int, per_image: int) -> int:
    """As many images of `per_image` values as a tile's offsets, of 32 bits, reach; at most tile_images."""
    while tile_images > 1 and tile_images * per_image >= 2 ** 31:
        tile_images //= 2
    return tile_images


def autotuned() -> bool:
    """Whether Triton times some sizes at the first call with a shape and keeps the fastest.

    LARGE_KERNEL_CONV_AUTOTUNE=1 asks for it. That takes up to a minute a shape, and results may then differ
    between runs by the rounding of another order of summation.
    """
    return os.environ.get('LARGE_KERNEL_CONV_AUTOTUNE') == '1'


def convolve_candidates(shape: Shape, dtype: torch.dtype, precision: str, default_warps: int = 4,
                        values: int = 0) -> list[dict[str, int]]:
    """The tile sizes that are timed on request; those of convolve_tile are the first."""
    width = shape[3]
    tiles = [convolve_tile(shape, dtype, precision, warps=default_warps, values=values)]
    for columns, pixels, depth, warps in itertools.product((0, 16, 32, 64), (64, 128, 256), (16, 32), (4, 8)):
        if columns < width and pixels >= (columns or width):
            tiles.append(convolve_tile(shape, dtype, precision, pixels, columns, depth, warps, values))
    return [tile for i, tile in enumerate(tiles) if tile not in tiles[:i]]


def weight_gradient_candidates(shape: Shape, dtype: torch.dtype, default_warps: int = 4,
                               values: int = 0) -> list[dict[str, int]]:
    """The tile sizes that are timed on request; those of weight_gradient_tile are the first."""
    tiles = [weight_gradient_tile(shape, dtype, warps=default_warps, values=values)]
    sides = (16, 16), (32, 32), (32, 64), (64, 64)
    for columns, kernel_rows, warps in itertools.product(sides, (2, 4, 8), (4, 8)):
        if columns[1] < max(2 * shape[3], 32) and kernel_rows * math.prod(columns) <= 16384:
            tiles.append(weight_gradient_tile(shape, dtype, kernel_rows, columns, warps, values))
    return [tile for i, tile in enumerate(tiles) if tile not in tiles[:i]]


# ---- Plans: what is the same in each call with a shape -----------------------------------------------------


@functools.cache
def _convolve_plan(shape: Shape, dtype: torch.dtype, geometry: Geometry, precision: str,
                   warps: int, tuned: bool) -> tuple[Callable, dict[str, int], tuple[int, ...]]:
    """What to launch, its tile sizes where it does not choose them, and the taps' margins (taps_margins)."""
    out_shape, values = (*shape[:2], *geometry.output_size(*shape[2:])), math.prod(shape[1:])
    if tuned:
        tiles = convolve_candidates(out_shape, dtype, precision, warps, values)
        run, sizes = _tuned('convolve', tiles), {}
    else:
        tiles = [convolve_tile(out_shape, dtype, precision, warps=warps, values=values)]
        run, sizes = _kernel('convolve'), tiles[0]
    margins = zip(*(taps_margins(geometry, shape[3], tile) for tile in tiles), strict=True)
    return run, sizes, tuple(max(side) for side in margins)


@functools.cache
def _weight_gradient_plan(shape: Shape, dtype: torch.dtype, geometry: Geometry, warps: int,
                          tuned: bool) -> tuple[Callable, dict[str, int], int]:
    """What to launch, its tile sizes where it does not choose them, and the number of parts."""
    out_shape, values = (*shape[:2], *geometry.output_size(*shape[2:])), math.prod(shape[1:])
    tile = weight_gradient_tile(out_shape, dtype, warps=warps, values=values)
    parts = weight_gradient_parts(shape[0], shape[1], geometry, tile)
    if tuned:
        tiles = weight_gradient_candidates(out_shape, dtype, warps, values)
        return _tuned('weight_gradient', tiles), {}, parts
    return _kernel('weight_gradient'), tile, parts


def _kernel(name: str) -> Callable:
    from large_kernel_conv import triton_kernels  # only where it runs: it needs Triton
    return getattr(triton_kernels, name)


def _tuned(name: str, tiles: list[dict[str, int]]) -> Callable:
    """A kernel of triton_kernels that times tiles when it is first run, and keeps the fastest."""
    import triton
    configs = [triton.Config({size: value for size, value in tile.items() if size.isupper()},
                             num_warps=tile['num_warps'], num_stages=tile['num_stages']) for tile in tiles]
    return triton.autotune(configs, key=[])(_kernel(name))


def precision() -> str:
    """How matrix products multiply float32: in TF32 where cuDNN's convolutions may, else as three such
    products.

    TF32 has 10 bits of mantissa. The matrix cores of AMD's CDNA multiply float32 itself.
    """
    if torch.version.hip is not None:
        return 'ieee'
    return 'tf32' if torch.backends.cudnn.conv.fp32_precision == 'tf32' else 'tf32x3'


def weight_gradient_precision() -> str:
    """The same for the weight's gradient: never one product in TF32.

    It sums along memory's slow axis, from which tensor cores take no TF32. The compiler turns operands around
    faster when they are split into parts anyway: three products took 0.4 to 0.6 of the time of one on an
    H100.
    """
    return 'ieee' if torch.version.hip is not None else 'tf32x3'


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, as far as warps() asks: AMD's GPUs and the interpreter have one with 4
    warps."""
    nvidia = device.type == 'cuda' and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (9, 0)


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    # Triton launches on the current device
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
