"""A worker of the data loader: images/s of its pipelines, step by step; the workers that a model needs."""
import argparse
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

import options
import utils
from datasets import SeededDataset, build_transform, finish_batches
from distributed import shared_batch
from image_data.decode import decode_image
from image_data.fast import decode_image_fast
from image_data.folders import find_images
from image_data.normalise import ImageToTensor
from tools.benchmarks import common
from utils import UserError

HELP = 'images/s of a worker of the data loader'
SECONDS = 10.0  # measuring time for each pipeline
ROUNDS = 3  # in which the steps are timed
CHUNK = 8  # images that a pipeline prepares before it is the next one's turn
PIPELINES = ('before', 'pillow', 'fast')
STEPS = ('read', 'decode', 'crop', 'flip', 'augment', 'tensor', 'erase', 'collate')
OF_STEPS = {  # by the name of a transform's class, or its own
    **dict.fromkeys(('RandomResizedCropAndInterpolation', 'RandomResizedCrop', 'Resize', 'CenterCrop',
                     'Compose'), 'crop'),
    'RandomHorizontalFlip': 'flip', 'RandomErasing': 'erase',
    **dict.fromkeys(('as_tensor', 'ImageToTensor', 'ToTensor', 'Normalize', 'to_planes'), 'tensor'),
}
COLUMNS = {'mode': 10, 'pipeline': 8, **{step: 8 for step in STEPS}, 'ms': 8, 'images_per_s': 12, 'ratio': 7,
           'workers': 7, 'device': 8}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The images, and how they are prepared."""
    parser.add_argument('--folder', type=Path, help='of images, at any depth; default: made ones')
    parser.add_argument('--images', type=int, default=64, metavar='N', help='to read; default: 64')
    parser.add_argument('--images_per_second', type=float, metavar='N',
                        help='that the model takes: print the workers that give them')
    parser.add_argument('--input_size', type=int, default=224)
    parser.add_argument('--model', default='RepLKNet-31B', help='whose resize and crop evaluation has')
    parser.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help="main.py's --aa")


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense; a worker has one thread."""
    args.threads, args.dtype = args.threads or 1, 'float32'
    if args.images < 1:
        raise UserError(f'--images {args.images} must be at least 1')
    if args.images_per_second is not None and not 0 < args.images_per_second < math.inf:
        raise UserError(f'--images_per_second {args.images_per_second:g} must be more than 0')
    options.check_options(options_of(args, 'fast'))


def options_of(args: argparse.Namespace, loader: str) -> argparse.Namespace:
    """main.py's options."""
    given = ['--input_size', str(args.input_size), '--model', args.model, '--aa', args.aa]
    return options.get_args_parser().parse_args([*given, '--loader', loader])


def run(args: argparse.Namespace) -> None:
    """Print and write the table."""
    content = common.begin(args)
    with tempfile.TemporaryDirectory() as temporary:
        paths = choose_images(args) if args.folder else make_images(Path(temporary), args.images)
        size = sum(Path(path).stat().st_size for path in paths) / len(paths)
        print(f'{len(paths)} images {"of" if args.folder else "made here, as of"} '
              f'{args.folder or "500 x 375 pixels"}, {size / 1e3:.0f} kB each; milliseconds an image, '
              "read from what the\nsystem keeps of files in memory. before: as pillow, with torchvision's "
              'ToTensor and Normalize; ratio: images/s\nover its; device: normalising and erasing batches on '
              f'{args.device}, which --loader fast leaves to the training process (not in ms)')
        content['bytes_per_image'] = size
        common.report(content, COLUMNS, groups(args, paths), args.json)


