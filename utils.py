"""Small things that all share: the error for users, logs and meters, seeds, schedules."""
import collections
import contextlib
import datetime
import math
import os
import random
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

DIVERGED = ('Try a lower --lr or a longer --warmup_epochs, --clip_grad 5, and --amp_dtype bfloat16 '
            'or no --use_amp. To go on from the last checkpoint so, name it in --resume '
            'and another folder in --output_dir')


class UserError(ValueError):
    """Something that the user can mend: script() shows the message alone, without a traceback."""


@contextlib.contextmanager
def script(*errors: type[Exception]) -> Iterator[None]:
    """Around what a script does: end it with a message and status 1 for what a user can mend.

    That is a UserError, an ImportError, or one of `errors`. After Ctrl-C the status is 130. From here on
    stdout shows as escapes what its encoding lacks, of file names above all.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # stderr does so by itself
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        yield
    except BrokenPipeError as error:  # what reads the output has ended, `| head` say
        drop_output()
        sys.exit(f'ERROR: {error}')
    except (UserError, ImportError, *errors) as error:
        sys.exit(f'ERROR: {error}')
    except RuntimeError as error:
        if 'by peer' not in str(error):  # gloo's words
            raise
        sys.exit(f'ERROR: another process of this run has ended, and says why ({error})')
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def get_rank() -> int:
    """Of this process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str) -> None:
    """Print on the first process only. Where what reads it is gone, that costs the lines, not the run."""
    if get_rank() != 0:
        return
    try:
        print(message, flush=True)
    except UnicodeEncodeError:  # where script() did not prepare stdout
        print(message.encode('ascii', 'backslashreplace').decode(), flush=True)
    except OSError:  # a closed terminal; Ctrl-C, which ended `| tee log` too; a full disk
        drop_output()


def drop_output() -> None:
    """Let what is printed, and what waits to be, go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def listed(names: Sequence, most: int = 6) -> str:
    """For messages: 'a, b, c', or of many the first: 'a, b, c, d, e, f and 990 more'; '' of none."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(str, names[:most])) + more


def replace_file(path: Path, write: Callable[[Path], object], writer: str = '') -> None:
    """write(temporary path), flush it to disk, rename it to `path`: readers find the old file or the new.

    writer: a name of this process, where others may write the same file at the same time.
    """
    temporary = path.with_name(f'.{path.name}{writer and "."}{writer}.partial')
    try:
        write(temporary)
        with temporary.open('r+b') as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, 'O_DIRECTORY'):  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # else the name could still be the old file's after a power cut
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def seed_of(stream: str, *key: int) -> int:
    """A seed below 2 ** 32 for `key`, (seed, step, rank) say; those of two streams have nothing in common."""
    return int(np.random.SeedSequence([*stream.encode(), *(k % 2 ** 64 for k in key)]).generate_state(1)[0])


