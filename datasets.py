"""Data sets and their transforms."""
import functools
import hashlib
import itertools
import mmap
import re
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import distributed
import utils
from image_data.class_folders import folder_dataset
from image_data.decode import decode_image
from image_data.eval_sets import CLASSES, EvalSet, open_eval_set, parse_eval_sets
from image_data.fashion_mnist import DEBIANS, FashionMNIST
from image_data.fast import decode_image_fast, fast_transform
from image_data.normalise import FinishBatches, ImageToTensor, Normalise, NormalisedLoader
from options import MAX_IMAGE_PIXELS, PUBLISHED_DATA_PATH, mean_and_std
from replknet_zoo import CROP_PCT, MODELS, WARP_FROM, ModelConfig
from repmlp.raug15 import RandAugment15


class SeededDataset(torch.utils.data.Dataset):
    """A data set whose augmentation depends on (seed, epoch, index) alone, not on workers or restarts."""

    def __init__(self, dataset: torch.utils.data.Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[torch.Tensor, int]:
        """The image, transformed, and its class, of (epoch, index), or of an index in epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        utils.seed_generators('sample', self.seed, epoch, index)
        return self.dataset[index]


class ResumableSampler(torch.utils.data.DistributedSampler):
    """Keys of a SeededDataset, shuffled anew each epoch.

    A global batch has the same images, and none twice, whatever the number of processes. Of each process's
    images the first `seen` are left out: an epoch goes on without decoding them again.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, seed: int):
        super().__init__(dataset, utils.get_world_size(), utils.get_rank(),
                         seed=utils.seed_of('order', seed), drop_last=True)
        self.seen = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        # torch's sampler makes a list of the same numbers, which takes ten times the memory; and of what
        # malloc gives, the part of the other processes would stay here (keep_freed_memory)
        order = torch.frombuffer(mmap.mmap(-1, 4 * len(self.dataset)), dtype=torch.int32)
        torch.randperm(len(self.dataset), generator=generator, out=order)
        own = order[self.rank:self.total_size:self.num_replicas][self.seen:]
        if self.num_replicas > 1:
            own = own.clone()
        del order
        for index in own.numpy():
            yield self.epoch, int(index)


