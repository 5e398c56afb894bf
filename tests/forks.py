"""Processes that begin at once: forked from one that has imported main.py, which takes a new one many
seconds.

That one has computed nothing when it forks, since libgomp hangs in the child of a process that has. A child
runs a function in a session of its own, with the signal handlers of a fresh process, and ends as Python ends.
"""
import atexit
import contextlib
import functools
import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Fork:
    """A forked process: its pid, which is its session's number too, and its status."""

    def __init__(self):
        self.begun, self.ended = threading.Event(), threading.Event()
        self.pid = self.returncode = None

    def poll(self) -> int | None:
        """The exit status as subprocess has it, or None while the process runs."""
        return self.returncode

    def wait(self, seconds: float = 120) -> int:
        """The exit status; TimeoutError, and the session is killed, where that takes too long."""
        if not self.ended.wait(seconds):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f'process {self.pid} has not ended in {seconds} s')
        return self.returncode


def fork(function: str, *arguments: object, printed: Path, cwd: Path = ROOT, limit: int | None = None,
         **env: str) -> Fork:
    """Run `module:function` with arguments of JSON in a new process; what it prints is appended to a file.

    limit: bytes that no file of the process may grow beyond.
    """
    return _server().fork({'function': function, 'arguments': arguments, 'printed': str(printed),
                           'cwd': str(cwd),
                           'limit': limit, 'env': env})


def command_line(*options: str) -> None:
    """In a fork: what `python main.py OPTIONS` does."""
    import main
    import utils
    args = ArgumentParser('main.py', parents=[main.get_args_parser()]).parse_args(options)
    with utils.script():
        main.main(args)


@functools.cache
def _server() -> '_Server':
    return _Server()


class _Server:
    """The process that forks, as its client sees it."""

    def __init__(self):
        replies, theirs = os.pipe()
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}:{ROOT}/tests'}
        self.process = subprocess.Popen([sys.executable, __file__, str(theirs)], stdin=subprocess.PIPE,
                                        env=env, pass_fds=[theirs], cwd=ROOT, text=True)
        os.close(theirs)
        self.forks = []
        self.replies = os.fdopen(replies)
        threading.Thread(target=self._read, daemon=True).start()
        atexit.register(self.process.communicate)  # which tells it to end

    def fork(self, request: dict) -> Fork:
        fork = Fork()
        self.forks.append(fork)
        self.process.stdin.write(json.dumps({**request, 'number': len(self.forks) - 1}) + '\n')
        self.process.stdin.flush()
        assert fork.begun.wait(120), 'the process that forks is gone'
        return fork

    def _read(self) -> None:
        for line in self.replies:
            number, pid, status = json.loads(line)
            fork = self.forks[number]
            if status is None:
                fork.pid = pid
                fork.begun.set()
            else:
                fork.returncode = status
                fork.ended.set()


def _serve(replies: int) -> None:
    """In the server: fork for each line of stdin; reply [number, pid, status] at begin and end."""
    import sklearn.datasets  # noqa: F401  as runs do later
    import tensorboardX.event_file_writer  # noqa: F401

    import main  # noqa: F401
    requests, running = b'', {}
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            if selector.select(0.02):
                read = os.read(0, 65536)
                if not read:
                    break
                requests += read
            while b'\n' in requests:
                line, _, requests = requests.partition(b'\n')
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    os.close(replies)
                    return _run(request)
                running[pid] = request['number']
                _reply(replies, request['number'], pid, None)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                _reply(replies, running.pop(pid), pid, os.waitstatus_to_exitcode(status))
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _reply(replies: int, *reply: int | None) -> None:
    os.write(replies, json.dumps(reply).encode() + b'\n')


def _run(request: dict) -> None:
    """In the new process: become one of its own, and call the function."""
    os.setsid()
    with open(request['printed'], 'ab') as printed, open(os.devnull, 'rb') as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.chdir(request['cwd'])
    os.environ.update(request['env'])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request['limit']:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request['limit'], request['limit']))
    module, function = request['function'].split(':')
    getattr(importlib.import_module(module), function)(*request['arguments'])


if __name__ == '__main__':
    _serve(int(sys.argv[1]))
