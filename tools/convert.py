"""Convert weights: merge the kernels, fold the BatchNorms, take the EMA, change the file's format.

python tools/convert.py RepLKNet-31B_ImageNet-1K_224.pth merged.safetensors --model RepLKNet-31B

reads whatever main.py reads. What it has written is read back and compared with the original on random input,
and with --data_path on images; only then does the file get its name. The last lines are those of the
comparison and the size of the file.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import replknet_zoo
from options import add_max_image_pixels, str2bool
from replknet_zoo.weights import in_mmpretrains_keys
from tools import common
from utils import UserError, script

RANDOM_IMAGES = 4


def get_args_parser() -> argparse.ArgumentParser:
    """The two files and the options."""
    parser = argparse.ArgumentParser('convert.py', description='Convert weights')

    def switch(name: str, default: bool, help: str) -> None:
        parser.add_argument(name, type=str2bool, nargs='?', const=True, default=default, metavar='BOOL',
                            help=help)

    parser.add_argument('source', metavar='SRC', help='file or URL')
    parser.add_argument('destination', metavar='DST', type=Path, help='.pth or .safetensors')
    common.add_model_options(parser)
    switch('--merge', True, 'merge the small kernels into the large ones; default: true')
    switch('--fold_bn', False, 'fold every BatchNorm into its neighbour: for inference only')
    parser.add_argument('--to', default='replknet', choices=['replknet', 'bare', 'mmpretrain'],
                        help="bare: a state dict and nothing else; mmpretrain: in mmpretrain's keys")
    parser.add_argument('--input_size', type=int, help='pixels a side, for the metadata and the comparison; '
                        "default: those of the file, or else the registry's")
    parser.add_argument('--data_path', type=Path, metavar='FOLDER', help='compare on the images below it too')
    add_max_image_pixels(parser)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, before anything is read."""
    destination = args.destination
    common.check_weights_file(args.source, destination)
    if args.to != 'replknet' and destination.suffix != '.pth':
        raise UserError(f'--to {args.to} writes no {destination.suffix}: name a .pth')
    common.check_input_size(args)


def main(args: argparse.Namespace) -> None:
    """Convert, compare and write. Raises UserError for what a user can mend: nothing is written then."""
    check_options(args)
    files = common.named_images([str(args.data_path)]) if args.data_path is not None else []
    name, original, preprocessing = common.read_model(args.source, args.model, args.model_key)
    size = common.set_input_size(preprocessing, args.input_size, original)
    converted = copy.deepcopy(original)
    if args.merge:
        converted.structural_reparam()
    if args.fold_bn:
        converted.deep_fuse_BN()
    state = converted.state_dict()
    merged, folded = converted.is_merged, converted.is_folded
    in_int8 = replknet_zoo.is_quantized(state)
    metadata = {'model': name, 'num_classes': original.head.out_features, **preprocessing, 'merged': merged,
                'folded_bn': folded, **({'int8': True} if in_int8 else {})}
    print(f'{name}, {metadata["num_classes"]} classes, {size} px, kernels {"" if merged else "not "}merged, '
          f'BatchNorms {"" if folded else "not "}folded{", layers in int8" if in_int8 else ""}')
    if args.to == 'mmpretrain':
        if folded:
            raise UserError('mmpretrain has no model without BatchNorms: convert unfolded weights, without '
                            '--fold_bn')
        state = in_mmpretrains_keys(state)

    def write_and_compare(temporary: Path) -> None:
        key = {'replknet': 'model', 'bare': '', 'mmpretrain': 'state_dict'}[args.to]
        common.write_weights(temporary, state, metadata, args.destination.suffix, key)
        written = replknet_zoo.model_for(name, replknet_zoo.load_weights(temporary), temporary)
        noise = torch.randn(RANDOM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
        common.compare(original, written, [noise], 'random images')
        if files:
            images = common.readable_images(files, preprocessing, args.max_image_pixels)
            common.compare(original, written, (x for _, x in images), f'images of {args.data_path}')

    common.write_checked(args.destination, write_and_compare)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
