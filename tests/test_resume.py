"""Runs that are killed, stopped by signals, or cannot write, and end as if nothing had happened."""
import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import distributed
import main
import utils
from conftest import ROOT, SHORT, TOY, assert_same, free_port, log_lines, run_main, run_script
from forks import Fork, fork

# 2 epochs of 22 steps, with everything that has a state, and data that is drawn anew each time
RUN = [*TOY, '--data_set', 'DIGITS', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3', '--drop_path',
       '0.2',
       '--model_ema', '--model_ema_eval', '--save_ckpt_steps', '3', '--save_ckpt_freq', '1']


class Run:
    """The training processes of a run, or their launcher, with what polls and stops them."""

    def __init__(self, processes: list[Fork | subprocess.Popen], output_dir: Path):
        self.processes, self.output_dir = processes, output_dir
        self.pids = [process.pid for process in processes]

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def status(self) -> int:
        """0, or that of the first process that ended with another one."""
        return next(filter(None, (process.returncode for process in self.processes)), 0)

    def left(self) -> list[int]:
        """Every process that is there: launcher, trainers, the servers of their loaders' workers, and
        these."""
        found, marked = [], f'RUN={self.output_dir}'.encode()
        for folder in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):  # it may have ended
                alive = (folder / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z'
                if alive and (os.getsid(int(folder.name)) in self.pids
                              or marked in (folder / 'environ').read_bytes().split(b'\0')):
                    found.append(int(folder.name))
        return found

    def trainers(self) -> list[int]:
        """The training processes, without what they started."""
        if isinstance(self.processes[0], Fork) or not launched(self.processes[0]):
            return self.pids
        found = subprocess.run(['pgrep', '-P', str(self.pids[0])], capture_output=True, text=True,
                               check=False)
        return [int(pid) for pid in found.stdout.split()]


def launched(process: subprocess.Popen) -> bool:
    return 'torch.distributed.run' in process.args


def start(output_dir: Path, processes: int = 1, *options: str, limit: int | None = None) -> Run:
    """main.py in as many forked processes; no file may grow beyond `limit` bytes."""
    port = str(free_port())
    ranks = [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
              'MASTER_ADDR': '127.0.0.1',
              'MASTER_PORT': port} for rank in range(processes)]
    return Run([fork('forks:command_line', *options_of(output_dir, processes), *options,
                     printed=f'{output_dir}.out', limit=limit, **(env if processes > 1 else {}))
                for env in ranks], output_dir)


def launch(output_dir: Path, processes: int, *options: str) -> Run:
    """main.py with a loader's worker, under torch.distributed.run where there are several processes."""
    launcher = ['-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={processes}'] if processes > 1 else []
    return start_python(output_dir, *launcher, 'main.py', *options_of(output_dir, processes), '--num_workers',
                        '1', *options)


def options_of(output_dir: Path, processes: int = 1) -> list[str]:
    return [*RUN, '--batch_size', str(64 // processes), '--output_dir', str(output_dir),
            '--log_dir', str(output_dir / 'tensorboard')]


def start_python(output_dir: Path, *arguments: str, cwd: Path = ROOT) -> Run:
    with open(f'{output_dir}.out', 'a') as printed:
        return Run([subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, stdout=printed, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONFAULTHANDLER': '1',
                                         'RUN': str(output_dir)},
            preexec_fn=prepare)], output_dir)


