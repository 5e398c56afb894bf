"""Time depthwise layers, and whole models, against what one would use otherwise.

python tools/benchmark.py conv     the paper's Table 1: nn.Conv2d and large_kernel_conv, in both memory formats
python tools/benchmark.py model    parameters, GMACs, images/s in inference and of a training step, its memory

The contestants of a comparison take turns in one process, so that what else the machine does falls on all of them; a time
is the median over a contestant's turns. Compare within a run, and on a machine with nothing else to do.
"""
import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, process
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import large_kernel_conv
import replknet_zoo

CONV_SECONDS, MODEL_SECONDS = 1.0, 5.0  # measuring time for each contestant
TURN = 0.02  # seconds that a turn takes at least: a shorter one would time the clock and the interpreter
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}
TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2, 'float16': 3e-2}  # largest difference, of the largest value
STAGES = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))  # RepLKNet-31B at 224 px: channels, side, kernel
KERNELS, RESOLUTIONS = [3, 5, 7, 9, 13, 17, 21, 27, 29, 31], [16, 32, 64]  # paper, Table 1
RUNTIMES = {'onnxruntime': ('onnxruntime', 'onnx', 'onnxscript'), 'openvino': ('openvino', 'onnx', 'onnxscript')}
TIMM_PEERS = ('convnext_base', 'swin_base_patch4_window7_224')
COLUMNS = {  # of the printed tables, with their widths
    'conv': {'shape': 15, 'kernel': 6, 'pass': 16, 'dtype': 8, 'layout': 13, 'threads': 7, 'contestant': 10,
             'implementation': 16, 'ms': 10, 'ratio': 8, 'best_ratio': 10},
    'model': {'model': 28, 'mode': 9, 'shape': 14, 'dtype': 8, 'layout': 13, 'threads': 7, 'contestant': 13,
              'implementation': 16, 'ms': 10, 'images_per_s': 12, 'memory_mib': 10, 'ratio': 8},
}
# one model and one way to run it: plain values, so that another process can be given them
Contestant = namedtuple('Contestant', 'model contestant layout dtype mode batch input_size device threads')


class UserError(ValueError):
    """Something that the user can mend: shown without a traceback."""


def timed(call: Callable, calls: int) -> float:
    """Seconds per call of `calls` calls in a row, with the work that they leave on a GPU."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def measure(contestants: dict[Hashable, Callable], seconds: float) -> dict[Hashable, float]:
    """Median seconds per call of each contestant, measured in turns.

    A turn repeats the call until it fills about TURN seconds. A contestant has as many turns as fit into `seconds`, at
    least three, or one where a single call takes longer than `seconds`. One with few turns sits out rounds evenly, so that
    its turns spread over the whole time. Warm-up: one call that is thrown away, and one that sets these numbers.
    """
    for call in contestants.values():
        timed(call, 1)  # compiles, packs weights, picks algorithms
    single = {name: timed(call, 1) for name, call in contestants.items()}
    calls = {name: math.ceil(TURN / max(once, 1e-9)) for name, once in single.items()}
    turns = {name: 1 if once > seconds else max(3, int(seconds / (once * calls[name]))) for name, once in single.items()}
    # a warm call that fills a turn by itself counts: so the slowest have two times, not one
    times = {name: [once] if calls[name] == 1 else [] for name, once in single.items()}
    rounds = max(turns.values())
    for i in range(rounds):
        for name, call in contestants.items():
            if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:
                times[name].append(timed(call, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def conv_groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """The four contestants' results for each layer: forward, then forward and backward."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as on the paper's GPU; else outputs would not agree
    layers = STAGES if args.stages else [(args.channels, side, kernel) for side in args.resolutions for kernel in args.kernels]
    for layer, backward in itertools.product(layers, (False, True)):
        yield conv_group(args, *layer, backward)


