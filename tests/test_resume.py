"""Runs that are killed, stopped by signals, or cannot write, and end as if nothing had happened."""
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import utils
from conftest import ROOT, SHORT, TOY, assert_same, log_lines, run_main, run_script

# 2 epochs of 22 steps, with everything that has a state, and data that is drawn anew each time
RUN = [*TOY, '--data_set', 'DIGITS', '--epochs', '2', '--warmup_epochs', '1', '--lr', '1e-3', '--drop_path', '0.2', '--model_ema',
       '--model_ema_eval', '--num_workers', '1', '--save_ckpt_steps', '3', '--save_ckpt_freq', '1']


def start(output_dir: Path, processes: int = 1, *options, limit: int | None = None) -> subprocess.Popen:
    """main.py, or torch.distributed.run with it; no file may grow beyond `limit` bytes."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    return start_python(output_dir, *launcher, 'main.py', *options_of(output_dir, processes), *options, limit=limit)


def options_of(output_dir: Path, processes: int = 1) -> list[str]:
    return [*RUN, '--batch_size', str(64 // processes), '--output_dir', str(output_dir),
            '--log_dir', str(output_dir / 'tensorboard')]


def start_python(output_dir: Path, *arguments: str, cwd: Path = ROOT, limit: int | None = None) -> subprocess.Popen:
    with open(f'{output_dir}.out', 'a') as printed:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, stdout=printed, stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONFAULTHANDLER': '1', 'RUN': str(output_dir)},  # RUN: to be found by
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))


def printed(output_dir: Path) -> str:
    return Path(f'{output_dir}.out').read_text()


def wait_for_save(run: subprocess.Popen, output_dir: Path) -> None:
    """Until the run has saved, or ended."""
    def saved() -> int:
        return (output_dir / 'latest.pth').stat().st_mtime_ns if (output_dir / 'latest.pth').exists() else 0
    before = saved()
    assert wait_until(lambda: saved() != before or run.poll() is not None, 120), printed(output_dir)


def processes_of(output_dir: Path) -> list[int]:
    """Every process of a run: launcher, trainers, the servers of their loaders' workers, and these."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it may have ended
            if f'RUN={output_dir}'.encode() in (folder / 'environ').read_bytes().split(b'\0'):
                found.append(int(folder.name))
    return found


def trainers_of(run: subprocess.Popen, processes: int) -> list[int]:
    """The training processes, without what they started."""
    if processes == 1:
        return [run.pid]
    found = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()


def finish(run: subprocess.Popen, output_dir: Path, seconds: float = 120) -> int:
    """The exit status; a run that hangs, or leaves a process, is an error that shows where."""
    ended = wait_until(lambda: run.poll() is not None, seconds)
    if not ended or not wait_until(lambda: not processes_of(output_dir), 30):
        left = processes_of(output_dir)
        kill(left, signal.SIGABRT)  # faulthandler prints the stacks
        time.sleep(5)
        kill(left)
        pytest.fail(f'processes {left} hang:\n{printed(output_dir)}')
    return run.returncode


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
    assert sorted(path.name for path in output_dir.glob('*.pth')) == names and 'checkpoint-best-ema.pth' in names
    for name in names:
        one, other = (torch.load(folder / name, weights_only=True) for folder in (output_dir, whole))
        del one['args'], other['args']  # the folder is in there
        assert_same(one, other, name)
    assert (output_dir / 'log.txt').read_text() == (whole / 'log.txt').read_text()
    assert scalars(output_dir) == scalars(whole)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """whole(processes): the folder of a run that nobody disturbed."""
    made = {}

    def folder(processes: int = 1) -> Path:
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp('runs') / f'whole{processes}'
            assert finish(start(made[processes], processes), made[processes]) == 0, printed(made[processes])
        return made[processes]
    return folder


