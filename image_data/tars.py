"""Tars: which images they hold and where, and reading those without unpacking.

A tar counts as a folder that is named like it, without .tar; so does a tar in a tar. Nothing is ever written
where a member's name says.
"""
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
             progress: Callable[[int, float], object] = lambda images, part: None) -> dict[str, Members]:
    """The images of a tar by their folder, 'train/n01440764' or '' for the top; folders without any, too.

    suffixes: of images. The suffixes of other files are counted in passed_over; hidden ones and what systems
    add are left out. progress(images, part of the tar that was read) is called for every image.
    Raises UserError for what is no tar, compressed, cut off, still being written, or cannot be read in place.
    """
    try:
        with open(path, 'rb') as file:
            listing = _Listing(path, file, suffixes, passed_over, progress)
            listing.read(0, listing.size, '')
            if os.fstat(file.fileno()).st_size != listing.size:
                raise UserError(f'{path} changed while it was read: wait until it is written')
    except OSError as error:
        raise UserError(f'the tar {path} cannot be read ({error.strerror})') from error
    return listing.found


class _Listing:
    """A tar on the way through it."""

    def __init__(self, path: str, file: BinaryIO, suffixes: set[str], passed_over: Counter,
                 progress: Callable[[int, float], object]):
        self.path, self.file, self.suffixes, self.passed_over = path, file, suffixes, passed_over
        self.progress, self.size = progress, os.fstat(file.fileno()).st_size
        self.found, self.images = defaultdict(Members), 0

    def read(self, start: int, end: int, folder: str) -> None:
        """List the tar, or the one within it, that lies at these bytes and counts as `folder`."""
        self.file.seek(start)
        self.found[folder]  # it exists, even without images
        where = f'{self.path}/{folder}.tar' if folder else self.path
        try:
            tar = tarfile.open(fileobj=self.file, mode='r:')  # noqa: SIM115  self.file is closed by its opener
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps all
                if member.offset_data + member.size > end:
                    raise UserError(f'{where} is cut off: {member.name} ends at byte '
                                    f'{member.offset_data + member.size - start}, the file at {end - start}. '
                                    'Fetch it again')
                self.add(member, folder)
        except tarfile.TarError as error:
            self.file.seek(start)
            compressed = self.file.read(6).startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd'))
            raise UserError(f'{where} is compressed, and cannot be read in place: decompress it' if compressed
                            else f'{where} is no tar, or damaged ({error}). Fetch it again') from error
        self.file.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(self.file.read(tarfile.BLOCKSIZE)):
            raise UserError(f'{where} is cut off or damaged at byte {tar.offset - start}: the mark at a '
                            'tar\'s end is missing. Fetch it again')

    def add(self, member: tarfile.TarInfo, above: str) -> None:
        """Note a member of the tar that counts as the folder `above`."""
        parts = [part for part in member.name.split('/') if part not in ('', '.')]
        if member.name.startswith('/') or '..' in parts:
            raise UserError(f'{self.path} holds {member.name}, and names with / in front or .. are refused: '
                            'pack it anew with relative names')
        folders = parts if member.isdir() else parts[:-1]
        if any(name.startswith('.') for name in parts) or any(n.lower() in SYSTEM_FOLDERS for n in folders):
            return
        folder = '/'.join(filter(None, (above, *folders)))
        if member.isdir():
            self.found[folder]
            return
        name = parts[-1]
        if name.lower() in SYSTEM_FILES:
            return
        if member.islnk() or member.issym():
            raise UserError(f'{self.path} holds a link, {member.name} to {member.linkname}: {REPACK}')
        if name.endswith('.tar') and member.isreg():
            inside = '/'.join(filter(None, (folder, name.removesuffix('.tar'))))
            self.read(member.offset_data, member.offset_data + member.size, inside)
        elif suffix_of(name) not in self.suffixes or not member.isreg():
            self.passed_over[suffix_of(name)] += 1
        elif member.issparse():
            raise UserError(f'{self.path} holds {member.name} as a sparse file: {REPACK}')
        else:
            members = self.found[folder]
            members.names.append(name)
            members.positions.append(member.offset_data)
            members.sizes.append(member.size)
            self.images += 1
            self.progress(self.images, member.offset_data / self.size)


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
                self.files.popitem(last=False)[1].close()
        self.files.move_to_end(path)
        file = self.files[path]
        file.seek(position)
        data = file.read(size)
        if len(data) < size:
            raise UserError(f'{path} has become shorter than it was: it ends within byte {position + size}')
        return BytesIO(data)


def state_of(file: str | int) -> tuple[int, int]:
    """Of a path or an open file: its length in bytes, and when it changed, in nanoseconds."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
