"""Golden data, small image folders, and ways to run main.py."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import main

torch.set_num_threads(1)  # small tensors gain nothing from more, and waiting threads burn the CPU
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / 'golden'
# the shapes that the golden data was recorded with
TINY = dict(large_kernel_sizes=[31, 29, 27, 13], layers=[1, 1, 2, 1], channels=[8, 16, 32, 64],
            drop_path_rate=0.0, small_kernel=5)
TINY_XL = dict(TINY, large_kernel_sizes=[27, 27, 27, 13], small_kernel=None, dw_ratio=1.5)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run: a sum that happens to be small has a large relative error."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def golden():
    """golden(name): the recorded arrays of name.npz, or the content of name.json."""
    def read(name):
        if (GOLDEN / f'{name}.json').exists():
            return json.loads((GOLDEN / f'{name}.json').read_text())
        return dict(np.load(GOLDEN / f'{name}.npz'))
    return read


def relative_error(value, expected) -> float:
    """Largest difference, of the largest expected value."""
    value, expected = torch.as_tensor(value).double(), torch.as_tensor(expected).double()
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


def with_random_weights(model: nn.Module) -> nn.Module:
    """Draw weights and BatchNorm statistics that let the image through to the logits; faster than fill().

    As built, a BatchNorm folds to nothing, and small weights leave of the image 1e-4 of a logit: a layer that
    computes nothing would not be seen.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for norm in norms(model):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, std=0.1)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def assert_same(found: object, expected: object, where: str) -> None:
    """That two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f'{where}/{key}')
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, list):
        assert_same(dict(enumerate(found)), dict(enumerate(expected)), where)
    else:
        assert found == expected, where


def write_images(folder: Path, classes: int, images: int, size: int = 40) -> None:
    """`images` random PNGs in each of `classes` class folders; every class has its own brightness."""
    random = np.random.RandomState(classes * images)
    for c in range(classes):
        (folder / f'class{c}').mkdir(parents=True)
        for i in range(images):
            pixels = random.randint(0, 80, (size, size, 3)) + 150 * c // classes
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'class{c}' / f'{i}.png')


@pytest.fixture
def float32_is_float32():
    """Keeps a GPU's convolutions from rounding to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def imagenet(tmp_path):
    """A folder in ImageNet's layout: 2 classes, 8 training images and, an odd number, 7 validation images."""
    write_images(tmp_path / 'data' / 'train', 2, 4)
    write_images(tmp_path / 'data' / 'val', 2, 4)
    (tmp_path / 'data' / 'val' / 'class1' / '3.png').unlink()
    return tmp_path / 'data'


TOY = ['--model', 'RepLKNet-31T', '--input_size', '32', '--num_workers', '0', '--device', 'cpu',
       '--channels_last']
# two epochs of two steps on the `imagenet` fixture
SHORT = [*TOY, '--nb_classes', '2', '--batch_size', '4', '--epochs', '2', '--warmup_epochs', '1', '--lr',
         '1e-3']


def run_main(*options) -> None:
    """main.py in this process."""
    main.main(main.get_args_parser().parse_args([str(option) for option in options]))


def run_first_epoch(*options) -> None:
    """main.py in this process, interrupted after its first epoch."""
    finish_epoch = main.Run.finish_epoch

    def finish_and_stop(*arguments):
        finish_epoch(*arguments)
        raise KeyboardInterrupt
    with mock.patch.object(main.Run, 'finish_epoch', finish_and_stop), pytest.raises(KeyboardInterrupt):
        run_main(*options)


def run_to_step(epoch: int, step: int, *options) -> None:
    """main.py in this process, interrupted after that step, both counted as after_step() does."""
    after_step = main.Run.after_step

    def stop(run, *where):
        after_step(run, *where)
        if where[:2] == (epoch, step):
            raise KeyboardInterrupt
    with mock.patch.object(main.Run, 'after_step', stop), pytest.raises(KeyboardInterrupt):
        run_main(*options)


def run_script(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """A command of its own process; `python` is this interpreter, stderr goes with stdout."""
    command = [sys.executable if word == 'python' else str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, text=True,
                          timeout=500, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def launch(processes: int, *options, launcher='torch.distributed.run') -> str:
    """main.py under a launcher; returns what it printed."""
    port = free_port()
    done = run_script('python', '-m', launcher, f'--nproc_per_node={processes}', f'--master_port={port}',
                      'main.py', *options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def log_lines(output_dir: Path) -> list[dict]:
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
            for line in (output_dir / 'log.txt').read_text().splitlines()]
