"""Quantize a classifier: its 1x1 layers in int8, by images, for CPUs with VNNI or AMX.

python tools/quantize.py RepLKNet-31B_ImageNet-1K_224.pth int8.pth --data_path imagenet/val

takes --images of the folder's images, evenly, for the scales, and compares with the original on all others:
some hundreds are enough, with ImageNet's 50,000 a CPU would have hours to do.
Prints how much each layer keeps, in decibels, the least first; layers that lose too much stay in floating
point, which is said. The last lines are top-1 and top-5 of both, where the folder holds a folder for each
class, how many predictions agree, and the size of the file. predict.py, export.py --int8 and main.py --eval
read it.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import replknet_zoo
from image_data.folders import class_names
from options import add_max_image_pixels
from replknet_zoo.calibration import LEAST_DECIBELS, quantize
from tools import common
from utils import UserError, script


def divide(files: Sequence[Path], wanted: int) -> tuple[list[Path], list[Path]]:
    """`wanted` of the files, evenly, and the others; all for both where there are not more."""
    if len(files) <= wanted:
        return list(files), list(files)
    chosen = {i * len(files) // wanted for i in range(wanted)}
    return ([file for i, file in enumerate(files) if i in chosen],
            [file for i, file in enumerate(files) if i not in chosen])


def labels_of(files: Sequence[Path], folder: Path, classes: int) -> list[int] | None:
    """The class of each file, where `folder` holds a folder for each of the classes; else that is said."""
    names = class_names(folder)
    firsts = [Path(os.path.relpath(file, folder)).parts[0] for file in files]
    if len(names) != classes or not set(firsts) <= set(names):
        print(f'without top-1: {folder} does not hold one folder for each of {classes} classes')
        return None
    return [names.index(first) for first in firsts]


@torch.inference_mode()
def compare(models: dict[str, nn.Module], files: Sequence[Path], labels: Sequence[int] | None,
            preprocessing: dict, max_pixels: int) -> None:
    """Print top-1 and top-5 of both models, in how many images they agree, and how far their logits differ.

    The first is the original. Raises UserError where no file can be read, and for logits that are not finite.
    """
    hits, agree, images, difference, largest = {name: [0, 0] for name in models}, 0, 0, 0.0, 0.0
    label_of = dict(zip(files, labels, strict=True)) if labels else {}
    for readable, x in common.readable_images(files, preprocessing, max_pixels):
        logits = {name: model(x) for name, model in models.items()}
        before, after = logits.values()
        if not (before.isfinite().all() and after.isfinite().all()):
            raise UserError('the logits are not finite: the weights are broken')
        for name, values in logits.items() if labels else ():
            right = values.topk(min(5, values.shape[1])).indices == torch.tensor(
                [[label_of[file]] for file in readable])
            hits[name] = [hits[name][0] + right[:, 0].sum().item(), hits[name][1] + right.sum().item()]
        images, agree = images + len(x), agree + (before.argmax(1) == after.argmax(1)).sum().item()
        difference = max(difference, (after - before).abs().max().item())
        largest = max(largest, before.abs().max().item())
    if not images:
        raise UserError('none of the images could be read')
    for name, (top1, top5) in hits.items() if labels else ():
        print(f'{name:8} top-1 {100 * top1 / images:.2f}%  top-5 {100 * top5 / images:.2f}%')
    relative = difference / largest if largest else difference
    print(f'predictions agree on {agree} of {images} images; largest difference of the logits '
          f'{difference:.2e} ({relative:.1e} of the largest, {largest:.2f})')


def get_args_parser() -> argparse.ArgumentParser:
    """The two files, the images and the options."""
    parser = argparse.ArgumentParser('quantize.py', description='Quantize a classifier')
    parser.add_argument('source', metavar='WEIGHTS', help='file or URL')
    parser.add_argument('destination', metavar='DST', type=Path, help='.pth or .safetensors')
    common.add_model_options(parser)
    parser.add_argument('--data_path', type=Path, required=True, metavar='FOLDER',
                        help='images, at any depth')
    parser.add_argument('--images', type=int, default=128, metavar='N',
                        help='of them for the scales; default: 128')
    parser.add_argument('--input_size', type=int,
                        help="pixels a side; default: those of the file, or else the registry's")
    add_max_image_pixels(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Quantize, compare and write. Raises UserError for what a user can mend: nothing is written then."""
    common.check_weights_file(args.source, args.destination)
    common.check_input_size(args)
    if args.images < 1:
        raise UserError(f'--images {args.images} must be at least 1')
    files = common.named_images([str(args.data_path)])
    if not args.data_path.is_dir():
        raise UserError(f'--data_path {args.data_path} is no folder')
    name, original, preprocessing = common.read_model(args.source, args.model, args.model_key)
    if replknet_zoo.is_quantized(original.state_dict()):
        raise UserError(f'{args.source} is in int8: name the weights that it was made from')
    size = common.set_input_size(preprocessing, args.input_size, original)
    chosen, others = divide(files, args.images)
    print(f'{name}, {original.head.out_features} classes, {size} px: {len(chosen)} images to calibrate by, '
          f'{"the same, which proves little," if chosen == others else len(others)} to compare on')
    batches = [x for _, x in common.readable_images(chosen, preprocessing, args.max_image_pixels)]
    try:
        quantized, decibels = quantize(original, batches)
    except ValueError as error:
        raise UserError(str(error)) from error
    for layer, kept in sorted(decibels.items(), key=lambda pair: pair[1]):
        print(f'{kept:5.1f} dB  {layer}' + ('  stays in floating point' if kept < LEAST_DECIBELS else ''))
    state = {key: value.contiguous() for key, value in quantized.state_dict().items()}
    if not replknet_zoo.is_quantized(state):
        raise UserError('every layer loses too much in int8: nothing was written')
    models = {'original': original, 'int8': quantized}
    compare({form: replknet_zoo.compile_for_inference(model) for form, model in models.items()}, others,
            labels_of(others, args.data_path, original.head.out_features), preprocessing,
            args.max_image_pixels)
    metadata = {'model': name, 'num_classes': original.head.out_features, **preprocessing, 'merged': True,
                'folded_bn': True, 'int8': True}

    def write_and_read(temporary: Path) -> None:
        common.write_weights(temporary, state, metadata, args.destination.suffix, 'model')
        written = replknet_zoo.model_for(name, replknet_zoo.load_weights(temporary), temporary)
        with torch.inference_mode():
            if not torch.equal(written(batches[0]), quantized(batches[0])):
                raise UserError('the file that was written gives other logits: nothing was written')

    common.write_checked(args.destination, write_and_read)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
