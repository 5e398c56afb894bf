"""Models that were built elsewhere, before and after large_kernel_conv.accelerate."""
import argparse
import copy
import functools
from collections.abc import Callable, Iterator

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from large_kernel_conv import accelerate
from large_kernel_conv.dilated_reparam import BRANCHES
from tools.benchmarks import common
from tools.benchmarks.common import LAYOUTS
from utils import UserError

HELP = 'models of others before and after large_kernel_conv.accelerate'
SECONDS = 3.0  # measuring time for each contestant
TOLERANCE = {'float32': 1e-4, 'bfloat16': 5e-2, 'float16': 1e-2}  # largest difference, of the largest logit
DILATED = 'dilated'  # the name of DilatedNet
COLUMNS = {  # of the printed table, with their widths
    'model': 22, 'replaced': 8, 'pass': 16, 'batch': 5, 'dtype': 8, 'layout': 13, 'threads': 7,
    'contestant': 10, 'ms': 10, 'images_per_s': 12, 'ratio': 8, 'best_ratio': 10,
}


class DilatedBlock(nn.Module):
    """A 13 x 13 depthwise nn.Conv2d beside UniRepLKNet's dilated ones, then two 1 x 1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, k, padding=k // 2 * step, dilation=step,
                                    groups=channels, bias=False), nn.BatchNorm2d(channels))
            for k, step in ((13, 1), *BRANCHES[13]))
        self.pointwise = nn.Sequential(nn.Conv2d(channels, 4 * channels, 1), nn.GELU(),
                                       nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return x + self.pointwise(y)


class DilatedNet(nn.Sequential):
    """A small network in the manner of UniRepLKNet, of torch's layers alone."""

    def __init__(self, channels: tuple[int, ...] = (40, 80, 160, 320),
                 blocks: tuple[int, ...] = (2, 2, 6, 2)):
        layers, before = [], 3
        for width, number in zip(channels, blocks, strict=True):
            stride = 4 if before == 3 else 2
            layers += [nn.Conv2d(before, width, stride, stride), nn.BatchNorm2d(width)]
            layers += [DilatedBlock(width) for _ in range(number)]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The models and how they are run."""
    parser.add_argument('--models', nargs='+', metavar='NAME', help=f"timm's, or {DILATED}",
                        default=['inception_next_atto', 'convnext_atto', 'convmixer_768_32', DILATED])
    parser.add_argument('--input_size', type=int, default=224, help='pixels a side; default: 224')
    parser.add_argument('--batch', type=int, default=2, help='in inference; default: 2')
    parser.add_argument('--train_batch', type=int, default=2, help='default: 2')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for models that cannot be had."""
    for name in args.models:
        if name != DILATED and not timm.is_model(name):
            raise UserError(f'unknown --models {name}: choose from timm.list_models(), or {DILATED}')
    args.dtype = args.dtype or 'float32'


def run(args: argparse.Namespace) -> None:
    """Print and write the table."""
    content = common.begin(args)
    print('ratio: time of the better model before over this one; best_ratio: over the better one after')
    common.report(content, COLUMNS, groups(args), args.json)


def groups(args: argparse.Namespace) -> Iterator[list[dict]]:
    """The four contestants' results for each model: inference, then a training step."""
    for name in args.models:
        torch.manual_seed(0)
        model = (DilatedNet() if name == DILATED else timm.create_model(name)).to(args.device)
        for trained in (False, True):
            yield compare(args, name, model.train(trained), args.train_batch if trained else args.batch)


def compare(args: argparse.Namespace, name: str, model: nn.Module, batch: int) -> list[dict]:
    """Results of a model, and of a copy that is accelerated, each in both memory formats."""
    size = batch, 3, args.input_size, args.input_size
    rows, calls = {}, {}
    for contestant in ('before', 'after'):
        for layout, memory_format in LAYOUTS.items():
            built = copy.deepcopy(model).to(memory_format=memory_format)
            replaced = len(accelerate(built, dry_run=contestant == 'before').replaced)
            torch.manual_seed(0)  # the same values in all
            x = torch.randn(size, device=args.device).to(memory_format=memory_format)
            step = train if model.training else infer
            rows[contestant, layout] = {
                'model': name, 'replaced': replaced,
                'pass': 'training step' if model.training else 'inference', 'batch': batch,
                'dtype': args.dtype, 'layout': layout, 'threads': args.threads, 'contestant': contestant}
            calls[contestant, layout] = functools.partial(step, built, x, args.dtype)
    if not model.training:  # BatchNorm of two images makes much of rounding, between the formats too
        check_agreement(name, calls, args.dtype)
    times = common.measure(calls, SECONDS)
    before, after = (min(times[contestant, layout] for layout in LAYOUTS)
                     for contestant in ('before', 'after'))
    return [{**row, 'ms': 1e3 * times[key], 'images_per_s': batch / times[key], 'ratio': before / times[key],
             'best_ratio': before / after} for key, row in rows.items()]


def autocast(x: Tensor, dtype: str) -> torch.autocast:
    """Autocast to dtype, none for float32."""
    return torch.autocast(x.device.type, getattr(torch, dtype), enabled=dtype != 'float32')


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor, dtype: str) -> Tensor:
    """The logits."""
    with autocast(x, dtype):
        return model(x)


def train(model: nn.Module, x: Tensor, dtype: str) -> None:
    """A forward and backward pass, which leaves gradients in the parameters."""
    model.zero_grad()
    with autocast(x, dtype):
        loss = F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device))
    loss.backward()


def check_agreement(name: str, calls: dict[tuple[str, str], Callable], dtype: str) -> None:
    """Raise UserError where logits differ from those of the first contestant."""
    (_, reference), *others = calls.items()
    expected = reference().float()
    for key, call in others:
        difference = ((call().float() - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE[dtype]:  # nan too
            raise UserError(f'{name} {" ".join(key)}: the logits differ by {difference:.1e} of the largest, '
                            f'{TOLERANCE[dtype]:.0e} is allowed in {dtype}; mend that before timing it')