def prepare() -> None:
    """In a new process: undo what nohup and a script's background do to pytest."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def printed(output_dir: Path) -> str:
    file = Path(f'{output_dir}.out')
    return file.read_text() if file.exists() else ''  # its process may not have begun


def wait_for_save(run: Run) -> None:
    """Until the run has saved, or ended."""
    latest = run.output_dir / 'latest.pth'

    def saved() -> int:
        return latest.stat().st_mtime_ns if latest.exists() else 0
    before = saved()
    assert wait_until(lambda: saved() != before or run.ended(), 120), printed(run.output_dir)


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()


def finish(run: Run, seconds: float = 120) -> int:
    """The exit status; a run that hangs, or leaves a process, is an error that shows where."""
    ended = wait_until(run.ended, seconds)
    if not ended or not wait_until(lambda: not run.left(), 30):
        left = run.left()
        kill(left, signal.SIGABRT)  # faulthandler prints the stacks
        time.sleep(5)
        kill(left)
        pytest.fail(f'processes {left} hang:\n{printed(run.output_dir)}')
    return run.status()


def scalars(output_dir: Path) -> list[tuple]:
    """All that TensorBoard would show."""
    found = []
    for file in (output_dir / 'tensorboard').iterdir():
        content, begin = file.read_bytes(), 0
        while begin < len(content):
            end = begin + 16 + int.from_bytes(content[begin:begin + 8], 'little')
            event = Event.FromString(content[begin + 12:end - 4])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            begin = end
    return sorted(found)


def assert_same_run(output_dir: Path, whole: Path) -> None:
    """That both ended with the same files, log and curves."""
    names = sorted(path.name for path in whole.glob('*.pth'))
    assert sorted(path.name for path in output_dir.glob('*.pth')) == names
    assert 'checkpoint-best-ema.pth' in names
    for name in names:
        one, other = (torch.load(folder / name, weights_only=True) for folder in (output_dir, whole))
        del one['args'], other['args']  # the folder is in there
        assert_same(one, other, name)
    assert (output_dir / 'log.txt').read_text() == (whole / 'log.txt').read_text()
    assert scalars(output_dir) == scalars(whole)


def in_a_fork(folder: Path, function: str, *arguments: str, **env: str) -> tuple[int, str]:
    """The exit status of a function of this file in a process of its own, and what it printed."""
    printed = folder / f'{function}.out'
    status = fork(f'test_resume:{function}', *arguments, printed=printed, **env).wait()
    return status, printed.read_text()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """whole(processes): the folder of a run that nobody disturbed."""
    made = {}

    def folder(processes: int = 1) -> Path:
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp('runs') / f'whole{processes}'
            assert finish(start(made[processes], processes)) == 0, printed(made[processes])
        return made[processes]
    return folder


@pytest.mark.parametrize('processes, kills, begin', [
    (1, 3, start), (2, 2, start), pytest.param(1, 20, launch, marks=pytest.mark.slow),
    pytest.param(4, 2, launch, marks=pytest.mark.slow), pytest.param(4, 20, launch, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_to_the_bit_like_one_that_was_not(processes, kills, begin,
                                                                                    whole,
                                                                                   tmp_path):
    whole, killed = whole(processes), tmp_path / 'killed'
    draw = random.Random(kills)
    for i in range(kills):
        run = begin(killed, processes)
        if i == 0 or draw.random() < 0.8:
            wait_for_save(run)
        time.sleep(draw.uniform(0, 0.7))
        trainers = run.trainers()
        # one of the trainers, or all and the launcher; what these started must end by itself
        kill([draw.choice(trainers)] if trainers and draw.random() < 0.5 else [*run.pids, *trainers])
        finish(run)
    assert finish(begin(killed, processes)) == 0, printed(killed)
    assert_same_run(killed, whole)
    assert 'Going on with epoch 0 of 2, step ' in printed(killed)


@pytest.mark.parametrize('number, processes, begin', [
    (signal.SIGTERM, 1, start), (signal.SIGUSR2, 1, start), (signal.SIGINT, 2, start),
    pytest.param(signal.SIGTERM, 1, launch, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, 2, launch, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR2, 1, launch, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, 2, launch, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(number, processes, begin, whole, tmp_path):
    whole, stopped = whole(processes), tmp_path / 'stopped'
    run = begin(stopped, processes, '--save_ckpt_steps', '5')
    wait_for_save(run)
    # a launcher passes it on; Ctrl-C reaches the workers too
    kill(run.left() if number == signal.SIGINT else run.pids, number)
    status = finish(run)
    assert status == 128 + number if begin is start or processes == 1 else status
    checkpoint = torch.load(stopped / 'latest.pth', weights_only=True)
    assert (f'{number.name} in epoch {checkpoint["epoch"] + 1}, step {checkpoint["step"]} of 22: saved in '
            f'{stopped}; leaving. The same command goes on') in printed(stopped)
    assert finish(start(stopped, processes)) == 0
    assert_same_run(stopped, whole)


def test_a_signal_in_an_evaluation_costs_no_training(imagenet, tmp_path, monkeypatch, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir']
    run_main(*options, tmp_path / 'whole')
    evaluate = main.evaluate

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)
    with monkeypatch.context() as patch, pytest.raises(distributed.Stopped) as stopped:
        patch.setattr('main.evaluate', signalled)
        run_main(*options, tmp_path / 'stopped')
    assert stopped.value.code == 143 and 'SIGTERM in the evaluation of epoch 0' in capsys.readouterr().out
    assert not (tmp_path / 'stopped' / 'log.txt').exists()
    run_main(*options, tmp_path / 'stopped')
    assert (tmp_path / 'stopped' / 'log.txt').read_text() == (tmp_path / 'whole' / 'log.txt').read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_leaves_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    with distributed.StopRequests(torch.device('cpu')) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.agreed() == signal.SIGTERM
        left = []
        assert wait_until(lambda: stop.since is not None, 10)
        monkeypatch.setattr(distributed.os, '_exit', left.append)
        stop.since -= 2
        signal.raise_signal(signal.SIGHUP)  # who closes a terminal is in no hurry
        signal.raise_signal(signal.SIGTERM)
        assert wait_until(lambda: left, 10) and left == [128 + signal.SIGTERM]


def press_ctrl_c_twice() -> None:
    def press() -> None:
        for _ in range(2):
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGINT)
    with distributed.StopRequests(torch.device('cpu')):
        threading.Thread(target=press).start()
        hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)  # minutes, in which Python runs no handler


def test_a_second_ctrl_c_leaves_at_once_also_from_a_long_call_of_c(tmp_path):
    status, text = in_a_fork(tmp_path, 'press_ctrl_c_twice')
    assert status == 130 and text.startswith('SIGINT: stopping after this step'), text


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.StopRequests(torch.device('cpu')) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.agreed() == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_costs_nothing_but_what_it_would_show(tmp_path):
    """Its programs get SIGHUP, and can print no more."""
    terminal, program = os.openpty()

    def prepare_terminal() -> None:
        prepare()
        os.setsid()
        fcntl.ioctl(program, termios.TIOCSCTTY, 0)
    run = subprocess.Popen([sys.executable, 'main.py', *options_of(tmp_path / 'run')], cwd=ROOT,
                           stdin=program, stdout=program, stderr=program, preexec_fn=prepare_terminal,
                           env={**os.environ, 'OMP_NUM_THREADS': '1'})
    os.close(program)
    shown = b''
    while b'Epoch [0] [ 1/22]' not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert run.wait(60) == 128 + signal.SIGHUP
    assert torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)['step'] > 0


def test_a_reader_that_ends_first_costs_nothing_but_its_lines(imagenet, tmp_path):
    """Ctrl-C ends `| tee log` too, and a run may go on without it."""
    options = map(str, [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run'])
    with subprocess.Popen([sys.executable, 'main.py', *options], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    assert run.returncode == 0 and 'Error' not in errors, errors
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]


def test_ctrl_c_before_training_ends_with_130_and_no_traceback(imagenet, tmp_path):
    output_dir = tmp_path / 'run'
    options = map(str, [*SHORT, '--data_path', imagenet, '--num_workers', 1, '--dry_run', '--output_dir',
                        output_dir])
    run = Run([fork('forks:command_line', *options, printed=f'{output_dir}.out')], output_dir)
    assert wait_until(lambda: 'Namespace' in printed(output_dir), 60)
    kill(run.left(), signal.SIGINT)
    assert finish(run) == 130 and 'Traceback' not in printed(output_dir), printed(output_dir)


def test_submitits_handler_stays_and_its_slurm_job_does_not_end_by_itself(imagenet, tmp_path, monkeypatch,
                                                                          capsys):
    monkeypatch.setenv('SUBMITIT_EXECUTOR', 'slurm')
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        theirs = signal.getsignal(signal.SIGUSR2)
        with distributed.StopRequests(torch.device('cpu')):
            assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        signal.signal(signal.SIGUSR2, before)
    train_one_epoch = main.train_one_epoch

    def signalled(**arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_one_epoch(**arguments)
    monkeypatch.setattr('main.train_one_epoch', signalled)
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run')
    assert 'SIGTERM in epoch 0, step 1 of 2: saved' in capsys.readouterr().out
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]

    def interrupted(**arguments):
        signal.raise_signal(signal.SIGINT)
        return train_one_epoch(**arguments)
    monkeypatch.setattr('main.train_one_epoch', interrupted)
    with pytest.raises(distributed.Stopped):  # SLURM sends no Ctrl-C
        run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'interrupted')


class Slow(torch.utils.data.Dataset):
    """A data set whose images take a while."""
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(0.5)
        return index


def test_loaders_workers_and_their_server_outlive_the_signals_of_launchers():
    loader = torch.utils.data.DataLoader(Slow(), **distributed.worker_options(1))
    batches = iter(loader)
    worker, = batches._workers
    server = int(subprocess.check_output(['ps', '-o', 'ppid=', '-p', str(worker.pid)]))
    assert server != os.getpid() and next(batches) == 0
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
        os.kill(server, number)
    assert [int(batch) for batch in batches] == [1, 2, 3]
    assert [int(batch) for batch in loader] == [0, 1, 2,
                                                3] and batches._workers == [worker] and worker.is_alive()


def leave_workers() -> None:
    batches = iter(torch.utils.data.DataLoader(Slow(), **distributed.worker_options(2)))
    next(batches)
    sys.exit(7)


def test_a_process_with_workers_left_ends(tmp_path):
    assert in_a_fork(tmp_path, 'leave_workers') == (7, '')


class Fault(torch.utils.data.Dataset):
    """A data set one image of which does `fault` in the loader's worker."""
    def __init__(self, fault: str):
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 4:
            exec(self.fault)
        return index


