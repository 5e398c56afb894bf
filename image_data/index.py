"""The list of a data set's images: made by one scan, kept in a file, and read from there by all processes.

The file .NAME.index stands beside the folder or tar NAME, or else in $XDG_CACHE_HOME/replknet. It is used as
long as no folder of the data set has another time of change, and no tar another time or length; what is
inside an image is not looked at. Names stand in one array of bytes, classes in another: a process maps the
file into its memory, which shares the pages with all others.
"""
import hashlib
import json
import mmap
import os
import platform
from io import BytesIO
from pathlib import Path

import numpy as np

from image_data import tars
from image_data.folders import image_suffixes, when_changed
from image_data.scan import Scan
from utils import UserError, log, replace_file

KEPT_FROM = 100_000  # images; fewer are listed anew in each run
MAGIC = b'replknet image index 1\n'
# of each image: its class, where its name ends in `names`; and, where there are tars: which, counted from 1
# (0: a file of its own), its first byte and its length there
COLUMNS = {'labels': np.int32, 'ends': np.uint64, 'names': np.uint8,
           'tars': np.int32, 'positions': np.uint64, 'sizes': np.uint64,
           # names with a zero byte behind each, and the state in which the folders and tars were
           'classes': np.uint8, 'folder_names': np.uint8, 'folder_times': np.int64,
           'tar_names': np.uint8, 'tar_lengths': np.int64, 'tar_times': np.int64}
ALIGNMENT = 64  # bytes


class ImageIndex:
    """The images of a folder or tar, by number, in the order of torchvision's ImageFolder.

    `classes`: their names; `labels`: the class of each image, -1 without classes. `digest` tells lists of
    other images apart, details['scan'] one scan from another. Goes to another process as the name of its
    file, where there is one.
    """

    def __init__(self, root: str, columns: dict[str, np.ndarray], details: dict, file: str | None = None):
        self.root, self.columns, self.details, self.file = root, columns, details, file
        self.open_tars, self.tar_paths = tars.OpenTars(), None

    def __len__(self) -> int:
        return len(self.columns['labels'])

    @property
    def classes(self) -> list[str]:
        return self.texts('classes')

    @property
    def labels(self) -> np.ndarray:
        return self.columns['labels']

    def texts(self, column: str) -> list[str]:
        """The names in a column of names, as a list made anew."""
        return [os.fsdecode(name) for name in self.columns[column].tobytes().split(b'\0')[:-1]]

    @property
    def digest(self) -> str:
        return self.details['digest']

    def name(self, i: int) -> str:
        """The path of an image; of one in a tar, as if that were a folder called like it, without .tar."""
        ends = self.columns['ends']
        start = int(ends[i - 1]) if i else 0
        return os.path.join(self.root, os.fsdecode(self.columns['names'][start:int(ends[i])].tobytes()))

    def open(self, i: int) -> str | BytesIO:
        """The path of an image, or its content where it lies in a tar. UserError where that has changed."""
        path = self.tar(i)
        if not path:
            return self.name(i)
        number = int(self.columns['tars'][i]) - 1
        state = int(self.columns['tar_lengths'][number]), int(self.columns['tar_times'][number])
        return self.open_tars.read(path, state, int(self.columns['positions'][i]),
                                   int(self.columns['sizes'][i]))

    def tar(self, i: int) -> str:
        """The path of the tar that an image lies in; '' where it is a file of its own."""
        number = int(self.columns['tars'][i]) if 'tars' in self.columns else 0
        if number and self.tar_paths is None:
            self.tar_paths = self.paths_of_tars()
        return self.tar_paths[number - 1] if number else ''

    def paths_of_tars(self) -> list[str]:
        tar = tars.split_tar(self.root)[0]
        return [tar] if tar else [os.path.join(self.root, name) for name in self.texts('tar_names')]

    def __getstate__(self) -> dict:
        if self.file is None:
            return {**self.__dict__, 'open_tars': None}
        return {'root': self.root, 'file': self.file, 'scan': self.details['scan']}

    def __setstate__(self, state: dict) -> None:
        if state['file'] is None:
            self.__init__(state['root'], state['columns'], state['details'])
            return
        found = read_index(state['file'], state['root'])
        if found is None or found.details['scan'] != state['scan']:
            raise UserError(f'{state["file"]} was replaced while the run that reads it began: start it again')
        self.__init__(state['root'], found.columns, found.details, state['file'])


def open_index(root: str | os.PathLike, flat: bool = False) -> ImageIndex:
    """The list of the images below the class folders of `root`, from a file that fits it, or by a scan.

    root may be a folder, a tar, or a folder in a tar (data/all.tar/train); a folder that holds tars alone
    is read through these. flat: instead the images in `root` itself, which have no classes.
    A scan that meets KEPT_FROM images or more leaves a file. Raises UserError for what cannot be read.
    """
    root = os.fspath(root)
    for file in index_files(root, flat):
        found = read_index(file, root) if os.path.exists(file) else None
        if found is not None and not (change := what_changed(found, flat)):
            return found
        if os.path.exists(file):
            log(f'{file} is out of date ({"it is damaged" if found is None else change})')
    scan = Scan(root, flat)
    scan.run()
    columns, details = scan.result()
    index = ImageIndex(root, columns, details)
    return keep(index) if scan.seen >= KEPT_FROM and len(index) else index


