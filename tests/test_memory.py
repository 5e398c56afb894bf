"""large_kernel_conv/memory.py: a process that keeps the memory it frees."""
import platform
import textwrap
from unittest import mock

import pytest

import main
from conftest import SHORT, run_main, run_script
from erf import visualize_erf


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='nothing happens without glibc')
def test_memory_of_a_freed_tensor_stays_with_the_process():
    output = run_script('python', '-c', textwrap.dedent('''
        from pathlib import Path
        import resource
        import torch
        from large_kernel_conv.memory import keep_freed_memory

        def resident():  # MiB
            return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2 ** 20

        def left_by_256_mib():
            before = resident()
            torch.ones(64 << 20)  # and freed
            return resident() - before

        print(left_by_256_mib())
        keep_freed_memory()
        print(left_by_256_mib())
    ''')).stdout
    by_default, kept = map(float, output.split()[-2:])
    assert by_default < 64
    assert kept > 192


def run_erf(tmp_path):
    options = ['--device', 'cpu', '--model', 'RepLKNet-31T', '--data_path', tmp_path, '--save_path', tmp_path / 'erf.npy']
    visualize_erf.main(visualize_erf.get_args_parser().parse_args(list(map(str, options))))


def run_training(tmp_path):
    run_main(*SHORT, '--data_path', tmp_path)


@pytest.mark.parametrize(('script', 'run'), [(main, run_training), (visualize_erf, run_erf)])
def test_scripts_keep_it_on_cpus(script, run, tmp_path):
    class Called(Exception):
        """Raised by a test double, before anything is computed."""
    with mock.patch.object(script, 'keep_freed_memory', side_effect=Called), pytest.raises(Called):
        run(tmp_path)
