"""The data set of a folder, or a tar, with one folder for each class."""
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from image_data.decode import unreadable
from image_data.folders import class_names, list_folder, list_images, passed_over_note
from image_data.index import ImageIndex, open_index
from image_data.tars import split_tar
from image_data.val_labels import SOURCE, read_val_labels
from utils import UserError, listed, log


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
            name, tar = self.index.name(i), self.index.tar(i)
            where = name if not tar or name.startswith(tar) else f'{name} in {tar}'
            raise UserError(f'{unreadable(where, error)}. tools/check_images.py FOLDER '
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


def folder_dataset(is_train: bool, args: Namespace, transform: Callable, decode: Callable) -> ClassFolders:
    """The images under a folder, or in a tar, with one subfolder a class, in the order of their names.

    Raises UserError where the folders are not as --data_set and --nb_classes say.
    """
    train, val = folders_of(args)
    root = train if is_train else val
    if root is None:
        raise UserError('--data_set image_folder has no validation data: pass --eval_data_path FOLDER, '
                        'or --disable_eval true to train without')
    if args.data_set == 'IMNET':
        hint = f'--data_path {args.data_path} must hold train/CLASS/*.jpg and val/CLASS/*.jpg'
    else:
        hint = f'{"--data_path" if is_train else "--eval_data_path"} must hold CLASS/*.jpg'
    if not is_there(root):
        raise UserError(f'there is no folder {root}: {hint}{_what_is_there_instead(args)}')
    if not is_train and getattr(args, 'val_labels', ''):  # no published option
        index = open_index(root, flat=True)
        classes, labels = val_labels(args, index, train)
        check_number_of_classes(args, classes, f'--val_labels {args.val_labels}', 'classes')
        return ClassFolders(index, transform, decode, classes, labels)
    index = open_index(root) if split_tar(root)[0] else None  # else what is wrong is told before a scan
    classes = class_names(root) if index is None else index.classes
    check_class_folders(args, root, classes, hint, is_train)
    if not is_train and is_there(train) and classes != (wanted := classes_of(train)):
        # the index of a class is its place among the folders: one that lacks would shift all that follow
        lacking, unknown = sorted({*wanted} - {*classes}), sorted({*classes} - {*wanted})
        raise UserError(f'{val} must have the class folders of {train}. '
                        f'Missing: {listed(lacking) or "none"}; '
                        f'not in {train}: {listed(unknown) or "none"}')
    check_number_of_classes(args, classes, root)
    index = index or open_index(root)
    tell_of_others(index)
    return ClassFolders(index, transform, decode)


def folders_of(args: Namespace) -> tuple[Path, Path | None]:
    """Those, or the tars, of the training and the validation images; None where an option says none."""
    if args.data_set != 'IMNET':
        return Path(args.data_path), Path(args.eval_data_path) if args.eval_data_path else None
    given = Path(args.data_path)
    found = []
    for part in ('train', 'val'):
        names = (part, f'{part}.tar', f'ILSVRC2012_img_{part}.tar')
        other = 'val' if part == 'train' else 'train'
        if given.is_file() and given.name in names:
            found.append(given)
            continue
        beside = given.is_file() and given.name in (f'{other}.tar', f'ILSVRC2012_img_{other}.tar')
        folder = given.parent if beside else given
        found.append(next((folder / name for name in names if is_there(folder / name)), folder / part))
    return tuple(found)


def is_there(root: Path) -> bool:
    return root.is_dir() or bool(split_tar(root)[0])


def classes_of(root: Path) -> list[str]:
    """The class folders of a folder, or in a tar, which has to be read for it unless its list is kept."""
    return open_index(root).classes if split_tar(root)[0] else class_names(root)


def check_class_folders(args: Namespace, root: Path, classes: list[str], hint: str, is_train: bool) -> None:
    """Raise UserError where there are no class folders, or something else in their place."""
    in_tar = bool(split_tar(root)[0])
    if not classes:
        flat = open_index(root, flat=True)
        if len(flat):
            names = [os.path.basename(flat.name(i)) for i in range(len(flat))]
            labels = '' if is_train else f'. If they are ILSVRC2012\'s: {SOURCE}'
            raise UserError(f'{root} holds images but no class folders ({listed(names)}): '
                            f'{hint}{labels}')
        raise UserError(f'{root} is not complete: it holds neither class folders nor images. {hint}')
    if args.data_set != 'image_folder' or not {'train', 'val'} <= set(classes):
        return
    packed = not in_tar and not (root / 'train').is_dir()
    if in_tar or packed or class_names(root / 'train'):
        tar = '.tar' if packed else ''
        raise UserError(f'{root} holds train and val, which hold the class folders: '
                        f'pass --data_path {root}/train{tar} --eval_data_path {root}/val{tar}, '
                        f'or --data_set IMNET --data_path {root}')


def check_number_of_classes(args: Namespace, classes: list[str], where: Path | str,
                            what: str = 'class folders') -> None:
    """Raise UserError where it is not --nb_classes."""
    if len(classes) == args.nb_classes:
        return
    advice = f'pass --nb_classes {len(classes)} (with --finetune, to replace the head)'
    below = Path(where, classes[0])
    if len(classes) == 1 and below.is_dir() and len(class_names(below)) == args.nb_classes:
        advice = f'the {args.nb_classes} seem to be one level lower, in {below}'
    raise UserError(f'--nb_classes is {args.nb_classes}, but {where} has {len(classes)} '
                    f'{what}: {advice}')


def val_labels(args: Namespace, index: ImageIndex, train: Path) -> tuple[list[str], np.ndarray]:
    """The classes, and that of each image of a flat index, as --val_labels says.

    The classes are the training set's where that is there. Raises UserError where they do not fit.
    """
    wnids = read_val_labels(args.val_labels)
    if not len(index):
        raise UserError(f'{index.root} has no images beside its class folders, which say the classes: '
                        'leave out --val_labels')
    if len(wnids) != len(index):
        raise UserError(f'--val_labels {args.val_labels} has {len(wnids)} lines, but {index.root} '
                        f'{len(index)} images')
    classes = classes_of(train) if is_there(train) else sorted(set(wnids))
    number = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(set(wnids) - number.keys()):
        raise UserError(f'--val_labels {args.val_labels} names classes that {train} does not have: '
                        f'{listed(unknown)}')
    return classes, np.array([number[wnid] for wnid in wnids], np.int32)


def tell_of_others(index: ImageIndex) -> None:
    """Print what is there besides images in class folders. Raises UserError where a class has none."""
    passed_over, classless = Counter(index.details['passed_over']), index.details['classless']
    note = passed_over_note(passed_over) if passed_over else ''
    if empty := index.details['empty']:
        raise UserError(f'{index.root} is not complete: there is no image in the class folders '
                        f'{listed(empty)}{f" ({note})" if note else ""}: add some, or take the '
                        'folders out')
    if note:
        log(f'{index.root}: {note}')
    if classless:
        log(f'{index.root}: passed over {classless} image{"s" * (classless > 1)} '
            'beside the class folders')


def _what_is_there_instead(args: Namespace) -> str:
    """For the error of IMNET's missing train or val: what --data_path holds, and where they seem to be."""
    given = Path(args.data_path)
    if args.data_set != 'IMNET':
        return ''
    if not given.is_dir():
        return f'. There is no {given} either'
    (folders, files), images = list_folder(given), list_images(given)
    tars = [name for name in files if '.tar' in name or name.endswith('.tgz')]
    found = ' and '.join(filter(None, [folders and f'the folders {listed(folders)}',
                                       tars and f'the files {listed(tars)}',
                                       images and f'{len(images)} images']))
    told = f'. It holds {found or "neither folders nor images"}'
    here, parent = given.resolve(), given.resolve().parent
    if here.name in ('train', 'val') and (parent / 'train').is_dir():
        return f'{told}: pass its parent, --data_path {parent}'
    below = [name for name in folders if (given / name / 'train').is_dir()]
    return f'{told}: pass --data_path {given / below[0]}' if len(below) == 1 else told
