"""The classes of ILSVRC2012_img_val.tar, whose images lie side by side: --val_labels."""
import io
import os
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from utils import UserError, listed

GROUND_TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
SOURCE = ('the ground truth comes with ImageNet, on image-net.org, as "Development kit (Task 1 & 2)", '
          f'ILSVRC2012_devkit_t12.tar.gz: pass --val_labels ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}, '
          'or that file itself, or one with a wnid (n01440764) a line')


def read_val_labels(file: str) -> list[str]:
    """The wnid of each validation image, in the order of their names.

    file: one wnid a line; or the development kit's ground truth, one number a line, with meta.mat beside it,
    whose table of synsets says which wnid a number means (not the place in the alphabet); or the kit itself,
    a tar. Raises UserError where it cannot be read so.
    """
    try:
        if tarfile.is_tarfile(file):
            lines, meta = _members(file, GROUND_TRUTH, 'meta.mat')
        else:
            lines, meta = Path(file).read_bytes(), None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f'--val_labels {file} cannot be read ({error}): {SOURCE}') from error
    words = lines.decode(errors='replace').split()
    if words and all(re.fullmatch(r'n\d{8}', word) for word in words):
        return words
    if not words or not all(word.isdecimal() for word in words):
        odd = next((word for word in words if not word.isdecimal()), '')
        raise UserError(f'--val_labels {file} holds neither wnids nor numbers ({odd[:40]!r}): {SOURCE}')
    beside = Path(file).with_name('meta.mat')
    if meta is None:
        if not beside.is_file():
            raise UserError(f'--val_labels {file} holds numbers, and {beside}, which says what they mean, is '
                            'not there: both come in the folder data of ILSVRC2012_devkit_t12.tar.gz')
        meta = beside.read_bytes()
    wnids = synsets(meta)
    unknown = sorted({int(word) for word in words} - wnids.keys())
    if unknown:
        raise UserError(f'--val_labels {file} holds numbers that meta.mat does not know: {listed(unknown)}')
    return [wnids[int(word)] for word in words]


def synsets(meta: bytes) -> dict[int, str]:
    """The wnid of each ILSVRC2012_ID, from the content of the development kit's meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError('to read meta.mat, install scipy: pip install scipy') from error
    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True)['synsets']
        return {int(number): str(wnid) for number, wnid in
                zip(np.atleast_1d(table['ILSVRC2012_ID']), np.atleast_1d(table['WNID']), strict=True)}
    except Exception as error:  # loadmat raises anything
        raise UserError(f'meta.mat holds no table of synsets ({error}): fetch it again') from error


def _members(file: str, *names: str) -> list[bytes]:
    """The contents of the members of a tar, compressed or not, that have these file names."""
    with tarfile.open(file) as tar:
        found = {os.path.basename(member.name): tar.extractfile(member).read()
                 for member in tar if member.isreg() and os.path.basename(member.name) in names}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f'--val_labels {file} holds no {listed(missing)}: {SOURCE}')
    return [found[name] for name in names]
