"""The images in folders: which files they are, and in which order."""
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageFile

from utils import UserError, listed

# what file systems and browsers put among one's files, besides hidden files and folders
SYSTEM_FOLDERS = ('@eadir', '__macosx', 'lost+found', '$recycle.bin', 'system volume information',
                  '#recycle', '@recycle')
SYSTEM_FILES = ('thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r')
TICK = 0.02  # seconds; what file systems tell apart, with a margin


def list_folder(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """The names of the folders in `folder`, linked ones too, and of its files, each sorted.

    Hidden ones are left out, and those that file systems and browsers put there.
    Raises utils.UserError where it cannot be read.
    """
    folders, files = [], []
    try:
        for entry in os.scandir(folder):
            names, of_systems = (folders, SYSTEM_FOLDERS) if entry.is_dir() else (files, SYSTEM_FILES)
            if not entry.name.startswith('.') and entry.name.lower() not in of_systems:
                names.append(entry.name)
    except OSError as error:
        raise UserError(f'the folder {folder} cannot be read ({error.strerror})') from error
    return sorted(folders), sorted(files)


def class_names(root: str | os.PathLike) -> list[str]:
    """The classes below `root`, in the order of their indices. Raises what list_folder raises."""
    return classes_of_content(*list_folder(root))


def classes_of_content(folders: list[str], files: list[str]) -> list[str]:
    """The classes in a folder that holds these: the folders, or the names of tars_alone without .tar."""
    return folders or sorted(name.removesuffix('.tar') for name in tars_alone(folders, files))


def tars_alone(folders: list[str], files: list[str]) -> list[str]:
    """The tars among what a folder holds, if they stand for its content: without folders or images beside.

    Else they are what was unpacked there.
    """
    tars = [name for name in files if name.endswith('.tar')]
    suffixes = image_suffixes() if tars and not folders else ()
    return [] if folders or any(suffix_of(name) in suffixes for name in files) else tars


def list_images(folder: Path) -> list[str]:
    """The names of the images in `folder` itself. Raises what list_folder raises."""
    suffixes = image_suffixes()
    return [name for name in list_folder(folder)[1] if suffix_of(name) in suffixes]


def suffix_of(name: str) -> str:
    """Of a file's name, in small letters: '.jpg', or '' where there is none."""
    return os.path.splitext(name)[1].lower()


def image_suffixes() -> set[str]:
    """The suffixes of the images that Pillow decodes, in small letters: '.jpg', '.gif', '.avif' ..."""
    known = Image.registered_extensions()  # registers every format

    def decodes(format: str) -> bool:
        if format in ('EPS', 'MPEG'):  # the one needs Ghostscript, of the other Pillow reads the size alone
            return False
        # an MPO is opened as a JPEG
        opener = Image.OPEN.get('JPEG' if format == 'MPO' else format, [None])[0]
        # a stub needs another program's decoder
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        return opener is not None and not stub
    return {suffix for suffix, format in known.items() if decodes(format)}


class Folder(NamedTuple):
    """What list_folder tells of a folder, and when it changed: a name was added, taken out or replaced."""
    path: str
    changed: int  # nanoseconds since 1970
    folders: list[str]
    files: list[str]


def walk(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> Iterator[Folder]:
    """`folder`, and all folders below it, in no order.

    Linked folders are followed, but not back up to one that holds them, nor to one that holds one of the
    real paths `above`. Raises what list_folder raises.
    """
    to_do = [(os.fspath(folder), above)]
    while to_do:
        where, above = to_do.pop()
        real = os.path.realpath(where)
        if any(os.path.join(other, '').startswith(os.path.join(real, '')) for other in above):
            continue  # a link upwards
        changed = when_changed(where)
        folders, files = list_folder(where)
        yield Folder(where, changed, folders, files)
        to_do += [(os.path.join(where, name), (*above, real)) for name in folders]


def when_changed(folder: str | os.PathLike) -> int:
    """The time of a folder's last change, in nanoseconds; -1 where there is none.

    Waits until a change to come would have another time: file systems count in steps of some milliseconds.
    """
    try:
        changed = os.stat(folder).st_mtime_ns
    except OSError:
        return -1
    if 0 <= time.time_ns() - changed < TICK * 10 ** 9:
        time.sleep(TICK)
    return changed


def find_images(folder: str | os.PathLike) -> tuple[list[str], Counter]:
    """The paths of the images below `folder`, and the suffixes of the other files there, counted.

    An image is what ends as one that Pillow decodes. In the order of torchvision's ImageFolder: by the path
    of their folder, then by their name. Of what walk() finds. Raises what list_folder raises.
    """
    suffixes, found, passed_over = image_suffixes(), {}, Counter()
    for where in walk(folder):
        found[where.path], others = split_images(where.files, suffixes)
        passed_over.update(map(suffix_of, others))
    return [os.path.join(where, name) for where in sorted(found) for name in found[where]], passed_over


def split_images(files: list[str], suffixes: set[str]) -> tuple[list[str], list[str]]:
    """The images among `files`, and the others."""
    images = [name for name in files if suffix_of(name) in suffixes]
    return images, [] if len(images) == len(files) else [f for f in files if suffix_of(f) not in suffixes]


def passed_over_note(passed_over: Counter) -> str:
    """What find_images counted, in words: 'passed over 24 files that Pillow cannot read: 24 .heic'."""
    kinds = [f'{count} {suffix or "without a suffix"}' for suffix, count in passed_over.most_common()]
    files = f'{passed_over.total()} file{"s" * (passed_over.total() > 1)}'
    return f'passed over {files} that Pillow cannot read: {listed(kinds)}'
