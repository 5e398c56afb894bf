"""tools/toeplitz_model.py: counts by hand. That it counts what the kernels execute is shown in triton_values.py."""
import pytest
import torch

from conftest import run_script
from tools.toeplitz_model import Cost, cost


@pytest.mark.parametrize('height, width, kernel', [(5, 7, 3), (4, 4, 9), (1, 1, 31), (9, 2, 5)])
def test_useful_operations_are_those_of_taps_that_meet_pixels(height, width, kernel):
    taps = range(-(kernel // 2), kernel // 2 + 1)
    meetings = sum(0 <= row + i < height and 0 <= column + j < width
                   for row in range(height) for column in range(width) for i in taps for j in taps)
    for what in ('forward', 'input gradient', 'weight gradient'):
        assert cost((2, 3, height, width), kernel, torch.float16, what).useful == 2 * 2 * 3 * meetings


def test_each_tensor_is_read_or_written_once():
    assert cost((2, 3, 8, 8), 5, torch.float16, 'forward').bytes == 2 * (2 * 2 * 3 * 64 + 3 * 25)
    assert cost((2, 3, 8, 8), 5, torch.float16, 'weight gradient').bytes == 2 * 2 * 2 * 3 * 64 + 4 * 3 * 25


def test_the_limit_is_that_of_the_slower_of_both():
    compute, memory = Cost(1, 312 * 10 ** 9, 1), Cost(1, 1, 2039 * 10 ** 6)
    assert compute.limit('A100', 'bfloat16') == pytest.approx(1e-3)
    assert compute.limit('A100', 'float32') == pytest.approx(6e-3)  # three products at half the peak
    assert compute.limit('A100', 'tf32') == pytest.approx(2e-3)
    assert memory.limit('A100', 'float16') == pytest.approx(1e-3)


def test_the_script_prints_a_line_for_each_pass_and_refuses_nonsense():
    def run(*arguments):
        return run_script('python', 'tools/toeplitz_model.py', *arguments)
    assert run('--shape', '64', '384', '32', '32', '--kernel', '31').stdout.count('64x384x32x32') == 3
    for arguments in (['--kernel', '31'], ['--shape', '64', '384', '32', '32', '--kernel', '4'],
                      ['--shape', '0', '384', '32', '32', '--kernel', '3']):
        refused = run(*arguments)
        assert refused.returncode == 2 and 'error: --shape' in refused.stdout
