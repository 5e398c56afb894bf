"""ImageNet's other evaluation sets, for models of its 1,000 classes: ReaL, V2, A, R, Sketch."""
import json
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from image_data.class_folders import ClassFolders, is_there
from image_data.index import ImageIndex, open_index
from utils import UserError, listed

CLASSES = 1000
NAMES = {'real': "validation images with ReaL's labels, several an image", 'v2': 'ImageNetV2',
         'a': 'ImageNet-A', 'r': 'ImageNet-R', 'sketch': 'ImageNet-Sketch'}


class EvalSet(NamedTuple):
    """Images, with the index of their class or, for ReaL, a vector (1000,) that sums to 1 over its labels.

    classes: those of the 1,000 that take part, in whose order indices are; None for all.
    """
    name: str
    dataset: torch.utils.data.Dataset
    classes: list[int] | None = None


class RealLabels(torch.utils.data.Dataset):
    """Validation images with all their labels; those without any are left out.

    dataset: images and their numbers from 0, in the order of ILSVRC2012_val_*.JPEG; labels: of each number.
    Raises UserError where no image is left.
    """

    def __init__(self, dataset: ClassFolders, labels: list[list[int]]):
        self.dataset, self.labels = dataset, labels
        self.kept = np.array([i for i, number in enumerate(dataset.own_labels) if labels[number]], np.int32)
        if not len(self.kept):
            raise UserError(f'--eval_set real={dataset.index.root}: ReaL has no label for any of its '
                            f'{len(dataset)} images')

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, number = self.dataset[int(self.kept[i])]
        target = torch.zeros(CLASSES)
        target[self.labels[number]] = 1 / len(self.labels[number])
        return image, target


def parse_eval_sets(text: str) -> dict[str, str]:
    """The folders by name of --eval_set: 'real=DIR,v2=DIR'. Raises UserError for what is none of NAMES."""
    found = {}
    for word in text.split(',') if text else ():
        name, equals, folder = word.partition('=')
        if name not in NAMES or not equals or not folder or name in found:
            known = ', '.join(f'{name} ({what})' for name, what in NAMES.items())
            raise UserError(f'--eval_set {text}: {word!r} must be NAME=FOLDER, without a comma in it, each '
                            f'NAME once, of {known}')
        found[name] = os.path.expanduser(folder)  # a shell does so with the first alone
    return found


def open_eval_set(name: str, folder: str, transform: Callable, decode: Callable) -> EvalSet:
    """The set `name` in a folder, or in a tar; transform and decode are ClassFolders'.

    Raises UserError where the folder does not hold what the set has.
    """
    if not is_there(Path(folder)):
        raise UserError(f'--eval_set {name}={folder}: there is no such folder')
    index = open_index(folder)
    if name == 'real':
        images = _images_by_number(index, transform, decode)
        return EvalSet(name, RealLabels(images, json.loads(_of_timm('real_labels.json'))))
    wnids = _of_timm('synsets.txt').split()
    wanted = {'v2': [str(i) for i in range(CLASSES)], 'sketch': wnids}.get(name)
    wanted = wanted or _of_timm(f'{name}_synsets.txt').split()
    _check_classes(name, index, wanted)
    place = {word: i for i, word in enumerate(wanted)}
    labels = np.array([place[word] for word in index.classes], np.int32)[index.labels]
    classes = [wnids.index(wnid) for wnid in wanted] if name in ('a', 'r') else None
    return EvalSet(name, ClassFolders(index, transform, decode, wanted, labels), classes)


def _of_timm(file: str) -> str:
    """A list that timm carries."""
    return pkgutil.get_data('timm.data', f'_info/imagenet_{file}').decode()


def _images_by_number(index: ImageIndex, transform: Callable, decode: Callable) -> ClassFolders:
    """Validation images, in class folders or side by side, with the numbers from 0 that their names say.

    Raises UserError for images in both ways, other names, and a number that comes twice.
    """
    if len(index) and index.details['classless']:
        raise UserError(f'--eval_set real={index.root} holds images in folders and others beside these: '
                        'take either out')
    index = index if len(index) else open_index(index.root, flat=True)
    names = [os.path.basename(index.name(i)) for i in range(len(index))]
    found = [re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', name) for name in names]
    numbers = [int(match[1]) - 1 if match else -1 for match in found]
    odd = [name for name, number in zip(names, numbers, strict=True) if not 0 <= number < 50_000]
    if odd or not names:
        raise UserError(f'--eval_set real={index.root}: ReaL knows images by their original names, '
                        f'ILSVRC2012_val_00000001.JPEG ... 00050000.JPEG, not {listed(odd) or "none"}')
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f'--eval_set real={index.root} holds images of one name twice: {listed(twice)}')
    return ClassFolders(index, transform, decode, labels=np.array(numbers, np.int32))


def _check_classes(name: str, index: ImageIndex, wanted: list[str]) -> None:
    """Raise UserError where the folders are not exactly the set's classes, each with an image."""
    found = {*index.classes}
    missing = [word for word in wanted if word not in found] + list(index.details['empty'])
    unknown = sorted(found - {*wanted})
    if missing or unknown:
        raise UserError(f'--eval_set {name}={index.root} must have the {len(wanted)} class folders of '
                        f'{NAMES[name]}, {wanted[0]} ... {wanted[-1]}, with images. Missing: '
                        f'{listed(missing) or "none"}; not among them: {listed(unknown) or "none"}')