def conv_group(args: argparse.Namespace, channels: int, side: int, kernel: int, backward: bool) -> list[dict]:
    """Results of nn.Conv2d and of large_kernel_conv on one layer, each in both memory formats.

    `ratio` is the better nn.Conv2d's time over this contestant's, `best_ratio` over that of the better one of ours.
    """
    options = {'device': args.device, 'dtype': getattr(torch, args.dtype)}
    shape, rows, calls = (args.batch, channels, side, side), {}, {}
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)  # the same values in both
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False, **options)
        layer = layer.to(memory_format=memory_format).requires_grad_(backward)
        x, grad = (torch.randn(shape, **options).to(memory_format=memory_format) for _ in range(2))
        x.requires_grad_(backward)
        ours = functools.partial(large_kernel_conv.depthwise_conv2d, weight=layer.weight)
        for contestant, function in (('nn.Conv2d', layer.forward), ('ours', ours)):  # neither through Module.__call__
            name = large_kernel_conv.implementation(x, layer.weight)[0] if contestant == 'ours' else contestant
            rows[f'{contestant} {layout}'] = {
                'shape': 'x'.join(map(str, shape)), 'batch': args.batch, 'channels': channels, 'resolution': side,
                'kernel': kernel, 'layers': args.layers, 'pass': 'forward+backward' if backward else 'forward',
                'dtype': args.dtype, 'layout': layout, 'threads': args.threads, 'contestant': contestant,
                'implementation': name}
            calls[f'{contestant} {layout}'] = functools.partial(run_layer, function, x, layer.weight, grad, backward)
    check_agreement(calls, args.dtype, f'shape {shape}, K {kernel}')
    seconds = measure({name: functools.partial(repeat, call, args.layers) for name, call in calls.items()}, CONV_SECONDS)
    theirs, best = (min(seconds[f'{contestant} {layout}'] for layout in LAYOUTS) for contestant in ('nn.Conv2d', 'ours'))
    return [{**row, 'ms': 1e3 * seconds[name], 'ratio': theirs / seconds[name], 'best_ratio': theirs / best}
            for name, row in rows.items()]


