"""Data sets and their transforms."""
import functools
import hashlib
import itertools
import mmap
import os
import socket
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path

import numpy as np
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import distributed
import utils
from image_data.decode import decode_image, unreadable
from image_data.folders import class_names, list_images, passed_over_note
from image_data.index import ImageIndex, open_index
from image_data.tars import split_tar
from image_data.val_labels import SOURCE, read_val_labels
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
    """What must be the same of a data set on all processes: the number of its images, and its classes."""
    if dataset is None:
        return {}
    inner = getattr(dataset, 'dataset', dataset)
    classes = getattr(inner, 'classes', [])
    facts = {f'the number of {name} images': len(dataset)}
    if hasattr(inner, 'index'):
        facts[f'the digest of the list of {name} images'] = inner.index.digest
    if classes:
        digest = hashlib.sha256('\0'.join(classes).encode(errors='surrogateescape')).hexdigest()[:8]
        told = f'{classes[0]} ... {classes[-1]} ({len(classes)}, digest {digest})'
        facts[f'the list of {name} classes'] = told
    return facts


class ClassFolders(torch.utils.data.Dataset):
    """The images of an index: what `transform` makes of what `decode` makes of a file, and the class.

    decode takes a path, or the content of a file as BytesIO, and raises ValueError with the reason.
    classes and labels: where they are not the index's.
    """

    def __init__(self, index: ImageIndex, transform: Callable, decode: Callable[[str | BytesIO], object],
                 classes: list[str] | None = None, labels: np.ndarray | None = None):
        self.index, self.transform, self.decode = index, transform, decode
        self.own_classes, self.own_labels = classes, labels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        file = self.index.open(i)
        try:
            image = self.decode(file)
        except ValueError as error:
            raise utils.UserError(f'{unreadable(self.index.name(i), error)}. tools/check_images.py FOLDER '
                                  'finds every image that cannot be read') from error
        return self.transform(image), int(self.labels[i])

    @property
    def classes(self) -> list[str]:
        return self.index.classes if self.own_classes is None else self.own_classes

    @property
    def labels(self) -> np.ndarray:
        return self.index.labels if self.own_labels is None else self.own_labels

    @property
    def targets(self) -> list[int]:
        """The class of every image: a list made anew, of some 40 bytes an image."""
        return self.labels.tolist()

    @property
    def samples(self) -> list[tuple[str, int]]:
        """The path and the class of every image: a list made anew, of some 200 bytes an image."""
        return [(self.index.name(i), label) for i, label in enumerate(self.targets)]


def folder_dataset(is_train: bool, args: Namespace, transform: Callable) -> ClassFolders:
    """The images under a folder, or in a tar, with one subfolder a class, in the order of their names.

    Raises utils.UserError where the folders are not as --data_set and --nb_classes say.
    """
    train, val = folders_of(args)
    root = train if is_train else val
    if root is None:
        raise utils.UserError('--data_set image_folder has no validation data: pass --eval_data_path FOLDER, '
                              'or --disable_eval true to train without')
    if args.data_set == 'IMNET':
        hint = f'--data_path {args.data_path} must hold train/CLASS/*.jpg and val/CLASS/*.jpg'
    else:
        hint = f'{"--data_path" if is_train else "--eval_data_path"} must hold CLASS/*.jpg'
    if not is_there(root):
        raise utils.UserError(f'there is no folder {root}: {hint}{_what_is_there_instead(args)}')
    max_pixels = getattr(args, 'max_image_pixels', MAX_IMAGE_PIXELS)  # no published option
    decode = functools.partial(decode_image, max_pixels=max_pixels)
    if not is_train and getattr(args, 'val_labels', ''):  # nor is this
        index = open_index(root, flat=True)
        classes, labels = val_labels(args, index, train)
        check_number_of_classes(args, classes, f'--val_labels {args.val_labels}')
        return ClassFolders(index, transform, decode, classes, labels)
    index = open_index(root) if split_tar(root)[0] else None  # else what is wrong is told before a scan
    classes = class_names(root) if index is None else index.classes
    check_class_folders(args, root, classes, hint, is_train)
    if not is_train and is_there(train) and classes != (wanted := classes_of(train)):
        # the index of a class is its place among the folders: one that lacks would shift all that follow
        lacking, unknown = sorted({*wanted} - {*classes}), sorted({*classes} - {*wanted})
        raise utils.UserError(f'{val} must have the class folders of {train}. '
                              f'Missing: {utils.listed(lacking) or "none"}; '
                              f'not in {train}: {utils.listed(unknown) or "none"}')
    check_number_of_classes(args, classes, root)
    index = index or open_index(root)
    tell_of_others(index)
    return ClassFolders(index, transform, decode)


