"""Write a classifier as ONNX, merged and folded, in float32, for any batch, height and width.

python tools/export_onnx.py --weights RepLKNet-31B_ImageNet-1K_224.pth RepLKNet-31B.onnx

The file holds operators of the ONNX standard only. ONNX Runtime runs it at three shapes before it gets its
name; a line for each says how far its logits are from those of the weights as they were read, in PyTorch. The
last line is that of the file: opset, size, pre-processing. RepLKNet-31B takes a minute on a CPU. Needs onnx,
onnxruntime, onnxscript: pip install -e '.[onnx]'.
"""
import argparse
import copy
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import replknet_zoo
from tools import common
from utils import UserError, replace_file, script

if TYPE_CHECKING:
    import onnx

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSETS = range(18, 26)  # that torch 2.14 writes; where another is asked for it writes 18 all the same


def source_model(args: argparse.Namespace) -> tuple[str, torch.nn.Module, dict]:
    """tools.common.read_model, or without --weights a model with random ones, which is said."""
    implementation = 'auto'  # the layers of the external extension cannot be exported
    if args.weights:
        return common.read_model(args.weights, args.model, args.model_key, implementation)
    print('NOTE: without --weights they are random: the file is good for timing, its predictions mean '
          'nothing')
    model = replknet_zoo.create_model(args.model, use_sync_bn=False, implementation=implementation).eval()
    return args.model, model, common.preprocessing_of({}, args.model)


def export(model: torch.nn.Module, opset: int) -> 'onnx.ModelProto':
    """The model as ONNX: `image` (batch, 3, height, width) to `logits` (batch, classes).

    Batch, height and width are left free.
    """
    free = {axis: torch.export.Dim(name) for axis, name in ((0, 'batch'), (2, 'height'), (3, 'width'))}
    # a batch of 1, or one part of a RepMLPNet's map, would be taken for a constant
    sides = [max(64, 2 * multiple) for multiple in model.size_multiples]
    proto = torch.onnx.export(model, (torch.randn(2, 3, *sides),), dynamo=True, verbose=False,
                              opset_version=opset, input_names=['image'], output_names=['logits'],
                              dynamic_shapes={'x': free}).model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # tracebacks, with the paths of this machine
    return proto


def check_operators(proto: 'onnx.ModelProto', opset: int) -> None:
    """Raise UserError for operators that are not those of the standard's `opset`."""
    foreign = sorted({f'{node.domain}::{node.op_type}' for node in proto.graph.node if node.domain})
    foreign += [f'{function.domain}::{function.name}' for function in proto.functions]
    if foreign:
        raise UserError(f'the file would need operators that ONNX does not define: {", ".join(foreign)}')
    written = [entry.version for entry in proto.opset_import if not entry.domain]
    if written != [opset]:
        raise UserError(f'torch {torch.__version__} wrote opset {written[0]}, not {opset}: pass another '
                        '--opset')


def check_logits(path: Path, model: torch.nn.Module, side: int) -> None:
    """Compare ONNX Runtime with the model at three shapes, which share no batch and, where it takes any size,
    no height or width.

    Raises UserError if they are too far apart.
    """
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])

    shapes = (1, side, side), (2, side + 32, side - side // 8), (3, side // 2, 2 * side - 1)
    for batch, *sides in shapes:
        height, width = (math.ceil(side / multiple) * multiple
                         for side, multiple in zip(sides, model.size_multiples, strict=True))
        noise = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        common.compare(model, run, [noise], f'random images of {height} x {width}')


def get_args_parser() -> argparse.ArgumentParser:
    """The file and the options."""
    parser = argparse.ArgumentParser('export_onnx.py', description='Write a classifier as ONNX')
    parser.add_argument('out', type=Path, metavar='OUT.onnx')
    parser.add_argument('--weights', metavar='FILE',
                        help='or URL: whatever main.py reads, converted files too; default: random')
    common.add_model_options(parser)
    parser.add_argument('--opset', type=int, default=18, choices=OPSETS, metavar='N',
                        help=f"ONNX's operator set, {OPSETS[0]} to {OPSETS[-1]}; default: 18, which the most "
                        "runtimes read")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot work, before anything is read."""
    if args.model not in replknet_zoo.MODELS and not (args.model is None and args.weights):
        given = f'unknown --model {args.model}' if args.model else 'there are neither --weights nor --model'
        raise UserError(f'{given}: choose one of {", ".join(replknet_zoo.MODELS)}')
    common.check_output(args.out)
    if args.weights and args.out.exists() and Path(args.weights).exists() and args.out.samefile(args.weights):
        raise UserError(f'{args.out} is the file to export: name another one')
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the export needs {', '.join(missing)}, not installed here: "
                        "pip install -e '.[onnx]'")


def main(args: argparse.Namespace) -> None:
    """Export, check and write. Raises UserError for what a user can mend: nothing is written then."""
    check_options(args)
    import onnx  # an extra, which check_options has looked for
    name, model, preprocessing = source_model(args)
    folded = copy.deepcopy(model)
    folded.structural_reparam()
    folded.deep_fuse_BN()
    proto = export(folded, args.opset)
    check_operators(proto, args.opset)
    metadata = {'model': name, 'num_classes': model.head.out_features, **preprocessing}
    onnx.helper.set_model_props(proto, {key: value if isinstance(value, str) else json.dumps(value)
                                        for key, value in metadata.items()})

    def write_and_check(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(temporary)
        check_logits(temporary, model, preprocessing['input_size'])

    try:
        replace_file(args.out, write_and_check)
    except OSError as error:
        raise UserError(f'{args.out} could not be written: {error}') from error
    print(f'Wrote {args.out}, {args.out.stat().st_size / 2 ** 20:.1f} MiB: opset {args.opset}, image (batch, '
          f'3, height, width) normalised by mean {preprocessing["mean"]}, std {preprocessing["std"]}, to '
          f'logits (batch, {model.head.out_features})')


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