class Digits(torch.utils.data.Dataset):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes; every fifth image is validation."""

    def __init__(self, train: bool, transform: Callable | None = None):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise utils.UserError('--data_set DIGITS needs scikit-learn: pip install scikit-learn') from error
        digits = load_digits()
        chosen = (np.arange(len(digits.target)) % 5 != 0) == train
        self.images = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images[index]).convert('RGB')
        return image if self.transform is None else self.transform(image), self.targets[index]


def build_dataset(is_train: bool, args: Namespace) -> tuple[torch.utils.data.Dataset, int]:
    """Return the training or validation set of args.data_set, with its transform, and its number of classes.

    IMNET reads data_path/train and data_path/val; image_folder reads data_path and eval_data_path, each the
    parent of the class folders; CIFAR is CIFAR-100; FMNIST reads data_path, or what Debian's package brings;
    DIGITS needs no path. A training set is a SeededDataset.
    Raises utils.UserError for data that is missing, empty, or does not have args.nb_classes classes.
    """
    transform = build_transform(is_train, args)
    if args.data_set == 'CIFAR':
        try:
            dataset = datasets.CIFAR100(args.data_path, train=is_train, transform=transform)
        except RuntimeError as error:
            raise utils.UserError(f'there is no CIFAR-100 in {args.data_path}. To download it (169 MB): '
                                  'python -c "from torchvision.datasets import CIFAR100; '
                                  f'CIFAR100({args.data_path!r}, download=True)"') from error
        nb_classes = 100
    elif args.data_set == 'DIGITS':
        dataset, nb_classes = Digits(is_train, transform), 10
    elif args.data_set == 'FMNIST':
        own = args.data_path != PUBLISHED_DATA_PATH
        dataset = FashionMNIST(is_train, transform, args.data_path if own else DEBIANS)
        nb_classes = 10
    elif args.data_set in ('IMNET', 'image_folder'):
        dataset, nb_classes = folder_dataset(is_train, args, transform, decoder(args)), args.nb_classes
    else:
        raise utils.UserError(f'unknown data set {args.data_set}: IMNET, image_folder, CIFAR, FMNIST, DIGITS')
    return SeededDataset(dataset, args.seed) if is_train else dataset, nb_classes


def build_eval_sets(args: Namespace) -> list[EvalSet]:
    """--eval_set's, with the validation set's transform. Raises utils.UserError for what does not fit."""
    folders = parse_eval_sets(args.eval_set)
    if not folders:
        return []
    if args.nb_classes != CLASSES:
        raise utils.UserError(f'--eval_set is for models of ImageNet\'s {CLASSES} classes, not of '
                              f'{args.nb_classes}')
    transform = build_transform(False, args)
    return [open_eval_set(name, folder, transform, decoder(args)) for name, folder in folders.items()]


def decoder(args: Namespace) -> Callable:
    """What opens and decodes an image file, as --loader and --max_image_pixels say."""
    return functools.partial(decode_image_fast if is_fast(args) else decode_image,
                             max_pixels=getattr(args, 'max_image_pixels', MAX_IMAGE_PIXELS))


def one_of_each_node_first(work: Callable[[], object]) -> object:
    """distributed.together(work), on one process of each node first: the others find the files that it left.

    They wait however long it takes, by short words to each other: a single wait would run into a time-out.
    """
    if utils.get_world_size() == 1:
        return distributed.together(work)
    node = socket.gethostname()
    first = distributed.gather(node).index(node) == utils.get_rank()
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
    if first:
        threading.Thread(target=run, daemon=True).start()
    else:
        outcome.set_result(None)
    pause = 0.01  # seconds
    while not all(distributed.gather(outcome.done())):
        time.sleep(pause)
        pause = min(2 * pause, 1)
    distributed.together(outcome.result)
    return distributed.together(outcome.result if first else work)


def facts_of(name: str, dataset: torch.utils.data.Dataset | None) -> dict[str, object]:
    """What must be the same of a data set on all processes: its images, and its classes."""
    if dataset is None:
        return {}
    inner = getattr(dataset, 'dataset', dataset)
    classes = getattr(inner, 'classes', [])
    facts = {f'the number of {name} images': len(dataset)}
    if hasattr(inner, 'index'):
        facts[f'the digest of the list of {name} images'] = inner.index.digest
        if inner.own_labels is not None:
            labels = hashlib.sha256(inner.own_labels).hexdigest()[:8]
            facts[f'the digest of the labels of {name} images'] = labels
    if classes:
        digest = hashlib.sha256('\0'.join(classes).encode(errors='surrogateescape')).hexdigest()[:8]
        told = f'{classes[0]} ... {classes[-1]} ({len(classes)}, digest {digest})'
        facts[f'the list of {name} classes'] = told
    return facts


# ---- Transforms ------------------------------------------------------------------------------------------

def is_fast(args: Namespace) -> bool:
    """Whether samples are tensors of uint8, still to be normalised (--loader; no published option)."""
    return getattr(args, 'loader', 'pillow') == 'fast'


def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """The published transforms: PIL image to a normalised tensor (3, S, S), S the training or test size.

    Training: random resized crop (up to 32 px a padded one instead, of images resized to S), flip (not for
    DIGITS), RandAugment or raug15, random erasing. Evaluation: evaluation_transform(), with the model's crop.
    With --loader fast: its fast_transform().
    """
    if is_train:
        transform = _train_transform(args)
    else:
        config = MODELS.get(getattr(args, 'model', None), ModelConfig)  # as published it asks for no model
        transform = evaluation_transform(args.test_size if args.test_size > 0 else args.input_size,
                                         args.crop_pct or config.crop_pct, config.interpolation,
                                         *mean_and_std(args))
    return fast_transform(transform) if is_fast(args) else transform


def random_erasing(args: Namespace, device: torch.device | str = 'cpu') -> RandomErasing | None:
    """Of normalised images, or batches, on the device; None where it is switched off."""
    if args.reprob == 0:
        return None
    return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=str(device))


def _train_transform(args: Namespace) -> transforms.Compose:
    mean, std = mean_and_std(args)
    try:
        erasing = random_erasing(args)
        transform = create_transform(
            input_size=args.input_size, is_training=True, hflip=0.0 if args.data_set == 'DIGITS' else 0.5,
            color_jitter=None if args.aa == 'raug15' else args.color_jitter,
            auto_augment=None if args.aa in ('', 'none', 'raug15') else args.aa,
            interpolation=args.train_interpolation, mean=mean, std=std, normalize=False)
    except (AssertionError, KeyError, ValueError) as error:
        raise utils.UserError(f'the augmentation cannot be built ({type(error).__name__}: {error}): '
                              f'check --aa {args.aa!r}, --remode {args.remode!r} and '
                              f'--train_interpolation {args.train_interpolation!r}') from error
    transform.transforms[-1:] = [ImageToTensor(mean, std), *([erasing] if erasing else [])]
    if args.input_size <= 32:
        transform.transforms[0] = transforms.Compose([
            transforms.Resize(args.input_size, InterpolationMode.BICUBIC),
            transforms.RandomCrop(args.input_size, padding=4),
        ])
    if args.aa == 'raug15':  # behind crop and flip
        transform.transforms.insert(1 + (args.data_set != 'DIGITS'), RandAugment15())
    guard_posterize(transform)
    return transform


def evaluation_transform(size: int, crop_pct: float | None, interpolation: str, mean: Sequence[float],
                         std: Sequence[float]) -> transforms.Compose:
    """PIL image to a normalised tensor (3, size, size).

    Resized to size / crop_pct, and the centre cropped. crop_pct None: CROP_PCT, up to 32 px 1, and from
    WARP_FROM on images are warped to the square.
    """
    interpolation = InterpolationMode(interpolation)
    if size >= WARP_FROM and crop_pct is None:
        shape = [transforms.Resize((size, size), interpolation)]
    else:
        crop_pct = crop_pct or (CROP_PCT if size > 32 else 1.0)
        shape = [transforms.Resize(int(size / crop_pct), interpolation), transforms.CenterCrop(size)]
    return transforms.Compose([*shape, ImageToTensor(mean, std)])


def check_augmentation(args: Namespace) -> None:
    """Raise UserError where the training transform cannot be built, or fails on an image.

    timm passes over those sections of --aa that it does not know, unless they hold a number.
    """
    policy = r'rand(-t(weights|3a|3aw)|-[a-z]+\d+(\.\d+)?)*|(augmix|originalr?|v0r?|3a)(-[a-z]+\d+(\.\d+)?)*'
    if args.aa not in ('', 'none', 'raug15') and not re.fullmatch(policy, args.aa):
        raise utils.UserError(f'--aa {args.aa!r} is no policy of timm: pass none, raug15, or one such as '
                              'rand-m9-mstd0.5-inc1, augmix-m5-w4 or original')
    if args.aa not in ('', 'none') and args.train_interpolation in ('box', 'hamming', 'lanczos'):
        raise utils.UserError(f'--train_interpolation {args.train_interpolation} cannot rotate, which --aa '
                              f'{args.aa} does: choose random, nearest, bilinear or bicubic, or --aa none')
    transform = build_transform(True, Namespace(**{**vars(args), 'input_size': 32}))
    try:
        transform(Image.new('RGB', (32, 32)))
    except Exception as error:  # timm and torchvision raise anything
        raise utils.UserError(f'the augmentation fails ({error}): check --aa {args.aa!r} and '
                              f'--color_jitter {args.color_jitter}') from error


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """ImageOps.posterize for any number of bits.

    0 bits give a black image, as in the Pillow that the recipe was made with; today's raises. Beyond 8 bits,
    where policies of large magnitudes go, the image stays as it is.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits_to_keep, 8))


