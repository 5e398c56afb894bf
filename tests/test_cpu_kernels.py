"""The CPU kernels' library: when it is compiled and loaded, and its values at every width of vectors."""
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from conftest import ROOT, run_script
from large_kernel_conv import cpu


@pytest.fixture(scope='module', autouse=True)
def the_kernels_are_there():
    assert cpu.load() is None


def test_asking_compiles_nothing_and_loads_what_is_there(tmp_path):
    code = textwrap.dedent('''
        import torch
        from large_kernel_conv import DepthwiseConv2d, implementation
        layer, x = DepthwiseConv2d(8, 13), torch.randn(1, 8, 20, 20)
        print(implementation(x, layer.weight))
        print(implementation(x.double(), layer.weight.double())[0])
    ''')
    run = run_script('python', '-c', code, TORCH_EXTENSIONS_DIR=str(tmp_path / 'empty'))
    asked, double = run.stdout.splitlines()  # nothing else is printed, so nothing is compiled
    assert asked.startswith("('cpu', '") and 'compiled at first use' in asked and double == 'pytorch'
    assert not (tmp_path / 'empty').exists()
    assert run_script('python', '-c', code).stdout.startswith("('cpu fft', '1 tile of ")


# `copied`: in the place of the compiler, a copy of the library that this process has loaded, after a while
BUILD = textwrap.dedent('''
    import pathlib, shutil, sys, time, torch
    from large_kernel_conv import cpu, depthwise_conv2d, implementation

    def copy(sources, folder):
        (folder / 'lock').touch()  # as torch's builder does
        time.sleep(2)
        shutil.copy(library, folder / f'{folder.name}.so')

    library, = sys.argv[1:] or [None]
    cpu._compile = copy if library else cpu._compile
    x, weight = torch.randn(1, 8, 20, 20), torch.randn(8, 1, 13, 13)
    y = depthwise_conv2d(x, weight)
    depthwise_conv2d(x, weight)
    expected = torch.nn.functional.conv2d(x, weight, padding=6, groups=8)
    print(implementation(x, weight), torch.allclose(y, expected, atol=1e-3))
''')
compiled_or_copied = pytest.mark.parametrize('library', [
    pytest.param([cpu.library_file()], id='copied'),
    pytest.param([], id='compiled', marks=pytest.mark.slow)])


@compiled_or_copied
def test_processes_compile_once_and_a_killed_build_does_not_stop_them(library, tmp_path):
    env = {**os.environ, 'TORCH_EXTENSIONS_DIR': str(tmp_path / 'a folder'), 'OMP_NUM_THREADS': '1'}
    # a first one, killed while it compiles: torch's lock file and half-made objects stay behind
    first = subprocess.Popen([sys.executable, '-c', BUILD, *library], cwd=ROOT, env=env, text=True,
                             stderr=subprocess.PIPE, start_new_session=True)
    assert first.stderr.readline().startswith('Compiling')
    while not list(tmp_path.glob('a folder/*/lock')):
        assert first.poll() is None
    os.killpg(first.pid, 9)
    first.wait()
    assert list(tmp_path.glob('a folder/*/lock'))
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: run_script('python', '-c', BUILD, *library, **env), range(3)))
    output = ''.join(run.stdout for run in runs)
    assert output.count("('cpu fft'") == output.count('True') == 3, output
    assert output.count('Compiling the large-kernel convolution') == 1
    assert len(output.splitlines()) == 4  # nothing else is printed


@compiled_or_copied
def test_a_damaged_library_is_compiled_again(library, tmp_path):
    env = {'TORCH_EXTENSIONS_DIR': str(tmp_path)}
    run_script('python', '-c', BUILD, *library, **env)
    built, = tmp_path.glob('*/*.so')
    built.write_bytes(built.read_bytes()[:5000])
    output = run_script('python', '-c', BUILD, *library, **env).stdout
    assert 'Compiling' in output and "('cpu fft'" in output and 'True' in output


