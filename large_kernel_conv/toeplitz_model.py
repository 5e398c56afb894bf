"""What the GPU kernels cost by count: a limit to set a measured time against. It needs no GPU.

python -m large_kernel_conv.toeplitz_model                                    RepLKNet-31B's stages at 224 px
python -m large_kernel_conv.toeplitz_model --shape 64 384 32 32 --kernel 31   a layer of the paper's Table 1

As matrix products with Toeplitz matrices (triton_kernels.py) the kernels multiply zeros too: `waste` is the
operations executed over those of the taps that meet pixels. The limit is the larger of the time for the
executed operations at the tensor cores' peak and for reading and writing each tensor once at the memory's;
kernels reach a part of it.
"""
import argparse
import math
from typing import NamedTuple

import torch

from large_kernel_conv import triton_conv
from large_kernel_conv.triton_conv import Shape

# dense peaks as the makers state them: TFLOP/s in half precision and in TF32, GB/s. MI300X: float32 itself,
# not TF32
GPUS = {'A100': (312, 156, 2039), 'H100': (989, 494, 3350), 'MI300X': (1307, 163, 5300)}
DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'tf32': torch.float32,
          'float32': torch.float32}
# of RepLKNet-31B at 224 px, batch 64: x (N, C, H, W) and K
STAGES = (((64, 128, 56, 56), 31), ((64, 256, 28, 28), 29), ((64, 512, 14, 14), 27), ((64, 1024, 7, 7), 13))
PASSES = ('forward', 'input gradient', 'weight gradient')


class Cost(NamedTuple):
    """Of one pass over a layer. Operations: two for each multiplication."""
    useful: int  # of taps that meet pixels
    executed: int  # zeros of the Toeplitz matrices, and of tiles beyond the map, included
    bytes: int  # of the tensors read and written, each once

    def limit(self, gpu: str, dtype: str) -> float:
        """Seconds that the pass takes at least. float32 takes three products of TF32, but on AMD."""
        half, single, bandwidth = GPUS[gpu]
        peak = {'tf32': single, 'float32': single if gpu == 'MI300X' else single / 3}.get(dtype, half)
        return max(self.executed / (peak * 1e12), self.bytes / (bandwidth * 1e9))


def cost(shape: Shape, kernel: int, dtype: torch.dtype, what: str, precision: str = 'tf32') -> Cost:
    """The cost of one of PASSES over a layer with x (N, C, H, W); precision is triton_conv.precision's."""
    images, channels, height, width = shape
    useful = 2 * images * channels * _meetings(height, kernel) * _meetings(width, kernel)
    pixels, weights = math.prod(shape) * dtype.itemsize, channels * kernel ** 2
    if what == 'weight gradient':
        return Cost(useful, _weight_gradient_operations(shape, kernel, dtype), 2 * pixels + 4 * weights)
    executed = _convolve_operations(shape, kernel, dtype, precision)
    return Cost(useful, executed, 2 * pixels + weights * dtype.itemsize)


