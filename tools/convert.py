"""Convert weights: merge the kernels, fold the BatchNorms, take the EMA, change the file's format.

python tools/convert.py RepLKNet-31B_ImageNet-1K_224.pth merged.safetensors --model RepLKNet-31B

reads whatever main.py reads. What it has written is read back and compared with the original on random input, and with
--data_path on images; only then does the file get its name. The last lines are those of the comparison and the size of the file.
"""
import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import checkpoints
import replknet_zoo
import utils
from options import add_max_image_pixels, str2bool
from tools.predict import evaluation_transform, find_images, read_batches, read_model

TOLERANCE = 1e-4  # largest difference, of the largest logit: float32 rounding stays far below
RANDOM_IMAGES = 4


def mmpretrain_key(key: str) -> str:
    """Our key in mmpretrain's spelling, the inverse of what replknet_zoo.load_weights reads."""
    for ours, theirs in (('norm.', 'backbone.stages.3.norm.'), ('head.', 'head.fc.')):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return f'backbone.{key}'


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict, suffix: str, key: str) -> None:
    """Write a state dict and what is to be known about it: in a .pth under `key` and `metadata`, in safetensors as texts.

    Raises OSError where that fails.
    """
    if suffix == '.safetensors':
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
        # save_file() would make a file that its owner alone may read
        path.write_bytes(safetensors.torch.save(state, {'format': 'pt', **texts}))
        return
    try:
        torch.save(checkpoints.plain({key: state, 'metadata': metadata}), path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error


@torch.inference_mode()
def compare(original: torch.nn.Module, converted: torch.nn.Module, batches: Iterable[Tensor], what: str) -> None:
    """Print the largest difference of the logits and how many predictions agree; UserError beyond TOLERANCE.

    Predictions may differ within it, where two classes are that close.
    """
    images, agree, difference, largest = 0, 0, 0.0, 0.0
    for x in batches:
        before, after = original(x), converted(x)
        if not (before.isfinite().all() and after.isfinite().all()):
            raise utils.UserError(f'logits on {what} are not finite: the weights are broken')
        images, agree = images + len(x), agree + (before.argmax(1) == after.argmax(1)).sum().item()
        difference = max(difference, (after - before).abs().max().item())
        largest = max(largest, before.abs().max().item())
    if not images:
        raise utils.UserError(f'none of the {what} could be read')
    relative = difference / largest if largest else difference
    print(f'{images} {what}: largest difference of the logits {difference:.2e} ({relative:.1e} of the largest, {largest:.2f}); '
          f'predictions agree on {agree}', flush=True)
    if relative > TOLERANCE:
        raise utils.UserError(f'the logits on {what} differ by {relative:.1e} of the largest, and {TOLERANCE:.0e} is allowed: '
                              'nothing was written')


def readable_images(files: Sequence[Path], preprocessing: dict, max_pixels: int) -> Iterator[Tensor]:
    """Batches (N, 3, S, S) of the images; those that cannot be read are reported and passed over."""
    for batch in read_batches(files, evaluation_transform(preprocessing), max_pixels):
        for _, error in batch:
            if isinstance(error, utils.UserError):
                print(f'Passed over: {error}')
        images = [image for _, image in batch if isinstance(image, Tensor)]
        if images:
            yield torch.stack(images)


def get_args_parser() -> argparse.ArgumentParser:
    """The two files and the options."""
    parser = argparse.ArgumentParser('convert.py', description='Convert weights')

    def switch(name: str, default: bool, help: str) -> None:
        parser.add_argument(name, type=str2bool, nargs='?', const=True, default=default, metavar='BOOL', help=help)

    parser.add_argument('source', metavar='SRC', help='file or URL')
    parser.add_argument('destination', metavar='DST', type=Path, help='.pth or .safetensors')
    parser.add_argument('--model', metavar='NAME', help=f'{", ".join(replknet_zoo.MODELS)}; default: known by the weights')
    parser.add_argument('--model_key', default='model|module', help='key of the weights in the file; model_ema for the EMA')
    switch('--merge', True, 'merge the small kernels into the large ones; default: true')
    switch('--fold_bn', False, 'fold every BatchNorm into its neighbour: for inference only')
    parser.add_argument('--to', default='replknet', choices=['replknet', 'mmpretrain'], help='whose keys DST gets')
    parser.add_argument('--input_size', type=int, help='pixels a side, for the metadata and the comparison; default: those of '
                        "the file, or else the registry's")
    parser.add_argument('--data_path', type=Path, metavar='FOLDER', help='compare on the images below it too')
    add_max_image_pixels(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, before anything is read."""
    destination = args.destination
    if destination.suffix not in ('.pth', '.safetensors'):
        raise utils.UserError(f'{destination} ends in neither .pth nor .safetensors: the suffix says which format to write')
    utils.check_output(destination)
    if destination.exists() and Path(args.source).exists() and destination.samefile(args.source):
        raise utils.UserError(f'{destination} is the file to convert: name another one')
    if args.to == 'mmpretrain' and destination.suffix != '.pth':
        raise utils.UserError(f'mmpretrain does not read {destination.suffix}: with --to mmpretrain name a .pth')
    if args.input_size is not None and args.input_size < 1:
        raise utils.UserError(f'--input_size {args.input_size} must be at least 1')


def main(args: argparse.Namespace) -> None:
    """Convert, compare and write. Raises UserError for what a user can mend: nothing is written then."""
    check_options(args)
    files = find_images([str(args.data_path)]) if args.data_path is not None else []
    name, original, preprocessing = read_model(args.source, args.model, args.model_key)
    preprocessing['input_size'] = size = args.input_size or preprocessing['input_size']
    converted = copy.deepcopy(original)
    if args.merge:
        converted.structural_reparam()
    if args.fold_bn:
        converted.deep_fuse_BN()
    state = converted.state_dict()
    merged, folded = any('.lkb_reparam.' in key for key in state), not any(isinstance(m, _BatchNorm) for m in converted.modules())
    metadata = {'model': name, 'num_classes': original.head.out_features, **preprocessing, 'merged': merged, 'folded_bn': folded}
    print(f'{name}, {metadata["num_classes"]} classes, {size} px, kernels {"" if merged else "not "}merged, BatchNorms '
          f'{"" if folded else "not "}folded')
    if args.to == 'mmpretrain':
        if folded:
            raise utils.UserError('mmpretrain has no model without BatchNorms: convert unfolded weights, without --fold_bn')
        state = {mmpretrain_key(key): value for key, value in state.items()}

    def write_and_compare(temporary: Path) -> None:
        write_weights(temporary, state, metadata, args.destination.suffix, 'state_dict' if args.to == 'mmpretrain' else 'model')
        written = replknet_zoo.model_for(name, replknet_zoo.load_weights(temporary), temporary)
        noise = torch.randn(RANDOM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
        compare(original, written, [noise], 'random images')
        if files:
            images = readable_images(files, preprocessing, args.max_image_pixels)
            compare(original, written, images, f'images of {args.data_path}')

    try:
        utils.replace_file(args.destination, write_and_compare)
    except OSError as error:
        raise utils.UserError(f'{args.destination} could not be written: {error}') from error
    print(f'Wrote {args.destination}, {args.destination.stat().st_size / 2 ** 20:.1f} MiB')


if __name__ == '__main__':
    with utils.script():
        main(get_args_parser().parse_args())
