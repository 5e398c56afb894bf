"""Measure shape bias: whether a classifier goes by shape or by texture where images show them in conflict.

python tools/shape_bias.py cue-conflict --weights RepLKNet-31B_ImageNet-1K_224.pth --plot shape_bias.png

Geirhos et al., "ImageNet-trained CNNs are biased towards texture", ICLR 2019 (arXiv 1811.12231). The folder
is their `stimuli/style-transfer-preprocessed-512`, or a like one: a folder for each category of shape, in it
images such as `cat4-truck3.png`, a cat with the texture of a truck. Images of one category twice are left
out. A decision is the category whose ImageNet classes have the largest mean probability. Shape bias is the
number of decisions for the shape, of those for the shape or the texture, in each category of shape; the last
line is the mean over the categories. Images are resized and normalised as in main.py's evaluation.
RepLKNet-31B takes three minutes of CPU time for the authors' 1,200 images.

Which ImageNet classes make a category (CATEGORIES) was written down from memory of the authors' list. A test
checks that each class's name is one of its category. That none lacks could not be checked, for the list has
gaps that follow no rule (404, the airliner, is an airplane; 895, the warplane, is not): compare both before
you publish a figure.
"""
import argparse
import importlib.util
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

from distributed import select_device
from image_data.folders import list_folder
from tools import common
from utils import UserError, replace_file, script

# indices of the ImageNet classes, 207 in all
CATEGORIES = {
    'airplane': (404,),
    'bear': (294, 295, 296, 297),
    'bicycle': (444, 671),
    'bird': (8, *range(10, 17), 18, 19, 20, 22, 23, 24, *range(80, 84), *range(87, 97), 98, 99, 100,
             *range(127, 134), *range(135, 146)),
    'boat': (472, 554, 625, 814, 914),
    'bottle': (440, 720, 737, 898, 899, 901, 907),
    'car': (436, 511, 817),
    'cat': (281, 282, 283, 284, 285, 286),
    'chair': (423, 559, 765, 857),
    'clock': (409, 530, 892),
    'dog': (*range(152, 192), *range(193, 204), *range(205, 227), *range(228, 242), *range(243, 251),
            *range(252, 258), 259, 261, 262, 263, *range(265, 269)),
    'elephant': (385, 386),
    'keyboard': (508, 878),
    'knife': (499,),
    'oven': (766,),
    'truck': (555, 569, 656, 675, 717, 734, 864, 867),
}


def cue_conflict_images(folder: Path) -> dict[Path, tuple[str, str]]:
    """The images under `folder`, each with its shape and its texture.

    Raises UserError where a name does not tell them.
    """
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}')
    found = {}
    for category in (folder / name for name in list_folder(folder)[0]):
        if category.name not in CATEGORIES:
            raise UserError(f'{category} is none of the 16 categories {", ".join(CATEGORIES)}: name the '
                            'folder that holds theirs, and nothing else')
        for file in (category / name for names in list_folder(category) for name in names):
            name = re.fullmatch(r'([a-z]+)\d+-([a-z]+)\d+\.png', file.name)
            if not name or not {name[1], name[2]} <= CATEGORIES.keys() or name[1] != category.name:
                raise UserError(f'{file} is not named {category.name}NUMBER-TEXTURENUMBER.png, like '
                                f'{category.name}4-truck3.png, with one of the 16 categories as the texture: '
                                'rename it or take it out')
            found[file] = (name[1], name[2])
    if all(shape == texture for shape, texture in found.values()):
        raise UserError(f'{folder} holds no image whose shape and texture are of two categories, like '
                        'cat/cat4-truck3.png')
    return found


def decide(probabilities: Tensor) -> list[str]:
    """The category with the largest mean probability; probabilities (N, 1000) of the ImageNet classes."""
    means = torch.stack([probabilities[:, classes].mean(1) for classes in CATEGORIES.values()], 1)
    names = list(CATEGORIES)
    return [names[i] for i in means.argmax(1).tolist()]


@torch.inference_mode()
def decisions(model: nn.Module, files: Sequence[Path], transform: Compose, device: torch.device,
              max_pixels: int) -> Iterator[tuple[Path, str]]:
    """Each file with its category; one that cannot be read is reported and passed over."""
    done = 0
    for batch in common.read_batches(files, transform, max_pixels):
        images = {file: image for file, image in batch if isinstance(image, Tensor)}
        for file, error in batch:
            if file not in images:
                print(error, file=sys.stderr)
        if images:
            logits = model(torch.stack(list(images.values())).to(device)).float()
            if not logits.isfinite().all():
                raise UserError(f'logits of {batch[0][0]} and those after it are not finite: the weights are '
                                'broken')
            yield from zip(images, decide(logits.softmax(1)), strict=True)
        done += len(batch)
        print(f'\r{done} of {len(files)} images', end='\n' if done == len(files) else '', file=sys.stderr,
              flush=True)


