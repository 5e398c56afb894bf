"""raug15, the augmentation of RepMLPNet's recipe: two operations an image, of any strength up to 14 of 15."""
import random

from PIL import Image
from timm.data.auto_augment import AugmentOp

OPERATIONS = ('AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd', 'Color',
              'Contrast', 'Brightness', 'Sharpness', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel',
              'Cutout')
# of timm's operations: colour of what moves in, largest magnitude, share of the side at magnitude 10
HPARAMS = {'img_mean': (128, 128, 128), 'magnitude_max': 15, 'translate_pct': 0.45}


class RandAugment15:
    """Two of OPERATIONS, drawn with replacement, each with a magnitude drawn from 0 ... 14; PIL images.

    Drawn from Python's global generator, as all of timm's transforms.
    """

    def __init__(self):
        self.ops = [_operation(name) for name in OPERATIONS]

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(2):
            operation = random.choice(self.ops)
            operation.magnitude = random.randint(0, 14)
            image = operation(image)
        return image


def _operation(name: str) -> AugmentOp:
    """timm's, but for the two that differ there: SolarizeAdd's sum has no limit, Cutout is another."""
    operation = AugmentOp('Invert' if name == 'Cutout' else name, prob=1.0, hparams=HPARAMS)
    if name == 'SolarizeAdd':
        operation.level_fn = _sum_to_add
    if name == 'Cutout':
        operation.name, operation.aug_fn, operation.level_fn = name, cutout, _side_to_cut
    return operation


def _sum_to_add(magnitude: float, _: dict) -> tuple[int]:
    return int(11 * magnitude),


def _side_to_cut(magnitude: float, _: dict) -> tuple[int]:
    return int(max(2, 4 * magnitude)),


def cutout(image: Image.Image, side: int, **_: object) -> Image.Image:
    """Paint a square of `side` pixels around a random pixel in ImageNet's mean colour, cut at the border."""
    x, y, half = random.randrange(image.width), random.randrange(image.height), side // 2
    image = image.copy()
    image.paste((125, 122, 113), (max(0, x - half), max(0, y - half), min(image.width, x + half),
                                  min(image.height, y + half)))
    return image