def walk(fault: str) -> list[int]:
    return [int(index) for index in distributed.Loader(Fault(fault), **distributed.worker_options(2))]


@pytest.mark.parametrize('fault, told', [
    ('os.kill(os.getpid(), signal.SIGKILL)',
     r"worker 1 of .* 2 \(process \d+ on .*\) was killed by SIGKILL, probably for want of memory.* lower "
     r"--num_workers"),
    ('os.kill(os.getpid(), signal.SIGBUS)', r'killed by SIGBUS, .*shared memory\. /dev/shm on .* has \d+ '
                                            r'MiB: make it larger'),
    ('os._exit(3)', r'worker 1 of .* ended with status 3\.'),
    ('raise MemoryError', 'a worker of the data loader had no memory left'),
    ('raise OSError(24, "Too many open files")', 'need more open files than are allowed'),
    ('raise utils.UserError("cat.jpg is broken")', r'^cat\.jpg is broken$'),
    # the last, for the next would have to start another server
    ('os.kill(os.getppid(), signal.SIGKILL); time.sleep(10)',
     'the process that .* workers fork from was killed')])
def test_what_ends_a_loaders_worker_is_told_in_one_line(fault, told):
    with pytest.raises(utils.UserError, match=told) as caught:
        walk(fault)
    assert '\n' not in str(caught.value)


