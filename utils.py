"""Processes, random seeds, meters and logs, schedules, training checkpoints."""
import atexit
import collections
import contextlib
import datetime
import errno
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

import replknet

TIMEOUT = datetime.timedelta(minutes=10)  # after which processes give up one that is gone; a save must not take longer
T = TypeVar('T')
SIGHUP, SIGUSR2 = getattr(signal, 'SIGHUP', None), getattr(signal, 'SIGUSR2', None)  # Windows has neither
STOP_SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, SIGHUP, SIGUSR2)))


class UserError(ValueError):
    """Something that the user can mend: script() shows the message alone, without a traceback."""


@contextlib.contextmanager
def script(*errors: type[Exception]) -> Iterator[None]:
    """Around what a script does: end it with a message and status 1 for what a user can mend, also for `errors`; with 130 after
    Ctrl-C.

    From here on stdout shows as escapes what its encoding lacks, of file names above all.
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
    try:
        dist.init_process_group(backend, init_method=args.dist_url, rank=args.rank, world_size=args.world_size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # a port that is taken, an unknown host, a process that does not come
        where = f'{env["MASTER_ADDR"]}:{env["MASTER_PORT"]}' if args.dist_url == 'env://' else args.dist_url
        raise UserError(f'process {args.rank} of {args.world_size} cannot meet the others at {where}: '
                        f'{str(error).splitlines()[0]}') from error
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


class Stopped(SystemExit):
    """The run was asked by a signal to stop, and everything is saved: ends the process with 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopRequests:
    """Notes SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and SIGUSR2, so that all processes can stop at the same place;
    a context manager.

    A second signal ends this process at once, whatever it is at. Not so one within a second, for launchers and SLURM both pass on
    the same one, and not SIGHUP, for who closes a terminal is in no hurry. SIGHUP stays ignored where nohup ignores it, and a
    handler for SIGUSR2 that is there already stays: submitit's, which requeues the job.
    """

    def __init__(self, device: torch.device):
        self.device, self.received, self.since, self.before = device, 0, None, {}

    def __enter__(self) -> 'StopRequests':
        if threading.current_thread() is threading.main_thread():  # Python allows no other to set handlers
            arrivals, self.arrived = socket.socketpair()
            self.arrived.setblocking(False)
            self.wakeup_before = signal.set_wakeup_fd(self.arrived.fileno())
            threading.Thread(target=self._watch, args=(arrivals,), daemon=True).start()
            for number in STOP_SIGNALS:
                if number not in (SIGHUP, SIGUSR2) or signal.getsignal(number) == signal.SIG_DFL:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(self.wakeup_before)
            self.arrived.close()

    def _note(self, number: int, frame) -> None:
        self.received = self.received or number

    def _watch(self, arrivals: socket.socket) -> None:
        """In a thread of its own, which each signal reaches when it comes. The handler has to wait until the main thread is back
        from C++: for a whole backward pass, or for ever."""
        with arrivals:
            while numbers := arrivals.recv(64):
                for number in numbers:
                    if number not in self.before:  # a child has ended, say
                        continue
                    if self.since is None:
                        self.since = time.monotonic()
                        if number == signal.SIGINT:
                            log('SIGINT: stopping after this step. A second one, a second later or more: at once')
                    elif number != SIGHUP and time.monotonic() - self.since > 1:
                        os._exit(128 + number)

    def forget(self) -> None:
        """Take the next signal as the first."""
        self.received, self.since = 0, None

    def agreed(self) -> int:
        """The signal that a process got, or 0: the same on all. Every process must call it at the same place."""
        if not dist.is_initialized():
            return self.received
        number = torch.tensor(self.received, device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def start_worker_server() -> None:
    """Start the process that loaders' workers are forked from, if it is not there; it imports timm and torch, for some seconds.

    In a fork of the training process a worker could hang for ever, before Python 3.12: a thread of gloo's or NCCL's may hold one
    of Python's locks just then. STOP_SIGNALS reach neither server nor workers: terminals, launchers and SLURM signal all
    processes, and the training process needs its workers to go on. Windows has no such server: workers are started anew there.
    """
    atexit.unregister(_kill_workers)  # of an earlier call
    atexit.register(_kill_workers)
    if _start_method() == 'spawn':
        return
    _choose_socket_folder()
    multiprocessing.set_forkserver_preload(['timm'])  # nothing of ours: it would take what lies in the current folder
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the server inherits this
    try:
        resource_tracker.ensure_running()  # else the next does it, which unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_method() -> str:
    server = 'forkserver' in multiprocessing.get_all_start_methods() and hasattr(signal, 'pthread_sigmask')
    return 'forkserver' if server else 'spawn'


def _choose_socket_folder() -> None:
    """Put multiprocessing's sockets into the usual temporary folder, or where that cannot be, into a shorter one: the name of a
    socket has some 100 bytes, and not every file system has sockets. Nothing else is put elsewhere."""
    for folder in ('', '/tmp', '/var/tmp', '/dev/shm'):
        with contextlib.suppress(OSError):
            folder = folder or tempfile.gettempdir()
            with tempfile.TemporaryDirectory(prefix='pymp-', dir=folder) as trial, socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.join(trial, 'listener-12345678'))  # as long as theirs
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                util.get_temp_dir()  # makes it, once, for the workers too
            finally:
                tempfile.tempdir = before
            return
    raise UserError("the sockets of the loaders' workers can be put neither into TMPDIR "
                    f'({os.environ.get("TMPDIR", "not set")}) nor into /tmp, /var/tmp or /dev/shm: set TMPDIR to a folder that '
                    'can be written to, with a name of at most 75 bytes, or pass --num_workers 0')


