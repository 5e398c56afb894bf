"""Read all images of a data set, as training would, before a run, and list those that cannot be read.

python tools/check_images.py my_data

takes the parent of train and val, or any folder with images below it. It finds images as main.py does; the
last line says how many there are and how many of them cannot be read. The exit status is 1 if there is any.
"""
import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import distributed
import utils
from image_data.decode import decode_image
from image_data.folders import find_images, passed_over_note
from options import add_max_image_pixels

BATCH = 16  # images between two signs of life of a process


class Reasons(Dataset):
    """(path, why the image cannot be read or '') of each path."""

    def __init__(self, paths: Sequence[str], max_pixels: int):
        self.paths, self.max_pixels = paths, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, str]:
        path = self.paths[index]
        try:
            decode_image(path, self.max_pixels)
        except ValueError as error:
            return path, str(error)
        return path, ''


def check(paths: Sequence[str], max_pixels: int, workers: int) -> Iterator[tuple[str, str]]:
    """Yield each path, in order, with the reason why it cannot be read, or ''; `workers` processes read."""
    reasons = Reasons(paths, max_pixels)
    for batch in distributed.Loader(reasons, BATCH, list, **distributed.worker_options(workers)):
        yield from batch


def progress(done: int, total: int, bad: int, seconds: float) -> str:
    """The line that is shown meanwhile."""
    bar, eta = '#' * (20 * done // total), datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f'[{bar:20}] {done:,} of {total:,} images, {bad:,} bad  {done / seconds:.0f} images/s  eta {eta}'


def get_args_parser() -> argparse.ArgumentParser:
    """The folder and the options."""
    parser = argparse.ArgumentParser('check_images.py', description='List the images that cannot be read')
    parser.add_argument('folder', metavar='FOLDER',
                        help='with images below it, such as that of train and val')
    parser.add_argument('--num_workers', default=os.cpu_count(), type=int,
                        help='processes that read; default: one for each CPU')
    add_max_image_pixels(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    """Print what cannot be read; return how many images that are.

    Raises UserError for what a user can mend.
    """
    if args.num_workers < 0:
        raise utils.UserError(f'--num_workers {args.num_workers} must be at least 0')
    if not os.path.isdir(args.folder):
        raise utils.UserError(f'there is no folder {args.folder}')
    paths, passed_over = find_images(args.folder)
    if passed_over:
        print(f'{args.folder}: {passed_over_note(passed_over)}', flush=True)
    if not paths:
        raise utils.UserError(f'{args.folder} holds no image')
    terminal = sys.stderr.isatty()
    every, clear = (0.5, '\r\033[K') if terminal else (30, '')  # seconds between two lines of progress
    bad, start, shown = 0, time.time(), 0.0
    reasons = check(paths, args.max_image_pixels, min(args.num_workers, len(paths)))
    for done, (path, reason) in enumerate(reasons, 1):
        if reason:
            bad += 1
            print(clear, end='', file=sys.stderr, flush=True)
            print(f'{path}: {reason}', flush=True)
        seconds = time.time() - start
        if seconds - shown > every or done == len(paths):
            end = '' if terminal and done < len(paths) else '\n'
            print(clear + progress(done, len(paths), bad, seconds), end=end, file=sys.stderr, flush=True)
            shown = seconds
    print(f'{len(paths):,} images checked, {bad:,} cannot be read')
    return bad


if __name__ == '__main__':
    with utils.script():
        torch.set_num_threads(1)
        sys.exit(1 if main(get_args_parser().parse_args()) else 0)