@pytest.fixture(scope='module')
def with_shared_memory():
    """with_shared_memory(size): what to put before a command for it to see a /dev/shm of that size."""
    def launcher(size: str) -> list[str]:
        return ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"',
                'sh']
    try:
        subprocess.run([*launcher('1m'), 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'no other /dev/shm can be mounted here ({error})')
    return launcher


def print_walk(fault: str) -> None:
    with utils.script():
        print(walk(fault))


@pytest.mark.parametrize('size, fault', [('16k', ''), ('1m', 'subprocess.run("cat /dev/zero > '
                                                             '/dev/shm/full", shell=True)')])
def test_shared_memory_that_is_full_at_the_start_or_later_is_told(size, fault, with_shared_memory):
    done = run_script(*with_shared_memory(size), 'python', '-c', f'import test_resume; '
                                                                 f'test_resume.print_walk({fault!r})',
                      PYTHONPATH=f'{ROOT}:{ROOT}/tests')
    told = "ERROR: the data loader's workers lack shared memory. /dev/shm"
    assert done.returncode == 1 and told in done.stdout, done.stdout
    assert 'docker run --shm-size' in done.stdout and 'Traceback' not in done.stdout, done.stdout


def test_a_temporary_folder_with_a_long_name_holds_all_but_the_sockets(tmp_path):
    folder = tmp_path / ('x' * (200 - len(str(tmp_path)) - 1))
    folder.mkdir()
    fault = 'import tempfile; tempfile.mkstemp("mine")'
    assert in_a_fork(tmp_path, 'print_walk', fault, TMPDIR=str(folder)) == (0, f'{list(range(8))}\n')
    assert [path.name.endswith('mine') for path in folder.iterdir()] == [True]


def test_a_worker_that_is_killed_costs_no_checkpoint(tmp_path):
    output_dir = tmp_path / 'run'
    run = start(output_dir, 1, '--num_workers', '1')
    wait_for_save(run)
    before = (output_dir / 'latest.pth').read_bytes()
    kill([pid for pid in run.left() if Path(f'/proc/{pid}/comm').read_text() == 'pt_data_worker\n'])
    assert finish(run) == 1
    text = printed(output_dir)
    assert 'ERROR: worker 1 of' in text and 'Traceback' not in text, text
    assert before and torch.load(output_dir / 'latest.pth', weights_only=True)['step'] > 0


# What threads of gloo's and NCCL's do now and then: become a thread of Python's and no more. Python before
# 3.12 holds a lock meanwhile that its fork takes over as it is.
BUSY_THREAD = """
#include <atomic>
#include <thread>
extern "C" {
void *PyInterpreterState_Main(), *PyThreadState_New(void *);
void PyThreadState_Delete(void *);
std::atomic<bool> ends;
std::thread *thread;
void start() {
  thread = new std::thread([] {
    while (!ends) PyThreadState_Delete(PyThreadState_New(PyInterpreterState_Main()));
  });
}
void stop() { ends = true, thread->join(); }
}
"""


def run_beside_a_busy_thread(library: str, *options: str) -> None:
    busy = ctypes.CDLL(library)
    busy.start()
    main.main(main.get_args_parser().parse_args(options))
    busy.stop()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='g++ is needed')
