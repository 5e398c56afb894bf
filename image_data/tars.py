"""Tars: which images they hold and where, and reading those without unpacking.

A tar counts as a folder that is named like it, without .tar; so does a tar in a tar. Nothing is ever written
where a member's name says.
"""
import itertools
import os
import tarfile
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO

from image_data.folders import SYSTEM_FILES, SYSTEM_FOLDERS, suffix_of
from utils import UserError

MOST_OPEN = 128  # tars that a process keeps open; systems allow 1,024 files or more
REPACK = 'unpack it, or pack it anew with tar --dereference --hard-dereference'


class Members:
    """Images of one folder in a tar, in the order of the tar: names, first bytes in the tar, lengths."""

    def __init__(self):
        self.names, self.positions, self.sizes = [], array('Q'), array('Q')


def split_tar(path: str | os.PathLike) -> tuple[str, str]:
    """('data/all.tar', 'train') of data/all.tar/train; ('', path) of a path that leads into no tar."""
    tar, inside = os.fspath(path).rstrip(os.sep), []
    while tar and tar != os.path.dirname(tar):
        if tar.endswith('.tar') and os.path.isfile(tar):
            return tar, '/'.join(reversed(inside))
        tar, name = os.path.split(tar)
        inside.append(name)
    return '', os.fspath(path)


def list_tar(path: str, suffixes: set[str], passed_over: Counter,
             progress: Callable[[int, float], object]) -> dict[str, Members]:
    """The images of a tar by their folder, 'train/n01440764' or '' for the top; folders without any, too.

    suffixes: of images. The suffixes of other files are counted in passed_over; hidden ones and what systems
    add are left out. progress(images, part of the tar that was read) is called for every image.
    Raises UserError for what is no tar, compressed, cut off, still being written, or cannot be read in place.
    """
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            images = itertools.count(1)
            listing = _Listing(path, file, suffixes, lambda at: progress(next(images), at / size))
            listing.read(0, size)
            if os.fstat(file.fileno()).st_size != size:
                raise UserError(f'{path} changed while it was read: wait until it is written')
    except OSError as error:
        raise UserError(f'the tar {path} cannot be read ({error.strerror})') from error
    passed_over.update(listing.passed_over)
    return listing.found


