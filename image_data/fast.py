"""--loader fast: images as tensors of 8 bits, from the file to the batch."""
import random
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from image_data.decode import decode_image
from image_data.jpeg import JpegHeader, read_header
from image_data.normalise import ImageToTensor
from options import MAX_IMAGE_PIXELS

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since 0.29: without it Pillow decodes all, to the same pixels
    decode_jpeg = None

# ---- Decoding ----------------------------------------------------------------------------------------------

FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
SAMPLINGS = (((1, 1),), *((luma, (1, 1), (1, 1)) for luma in ((1, 1), (2, 1), (2, 2))))  # 4:4:4 to 4:2:0


def decode_image_fast(file: str | BytesIO, max_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """decode_image as a tensor (3, H, W) of uint8: torchvision decodes the usual JPEGs, Pillow the others.

    Raises what decode_image raises: it is asked wherever torchvision fails.
    """
    data = _jpeg_bytes(file)
    header = read_header(data)
    limit = min(max_pixels, MAX_IMAGE_PIXELS)  # beyond it Pillow has to be told, for its crop too
    fits = header is not None and header.width * header.height <= limit
    if fits and is_usual(header) and decode_jpeg is not None:
        try:
            return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:  # damaged or cut off: Pillow says how, or reads it nevertheless
            pass
    return to_tensor(decode_image(file, max_pixels))


def is_usual(header: JpegHeader) -> bool:
    """Whether torchvision gives a JPEG the pixels that Pillow does: it is grey or YCbCr, of 8 bits."""
    return (header.frame in FRAMES and header.precision == 8 and not header.adobe
            and header.sampling in SAMPLINGS)


def _jpeg_bytes(file: str | BytesIO) -> bytearray | memoryview:
    """The content; empty where it is no JPEG, or cannot be read."""
    if isinstance(file, BytesIO):
        return file.getbuffer()
    try:
        with open(file, 'rb') as opened:
            begin = opened.read(2)
            return bytearray(begin + opened.read() if begin == b'\xff\xd8' else b'')
    except OSError:
        return bytearray()


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) of uint8, in memory pixel after pixel, as the decoder gives it too."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(image: Tensor) -> Image.Image:
    """The reverse of to_tensor."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


# ---- Transforms --------------------------------------------------------------------------------------------

def fast_transform(published: transforms.Compose) -> transforms.Compose:
    """A published transform, on tensors of uint8 (3, H, W) to (3, S, S); draws what that draws.

    Normalising and random erasing are left to FinishBatches and NormalisedLoader. Images are cropped and
    resized as tensors, within two grey levels of Pillow; the rest stays timm's on PIL images.
    """
    steps = [on_tensors(step) for step in published.transforms
             if not isinstance(step, (ImageToTensor, RandomErasing))]
    return transforms.Compose([as_tensor, *steps, to_planes])


def on_tensors(step: Callable) -> Callable:
    """A step on PIL images as one on tensors."""
    if isinstance(step, transforms.Compose):
        return transforms.Compose([on_tensors(inner) for inner in step.transforms])
    if isinstance(step, (transforms.CenterCrop, transforms.RandomCrop, transforms.RandomHorizontalFlip)):
        return step
    if isinstance(step, (RandomResizedCropAndInterpolation, transforms.Resize)):
        modes = step.interpolation if isinstance(step.interpolation, tuple) else (step.interpolation,)
        if {mode.value for mode in modes} <= {'bilinear', 'bicubic'}:  # torch has no other with antialias
            return Resize(step) if isinstance(step, transforms.Resize) else RandomResizedCrop(step)
    return OnImage(step)


class RandomResizedCrop:
    """timm's, the same box and interpolation drawn."""

    def __init__(self, published: RandomResizedCropAndInterpolation):
        self.published = published

    def __call__(self, image: Tensor) -> Tensor:
        step = self.published
        top, left, height, width = step.get_params(image, step.scale, step.ratio)
        mode = step.interpolation
        if isinstance(mode, tuple):
            mode = random.choice(mode)
        return resize(image[:, top:top + height, left:left + width], step.size, mode.value)


class Resize:
    """torchvision's: a number is the shorter side, the longer one rounded down."""

    def __init__(self, published: transforms.Resize):
        self.size, self.mode = published.size, published.interpolation.value

    def __call__(self, image: Tensor) -> Tensor:
        size = self.size
        if isinstance(size, int):
            height, width = image.shape[1:]
            short = min(height, width)
            size = (size * height // short, size * width // short)
        return resize(image, size, self.mode)


class OnImage:
    """A step that stays on PIL images."""

    def __init__(self, step: Callable):
        self.step = step

    def __call__(self, image: Tensor) -> Tensor:
        before = to_image(image)
        after = self.step(before)
        return image if after is before else to_tensor(after)


def resize(image: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """(3, H, W) of uint8 to `size`, with antialias. As channels_last: twice to three times as fast."""
    batch = image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    batch = batch.contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, tuple(size), mode=mode, antialias=True)[0]


def as_tensor(image: Tensor | Image.Image) -> Tensor:
    """Of a data set that has no files, a PIL image."""
    return image if isinstance(image, Tensor) else to_tensor(image)


def to_planes(image: Tensor) -> Tensor:
    """Contiguous: NumPy sorts bytes into planes four times as fast as the stacking of a batch would."""
    return torch.from_numpy(np.ascontiguousarray(image.numpy()))
