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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import distributed
import utils
from image_data.class_folders import folders_of
from image_data.decode import decode_image
from image_data.folders import find_images, passed_over_note, tars_alone, walk
from image_data.index import ImageIndex, open_index
from image_data.tars import split_tar
from options import add_max_image_pixels

BATCH = 16  # images between two signs of life of a process


class Reasons(Dataset):
    """(path, why the image cannot be read or '') of each of the paths, or of the images of an index."""

    def __init__(self, images: Sequence[str] | ImageIndex, max_pixels: int):
        self.images, self.max_pixels = images, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[str, str]:
        in_tars = isinstance(self.images, ImageIndex)
        path = self.images.name(i) if in_tars else self.images[i]
        try:
            decode_image(self.images.open(i) if in_tars else path, self.max_pixels)
        except ValueError as error:
            return path, str(error)
        return path, ''


def check(parts: Sequence[Sequence[str] | ImageIndex], max_pixels: int,
          workers: int) -> Iterator[tuple[str, str]]:
    """Yield each path, in order, with the reason why it cannot be read, or ''; `workers` processes read."""
    reasons = ConcatDataset([Reasons(part, max_pixels) for part in parts])
    for batch in distributed.Loader(reasons, BATCH, list, **distributed.worker_options(workers)):
        yield from batch


def progress(done: int, total: int, bad: int, seconds: float) -> str:
    """The line that is shown meanwhile."""
    bar, eta = '#' * (20 * done // total), datetime.timedelta(seconds=round(seconds / done * (total - done)))
    return f'[{bar:20}] {done:,} of {total:,} images, {bad:,} bad  {done / seconds:.0f} images/s  eta {eta}'


def find_parts(folder: str) -> tuple[list[Sequence[str] | ImageIndex], Counter]:
    """The images below a folder, or in a tar, in parts: files, and each tar that stands for a folder.

    With the suffixes of what is passed over. UserError where there is no folder.
    """
    if not os.path.isdir(folder) and not split_tar(folder)[0]:
        raise utils.UserError(f'there is no folder {folder}')
    paths, passed_over, tars = [], Counter(), [folder]
    if not split_tar(folder)[0]:
        paths, passed_over = find_images(folder)
        tars = {os.path.join(where.path, tar) for where in walk(folder)
                for tar in tars_alone(where.folders, where.files)}
        # those beside a folder, which main.py reads as train and val
        parts = folders_of(argparse.Namespace(data_set='IMNET', data_path=folder))
        tars |= {str(part) for part in parts if split_tar(part)[0]}
        passed_over -= Counter({'.tar': len(tars)})
    parts = [paths]
    for tar in sorted(tars):
        parts += [open_index(tar), open_index(tar, flat=True)]  # in its folders, and at its top
        passed_over += Counter(parts[-1].details['passed_over'])
    return [part for part in parts if len(part)], passed_over


def get_args_parser() -> argparse.ArgumentParser:
    """The folder and the options."""
    parser = argparse.ArgumentParser('check_images.py', description='List the images that cannot be read')
    parser.add_argument('folder', metavar='FOLDER',
                        help='with images below it, such as that of train and val; or a tar')
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
    parts, passed_over = find_parts(args.folder)
    images = sum(map(len, parts))
    if passed_over:
        print(f'{args.folder}: {passed_over_note(passed_over)}', flush=True)
    if not images:
        raise utils.UserError(f'{args.folder} holds no image')
    terminal = sys.stderr.isatty()
    every, clear = (0.5, '\r\033[K') if terminal else (30, '')  # seconds between two lines of progress
    bad, start, shown = 0, time.time(), 0.0
    reasons = check(parts, args.max_image_pixels, min(args.num_workers, images))
    for done, (path, reason) in enumerate(reasons, 1):
        if reason:
            bad += 1
            print(clear, end='', file=sys.stderr, flush=True)
            print(f'{path}: {reason}', flush=True)
        seconds = time.time() - start
        if seconds - shown > every or done == images:
            end = '' if terminal and done < images else '\n'
            print(clear + progress(done, images, bad, seconds), end=end, file=sys.stderr, flush=True)
            shown = seconds
    print(f'{images:,} images checked, {bad:,} cannot be read')
    return bad


if __name__ == '__main__':
    with utils.script():
        torch.set_num_threads(1)
        sys.exit(1 if main(get_args_parser().parse_args()) else 0)