class _Listing:
    """A tar, or one within it, on the way through it."""

    def __init__(self, where: str, file: BinaryIO, suffixes: set[str], progress: Callable[[int], object]):
        self.where, self.file, self.suffixes, self.progress = where, file, suffixes, progress
        self.found, self.passed_over = defaultdict(Members), Counter()
        self.tars = {}  # listings of the tars in it, by the folder that each counts as; the last of a name

    def read(self, start: int, end: int) -> None:
        """List what lies at these bytes of the file."""
        self.file.seek(start)
        begin = self.file.read(6)
        if begin.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')) or start == end:
            raise UserError(f'{self.where} is empty' if start == end else
                            f'{self.where} is compressed, and cannot be read in place: decompress it')
        self.file.seek(start)
        self.found['']  # it exists, even without images
        try:
            tar = tarfile.open(fileobj=self.file, mode='r:')  # noqa: SIM115  its opener closes self.file
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps all
                # the size of a sparse one is that of the file it was
                if not member.issparse() and member.offset_data + member.size > end:
                    raise UserError(f'{self.where} is cut off: {member.name} ends at byte '
                                    f'{member.offset_data + member.size - start}, the file at {end - start}. '
                                    'Fetch it again')
                self.add(member)
        except tarfile.TarError as error:
            raise UserError(f'{self.where} is no tar, or damaged ({error}). Fetch it again') from error
        self.file.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(self.file.read(tarfile.BLOCKSIZE)):
            raise UserError(f'{self.where} is cut off or damaged at byte {tar.offset - start}: the mark at a '
                            'tar\'s end is missing. Fetch it again')
        self.take_in_tars()

    def add(self, member: tarfile.TarInfo) -> None:
        """Note a member; of a tar list what it holds."""
        parts = [part for part in member.name.split('/') if part not in ('', '.')]
        if member.name.startswith('/') or '..' in parts:
            raise UserError(f'{self.where} holds {member.name}, and names with / in front or .. are refused: '
                            'pack it anew with relative names')
        folders = parts if member.isdir() else parts[:-1]
        if any(name.startswith('.') for name in parts) or any(n.lower() in SYSTEM_FOLDERS for n in folders):
            return
        folder = '/'.join(folders)
        if member.isdir():
            self.found[folder]
        if member.isdir() or not parts or parts[-1].lower() in SYSTEM_FILES:
            return
        name = parts[-1]
        if member.islnk() or member.issym():
            raise UserError(f'{self.where} holds a link, {member.name} to {member.linkname}: {REPACK}')
        is_tar = name.endswith('.tar') and member.isreg()
        if member.issparse() and (is_tar or suffix_of(name) in self.suffixes):
            raise UserError(f'{self.where} holds {member.name} as a sparse file: {REPACK}')
        if is_tar:
            inner = _Listing(f'{self.where}/{"/".join(parts)}', self.file, self.suffixes, self.progress)
            inner.read(member.offset_data, member.offset_data + member.size)
            self.tars['/'.join([*folders, name.removesuffix('.tar')])] = inner
        elif suffix_of(name) not in self.suffixes or not member.isreg():
            self.passed_over[suffix_of(name)] += 1
        else:
            members = self.found[folder]
            members.names.append(name)
            members.positions.append(member.offset_data)
            members.sizes.append(member.size)
            self.progress(member.offset_data)

    def take_in_tars(self) -> None:
        """Count the tars as folders, but for those beside images or folders, as in tars_alone()."""
        above = {'/'.join(folder.split('/')[:i]) for folder in self.found if folder
                 for i in range(1, folder.count('/') + 2)}
        full = {os.path.dirname(folder) for folder in above}
        full |= {folder for folder, members in self.found.items() if members.names}
        for folder, inner in self.tars.items():
            if os.path.dirname(folder) in full:
                self.passed_over['.tar'] += 1
                continue
            self.passed_over.update(inner.passed_over)
            for inside, members in inner.found.items():
                self.found['/'.join(filter(None, (folder, inside)))] = members


class OpenTars:
    """Reads pieces of tars, of which the MOST_OPEN last used stay open."""

    def __init__(self):
        self.files = OrderedDict()

    def read(self, path: str, state: tuple[int, int], position: int, size: int) -> BytesIO:
        """The bytes of a member. Raises UserError where the tar is not in the state any more that it had.

        state: its length in bytes, and when it changed, in nanoseconds.
        """
        if path not in self.files:
            try:
                file = open(path, 'rb', buffering=0)  # noqa: SIM115
            except OSError as error:
                raise UserError(f'the tar {path} cannot be opened ({error.strerror})') from error
            if state_of(file.fileno()) != state:
                file.close()
                raise UserError(f'{path} has changed since it was listed: start anew')
            self.files[path] = file
            if len(self.files) > MOST_OPEN:
                self.files.popitem(last=False)  # and is closed, once no thread reads from it
        self.files.move_to_end(path)
        data = _read_at(self.files[path], position, size)
        if len(data) < size:
            raise UserError(f'{path} has become shorter than it was: it ends before byte {position + size}')
        return BytesIO(data)


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """`size` bytes, fewer at the end of the file. Forks and threads may read from the same file at once."""
    data = b''
    while len(data) < size:
        if hasattr(os, 'pread'):
            more = os.pread(file.fileno(), size - len(data), position + len(data))
        else:  # Windows, which does not fork
            file.seek(position + len(data))
            more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data


def state_of(file: str | int) -> tuple[int, int]:
    """Of a path or an open file: its length in bytes, and when it changed, in nanoseconds."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
