"""Whole models with random weights: parameters, GMACs, images/s and memory, in inference and in training."""
import argparse
import functools
import importlib.util
import multiprocessing
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, process

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import large_kernel_conv
import replknet_zoo
from options import check_image_size
from replknet_zoo.inference import onednn_computes
from tools.benchmarks import common, tables
from tools.benchmarks.common import LAYOUTS
from utils import UserError

HELP = 'whole models with random weights'
SECONDS = 5.0  # measuring time for each contestant
RUNTIMES = {'onnxruntime': ('onnxruntime', 'onnx', 'onnxscript'),
            'openvino': ('openvino', 'onnx', 'onnxscript')}
TIMM_PEERS = ('convnext_base', 'swin_base_patch4_window7_224')
COLUMNS = {  # of the printed table, with their widths
    'model': 28, 'mode': 9, 'shape': 14, 'dtype': 8, 'layout': 13, 'threads': 7, 'contestant': 13,
    'implementation': 16, 'ms': 10, 'images_per_s': 12, 'memory_mib': 10, 'ratio': 8,
}
# one model and one way to run it: plain values, so that another process can be given them
Contestant = namedtuple('Contestant', 'model contestant layout dtype mode batch input_size device threads')

# ---- The command -------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The models and how they are run."""
    parser.add_argument('--models', nargs='+', default=['RepLKNet-31B'], metavar='NAME',
                        help="of replknet_zoo.MODELS, or timm's")
    parser.add_argument('--input_size', type=int,
                        help="pixels a side; default: the registry's, 224 for timm's")
    parser.add_argument('--mode', nargs='+', default=['inference', 'training'],
                        choices=['inference', 'training'])
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 16], help='in inference; default: 1 16')
    parser.add_argument('--train_batch', type=int, default=8, help='default: 8')
    parser.add_argument('--memory', action='store_true', help='peak memory of all contestants, each in a '
                        'process of its own; default: of our training step')
    parser.add_argument('--int8', action='store_true', help='in int8 too, with scales from random images')
    parser.add_argument('--peers', action='store_true',
                        help=f'compare with torch.compile, {", ".join([*RUNTIMES, *TIMM_PEERS])} too')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for models that cannot be had; set args.runtimes to those that take part."""
    for name in set(args.models) - set(replknet_zoo.MODELS):
        if not timm.is_model(name):
            raise UserError(f'unknown --models {name}: choose from {", ".join(replknet_zoo.MODELS)}, or from '
                            'timm.list_models()')
        config, size = timm.get_pretrained_cfg(name), args.input_size or 224
        if config is not None and config.fixed_input_size and config.input_size[-1] != size:
            fixed = config.input_size[-1]
            raise UserError(f'{name} takes {fixed} px, not {size}: pass --input_size {fixed}')
    for name in filter(replknet_zoo.MODELS.__contains__, args.models if args.input_size else ()):
        with torch.device('meta'):
            check_image_size('input_size', args.input_size, replknet_zoo.create_model(name))
    args.runtimes = []
    for name, packages in RUNTIMES.items() if args.peers else ():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing or args.device == 'cuda':
            reason = f'{", ".join(missing)} not installed' if missing else 'measured on CPUs only'
            print(f'{name} is left out: {reason}')
        else:
            args.runtimes.append(name)
    if args.int8 and (args.device == 'cuda' or not onednn_computes(torch.int8)):
        print('int8 is left out: it needs a CPU with VNNI or AMX')
        args.int8 = False


def run(args: argparse.Namespace) -> None:
    """Print and write the models' sizes and the table."""
    content = common.begin(args, args.runtimes)
    content['sizes'] = model_sizes(args)
    for row in content['sizes']:
        print('{model} at {input_size} px: {parameters:.3f} M parameters, {gmacs:.3f} GMACs; merged '
              '{parameters_merged:.3f} M, {gmacs_merged:.3f} GMACs'.format_map(row))
    print('ratio: time of the best published one over this one; where there is none, of the first line')
    of = 'its tensors' if args.device == 'cuda' else 'all that is resident, libraries too'
    print(f'memory_mib: the peak of {of}')
    common.report(content, COLUMNS, groups(args), args.json)


def groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """The results of all contestants, for each model, mode and batch."""
    modes = [(mode, batch) for mode in args.mode
             for batch in (args.batch if mode == 'inference' else [args.train_batch])]
    groups = [contestants_of(args, model, mode, batch) for model in args.models for mode, batch in modes]
    # before any timing: on Linux a process's peak starts at its parent's size, which is still small
    memory = {c: peak_memory(c) for group in groups for c in group if c.contestant not in RUNTIMES
              and (args.memory or (c.mode, c.contestant) == ('training', 'ours eager'))}
    for group in groups:
        torch._dynamo.reset()  # else a second batch size would be compiled for any size, which is slower
        calls, names = {}, {}
        for c in group:
            calls[c], names[c] = build(c)
        seconds = common.measure(calls, SECONDS)
        base = min((seconds[c] for c in group if c.contestant == 'published'), default=seconds[group[0]])
        yield [{**c._asdict(), 'shape': f'{c.batch}x3x{c.input_size}x{c.input_size}',
                'implementation': names[c], 'ms': 1e3 * seconds[c], 'images_per_s': c.batch / seconds[c],
                'memory_mib': memory.get(c), 'ratio': base / seconds[c]} for c in group]


# ---- Sizes -------------------------------------------------------------------------------------------------


def model_sizes(args: argparse.Namespace) -> list[dict]:
    """Parameters (millions) and GMACs of the models in the registry, as trained and merged."""
    found = []
    for name in filter(replknet_zoo.MODELS.__contains__, args.models):
        side = args.input_size or replknet_zoo.MODELS[name].input_size
        row = {'model': name, 'input_size': side}
        for form, merged in (('', False), ('_merged', True)):
            with torch.device('meta'):  # which an external implementation does not know
                model = replknet_zoo.create_model(name, use_sync_bn=False, implementation='pytorch')
                if merged:
                    model.structural_reparam()
            row[f'parameters{form}'] = sum(p.numel() for p in model.parameters()) / 1e6
            row[f'gmacs{form}'] = gmacs(model.eval(), side)
        found.append(row)
    return found


def gmacs(model: nn.Module, side: int) -> float:
    """Multiply-adds / 1e9 of convolutions and linear layers for one image (3, side, side).

    The model is in evaluation, on the meta device.
    """
    return tables.count(lambda: model(torch.empty(1, 3, side, side, device='meta')))[0]


# ---- Contestants -------------------------------------------------------------------------------------------


def contestants_of(args: argparse.Namespace, model: str, mode: str, batch: int) -> list[Contestant]:
    """All ways to run `model`, and with --peers those of the peers.

    float16 is not compiled or given to a runtime.
    """
    dtypes = [args.dtype] if args.dtype else ['float32', 'bfloat16']
    dtypes += ['int8'] if args.int8 and mode == 'inference' else []
    found = []
    for name in dict.fromkeys([model, *(TIMM_PEERS if args.peers else ())]):
        known = name in replknet_zoo.MODELS
        size = replknet_zoo.MODELS[name].input_size if known else 224
        if name == model:
            size = args.input_size or size
        eager = [('published', 'NCHW'), ('published', 'channels_last'), ('ours eager', 'channels_last')]
        eager = eager if known else [('timm eager', 'channels_last')]
        ways = [(*way, dtype) for dtype in (dtypes if mode == 'training' else dtypes[:1]) for way in eager]
        for dtype in dtypes if mode == 'inference' else ():
            if dtype == 'int8' and not known:
                continue
            if dtype != 'float16':
                ways.append(('ours compiled' if known else 'timm compiled', 'channels_last', dtype))
                if known and args.peers and dtype != 'int8':
                    ways.append(('torch.compile', 'channels_last', dtype))
                ways += [(runtime, 'NCHW', dtype) for runtime in args.runtimes
                         if known and (runtime, dtype) != ('onnxruntime', 'bfloat16')]
        found += [Contestant(name, *way, mode, batch, size, args.device, args.threads) for way in ways]
    return found


def build(c: Contestant) -> tuple[Callable, str | None]:
    """A function that runs `c` once, and its depthwise implementation's name where that can be told."""
    torch.manual_seed(0)
    x = torch.randn(c.batch, 3, c.input_size, c.input_size)
    if c.contestant in RUNTIMES:
        return runtime_call(c, x), None
    to = {'device': c.device, 'memory_format': LAYOUTS[c.layout]}
    x, model, dtype = x.to(**to), build_model(c).to(**to), getattr(torch, c.dtype)
    labels = torch.zeros(c.batch, dtype=torch.long, device=c.device)
    run, half = model, dtype != torch.float32
    if c.contestant == 'ours compiled':  # which sees to the dtype itself
        run, half = replknet_zoo.compile_for_inference(model, dtype, calibration(c)), False
    elif c.contestant in ('timm compiled', 'torch.compile'):
        run = torch.compile(model, dynamic=False, options={'freezing': True})

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(c.device, dtype, enabled=half):
            run(x)

    def training_step() -> None:
        model.zero_grad()
        with torch.autocast(c.device, dtype, enabled=half):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()

    call = infer if c.mode == 'inference' else training_step
    if c.contestant.startswith('ours'):
        return call, implementations(call)
    return call, 'nn.Conv2d' if c.contestant == 'published' else None


def build_model(c: Contestant) -> nn.Module:
    """The model with random weights; for inference merged and folded, unless as published."""
    training = c.mode == 'training'
    if c.model not in replknet_zoo.MODELS:
        return timm.create_model(c.model).train(training)
    plain = c.contestant == 'published' or c.contestant in RUNTIMES
    torch.manual_seed(0)  # the same weights for all
    model = replknet_zoo.create_model(c.model, use_sync_bn=False, implementation='pytorch' if plain else None)
    if not training and c.contestant != 'published':
        model.eval().structural_reparam()
        model.deep_fuse_BN()
    if c.dtype == 'int8' and c.contestant in RUNTIMES:
        model, _ = replknet_zoo.quantize(model, calibration(c))
    return model.train(training)


def calibration(c: Contestant) -> list[Tensor] | None:
    """Random images for the scales of int8; None for other types."""
    if c.dtype != 'int8':
        return None
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, c.input_size, c.input_size, generator=generator) for _ in range(4)]


def implementations(call: Callable) -> str:
    """Names of what large_kernel_conv runs in one call."""
    names = set()

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, (large_kernel_conv.DepthwiseConv2d, large_kernel_conv.FrozenDepthwiseConv2d)):
            x = inputs[0]
            names.add(large_kernel_conv.implementation(x, layer.weight.to(x.dtype))[0])

    with nn.modules.module.register_module_forward_pre_hook(note):
        call()
    return '+'.join(sorted(names)) or 'nn.Conv2d'


# ---- Runtimes ----------------------------------------------------------------------------------------------


def runtime_call(c: Contestant, x: Tensor) -> Callable:
    """A function that runs the folded model, as ONNX, in ONNX Runtime or OpenVINO on c.threads threads."""
    proto = onnx_bytes(c._replace(contestant='onnxruntime', dtype='int8' if c.dtype == 'int8' else 'float32'))
    if c.contestant == 'onnxruntime':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = c.threads
        session = onnxruntime.InferenceSession(proto, options, providers=['CPUExecutionProvider'])
        return functools.partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
    import openvino
    core = openvino.Core()
    # unless told, it computes float32 models in bfloat16 where the CPU can
    settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': c.threads}
    if c.dtype != 'int8':  # around whose layers it chooses what is fastest
        settings['INFERENCE_PRECISION_HINT'] = {'float32': 'f32', 'bfloat16': 'bf16'}[c.dtype]
    request = core.compile_model(core.read_model(proto), 'CPU', settings).create_infer_request()
    return functools.partial(request.infer, [x.numpy()], share_inputs=True)


@functools.lru_cache(maxsize=1)
def onnx_bytes(c: Contestant) -> bytes:
    """The folded model as ONNX, for the contestant's one input shape."""
    x = torch.randn(c.batch, 3, c.input_size, c.input_size)
    return torch.onnx.export(build_model(c), (x,), dynamo=True, verbose=False).model_proto.SerializeToString()


# ---- Memory ------------------------------------------------------------------------------------------------


def peak_memory(c: Contestant) -> float | None:
    """MiB that `c` takes at most in a fresh process; None where the system does not tell.

    On a GPU its tensors, else all that is resident, libraries too.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            return pool.submit(run_for_memory, c).result()
        except process.BrokenProcessPool as error:
            raise UserError(f'the process that measured the memory of {c} was killed, probably for want of '
                            'memory: lower --batch or --train_batch') from error


def run_for_memory(c: Contestant) -> float | None:
    """The part of peak_memory that runs in the fresh process."""
    torch.set_num_threads(c.threads)
    common.timed(build(c)[0], 2)
    if c.device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
