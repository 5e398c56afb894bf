"""From 8 bits to what a model takes: of one image, or of a whole batch on the device."""
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Normalise:
    """Pixels (..., 3, H, W) of uint8 to float32 as torchvision's ToTensor and Normalize, to the bit."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = 'cpu'):
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
                               for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        # three roundings in that order: one multiplication and addition would give other bits
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


class ImageToTensor:
    """PIL image (RGB) to a normalised tensor (3, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.normalise = Normalise(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        # NumPy sorts bytes into planes four times as fast as torch
        return self.normalise(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))


class FinishBatches:
    """What --loader fast leaves of training's transforms, then mixup: (N, 3, H, W) of uint8 on the device.

    `erase` and `mix` may be None. What is erased is drawn on the CPU, image by image: nothing is waited for.
    """

    def __init__(self, normalise: Normalise, erase: Callable | None, mix: Callable | None):
        self.normalise, self.erase, self.mix = normalise, erase, mix

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = self.normalise(images)
        if self.erase is not None:
            images = self.erase(images)
        return (images, targets) if self.mix is None else self.mix(images, targets)


class NormalisedLoader:
    """A loader of (images of uint8, targets), its images moved to the device and normalised there."""

    def __init__(self, loader: Iterable, normalise: Normalise, device: torch.device):
        self.loader, self.normalise, self.device = loader, normalise, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self.loader:
            yield self.normalise(images.to(self.device, non_blocking=True)), targets
