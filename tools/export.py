"""Write a classifier for other programs, merged and folded, in float32, for any batch, height and width.

python tools/export.py --to onnx --weights RepLKNet-31B_ImageNet-1K_224.pth RepLKNet-31B.onnx

onnx: operators of the ONNX standard only. pt2: a program of torch.export, of torch's own operators only,
which loads where this repository is not. aoti: a package compiled for this machine's CPU by AOTInductor, with
our convolution, for programs that `import large_kernel_conv`; it takes contiguous float32 images of sizes
that the model takes, and checks none of that.

--int8 writes a file of quantize.py as onnx in QDQ form: QuantizeLinear and DequantizeLinear, of the same
scales, stand before the layers that are in int8.

The file runs at four shapes before it gets its name; a line for each says how far its logits are from those
of the weights as they were read. The last line is that of the file: size, pre-processing. RepLKNet-31B takes
a minute on a CPU, several as aoti. onnx needs onnx, onnxruntime, onnxscript: pip install -e '.[onnx]'.
"""
import argparse
import copy
import importlib.util
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import replknet_zoo
from large_kernel_conv import DECOMPOSITIONS
from tools import common
from utils import UserError, script

if TYPE_CHECKING:
    import onnx

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSETS = range(18, 26)  # that torch 2.14 writes; where another is asked for it writes 18 all the same
# Another order of sums rounds an input to the next level here and there: 1 of 255.
INT8_TOLERANCE = 2e-2
SUFFIXES = {'onnx': '.onnx', 'pt2': '.pt2', 'aoti': '.pt2'}

Program = torch.export.ExportedProgram
Run = Callable[[Tensor], Tensor]


def source_model(args: argparse.Namespace) -> tuple[str, torch.nn.Module, dict]:
    """tools.common.read_model, or without --weights a model with random ones, which is said."""
    implementation = 'auto'  # the layers of the external extension cannot be exported
    if args.weights:
        return common.read_model(args.weights, args.model, args.model_key, implementation)
    print('NOTE: without --weights they are random: the file is good for timing, its predictions mean '
          'nothing')
    model = replknet_zoo.create_model(args.model, use_sync_bn=False, implementation=implementation).eval()
    return args.model, model, common.preprocessing_of({}, args.model)


# ---- The model as a program --------------------------------------------------------------------------------

def program_of(model: torch.nn.Module) -> Program:
    """The model as a program of torch.export: images (batch, 3, height, width) to logits (batch, classes).

    With our operator, and batch, height and width left free.
    """
    dim = torch.export.Dim
    sides = {axis: multiple * dim(f'parts_{axis}') if multiple > 1 else dim.DYNAMIC
             for axis, multiple in zip((2, 3), model.size_multiples, strict=True)}
    # a batch of 1, or one part of a RepMLPNet's map, would be taken for a constant
    example = torch.randn(2, 3, *(max(64, 2 * multiple) for multiple in model.size_multiples))
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (example,), dynamic_shapes={'x': {0: dim.DYNAMIC, **sides}},
                                      prefer_deferred_runtime_asserts_over_guards=True)
    return without_asserts(program)


def without_asserts(program: Program) -> Program:
    """The program without its tests of sizes, in place.

    torch.export asks for maps of more than a pixel, since strides of single ones are not unique; which no
    operator here minds. check_logits() compares such maps too.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def decomposed(program: Program) -> Program:
    """The program in torch's own operators. Raises UserError if one of another package is left."""
    program = without_asserts(program.run_decompositions(DECOMPOSITIONS))
    known = 'aten', 'quantized_decomposed'  # the latter for DequantizeLinear
    foreign = {str(node.target) for node in program.graph.nodes
               if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in known}
    if foreign:
        raise UserError(f'the program would need operators that torch does not have: {", ".join(foreign)}')
    return program


# ---- The formats: each writes a file, and returns how to run it --------------------------------------------

def as_texts(metadata: dict) -> dict[str, str]:
    """Metadata for a format that holds texts: what is none already as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def write_onnx(program: Program, path: Path, metadata: dict, opset: int) -> Run:
    """As ONNX: `image` to `logits`, metadata in the file's properties."""
    import onnx  # an extra, which check_options has looked for
    import onnxruntime
    proto = onnx_of(decomposed(program), opset)
    check_operators(proto, opset)
    onnx.helper.set_model_props(proto, as_texts(metadata))
    path.write_bytes(proto.SerializeToString())
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def onnx_of(program: Program, opset: int) -> 'onnx.ModelProto':
    """What torch makes of a program that is decomposed(), with names for what is free."""
    proto = torch.onnx.export(program, (), dynamo=True, verbose=False, opset_version=opset,
                              input_names=['image'], output_names=['logits']).model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # tracebacks, with the paths of this machine
    del proto.graph.value_info[:]  # sizes of maps, in names of torch's
    for value, names in ((proto.graph.input[0], {0: 'batch', 2: 'height', 3: 'width'}),
                         (proto.graph.output[0], {0: 'batch'})):
        for axis, name in names.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
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


