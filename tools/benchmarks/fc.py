"""RepMLPNet's FCs over pixels, stage by stage: the grouped convolution that was published, and ours."""
import argparse
from collections.abc import Callable, Iterator

import torch
from torch import nn

import replknet_zoo
from tools.benchmarks import common
from utils import UserError

HELP = "RepMLPNet's FCs, stage by stage"
SECONDS = 2.0  # measuring time for each contestant
COLUMNS = {'model': 16, 'stage': 6, 'shape': 20, 'dtype': 8, 'contestant': 10, 'ms': 9, 'ratio': 7}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The models and batches."""
    parser.add_argument('--models', nargs='+', default=['RepMLPNet-T224'], metavar='NAME')
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8], help='default: 1 8')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for models without such FCs; set the data type's default."""
    args.dtype = args.dtype or 'float32'
    for name in args.models:
        if name not in replknet_zoo.MODELS or not fcs_of(name):
            raise UserError(f'--models {name}: choose from those of RepMLPNet in replknet_zoo.MODELS')


def fcs_of(name: str) -> list[tuple[int, nn.Conv2d]]:
    """(channels, FCs) of the first block of each stage, on the meta device."""
    with torch.device('meta'):
        model = replknet_zoo.create_model(name)
    found = [[module for module in stage.modules() if hasattr(module, 'fc3')] for stage in model.stages]
    return [(blocks[0].C, blocks[0].fc3) for blocks in found if blocks]


def run(args: argparse.Namespace) -> None:
    """Print and write the table."""
    content = common.begin(args)
    print('ratio: time of nn.Conv2d over this one')
    common.report(content, COLUMNS, groups(args), args.json)


def groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Both contestants, for each model, batch and stage."""
    for name in args.models:
        for batch in args.batch:
            for stage, (channels, fc3) in enumerate(fcs_of(name), 1):
                calls, shape = contestants(fc3, batch * channels // fc3.groups, args)
                seconds = common.measure(calls, SECONDS)
                yield [{'model': name, 'stage': stage, 'shape': f'{shape[0]}x{fc3.groups}x{shape[1]}',
                        'dtype': args.dtype, 'contestant': kind, 'ms': 1e3 * seconds[kind],
                        'ratio': seconds['nn.Conv2d'] / seconds[kind]} for kind in calls]


def contestants(fc3: nn.Conv2d, rows: int,
                args: argparse.Namespace) -> tuple[dict[str, Callable], tuple[int, int]]:
    """The calls by name, and (rows, pixels) of what goes through each of the FCs."""
    to, width = {'device': args.device, 'dtype': getattr(torch, args.dtype)}, fc3.in_channels
    x, calls = torch.randn(rows, width, 1, 1).to(**to), {}
    for kind, layer in (('nn.Conv2d', nn.Conv2d), ('ours', type(fc3))):
        torch.manual_seed(0)
        calls[kind] = _without_gradients(layer(width, width, 1, groups=fc3.groups).to(**to), x)
    return calls, (rows, width // fc3.groups)


def _without_gradients(layer: nn.Conv2d, x: torch.Tensor) -> Callable:
    def call() -> None:
        with torch.inference_mode():
            layer(x)
    return call
