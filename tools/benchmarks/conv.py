"""The paper's Table 1: depthwise layers in nn.Conv2d and in large_kernel_conv, in both memory formats."""
import argparse
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import large_kernel_conv
from tools.benchmarks import common
from tools.benchmarks.common import LAYOUTS
from utils import UserError

HELP = "depthwise layers: the paper's Table 1, and those of other networks"
SECONDS = 1.0  # measuring time for each contestant
TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2, 'float16': 3e-2}  # largest difference, of the largest value
Pair = int | tuple[int, int]
# RepLKNet-31B at 224 px: channels, side, kernel
STAGES = ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13))
# of other networks: batch, channels, side or (height, width), kernel, dilation; sequences are maps of one row
GEOMETRY = (
    (2, 64, 56, 7, 3),  # VAN, LSKNet
    (2, 320, 14, 7, 2), (2, 320, 14, 3, 5),  # UniRepLKNet
    (2, 96, 56, (51, 5), 1), (2, 192, 28, (49, 5), 1),  # SLaK
    (2, 64, 64, (1, 21), 1), (2, 64, 64, (21, 1), 1),  # SegNeXt
    (1, 64, 128, (1, 19), 1), (1, 64, 128, (19, 1), 1),  # StripNet
    (2, 32, 56, (1, 11), 1), (2, 32, 56, (11, 1), 1),  # InceptionNeXt
    (4, 256, (1, 512), (1, 31), 1), (8, 448, (1, 84), (1, 51), 1))  # Conformer, ModernTCN
KERNELS, RESOLUTIONS = [3, 5, 7, 9, 13, 17, 21, 27, 29, 31], [16, 32, 64]  # paper, Table 1
COLUMNS = {  # of the printed table, with their widths
    'shape': 15, 'kernel': 6, 'dilation': 8, 'pass': 16, 'dtype': 8, 'layout': 13, 'threads': 7,
    'contestant': 10, 'implementation': 16, 'ms': 10, 'ratio': 8, 'best_ratio': 10,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The grid of layers, or the stages of a model."""
    parser.add_argument('--kernels', type=int, nargs='+', metavar='K', default=KERNELS)
    parser.add_argument('--resolutions', type=int, nargs='+', metavar='R', default=RESOLUTIONS)
    parser.add_argument('--channels', type=int, default=384)
    parser.add_argument('--batch', type=int, help="default: the paper's 64 on a GPU, 4 on a CPU")
    parser.add_argument('--layers', type=int, help="that a time is for, in a row; default: the paper's 24 on "
                        'a GPU, 1 on a CPU')
    parser.add_argument('--stages', action='store_true',
                        help='the four stages of RepLKNet-31B at 224 px, instead of the grid')
    parser.add_argument('--geometry', action='store_true', help='layers of other networks instead, dilated, '
                        'rectangles, strips and sequences, each at its own batch')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw the table')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense; set what depends on the device."""
    instead = [name for name in ('stages', 'geometry') if getattr(args, name)]
    if len(instead) + bool(args.plot) > 1:
        raise UserError('--plot draws the grid, which --stages and --geometry replace: leave out all but one')
    for kernel in args.kernels:
        if kernel % 2 == 0:
            raise UserError(f'--kernels {kernel} is even, and same padding needs odd ones: pass {kernel - 1} '
                            f'or {kernel + 1}')
    if args.plot and importlib.util.find_spec('matplotlib') is None:
        raise UserError("--plot needs matplotlib, which is not installed: pip install -e '.[plot]'")
    args.batch = args.batch or (64 if args.device == 'cuda' else 4)
    args.layers = args.layers or (24 if args.device == 'cuda' else 1)
    args.dtype = args.dtype or 'float32'


def run(args: argparse.Namespace) -> None:
    """Print, write and draw the table."""
    content = common.begin(args)
    if args.batch != 64 and not args.geometry:
        print(f'batch {args.batch}: scaled to the machine, the paper has 64')
    if args.layers != 24:
        print(f'a time is for {args.layers} layer{"s" * (args.layers > 1)}, in the paper for 24')
    print('ratio: time of the better nn.Conv2d over this one; best_ratio: over the better one of ours')
    results = common.report(content, COLUMNS, groups(args), args.json)
    if args.plot:
        plot_table(results, f'{content["machine"]["name"]}, {args.threads} threads, batch {args.batch}, '
                   f'{args.layers} layers, {args.dtype}', args.plot)


def groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """The four contestants' results for each layer: forward, then forward and backward."""
    # float32 means float32, as on the paper's GPU; else outputs would not agree
    torch.backends.cudnn.allow_tf32 = False
    grid = itertools.product(args.resolutions, args.kernels)
    layers = STAGES if args.stages else [(args.channels, side, kernel) for side, kernel in grid]
    for layer, backward in itertools.product(GEOMETRY if args.geometry else layers, (False, True)):
        if args.geometry:
            batch, channels, side, kernel, dilation = layer
            yield compare_layer(args, channels, side, kernel, backward, SECONDS, dilation, batch)
        else:
            yield compare_layer(args, *layer, backward, SECONDS)


def compare_layer(args: argparse.Namespace, channels: int, side: Pair, kernel: Pair, backward: bool,
                  seconds: float, dilation: int = 1, batch: int | None = None) -> list[dict]:
    """Results of nn.Conv2d and of large_kernel_conv on one layer, each in both memory formats.

    Reads device, dtype, batch, layers and threads of args; each is measured for about `seconds`. side and
    kernel: a pair where they are no squares. batch: in place of args.batch. `ratio` is the better nn.Conv2d's
    time over this contestant's, `best_ratio` over that of the better one of ours.
    """
    options = {'device': args.device, 'dtype': getattr(torch, args.dtype)}
    sides, kernels = (value if isinstance(value, tuple) else (value, value) for value in (side, kernel))
    shape, rows, calls = (batch or args.batch, channels, *sides), {}, {}
    padding = tuple(k // 2 * dilation for k in kernels)
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)  # the same values in both
        layer = nn.Conv2d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels,
                          bias=False, **options)
        layer = layer.to(memory_format=memory_format).requires_grad_(backward)
        x, grad = (torch.randn(shape, **options).to(memory_format=memory_format) for _ in range(2))
        x.requires_grad_(backward)
        ours = functools.partial(large_kernel_conv.depthwise_conv2d, weight=layer.weight, padding=padding,
                                 dilation=dilation)
        # neither through Module.__call__
        for contestant, function in (('nn.Conv2d', layer.forward), ('ours', ours)):
            name = contestant
            if contestant == 'ours':
                name, _ = large_kernel_conv.implementation(x, layer.weight, padding, dilation)
            rows[f'{contestant} {layout}'] = {
                'shape': 'x'.join(map(str, shape)), 'batch': shape[0], 'channels': channels,
                'resolution': side, 'dilation': dilation, 'layers': args.layers,
                'kernel': kernel if isinstance(kernel, int) else 'x'.join(map(str, kernel)),
                'pass': 'forward+backward' if backward else 'forward', 'dtype': args.dtype, 'layout': layout,
                'threads': args.threads, 'contestant': contestant, 'implementation': name}
            calls[f'{contestant} {layout}'] = functools.partial(run_layer, function, x, layer.weight, grad,
                                                                backward)
    where = f'shape {shape}, K {kernel}' + f', dilation {dilation}' * (dilation > 1)
    check_agreement(calls, args.dtype, where)
    repeated = {name: functools.partial(repeat, call, args.layers) for name, call in calls.items()}
    times = common.measure(repeated, seconds)
    theirs, best = (min(times[f'{contestant} {layout}'] for layout in LAYOUTS)
                    for contestant in ('nn.Conv2d', 'ours'))
    return [{**row, 'ms': 1e3 * times[name], 'ratio': theirs / times[name], 'best_ratio': theirs / best}
            for name, row in rows.items()]


