"""Draw tiny detection data in COCO's layout, for the `_toy` configs.

    python detection/toy_data.py     # toy_data/coco: 16 + 4 images of 128 x 96, boxes, masks of three kinds
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ('red', 'green', 'blue')
COLOURS = ((220, 60, 60), (60, 200, 80), (70, 90, 230))


def write_coco(root: Path, split: str, images: int, random: np.random.Generator) -> None:
    """Write root/{split}2017/*.jpg and root/annotations/instances_{split}2017.json."""
    folder = root / f'{split}2017'
    folder.mkdir(parents=True, exist_ok=True)
    coco = {'images': [], 'annotations': [],
            'categories': [{'id': i, 'name': name} for i, name in enumerate(NAMES, start=1)]}
    for i in range(1, images + 1):
        canvas = np.full((96, 128, 3), 40)
        for category, colour in enumerate(COLOURS, start=1):
            x, y, w, h = (int(random.integers(*limits)) for limits in ((0, 90), (0, 60), (20, 38), (20, 36)))
            canvas[y:y + h, x:x + w] = colour
            coco['annotations'].append({
                'id': len(coco['annotations']) + 1, 'image_id': i, 'category_id': category, 'iscrowd': 0,
                'bbox': [x, y, w, h], 'area': w * h,
                'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        canvas = np.clip(canvas + random.integers(-20, 21, canvas.shape), 0, 255).astype(np.uint8)
        Image.fromarray(canvas).save(folder / f'{i:012}.jpg')
        coco['images'].append({'id': i, 'file_name': f'{i:012}.jpg', 'width': 128, 'height': 96})
    annotations = root / 'annotations' / f'instances_{split}2017.json'
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(coco))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', default='toy_data', type=Path)
    root = parser.parse_args().folder / 'coco'
    random = np.random.default_rng(0)
    for split, images in (('train', 16), ('val', 4)):
        write_coco(root, split, images, random)
    print(f'{root}: 16 images to train, 4 to test')


if __name__ == '__main__':
    main()