def count(decided: Iterable[tuple[str, str, str]]) -> dict[str, Counter]:
    """From (shape, texture, decision): for each shape, how many are for 'shape', 'texture' and 'other'."""
    counts = {}
    for shape, texture, decision in decided:
        kind = {shape: 'shape', texture: 'texture'}.get(decision, 'other')
        counts.setdefault(shape, Counter())[kind] += 1
    return counts


def shape_biases(counts: dict[str, Counter]) -> dict[str, float]:
    """Shape decisions, of those for shape or texture, for each category that has any."""
    decided = {category: row['shape'] + row['texture'] for category, row in counts.items()}
    return {category: counts[category]['shape'] / number for category, number in decided.items() if number}


def show(counts: dict[str, Counter]) -> None:
    """Print the table."""
    rows = counts | {'all': sum(counts.values(), Counter())}
    biases = shape_biases(rows)
    print(f'{"shape":10} {"images":>6} {"shape":>6} {"texture":>8} {"other":>6} {"shape bias":>11}')
    for name, row in rows.items():
        print(f'{name:10} {row.total():6} {row["shape"]:6} {row["texture"]:8} {row["other"]:6} '
              f'{f"{biases[name]:.3f}" if name in biases else "-":>11}')


def plot(biases: dict[str, float], title: str, path: Path) -> None:
    """Draw the shape bias of each category as a point, and their mean as a line; PNG."""
    from matplotlib.figure import Figure
    mean = statistics.mean(biases.values())
    figure = Figure(figsize=(6, 2 + 0.3 * len(biases)), layout='constrained')
    axes = figure.subplots()
    axes.plot(list(biases.values()), range(len(biases)), 'o', label='a category')
    axes.axvline(mean, color='C1', label=f'their mean, {mean:.3f}')
    axes.set(xlim=(-0.02, 1.02), ylim=(len(biases) - 0.5, -0.5),
             xlabel='shape bias (0: all by texture, 1: all by shape)')
    axes.set_yticks(range(len(biases)), list(biases))
    axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize='medium')
    figure.legend(loc='outside lower center', ncols=2)
    figure.savefig(path, dpi=120, format='png')


def get_args_parser() -> argparse.ArgumentParser:
    """The folder and the options."""
    parser = argparse.ArgumentParser('shape_bias.py', description='Measure shape bias on cue-conflict images')
    parser.add_argument('folder', type=Path, metavar='FOLDER',
                        help='of folders airplane, bear ... with images such as bear/bear2-clock1.png')
    common.add_classifier_options(parser)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the counts there')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the categories')
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, before anything is read."""
    common.check_input_size(args)
    for option, path in (('--json', args.json), ('--plot', args.plot)):
        if path is not None:
            common.check_output(path, option)
    if args.plot and args.plot.suffix != '.png':
        raise UserError(f'--plot {args.plot}: its name must end in .png')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError("--plot needs matplotlib, which is not installed: pip install -e '.[plot]'")


def main(args: argparse.Namespace) -> None:
    """Print the table.

    Raises UserError for what a user can mend, at the end for images that cannot be read.
    """
    check_options(args)
    device = select_device(args.device)
    found = cue_conflict_images(args.folder)
    conflicts = {file: cues for file, cues in found.items() if cues[0] != cues[1]}
    name, model, preprocessing = common.read_model(args.weights, args.model, args.model_key)
    if model.head.out_features != 1000:
        raise UserError(f'{args.weights} has {model.head.out_features} classes, and the categories are made '
                        "of ImageNet-1K's 1000: take weights that end in it")
    size = common.set_input_size(preprocessing, args.input_size, model)
    print(f'{name}, {size} px, on {device}: {len(conflicts)} images; {len(found) - len(conflicts)} with '
          'shape and texture of one category are left out')
    model, transform = common.fast_form(model, device), common.evaluation_transform(preprocessing)
    decided = dict(decisions(model, list(conflicts), transform, device, args.max_image_pixels))
    if not decided:
        raise UserError(f'none of the images of {args.folder} could be read')
    counts = count((*conflicts[file], decision) for file, decision in decided.items())
    biases = shape_biases(counts)
    show(counts)
    if not biases:
        raise UserError('no decision is for the shape or the texture of its image, so there is no shape '
                        'bias: are these the weights of a trained model?')
    mean = statistics.mean(biases.values())
    print(f'Shape bias {mean:.3f}, the mean over {len(biases)} categories')
    if args.json:
        rows = {category: {**{kind: row[kind] for kind in ('shape', 'texture', 'other')},
                           'shape_bias': biases.get(category)}
                for category, row in counts.items()}
        content = {'model': name, 'weights': args.weights, 'input_size': size, 'shape_bias': mean,
                   'categories': rows}
        replace_file(args.json, lambda path: path.write_text(json.dumps(content, indent=1) + '\n'))
    if args.plot:
        replace_file(args.plot, lambda path: plot(biases, f'{name}, {size} px, {len(decided)} images', path))
    if len(decided) < len(conflicts):
        raise UserError(f'{len(conflicts) - len(decided)} of {len(conflicts)} images could not be read')


if __name__ == '__main__':
    with script(OSError):
        main(get_args_parser().parse_args())
