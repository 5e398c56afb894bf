"""What the scripts of this folder share: their images, their model with its pre-processing, and checks."""
import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.transforms import Compose

import checkpoints
import datasets
import replknet_zoo
from image_data.decode import load_image
from image_data.folders import find_images, passed_over_note
from options import add_max_image_pixels, check_image_size, mean_and_std
from replknet_zoo.own_models import is_own
from utils import UserError, replace_file

BATCH = 16  # images: little memory at any resolution
TOLERANCE = 1e-4  # largest difference, of the largest logit: float32 rounding stays far below

# ---- Options -----------------------------------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What tells which model a file of weights holds."""
    parser.add_argument('--model', metavar='NAME',
                        help=f'{", ".join(replknet_zoo.MODELS)}; default: known by the weights')
    parser.add_argument('--model_key', default='model|module',
                        help='key of the weights in the file; model_ema for the EMA')


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """What tells which model classifies images, at which size and where."""
    parser.add_argument('--weights', required=True, metavar='FILE',
                        help='or URL: whatever main.py reads, converted files too')
    add_model_options(parser)
    parser.add_argument('--input_size', type=int,
                        help="pixels a side; default: the file's, or else the registry's")
    add_max_image_pixels(parser)
    parser.add_argument('--device', default='auto', help='auto (CUDA if there is any), cpu, cuda, cuda:1 ...')


def check_input_size(args: argparse.Namespace) -> None:
    """Raise UserError for an --input_size without pixels."""
    if args.input_size is not None and args.input_size < 1:
        raise UserError(f'--input_size {args.input_size} must be at least 1')


def set_input_size(preprocessing: dict, size: int | None, model: nn.Module) -> int:
    """Put --input_size, where given, into `preprocessing`; return what stands there.

    Raises UserError where the model does not take it.
    """
    preprocessing['input_size'] = size = size or preprocessing['input_size']
    check_image_size('input_size', size, model)
    return size


def check_output(path: Path, option: str = '') -> None:
    """Raise UserError where replace_file() could not, or should not, put a file at `path`.

    `option` names it in the error.
    """
    name = f'{option} {path}'.lstrip()
    if not path.parent.is_dir():
        raise UserError(f'{name}: there is no folder {path.parent}, make it first')
    if path.exists() and not path.is_file():
        raise UserError(f'{name} is a folder or a device: name a file')


def check_weights_file(source: str, destination: Path) -> None:
    """Raise UserError where weights from `source` cannot, or should not, be written to `destination`."""
    if destination.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'{destination} ends in neither .pth nor .safetensors: the suffix says which format '
                        'to write')
    check_output(destination)
    if destination.exists() and Path(source).exists() and destination.samefile(source):
        raise UserError(f'{destination} is the file to convert: name another one')


def write_checked(path: Path, write: Callable[[Path], None], form: str = '') -> None:
    """Have write(temporary name) make a file and check it, then give it its name, and say so.

    Raises UserError where the system refuses, and what write() raises: nothing is written then.
    """
    try:
        replace_file(path, write)
    except OSError as error:
        raise UserError(f'{path} could not be written: {error}') from error
    print(f'Wrote {path}, {path.stat().st_size / 2 ** 20:.1f} MiB{form}')


# ---- A model and its pre-processing ------------------------------------------------------------------------


def read_model(weights: str, name: str | None, model_key: str,
               implementation: str | None = None) -> tuple[str, nn.Module, dict]:
    """The registry name of the classifier in a file, the classifier, and its pre-processing.

    Without a `name` the weights' shapes tell it. implementation: replknet.get_conv2d's. Raises UserError for
    a file that cannot be read, and for weights that are not of the model `name` or have no head.
    """
    try:
        checkpoint = replknet_zoo.read_checkpoint(weights)
        state = replknet_zoo.state_dict_of(checkpoint, weights, model_key)
        if name and is_own(name):
            raise UserError(f'--model {name}: this takes the named models only')
        name = name or replknet_zoo.name_of(state)
        if name is None:
            known = ', '.join(replknet_zoo.MODELS)
            raise UserError(f'{weights} holds weights of none of the models {known}')
        model = replknet_zoo.model_for(name, state, weights, implementation=implementation)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    if not hasattr(model, 'head'):
        raise UserError(f'{weights} is a backbone without a classifier: it has no head.weight')
    return name, model, preprocessing_of(checkpoint, name)


