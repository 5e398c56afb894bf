"""Classify images: the five likeliest classes of each.

python tools/predict.py photos cat.jpg --weights RepLKNet-31B_ImageNet-1K_224.pth

takes files, folders (with all below them) and patterns, and prints for each image five lines: probability, index and name of a
class. The images are read, resized and normalised as in main.py's evaluation. An image that cannot be read is reported and
passed over; the exit status is then 1.
"""
import argparse
import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import datasets
import distributed
import replknet_zoo
import utils
from datasets import build_transform, class_names, load_image
from options import add_max_image_pixels, mean_and_std

BATCH = 16  # the README's fastest on CPUs, and little memory at any resolution
IMAGENET = {1000: 'imagenet-1k', 21841: 'imagenet-22k'}  # by the number of classes; in the order of their folders' names


def find_images(names: Sequence[str]) -> list[Path]:
    """The files that are named, those that match a pattern, and the images below a folder, each once.

    Says which files of a folder were passed over. Raises UserError for a name behind which there is none.
    """
    found = []
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        files = [file for match in map(Path, matches) for file in (_images_below(match) if match.is_dir() else [match])]
        if not files:
            raise utils.UserError(f'{name} holds no image: none of its files ends in .jpg, .png or as another that Pillow reads'
                                  if matches else f'there is no file or folder {name}')
        found += files
    return list(dict.fromkeys(found))


def _images_below(folder: Path) -> list[Path]:
    paths, passed_over = datasets.find_images(folder)
    if passed_over:
        print(f'{folder}: {datasets.passed_over_note(passed_over)}', file=sys.stderr)
    return sorted(map(Path, paths))


def read_model(weights: str, name: str | None, model_key: str) -> tuple[str, nn.Module, dict]:
    """The classifier in a file, its registry name, and its pre-processing; without a `name` the weights' shapes tell it.

    Raises UserError for a file that cannot be read, and for weights that are not of the model `name` or have no head.
    """
    try:
        checkpoint = replknet_zoo.read_checkpoint(weights)
        state = replknet_zoo.state_dict_of(checkpoint, weights, model_key)
        name = name or replknet_zoo.name_of(state)
        if name is None:
            raise utils.UserError(f'{weights} holds weights of none of the models {", ".join(replknet_zoo.MODELS)}')
        model = replknet_zoo.model_for(name, state, weights)
    except (ValueError, FileNotFoundError) as error:
        raise utils.UserError(str(error)) from error
    if not hasattr(model, 'head'):
        raise utils.UserError(f'{weights} is a backbone without a classifier: it has no head.weight')
    return name, model, preprocessing_of(checkpoint, name)


def preprocessing_of(checkpoint: object, name: str) -> dict:
    """Side in pixels (input_size), crop_pct, mean and std that weights of the model `name` expect.

    As the metadata of a converted file says, or the options of the training that wrote the file, or the registry.
    """
    config = replknet_zoo.MODELS[name]
    found = {'input_size': config.input_size, 'crop_pct': None, 'mean': config.mean, 'std': config.std}
    options, metadata = (checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ('args', 'metadata'))
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    if isinstance(options, dict) and {'imagenet_default_mean_and_std', 'input_size'} <= options.keys():
        test_size = options.get('test_size', -1)
        mean, std = mean_and_std(argparse.Namespace(**options))
        found = {'input_size': test_size if test_size > 0 else options['input_size'], 'crop_pct': options.get('crop_pct'),
                 'mean': mean, 'std': std}
    if isinstance(metadata, dict) and metadata.keys() >= found.keys():  # else it is not convert.py's
        found = {key: metadata[key] for key in found}
    return found


def evaluation_transform(preprocessing: dict) -> Compose:
    """main.py's transform in evaluation: PIL image to tensor (3, S, S)."""
    args = argparse.Namespace(input_size=preprocessing['input_size'], test_size=-1, crop_pct=preprocessing['crop_pct'],
                              imagenet_default_mean_and_std=True)
    *steps, _ = build_transform(False, args).transforms
    return Compose([*steps, Normalize(preprocessing['mean'], preprocessing['std'])])


