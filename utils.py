"""Processes, random seeds, meters and logs, schedules, training checkpoints."""
import collections
import datetime
import json
import math
import os
import random
import re
import resource
import statistics
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import replknet


class UserError(ValueError):
    """Something that the user can mend: main.py shows the message alone, without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def init_distributed(args: Namespace) -> None:
    """Set args.rank, world_size, local_rank and distributed from the launcher's variables, and join the process group.

    Knows torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK or --local_rank), srun with several tasks
    (SLURM_*), and Open MPI with --dist_on_itp. Anything else, and a world of one, is a single process without a group.
    NCCL on CUDA, gloo elsewhere.
    """
    env = os.environ
    args.rank, args.world_size, local_rank = 0, 1, env.get('LOCAL_RANK', args.local_rank)
    if args.dist_on_itp:
        if 'OMPI_COMM_WORLD_RANK' not in env:
            raise UserError('--dist_on_itp is for processes that Open MPI started: OMPI_COMM_WORLD_RANK is not set')
        args.rank, args.world_size = int(env['OMPI_COMM_WORLD_RANK']), int(env['OMPI_COMM_WORLD_SIZE'])
        local_rank = env['OMPI_COMM_WORLD_LOCAL_RANK']
    elif 'RANK' in env and 'WORLD_SIZE' in env:
        args.rank, args.world_size = int(env['RANK']), int(env['WORLD_SIZE'])
    elif int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1:  # SLURM_PROCID alone is set in an interactive shell too
        args.rank, args.world_size = int(env['SLURM_PROCID']), int(env['SLURM_STEP_NUM_TASKS'])
    if int(local_rank) < 0:  # the launcher did not tell: without SLURM's word, ranks are taken to fill node after node
        local_rank = env.get('SLURM_LOCALID', args.rank % max(torch.cuda.device_count(), 1))
    args.local_rank = int(local_rank)
    args.distributed = args.world_size > 1

    args.device = str(select_device(args.device, args.local_rank))
    if not args.distributed:
        return
    if args.dist_url == 'env://' and not {'MASTER_ADDR', 'MASTER_PORT'} <= env.keys():
        raise UserError(f'{args.world_size} processes were started, but MASTER_ADDR and MASTER_PORT are not set: export them, '
                        'pass --dist_url tcp://HOST:PORT, or launch with torchrun')
    backend = 'nccl' if args.device.startswith('cuda') else 'gloo'
    dist.init_process_group(backend, init_method=args.dist_url, rank=args.rank, world_size=args.world_size)
    log(f'{args.world_size} processes, {backend}')


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn --device into a device: `auto` is CUDA where there is one; a bare `cuda` is this process's own GPU."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(('cuda' if cuda else 'cpu') if name == 'auto' else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UserError(f'unknown --device {name}: auto, cpu, cuda, cuda:1 ...')
    if device.type == 'cpu':
        return device
    if not cuda:
        raise UserError('--device cuda was asked for, but this machine has no usable CUDA GPU '
                        '(torch.cuda.is_available() is False): pass --device cpu or --device auto')
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f'--device {name}, process {local_rank} of this node: there is no GPU {index} among the '
                        f'{torch.cuda.device_count()} here; start at most that many processes per node')
    device = torch.device('cuda', index)
    torch.cuda.set_device(device)
    return device


def end_distributed() -> None:
    """Leave the process group once every process has come here; without this some runs end in SIGABRT."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def get_rank() -> int:
    """Of this process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str) -> None:
    """Print on the first process only."""
    if get_rank() == 0:
        print(message, flush=True)


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm statistics that gathered apart agree before an evaluation."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (of every device) from `key`, for instance (seed, step, rank)."""
    seed = int(np.random.SeedSequence([k % 2 ** 32 for k in key]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes ten times as long
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def peak_memory_mb(device: torch.device) -> float:
    """MiB: the most that tensors took on a CUDA device, elsewhere the most that this process took."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---------------------------------------------------------------------------------------------------------------------
# Meters and logs
# ---------------------------------------------------------------------------------------------------------------------


class Meter:
    """Median of the last values, and mean over all, weighted by samples."""

    def __init__(self, window: int = 20):
        self.recent = collections.deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        self.recent.append(value)
        self.total, self.count = self.total + value * n, self.count + n

    @property
    def median(self) -> float:
        return statistics.median(self.recent) if self.recent else math.nan

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


class MetricLogger:
    """Meters by name, and console lines while a loader is walked through."""

    def __init__(self, device: torch.device, *names: str):
        self.device = device
        self.meters = collections.defaultdict(Meter, {name: Meter() for name in names})

    def update(self, n: int = 1, **values: float) -> None:
        for name, value in values.items():
            self.meters[name].update(value, n)

    def means(self) -> dict[str, float]:
        """The mean of each meter over all samples of all processes. Every process must call it."""
        names = sorted(self.meters)
        sums = torch.tensor([[self.meters[name].total, self.meters[name].count] for name in names], dtype=torch.float64,
                            device=self.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums.tolist(), strict=True)}

    def log_every(self, batches: Iterable, length: int, header: str, every: int = 10) -> Iterator:
        """Yield from `batches` of (images, ...); print every so many, and the last, with ETA, images/s and memory."""
        iteration_time, data_time = Meter(), Meter()
        images = 0
        start = end = time.time()
        for i, batch in enumerate(batches):
            data_time.update(time.time() - end)
            yield batch
            iteration_time.update(time.time() - end)
            end = time.time()
            size = len(batch[0]) * get_world_size()
            images += size
            if i % every == 0 or i == length - 1:
                eta = datetime.timedelta(seconds=int(iteration_time.mean * (length - 1 - i)))
                meters = '  '.join(f'{name} {meter.median:.4g} ({meter.mean:.4g})' for name, meter in self.meters.items())
                log(f'{header} [{i + 1:{len(str(length))}}/{length}]  eta {eta}  {meters}  time {iteration_time.median:.3f} s  '
                    f'data {data_time.median:.3f} s  {size / max(iteration_time.median, 1e-9):.1f} images/s  '
                    f'memory {peak_memory_mb(self.device):.0f} MiB')
        if images:
            seconds = time.time() - start
            log(f'{header} took {datetime.timedelta(seconds=int(seconds))}, {images / seconds:.1f} images/s')


class TensorboardLogger:
    """Scalars for TensorBoard, one step a micro-batch."""

    def __init__(self, log_dir: str):
        from tensorboardX import SummaryWriter
        self.writer = SummaryWriter(logdir=log_dir)
        self.step = 0

    def set_step(self, step: int | None = None) -> None:
        self.step = self.step + 1 if step is None else step

    def update(self, head: str = 'scalar', step: int | None = None, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f'{head}/{name}', value, self.step if step is None else step)

    def flush(self) -> None:
        self.writer.flush()


def append_to_log(file: Path, epoch_stats: dict) -> None:
    """Append one line of valid JSON: numbers that are not finite become null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in epoch_stats.items()}
    with file.open('a', encoding='utf-8') as lines:
        lines.write(json.dumps(finite, allow_nan=False) + '\n')


def cut_log(file: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later ones, which a resumed run writes again, and any that a kill cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding='utf-8').splitlines():
        try:
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
        except (ValueError, KeyError, TypeError):  # cut off, or no line of ours
            continue
    replace_file(file, lambda temporary: temporary.write_text(''.join(kept), encoding='utf-8'))


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


def cosine_scheduler(base_value: float, final_value: float, epochs: int, niter_per_ep: int, warmup_epochs: int = 0,
                     start_warmup_value: float = 0, warmup_steps: int = -1) -> np.ndarray:
    """One value for each of epochs * niter_per_ep steps: linear warm-up to base_value, then half a cosine to final_value.

    warmup_steps, where positive, replaces warmup_epochs. A warm-up longer than the run is cut to it, with a warning.
    """
    steps = epochs * niter_per_ep
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * niter_per_ep
    if warmup > steps:
        warnings.warn(f'a warm-up of {warmup} steps is longer than the run of {steps}, and is cut to it: '
                      'lower --warmup_epochs or --warmup_steps', stacklevel=2)
        warmup = steps
    ramp = np.linspace(start_warmup_value, base_value, warmup)
    progress = np.arange(steps - warmup) / max(steps - warmup, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate((ramp, cosine))


# ---------------------------------------------------------------------------------------------------------------------
# Training checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """`value` as what torch.load(weights_only=True) takes: tensors, numbers, strings, dicts and lists of these."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    return str(value)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), flush it to disk, and rename it to `path`: a reader finds the old file whole, or the new."""
    temporary = path.with_name(f'.{path.name}.partial')
    try:
        write(temporary)
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint of plain values to `path`, atomically."""
    replace_file(path, lambda temporary: torch.save(plain(checkpoint), temporary))


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of every checkpoint-{epoch}.pth, the newest first."""
    found = [(re.fullmatch(r'checkpoint-(\d+)\.pth', path.name), path) for path in output_dir.glob('checkpoint-*.pth')]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all numbered checkpoints but the newest `keep`, which is taken as at least 1."""
    for _, path in numbered_checkpoints(output_dir)[max(keep, 1):]:
        path.unlink()


def newest_checkpoint(output_dir: Path) -> tuple[Path, dict] | None:
    """(path, content) of the loadable training checkpoint in output_dir with the most epochs; None if there is none.

    Says which were passed over, and why. Raises UserError where there are some and none loads: starting anew would
    overwrite them.
    """
    numbered = numbered_checkpoints(output_dir)
    latest = _read_training_checkpoint(output_dir / 'latest.pth')
    for epoch, path in numbered:
        if latest is not None and latest[1]['epoch'] >= epoch:
            break
        found = _read_training_checkpoint(path)
        if found is not None:
            return found
    best = [output_dir / 'checkpoint-best.pth', output_dir / 'checkpoint-best-ema.pth']
    found = latest or _read_training_checkpoint(best[0]) or _read_training_checkpoint(best[1])
    tried = [path for path in [output_dir / 'latest.pth', *(path for _, path in numbered), *best] if path.exists()]
    if found is None and tried:
        raise UserError(f'none of the {len(tried)} checkpoints in {output_dir} can be resumed from (the lines above say why), '
                        'and starting anew would overwrite them: pass another --output_dir, or --auto_resume false')
    return found


def _read_training_checkpoint(path: Path) -> tuple[Path, dict] | None:
    if not path.exists():
        return None
    try:
        checkpoint = replknet.read_checkpoint(path)
    except ValueError as error:
        log(f'Passed over: {error}')
        return None
    if not epochs_done(checkpoint):
        log(f'Passed over: {path} is no training checkpoint (with model, optimizer and the number of its epoch)')
        return None
    return path, checkpoint


def epochs_done(checkpoint: object) -> int:
    """Epochs that a training checkpoint to resume from has behind it; 0 for weights alone."""
    if not isinstance(checkpoint, dict) or not {'model', 'optimizer', 'epoch'} <= checkpoint.keys():
        return 0
    # the published trainer writes 'best' for the epoch of its best checkpoints
    return checkpoint['epoch'] + 1 if isinstance(checkpoint['epoch'], int) else 0