def test_without_a_compiler_one_warning_and_pytorchs_convolution(tmp_path):
    run = run_script('python', '-c', BUILD, CXX='/no/such/compiler', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "('pytorch', 'the CPU kernels could not be compiled (RuntimeError: " in run.stdout
    assert 'True' in run.stdout
    assert '/no/such/compiler: not found' in run.stdout
    assert run.stdout.count('large-kernel convolutions run as F.conv2d, which is many times slower') == 1


# Values at every width that this CPU can compute with. Its own is what all other tests ran at.

WIDTHS = {16: 'x86-64-v4', 8: 'x86-64-v3', 4: 'x86-64-v2'}  # lanes of the kernels: AVX-512, AVX2, SSE
# what PyTorch's own kernels shall take this CPU for
CPUS = {8: {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2'},
        4: {'ATEN_CPU_CAPABILITY': 'default', 'ONEDNN_MAX_CPU_ISA': 'SSE41'}}
DRIVER = ROOT / 'tests' / 'check_cpu_kernels.cpp'


def own_width() -> int:
    return {'AVX512': 16, 'AVX2': 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def flags_for(lanes: int) -> list[str]:
    """cpu.FLAGS for that width."""
    if lanes > own_width() or (lanes < own_width() and '-march=native' not in cpu.FLAGS):
        pytest.skip(f'this CPU computes with {own_width()} lanes')
    narrower = lanes < own_width()
    return [f'-march={WIDTHS[lanes]}' if flag == '-march=native' and narrower else flag for flag in cpu.FLAGS]


@pytest.mark.parametrize('lanes', [
    pytest.param(lanes, marks=() if lanes == own_width() else pytest.mark.slow) for lanes in WIDTHS])
def test_kernels_at_every_width(lanes, tmp_path):
    """As they are compiled for users; with guard pages right around every tensor."""
    flags = flags_for(lanes)
    with mock.patch.object(cpu, 'FLAGS', flags):
        library = cpu._built_library()
    torch_libraries = str(pathlib.Path(torch.__file__).parent / 'lib')
    program = tmp_path / 'check'
    subprocess.run(['g++', *flags, '-O2', '-std=c++20', '-o', program, DRIVER, library, '-L', torch_libraries,
                    '-ltorch_cpu', '-ltorch', '-lc10'], check=True)
    run = subprocess.run([program], env={**os.environ, 'LD_LIBRARY_PATH': torch_libraries}, text=True,
                         capture_output=True, check=False)
    output = run.stdout + run.stderr
    assert run.returncode == 0 and f'{lanes} lanes: largest relative error' in run.stdout, output


@pytest.mark.slow
@pytest.mark.parametrize('lanes', CPUS)
def test_values_at_other_widths(lanes):
    """What depends on values in a process whose kernels, and PyTorch's, are those of an older CPU."""
    if lanes == own_width():
        pytest.skip('the width of all other tests')
    tests = [f'tests/test_large_kernel_conv.py::{name}' for name in (
        'test_outputs_and_gradients_are_those_of_float64', 'test_random_shapes', 'test_views_of_any_strides',
        'test_large_sums_keep_their_accuracy', 'test_nan_stays_with_its_image_and_channel_pair',
        'test_changed_weights_are_seen', 'test_results_do_not_depend_on_the_run_and_hardly_on_threads',
        'test_a_frozen_layer_follows_the_size_of_the_map')]
    tests += [f'tests/test_geometry.py::{name}' for name in (
        'test_outputs_and_gradients_are_those_of_float64', 'test_random_geometries',
        'test_sequences_of_any_length', 'test_nan_stays_with_its_image_and_channel_pair')]
    golden = ['tests/test_replknet.py::test_logits_equal_the_published_ones',
              'tests/test_replknet.py::test_features_equal_the_published_ones',
              'tests/test_replknet.py::test_a_training_step_equals_the_published_one',
              'tests/test_engine.py::test_the_recipe_follows_the_published_trajectory']
    run = run_script('python', '-c', textwrap.dedent('''
        import sys, pytest
        from large_kernel_conv import cpu
        cpu.FLAGS = sys.argv[1].split()
        sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))
    '''), ' '.join(flags_for(lanes)), *tests, *golden, **CPUS[lanes])
    assert run.returncode == 0, run.stdout


def test_kernels_with_neon_emulated(tmp_path):
    compiler, emulator = 'aarch64-linux-gnu-g++', 'qemu-aarch64-static'
    if not all(map(shutil.which, (compiler, emulator))):
        pytest.skip('needs g++-aarch64-linux-gnu and qemu-user-static')
    sources = [file for file in cpu.SOURCES.glob('*.cpp') if file.name != 'ops.cpp']
    program = tmp_path / 'check'
    flags = ['-O2', '-std=c++20', *(flag for flag in cpu.FLAGS if flag.startswith('-f'))]
    subprocess.run([compiler, '-static', *flags, '-o', program, DRIVER, *sources], check=True)
    run = subprocess.run([emulator, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and '4 lanes: largest relative error' in run.stdout, run.stdout + run.stderr