def _meetings(length: int, kernel: int) -> int:
    """Pairs of an output and a tap that meet a pixel, along one axis."""
    return sum(min(length, i + kernel // 2 + 1) - max(0, i - kernel // 2) for i in range(length))


def _column_blocks(width: int, reach: int, columns: int, depth: int) -> int:
    """Products across a map: for each tile of columns, the blocks of input columns that reach it."""
    blocks = 0
    for column in range(0, width, columns):
        first = max(0, column - reach) // depth * depth
        blocks += len(range(first, min(width, column + columns + reach), depth))
    return blocks


def _convolve_operations(shape: Shape, kernel: int, dtype: torch.dtype, precision: str) -> int:
    (images, channels, height, width), reach = shape, kernel // 2
    tile = triton_conv.convolve_tile(shape, dtype, precision)
    steps = 0
    for row in range(0, height, tile['BANDS'] * tile['ROWS']):
        first = max(0, reach - (row + (tile['BANDS'] - 1) * tile['ROWS']))
        last = min(kernel + tile['ROWS'] - 1, height + reach - row)
        steps += max(0, math.ceil((last - first) / tile['IN_ROWS']))
    products = steps * _column_blocks(width, reach, tile['COLUMNS'] or width, tile['DEPTH'])
    of_one = 2 * tile['IMAGES'] * tile['BANDS'] * tile['PIXELS'] * tile['IN_ROWS'] * tile['DEPTH']
    return math.ceil(images / tile['IMAGES']) * channels * products * of_one


def _weight_gradient_operations(shape: Shape, kernel: int, dtype: torch.dtype) -> int:
    (images, channels, height, width), reach = shape, kernel // 2
    tile = triton_conv.weight_gradient_tile(shape, dtype)
    steps = 0
    for first in range(0, kernel, tile['KERNEL_ROWS']):
        rows = min(height, height + reach - first) - max(0, reach - (first + tile['KERNEL_ROWS'] - 1))
        steps += max(0, math.ceil(rows / tile['ROWS']))  # a block may meet the padding only
    products = steps * _column_blocks(width, reach, tile['OUT_COLUMNS'], tile['IN_COLUMNS'])
    product_rows = tile['KERNEL_ROWS'] * tile['IN_COLUMNS']
    of_one = 2 * product_rows * tile['OUT_COLUMNS'] * tile['IMAGES'] * tile['ROWS']
    return math.ceil(images / tile['IMAGES']) * channels * products * of_one


def limit(shape: Shape, kernel: int, name: str, what: str, gpu: str) -> float:
    """Seconds that one of PASSES over a layer with x (N, C, H, W) takes at least; name: one of DTYPES."""
    dtype = DTYPES[name]
    if name == 'tf32' and (what == 'weight gradient' or gpu == 'MI300X'):
        name = 'float32'  # these are never one product in TF32
    return cost(shape, kernel, dtype, what, 'tf32' if name == 'tf32' else 'tf32x3').limit(gpu, name)


def get_args_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description='Count what the GPU kernels execute')
    parser.add_argument('--shape', type=int, nargs=4, metavar=('N', 'C', 'H', 'W'),
                        help='with --kernel: one layer')
    parser.add_argument('--kernel', type=int, metavar='K')
    parser.add_argument('--dtype', choices=DTYPES, default='float16',
                        help='tf32: float32 as torch computes it by default; float32: with TF32 off')
    return parser


def main() -> None:
    """Print the table."""
    parser = get_args_parser()
    args = parser.parse_args()
    if (args.shape is None) != (args.kernel is None):
        parser.error('--shape and --kernel go together')
    if args.kernel is not None and (args.kernel < 1 or args.kernel % 2 == 0 or min(args.shape) < 1):
        parser.error('--shape needs sizes of at least 1, --kernel an odd one')
    layers = [(tuple(args.shape), args.kernel)] if args.shape else STAGES
    print(f'{args.dtype}. GFLOP: operations / 1e9; limits in milliseconds, counted, not measured')
    gpus = ' '.join(f'{gpu:>7}' for gpu in GPUS)
    print(f'{"shape":>15} {"kernel":>6} {"pass":>15} {"useful GFLOP":>13} {"executed":>9} {"waste":>6} '
          f'{"MB":>7} {gpus}')
    for shape, kernel in layers:
        for what in PASSES:
            precision = 'tf32' if args.dtype == 'tf32' else 'tf32x3'
            c = cost(shape, kernel, DTYPES[args.dtype], what, precision)
            limits = ' '.join(f'{1e3 * limit(shape, kernel, args.dtype, what, gpu):7.3f}' for gpu in GPUS)
            print(f'{"x".join(map(str, shape)):>15} {kernel:>6} {what:>15} {c.useful / 1e9:13.1f} '
                  f'{c.executed / 1e9:9.1f} {c.executed / c.useful:6.2f} {c.bytes / 1e6:7.1f} {limits}')


if __name__ == '__main__':
    main()