def write_pt2(program: Program, path: Path, metadata: dict, _: int) -> Run:
    """As torch.export.save does, with metadata.json beside."""
    with path.open('wb') as file:  # by name torch takes .pt2 alone
        torch.export.save(decomposed(program), file, extra_files={'metadata.json': json.dumps(metadata)})
    with path.open('rb') as file:
        return torch.export.load(file).module()


def write_aoti(program: Program, path: Path, metadata: dict, _: int) -> Run:
    """As AOTInductor's package, which answers to get_metadata()."""
    with tempfile.TemporaryDirectory() as folder:
        named = str(Path(folder, 'model.pt2'))  # torch takes no other suffix
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):
            torch._inductor.aoti_compile_and_package(
                program, package_path=named, inductor_configs={'aot_inductor.metadata': as_texts(metadata)})
        shutil.copyfile(named, path)
        return torch._inductor.aoti_load_package(named)


WRITERS = {'onnx': write_onnx, 'pt2': write_pt2, 'aoti': write_aoti}


@torch.inference_mode()
def check_logits(run: Run, model: torch.nn.Module, side: int, tolerance: float) -> None:
    """Compare what was written with the model at four shapes, which share no batch and, where it takes any
    size, no height or width; the last has single pixels, or parts, as its last maps.

    Raises UserError if they are too far apart.
    """
    shapes = (1, side, side), (2, side + 32, side - side // 8), (3, side // 2, 2 * side - 1), (4, 31, 32)
    for batch, *sides in shapes:
        height, width = (math.ceil(side / multiple) * multiple
                         for side, multiple in zip(sides, model.size_multiples, strict=True))
        noise = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        common.compare(model, run, [noise], f'random images of {height} x {width}', tolerance)


# ---- The command -------------------------------------------------------------------------------------------

def get_args_parser() -> argparse.ArgumentParser:
    """The file and the options."""
    parser = argparse.ArgumentParser('export.py', description='Write a classifier for other programs')
    parser.add_argument('out', type=Path, metavar='OUT', help='.onnx or .pt2')
    parser.add_argument('--to', required=True, choices=WRITERS,
                        help="onnx; pt2: torch.export, in torch's own operators; aoti: compiled for this CPU")
    parser.add_argument('--weights', metavar='FILE',
                        help='or URL: whatever main.py reads, converted files too; default: random')
    common.add_model_options(parser)
    parser.add_argument('--int8', action='store_true', help='weights of quantize.py, as onnx in QDQ form')
    parser.add_argument('--opset', type=int, choices=OPSETS, metavar='N',
                        help=f"ONNX's operator set, {OPSETS[0]} to {OPSETS[-1]}; default: {OPSETS[0]}, which "
                        "the most runtimes read")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for what cannot work, before anything is read."""
    if args.model not in replknet_zoo.MODELS and not (args.model is None and args.weights):
        given = f'unknown --model {args.model}' if args.model else 'there are neither --weights nor --model'
        raise UserError(f'{given}: choose one of {", ".join(replknet_zoo.MODELS)}')
    common.check_output(args.out)
    if args.out.suffix != SUFFIXES[args.to]:
        raise UserError(f'{args.out} does not end in {SUFFIXES[args.to]}, as a file of --to {args.to} does')
    if args.int8 and (args.to != 'onnx' or not args.weights):
        raise UserError('--int8 is for --to onnx, and for --weights of tools/quantize.py')
    if args.opset and args.to != 'onnx':
        raise UserError(f'--opset {args.opset} is for --to onnx, not for --to {args.to}')
    if args.weights and args.out.exists() and Path(args.weights).exists() and args.out.samefile(args.weights):
        raise UserError(f'{args.out} is the file to export: name another one')
    missing = [name for name in PACKAGES if args.to == 'onnx' and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the export needs {', '.join(missing)}, not installed here: "
                        "pip install -e '.[onnx]'")


def main(args: argparse.Namespace) -> None:
    """Export, check and write. Raises UserError for what a user can mend: nothing is written then."""
    check_options(args)
    name, model, preprocessing = source_model(args)
    if args.int8 != replknet_zoo.is_quantized(model.state_dict()):
        raise UserError(f'{args.weights} is not in int8: run tools/quantize.py first' if args.int8 else
                        f'{args.weights} is in int8: pass --to onnx --int8')
    folded = copy.deepcopy(model).requires_grad_(False)  # of weights that are not trained spectra are kept
    folded.structural_reparam()
    folded.deep_fuse_BN()
    opset = args.opset or OPSETS[0]
    metadata = {'model': name, 'num_classes': model.head.out_features, **preprocessing}

    def write_and_check(temporary: Path) -> None:
        run = WRITERS[args.to](program_of(folded), temporary, metadata, opset)
        check_logits(run, model, preprocessing['input_size'],
                     INT8_TOLERANCE if args.int8 else common.TOLERANCE)

    form = {'onnx': f'opset {opset}', 'pt2': "torch's operators", 'aoti': 'with large_kernel_conv'}
    common.write_checked(args.out, write_and_check, (
        f': {form[args.to]}, image (batch, 3, height, width) normalised by mean {preprocessing["mean"]}, std '
        f'{preprocessing["std"]}, to logits (batch, {model.head.out_features})'))


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
