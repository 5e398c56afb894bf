"""Data sets and their transforms."""
import functools
import hashlib
import itertools
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import utils
from image_data.decode import load_image
from image_data.folders import class_names, find_images, list_images, passed_over_note
from options import MAX_IMAGE_PIXELS, mean_and_std
from replknet_zoo import MODELS, ModelConfig
from repmlp.raug15 import RandAugment15

WARP_FROM = 384  # published: evaluated at this size or larger, images are warped instead of cropped
CROP_PCT = 224 / 256


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

    IMNET reads data_path/train and data_path/val; image_folder reads data_path and eval_data_path, each the
    parent of the class folders; CIFAR is CIFAR-100; DIGITS needs no path. A training set is a SeededDataset.
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
    elif args.data_set in ('IMNET', 'image_folder'):
        dataset, nb_classes = folder_dataset(is_train, args, transform), args.nb_classes
    else:
        raise utils.UserError(f'unknown data set {args.data_set}: IMNET, image_folder, CIFAR or DIGITS')
    return SeededDataset(dataset, args.seed) if is_train else dataset, nb_classes


def facts_of(name: str, dataset: torch.utils.data.Dataset | None) -> dict[str, object]:
    """What must be the same of a data set on all processes: the number of its images, and its classes."""
    if dataset is None:
        return {}
    classes = getattr(getattr(dataset, 'dataset', dataset), 'classes', [])
    facts = {f'the number of {name} images': len(dataset)}
    if classes:
        digest = hashlib.sha256('\0'.join(classes).encode(errors='surrogateescape')).hexdigest()[:8]
        told = f'{classes[0]} ... {classes[-1]} ({len(classes)}, digest {digest})'
        facts[f'the list of {name} classes'] = told
    return facts


class ClassFolders(datasets.ImageFolder):
    """torchvision's ImageFolder, over the class folders of class_names and their images of find_images.

    `passed_over` counts the other files by suffix, `classless` the images that lie in no class folder.
    """

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = class_names(Path(directory))
        return names, {name: index for index, name in enumerate(names)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *_, **__) -> list[tuple[str, int]]:
        """(path, index of the class) of every image. Raises utils.UserError where a class has none."""
        paths, self.passed_over = find_images(directory)
        start = len(os.path.join(directory, ''))
        inside = [path for path in paths if os.sep in path[start:]]
        self.classless = len(paths) - len(inside)
        samples = [(path, class_to_idx[path[start:].split(os.sep, 1)[0]]) for path in inside]
        filled = {index for _, index in samples}
        empty = [name for name, index in class_to_idx.items() if index not in filled]
        if empty:
            note = f' ({passed_over_note(self.passed_over)})' if self.passed_over else ''
            raise utils.UserError(f'{directory} is not complete: there is no image in the class folders '
                                  f'{utils.listed(empty)}{note}: add some, or take the folders out')
        return sorted(samples, key=lambda sample: sample[1])  # of one class they stay in their order


