"""Effective receptive field (ERF): how much each input pixel moves the centre of a model's last feature map.

python erf/visualize_erf.py --model resnet101 --data_path imagenet --save_path resnet101_erf_matrix.npy

averages that over images and writes the matrix, and beside it, as .json, what it was made of. Ctrl-C and
SIGTERM save the average so far. erf/analyze_erf.py measures and draws the matrix. The README says which
models there are and what they cost.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are not installed

import options
import replknet_zoo
from distributed import select_device
from erf.models import build_model, last_map, library_of
from image_data.decode import decode_image
from image_data.folders import find_images, passed_over_note
from large_kernel_conv.memory import keep_freed_memory
from utils import UserError, replace_file

NOTES = {  # on kinds of weights
    'random': "NOTE: the weights are random, and an untrained network's ERF says nothing: it may well look "
              'larger than that of a trained one. Pass --weights',
    'own': 'NOTE: the weights are those that the function gave its model; if they are random, the ERF says '
           'nothing',
}
INPUT_SIZE = 1024  # published
SIGHUP = getattr(signal, 'SIGHUP', None)  # Windows has none
STOPPING = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, SIGHUP)))


# ---- The ERF of one image ----------------------------------------------------------------------------------


def contribution(model: nn.Module, image: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """How much each pixel of `image` (1, 3, H, W) moves the central point of the last feature map.

    Returns (H, W), float32, and that map's shape, (C, h, w).

    The central point is passed through a ReLU and summed over its channels; its gradient with respect to the
    image is passed through a ReLU and summed over the colours (RepLKNet paper, Figure 1). Raises what
    last_map raises.
    """
    image = image.detach().requires_grad_()
    features = last_map(model, image)
    centre = F.relu(features[:, :, features.shape[2] // 2, features.shape[3] // 2]).sum()
    gradient, = torch.autograd.grad(centre, image)
    return F.relu(gradient).sum((0, 1)).cpu().numpy(), tuple(features.shape[1:])


# ---- Images ------------------------------------------------------------------------------------------------


def images_under(folder: Path) -> list[Path]:
    """Image files under `folder`, or under its `val` if it has one, in ImageFolder's order.

    Raises UserError if there are none.
    """
    if not folder.is_dir():
        raise UserError(f'--data_path {folder}: there is no such folder; it may be that of ImageNet (with '
                        'val/), or any folder with images')
    root = folder / 'val' if (folder / 'val').is_dir() else folder
    paths, passed_over = find_images(root)
    note = passed_over_note(passed_over) if passed_over else ''
    if not paths:
        raise UserError(f'--data_path {folder}: there is no image in {root}, nor in its folders'
                        f'{note and f" ({note})"}')
    if note:
        print(f'{root}: {note}', flush=True)
    return list(map(Path, paths))


def read_image(path: Path, transform: Callable, max_pixels: int) -> Tensor:
    """The file as RGB, transformed: (1, 3, H, W). UserError where it cannot be read."""
    try:
        image = decode_image(str(path), max_pixels)
    except ValueError as error:
        raise UserError(f'{path} cannot be read ({error})') from error
    return transform(image)[None]


# ---- The average over images -------------------------------------------------------------------------------


def average(args: argparse.Namespace, model: nn.Module, paths: list[Path], transform: Callable,
            device: torch.device, about: dict) -> None:
    """Average over the first --num_images of `paths` that can be used, and save that.

    After a stop or an error on the way too. Raises UserError where no image can be used.
    """
    wanted, start = min(args.num_images, len(paths)), time.time()
    total, used, unreadable, not_finite = np.zeros((args.input_size, args.input_size), np.float32), 0, 0, 0
    try:
        for path in paths:
            if used == args.num_images:
                break
            try:
                image = read_image(path, transform, args.max_image_pixels)
            except UserError as error:
                print(f'WARNING: skipped: {error}', flush=True)
                unreadable += 1
                continue
            scores, about['last_map'] = run(args, model, image.to(device))
            if used + not_finite == 0:  # the first: is it the map that the user means?
                print('Last feature map: {} channels, {} x {}'.format(*about['last_map']), flush=True)
            if not np.isfinite(scores).all():
                print(f'WARNING: skipped: {path} gives NaN or inf', flush=True)
                not_finite += 1
                continue
            total, used = total + scores, used + 1  # at once: a signal comes before or after both
            show_progress(used, wanted, time.time() - start)
    finally:
        for number in STOPPING:  # nothing may come between what was computed and its file
            signal.signal(number, signal.SIG_IGN)
        if used:
            about.update(num_images=used, skipped_unreadable=unreadable, skipped_not_finite=not_finite)
            # before a word: stdout may be a pipe that Ctrl-C has closed too
            save(args.save_path, total / used, about)
            fewer = '' if used == args.num_images else f', not {args.num_images}'
            print(f'The average over {used} image{"s" * (used > 1)}{fewer}; skipped: {unreadable} '
                  f'unreadable, {not_finite} that gave NaN or inf', flush=True)
    if not used:
        raise UserError(f'none of the {len(paths)} images in {args.data_path} could be used: {unreadable} '
                        f'unreadable, {not_finite} that gave NaN or inf. Nothing is saved')
    if not total.any():
        print('WARNING: the matrix is zero everywhere: the central point is behind a ReLU in all images',
              flush=True)


def run(args: argparse.Namespace, model: nn.Module, image: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """contribution(), with a library's errors, such as of a size it does not take, as UserError."""
    try:
        return contribution(model, image)
    except (RuntimeError, ValueError, AssertionError) as error:
        # who writes a model needs its traceback
        if isinstance(error, UserError) or library_of(args.model) == 'file':
            raise
        raise UserError(f'{args.model} fails on {args.input_size} x {args.input_size} pixels '
                        f'({textwrap.shorten(str(error), 300)}): pass another --input_size') from error


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """End the block by SystemExit(128 + number) at the first of Ctrl-C, SIGTERM, SIGHUP (but for nohup)."""
    def stop(number: int, frame: object) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # Ctrl-C ends what stdout is piped into as well
            print(f'\n{signal.Signals(number).name}: stopping', flush=True)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in STOPPING
              if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # by nohup
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_progress(done: int, wanted: int, seconds: float) -> None:
    """One line that grows in a terminal; elsewhere at most some twenty lines."""
    eta = datetime.timedelta(seconds=round(seconds / done * (wanted - done)))
    bar = '#' * (20 * done // wanted)
    line = f'[{bar:20}] {done}/{wanted} images  {seconds / done:.2f} s/image  eta {eta}'
    if sys.stdout.isatty():
        print(f'\r{line}', end='\n' if done == wanted else '', flush=True)
    elif done % math.ceil(wanted / 20) == 0 or done == wanted:
        print(line, flush=True)


def save(path: Path, matrix: np.ndarray, about: dict, elsewhere: bool = True) -> None:
    """Write the matrix, and `about` as .json beside it.

    Where they cannot be written there, into a temporary folder, if `elsewhere`.
    """
    def write_matrix(temporary: Path) -> None:
        with temporary.open('wb') as file:  # to a path np.save would add .npy
            np.save(file, matrix)

    try:
        replace_file(path, write_matrix)
        replace_file(path.with_suffix('.json'),
                     lambda temporary: temporary.write_text(json.dumps(about, indent=1) + '\n'))
    except OSError as error:
        if not elsewhere:
            raise
        save(Path(tempfile.mkdtemp(prefix='erf'), path.name), matrix, about, elsewhere=False)
        print(f'WARNING: {path} cannot be written ({error})', flush=True)
    else:
        print(f'Saved: {path}, and in {path.with_suffix(".json")} what it was made of', flush=True)


# ---- Command line ------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    """The published options, and ours."""
    parser = argparse.ArgumentParser('visualize_erf.py',
                                     description='Effective receptive field of a model, as a matrix')
    parser.add_argument('--model', default='resnet101', metavar='NAME',
                        help=f"{', '.join(replknet_zoo.MODELS)}; a classifier of torchvision's or else of "
                        "timm's; or FILE.py:FUNCTION, which returns a model of yours")
    parser.add_argument('--weights', metavar='FILE', help='a file or URL; pretrained: that of torchvision '
                        '(IMAGENET1K_V1) or timm; random. Default: pretrained for resnet101 and resnet152, '
                        'random for others')
    parser.add_argument('--model_key', default='model|module',
                        help='key of the weights in the file; model_ema for the EMA')
    parser.add_argument('--model_prefix', default='', help='take the keys that begin with this')
    parser.add_argument('--data_path', default='path_to_imagenet', type=Path,
                        help="ImageNet's folder, its val folder, or any folder with images")
    parser.add_argument('--save_path', default='temp.npy', type=Path, metavar='FILE.npy')
    parser.add_argument('--num_images', default=50, type=int, help='default: 50')
    parser.add_argument('--input_size', type=int,
                        help=f'pixels a side, to which images are warped; default: {INPUT_SIZE}, of a '
                        "RepMLPNet the largest multiple of its size up to there")
    options.add_max_image_pixels(parser)
    parser.add_argument('--device', default='auto', help='auto (CUDA if there is any), cpu, cuda, cuda:1 ...')
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, before anything is computed."""
    for name in ('num_images', 'input_size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)} must be at least 1')
    if args.save_path.suffix != '.npy':
        args.save_path = args.save_path.with_name(f'{args.save_path.name}.npy')  # as np.save does
    folder = args.save_path.parent
    if not folder.is_dir():
        raise UserError(f'--save_path {args.save_path}: there is no folder {folder}, make it first')
    if args.save_path.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'--save_path {args.save_path} cannot be written: it is a folder, or in one that is '
                        'read-only')
    library_of(args.model)


def main(args: argparse.Namespace) -> None:
    """Average the ERF over images and save it. Raises UserError for what a user can mend."""
    check_options(args)
    device, given = select_device(args.device), args.input_size
    args.input_size = given or INPUT_SIZE
    if device.type == 'cpu':
        keep_freed_memory()
    paths = images_under(args.data_path)
    model, about = build_model(args)
    if given is None:  # some models take multiples of a size only
        multiple = math.lcm(*getattr(model, 'size_multiples', (1,)))
        args.input_size = max(INPUT_SIZE // multiple, 1) * multiple
    # channels_last is faster for RepLKNets on CPUs
    plain = device.type != 'cpu' or not hasattr(model, 'structural_reparam')
    model.to(device, memory_format=torch.preserve_format if plain else torch.channels_last)
    about = {'model': args.model, **about, 'input_size': args.input_size,
             'data_path': str(args.data_path.resolve()), 'torch': torch.__version__,
             'date': time.strftime('%Y-%m-%d %H:%M')}
    mean, std = (', '.join(f'{value:.3f}' for value in about[name]) for name in ('mean', 'std'))
    print(f'{args.model}, weights: {about["weights"]}, on {device}; {min(args.num_images, len(paths))} of '
          f'{len(paths)} images, warped to {args.input_size} x {args.input_size} pixels, mean {mean}, std '
          f'{std}', flush=True)
    if about['weights'] in NOTES:
        print(NOTES[about['weights']], flush=True)
    transform = transforms.Compose([
        transforms.Resize((args.input_size, args.input_size), InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(about['mean'], about['std']),
    ])
    with stoppable():
        average(args, model, paths, transform, device, about)
    if about['weights'] in NOTES:
        print(NOTES[about['weights']])


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except UserError as error:
        sys.exit(f'ERROR: {error}')
    except KeyboardInterrupt:  # before the first image
        sys.exit(130)
