"""A report of one GPU, written by one command in a given time: are results right, how fast are they?

gpu_sections.py says what is measured, gpu_markdown.py how it is shown.
"""
import argparse
import contextlib
import gc
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tools.benchmarks import common, gpu_markdown, gpu_sections
from tools.benchmarks.gpu_sections import Plan, Section
from tools.common import check_output
from utils import UserError, replace_file

HELP = 'a report of one GPU: checks, layers, models'
AGAIN = 2.0  # seconds between alarms, should a first one be swallowed
AROUND = 20.0  # seconds of the time that Python takes to start and to end


class OutOfTime(Exception):
    """The time of the report is over."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The time, and toys in the models' place."""
    parser.add_argument('--minutes', type=float, default=8, metavar='M',
                        help='that it takes at most, default 8: what does not fit is left out, and named')
    parser.add_argument('--small', action='store_true', help='toys only, on a CPU too')


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense; set where the report goes."""
    if args.dtype:
        raise UserError(f'--dtype {args.dtype}: the report has several, leave it out')
    if not args.minutes > 0:
        raise UserError(f'--minutes {args.minutes} must be more than 0')
    if args.device == 'cpu' and not args.small:
        raise UserError('the report is of a GPU, and this would run on the CPU: --small measures toys there')
    if args.device == 'cpu':
        args.threads = args.threads or 1  # toys gain nothing from more, which wait for each other
    args.json = args.json or Path('gpu_report.json')
    args.markdown = args.json.with_suffix('.md')
    if args.markdown == args.json:
        raise UserError(f'--json {args.json}: the tables are written there, name a file that ends in .json')
    for path in (args.json, args.markdown):
        check_output(path, '--json')


def run(args: argparse.Namespace) -> None:
    """Measure, printing each row, and write both files after each section.

    Raises UserError at the end where a check failed.
    """
    started = time.perf_counter()
    content = common.begin(args)
    content |= {'gpu': gpu_facts() if args.device == 'cuda' else None, 'sections': {}}
    plan, deadline, seconds = gpu_sections.plan_of(args), started, 60 * args.minutes - AROUND
    for section in gpu_sections.SECTIONS:
        deadline += seconds * section.share
        content['sections'][section.name] = run_section(section, plan, deadline, started + seconds)
        content['seconds'] = time.perf_counter() - started
        write(content, args)
    print(f'Wrote {args.json} and {args.markdown}')
    bad = gpu_markdown.failed_checks(content)
    if bad:
        raise UserError(f'{len(bad)} checks of the convolution failed: see {args.markdown}')


def gpu_facts() -> dict[str, object]:
    """Of the GPU in use and what drives it."""
    facts = torch.cuda.get_device_properties()
    return {'memory_gib': facts.total_memory / 2 ** 30, 'multiprocessors': facts.multi_processor_count,
            'capability': f'{facts.major}.{facts.minor}', 'driver': driver_version(),
            'cuda': torch.version.cuda or torch.version.hip, 'cudnn': torch.backends.cudnn.version()}


def driver_version() -> str:
    """Of NVIDIA's driver, which torch does not tell; 'unknown' where nvidia-smi does not either."""
    program = shutil.which('nvidia-smi')
    if program is None:
        return 'unknown'
    command = [program, '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return 'unknown'
    return said.strip().partition('\n')[0] or 'unknown'  # a line for each GPU


def write(content: dict, args: argparse.Namespace) -> None:
    """Both files, of what there is so far."""
    text = json.dumps(content, indent=1, default=str) + '\n'
    replace_file(args.json, lambda path: path.write_text(text))
    replace_file(args.markdown, lambda path: path.write_text(gpu_markdown.report(content)))


# ---- Within the time ---------------------------------------------------------------------------------------


def run_section(section: Section, plan: Plan, deadline: float, end: float) -> dict:
    """Its rows, and what of it was left out.

    Tasks begin until the deadline, and the last is stopped at the report's end; the time that a section
    leaves is the next one's.
    """
    print(f'\n{section.name}')
    start, rows, left_out = time.perf_counter(), [], []
    for label, measure in section.tasks(plan):
        if time.perf_counter() >= deadline:
            left_out.append(label)
            continue
        found = run_task(label, measure, end)
        tidy(plan.device)
        print(*map(text_of, found), sep='\n', flush=True)
        rows += found
    if left_out:
        print(f'left out for want of time: {len(left_out)}')
    return {'rows': rows, 'left_out': left_out, 'seconds': time.perf_counter() - start}


def run_task(label: dict, measure: Callable[[], list[dict]], end: float) -> list[dict]:
    """The task's rows; where it fails, one that says why."""
    start = time.perf_counter()
    try:
        with alarm(end - start):
            rows = measure()
    except Exception as error:  # no memory, a compiler's error, ...: the rest of the report goes on
        over = time.perf_counter() >= end  # whatever became of the alarm on its way through the compiler
        rows = [{'note': OutOfTime.__doc__ if over else gpu_sections.reason(error)}]
    return [{**label, **row, 'took_s': time.perf_counter() - start} for row in rows]


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body after so many seconds, where the system has such alarms."""
    if not hasattr(signal, 'setitimer'):  # Windows
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy(device: str) -> None:
    """Free what the last task had on a GPU."""
    if device == 'cuda':
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that failed: the next row says so
            torch.cuda.empty_cache()


def text_of(row: dict) -> str:
    """One printed line."""
    cells = (f'{value:.4g}' if isinstance(value, float) else str(value)
             for value in row.values() if value is not None)
    return '  ' + ' '.join(cells)