def worker_options(workers: int) -> dict[str, object]:
    """DataLoader's options for `workers` processes, which stay from epoch to epoch; 0 means none. Starts their server."""
    if workers == 0:
        return {}
    start_worker_server()
    return {'num_workers': workers, 'persistent_workers': True, 'multiprocessing_context': _start_method(),
            'worker_init_fn': _follow_trainer}


def _shared_batch(samples: list) -> torch.Tensor | list[torch.Tensor]:
    """A batch in shared memory. torch would move what is not there yet in a thread, whose failure leaves the loader waiting."""
    batch = default_collate(samples)
    for tensor in [batch] if isinstance(batch, torch.Tensor) else batch:
        tensor.share_memory_()
    return batch


def _follow_trainer(worker: int) -> None:
    """In a loader's worker: end when the training process does, even killed. torch watches the parent, which is the server."""
    ignore_stop_signals()  # for workers that no server started

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def _kill_workers() -> None:
    """At exit: end the workers that are left. multiprocessing would send SIGTERM, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


class Loader(DataLoader):
    """A DataLoader that raises a UserError for what a worker raised as one, which torch wraps in a traceback, and for workers
    that died, or that lack memory, shared memory or open files."""

    def __init__(self, dataset: Dataset, batch_size: int = 1, collate_fn: Callable | None = None, num_workers: int = 0,
                 **options):
        super().__init__(dataset, batch_size, collate_fn=collate_fn or (_shared_batch if num_workers else None),
                         num_workers=num_workers, **options)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rsplit('utils.UserError: ', 1)[-1].strip()) from error
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            workers = self._iterator._workers if self._iterator else []
            problem = self.num_workers and _problem_of_workers(error, workers)
            if not problem:
                raise
            if not workers:
                _drop_quietly(error)
            raise UserError(f'{problem}. The checkpoints are as they were') from error


def _problem_of_workers(error: Exception, workers: Sequence[multiprocessing.Process]) -> str | None:
    """What an error of a loader means, and what to do; None where that is not known. No `workers`: they could not be started."""
    text, number = str(error), getattr(error, 'errno', None)
    fewer = 'lower --num_workers, or pass --num_workers 0'
    if 'Too many open files' in text or 'ancdata' in text:
        return f"the data loader's workers need more open files than are allowed: allow more (ulimit -n 65536), {fewer}"
    if 'shared memory' in text or number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOSYS):  # of semaphores
        return f"the data loader's workers lack shared memory. {_shared_memory()}, {fewer}"
    if isinstance(error, MemoryError) or 'allocate memory' in text:
        return f'a worker of the data loader had no memory left on {platform.node()}: give the job more, {fewer}'

    lost = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
    end = time.monotonic() + 2 * lost  # a worker may be missed before its exit status is there
    while all(worker.exitcode is None for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    dead, worker = next(((i, w) for i, w in enumerate(workers, 1) if w.exitcode is not None), (0, None))
    out_of_memory = f'probably for want of memory, which dmesg tells: give the job more, {fewer}'
    if (lost and not workers) or (dead and worker.exitcode == 255):  # what multiprocessing says of a server that is gone
        return f"the process that the data loader's workers are forked from was killed on {platform.node()}, {out_of_memory}"
    if not dead:
        return None
    name = f"worker {dead} of the data loader's {len(workers)} (process {worker.pid} on {platform.node()})"
    if worker.exitcode >= 0:
        return f'{name} ended with status {worker.exitcode}. What it printed may say why, or a run with --num_workers 0'
    signal_name = signal.Signals(-worker.exitcode).name
    if signal_name == 'SIGKILL':
        return f'{name} was killed by SIGKILL, {out_of_memory}'
    if signal_name == 'SIGBUS':
        return f'{name} was killed by SIGBUS, probably for want of shared memory. {_shared_memory()}, {fewer}'
    return f'{name} was killed by {signal_name}. What it printed may say why, or a run with --num_workers 0'


def _shared_memory() -> str:
    where = Path('/dev/shm')
    size = f' has {shutil.disk_usage(where).total / 2 ** 20:.0f} MiB' if where.exists() else ''
    return f'{where} on {platform.node()}{size}: make it larger (docker run --shm-size=8g)'


def _drop_quietly(error: Exception) -> None:
    """Let go of the loader that an error broke in its making: torch would print a traceback of its deletion."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