def choose_images(args: argparse.Namespace) -> list[str]:
    """Some of the images of --folder, from everywhere in it."""
    paths = find_images(args.folder)[0]
    if not paths:
        raise UserError(f'--folder {args.folder} holds no images')
    number = min(args.images, len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def make_images(folder: Path, number: int) -> list[str]:
    """JPEGs as of a camera: clouds of all sizes, edges, and noise, of 500 x 375 pixels and quality 90."""
    paths, random = [], np.random.RandomState(0)
    for i in range(number):
        pixels = np.full((375, 500, 3), 128.0)
        for side in (3, 6, 12, 25, 50, 100):
            cloud = Image.fromarray(random.randint(0, 256, (side, side, 3), np.uint8))
            pixels += (np.asarray(cloud.resize((500, 375), Image.Resampling.BICUBIC)) - 128.0) / side ** 0.5
        image = Image.fromarray(np.clip(pixels + random.randn(375, 500, 3) * 6, 0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(30):
            x, y = random.randint(0, 500), random.randint(0, 375)
            colour = tuple(int(value) for value in random.randint(0, 256, 3))
            end = random.randint(0, 500), random.randint(0, 375)
            draw.line([(x, y), end], colour, random.randint(1, 6))
        paths.append(str(folder / f'{i}.jpg'))
        image.save(paths[-1], quality=90)
    return paths


# ---- Pipelines ---------------------------------------------------------------------------------------------

class Samples(Dataset):
    """Images as main.py's data sets give them; with `seconds`, where the time of each step is added up."""

    def __init__(self, paths: list[str], decode: Callable, transform: transforms.Compose):
        self.paths, self.decode, self.transform = paths, decode, transform
        self.seconds = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.seconds is None:
            return self.transform(self.decode(self.paths[index]))
        sample = self.paths[index]
        for step, call in (('read', read), ('decode', self.decode), *map(step_of, self.transform.transforms)):
            begin = time.perf_counter()
            sample = call(sample)
            self.seconds[step] += time.perf_counter() - begin
        return sample


def read(path: str) -> BytesIO:
    return BytesIO(Path(path).read_bytes())


def step_of(transform: Callable) -> tuple[str, Callable]:
    name = getattr(transform, '__name__', type(transform).__name__)
    return OF_STEPS.get(name, 'augment'), transform


def samples_of(args: argparse.Namespace, pipeline: str, is_train: bool, paths: list[str]) -> Samples:
    """The images as a pipeline prepares them."""
    transform = build_transform(is_train, options_of(args, 'fast' if pipeline == 'fast' else 'pillow'))
    if pipeline == 'before':
        mean, std = options.mean_and_std(options_of(args, 'pillow'))
        at = next(i for i, step in enumerate(transform.transforms) if isinstance(step, ImageToTensor))
        transform.transforms[at:at + 1] = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return Samples(paths, decode_image_fast if pipeline == 'fast' else decode_image, transform)


def groups(args: argparse.Namespace, paths: list[str]) -> Iterator[list[dict]]:
    """The pipelines of training, then those of evaluation."""
    for is_train in (True, False):
        samples = {name: samples_of(args, name, is_train, paths) for name in PIPELINES}
        calls = {(name, i): functools.partial(load, one, is_train, range(i, min(i + CHUNK, len(paths))))
                 for i in range(0, len(paths), CHUNK) for name, one in samples.items()}
        times = common.measure(calls, SECONDS * CHUNK / len(paths))
        rates = {name: len(paths) / sum(times[key] for key in times if key[0] == name) for name in PIPELINES}
        for one in samples.values():
            one.seconds = Counter()
        for _ in range(ROUNDS):
            for call in calls.values():
                call()
        steps = {name: {step: 1e3 * seconds / (ROUNDS * len(paths)) for step, seconds in one.seconds.items()}
                 for name, one in samples.items()}
        device = 1e3 * device_seconds(args, samples['fast'], is_train) / len(paths)
        yield [{'mode': 'training' if is_train else 'evaluation', 'pipeline': name,
                **{step: steps[name].get(step) for step in STEPS}, 'ms': 1e3 / rate, 'images_per_s': rate,
                'ratio': rate / rates['before'],
                'workers': args.images_per_second and math.ceil(args.images_per_second / rate),
                'device': device if name == 'fast' else None} for name, rate in rates.items()]


def load(samples: Samples, is_train: bool, indices: Sequence[int]) -> Tensor:
    """A batch as a worker hands it over, in training each image with its own seed."""
    dataset = SeededDataset(samples, 0) if is_train else samples
    images = [dataset[i] for i in indices]
    begin = time.perf_counter()
    batch = shared_batch(images)
    if samples.seconds is not None:
        samples.seconds['collate'] += time.perf_counter() - begin
    return batch


def device_seconds(args: argparse.Namespace, samples: Samples, is_train: bool) -> float:
    """Of what --loader fast leaves to be done to the batch on the device, without mixup."""
    given, device = options_of(args, 'fast'), torch.device(args.device)
    if not is_train:
        given.reprob = 0
    finish = finish_batches(given, None, device)
    batch = load(samples, is_train, range(len(samples))).to(device)
    targets = torch.zeros(len(samples), dtype=torch.long, device=device)
    utils.seed_generators('step', 0)
    return common.measure({'device': lambda: finish(batch, targets)}, SECONDS / 10)['device']