def run_layer(function: Callable, x: Tensor, weight: Tensor, grad: Tensor,
              backward: bool) -> tuple[Tensor, ...]:
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
    outputs = ('output', 'input gradient', 'weight gradient')
    for name, call in others:
        for what, value, wanted in zip(outputs, call(), expected, strict=False):
            wanted = wanted.float()
            difference = ((value.float() - wanted).abs().max() / wanted.abs().max()).item()
            if not difference <= TOLERANCE[dtype]:  # nan too
                raise UserError(f'{where}: {name} and {first} do not agree: the {what} differs by '
                                f'{difference:.1e} of its largest value, {TOLERANCE[dtype]:.0e} is allowed '
                                f'in {dtype}; mend that before timing it')


def plot_table(rows: list[dict], title: str, path: Path) -> None:
    """Draw Table 1: a panel for each resolution, milliseconds over kernel sizes, forward+backward dashed."""
    from matplotlib.figure import Figure

    def line_of(row: dict) -> tuple[str, str, str]:
        return row['pass'], row['contestant'], row['layout']

    sides = list(dict.fromkeys(row['resolution'] for row in rows))
    figure = Figure(figsize=(max(11, 4 * len(sides)), 5), layout='constrained')
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for panel, side in zip(panels, sides, strict=True):
        for i, line in enumerate(dict.fromkeys(map(line_of, rows))):
            points = sorted((row['kernel'], row['ms']) for row in rows
                            if row['resolution'] == side and line_of(row) == line)
            style = '-' if line[0] == 'forward' else '--'
            panel.plot(*zip(*points, strict=True), style, color=f'C{i % 4}', marker='.',
                       label=f'{line[1]} {line[2]}, {line[0]}')
        panel.set(yscale='log', title=f'{side} x {side}', xlabel='kernel size')
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('ms')
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc='outside lower center', ncols=4, fontsize='small')
    figure.suptitle(title, fontsize='medium')
    figure.savefig(path, dpi=120, format='png')
