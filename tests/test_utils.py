"""Schedules, seeds, messages, and what a run on another system or console does."""
import io
import os

import numpy as np
import pytest
import torch

import utils
from conftest import ROOT, SHORT, log_lines, run_first_epoch, run_script


def test_cosine_schedules_are_the_published_ones(golden):
    for case in golden('training')['cosine_scheduler']:
        np.testing.assert_allclose(utils.cosine_scheduler(**case['args']), case['values'], rtol=1e-12,
                                   atol=1e-15)


@pytest.mark.parametrize('warmup', [{'warmup_epochs': 20}, {'warmup_steps': 99}])
def test_a_warm_up_longer_than_the_run_is_cut_to_it(warmup):
    with pytest.warns(UserWarning, match='longer than the run of 10'):
        values = utils.cosine_scheduler(1.0, 0.0, 2, 5, **warmup)
    np.testing.assert_allclose(values, np.linspace(0, 1, 10))


def test_warmup_steps_need_no_warmup_epochs():
    np.testing.assert_allclose(utils.cosine_scheduler(1.0, 1.0, 1, 5, warmup_steps=3), [0, 0.5, 1, 1, 1])


def test_seeds_make_the_same_draws_everywhere():
    def draws(*key):
        import random
        utils.seed_generators(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()
    assert draws('step', 0, 5, 1) == draws('step', 0, 5, 1)
    assert draws('step', 0, 5, 1) != draws('step', 0, 5, 2)
    assert draws('step', 0, 5, 1) != draws('sample', 0, 5, 1)
    assert draws('step', -1, 5) == draws('step', -1, 5)
    assert draws('step', 2 ** 32, 5) != draws('step', 0, 5)


def test_lists_in_messages_are_short():
    assert utils.listed([]) == ''
    assert utils.listed(['cat', 'dog']) == 'cat, dog'
    told = utils.listed([f'class{i}' for i in range(1000)])
    assert told == 'class0, class1, class2, class3, class4, class5 and 994 more'


def test_curves_begun_within_one_second_overwrite_none(tmp_path, monkeypatch):
    """A run that is killed and started again at once keeps what the first one wrote."""
    monkeypatch.setattr('time.time', lambda: 1.8e9)
    sizes = []
    for _ in range(2):
        curves = utils.TensorboardLogger(str(tmp_path), '.run')
        curves.update(loss=1.0)
        curves.writer.close()
        sizes.append(sorted(file.stat().st_size for file in tmp_path.glob('events.out.tfevents.*.run')))
    assert sizes[1] == sizes[0] * 2


WITHOUT_UNIX = """
# a simulation: what Windows lacks is taken away, and folders are not opened
import multiprocessing, os, signal, sys
for module in ('resource', 'fcntl', 'termios'):
    sys.modules[module] = None
for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGQUIT', 'pthread_sigmask'):
    delattr(signal, name)
for name in ('O_DIRECTORY', 'getloadavg'):
    delattr(os, name)
multiprocessing.get_all_start_methods = lambda: ['spawn']
open_file = os.open
def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(path)
    return open_file(path, *arguments, **options)
os.open = open_no_folder
"""


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_system_without_forks_hangups_and_resource_limits_trains_and_evaluates(workers, imagenet, tmp_path):
    (tmp_path / 'without_unix.py').write_text(f"""{WITHOUT_UNIX}
if __name__ == '__main__':
    import main, utils
    from erf import analyze_erf, visualize_erf
    from tools import benchmark, convert, export, predict, shape_bias
    sys.argv[0] = 'main.py'
    with utils.script():
        main.main(main.get_args_parser().parse_args())
""")
    options = [*SHORT, '--data_path', imagenet, '--num_workers', workers, '--output_dir', tmp_path / 'run']
    done = run_script('python', tmp_path / 'without_unix.py', *options, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and 'memory nan MiB' in done.stdout, done.stdout
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]


# neither UTF-8 in the console nor in names of files
ASCII = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}


def test_names_that_the_console_cannot_show_are_shown_as_escapes(imagenet, tmp_path):
    data, output = os.fsencode(tmp_path) + b'/d\xff\xc3\xa4', os.fsencode(tmp_path) + b'/\xc3\xbc\xfe'
    os.rename(imagenet, data)
    for folder in (b'train', b'val'):
        os.rename(data + b'/' + folder + b'/class1', data + b'/' + folder + b'/\xfc')
    options = ['--data_path', os.fsdecode(data), '--output_dir', os.fsdecode(output), '--log_dir',
               os.fsdecode(output)]
    run_first_epoch(*SHORT, *options)
    done = run_script('python', 'main.py', *SHORT, *options, **ASCII)
    assert done.returncode == 0 and '\\udcfe/latest.pth' in done.stdout, done.stdout


@pytest.mark.slow
def test_an_error_that_the_console_cannot_show_is_shown_as_escapes(tmp_path):
    missing = os.fsdecode(os.fsencode(tmp_path) + b'/\xc3\xbc\xfe')
    done = run_script('python', 'main.py', *SHORT, '--data_path', missing, **ASCII)
    assert done.returncode == 1 and 'ERROR: there is no folder ' in done.stdout, done.stdout
    assert 'Traceback' not in done.stdout and '\\udcfe' in done.stdout, done.stdout


def test_a_line_that_stdout_cannot_show_is_shown_as_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(written, 'ascii'))
    utils.log('\xfcber \udcff')
    assert written.getvalue() == b'\\xfcber \\udcff\n'