def ignore_stop_signals() -> None:
    """In a loader's worker; and at the exit of the training process, whose status stands: SLURM's warning of a time limit, coming
    now, would make a finished job a failed one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def in_slurm_job_of_submitit() -> bool:
    """Whether SLURM may preempt and requeue this process: then it must not end by itself, which would end the job."""
    return os.environ.get('SUBMITIT_EXECUTOR') == 'slurm'


def gather(value: object) -> list:
    """`value` of every process, by rank. Every process must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """work() on every process, which must all call this; where it fails on one, all raise UserError with its message."""
    result, problem = None, ''
    try:
        result = work()
    except (ValueError, OSError, ImportError) as error:
        problem = str(error) or type(error).__name__
    problems = gather(problem)
    for rank, found in enumerate(problems):
        if found:
            raise UserError(found if problems[0] else f'{found} (on process {rank} of {len(problems)})')
    return result


def check_agreement(**facts: object) -> None:
    """Raise UserError on all processes, with the first two values, where one has other facts. Every process must call it."""
    everywhere = gather(facts)
    for rank, others in enumerate(everywhere):
        differ = [f'{name} is {value} on process 0, but {others.get(name)} on process {rank}'
                  for name, value in everywhere[0].items() if others.get(name) != value]
        if differ:
            raise UserError(f'the processes are not of one run: {"; ".join(differ)}')


def get_rank() -> int:
    """Of this process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str) -> None:
    """Print on the first process only. What reads or shows it may be gone: that costs the lines, not the run."""
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


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm statistics that gathered apart agree before an evaluation."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def seed_of(stream: str, *key: int) -> int:
    """A seed below 2 ** 32 for `key`, for instance (seed, step, rank); those of two streams have nothing in common."""
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
    """MiB: the most that tensors took on a CUDA device, elsewhere the most that this process took; NaN where no one counts it."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
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

    def totals(self) -> dict[str, list]:
        """[sum, count] of each meter of this process, to go on with."""
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def add_totals(self, totals: dict[str, list]) -> None:
        """Go on from totals()."""
        for name, (total, count) in totals.items():
            self.meters[name].total += total
            self.meters[name].count += count

    def means(self) -> dict[str, float]:
        """The mean of each meter over all samples of all processes. Every process must call it."""
        names = sorted(self.meters)
        sums = torch.tensor([[self.meters[name].total, self.meters[name].count] for name in names], dtype=torch.float64,
                            device=self.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums.tolist(), strict=True)}

    def log_every(self, batches: Iterable, length: int, header: str, first: int = 0, every: int = 10) -> Iterator:
        """Yield from `batches` of (images, ...), numbers `first` ... of `length`; print every so many, and the last, with ETA,
        images/s and memory."""
        iteration_time, data_time = Meter(), Meter()
        images = 0
        start = end = time.time()
        for i, batch in enumerate(batches, first):
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
    """Scalars for TensorBoard, one step a micro-batch.

    Written as they come: SummaryWriter's queue would lose, in a kill, what a checkpoint goes on from. The names of its files end
    in `suffix`. A disk that is full ends the curves, not the training.
    """

    def __init__(self, log_dir: str, suffix: str = ''):
        from tensorboardX.event_file_writer import EventsWriter
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(Path(log_dir, 'events')), suffix)
        self.step = 0

    def set_step(self, step: int | None = None) -> None:
        self.step = self.step + 1 if step is None else step

    def update(self, head: str = 'scalar', step: int | None = None, **values: float | None) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
        for name, value in values.items():
            if value is not None:
                self._write(lambda name=name, value=value: self.writer.write_event(Event(
                    wall_time=time.time(), step=self.step if step is None else step, summary=scalar(f'{head}/{name}', value))))

    def flush(self) -> None:
        self._write(lambda: self.writer.flush())

    def _write(self, write: Callable[[], object]) -> None:
        try:
            if self.writer is not None:
                write()
        except OSError as error:
            log(f'WARNING: no more curves are written for TensorBoard: {error}')
            self.writer = None