def preprocessing_of(checkpoint: object, name: str) -> dict:
    """input_size (a side in pixels), crop_pct, interpolation, mean and std of weights of the model `name`.

    As the metadata of a converted file says, or the options of the training that wrote the file, or the
    registry.
    """
    config = replknet_zoo.MODELS[name]
    found = {key: getattr(config, key) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')}
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    options, metadata = checkpoints.options_of(checkpoint), checkpoint.get('metadata')
    if {'imagenet_default_mean_and_std', 'input_size'} <= options.keys():
        test_size = options.get('test_size', -1)
        found['input_size'] = test_size if test_size > 0 else options['input_size']
        found['crop_pct'] = options.get('crop_pct') or config.crop_pct
        found['mean'], found['std'] = mean_and_std(argparse.Namespace(**options))
    if isinstance(metadata, dict) and {'input_size', 'crop_pct', 'mean', 'std'} <= metadata.keys():
        found = {key: metadata.get(key, value) for key, value in found.items()}  # else not convert.py's
    return found


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict, suffix: str, key: str) -> None:
    """Write a state dict and what is to be known about it.

    In a .pth they stand under `key` and `metadata`, with key '' the state dict alone; in safetensors metadata
    are texts. Raises OSError where that fails.
    """
    if suffix == '.safetensors':
        texts = {name: value if isinstance(value, str) else json.dumps(value)
                 for name, value in metadata.items()}
        # save_file() would make a file that its owner alone may read
        path.write_bytes(safetensors.torch.save(state, {'format': 'pt', **texts}))
        return
    try:
        torch.save(checkpoints.plain({key: state, 'metadata': metadata} if key else state), path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error


def fast_form(model: nn.Module, device: torch.device) -> nn.Module:
    """The model merged, folded and on the device."""
    if device.type == 'cpu':
        return replknet_zoo.compile_for_inference(model)
    model.structural_reparam()  # torch.compile would take longer than most folders of images
    model.deep_fuse_BN()
    return model.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def compare(original: Callable, converted: Callable, batches: Iterable[Tensor], what: str,
            tolerance: float = TOLERANCE) -> None:
    """Print the largest difference of two models' logits and how many of their predictions agree.

    Predictions may differ within `tolerance`, where two classes are that close. Raises UserError beyond it.
    """
    images, agree, difference, largest = 0, 0, 0.0, 0.0
    for x in batches:
        before, after = original(x), converted(x)
        if not (before.isfinite().all() and after.isfinite().all()):
            raise UserError(f'logits on {what} are not finite: the weights are broken')
        images, agree = images + len(x), agree + (before.argmax(1) == after.argmax(1)).sum().item()
        difference = max(difference, (after - before).abs().max().item())
        largest = max(largest, before.abs().max().item())
    if not images:
        raise UserError(f'none of the {what} could be read')
    relative = difference / largest if largest else difference
    print(f'{images} {what}: largest difference of the logits {difference:.2e} ({relative:.1e} of the '
          f'largest, {largest:.2f}); predictions agree on {agree}', flush=True)
    if relative > tolerance:
        raise UserError(f'the logits on {what} differ by {relative:.1e} of the largest, and {tolerance:.0e} '
                        'is allowed: nothing was written')


# ---- Images ------------------------------------------------------------------------------------------------


def named_images(names: Sequence[str]) -> list[Path]:
    """The files that are named, those that match a pattern, and the images below a folder, each once.

    Says which files of a folder were passed over. Raises UserError for a name behind which there is none.
    """
    found = []
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        files = []
        for match in map(Path, matches):
            files += _images_below(match) if match.is_dir() else [match]
        if not files and matches:
            raise UserError(f'{name} holds no image: none of its files ends in .jpg, .png or as another that '
                            'Pillow reads')
        if not files:
            raise UserError(f'there is no file or folder {name}')
        found += files
    return list(dict.fromkeys(found))


def _images_below(folder: Path) -> list[Path]:
    paths, passed_over = find_images(folder)
    if passed_over:
        print(f'{folder}: {passed_over_note(passed_over)}', file=sys.stderr)
    return sorted(map(Path, paths))


def evaluation_transform(preprocessing: dict) -> Compose:
    """main.py's transform in evaluation: PIL image to tensor (3, S, S)."""
    values = {'interpolation': 'bicubic', **preprocessing}
    return datasets.evaluation_transform(values.pop('input_size'), **values)


def read_batches(files: Sequence[Path], transform: Compose,
                 max_pixels: int) -> Iterator[list[tuple[Path, Tensor | UserError]]]:
    """BATCH images at a time, each (3, S, S), or the reason why it cannot be read."""
    def read(file: Path) -> tuple[Path, Tensor | UserError]:
        try:
            return file, transform(load_image(str(file), max_pixels))
        except UserError as error:
            return file, error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), BATCH):
            yield list(pool.map(read, files[start:start + BATCH]))


def readable_images(files: Sequence[Path], preprocessing: dict,
                    max_pixels: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of files and their images (N, 3, S, S); those that cannot be read are reported, passed over."""
    for batch in read_batches(files, evaluation_transform(preprocessing), max_pixels):
        for _, error in batch:
            if isinstance(error, UserError):
                print(f'Passed over: {error}')
        readable = [(file, image) for file, image in batch if isinstance(image, Tensor)]
        if readable:
            names, images = zip(*readable, strict=True)
            yield list(names), torch.stack(images)
