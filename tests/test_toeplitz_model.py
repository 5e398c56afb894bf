"""large_kernel_conv/toeplitz_model.py: its counts, the long way. triton_values.py counts what kernels do."""
import itertools
import math

import pytest
import torch

from conftest import run_script
from large_kernel_conv import toeplitz_model, triton_conv
from large_kernel_conv.toeplitz_model import GPUS, PASSES, Cost, cost
from replknet_zoo import create_model


@pytest.mark.parametrize('height, width, kernel', [(5, 7, 3), (4, 4, 9), (1, 1, 31), (9, 2, 5)])
def test_useful_operations_are_those_of_taps_that_meet_pixels(height, width, kernel):
    taps = range(-(kernel // 2), kernel // 2 + 1)
    meetings = sum(0 <= row + i < height and 0 <= column + j < width
                   for row in range(height) for column in range(width) for i in taps for j in taps)
    for what in PASSES:
        useful = cost((2, 3, height, width), kernel, torch.float16, what).useful
        assert useful == 2 * 2 * 3 * meetings


SHAPES = [((3, 2, 17, 23), 7), ((64, 1, 14, 14), 27), ((1, 2, 40, 33), 13), ((2, 4, 4, 4), 31)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('shape, kernel', SHAPES)
def test_executed_operations_are_those_of_each_programs_loops(shape, kernel, dtype):
    """Program by program, product by product, as triton_kernels.convolve and weight_gradient go."""
    (images, channels, height, width), reach = shape, kernel // 2
    tile = triton_conv.convolve_tile(shape, dtype, 'tf32')
    columns, products = tile['COLUMNS'] or width, 0
    tiles = itertools.product(range(0, images, tile['IMAGES']), range(channels),
                              range(0, height, tile['BANDS'] * tile['ROWS']), range(0, width, columns))
    for _, _, row, column in tiles:
        last = math.ceil(min(width, column + columns + reach) / tile['DEPTH'])
        for _ in range(max(0, column - reach) // tile['DEPTH'], last):
            shift = max(0, reach - (row + (tile['BANDS'] - 1) * tile['ROWS']))
            while shift < min(kernel + tile['ROWS'] - 1, height + reach - row):
                shift, products = shift + tile['IN_ROWS'], products + 1
    of_one = 2 * math.prod(tile[name] for name in ('IMAGES', 'BANDS', 'PIXELS', 'IN_ROWS', 'DEPTH'))
    forward = cost(shape, kernel, dtype, 'forward')
    assert forward.executed == cost(shape, kernel, dtype, 'input gradient').executed == products * of_one
    assert forward.executed >= forward.useful

    tile, products = triton_conv.weight_gradient_tile(shape, dtype), 0
    for _, _, first in itertools.product(range(0, images, tile['IMAGES']), range(channels),
                                         range(0, kernel, tile['KERNEL_ROWS'])):
        for column in range(0, width, tile['OUT_COLUMNS']):
            block = max(0, column - reach) // tile['IN_COLUMNS'] * tile['IN_COLUMNS']
            while block < min(width, column + tile['OUT_COLUMNS'] + reach):
                first_row = max(0, reach - (first + tile['KERNEL_ROWS'] - 1))
                rows = range(first_row, min(height, height + reach - first))
                products += math.ceil(len(rows) / tile['ROWS'])
                block += tile['IN_COLUMNS']
    sizes = 'KERNEL_ROWS', 'IN_COLUMNS', 'OUT_COLUMNS', 'IMAGES', 'ROWS'
    of_one = 2 * math.prod(tile[name] for name in sizes)
    gradient = cost(shape, kernel, dtype, 'weight gradient')
    assert gradient.executed == products * of_one >= gradient.useful


def test_each_tensor_is_read_or_written_once():
    x, weight, half, single = torch.empty(2, 3, 8, 8), torch.empty(3, 1, 5, 5), 2, 4  # bytes
    maps = 2 * half * x.numel()
    assert cost(x.shape, 5, torch.float16, 'forward').bytes == maps + half * weight.numel()
    assert cost(x.shape, 5, torch.float16, 'weight gradient').bytes == maps + single * weight.numel()


def test_peaks_follow_from_the_gpus_data_sheets():
    """Multiprocessors, GHz, operations of each a clock in half precision; bits of the bus, Gbit/s of each."""
    sheets = {'A100': (108, 1.41, 2048, 5120, 3.186), 'H100': (132, 1.83, 4096, 5120, 5.235),
              'MI300X': (304, 2.1, 2048, 8192, 5.2)}
    assert sheets.keys() == GPUS.keys()
    for name, (processors, clock, operations, bus, pin) in sheets.items():
        half, single, bandwidth = GPUS[name]
        assert half == pytest.approx(processors * clock * operations / 1e3, rel=0.01)
        assert half / single == pytest.approx(8 if name == 'MI300X' else 2, rel=0.01)
        assert bandwidth == pytest.approx(bus * pin / 8, rel=0.01)


def test_the_limit_is_that_of_the_slower_of_arithmetic_and_memory():
    """A layer's limit: of arithmetic with large kernels, which grows with them; of memory with small ones."""
    shape = 64, 384, 32, 32
    limits = {k: cost(shape, k, torch.float16, 'forward').limit('A100', 'float16') for k in (3, 31)}
    maps = 2 * 2 * 64 * 384 * 32 * 32  # bytes, once in and once out
    assert limits[3] == pytest.approx(maps / 2039e9, rel=1e-3) and limits[31] > 2 * limits[3]
    heavy, light = Cost(1, 10 ** 15, 1), Cost(1, 1, 10 ** 12)
    for gpu in GPUS:
        single = 1 if gpu == 'MI300X' else 3  # products of TF32 that a float32 takes
        assert heavy.limit(gpu, 'float32') == pytest.approx(single * heavy.limit(gpu, 'tf32'))
        assert heavy.limit(gpu, 'tf32') > heavy.limit(gpu, 'bfloat16')
        assert light.limit(gpu, 'float32') == light.limit(gpu, 'float16')


def test_the_stages_are_those_of_the_model():
    with torch.device('meta'):
        state = create_model('RepLKNet-31B').state_dict()
    for i, (shape, kernel) in enumerate(toeplitz_model.STAGES):
        weight = state[f'stages.{i}.blocks.0.large_kernel.lkb_origin.conv.weight']
        assert weight.shape == (shape[1], 1, kernel, kernel)
        assert shape[2:] == (224 // 4 >> i, 224 // 4 >> i)


def test_the_module_prints_a_line_for_each_pass_and_refuses_nonsense(monkeypatch, capsys):
    layer = ['--shape', 64, 384, 32, 32, '--kernel', 31]
    done = run_script('python', '-m', 'large_kernel_conv.toeplitz_model', *layer)
    assert done.returncode == 0 and done.stdout.count('64x384x32x32') == 3
    for arguments in (['--kernel', '31'], ['--shape', '64', '384', '32', '32', '--kernel', '4'],
                      ['--shape', '0', '384', '32', '32', '--kernel', '3']):
        monkeypatch.setattr('sys.argv', ['toeplitz_model', *arguments])
        with pytest.raises(SystemExit, match='2'):
            toeplitz_model.main()
        assert 'error: --shape' in capsys.readouterr().err
