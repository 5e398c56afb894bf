"""Draw tiny segmentation data in the layouts of ADE20K and Cityscapes, for the `_toy` configs.

    python segmentation/toy_data.py     # toy_data/ade20k, toy_data/cityscapes: 16 + 4 images of 128 x 96 each
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

# of the background and of three kinds of rectangle
COLOURS = ((40, 40, 40), (220, 60, 60), (60, 200, 80), (70, 90, 230))


def drawn(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (96, 128, 3) of noisy rectangles and its map (96, 128) of what each pixel is, 0 ... 3."""
    kinds = np.zeros((96, 128), np.uint8)
    for kind in (1, 2, 3):
        top, left = random.integers(0, 60), random.integers(0, 90)
        kinds[top:top + random.integers(16, 36), left:left + random.integers(16, 38)] = kind
    noise = random.integers(-20, 21, (96, 128, 3))
    return np.clip(np.array(COLOURS)[kinds] + noise, 0, 255).astype(np.uint8), kinds


def write(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_ade20k(root: Path, split: str, images: int, random: np.random.Generator) -> None:
    """`split` training or validation. Label 0 is ADE20K's "no object", so what is drawn is 1 ... 4."""
    for i in range(images):
        image, kinds = drawn(random)
        write(image, root / 'images' / split / f'ADE_toy_{i:08}.jpg')
        write(kinds + 1, root / 'annotations' / split / f'ADE_toy_{i:08}.png')


def write_cityscapes(root: Path, split: str, images: int, random: np.random.Generator) -> None:
    """`split` train or val. Labels are train ids, 0 ... 3 of 19."""
    for i in range(images):
        image, kinds = drawn(random)
        name = f'toytown_{i:06}_000019'
        write(image, root / 'leftImg8bit' / split / 'toytown' / f'{name}_leftImg8bit.png')
        write(kinds, root / 'gtFine' / split / 'toytown' / f'{name}_gtFine_labelTrainIds.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', default='toy_data', type=Path)
    folder = parser.parse_args().folder
    random = np.random.default_rng(0)
    for split, images in (('training', 16), ('validation', 4)):
        write_ade20k(folder / 'ade20k', split, images, random)
    for split, images in (('train', 16), ('val', 4)):
        write_cityscapes(folder / 'cityscapes', split, images, random)
    print(f'{folder / "ade20k"}, {folder / "cityscapes"}: 16 images to train, 4 to test')


if __name__ == '__main__':
    main()
