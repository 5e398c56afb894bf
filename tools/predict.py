"""Classify images: the five likeliest classes of each.

python tools/predict.py photos cat.jpg --weights RepLKNet-31B_ImageNet-1K_224.pth

takes files, folders (with all below them) and patterns, and prints for each image five lines: probability,
index and name of a class. The images are read, resized and normalised as in main.py's evaluation. An image
that cannot be read is reported and passed over; the exit status is then 1.
"""
import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import Compose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

from distributed import select_device
from image_data.folders import class_names
from tools import common
from utils import UserError, script

# by the number of classes; in the order of their folders' names
IMAGENET = {1000: 'imagenet-1k', 21841: 'imagenet-22k'}


def read_labels(source: Path | None, classes: int) -> list[str]:
    """The classes' names: those of a file (one a line, or a JSON list) or of class folders, or ImageNet's.

    Raises UserError where there are not as many as classes.
    """
    if source is None:
        return (ImageNetInfo(IMAGENET[classes]).label_descriptions() if classes in IMAGENET
                else [f'class {index}' for index in range(classes)])
    try:
        if source.is_dir():
            names = class_names(source)
        else:
            text = source.read_text(encoding='utf-8-sig')
            is_json = text.lstrip().startswith('[')
            names = [str(name) for name in json.loads(text)] if is_json else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f'--labels {source} cannot be read: {error}') from error
    if len(names) != classes:
        raise UserError(f'--labels {source} has {len(names)} names, but the weights have {classes} classes')
    return names


@torch.inference_mode()
def predict(model: nn.Module, files: Sequence[Path], transform: Compose, labels: list[str],
            device: torch.device, max_pixels: int) -> Iterator[dict]:
    """Each file as {'image', 'predictions': [{'class', 'name', 'probability'}]} or {'image', 'error'}."""
    for batch in common.read_batches(files, transform, max_pixels):
        images = [image for _, image in batch if isinstance(image, Tensor)]
        if images:
            logits = model(torch.stack(images).to(device)).float().cpu()
            top = zip(*logits.softmax(1).topk(min(5, len(labels))), strict=True)
        for file, image in batch:
            if not isinstance(image, Tensor):
                yield {'image': str(file), 'error': str(image)}
                continue
            probabilities, indices = (values.tolist() for values in next(top))
            if math.isnan(probabilities[0]):
                raise UserError(f'the logits of {file} are not numbers: the weights are broken')
            yield {'image': str(file), 'predictions': [{'class': i, 'name': labels[i], 'probability': p}
                                                       for i, p in zip(indices, probabilities, strict=True)]}


def show(results: Iterator[dict], as_json: bool) -> int:
    """Print each result when it is there, errors to stderr; return how many of these.

    JSON is a list, one image a line.
    """
    errors, opening = 0, '['
    try:
        for result in results:
            if 'error' in result:
                errors += 1
                print(result['error'], file=sys.stderr)
            elif as_json:
                print(opening + json.dumps(result), end='', flush=True)
                opening = ',\n '
            else:
                print(result['image'])
                for one in result['predictions']:
                    print(f'{100 * one["probability"]:7.2f}%  {one["class"]:5}  {one["name"]}', flush=True)
    finally:
        if as_json:  # what is printed is whole also after an interruption
            print('[]' if opening == '[' else ']')
    return errors


def get_args_parser() -> argparse.ArgumentParser:
    """The images and the options."""
    parser = argparse.ArgumentParser('predict.py', description='Classify images')
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='files, folders, patterns')
    common.add_classifier_options(parser)
    parser.add_argument('--labels', type=Path, metavar='FILE', help='names of the classes: one a line, a '
                        "JSON list, or a folder of class folders; default: ImageNet's")
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the predictions.

    Raises UserError for what a user can mend, at the end for images that cannot be read.
    """
    common.check_input_size(args)
    device = select_device(args.device)
    files = common.named_images(args.images)
    name, model, preprocessing = common.read_model(args.weights, args.model, args.model_key)
    common.set_input_size(preprocessing, args.input_size, model)
    labels = read_labels(args.labels, model.head.out_features)
    if not args.json:
        print(f'{name}, {len(labels)} classes, {preprocessing["input_size"]} px, on {device}')
    model, transform = common.fast_form(model, device), common.evaluation_transform(preprocessing)
    results = predict(model, files, transform, labels, device, args.max_image_pixels)
    errors = show(results, args.json)
    if errors:
        raise UserError(f'{errors} of {len(files)} images could not be read')


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