def guard_posterize(transform: transforms.Compose) -> None:
    """Put `posterize` in the place of timm's in a RandAugment, raug15, AutoAugment or AugMix."""
    for step in transform.transforms:
        operations = getattr(step, 'ops', None) or itertools.chain(*getattr(step, 'policy', ()))
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize


# ---- Batches -----------------------------------------------------------------------------------------------

def training_loader(args: Namespace, dataset: torch.utils.data.Dataset,
                    device: torch.device) -> distributed.Loader:
    """Batches of this process; the sampler says which images."""
    return distributed.Loader(dataset, args.batch_size, sampler=ResumableSampler(dataset, args.seed),
                              drop_last=True, pin_memory=args.pin_mem and device.type == 'cuda',
                              **distributed.worker_options(args.num_workers))


def evaluation_loader(args: Namespace, dataset: torch.utils.data.Dataset, device: torch.device) -> Iterable:
    """Every image once: a process's share is every world_size-th, with none repeated to fill up."""
    if args.dist_eval:
        own = range(utils.get_rank(), len(dataset), utils.get_world_size())
        dataset = torch.utils.data.Subset(dataset, own)
    loader = distributed.Loader(
        dataset, evaluation_batch(args), pin_memory=args.pin_mem and device.type == 'cuda',
        **distributed.worker_options(args.num_workers))
    return finish_loader(args, loader, device)


def evaluation_batch(args: Namespace) -> int:
    """Images per process: they take less memory than in training."""
    return int(1.5 * args.batch_size)


def finish_batches(args: Namespace, mix: Callable | None, device: torch.device) -> Callable | None:
    """What is done to training batches on the device: `mix`, behind what the transform left to be done."""
    if not is_fast(args):
        return mix
    return FinishBatches(Normalise(*mean_and_std(args), device), random_erasing(args, device), mix)


def finish_loader(args: Namespace, loader: Iterable, device: torch.device) -> Iterable:
    """An evaluation's loader, its images normalised on the device if the transform left that to be done."""
    if not is_fast(args):
        return loader
    return NormalisedLoader(loader, Normalise(*mean_and_std(args), device), device)
