"""Train every network of networks.py on Fashion-MNIST and on digits, three seeds each, and measure their ERF.

python study/run.py

goes on where it was stopped: a run that has its result.json is not trained again, and main.py goes on within
one. Each run has one thread, so that its bits do not depend on the number of CPUs; as many runs as there are
CPUs go on at once. The plan below was written down before it was run. report.py draws and tabulates what came
out.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

from image_data.fashion_mnist import DEBIANS, read_idx, write_idx
from study.networks import NETWORKS
from utils import UserError, log, replace_file, script

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SIZE = 128  # pixels, to which images are enlarged: stage 1's map of 32 is then wider than a kernel of 31
ERF_IMAGES = 50


class Task(NamedTuple):
    """A data set, and how long to train on it."""
    data_set: str
    epochs: int


TASKS = {'fashion': Task('FMNIST', 5), 'digits': Task('DIGITS', 10)}
FASHION_IMAGES = {'train': 6000, 't10k': 2000}  # the first of each part
BATCH_SIZE, LR = 32, 4e-3


def get_args_parser() -> argparse.ArgumentParser:
    """Where the results go, and which part is run."""
    parser = argparse.ArgumentParser('run.py', description="Train the study's networks")
    parser.add_argument('--output', type=Path, default=ROOT / 'study_output', metavar='FOLDER')
    parser.add_argument('--tasks', nargs='+', default=list(TASKS), choices=TASKS)
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument('--seeds', nargs='+', default=list(SEEDS), type=int)
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what has no result yet, seed by seed, so that a part of the study is balanced too."""
    write_fashion_subset(args.output / 'fashion_mnist')
    planned = itertools.product(args.seeds, args.tasks, args.networks)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda run: run_once(*run, args.output), planned):
            pass  # map raises what a run raised, and starts no others


def run_once(seed: int, task: str, network: str, output: Path) -> None:
    """Train and measure one network, unless that was done, and write result.json."""
    folder = output / task / network / str(seed)
    if not (folder / 'result.json').exists():
        result = train(TASKS[task], network, seed, folder, output)
        text = json.dumps({'task': task, 'network': network, 'seed': seed, **result}, indent=1)
        replace_file(folder / 'result.json', lambda file: file.write_text(text + '\n'))


def train(task: Task, network: str, seed: int, folder: Path, output: Path) -> dict:
    """Train and evaluate one network, by main.py; top-1 after the last epoch, in percent, and the rest."""
    start = time.time()
    command(folder, 'main.py', '--model', ROOT / 'study' / f'networks.py:{network}',
            '--data_set', task.data_set,
            *(['--data_path', output / 'fashion_mnist'] if task.data_set == 'FMNIST' else []),
            '--input_size', SIZE, '--crop_pct', 1, '--epochs', task.epochs, '--warmup_epochs', 1,
            '--batch_size', BATCH_SIZE, '--lr', LR, '--seed', seed, '--aa', 'none', '--reprob', 0,
            '--mixup', 0, '--cutmix', 0, '--smoothing', 0, '--num_workers', 1, '--channels_last',
            '--device', 'cpu', '--output_dir', folder)
    lines = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    result = {'acc1': lines[-1]['test_acc1'], 'test_loss': lines[-1]['test_loss'],
              'train_loss': lines[-1]['train_loss'], 'parameters': lines[-1]['n_parameters'],
              'acc1_of_epochs': [line['test_acc1'] for line in lines], 'seconds': time.time() - start}
    if task.data_set == 'FMNIST':
        result['erf'] = measure_erf(network, folder, output / 'fashion_mnist' / 'images')
    return result


def measure_erf(network: str, folder: Path, images: Path) -> dict:
    """Part of the area that holds more than 0.5 and 0.99 of the contributions, at the size of training."""
    matrix = folder / 'erf.npy'
    command(folder, 'erf/visualize_erf.py', '--model', ROOT / 'study' / f'networks.py:{network}', '--weights',
            folder / 'latest.pth', '--data_path', images, '--input_size', SIZE, '--num_images', ERF_IMAGES,
            '--device', 'cpu', '--save_path', matrix)
    command(folder, 'erf/analyze_erf.py', '--source', matrix, '--heatmap_save', folder / 'erf.png', '--json',
            folder / 'erf_table.json')
    (found,) = json.loads((folder / 'erf_table.json').read_text())
    return {str(square['threshold']): square['area_ratio'] for square in found['squares']
            if square['threshold'] in (0.5, 0.99)}


def command(folder: Path, script_name: str, *words: object) -> None:
    """Run a script of the repository on one thread; what it prints goes to the run's console.log.

    Raises UserError, which ends the study, if it fails.
    """
    log(f'{script_name} {" ".join(map(str, words))}')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'console.log', 'a', encoding='utf-8') as file:
        run = subprocess.run([sys.executable, ROOT / script_name, *map(str, words)], stdout=file,
                             stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if run.returncode:
        raise UserError(f'{script_name} failed: the reason is at the end of {folder / "console.log"}')


def write_fashion_subset(folder: Path) -> None:
    """The first images of Fashion-MNIST's two parts in its own format, and of the test part as PNGs too."""
    images = folder / 'images'
    images.mkdir(parents=True, exist_ok=True)
    for part, count in FASHION_IMAGES.items():
        for kind in ('images-idx3', 'labels-idx1'):
            values = read_idx(DEBIANS, f'{part}-{kind}-ubyte')[:count]
            write_idx(folder / f'{part}-{kind}-ubyte.gz', values)
    for i, pixels in enumerate(read_idx(str(folder), 't10k-images-idx3-ubyte')[:ERF_IMAGES]):
        Image.fromarray(np.asarray(pixels)).convert('RGB').save(images / f'{i:02}.png')


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