# ---- The file ----------------------------------------------------------------------------------------------

def index_files(root: str, flat: bool) -> list[str]:
    """Where an index of `root` may be, in the order in which they are tried."""
    tar, inside = tars.split_tar(root)
    path = Path(os.path.abspath(tar or root))
    part = inside.replace('/', '.') if tar else ''
    name = '.'.join(filter(None, (path.name, part, 'flat' if flat else '')))
    places = [str(path.parent / f'.{name}.index')]
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if os.path.isabs(cache):  # else there is no home
        # nodes may share the home, and have disks of their own
        key = os.fsencode(f'{os.path.abspath(root)}\0{flat}\0{platform.node()}')
        places.append(os.path.join(cache, 'replknet', f'{hashlib.sha256(key).hexdigest()[:16]}.index'))
    return places


def keep(index: ImageIndex) -> ImageIndex:
    """Write the index to the first place that can hold it; return it as read from there.

    Where none can, a warning says so, and it stays in memory.
    """
    problems = []
    for file in map(Path, index_files(index.root, index.details['flat'])):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # nodes that share the folder may write at once
            replace_file(file, lambda path: write_index(index, path), f'{platform.node()}-{os.getpid()}')
        except OSError as error:
            problems.append(f'{file}: {error.strerror}')
            continue
        log(f'The list of {len(index):,} images is kept as {file}')
        return read_index(str(file), index.root) or index
    log(f'WARNING: the list of {len(index):,} images can be kept nowhere ({"; ".join(problems)}): each '
        'process holds its own, and each run scans again')
    return index


def write_index(index: ImageIndex, path: Path) -> None:
    """MAGIC, a line of JSON that says where each column and the details are, and these."""
    details = json.dumps(index.details).encode()
    parts = {'details': np.frombuffer(details, np.uint8), **index.columns}
    places, position = {}, ALIGNMENT * 64  # room for the line
    for name, values in parts.items():
        places[name] = [position, len(values)]
        position += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
    with path.open('wb') as file:
        file.write(MAGIC + json.dumps({'bytes': position, **places}).encode() + b'\n')
        for name, values in parts.items():
            file.seek(places[name][0])
            file.write(values)
        file.truncate(position)


def read_index(file: str, root: str) -> ImageIndex | None:
    """The index in `file`, mapped into memory; None where it is damaged, or none of this version."""
    try:
        with open(file, 'rb') as opened:
            if opened.readline(len(MAGIC)) != MAGIC:
                return None
            places = json.loads(opened.readline(ALIGNMENT * 64))
            if os.fstat(opened.fileno()).st_size != places['bytes']:
                return None
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            columns = {name: np.frombuffer(mapped, kind, places[name][1], places[name][0])
                       for name, kind in COLUMNS.items() if name in places}
            opened.seek(places['details'][0])
            details = json.loads(opened.read(places['details'][1]))
        index = ImageIndex(root, columns, details, file)
        return index if is_whole(index) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def is_whole(index: ImageIndex) -> bool:
    """Whether the parts fit each other, as far as that is seen without reading all of them."""
    columns, images = index.columns, len(index)
    lists = [('folder_names', 'folder_times')]
    if 'tars' in columns:
        lists += [('tar_names', 'tar_times'), ('tar_names', 'tar_lengths')]
    classes = len(index.classes)
    return (len(columns['ends']) == images > 0 and columns['ends'][-1] == len(columns['names'])
            and (index.details['flat'] or columns['labels'][-1] == classes - 1 >= columns['labels'][0] == 0)
            and all(len(index.texts(names)) == len(columns[values]) for names, values in lists)
            and index.details.keys() >= {'flat', 'inside', 'suffixes', 'classless', 'empty', 'passed_over',
                                         'digest', 'scan'})


def what_changed(index: ImageIndex, flat: bool) -> str:
    """Why the index does not list what is there now; '' where it does."""
    details, (tar, inside) = index.details, tars.split_tar(index.root)
    if (details['flat'], details['inside']) != (flat, inside if tar else ''):
        return 'it lists another part of it'
    if details['suffixes'] != sorted(image_suffixes()):
        return 'Pillow reads other formats now'
    if 'tars' in index.columns:
        states = zip(index.columns['tar_lengths'].tolist(), index.columns['tar_times'].tolist(), strict=True)
        for path, state in zip(index.paths_of_tars(), states, strict=True):
            if not os.path.exists(path) or tars.state_of(path) != state:
                return f'{path} has changed'
    folder_times = index.columns['folder_times'].tolist()
    for name, changed in zip(index.texts('folder_names'), folder_times, strict=True):
        path = os.path.join(index.root, name)
        if when_changed(path) != changed:
            return f'the folder {path} has changed'
    return ''
