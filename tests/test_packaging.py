"""What `pip install .` brings: the model, its weights and its convolution, for use without the rest."""
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import large_kernel_conv
from conftest import ROOT

tomllib = pytest.importorskip('tomllib', reason='from Python 3.11 on')

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
INSTALLED = ['large_kernel_conv', 'replknet', 'replknet_zoo', 'repmlpnet']
SOURCES = [file for name in INSTALLED for file in [*ROOT.glob(f'{name}.py'), *ROOT.glob(f'{name}/**/*.py')]]
# what a program does with an installed package, where there is nothing that only training needs
PROGRAM = """
import sys
sys.path += sys.argv[1:]
sys.modules.update(timm=None, torchvision=None, submitit=None, tensorboardX=None, PIL=None)
import torch
import large_kernel_conv, replknet, replknet_zoo, repmlpnet
print(large_kernel_conv.__file__, replknet.__file__, replknet_zoo.__file__, repmlpnet.__file__)
with torch.no_grad():
    for name in ('RepLKNet-31T', 'RepMLPNet-T32'):
        model = replknet_zoo.create_model(name, num_classes=5).eval()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
x, weight = torch.randn(2, 16, 31, 31), torch.randn(16, 1, 31, 31)
y, expected = large_kernel_conv.depthwise_conv2d(x, weight), torch.conv2d(x, weight, padding=15, groups=16)
assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
print(large_kernel_conv.implementation(x, weight)[0])
"""


def test_what_is_installed_has_no_common_name():
    setuptools = PYPROJECT['tool']['setuptools']
    assert sorted(setuptools['py-modules'] + setuptools['packages']) == INSTALLED


def test_the_dependencies_are_what_is_imported():
    imported = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition('.')[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition('.')[0])
    dependencies = {re.match(r'\w+', line)[0] for line in PYPROJECT['project']['dependencies']}
    # ninja is a program; torch brings triton, where there is one; timm_models.py is for those who have timm
    assert imported - sys.stdlib_module_names - {*INSTALLED, 'triton', 'timm'} == dependencies - {'ninja'}


def pip(command: str, *options) -> None:
    """pip, without network."""
    options = '--quiet', '--no-deps', '--no-index', *map(str, options)
    subprocess.run([sys.executable, '-m', 'pip', command, *options], check=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since a build leaves files behind, and takes those of the last one."""
    folder = tmp_path_factory.mktemp('wheel')
    left_out = shutil.ignore_patterns('.*', '*.egg-info', 'build', 'demo_output', 'toy_data', 'work_dirs')
    shutil.copytree(ROOT, folder / 'copy', ignore=left_out)
    pip('wheel', '--no-build-isolation', '--wheel-dir', folder, folder / 'copy')
    return next(folder.glob('*.whl'))


@pytest.mark.slow
def test_a_wheel_has_the_sources_in_python_and_cpp_and_nothing_else(wheel):
    sources = [*SOURCES, *(ROOT / 'large_kernel_conv' / 'cpu_kernels').iterdir()]
    names = [name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name]
    assert sorted(names) == sorted(str(file.relative_to(ROOT)) for file in sources)


@pytest.mark.slow
def test_an_installed_wheel_works_without_what_training_needs(wheel, tmp_path):
    pip('install', '--target', tmp_path / 'site', wheel)
    # -S: this environment's packages without its .pth files, of which one names the checkout
    program = [sys.executable, '-I', '-S', '-c', PROGRAM, tmp_path / 'site', sysconfig.get_path('platlib')]
    path = os.pathsep.join([sysconfig.get_path('scripts'), os.environ['PATH']])  # for ninja
    done = subprocess.run(program, cwd=tmp_path, env={**os.environ, 'PATH': path}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    files, implementation = done.stdout.splitlines()[-2:]
    assert all(file.startswith(str(tmp_path)) for file in files.split())
    here = large_kernel_conv.implementation(torch.empty(2, 16, 31, 31), torch.empty(16, 1, 31, 31))
    assert implementation == here[0]