def folder_dataset(is_train: bool, args: Namespace, transform: Callable) -> ClassFolders:
    """The images under a folder with one subfolder a class, in the order of the subfolders' names.

    Raises utils.UserError where the folders are not as --data_set and --nb_classes say.
    """
    if args.data_set == 'IMNET':
        train, val = Path(args.data_path, 'train'), Path(args.data_path, 'val')
    elif not is_train and not args.eval_data_path:
        raise utils.UserError('--data_set image_folder has no validation data: pass --eval_data_path FOLDER, '
                              'or --disable_eval true to train without')
    else:
        train, val = Path(args.data_path), Path(args.eval_data_path or '')
    root = train if is_train else val
    if args.data_set == 'IMNET':
        hint = f'--data_path {args.data_path} must hold train/CLASS/*.jpg and val/CLASS/*.jpg'
    else:
        hint = f'{"--data_path" if is_train else "--eval_data_path"} must hold CLASS/*.jpg'
    if not root.is_dir():
        raise utils.UserError(f'there is no folder {root}: {hint}{_what_is_there_instead(args)}')
    classes = class_names(root)
    if not classes:
        if images := list_images(root):
            raise utils.UserError(f'{root} holds images but no class folders ({utils.listed(images)}): '
                                  f'{hint}')
        raise utils.UserError(f'{root} is not complete: it holds neither class folders nor images. {hint}')
    if args.data_set == 'image_folder' and {'train', 'val'} <= set(classes) and class_names(root / 'train'):
        raise utils.UserError(f'{root} holds train and val, which hold the class folders: '
                              f'pass --data_path {root}/train --eval_data_path {root}/val, '
                              f'or --data_set IMNET --data_path {root}')
    if not is_train and train.is_dir() and classes != class_names(train):
        # the index of a class is its place among the folders: one that lacks would shift all that follow
        wanted = class_names(train)
        lacking, unknown = sorted({*wanted} - {*classes}), sorted({*classes} - {*wanted})
        raise utils.UserError(f'{val} must have the class folders of {train}. '
                              f'Missing: {utils.listed(lacking) or "none"}; '
                              f'not in {train}: {utils.listed(unknown) or "none"}')
    if len(classes) != args.nb_classes:
        below = class_names(root / classes[0]) if len(classes) == 1 else []
        advice = f'pass --nb_classes {len(classes)} (with --finetune, to replace the head)'
        if len(below) == args.nb_classes:
            advice = f'the {args.nb_classes} seem to be one level lower, in {root / classes[0]}'
        raise utils.UserError(f'--nb_classes is {args.nb_classes}, but {root} has {len(classes)} '
                              f'class folders: {advice}')
    max_pixels = getattr(args, 'max_image_pixels', MAX_IMAGE_PIXELS)  # no published option
    dataset = ClassFolders(root, transform, loader=functools.partial(_load_sample, max_pixels=max_pixels))
    if dataset.passed_over:
        utils.log(f'{root}: {passed_over_note(dataset.passed_over)}')
    if dataset.classless:
        utils.log(f'{root}: passed over {dataset.classless} image{"s" * (dataset.classless > 1)} '
                  'beside the class folders')
    return dataset


def _load_sample(path: str, max_pixels: int) -> Image.Image:
    try:
        return load_image(path, max_pixels)
    except utils.UserError as error:
        raise utils.UserError(f'{error}. tools/check_images.py FOLDER finds every image '
                              'that cannot be read') from error


def _what_is_there_instead(args: Namespace) -> str:
    """For the error of IMNET's missing train or val: what --data_path holds, and where they seem to be."""
    given = Path(args.data_path)
    if args.data_set != 'IMNET':
        return ''
    if not given.is_dir():
        return f'. There is no {given} either'
    folders, images = class_names(given), list_images(given)
    found = ' and '.join(filter(None, [folders and f'the folders {utils.listed(folders)}',
                                       images and f'{len(images)} images']))
    told = f'. It holds {found or "neither folders nor images"}'
    here, parent = given.resolve(), given.resolve().parent
    if here.name in ('train', 'val') and (parent / 'train').is_dir():
        return f'{told}: pass its parent, --data_path {parent}'
    below = [name for name in folders if (given / name / 'train').is_dir()]
    return f'{told}: pass --data_path {given / below[0]}' if len(below) == 1 else told


# ---- Transforms ------------------------------------------------------------------------------------------

def build_transform(is_train: bool, args: Namespace) -> transforms.Compose:
    """The published transforms: PIL image to a normalised tensor (3, S, S), S the training or test size.

    Training: random resized crop (up to 32 px a padded one instead, of images resized to S), flip (not for
    DIGITS), RandAugment or raug15, random erasing. Evaluation: evaluation_transform(), with the model's crop.
    """
    if is_train:
        return _train_transform(args)
    config = MODELS.get(getattr(args, 'model', None), ModelConfig)  # as published it asks for no model
    return evaluation_transform(args.test_size if args.test_size > 0 else args.input_size,
                                args.crop_pct or config.crop_pct, config.interpolation, *mean_and_std(args))


def _train_transform(args: Namespace) -> transforms.Compose:
    mean, std = mean_and_std(args)
    try:
        transform = create_transform(
            input_size=args.input_size, is_training=True, hflip=0.0 if args.data_set == 'DIGITS' else 0.5,
            color_jitter=None if args.aa == 'raug15' else args.color_jitter,
            auto_augment=None if args.aa in ('', 'none', 'raug15') else args.aa,
            interpolation=args.train_interpolation, re_prob=args.reprob, re_mode=args.remode,
            re_count=args.recount, mean=mean, std=std)
    except (AssertionError, KeyError, ValueError) as error:
        raise utils.UserError(f'the augmentation cannot be built ({type(error).__name__}: {error}): '
                              f'check --aa {args.aa!r}, --remode {args.remode!r} and '
                              f'--train_interpolation {args.train_interpolation!r}') from error
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
    return transforms.Compose([*shape, transforms.ToTensor(), transforms.Normalize(mean, std)])


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