def folders_of(args: Namespace) -> tuple[Path, Path | None]:
    """Those, or the tars, of the training and the validation images; None where an option says none."""
    if args.data_set != 'IMNET':
        return Path(args.data_path), Path(args.eval_data_path) if args.eval_data_path else None
    given = Path(args.data_path)
    names = {part: (part, f'{part}.tar', f'ILSVRC2012_img_{part}.tar') for part in ('train', 'val')}
    if given.name in names['train'][1:] + names['val'][1:] and given.is_file():  # the other lies beside it
        given = given.parent
    return tuple(next((given / name for name in names[part] if is_there(given / name)), given / part)
                 for part in ('train', 'val'))


def is_there(root: Path) -> bool:
    return root.is_dir() or bool(split_tar(root)[0])


def classes_of(root: Path) -> list[str]:
    """The class folders of a folder, or in a tar, which has to be read for it unless its list is kept."""
    return open_index(root).classes if split_tar(root)[0] else class_names(root)


def check_class_folders(args: Namespace, root: Path, classes: list[str], hint: str, is_train: bool) -> None:
    """Raise utils.UserError where there are no class folders, or something else in their place."""
    in_tar = bool(split_tar(root)[0])
    if not classes:
        flat = open_index(root, flat=True)
        if len(flat):
            names = [os.path.basename(flat.name(i)) for i in range(len(flat))]
            labels = '' if is_train else f'. If they are ILSVRC2012\'s: {SOURCE}'
            raise utils.UserError(f'{root} holds images but no class folders ({utils.listed(names)}): '
                                  f'{hint}{labels}')
        raise utils.UserError(f'{root} is not complete: it holds neither class folders nor images. {hint}')
    if args.data_set == 'image_folder' and {'train', 'val'} <= set(classes) and (
            in_tar or class_names(root / 'train')):
        raise utils.UserError(f'{root} holds train and val, which hold the class folders: '
                              f'pass --data_path {root}/train --eval_data_path {root}/val, '
                              f'or --data_set IMNET --data_path {root}')


def check_number_of_classes(args: Namespace, classes: list[str], where: Path | str) -> None:
    """Raise utils.UserError where it is not --nb_classes."""
    if len(classes) == args.nb_classes:
        return
    advice = f'pass --nb_classes {len(classes)} (with --finetune, to replace the head)'
    below = Path(where, classes[0])
    if len(classes) == 1 and below.is_dir() and len(class_names(below)) == args.nb_classes:
        advice = f'the {args.nb_classes} seem to be one level lower, in {below}'
    raise utils.UserError(f'--nb_classes is {args.nb_classes}, but {where} has {len(classes)} '
                          f'class folders: {advice}')


def val_labels(args: Namespace, index: ImageIndex, train: Path) -> tuple[list[str], np.ndarray]:
    """The classes, and that of each image of a flat index, as --val_labels says.

    The classes are the training set's where that is there. Raises utils.UserError where they do not fit.
    """
    wnids = read_val_labels(args.val_labels)
    if not len(index):
        raise utils.UserError(f'{index.root} has no images beside its class folders, which say the classes: '
                              'leave out --val_labels')
    if len(wnids) != len(index):
        raise utils.UserError(f'--val_labels {args.val_labels} has {len(wnids)} lines, but {index.root} '
                              f'{len(index)} images')
    classes = classes_of(train) if is_there(train) else sorted(set(wnids))
    number = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(set(wnids) - number.keys()):
        raise utils.UserError(f'--val_labels {args.val_labels} names classes that {train} does not have: '
                              f'{utils.listed(unknown)}')
    return classes, np.array([number[wnid] for wnid in wnids], np.int32)


def tell_of_others(index: ImageIndex) -> None:
    """Print what is there besides images in class folders. Raises utils.UserError where a class has none."""
    passed_over, classless = Counter(index.details['passed_over']), index.details['classless']
    note = passed_over_note(passed_over) if passed_over else ''
    if empty := index.details['empty']:
        raise utils.UserError(f'{index.root} is not complete: there is no image in the class folders '
                              f'{utils.listed(empty)}{f" ({note})" if note else ""}: add some, or take the '
                              'folders out')
    if note:
        utils.log(f'{index.root}: {note}')
    if classless:
        utils.log(f'{index.root}: passed over {classless} image{"s" * (classless > 1)} '
                  'beside the class folders')


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
