"""One image: from a file to 8 bits of red, green and blue."""
import os
import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from options import MAX_IMAGE_PIXELS
from utils import UserError


def load_image(path: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """decode_image of a file, its errors as utils.UserError that name the path."""
    try:
        return decode_image(path, max_pixels)
    except ValueError as error:
        raise unreadable(path, error) from error


def unreadable(name: str, why: Exception) -> UserError:
    """The error of an image that cannot be read."""
    return UserError(f'cannot read the image {name} ({why}): repair it or take it out')


def decode_image(file: str | BytesIO, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read an image, of several frames the first, as RGB of 8 bits.

    `file` is a path, or the content of one. Deeper images are scaled by the range of their pixels: of 16 bits
    0 ... 65535 becomes 0 ... 255. Refused are those whose range no file tells (signed and 32-bit integers,
    floating point), and those of more than `max_pixels` pixels. Raises ValueError, which gives the reason
    alone, where it cannot be read.
    """
    # in all threads, for Pillow has no other way to allow larger ones; below its own limit it would not crop
    Image.MAX_IMAGE_PIXELS = max(MAX_IMAGE_PIXELS, max_pixels)
    try:
        with Image.open(file) as image:
            check_pixels(image.width, image.height, max_pixels)
            return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(str(error).split(' exceeds')[0], max_pixels)) from error
    except Image.UnidentifiedImageError as error:
        size = len(file.getbuffer()) if isinstance(file, BytesIO) else os.path.getsize(file)
        damaged = 'it is damaged, or no image that Pillow knows'
        raise ValueError(damaged if size else 'the file is empty') from error
    except Exception as error:  # Pillow's decoders raise anything, SyntaxError and struct.error included
        raise ValueError(getattr(error, 'strerror', None) or str(error) or type(error).__name__) from error


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ValueError for an image of more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise ValueError(_too_large(f'it has {width} x {height} pixels', max_pixels))


def _too_large(size: str, max_pixels: int) -> str:
    return (f'{size}: the limit against decompression bombs is {max_pixels} pixels; '
            'pass a larger --max_image_pixels if you trust the file')


def _to_rgb(image: Image.Image) -> Image.Image:
    """convert('RGB') for any depth, where Pillow's own cuts deeper pixels off at 255.

    Raises ValueError for pixels whose range is unknown, and for planes that Pillow misreads.
    """
    tags = getattr(image, 'tag_v2', {})  # of a TIFF
    bits, inverted, planar = max(tags.get(258, (8,))), tags.get(262) == 0, tags.get(284) == 2
    signed_16 = image.mode == 'I;16' and image.format == 'FITS'
    unsigned_16 = image.mode == 'I' and image.format in ('PPM', 'PNG')
    if unsigned_16 or (image.mode.startswith('I;16') and not signed_16):
        image.load()
        values, white = np.asarray(image).astype(np.uint32), 4095 if bits == 12 else 65535
        if white == 65535 and 0 < values.max() <= 4095:
            _warn_of_12_bits()
        values = (values * 255 + white // 2) // white
        return Image.fromarray((255 - values if inverted else values).astype(np.uint8)).convert('RGB')
    if image.mode[0] in 'IF':
        kind = 'floating-point numbers' if image.mode == 'F' else 'signed or 32-bit integers'
        raise ValueError(f'its pixels are {kind}, whose range no file tells: save it with 8 or 16 bits, '
                         'scaled to their range')
    if planar and bits > 8 and len(image.getbands()) > 1:
        raise ValueError(f'Pillow misreads colours of {bits} bits in separate planes: save it with 8 bits, '
                         'or with the colours of a pixel side by side')
    return (image.convert('LA') if image.mode == 'La' else image).convert('RGB')


def _warn_of_12_bits() -> None:
    """Once a process, and of a loader's workers in the first alone."""
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:
        warnings.warn('there are images of 16 bits that use 12 of them at most. They are read as 0 ... 65535 '
                      'and come out dark: if their white is 4095, save them multiplied by 16', stacklevel=2)