def seed_generators(stream: str, *key: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (of every device) with seed_of(stream, *key)."""
    seed = seed_of(stream, *key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes ten times as long
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MiB: of tensors on a CUDA device, else of this process; NaN if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


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

    def totals(self) -> dict[str, list]:
        """[sum, count] of each meter of this process, to go on with."""
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def add_totals(self, totals: dict[str, list]) -> None:
        """Go on from totals()."""
        for name, (total, count) in totals.items():
            self.meters[name].total += total
            self.meters[name].count += count

    def restore(self, totals: list[dict[str, list]]) -> None:
        """Go on from the totals() of each process; where there were more or fewer, the first takes all."""
        if len(totals) == get_world_size():
            totals = [totals[get_rank()]]
        elif get_rank() != 0:
            return
        for part in totals:
            self.add_totals(part)

    def means(self) -> dict[str, float]:
        """The mean of each meter over all samples of all processes. Every process must call it."""
        names = sorted(self.meters)
        sums = torch.tensor([[self.meters[name].total, self.meters[name].count] for name in names],
                            dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: total / count if count else math.nan
                for name, (total, count) in zip(names, sums.tolist(), strict=True)}

    def log_every(self, batches: Iterable, length: int, header: str, first: int = 0,
                  every: int = 10, group: int = 1) -> Iterator:
        """Yield from `batches` of (images, ...), which are numbered `first` ... `length` - 1.

        Print a line after the first of each `every` groups of `group` batches, and after the last: ETA,
        meters, memory, and since the line before seconds a batch and images/s.
        """
        data_time = Meter()
        images = images_before = before = 0
        start = end = printed = time.time()
        for i, batch in enumerate(batches, first):
            data_time.update(time.time() - end)
            yield batch
            end = time.time()
            images += len(batch[0]) * get_world_size()
            if i % (every * group) == group - 1 or i == length - 1:
                done = i + 1 - first
                eta = datetime.timedelta(seconds=int((end - start) / done * (length - 1 - i)))
                meters = '  '.join(f'{name} {meter.median:.4g} ({meter.mean:.4g})'
                                   for name, meter in self.meters.items())
                # from line to line: between them a GPU is given work, not waited for
                seconds = max(end - printed, 1e-9)
                log(f'{header} [{i + 1:{len(str(length))}}/{length}]  eta {eta}  {meters}  '
                    f'time {seconds / (done - before):.3f} s  data {data_time.median:.3f} s  '
                    f'{(images - images_before) / seconds:.1f} images/s  '
                    f'memory {peak_memory_mb(self.device):.0f} MiB')
                images_before, before, printed = images, done, end
        if images:
            seconds = time.time() - start
            log(f'{header} took {datetime.timedelta(seconds=int(seconds))}, {images / seconds:.1f} images/s')


class TensorboardLogger:
    """Scalars for TensorBoard, one step a micro-batch.

    Written as they come: SummaryWriter's queue would lose, in a kill, what a checkpoint goes on from. The
    names of its files end in `suffix`; before it stands the time in nanoseconds, as tensorboardX writes over
    a file of the same second. A disk that is full ends the curves, not the training.
    """

    def __init__(self, log_dir: str, suffix: str = ''):
        from tensorboardX.event_file_writer import EventsWriter
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(Path(log_dir, 'events')), f'.{time.time_ns()}{suffix}')
        self.step = 0

    def set_step(self, step: int | None = None) -> None:
        self.step = self.step + 1 if step is None else step

    def update(self, head: str = 'scalar', step: int | None = None, **values: float | None) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
        for name, value in values.items():
            if value is not None:
                self._write(lambda name=name, value=value: self.writer.write_event(Event(
                    wall_time=time.time(), step=self.step if step is None else step,
                    summary=scalar(f'{head}/{name}', value))))

    def flush(self) -> None:
        self._write(lambda: self.writer.flush())

    def _write(self, write: Callable[[], object]) -> None:
        try:
            if self.writer is not None:
                write()
        except OSError as error:
            log(f'WARNING: no more curves are written for TensorBoard: {error}')
            self.writer = None


def cosine_scheduler(base_value: float, final_value: float, epochs: int, niter_per_ep: int,
                     warmup_epochs: int = 0, start_warmup_value: float = 0,
                     warmup_steps: int = -1) -> np.ndarray:
    """Linear warm-up to base_value, then half a cosine to final_value: a value for each step of a run.

    The run has epochs * niter_per_ep steps. warmup_steps, where positive, replaces warmup_epochs. A warm-up
    longer than the run is cut to it, with a warning.
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


SWIN_SCHEDULES = {'swin': 'cosine', 'swin_linear': 'linear', 'swin_step': 'step'}  # --lr_schedule's names


def swin_schedule(base: float, minimum: float, epochs: int, steps_per_epoch: int, warmup_epochs: int,
                  warmup_start: float, name: str = 'cosine', update_freq: int = 1, decay_epochs: int = 30,
                  decay_rate: float = 0.1) -> np.ndarray:
    """Swin Transformer's learning rate (timm's per update, without a prefix): one for each optimizer step.

    Time counts micro-batches, of which an epoch has steps_per_epoch and a step takes update_freq; those that
    fill no step are left out. `name` is what follows the linear warm-up: cosine, from base to minimum over
    the whole run, which the warm-up cuts into; linear, to a hundredth of base; step, by decay_rate every
    decay_epochs. The rate is set after a step, from the number of its last micro-batch: the first step has
    warmup_start, or without a warm-up base. Raises ValueError for another name.
    """
    total, warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch

    def rate(t: np.ndarray) -> np.ndarray:
        if name == 'cosine':
            return minimum + (base - minimum) * (1 + np.cos(np.pi * t / total)) / 2
        if name == 'linear':
            return base - 0.99 * base * (t - warmup) / max(total - warmup, 1)
        if name == 'step':
            return base * decay_rate ** (t // (decay_epochs * steps_per_epoch))
        raise ValueError(f'unknown schedule {name!r}: cosine, linear or step')
    steps = np.arange(steps_per_epoch // update_freq) * update_freq + update_freq - 1
    last = (np.arange(epochs)[:, None] * steps_per_epoch + steps).ravel()[:-1]  # micro-batch of each step
    ramp = warmup_start + last * (base - warmup_start) / max(warmup, 1)
    first = warmup_start if warmup else base
    return np.concatenate(([first], np.where(last < warmup, ramp, rate(last))))