def append_to_log(file: Path, epoch_stats: dict) -> None:
    """Append one line of valid JSON: numbers that are not finite become null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in epoch_stats.items()}
    size = file.stat().st_size if file.exists() else 0
    try:
        with file.open('a', encoding='utf-8') as lines:
            lines.write(json.dumps(finite, allow_nan=False) + '\n')
    except OSError:  # of a full disk
        os.truncate(file, size)
        raise


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


def cut_events(log_dir: Path, suffix: str, micro_step: int, epoch: int) -> None:
    """Drop from a TensorboardLogger's files what a resumed run writes again: from micro_step on, evaluations from `epoch` on."""
    from tensorboardX.proto.event_pb2 import Event

    def is_kept(event: Event) -> bool:
        value = event.summary.value
        return not value or event.step < (epoch if value[0].tag.startswith('perf/') else micro_step)
    for file in log_dir.glob(f'events.out.tfevents.*{suffix}'):
        records, content, start = [], file.read_bytes(), 0
        while start + 12 <= len(content):  # each: the length of its data, 4 bytes of checksum, the data, 4 more
            end = start + 16 + struct.unpack_from('<Q', content, start)[0]
            if end > len(content):  # cut off by a kill
                break
            if is_kept(Event.FromString(content[start + 12:end - 4])):
                records.append(content[start:end])
            start = end
        replace_file(file, lambda temporary, records=records: temporary.write_bytes(b''.join(records)))


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
    """`value` as what torch.load(weights_only=True) takes: tensors, numbers, strings, dicts and lists of these.

    Tuples become lists, and anything else its name: 'torch.bfloat16'.
    """
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


def check_output(path: Path, option: str = '') -> None:
    """Raise UserError where replace_file() could not, or should not, put a file at `path`; `option` names it in the error."""
    name = f'{option} {path}'.lstrip()
    if not path.parent.is_dir():
        raise UserError(f'{name}: there is no folder {path.parent}, make it first')
    if path.exists() and not path.is_file():
        raise UserError(f'{name} is a folder or a device: name a file')


def save_checkpoint(paths: Sequence[Path], checkpoint: dict) -> None:
    """Write a checkpoint of plain values to the first of `paths`, atomically; the others become the same file.

    Raises OSError where that fails; what the paths held before is still there.
    """
    first, *others = paths
    try:
        replace_file(first, lambda temporary: torch.save(plain(checkpoint), temporary))
        for path in others:
            replace_file(path, lambda temporary: _link(first, temporary))
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        free = shutil.disk_usage(first.parent).free / 2 ** 20
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f'{first} could not be written ({reason}; {free:.0f} MiB are free there)') from error


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, target)


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of every checkpoint-{epoch}.pth, the newest first."""
    found = [(re.fullmatch(r'checkpoint-(\d+)\.pth', path.name), path) for path in output_dir.glob('checkpoint-*.pth')]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all numbered checkpoints but the newest `keep`, which is taken as at least 1."""
    for _, path in numbered_checkpoints(output_dir)[max(keep, 1):]:
        path.unlink()


