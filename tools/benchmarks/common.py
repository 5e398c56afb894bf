"""What the benchmarks share: their options, the stopwatch, the machine's name, tables and JSON."""
import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import torch

from distributed import select_device
from tools.common import check_output
from utils import UserError, replace_file

TURN = 0.02  # seconds that a turn takes at least: a shorter one would time the clock and the interpreter
LAYOUTS = {'NCHW': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = ('float32', 'bfloat16', 'float16')

# ---- Options -----------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of all commands."""
    parser.add_argument('--threads', type=int, metavar='N', help="default: torch's")
    parser.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda'])
    parser.add_argument('--dtype', choices=DTYPES, help='conv: float32 by default; model: float32, and '
                        'bfloat16 where compiled, in training and in OpenVINO')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results there')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense, of every command; set --device to cpu or cuda."""
    for name in ('threads', 'kernels', 'resolutions', 'channels', 'batch', 'layers', 'input_size',
                 'train_batch'):
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise UserError(f'--{name} {number} must be at least 1')
    for name in ('json', 'plot'):
        if getattr(args, name, None) is not None:
            check_output(getattr(args, name), f'--{name}')
    if args.threads and args.threads > os.cpu_count():
        raise UserError(f'--threads {args.threads}: this machine has {os.cpu_count()} CPUs')
    args.device = select_device(args.device).type


# ---- The stopwatch -----------------------------------------------------------------------------------------


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

    A turn repeats the call until it fills about TURN seconds. A contestant has as many turns as fit into
    `seconds`, at least three, or one where a single call takes longer than `seconds`. One with few turns sits
    out rounds evenly, so that its turns spread over the whole time. Warm-up: one call that is thrown away,
    and one that sets these numbers.
    """
    for call in contestants.values():
        timed(call, 1)  # compiles, packs weights, picks algorithms
    single = {name: timed(call, 1) for name, call in contestants.items()}
    calls = {name: math.ceil(TURN / max(once, 1e-9)) for name, once in single.items()}
    turns = {name: 1 if once > seconds else max(3, int(seconds / (once * calls[name])))
             for name, once in single.items()}
    # a warm call that fills a turn by itself counts: so the slowest have two times, not one
    times = {name: [once] if calls[name] == 1 else [] for name, once in single.items()}
    rounds = max(turns.values())
    for i in range(rounds):
        for name, call in contestants.items():
            if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:
                times[name].append(timed(call, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


# ---- The report --------------------------------------------------------------------------------------------


def begin(args: argparse.Namespace, packages: Sequence[str] = ()) -> dict:
    """Set the threads; print and return what is measured where.

    packages: whose versions are told beside those of Python, torch and timm.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    torch.backends.cudnn.benchmark = True  # nn.Conv2d at its best
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None  # Windows counts none
    machine = {'name': machine_name(args.device), 'cpus': os.cpu_count(), 'load': load,
               'date': time.strftime('%Y-%m-%d %H:%M')}
    versions = {'python': platform.python_version(), 'torch': torch.__version__,
                **{name: importlib.metadata.version(name) for name in ('timm', *packages)}}
    if args.device == 'cuda':  # the names of its packages differ
        installed = importlib.util.find_spec('triton')
        versions['triton'] = importlib.import_module('triton').__version__ if installed else 'none'
    print(f'{machine["name"]}, {args.threads} threads of {machine["cpus"]} CPUs '
          f'(load {load and round(load, 1)}), {args.dtype or "several dtypes"}, '
          f'{", ".join(map(" ".join, versions.items()))}, {machine["date"]}')
    return {'machine': machine, 'versions': versions, 'arguments': vars(args)}


def machine_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.exists() else ''
    found = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def report(content: dict, columns: dict[str, int], groups: Iterable[list[dict]],
           path: Path | None) -> list[dict]:
    """Print a table of the groups' rows as they come, and write them with `content` to `path`; return them.

    columns: the width of each.
    """
    content = {**content, 'results': []}
    print(text_line(columns, {name: name for name in columns}))
    for rows in groups:
        print(*(text_line(columns, row) for row in rows), sep='\n', flush=True)
        content['results'] += rows
        if path:  # after each group: a run that is stopped keeps what it has
            text = json.dumps(content, indent=1, default=str) + '\n'
            replace_file(path, lambda temporary, text=text: temporary.write_text(text))
    return content['results']


def text_line(columns: dict[str, int], row: dict) -> str:
    """One line of a printed table."""
    cells = [f'{row[name]:.3f}' if isinstance(row[name], float)
             else str('-' if row[name] is None else row[name]) for name in columns]
    return ' '.join(f'{cell:>{width}}' for cell, width in zip(cells, columns.values(), strict=True))
