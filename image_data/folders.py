"""The images in folders: which files they are, and in which order."""
import os
from collections import Counter
from pathlib import Path

from PIL import Image, ImageFile

from utils import UserError, listed

# what file systems and browsers put among one's files, besides hidden files and folders
SYSTEM_FOLDERS = ('@eadir', '__macosx', 'lost+found', '$recycle.bin', 'system volume information',
                  '#recycle', '@recycle')
SYSTEM_FILES = ('thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r')


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


def class_names(root: Path) -> list[str]:
    """The class folders under `root`, in the order of their indices. Raises what list_folder raises."""
    return list_folder(root)[0]


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


def find_images(folder: str | os.PathLike) -> tuple[list[str], Counter]:
    """The paths of the images below `folder`, and the suffixes of the other files there, counted.

    An image is what ends as one that Pillow decodes. In the order of torchvision's ImageFolder: by the path
    of their folder, then by their name. Linked folders are followed, but not back up to one that holds them.
    What list_folder leaves out is neither found nor counted. Raises what list_folder raises.
    """
    suffixes, found, passed_over = image_suffixes(), {}, Counter()
    to_do = [(os.fspath(folder), ())]
    while to_do:
        where, above = to_do.pop()
        real = os.path.realpath(where)
        if any(os.path.join(other, '').startswith(os.path.join(real, '')) for other in above):
            continue  # a link upwards
        folders, files = list_folder(where)
        images = [name for name in files if suffix_of(name) in suffixes]
        found[where] = [os.path.join(where, name) for name in images]
        if len(images) < len(files):
            passed_over.update(suffix_of(name) for name in files if suffix_of(name) not in suffixes)
        to_do += [(os.path.join(where, name), (*above, real)) for name in folders]
    return [path for where in sorted(found) for path in found[where]], passed_over


def passed_over_note(passed_over: Counter) -> str:
    """What find_images counted, in words: 'passed over 24 files that Pillow cannot read: 24 .heic'."""
    kinds = [f'{count} {suffix or "without a suffix"}' for suffix, count in passed_over.most_common()]
    files = f'{passed_over.total()} file{"s" * (passed_over.total() > 1)}'
    return f'passed over {files} that Pillow cannot read: {listed(kinds)}'