def test_a_thread_that_takes_pythons_locks_hangs_no_worker(whole, tmp_path):
    (tmp_path / 'busy.cpp').write_text(BUSY_THREAD)
    library = tmp_path / 'busy.so'
    subprocess.run(['g++', '-shared', '-fPIC', '-pthread', '-o', library, tmp_path / 'busy.cpp'], check=True)
    output_dir = tmp_path / 'run'
    run = Run([fork('test_resume:run_beside_a_busy_thread', str(library), *options_of(output_dir),
                    '--num_workers', '1', printed=f'{output_dir}.out')], output_dir)
    assert finish(run) == 0, printed(output_dir)
    assert_same_run(output_dir, whole())


def test_workers_take_no_module_from_the_current_folder(imagenet, tmp_path):
    for name in ('main', 'datasets', 'utils'):
        (tmp_path / f'{name}.py').write_text('raise SystemExit("not this one")')
    options = [*SHORT, '--data_path', imagenet, '--num_workers', 1, '--output_dir', tmp_path / 'run']
    run = start_python(tmp_path / 'run', str(ROOT / 'main.py'), *map(str, options), cwd=tmp_path)
    assert finish(run) == 0, printed(tmp_path / 'run')
    assert 'not this one' not in printed(tmp_path / 'run') and len(log_lines(tmp_path / 'run')) == 2


def end_among_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        atexit.register(os.kill, os.getpid(), number)
    atexit.register(distributed.ignore_stop_signals)  # the last comes first


def test_a_signal_at_the_exit_does_not_change_its_status(tmp_path):
    """SLURM's warning of a time limit may come to a run that has just ended."""
    assert in_a_fork(tmp_path, 'end_among_signals') == (0, '')


def test_a_full_disk_costs_the_save_and_not_the_training(whole, tmp_path):
    full = tmp_path / 'full'
    run = start(full, 1, limit=2 ** 20)  # bytes: less than a checkpoint, more than the logs
    assert finish(run) == 1
    text = printed(full)
    assert text.count('WARNING: ') >= 3
    assert 'latest.pth could not be written' in text and 'MiB are free there' in text
    assert 'ERROR: ' in text and 'the same command goes on' in text and 'Traceback' not in text
    assert not list(full.glob('*.pth')) and not list(full.glob('.*'))
    assert (full / 'log.txt').read_text() == (whole() / 'log.txt').read_text()  # it trained to the end
    assert finish(start(full)) == 0
    assert_same_run(full, whole())


def test_a_step_that_the_epoch_does_not_have_is_told(imagenet, tmp_path):
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--epochs', '1')
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    torch.save({**checkpoint, 'step': 2}, tmp_path / 'other.pth')
    with pytest.raises(utils.UserError, match='is at step 2 of an epoch, which has 2 here'):
        run_main(*SHORT, '--data_path', imagenet, '--resume', tmp_path / 'other.pth')


def test_a_folder_that_cannot_be_written_to_is_told_before_training(imagenet, tmp_path):
    (tmp_path / 'file').write_text('no folder')
    with pytest.raises(utils.UserError, match=r'--output_dir .*run cannot be a folder: .*/file is a file'):
        run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'file' / 'run')
