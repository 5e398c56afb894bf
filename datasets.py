"""Data sets and transforms."""
import itertools
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import replknet
import utils

WARP_FROM = 384  # published: evaluated at this size or larger, images are warped instead of cropped
CROP_PCT = 224 / 256


class SeededDataset(torch.utils.data.Dataset):
    """A data set whose augmentation depends on (seed, epoch, index) alone: not on workers, their order, or restarts."""

    def __init__(self, dataset: torch.utils.data.Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[torch.Tensor, int]:
        """The image, as the transform leaves it, and its class, of (epoch, index), or of an index in epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        utils.seed_generators('sample', self.seed, epoch, index)
        return self.dataset[index]


class ResumableSampler(torch.utils.data.DistributedSampler):
    """Keys of a SeededDataset, shuffled anew each epoch; the same images in each global batch, and none twice, whatever the
    number of processes.

    Of each process's images the first `seen` are left out: an epoch goes on without decoding them again.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, seed: int):
        super().__init__(dataset, utils.get_world_size(), utils.get_rank(),
                         seed=utils.seed_of('order', seed), drop_last=True)
        self.seen = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in itertools.islice(super().__iter__(), self.seen, None):
            yield self.epoch, index


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

    IMNET reads data_path/train and data_path/val; image_folder reads data_path and eval_data_path, each the parent of the
    class folders; CIFAR is CIFAR-100; DIGITS needs no path. Raises utils.UserError for data that is missing, empty, or does
    not have args.nb_classes classes. A training set is a SeededDataset.
    """
    transform = build_transform(is_train, args)
    if args.data_set == 'CIFAR':
        try:
            dataset = datasets.CIFAR100(args.data_path, train=is_train, transform=transform)
        except RuntimeError as error:
            raise utils.UserError(
                f'there is no CIFAR-100 in {args.data_path}. To download it (169 MB): python -c "from torchvision.datasets '
                f'import CIFAR100; CIFAR100({args.data_path!r}, download=True)"') from error
        nb_classes = 100
    elif args.data_set == 'DIGITS':
        dataset, nb_classes = Digits(is_train, transform), 10
    elif args.data_set in ('IMNET', 'image_folder'):
        dataset, nb_classes = folder_dataset(is_train, args, transform), args.nb_classes
    else:
        raise utils.UserError(f'unknown data set {args.data_set}: choose IMNET, image_folder, CIFAR or DIGITS')
    return SeededDataset(dataset, args.seed) if is_train else dataset, nb_classes


def folder_dataset(is_train: bool, args: Namespace, transform: Callable) -> datasets.ImageFolder:
    """The images under a folder with one subfolder a class, in the order of the subfolders' names."""
    if args.data_set == 'IMNET':
        train, val = Path(args.data_path, 'train'), Path(args.data_path, 'val')
    elif not is_train and not args.eval_data_path:
        raise utils.UserError('--data_set image_folder has no validation data: pass --eval_data_path FOLDER, or --disable_eval '
                              'true to train without')
    else:
        train, val = Path(args.data_path), Path(args.eval_data_path or '')
    root = train if is_train else val
    hint = (f'--data_path {args.data_path} must hold train/CLASS/*.jpg and val/CLASS/*.jpg' if args.data_set == 'IMNET'
            else f'{"--data_path" if is_train else "--eval_data_path"} must hold CLASS/*.jpg')
    if not root.is_dir():
        raise utils.UserError(f'there is no folder {root}: {hint}')
    classes = class_names(root)
    if not is_train and train.is_dir() and classes != class_names(train):
        # the index of a class is its place among the folders: one that lacks would shift all that follow
        lacking, unknown = set(class_names(train)) - set(classes), set(classes) - set(class_names(train))
        raise utils.UserError(f'{val} must have the class folders of {train}. Missing: {", ".join(sorted(lacking)) or "none"}; '
                              f'not in {train}: {", ".join(sorted(unknown)) or "none"}')
    if classes and len(classes) != args.nb_classes:
        raise utils.UserError(f'--nb_classes is {args.nb_classes}, but {root} has {len(classes)} class folders: pass '
                              f'--nb_classes {len(classes)} (with --finetune, to replace the head)')
    try:
        return datasets.ImageFolder(root, transform, loader=load_image)
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise utils.UserError(f'{root} is not complete: {error}. {hint}') from error


def class_names(root: Path) -> list[str]:
    """The class folders under `root`, in the order of their indices."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def load_image(path: str) -> Image.Image:
    """Read an image as RGB; utils.UserError with its path where that fails."""
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except Exception as error:  # Pillow's decoders raise anything, SyntaxError and struct.error included
        raise utils.UserError(f'cannot read the image {path} ({error}): repair it or take it out') from error


def mean_and_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalisation that --imagenet_default_mean_and_std chooses: ImageNet's, or 0.5 and 0.5."""
    if args.imagenet_default_mean_and_std:
        return replknet.IMAGENET_MEAN, replknet.IMAGENET_STD
    return replknet.HALF, replknet.HALF


def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """The published transforms: PIL image to a normalised tensor (3, S, S), S the size of training or of evaluation.

    Training: random resized crop, flip (not for DIGITS), RandAugment, random erasing. Evaluation: resized to S / crop_pct
    and cropped, from 384 on warped to S x S unless crop_pct is given. Up to 32 px images are resized to S; in training a
    padded random crop takes the place of the resized one.
    """
    return _train_transform(args) if is_train else _eval_transform(args)


def check_augmentation(args: Namespace) -> None:
    """Raise utils.UserError where the training transform cannot be built, or fails on an image.

    timm passes over those sections of --aa that it does not know, unless they hold a number.
    """
    policy = r'rand(-t(weights|3a|3aw)|-[a-z]+\d+(\.\d+)?)*|(augmix|originalr?|v0r?|3a)(-[a-z]+\d+(\.\d+)?)*'
    if args.aa not in ('', 'none') and not re.fullmatch(policy, args.aa):
        raise utils.UserError(f'--aa {args.aa!r} is no policy of timm: pass none, or one such as rand-m9-mstd0.5-inc1, '
                              'augmix-m5-w4 or original')
    if args.aa not in ('', 'none') and args.train_interpolation in ('box', 'hamming', 'lanczos'):
        raise utils.UserError(f'--train_interpolation {args.train_interpolation} cannot rotate, which --aa {args.aa} does: '
                              'choose random, nearest, bilinear or bicubic, or --aa none')
    transform = build_transform(True, Namespace(**{**vars(args), 'input_size': 32}))
    try:
        transform(Image.new('RGB', (32, 32)))
    except Exception as error:  # timm and torchvision raise anything
        raise utils.UserError(f'the augmentation fails ({error}): check --aa {args.aa!r} and --color_jitter '
                              f'{args.color_jitter}') from error


def _train_transform(args: Namespace) -> transforms.Compose:
    mean, std = mean_and_std(args)
    try:
        transform = create_transform(
            input_size=args.input_size, is_training=True, hflip=0.0 if args.data_set == 'DIGITS' else 0.5,
            color_jitter=args.color_jitter, auto_augment=None if args.aa in ('', 'none') else args.aa,
            interpolation=args.train_interpolation, re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
            mean=mean, std=std)
    except (AssertionError, KeyError, ValueError) as error:
        raise utils.UserError(f'the augmentation cannot be built ({type(error).__name__}: {error}): check --aa {args.aa!r}, '
                              f'--remode {args.remode!r} and --train_interpolation {args.train_interpolation!r}') from error
    if args.input_size <= 32:
        transform.transforms[0] = transforms.Compose([
            transforms.Resize(args.input_size, InterpolationMode.BICUBIC),
            transforms.RandomCrop(args.input_size, padding=4),
        ])
    guard_posterize(transform)
    return transform


def _eval_transform(args: Namespace) -> transforms.Compose:
    size = args.test_size if args.test_size > 0 else args.input_size
    if size >= WARP_FROM and args.crop_pct is None:
        shape = [transforms.Resize((size, size), InterpolationMode.BICUBIC)]
    else:
        crop_pct = args.crop_pct or (CROP_PCT if size > 32 else 1.0)
        shape = [transforms.Resize(int(size / crop_pct), InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    return transforms.Compose([*shape, transforms.ToTensor(), transforms.Normalize(*mean_and_std(args))])


def posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """ImageOps.posterize that gives a black image for 0 bits, as Pillow did when the recipe was made; today it raises. Beyond 8
    bits, where policies of large magnitudes go, the image stays as it is."""
    return ImageOps.posterize(image, min(bits_to_keep, 8)) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def guard_posterize(transform: transforms.Compose) -> None:
    """Put `posterize` in the place of timm's in the RandAugment, AutoAugment or AugMix that `transform` may hold."""
    for step in transform.transforms:
        operations = getattr(step, 'ops', None) or [op for policy in getattr(step, 'policy', ()) for op in policy]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
