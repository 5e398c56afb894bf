"""large_kernel_conv/memory.py: a process that keeps the memory it frees."""
import platform
import textwrap

import pytest

from conftest import run_script


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