def run_layer(function: Callable, x: Tensor, weight: Tensor, grad: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """The output; with `backward` also the gradients of x and of weight, `grad` being that of the output."""
    with torch.inference_mode(not backward):
        out = function(x)
    return out.detach(), *(torch.autograd.grad(out, (x, weight), grad) if backward else ())


def repeat(call: Callable, times: int) -> None:
    """As many layers in a row, of one input."""
    for _ in range(times):
        call()


def check_agreement(calls: dict[str, Callable], dtype: str, where: str) -> None:
    """Raise UserError where the output or a gradient differs from that of the first contestant."""
    (first, reference), *others = calls.items()
    expected = reference()
    for name, call in others:
        for what, value, wanted in zip(('output', 'input gradient', 'weight gradient'), call(), expected, strict=False):
            difference = ((value.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
            if not difference <= TOLERANCE[dtype]:  # nan too
                raise UserError(f'{where}: {name} and {first} do not agree: the {what} differs by {difference:.1e} of its '
                                f'largest value, {TOLERANCE[dtype]:.0e} is allowed in {dtype}; mend that before timing it')


def plot_table(rows: list[dict], title: str, path: Path) -> None:
    """Draw Table 1: a panel for each resolution, milliseconds over kernel sizes, forward+backward dashed."""
    from matplotlib.figure import Figure
    sides = list(dict.fromkeys(row['resolution'] for row in rows))
    figure = Figure(figsize=(max(11, 4 * len(sides)), 5), layout='constrained')
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    lines = dict.fromkeys((row['pass'], row['contestant'], row['layout']) for row in rows)
    for panel, side in zip(panels, sides, strict=True):
        for i, line in enumerate(lines):
            points = sorted((row['kernel'], row['ms']) for row in rows
                            if row['resolution'] == side and (row['pass'], row['contestant'], row['layout']) == line)
            panel.plot(*zip(*points, strict=True), '-' if line[0] == 'forward' else '--', color=f'C{i % 4}', marker='.',
                       label=f'{line[1]} {line[2]}, {line[0]}')
        panel.set(yscale='log', title=f'{side} x {side}', xlabel='kernel size')
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('ms')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize='small')
    figure.suptitle(title, fontsize='medium')
    figure.savefig(path, dpi=120, format='png')


def model_groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """The results of all contestants, for each model, mode and batch."""
    modes = [(mode, batch) for mode in args.mode for batch in (args.batch if mode == 'inference' else [args.train_batch])]
    groups = [contestants_of(args, model, mode, batch) for model in args.models for mode, batch in modes]
    # before any timing: on Linux a process's peak starts at its parent's size, which is still small
    memory = {c: peak_memory(c) for group in groups for c in group
              if (args.memory or (c.mode, c.contestant) == ('training', 'ours eager')) and c.contestant not in RUNTIMES}
    for group in groups:
        torch._dynamo.reset()  # else a second batch size would be compiled for any size, which is slower
        calls, names = {}, {}
        for c in group:
            calls[c], names[c] = build(c)
        seconds = measure(calls, MODEL_SECONDS)
        base = min((seconds[c] for c in group if c.contestant == 'published'), default=seconds[group[0]])
        yield [{**c._asdict(), 'shape': f'{c.batch}x3x{c.input_size}x{c.input_size}', 'implementation': names[c],
                'ms': 1e3 * seconds[c], 'images_per_s': c.batch / seconds[c], 'memory_mib': memory.get(c),
                'ratio': base / seconds[c]} for c in group]


def model_sizes(args: argparse.Namespace) -> list[dict]:
    """Parameters (millions) and GMACs of the models in the registry, as trained and merged."""
    found = []
    for name in filter(replknet_zoo.MODELS.__contains__, args.models):
        side = args.input_size or replknet_zoo.MODELS[name].input_size
        row = {'model': name, 'input_size': side}
        for form, merged in (('', False), ('_merged', True)):
            # nn.Conv2d, for an external implementation knows no meta device
            with torch.device('meta'), mock.patch.dict(os.environ, {'LARGE_KERNEL_CONV_IMPL': 'pytorch'}):
                model = replknet_zoo.create_model(name, small_kernel_merged=merged, use_sync_bn=False).eval()
            row[f'parameters{form}'] = sum(p.numel() for p in model.parameters()) / 1e6
            row[f'gmacs{form}'] = gmacs(model, side)
        found.append(row)
    return found


def gmacs(model: nn.Module, side: int) -> float:
    """Multiply-adds / 1e9 of convolutions and linear layers for one image (3, side, side); the model is on the meta device."""
    counts = []

    def count(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            counts.append(layer.weight.numel() * output.numel() // len(layer.weight))  # each weight once a position

    with nn.modules.module.register_module_forward_hook(count), torch.inference_mode():
        model(torch.empty(1, 3, side, side, device='meta'))
    return sum(counts) / 1e9


def contestants_of(args: argparse.Namespace, model: str, mode: str, batch: int) -> list[Contestant]:
    """All ways to run `model`, and with --peers those of the peers. float16 is not compiled or given to a runtime."""
    dtypes = [args.dtype] if args.dtype else ['float32', 'bfloat16']
    found = []
    for name in dict.fromkeys([model, *(TIMM_PEERS if args.peers else ())]):
        known = name in replknet_zoo.MODELS
        size = (args.input_size if name == model else None) or (replknet_zoo.MODELS[name].input_size if known else 224)
        eager = [('published', 'NCHW'), ('published', 'channels_last'), ('ours eager', 'channels_last')]
        eager = eager if known else [('timm eager', 'channels_last')]
        ways = [(*way, dtype) for dtype in (dtypes if mode == 'training' else dtypes[:1]) for way in eager]
        for dtype in dtypes if mode == 'inference' else ():
            if dtype != 'float16':
                ways.append(('ours compiled' if known else 'timm compiled', 'channels_last', dtype))
                ways += [(runtime, 'NCHW', dtype) for runtime in args.runtimes
                         if known and (runtime, dtype) != ('onnxruntime', 'bfloat16')]
        found += [Contestant(name, *way, mode, batch, size, args.device, args.threads) for way in ways]
    return found


def build(c: Contestant) -> tuple[Callable, str | None]:
    """A function that runs `c` once, and the name of its depthwise implementation where that can be told."""
    torch.manual_seed(0)
    x = torch.randn(c.batch, 3, c.input_size, c.input_size)
    if c.contestant in RUNTIMES:
        return runtime_call(c, x), None
    to = {'device': c.device, 'memory_format': LAYOUTS[c.layout]}
    x, model, dtype = x.to(**to), build_model(c).to(**to), getattr(torch, c.dtype)
    labels = torch.zeros(c.batch, dtype=torch.long, device=c.device)
    run, half = model, dtype != torch.float32
    if c.contestant == 'ours compiled':
        run, half = replknet_zoo.compile_for_inference(model, dtype), False  # sees to the dtype itself
    elif c.contestant == 'timm compiled':
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
    return call, implementations(call) if c.contestant.startswith('ours') else {'published': 'nn.Conv2d'}.get(c.contestant)


def build_model(c: Contestant) -> nn.Module:
    """The model with random weights, in training or evaluation; for inference merged and folded, unless as published."""
    if c.model not in replknet_zoo.MODELS:
        return timm.create_model(c.model).train(c.mode == 'training')
    # the variable is read where a layer is built: in create_model, and again where kernels are merged
    plain = c.contestant == 'published' or c.contestant in RUNTIMES
    with mock.patch.dict(os.environ, {'LARGE_KERNEL_CONV_IMPL': 'pytorch'} if plain else {}):
        torch.manual_seed(0)  # the same weights for all
        model = replknet_zoo.create_model(c.model, use_sync_bn=False).train(c.mode == 'training')
        if c.mode == 'inference' and c.contestant != 'published':
            model.structural_reparam()
            model.deep_fuse_BN()
    return model


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


def runtime_call(c: Contestant, x: Tensor) -> Callable:
    """A function that runs the folded model, as ONNX, in ONNX Runtime or OpenVINO on c.threads threads."""
    proto = onnx_bytes(c._replace(contestant='onnxruntime', dtype='float32'))
    if c.contestant == 'onnxruntime':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = c.threads
        session = onnxruntime.InferenceSession(proto, options, providers=['CPUExecutionProvider'])
        return functools.partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
    import openvino
    core = openvino.Core()
    # unless told, it computes float32 models in bfloat16 where the CPU can
    precision = {'float32': 'f32', 'bfloat16': 'bf16'}[c.dtype]
    settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': c.threads, 'INFERENCE_PRECISION_HINT': precision}
    request = core.compile_model(core.read_model(proto), 'CPU', settings).create_infer_request()
    return functools.partial(request.infer, [x.numpy()], share_inputs=True)


@functools.lru_cache(maxsize=1)
def onnx_bytes(c: Contestant) -> bytes:
    """The folded model as ONNX, for the contestant's one input shape."""
    x = torch.randn(c.batch, 3, c.input_size, c.input_size)
    return torch.onnx.export(build_model(c), (x,), dynamo=True, verbose=False).model_proto.SerializeToString()


def peak_memory(c: Contestant) -> float | None:
    """MiB that `c` takes at most in a fresh process: its tensors on a GPU, else all that is resident, libraries too (None where
    the system does not tell)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            return pool.submit(run_for_memory, c).result()
        except process.BrokenProcessPool as error:
            raise UserError(f'the process that measured the memory of {c} was killed, probably for want of memory: '
                            'lower --batch or --train_batch') from error


def run_for_memory(c: Contestant) -> float | None:
    """The part of peak_memory that runs in the fresh process."""
    torch.set_num_threads(c.threads)
    timed(build(c)[0], 2)
    if c.device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def get_args_parser() -> argparse.ArgumentParser:
    """The two commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--threads', type=int, metavar='N', help="default: torch's")
    common.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda'])
    common.add_argument('--dtype', choices=list(TOLERANCE), help='conv: float32 by default; model: float32, and bfloat16 where '
                        'compiled, in training and in OpenVINO')
    common.add_argument('--json', type=Path, metavar='FILE', help='write the results there')
    parser = argparse.ArgumentParser('benchmark.py', description='Time depthwise layers and whole models')
    commands = parser.add_subparsers(dest='command', required=True)
    conv = commands.add_parser('conv', parents=[common], help="depthwise layers: the paper's Table 1")
    conv.add_argument('--kernels', type=int, nargs='+', metavar='K', default=KERNELS)
    conv.add_argument('--resolutions', type=int, nargs='+', metavar='R', default=RESOLUTIONS)
    conv.add_argument('--channels', type=int, default=384)
    conv.add_argument('--batch', type=int, help="default: the paper's 64 on a GPU, 4 on a CPU")
    conv.add_argument('--layers', type=int, help="that a time is for, in a row; default: the paper's 24 on a GPU, 1 on a CPU")
    conv.add_argument('--stages', action='store_true', help='the four stages of RepLKNet-31B at 224 px, instead of the grid')
    conv.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the table')
    model = commands.add_parser('model', parents=[common], help='whole models with random weights')
    model.add_argument('--models', nargs='+', default=['RepLKNet-31B'], metavar='NAME', help="of replknet_zoo.MODELS, or timm's")
    model.add_argument('--input_size', type=int, help="pixels a side; default: the registry's, 224 for timm's")
    model.add_argument('--mode', nargs='+', default=['inference', 'training'], choices=['inference', 'training'])
    model.add_argument('--batch', type=int, nargs='+', default=[1, 16], help='in inference; default: 1 16')
    model.add_argument('--train_batch', type=int, default=8, help='default: 8')
    model.add_argument('--memory', action='store_true', help='peak memory of all contestants, each in a process of its own; '
                       'default: of our training step')
    model.add_argument('--peers', action='store_true', help=f'compare with {", ".join([*RUNTIMES, *TIMM_PEERS])} too')
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, before anything is measured; set what depends on the machine."""
    for name in ('threads', 'kernels', 'resolutions', 'channels', 'batch', 'layers', 'input_size', 'train_batch'):
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise UserError(f'--{name} {number} must be at least 1')
    for name in ('json', 'plot'):
        path = getattr(args, name, None)
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f'--{name} {path}: there is no folder {path.parent}, make it first')
        if path is not None and path.exists() and not path.is_file():
            raise UserError(f'--{name} {path} is a folder or a device: name a file')
    if args.threads and args.threads > os.cpu_count():
        raise UserError(f'--threads {args.threads}: this machine has {os.cpu_count()} CPUs')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda was asked for, but this machine has no usable CUDA GPU (torch.cuda.is_available() is '
                        'False): pass --device cpu or --device auto')
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    (check_conv_options if args.command == 'conv' else check_model_options)(args)


def check_conv_options(args: argparse.Namespace) -> None:
    """check_options for the layers."""
    if args.stages and args.plot:
        raise UserError('--plot draws the grid, which --stages replaces: leave out one of them')
    for kernel in args.kernels:
        if kernel % 2 == 0:
            raise UserError(f'--kernels {kernel} is even, and same padding needs odd ones: pass {kernel - 1} or {kernel + 1}')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError("--plot needs matplotlib, which is not installed: pip install -e '.[plot]'")
    args.batch, args.dtype = args.batch or (64 if args.device == 'cuda' else 4), args.dtype or 'float32'
    args.layers = args.layers or (24 if args.device == 'cuda' else 1)


def check_model_options(args: argparse.Namespace) -> None:
    """check_options for the models; sets args.runtimes to those that take part."""
    for name in set(args.models) - set(replknet_zoo.MODELS):
        if not timm.is_model(name):
            raise UserError(f'unknown --models {name}: choose from {", ".join(replknet_zoo.MODELS)}, or from timm.list_models()')
        config, size = timm.get_pretrained_cfg(name), args.input_size or 224
        if config is not None and config.fixed_input_size and config.input_size[-1] != size:
            raise UserError(f'{name} takes {config.input_size[-1]} px, not {size}: pass --input_size {config.input_size[-1]}')
    args.runtimes = []
    for name, packages in RUNTIMES.items() if args.peers else ():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing or args.device == 'cuda':
            print(f'{name} is left out: ' + (f'{", ".join(missing)} not installed' if missing else 'measured on CPUs only'))
        else:
            args.runtimes.append(name)


def machine_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*:\s*(.+)$', info.read_text() if info.exists() else '', re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def text_line(columns: dict[str, int], row: dict) -> str:
    """One line of a printed table."""
    cells = [f'{row[name]:.3f}' if isinstance(row[name], float) else str('-' if row[name] is None else row[name])
             for name in columns]
    return ' '.join(f'{cell:>{width}}' for cell, width in zip(cells, columns.values(), strict=True))


def main(args: argparse.Namespace) -> None:
    """Measure, print and write what the options ask for. Raises UserError for what a user can mend."""
    check_options(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    torch.backends.cudnn.benchmark = True  # nn.Conv2d at its best
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None  # Windows counts none
    machine = {'name': machine_name(args.device), 'cpus': os.cpu_count(), 'load': load, 'date': time.strftime('%Y-%m-%d %H:%M')}
    packages = ('timm', *getattr(args, 'runtimes', ()))
    versions = {'python': platform.python_version(), 'torch': torch.__version__,
                **{name: importlib.metadata.version(name) for name in packages}}
    if args.device == 'cuda':  # the names of its packages differ
        versions['triton'] = importlib.import_module('triton').__version__ if importlib.util.find_spec('triton') else 'none'
    content = {'machine': machine, 'versions': versions, 'arguments': vars(args), 'results': []}
    print(f'{machine["name"]}, {args.threads} threads of {machine["cpus"]} CPUs (load {load and round(load, 1)}), '
          f'{args.dtype or "float32 and bfloat16"}, {", ".join(map(" ".join, versions.items()))}, {machine["date"]}')
    if args.command == 'conv':
        if args.batch != 64:
            print(f'batch {args.batch}: scaled to the machine, the paper has 64')
        if args.layers != 24:
            print(f'a time is for {args.layers} layer{"s" * (args.layers > 1)}, in the paper for 24')
        print('ratio: time of the better nn.Conv2d over this one; best_ratio: over the better one of ours')
    else:
        content['sizes'] = model_sizes(args)
        for row in content['sizes']:
            print('{model} at {input_size} px: {parameters:.3f} M parameters, {gmacs:.3f} GMACs; merged '
                  '{parameters_merged:.3f} M, {gmacs_merged:.3f} GMACs'.format_map(row))
        print("ratio: time of the best published one over this one; where there is none, of the first line")
        print('memory_mib: the peak of ' + ('its tensors' if args.device == 'cuda' else 'all that is resident, libraries too'))
    columns, results = COLUMNS[args.command], content['results']
    print(text_line(columns, {name: name for name in columns}))
    for rows in conv_groups(args) if args.command == 'conv' else model_groups(args):
        print(*(text_line(columns, row) for row in rows), sep='\n', flush=True)
        results += rows
        if args.json:  # after each group: a run that is stopped keeps what it has
            partial = args.json.with_name(f'.{args.json.name}.partial')
            partial.write_text(json.dumps(content, indent=1, default=str) + '\n')
            os.replace(partial, args.json)
    if args.command == 'conv' and args.plot:
        plot_table(results, f'{machine["name"]}, {args.threads} threads, batch {args.batch}, {args.layers} layers, {args.dtype}',
                   args.plot)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except (UserError, ImportError) as error:
        sys.exit(f'ERROR: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
