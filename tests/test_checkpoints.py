"""Training checkpoints and the log: what is written, what a failure leaves, which one a run goes on from."""
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints


def test_the_log_is_valid_json_and_has_each_epoch_once(tmp_path):
    log = tmp_path / 'log.txt'
    for epoch in range(3):
        checkpoints.append_to_log(tmp_path, {'train_loss': math.inf if epoch == 1 else 0.5, 'epoch': epoch})
    log.write_text(log.read_text() + '{"train_loss": 0.')  # a line that a kill cut off
    checkpoints.cut_log(log, 2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == [{'train_loss': 0.5, 'epoch': 0}, {'train_loss': None, 'epoch': 1}]


def test_checkpoints_hold_plain_values_only(tmp_path):
    checkpoints.save_checkpoint(tmp_path / 'a.pth', {
        'optimizer': {'param_groups': [{'lr': np.float64(0.5), 'betas': (0.9, 0.999)}]},
        'args': {'output_dir': Path('/runs'), 'cutmix_minmax': None}, 'model': {'w': torch.ones(2)}})
    content = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert content['optimizer'] == {'param_groups': [{'lr': 0.5, 'betas': [0.9, 0.999]}]}
    assert content['args'] == {'output_dir': '/runs', 'cutmix_minmax': None}


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path / 'latest.pth', {'epoch': 1})

    def full_disk(content, path):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='No space'):
        checkpoints.save_checkpoint(tmp_path / 'latest.pth', {'epoch': 2})
    assert os.listdir(tmp_path) == ['latest.pth']
    assert torch.load(tmp_path / 'latest.pth', weights_only=True) == {'epoch': 1}


def write(folder: Path, name: str, epoch: int) -> None:
    checkpoints.save_checkpoint(folder / name, {'model': {}, 'optimizer': {}, 'epoch': epoch})


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
        content = {'model': {'w': torch.ones(2)}, 'optimizer': {'state': {0: {'mean': torch.ones(2)}}},
                   'epoch': 4}
        next(tensor for name, tensor in checkpoints.tensors_in(content)
             if name.startswith(part))[1] = math.nan
        checkpoints.save_checkpoint(tmp_path / 'latest.pth', content)
        assert checkpoints.newest_checkpoint(tmp_path)[0].name == 'checkpoint-3.pth'
    printed = capsys.readouterr().out
    assert re.search(r'Passed over: .*latest\.pth holds values that are not finite, the first in model/w',
                     printed)
    assert 'the first in optimizer/state/0/mean' in printed


def test_pruning_keeps_the_newest_also_off_the_grid(tmp_path):
    for epoch in (19, 39, 59, 65):
        write(tmp_path, f'checkpoint-{epoch}.pth', epoch)
    write(tmp_path, 'checkpoint-best.pth', 40)
    checkpoints.prune_checkpoints(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-59.pth', 'checkpoint-65.pth', 'checkpoint-best.pth']
    checkpoints.prune_checkpoints(tmp_path, 0)
    assert (tmp_path / 'checkpoint-65.pth').exists()


def test_links_are_there_before_the_file_that_a_run_goes_on_from(tmp_path, monkeypatch):
    latest, best = tmp_path / 'latest.pth', tmp_path / 'checkpoint-best.pth'
    checkpoints.save_checkpoint(latest, {'epoch': 1}, [best])
    assert latest.samefile(best)
    replace = os.replace

    def killed(source, target):
        if Path(target) == latest:
            raise OSError('killed')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(OSError, match='killed'):
        checkpoints.save_checkpoint(latest, {'epoch': 2}, [best])
    assert torch.load(latest, weights_only=True) == {'epoch': 1}  # it will do epoch 2 again, best and all
    assert torch.load(best, weights_only=True) == {'epoch': 2}
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-best.pth', 'latest.pth']