def read_batches(files: Sequence[Path], transform: Compose,
                 max_pixels: int) -> Iterator[list[tuple[Path, Tensor | utils.UserError]]]:
    """BATCH images at a time, each (3, S, S), or the reason why it cannot be read."""
    def read(file: Path) -> tuple[Path, Tensor | utils.UserError]:
        try:
            return file, transform(load_image(str(file), max_pixels))
        except utils.UserError as error:
            return file, error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), BATCH):
            yield list(pool.map(read, files[start:start + BATCH]))


def read_labels(source: Path | None, classes: int) -> list[str]:
    """The classes' names: from a file with one a line or a JSON list, the folders of a training set, or ImageNet's.

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
            names = list(map(str, json.loads(text))) if text.lstrip().startswith('[') else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise utils.UserError(f'--labels {source} cannot be read: {error}') from error
    if len(names) != classes:
        raise utils.UserError(f'--labels {source} has {len(names)} names, but the weights have {classes} classes')
    return names


def fast_form(model: nn.Module, device: torch.device) -> nn.Module:
    """The model merged, folded and on the device."""
    if device.type == 'cpu':
        return replknet_zoo.compile_for_inference(model)
    model.structural_reparam()  # torch.compile would take longer than most folders of images
    model.deep_fuse_BN()
    return model.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model: nn.Module, files: Sequence[Path], transform: Compose, labels: list[str], device: torch.device,
            max_pixels: int) -> Iterator[dict]:
    """For each file {'image', 'predictions': [{'class', 'name', 'probability'}, ...]}, or {'image', 'error'}."""
    for batch in read_batches(files, transform, max_pixels):
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
                raise utils.UserError(f'the logits of {file} are not numbers: the weights are broken')
            yield {'image': str(file), 'predictions': [{'class': i, 'name': labels[i], 'probability': p}
                                                       for i, p in zip(indices, probabilities, strict=True)]}


def show(results: Iterator[dict], as_json: bool) -> int:
    """Print each result when it is there, errors to stderr; return how many of these. JSON is a list, one image a line."""
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What says which model classifies which images, at which size and where."""
    parser.add_argument('--weights', required=True, metavar='FILE', help='or URL: whatever main.py reads, converted files too')
    parser.add_argument('--model', metavar='NAME', help=f'{", ".join(replknet_zoo.MODELS)}; default: known by the weights')
    parser.add_argument('--model_key', default='model|module', help='key of the weights in the file; model_ema for the EMA')
    parser.add_argument('--input_size', type=int, help="pixels a side; default: the file's, or else the registry's")
    add_max_image_pixels(parser)
    parser.add_argument('--device', default='auto', help='auto (CUDA if there is any), cpu, cuda, cuda:1 ...')


def get_args_parser() -> argparse.ArgumentParser:
    """The images and the options."""
    parser = argparse.ArgumentParser('predict.py', description='Classify images')
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='files, folders, patterns')
    add_model_options(parser)
    parser.add_argument('--labels', type=Path, metavar='FILE', help='names of the classes: one a line, a JSON list, or a folder '
                        "of class folders; default: ImageNet's")
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the predictions. Raises UserError for what a user can mend, at the end for images that cannot be read."""
    if args.input_size is not None and args.input_size < 1:
        raise utils.UserError(f'--input_size {args.input_size} must be at least 1')
    device = distributed.select_device(args.device)
    files = find_images(args.images)
    name, model, preprocessing = read_model(args.weights, args.model, args.model_key)
    preprocessing['input_size'] = args.input_size or preprocessing['input_size']
    labels = read_labels(args.labels, model.head.out_features)
    if not args.json:
        print(f'{name}, {len(labels)} classes, {preprocessing["input_size"]} px, on {device}')
    results = predict(fast_form(model, device), files, evaluation_transform(preprocessing), labels, device,
                      args.max_image_pixels)
    errors = show(results, args.json)
    if errors:
        raise utils.UserError(f'{errors} of {len(files)} images could not be read')


if __name__ == '__main__':
    with utils.script():
        main(get_args_parser().parse_args())
