"""Processes: the CPUs they share, launchers, agreement, signals, and the loaders' workers.

main.py imports this before anything that loads torch: OpenMP reads its variables at that moment alone.
"""
import atexit
import contextlib
import datetime
import errno
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import TypeVar

# Two threads of a parallel region that come to share a CPU, because another program runs on the other one,
# wait for each other at the end of each region until a time slice is over: a step then takes ten to thirty
# times as long. Bound to a core each they share it with the other program alone.
BINDING = {'OMP_PROC_BIND': 'spread', 'OMP_PLACES': 'cores'}
OF_LAUNCHERS = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK', 'SUBMITIT_LOCAL_NTASKS')


def _import_torch_with_bound_threads() -> tuple[set[int], set[int]]:
    """Import torch; return the CPUs of this process, and those that its first thread, this one, is to have.

    The others are bound from now on, in a process that is alone on its node and whose user has set nothing of
    OpenMP's. This one is not yet: the processes that it starts would have to stay on its core.
    """
    if not hasattr(os, 'sched_setaffinity'):  # on other systems than Linux
        return set(), set()
    cpus = os.sched_getaffinity(0)
    if 'torch' in sys.modules or any(name.startswith(('OMP_', 'GOMP_', *OF_LAUNCHERS))
                                     for name in os.environ):
        return cpus, cpus
    os.environ.update(BINDING)
    import torch  # noqa: F401
    for name in BINDING:
        del os.environ[name]  # the processes that this one starts have threads of their own
    first = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    return cpus, first


CPUS, FIRST = _import_torch_with_bound_threads()

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, default_collate

from utils import UserError, get_world_size, log

TIMEOUT = datetime.timedelta(minutes=10)  # for a process that is gone; a save must not take longer
T = TypeVar('T')
SIGHUP, SIGUSR2 = getattr(signal, 'SIGHUP', None), getattr(signal, 'SIGUSR2', None)  # Windows has neither
STOP_SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, SIGHUP, SIGUSR2)))


def bind_this_thread() -> None:
    """Bind this thread, and what it starts, to the core that the others of its regions leave to it."""
    if FIRST != CPUS:
        os.sched_setaffinity(0, FIRST)


def share_out_threads() -> None:
    """Give each process of a node its part of the threads, if OMP_NUM_THREADS and the launcher did not.

    Every process must call this.
    """
    node = socket.gethostname()
    processes = gather(node).count(node)
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ and len(CPUS) == os.cpu_count():
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


# ---- Launchers ---------------------------------------------------------------------------------------------

