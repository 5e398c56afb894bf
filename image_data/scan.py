"""One pass over a folder or a tar that lists its images, class by class."""
import datetime
import hashlib
import itertools
import os
import secrets
import time
from array import array
from collections import Counter

import numpy as np

from image_data import tars
from image_data.folders import (
    classes_of_content,
    image_suffixes,
    list_folder,
    split_images,
    suffix_of,
    tars_alone,
    walk,
    when_changed,
)
from utils import UserError, listed, log


class Scan:
    """A scan on its way: what it has found, column by column, and what it has met besides."""

    def __init__(self, root: str, flat: bool):
        self.root, self.flat = root, flat
        self.suffixes = image_suffixes()
        self.tars, self.folders = [], []  # [name below root, length, time], [name, time]
        self.passed_over, self.classless, self.replaced = Counter(), 0, []
        self.seen = 0  # images that were met, of other parts of a tar too
        self.classes, self.empty = [], []  # empty: those without images
        self.names = bytearray()
        self.columns = {name: array(code) for name, code in
                        (('labels', 'i'), ('ends', 'Q'), ('tars', 'i'), ('positions', 'Q'), ('sizes', 'Q'))}
        self.progress = Progress(root)

    def run(self) -> None:
        """Find everything. Raises UserError."""
        tar, inside = tars.split_tar(self.root)
        if tar:
            self.run_over_tar(tar, inside)
        elif self.flat:
            self.folders.append(['', when_changed(self.root)])
            images, others = split_images(list_folder(self.root)[1], self.suffixes)
            self.passed_over.update(map(suffix_of, others))
            self.add(-1, {('', 0): _files(images)})
        else:
            self.run_over_folders()

    def run_over_folders(self) -> None:
        root = self.root
        self.folders.append(['', when_changed(root)])
        folders, files = list_folder(root)
        alone = set(tars_alone(folders, files))
        images, others = split_images([name for name in files if name not in alone], self.suffixes)
        self.classless = len(images)
        self.passed_over.update(map(suffix_of, others))
        self.classes = classes_of_content(folders, files)
        above = (os.path.realpath(root),)
        for label, name in enumerate(self.classes):
            part = (label, len(self.classes))
            groups = (self.tar(f'{name}.tar', name, part) if f'{name}.tar' in alone
                      else self.below(os.path.join(root, name), above, part))
            self.add(label, groups)

    def below(self, folder: str, above: tuple[str, ...], part: tuple[int, int]) -> dict:
        """The images of a class folder: {(folder below root, number of the tar or 0): Members}."""
        groups, start = {}, len(os.path.join(self.root, ''))
        for where in walk(folder, above):
            name = where.path[start:]
            self.folders.append([name, where.changed])
            alone = tars_alone(where.folders, where.files)
            images, others = split_images(where.files, self.suffixes)
            self.passed_over.update(suffix_of(file) for file in others if file not in alone)
            groups[name, 0] = _files(images)
            self.progress(len(self.columns['labels']) + len(images), part[0] / part[1])
            for tar in alone:
                groups |= self.tar(os.path.join(name, tar), os.path.join(name, tar[:-len('.tar')]), part)
        return groups

    def tar(self, name: str, folder: str, part: tuple[int, int]) -> dict:
        """The images of the tar `name` below root, which stands for `folder`, as of below()."""
        path = os.path.join(tars.split_tar(self.root)[0] or self.root, name).rstrip('/')
        try:
            self.tars.append([name, *tars.state_of(path)])
        except OSError as error:
            raise UserError(f'the tar {path} cannot be read ({error.strerror})') from error
        before, (done, total) = len(self.columns['labels']), part

        def progress(images: int, read: float) -> None:
            self.progress(before + images, (done + read) / total)
        found = tars.list_tar(path, self.suffixes, self.passed_over, progress)
        return {('/'.join(filter(None, (folder, inside))), len(self.tars)): members
                for inside, members in found.items()}

    def run_over_tar(self, tar: str, inside: str) -> None:
        found = self.tar('', '', (0, 1))
        self.seen = sum(len(members.names) for members in found.values())
        start = len(inside) + bool(inside)
        groups = {(folder[start:], number): members for (folder, number), members in found.items()
                  if not inside or folder == inside or folder.startswith(inside + '/')}
        top = sorted({folder.split('/')[0] for folder, _ in (groups or found)} - {''})
        if not groups:
            raise UserError(f'{tar} holds no {inside}: it holds the folders {listed(top) or "none"}')
        images = groups.pop(('', 1), tars.Members())
        if self.flat:
            self.add(-1, {('', 1): images})
            return
        self.classless, self.classes = len(images.names), top
        of_class = {name: {} for name in top}
        for (folder, number), members in groups.items():
            of_class[folder.split('/')[0]][folder, number] = members
        for label, name in enumerate(top):
            self.add(label, of_class.pop(name))

    def add(self, label: int, groups: dict) -> None:
        """The images of a class, in ImageFolder's order: by folder, then by name."""
        for folder, tar in sorted(groups):
            members = groups[folder, tar]
            prefix = os.fsencode(folder) + b'/' if folder else b''
            order = sorted(range(len(members.names)), key=members.names.__getitem__)  # equal ones stay
            again = {i for i, after in itertools.pairwise(order) if members.names[i] == members.names[after]}
            if again:  # of members with one name the last counts, as in unpacking
                self.replaced += [f'{folder}/{members.names[i]}' for i in sorted(again)]
                order = [i for i in order if i not in again]
            names = [prefix + os.fsencode(members.names[i]) for i in order]
            more = {'labels': itertools.repeat(label, len(order)), 'tars': itertools.repeat(tar, len(order)),
                    'ends': itertools.islice(itertools.accumulate(map(len, names), initial=len(self.names)),
                                             1, None),
                    'positions': (members.positions[i] for i in order) if tar else (0 for _ in order),
                    'sizes': (members.sizes[i] for i in order) if tar else (0 for _ in order)}
            for name, values in more.items():
                self.columns[name].extend(values)
            self.names += b''.join(names)
        if self.classes and not any(members.names for members in groups.values()):
            self.empty.append(self.classes[label])

    def result(self) -> tuple[dict[str, np.ndarray], dict]:
        """Columns and details of the index."""
        columns = {name: np.frombuffer(values, values.typecode) for name, values in self.columns.items()
                   if self.tars or name in ('labels', 'ends')}
        columns |= {'names': np.frombuffer(self.names, np.uint8), 'classes': _text(self.classes),
                    'folder_names': _text([name for name, _ in self.folders]),
                    'folder_times': np.array([changed for _, changed in self.folders], np.int64)}
        if self.tars:
            columns |= {'tar_names': _text([name for name, _, _ in self.tars]),
                        'tar_lengths': np.array([length for _, length, _ in self.tars], np.int64),
                        'tar_times': np.array([changed for _, _, changed in self.tars], np.int64)}
        if self.replaced:
            log(f'{self.root}: in tars a later member of the same name replaces {listed(self.replaced)}')
        digest = hashlib.sha256()
        for name in ('labels', 'ends', 'names'):
            digest.update(columns[name])
        tar, inside = tars.split_tar(self.root)
        self.seen = max(self.seen, len(columns['labels']))
        return columns, {
            'flat': self.flat, 'inside': inside if tar else '', 'suffixes': sorted(self.suffixes),
            'classless': self.classless, 'empty': self.empty, 'passed_over': dict(self.passed_over),
            'digest': digest.hexdigest()[:16], 'scan': secrets.token_hex(8)}


def _text(names: list[str]) -> np.ndarray:
    return np.frombuffer(b''.join(os.fsencode(name) + b'\0' for name in names), np.uint8)


def _files(names: list[str]) -> tars.Members:
    members = tars.Members()
    members.names = names
    return members


class Progress:
    """Prints how far a scan is, every ten seconds."""

    def __init__(self, root: str):
        self.root = root
        self.start = self.shown = time.monotonic()

    def __call__(self, images: int, part: float) -> None:
        """images found so far, and the part of the whole that was seen, 0 to 1."""
        now = time.monotonic()
        if now - self.shown < 10:
            return
        self.shown = now
        left = ''
        if part:
            seconds = round((now - self.start) * (1 - part) / part)
            left = f', eta {datetime.timedelta(seconds=seconds)}'
        log(f'Scanning {self.root}: {images:,} images, {100 * part:.0f}%{left}')