def newest_checkpoint(output_dir: Path) -> tuple[Path, dict] | None:
    """(path, content) of the training checkpoint in output_dir that went furthest, of those that every process can read.

    None if there is none. Says which were passed over, and why. Raises UserError where there are some and none can be used,
    since starting anew would overwrite them, and where the processes find different ones. Every process must call it.
    """
    # a network disk may show some processes a new file later than others
    epochs = set().union(*gather([epoch for epoch, _ in numbered_checkpoints(output_dir)]))
    numbered = [(epoch, output_dir / f'checkpoint-{epoch}.pth') for epoch in sorted(epochs, reverse=True)]
    latest = _read_training_checkpoint(output_dir / 'latest.pth')
    for epoch, path in numbered:
        if latest is not None and progress(latest[1]) >= (epoch + 1, 0):
            break
        found = _read_training_checkpoint(path)
        if found is not None:
            return found
    best = [output_dir / 'checkpoint-best.pth', output_dir / 'checkpoint-best-ema.pth']
    found = latest or _read_training_checkpoint(best[0]) or _read_training_checkpoint(best[1])
    tried = [path for path in [output_dir / 'latest.pth', *(path for _, path in numbered), *best] if _exists(path)]
    if found is None and tried:
        raise UserError(f'none of the {len(tried)} checkpoints in {output_dir} can be resumed from (the lines above say why), '
                        'and starting anew would overwrite them: pass another --output_dir, or --auto_resume false')
    return found


def _exists(path: Path) -> bool:
    """For one of the processes at least."""
    return any(gather(path.exists()))


def _read_training_checkpoint(path: Path) -> tuple[Path, dict] | None:
    if not _exists(path):
        return None
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        log(f'Passed over: {error}')
        return None
    if progress(checkpoint) is None:
        log(f'Passed over: {path} is no training checkpoint (with model, optimizer and the number of its epoch)')
        return None
    check_same_content(checkpoint)
    return path, checkpoint


def read_checkpoint(path_or_url: str | Path) -> object:
    """replknet.read_checkpoint on every process at once; its tensors are pages of the file, so copy those that outlive it.

    One process of each node downloads a URL. Raises UserError on all processes where one cannot read it, or finds values that
    are not finite. Every process must call it, and then check_same_content() if it uses what was read.
    """
    def read() -> object:
        checkpoint = replknet.read_checkpoint(path_or_url, mmap=True)
        broken = non_finite(checkpoint)
        if broken:
            raise UserError(f'{path_or_url} holds values that are not finite, the first in {broken}: its run had diverged')
        return checkpoint
    if replknet.is_url(path_or_url):
        nodes = gather(socket.gethostname())
        first = nodes.index(nodes[get_rank()]) == get_rank()
        together(lambda: replknet.download(path_or_url) if first else None)
    return together(read)


def check_same_content(checkpoint: object) -> None:
    """Raise UserError on all processes where one has read another checkpoint. Every process must call it."""
    if get_world_size() > 1:
        check_agreement(**{'the checkpoint': content_of(checkpoint)})


def content_of(checkpoint: object) -> str:
    """What tells checkpoints apart, for messages: how far the training went, and a digest of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors_in(checkpoint):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    done = progress(checkpoint)
    return (f'epoch {done[0]}, step {done[1]}, ' if done else '') + f'digest {digest.hexdigest()[:8]}'


def tensors_in(content: object, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in dicts and lists, in their order; names are keys and indices with slashes between."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors_in(value, f'{name}/{key}' if name else str(key))


def non_finite(content: object) -> str:
    """The name of the first tensor of `content` that holds NaN or infinity, as tensors_in names it; '' if none does."""
    for name, tensor in tensors_in(content):
        if tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor.detach())  # NaN if there is one
            if not (math.isfinite(least) and math.isfinite(most)):
                return name
    return ''


def progress(checkpoint: object) -> tuple[int, int] | None:
    """(epochs, and steps of the next one) that a training checkpoint has behind it; None for anything else, weights alone say."""
    if not isinstance(checkpoint, dict) or not {'model', 'optimizer', 'epoch'} <= checkpoint.keys():
        return None
    # the published trainer writes 'best' for the epoch of its best checkpoints
    return (checkpoint['epoch'] + 1, checkpoint.get('step', 0)) if isinstance(checkpoint['epoch'], int) else None