def init_distributed(args: Namespace) -> None:
    """Set args.rank, world_size, local_rank and distributed as the launcher says, and join the process group.

    Knows torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK or --local_rank), srun with
    several tasks (SLURM_*), and Open MPI with --dist_on_itp. Anything else, and a world of one, is a single
    process without a group. NCCL on CUDA, gloo elsewhere.
    """
    env = os.environ
    args.rank, args.world_size, local_rank = 0, 1, env.get('LOCAL_RANK', args.local_rank)
    if args.dist_on_itp:
        if 'OMPI_COMM_WORLD_RANK' not in env:
            raise UserError('--dist_on_itp is for processes that Open MPI started: '
                            'OMPI_COMM_WORLD_RANK is not set')
        args.rank, args.world_size = int(env['OMPI_COMM_WORLD_RANK']), int(env['OMPI_COMM_WORLD_SIZE'])
        local_rank = env['OMPI_COMM_WORLD_LOCAL_RANK']
    elif 'RANK' in env and 'WORLD_SIZE' in env:
        args.rank, args.world_size = int(env['RANK']), int(env['WORLD_SIZE'])
    elif int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1:  # SLURM_PROCID alone is set in an interactive shell too
        args.rank, args.world_size = int(env['SLURM_PROCID']), int(env['SLURM_STEP_NUM_TASKS'])
    if int(local_rank) < 0:  # not told: without SLURM's word, ranks are taken to fill node after node
        local_rank = env.get('SLURM_LOCALID', args.rank % max(torch.cuda.device_count(), 1))
    args.local_rank = int(local_rank)
    args.distributed = args.world_size > 1

    args.device = str(select_device(args.device, args.local_rank))
    if not args.distributed:
        return
    if args.dist_url == 'env://' and not {'MASTER_ADDR', 'MASTER_PORT'} <= env.keys():
        raise UserError(f'{args.world_size} processes were started, but MASTER_ADDR and MASTER_PORT are '
                        'not set: export them, pass --dist_url tcp://HOST:PORT, or launch with torchrun')
    backend = 'nccl' if args.device.startswith('cuda') else 'gloo'
    try:
        dist.init_process_group(backend, init_method=args.dist_url, rank=args.rank,
                                world_size=args.world_size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # a port taken, an unknown host, a process that does not come
        where = f'{env["MASTER_ADDR"]}:{env["MASTER_PORT"]}' if args.dist_url == 'env://' else args.dist_url
        raise UserError(f'process {args.rank} of {args.world_size} cannot meet the others at {where}: '
                        f'{str(error).splitlines()[0]}') from error
    log(f'{args.world_size} processes, {backend}')


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """--device as a device: `auto` is CUDA where there is one; a bare `cuda` is this process's own GPU."""
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
        raise UserError(f'--device {name}, process {local_rank} of this node: there is no GPU {index} among '
                        f'the {torch.cuda.device_count()} here; start at most that many processes per node')
    device = torch.device('cuda', index)
    torch.cuda.set_device(device)
    return device


def end_distributed() -> None:
    """Leave the process group once every process has come here; without this some runs end in SIGABRT."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---- Agreement ---------------------------------------------------------------------------------------------

def gather(value: object) -> list:
    """`value` of every process, by rank. Every process must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """work() on every process, which must all call this; if one fails, all raise a UserError that says so."""
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
    """Raise UserError on all processes where one has other facts. Every process must call it."""
    everywhere = gather(facts)
    for rank, others in enumerate(everywhere):
        differ = [f'{name} is {value} on process 0, but {others.get(name)} on process {rank}'
                  for name, value in everywhere[0].items() if others.get(name) != value]
        if differ:
            raise UserError(f'the processes are not of one run: {"; ".join(differ)}')


# ---- Signals -----------------------------------------------------------------------------------------------

class Stopped(SystemExit):
    """A signal asked the run to stop, and all is saved: ends the process with 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopRequests:
    """A context in which SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and SIGUSR2 are only noted.

    All processes can then stop at the same place. A second signal ends this process at once, but not within a
    second, for launchers and SLURM both pass on the same one, and not SIGHUP, for who closes a terminal is in
    no hurry. SIGHUP stays ignored where nohup ignores it, and a handler for SIGUSR2, submitit's, stays.
    """

    def __init__(self, device: torch.device):
        self.device, self.received, self.since, self.before = device, 0, None, {}
        self.asked_at, self.calls, self.slow = time.monotonic(), 0, False

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
        """In a thread of its own, which each signal reaches when it comes.

        The handler has to wait until the main thread is back from C++: a whole backward pass, or for ever.
        """
        with arrivals:
            while numbers := arrivals.recv(64):
                for number in numbers:
                    if number not in self.before:  # a child has ended, say
                        continue
                    if self.since is None:
                        self.since = time.monotonic()
                        if number == signal.SIGINT:
                            log('SIGINT: stopping after this step. '
                                'A second one, a second later or more: at once')
                    elif number != SIGHUP and time.monotonic() - self.since > 1:
                        os._exit(128 + number)

    def forget(self) -> None:
        """Take the next signal as the first."""
        self.received, self.since = 0, None

    def agreed(self, cheap: bool = True) -> int:
        """The signal that a process got, or 0: the same on all, which must all call it at the same place.

        Where it is not `cheap`, for nothing else waits for the device there, it is 0 unless ten calls took
        longer than 5 s on one of them, saves and the like included.
        """
        self.calls += 1
        if not dist.is_initialized():
            return self.received
        if not (cheap or self.slow):
            return 0
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)  # else the time would be that of giving it work
        ten_calls = 10 * (time.monotonic() - self.asked_at) / self.calls
        found = torch.tensor([self.received, ten_calls], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        number, ten_calls = found.tolist()
        self.asked_at, self.calls, self.slow = time.monotonic(), 0, ten_calls > 5
        return int(number)


def ignore_stop_signals() -> None:
    """In a loader's worker; and at the exit of training, which SLURM's warning would make a failed job."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def in_slurm_job_of_submitit() -> bool:
    """Whether SLURM may preempt and requeue this process: by ending by itself it would end the job."""
    return os.environ.get('SUBMITIT_EXECUTOR') == 'slurm'


# ---- The loaders' workers ----------------------------------------------------------------------------------

def start_worker_server() -> None:
    """Start the process that loaders' workers are forked from, if it is not there.

    It imports timm and torch, for some seconds. In a fork of the training process a worker could hang for
    ever, before Python 3.12: a thread of gloo's or NCCL's may hold one of Python's locks just then.
    STOP_SIGNALS reach neither server nor workers: terminals, launchers and SLURM signal all processes, and
    the training process needs its workers to go on. Windows has no such server: workers are started anew.
    """
    atexit.unregister(_kill_workers)  # of an earlier call
    atexit.register(_kill_workers)
    if _start_method() == 'spawn':
        return
    _choose_socket_folder()
    multiprocessing.set_forkserver_preload(['timm'])  # nothing of ours: the current folder may hide it
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
    """Put multiprocessing's sockets, and nothing else, into a folder that can hold them.

    The usual temporary one, or else a shorter one: the name of a socket has some 100 bytes, and not every
    file system has sockets.
    """
    for folder in ('', '/tmp', '/var/tmp', '/dev/shm'):
        with contextlib.suppress(OSError):
            folder = folder or tempfile.gettempdir()
            with (tempfile.TemporaryDirectory(prefix='pymp-', dir=folder) as trial,
                  socket.socket(socket.AF_UNIX) as listener):
                listener.bind(os.path.join(trial, 'listener-12345678'))  # as long as theirs
            before, tempfile.tempdir = tempfile.tempdir, folder
            try:
                util.get_temp_dir()  # makes it, once, for the workers too
            finally:
                tempfile.tempdir = before
            return
    raise UserError("the sockets of the loaders' workers can be put neither into TMPDIR "
                    f'({os.environ.get("TMPDIR", "not set")}) nor into /tmp, /var/tmp or /dev/shm: '
                    'set TMPDIR to a folder that can be written to, with a name of at most 75 bytes, '
                    'or pass --num_workers 0')


def worker_options(workers: int) -> dict[str, object]:
    """DataLoader's options for `workers` processes that stay, 0 for none. Starts their server."""
    if workers == 0:
        return {}
    start_worker_server()
    return {'num_workers': workers, 'persistent_workers': True, 'multiprocessing_context': _start_method(),
            'worker_init_fn': _follow_trainer}


def shared_batch(samples: list) -> torch.Tensor | list[torch.Tensor]:
    """A batch in shared memory. torch would move it in a thread, whose failure leaves the loader waiting."""
    batch = default_collate(samples)
    for tensor in [batch] if isinstance(batch, torch.Tensor) else batch:
        tensor.share_memory_()
    return batch


def _follow_trainer(worker: int) -> None:
    """In a loader's worker: end when the training process does. torch watches the parent, the server."""
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
    """A DataLoader with a UserError for workers that died, or that lack memory, shared memory or open files.

    What a worker raised as a UserError stays one; torch would wrap it in a traceback.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 1, collate_fn: Callable | None = None,
                 num_workers: int = 0, **options):
        collate_fn = collate_fn or (shared_batch if num_workers else None)
        super().__init__(dataset, batch_size, collate_fn=collate_fn, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except UserError as error:
            name = f'{UserError.__module__}.UserError: '
            raise UserError(str(error).rsplit(name, 1)[-1].strip()) from error
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            workers = self._iterator._workers if self._iterator else []
            problem = self.num_workers and _problem_of_workers(error, workers)
            if not problem:
                raise
            if not workers:
                _drop_quietly(error)
            raise UserError(f'{problem}. The checkpoints are as they were') from error


def _problem_of_workers(error: Exception, workers: Sequence[multiprocessing.Process]) -> str | None:
    """What an error of a loader means, and what to do, if known. No `workers`: they could not be started."""
    text, number, node = str(error), getattr(error, 'errno', None), platform.node()
    fewer = 'lower --num_workers, or pass --num_workers 0'
    if 'Too many open files' in text or 'ancdata' in text:
        return ("the data loader's workers need more open files than are allowed: allow more "
                f'(ulimit -n 65536), {fewer}')
    # the numbers are those of semaphores
    if 'shared memory' in text or number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOSYS):
        return f"the data loader's workers lack shared memory. {_shared_memory()}, {fewer}"
    if isinstance(error, MemoryError) or 'allocate memory' in text:
        return f'a worker of the data loader had no memory left on {node}: give the job more, {fewer}'

    lost = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
    end = time.monotonic() + 2 * lost  # a worker may be missed before its exit status is there
    while all(worker.exitcode is None for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    dead, worker = next(((i, w) for i, w in enumerate(workers, 1) if w.exitcode is not None), (0, None))
    out_of_memory = f'probably for want of memory, which dmesg tells: give the job more, {fewer}'
    # 255: what multiprocessing says of a server that is gone
    if (lost and not workers) or (dead and worker.exitcode == 255):
        return f"the process that the data loader's workers fork from was killed on {node}, {out_of_memory}"
    if not dead:
        return None
    name = f"worker {dead} of the data loader's {len(workers)} (process {worker.pid} on {node})"
    printed = 'What it printed may say why, or a run with --num_workers 0'
    if worker.exitcode >= 0:
        return f'{name} ended with status {worker.exitcode}. {printed}'
    signal_name = signal.Signals(-worker.exitcode).name
    if signal_name == 'SIGKILL':
        return f'{name} was killed by SIGKILL, {out_of_memory}'
    if signal_name == 'SIGBUS':
        return f'{name} was killed by SIGBUS, probably for want of shared memory. {_shared_memory()}, {fewer}'
    return f'{name} was killed by {signal_name}. {printed}'


def _shared_memory() -> str:
    where = Path('/dev/shm')
    size = f' has {shutil.disk_usage(where).total / 2 ** 20:.0f} MiB' if where.exists() else ''
    return f'{where} on {platform.node()}{size}: make it larger (docker run --shm-size=8g)'


def _drop_quietly(error: Exception) -> None:
    """Let go of the loader that an error broke in its making: torch would print a traceback of its end."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook
