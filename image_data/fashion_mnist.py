"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, 10 classes (arXiv 1708.07747)."""
import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import UserError

DEBIANS = '/usr/share/datasets/fashion-mnist'  # of the package dataset-fashion-mnist


class FashionMNIST(torch.utils.data.Dataset):
    """The 60,000 training or 10,000 test images, as RGB; `folder` has the published files, gzipped or not.

    Raises UserError where they are not there, or not whole.
    """

    def __init__(self, train: bool, transform: Callable | None = None, folder: str = DEBIANS):
        part = 'train' if train else 't10k'
        self.images = read_idx(folder, f'{part}-images-idx3-ubyte')
        labels = read_idx(folder, f'{part}-labels-idx1-ubyte')
        if self.images.ndim != 3 or labels.ndim != 1 or len(self.images) != len(labels) or labels.max() > 9:
            raise UserError(f'{folder} holds {len(self.images)} images and {len(labels)} labels up to '
                            f'{labels.max()}: it is not Fashion-MNIST')
        self.targets, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple:
        image = Image.fromarray(self.images[index]).convert('RGB')
        return image if self.transform is None else self.transform(image), self.targets[index]


def read_idx(folder: str, name: str) -> np.ndarray:
    """The array in a file of the IDX format: two zeros, type 8 (bytes), axes, their lengths, the values.

    Raises UserError where it is not there or not whole.
    """
    files = [Path(folder, name + suffix) for suffix in ('.gz', '')]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"there is no {files[0]}: install Debian's package (apt-get install "
                        'dataset-fashion-mnist), or pass --data_path FOLDER with the four files of '
                        'https://github.com/zalandoresearch/fashion-mnist')
    try:
        content = (gzip.open if file.suffix == '.gz' else open)(file, 'rb').read()
        zero, kind, axes = struct.unpack('>HBB', content[:4])
        shape = struct.unpack(f'>{axes}I', content[4:4 + 4 * axes])
        if (zero, kind) != (0, 8):
            raise ValueError('it holds no bytes in the IDX format')
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise UserError(f'{file} cannot be read: {error}') from error


def write_idx(file: Path, values: np.ndarray) -> None:
    """Write an array of bytes in the IDX format, gzipped, the same bytes each time."""
    head = struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes(), mtime=0))