@pytest.mark.parametrize('processes, kills', [(1, 3), (4, 2), pytest.param(1, 20, marks=pytest.mark.slow),
                                              pytest.param(4, 20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_to_the_bit_like_one_that_was_not(processes, kills, whole, tmp_path):
    whole, killed = whole(processes), tmp_path / 'killed'
    draw = random.Random(kills)
    for i in range(kills):
        run = start(killed, processes)
        if i == 0 or draw.random() < 0.8:
            wait_for_save(run, killed)
        time.sleep(draw.uniform(0, 0.7))
        trainers = trainers_of(run, processes)
        # one of the trainers, or all and the launcher; what these started must end by itself
        kill([draw.choice(trainers)] if trainers and draw.random() < 0.5 else [run.pid, *trainers])
        finish(run, killed)
    assert finish(start(killed, processes), killed) == 0, printed(killed)
    assert_same_run(killed, whole)
    assert 'Going on with epoch 0 of 2, step ' in printed(killed)


@pytest.mark.parametrize('number, processes', [(signal.SIGTERM, 1), (signal.SIGUSR2, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(number, processes, whole, tmp_path):
    whole, stopped = whole(processes), tmp_path / 'stopped'
    run = start(stopped, processes, '--save_ckpt_steps', '5')
    wait_for_save(run, stopped)
    run.send_signal(number)  # a launcher passes it on
    status = finish(run, stopped)
    assert status == 128 + number if processes == 1 else status
    assert f'{number.name} in epoch 0, step ' in printed(stopped) and 'leaving. The same command goes on' in printed(stopped)
    checkpoint = torch.load(stopped / 'latest.pth', weights_only=True)
    assert f'step {checkpoint["step"]} of 22: saved in {stopped}' in printed(stopped)
    assert finish(start(stopped, processes), stopped) == 0
    assert_same_run(stopped, whole)


def test_a_signal_in_an_evaluation_costs_no_training(imagenet, tmp_path, monkeypatch, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir']
    run_main(*options, tmp_path / 'whole')
    evaluate = run_main.__globals__['main'].evaluate

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)
    with monkeypatch.context() as patch, pytest.raises(utils.Stopped) as stopped:
        patch.setattr('main.evaluate', signalled)
        run_main(*options, tmp_path / 'stopped')
    assert stopped.value.code == 143 and 'SIGTERM in the evaluation of epoch 0' in capsys.readouterr().out
    assert not (tmp_path / 'stopped' / 'log.txt').exists()
    run_main(*options, tmp_path / 'stopped')
    assert (tmp_path / 'stopped' / 'log.txt').read_text() == (tmp_path / 'whole' / 'log.txt').read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_leaves_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    with utils.StopRequests(torch.device('cpu')) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.agreed() == signal.SIGTERM
        left = []
        monkeypatch.setattr(utils.time, 'monotonic', lambda: stop.since + 2)
        monkeypatch.setattr(utils.os, 'kill', lambda pid, number: left.append((pid, number)))
        signal.raise_signal(signal.SIGTERM)
        assert left == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_submitits_handler_stays_and_its_slurm_job_does_not_end_by_itself(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SUBMITIT_EXECUTOR', 'slurm')
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        theirs = signal.getsignal(signal.SIGUSR2)
        with utils.StopRequests(torch.device('cpu')):
            assert signal.getsignal(signal.SIGUSR2) is theirs
    finally:
        signal.signal(signal.SIGUSR2, before)
    train_one_epoch = run_main.__globals__['main'].train_one_epoch

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_one_epoch(*arguments)
    monkeypatch.setattr('main.train_one_epoch', signalled)
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run')
    assert 'SIGTERM in epoch 0, step 1 of 2: saved' in capsys.readouterr().out
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]


class Slow(torch.utils.data.Dataset):
    """A data set whose images take a while."""
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(0.5)
        return index


def test_loaders_workers_and_their_server_outlive_the_signals_of_launchers():
    loader = torch.utils.data.DataLoader(Slow(), **utils.worker_options(1))
    batches = iter(loader)
    worker, = batches._workers
    server = int(subprocess.check_output(['ps', '-o', 'ppid=', '-p', str(worker.pid)]))
    assert server != os.getpid() and next(batches) == 0
    for number in (signal.SIGTERM, signal.SIGUSR2):
        os.kill(worker.pid, number)
        os.kill(server, number)
    assert [int(batch) for batch in batches] == [1, 2, 3]
    assert [int(batch) for batch in loader] == [0, 1, 2, 3] and batches._workers == [worker] and worker.is_alive()


def test_a_process_with_workers_left_ends():
    done = run_script('python', '-c', """
import sys
import torch, utils
from test_resume import Slow
batches = iter(torch.utils.data.DataLoader(Slow(), **utils.worker_options(2)))
next(batches)
sys.exit(7)
""", PYTHONPATH=f'{ROOT}:{ROOT}/tests')
    assert (done.returncode, done.stdout) == (7, '')


# What threads of gloo's and NCCL's do now and then: become a thread of Python's and no more. Python before 3.12 holds a lock
# meanwhile that its fork takes over as it is.
BUSY_THREAD = """
#include <atomic>
#include <thread>
extern "C" {
void *PyInterpreterState_Main(), *PyThreadState_New(void *);
void PyThreadState_Delete(void *);
std::atomic<bool> ends;
std::thread *thread;
void start() {
  thread = new std::thread([] { while (!ends) PyThreadState_Delete(PyThreadState_New(PyInterpreterState_Main())); });
}
void stop() { ends = true, thread->join(); }
}
"""


@pytest.mark.skipif(not shutil.which('g++'), reason='g++ is needed')
def test_a_thread_that_takes_pythons_locks_hangs_no_worker(whole, tmp_path):
    (tmp_path / 'busy.cpp').write_text(BUSY_THREAD)
    subprocess.run(['g++', '-shared', '-fPIC', '-pthread', '-o', tmp_path / 'busy.so', tmp_path / 'busy.cpp'], check=True)
    output_dir = tmp_path / 'run'
    run = start_python(output_dir, '-c', f"""
import ctypes, main
busy = ctypes.CDLL({str(tmp_path / 'busy.so')!r})
busy.start()
main.main(main.get_args_parser().parse_args({options_of(output_dir)!r}))
busy.stop()
""")
    assert finish(run, output_dir) == 0, printed(output_dir)
    assert_same_run(output_dir, whole())


def test_workers_take_no_module_from_the_current_folder(imagenet, tmp_path):
    for name in ('main', 'datasets', 'utils'):
        (tmp_path / f'{name}.py').write_text('raise SystemExit("not this one")')
    options = [str(option) for option in (*SHORT, '--data_path', imagenet, '--num_workers', 1, '--output_dir', tmp_path / 'run')]
    run = start_python(tmp_path / 'run', str(ROOT / 'main.py'), *options, cwd=tmp_path)
    assert finish(run, tmp_path / 'run') == 0, printed(tmp_path / 'run')
    assert 'not this one' not in printed(tmp_path / 'run') and len(log_lines(tmp_path / 'run')) == 2


def test_a_signal_at_the_exit_does_not_change_its_status():
    """SLURM's warning of a time limit may come to a run that has just ended."""
    done = run_script('python', '-c', """
import atexit, os, signal
import utils
for number in (signal.SIGTERM, signal.SIGUSR2):
    atexit.register(os.kill, os.getpid(), number)
atexit.register(utils.ignore_stop_signals)  # the last comes first
""", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (0, '')


def test_a_full_disk_costs_the_save_and_not_the_training(whole, tmp_path):
    full = tmp_path / 'full'
    # bytes: less than a checkpoint, more than the logs; a worker's shared memory would count too
    run = start(full, 1, '--num_workers', '0', limit=2 ** 20)
    assert finish(run, full) == 1
    text = printed(full)
    assert text.count('WARNING: ') >= 3 and 'latest.pth could not be written' in text and 'MiB are free there' in text
    assert 'ERROR: ' in text and 'the same command goes on' in text and 'Traceback' not in text
    assert not list(full.glob('*.pth')) and not list(full.glob('.*'))
    assert (full / 'log.txt').read_text() == (whole() / 'log.txt').read_text()  # it trained to the end
    assert finish(start(full), full) == 0
    assert_same_run(full, whole())


def test_a_step_that_the_epoch_does_not_have_is_told(imagenet, tmp_path):
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--epochs', '1')
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    torch.save({**checkpoint, 'step': 2}, tmp_path / 'other.pth')
    with pytest.raises(utils.UserError, match='is at step 2 of an epoch, which has 2 here'):
        run_main(*SHORT, '--data_path', imagenet, '--resume', tmp_path / 'other.pth')


def test_a_folder_that_cannot_be_written_to_is_told_before_training(imagenet, tmp_path):
    (tmp_path / 'file').write_text('no folder')
    with pytest.raises(utils.UserError, match=r'--output_dir .*file/run cannot be written to'):
        run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'file' / 'run')
