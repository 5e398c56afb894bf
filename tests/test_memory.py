"""large_kernel_conv/memory.py: a process that keeps the memory it frees; the scripts that ask for it."""
import platform
import textwrap

import pytest

from conftest import run_script

MEASURE = textwrap.dedent('''
    import contextlib, os, resource, sys
    from pathlib import Path
    sys.path[:0] = ['.', 'tests']
    import torch
    from conftest import SHORT, run_main
    from erf import visualize_erf
    from large_kernel_conv.memory import give_back_freed_memory, keep_freed_memory

    def resident():  # MiB
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2 ** 20

    def left_by_256_mib():
        before = resident()
        torch.ones(64 << 20)  # and freed
        return resident() - before

    def main():
        run_main(*SHORT, '--data_path', sys.argv[1])

    def erf():
        options = ['--device', 'cpu', '--model', 'RepLKNet-31T', '--data_path', sys.argv[1],
                   '--save_path', sys.argv[1] + '/erf.npy']
        visualize_erf.main(visualize_erf.get_args_parser().parse_args(options))

    def nothing():
        pass

    def give_back():
        keep_freed_memory()
        left_by_256_mib()
        give_back_freed_memory()
        print('given back', resident(), flush=True)

    print('given back', resident(), flush=True)
    for run in (nothing, keep_freed_memory, main, erf, give_back):
        if os.fork() == 0:  # since what a process keeps it keeps to its end
            with contextlib.suppress(ValueError):  # there are no images; so the scripts compute nothing
                run()
            print('left by', run.__name__, left_by_256_mib(), flush=True)
            os._exit(0)
        os.wait()
''')


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='nothing happens without glibc')
def test_memory_of_a_freed_tensor_stays_with_the_process_and_with_scripts_on_cpus(tmp_path):
    output = run_script('python', '-c', MEASURE, tmp_path).stdout
    lines = [line.split()[-2:] for line in output.splitlines() if line.startswith('left by')]
    left = {name: float(mib) for name, mib in lines}
    assert left.pop('nothing') < 64
    assert left.keys() == {'keep_freed_memory', 'main', 'erf', 'give_back'}
    assert min(left.values()) > 192, output
    before, after = (float(line.split()[-1]) for line in output.splitlines() if line.startswith('given back'))
    assert after - before < 64
