"""Schedules, processes, logs and training checkpoints."""
import argparse
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import distributed
import utils
from conftest import ROOT, SHORT, log_lines, run_script


def test_cosine_schedules_are_the_published_ones(golden):
    for case in golden('training')['cosine_scheduler']:
        np.testing.assert_allclose(utils.cosine_scheduler(**case['args']), case['values'], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('warmup', [{'warmup_epochs': 20}, {'warmup_steps': 99}])
def test_a_warm_up_longer_than_the_run_is_cut_to_it(warmup):
    with pytest.warns(UserWarning, match='longer than the run of 10'):
        values = utils.cosine_scheduler(1.0, 0.0, 2, 5, **warmup)
    np.testing.assert_allclose(values, np.linspace(0, 1, 10))


def test_warmup_steps_need_no_warmup_epochs():
    np.testing.assert_allclose(utils.cosine_scheduler(1.0, 1.0, 1, 5, warmup_steps=3), [0, 0.5, 1, 1, 1])


def process(monkeypatch, *, device='cpu', local_rank=-1, dist_on_itp=False, **env) -> argparse.Namespace:
    """What init_distributed makes of a launcher's variables, in a process that then has no peers to wait for."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS', 'MASTER_ADDR',
                 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **how: joined.append(backend))
    args = argparse.Namespace(device=device, local_rank=local_rank, dist_on_itp=dist_on_itp, dist_url='env://', world_size=1)
    distributed.init_distributed(args)
    args.joined = joined
    return args


ADDRESS = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': 1}


@pytest.mark.parametrize(('options', 'rank', 'world_size', 'local_rank'), [
    ({}, 0, 1, 0),
    ({'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0}, 0, 1, 0),
    ({'RANK': 5, 'WORLD_SIZE': 8, 'LOCAL_RANK': 1, 'local_rank': 0, **ADDRESS}, 5, 8, 1),  # the variable wins
    ({'RANK': 5, 'WORLD_SIZE': 8, 'local_rank': 1, **ADDRESS}, 5, 8, 1),
    ({'RANK': 5, 'WORLD_SIZE': 8, 'SLURM_LOCALID': 1, **ADDRESS}, 5, 8, 1),
    ({'RANK': 5, 'WORLD_SIZE': 8, **ADDRESS}, 5, 8, 0),  # nobody tells the local rank, and there are no GPUs to share out
    ({'SLURM_PROCID': 0, 'SLURM_STEP_NUM_TASKS': 1, 'SLURM_LOCALID': 0}, 0, 1, 0),  # an interactive shell
    ({'SLURM_PROCID': 3, 'SLURM_STEP_NUM_TASKS': 4, 'SLURM_LOCALID': 1, **ADDRESS}, 3, 4, 1),
    ({'dist_on_itp': True, 'OMPI_COMM_WORLD_RANK': 3, 'OMPI_COMM_WORLD_SIZE': 4, 'OMPI_COMM_WORLD_LOCAL_RANK': 1, **ADDRESS},
     3, 4, 1),
])
def test_launchers_are_recognised(options, rank, world_size, local_rank, monkeypatch):
    args = process(monkeypatch, **options)
    assert (args.rank, args.world_size, args.local_rank) == (rank, world_size, local_rank)
    assert args.joined == (['gloo'] if world_size > 1 else [])


def test_a_local_rank_that_nobody_tells_is_the_rank_within_the_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert process(monkeypatch, RANK=5, WORLD_SIZE=8, **ADDRESS).local_rank == 1


def test_processes_without_an_address_are_told_what_to_set(monkeypatch):
    with pytest.raises(utils.UserError, match='MASTER_ADDR'):
        process(monkeypatch, SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=4)


def test_cuda_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert distributed.select_device('auto') == torch.device('cpu')
    with pytest.raises(utils.UserError, match='--device cuda was asked for, but'):
        distributed.select_device('cuda')
    for unknown in ('gpu', 'meta'):
        with pytest.raises(utils.UserError, match=f'unknown --device {unknown}'):
            distributed.select_device(unknown)


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(utils.UserError, match='process 2 of this node: there is no GPU 2 among the 2'):
        distributed.select_device('auto', 2)


def test_the_log_is_valid_json_and_has_each_epoch_once(tmp_path):
    log = tmp_path / 'log.txt'
    for epoch in range(3):
        checkpoints.append_to_log(log, {'train_loss': math.inf if epoch == 1 else 0.5, 'epoch': epoch})
    log.write_text(log.read_text() + '{"train_loss": 0.')  # a line that a kill cut off
    checkpoints.cut_log(log, 2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [{'train_loss': 0.5, 'epoch': 0}, {'train_loss': None, 'epoch': 1}]


def test_checkpoints_hold_plain_values_only(tmp_path):
    checkpoints.save_checkpoint([tmp_path / 'a.pth'], {
        'optimizer': {'param_groups': [{'lr': np.float64(0.5), 'betas': (0.9, 0.999)}]},
        'args': {'output_dir': Path('/runs'), 'cutmix_minmax': None}, 'model': {'w': torch.ones(2)}})
    content = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert content['optimizer'] == {'param_groups': [{'lr': 0.5, 'betas': [0.9, 0.999]}]}
    assert content['args'] == {'output_dir': '/runs', 'cutmix_minmax': None}


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    checkpoints.save_checkpoint([tmp_path / 'latest.pth'], {'epoch': 1})

    def full_disk(content, path):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='No space'):
        checkpoints.save_checkpoint([tmp_path / 'latest.pth'], {'epoch': 2})
    assert os.listdir(tmp_path) == ['latest.pth']
    assert torch.load(tmp_path / 'latest.pth', weights_only=True) == {'epoch': 1}


def write(folder: Path, name: str, epoch: int) -> None:
    checkpoints.save_checkpoint([folder / name], {'model': {}, 'optimizer': {}, 'epoch': epoch})


def test_the_checkpoint_that_went_furthest_is_found_whatever_its_file_time(tmp_path, capsys):
    assert checkpoints.newest_checkpoint(tmp_path) is None
    write(tmp_path, 'checkpoint-best.pth', 3)
    assert checkpoints.newest_checkpoint(tmp_path)[1]['epoch'] == 3  # better than nothing
    write(tmp_path, 'checkpoint-9.pth', 9)
    write(tmp_path, 'checkpoint-10.pth', 10)
    write(tmp_path, 'latest.pth', 12)
    os.utime(tmp_path / 'latest.pth', (0, 0))
    assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'latest.pth'
    (tmp_path / 'latest.pth').write_bytes((tmp_path / 'latest.pth').read_bytes()[:100])
    assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'checkpoint-10.pth'
    assert 'Passed over' in capsys.readouterr().out
    torch.save({'weights': torch.ones(1)}, tmp_path / 'checkpoint-10.pth')  # somebody else's file
    assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'checkpoint-9.pth'
    write(tmp_path, 'latest.pth', 2)  # older than a numbered one
    assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'checkpoint-9.pth'


def test_a_checkpoint_of_a_run_that_diverged_is_passed_over(tmp_path, capsys):
    write(tmp_path, 'checkpoint-3.pth', 3)
    for part in ('model', 'optimizer'):
        content = {'model': {'w': torch.ones(2)}, 'optimizer': {'state': {0: {'mean': torch.ones(2)}}}, 'epoch': 4}
        next(tensor for name, tensor in checkpoints.tensors_in(content) if name.startswith(part))[1] = math.nan
        checkpoints.save_checkpoint([tmp_path / 'latest.pth'], content)
        assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'checkpoint-3.pth'
    printed = capsys.readouterr().out
    assert re.search(r'Passed over: .*latest\.pth holds values that are not finite, the first in model/w', printed)
    assert 'the first in optimizer/state/0/mean' in printed


def test_pruning_keeps_the_newest_also_off_the_grid(tmp_path):
    for epoch in (19, 39, 59, 65):
        write(tmp_path, f'checkpoint-{epoch}.pth', epoch)
    write(tmp_path, 'checkpoint-best.pth', 40)
    checkpoints.prune_checkpoints(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-59.pth', 'checkpoint-65.pth', 'checkpoint-best.pth']
    checkpoints.prune_checkpoints(tmp_path, 0)
    assert (tmp_path / 'checkpoint-65.pth').exists()


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
    assert utils.listed([f'class{i}' for i in range(1000)]) == 'class0, class1, class2, class3, class4, class5 and 994 more'


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


def test_a_system_without_forks_hangups_and_resource_limits_trains_and_evaluates(imagenet, tmp_path):
    (tmp_path / 'without_unix.py').write_text(f"""{WITHOUT_UNIX}
if __name__ == '__main__':
    import main, utils
    from erf import analyze_erf, visualize_erf
    from tools import benchmark, convert, export_onnx, predict, shape_bias
    sys.argv[0] = 'main.py'
    with utils.script():
        main.main(main.get_args_parser().parse_args())
""")
    options = [*SHORT, '--data_path', imagenet, '--num_workers', 1, '--output_dir', tmp_path / 'run']
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
    for resumed in range(2):
        options = ['--data_path', os.fsdecode(data), '--output_dir', os.fsdecode(output), '--log_dir', os.fsdecode(output)]
        done = run_script('python', 'main.py', *SHORT, *options, **ASCII)
        assert done.returncode == 0 and f'\\udcfe{"/latest.pth" * resumed}' in done.stdout, done.stdout
    done = run_script('python', 'main.py', *SHORT, '--data_path', os.fsdecode(output), **ASCII)
    assert done.returncode == 1 and 'ERROR: there is no folder ' in done.stdout and 'Traceback' not in done.stdout, done.stdout


def test_a_line_that_stdout_cannot_show_is_shown_as_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(written, 'ascii'))
    utils.log('\xfcber \udcff')
    assert written.getvalue() == b'\\xfcber \\udcff\n'
