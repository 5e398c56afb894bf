"""tools/: what holds for every script there."""
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

from conftest import ROOT, run_script


def run_command(script: Path | str, *options) -> int | str:
    """A script as its command line starts it, in this process; its exit status, or the error it ends with."""
    command = [str(script), *map(str, options)]
    with mock.patch.object(sys, 'argv', command), mock.patch.object(sys, 'path', [*sys.path]):
        try:
            runpy.run_path(command[0], run_name='__main__')
        except SystemExit as end:
            return end.code or 0
    return 0


# starts each script in turn, and in between forgets what it found in the repository
START_ALL = f"""
import pathlib, runpy, sys

root = pathlib.Path({str(ROOT)!r})
path = [entry for entry in sys.path if pathlib.Path(entry) != root]
ours = ('checkpoints', 'datasets', 'distributed', 'options', 'tools', 'utils')
for script in sorted(root.glob('tools/*.py')):
    if "if __name__ == '__main__':" in script.read_text():
        sys.path[:], sys.argv[:] = path, [str(script), '--help']
        for name in [name for name in sys.modules if name.split('.')[0] in ours]:
            del sys.modules[name]
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as end:
            print(script.name, 'ended with', end.code)
"""


def test_every_script_starts_in_any_folder(tmp_path):
    (tmp_path / 'start_all.py').write_text(START_ALL)
    done = run_script('python', tmp_path / 'start_all.py', cwd=tmp_path, PYTHONPATH='')
    ended = [line for line in done.stdout.splitlines() if ' ended with ' in line]
    names = ('benchmark', 'check_images', 'convert', 'export', 'predict', 'shape_bias')
    assert {f'{name}.py ended with 0' for name in names} <= set(ended) and done.returncode == 0, done.stdout


@pytest.mark.parametrize(('script', 'options', 'error'), [
    ('benchmark', ['model', '--models', 'RepLKNet-32B'], 'unknown --models RepLKNet-32B'),
    ('check_images', ['nowhere'], 'there is no folder nowhere'),
    ('convert', ['nowhere.pth', 'a.pth'], 'there is no checkpoint nowhere.pth'),
    ('export', ['--to', 'onnx', '--model', 'RepLKNet-32B', 'toy.onnx'], 'unknown --model RepLKNet-32B'),
    ('predict', ['nowhere.png', '--weights', 'toy.pth', '--device', 'cpu'],
     'there is no file or folder nowhere.png'),
    ('shape_bias', ['nowhere', '--weights', 'toy.pth', '--device', 'cpu'], 'there is no folder nowhere'),
])
def test_every_script_says_in_one_line_what_is_wrong(script, options, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(run_command(ROOT / 'tools' / f'{script}.py', *options)).startswith(f'ERROR: {error}')
