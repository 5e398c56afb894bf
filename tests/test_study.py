"""study/: the plan's networks, its runner on a few made images, and the report."""
import itertools
import json

import numpy as np
import pytest
import torch

import replknet
from image_data.fashion_mnist import write_idx
from study import networks, report, run
from utils import UserError


def test_networks_differ_in_what_their_names_say():
    for name in networks.NETWORKS:
        model = getattr(networks, name)()
        kernel = int(name.partition('_')[0].removeprefix('k'))
        blocks = [module for module in model.modules() if isinstance(module, replknet.RepLKBlock)]
        assert {block.large_kernel.kernel_size for block in blocks} == {kernel}
        assert {block.large_kernel.small_kernel for block in blocks} == {5 if 'small5' in name else None}
        assert {type(block) is replknet.RepLKBlock for block in blocks} == {'no_shortcut' not in name}
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_without_a_shortcut_a_block_is_its_branch():
    torch.manual_seed(0)
    block, x = networks.small_replknet(7).eval().stages[0].blocks[0], torch.randn(2, 16, 8, 8)
    with_shortcut = block(x)
    block.__class__ = networks.RepLKBlockWithoutShortcut
    torch.testing.assert_close(block(x) + x, with_shortcut)


@pytest.fixture
def short_plan(tmp_path, monkeypatch):
    """The plan with made images, of which there are few, at 32 px."""
    random = np.random.RandomState(0)
    for part, count in (('train', 40), ('t10k', 20)):
        write_idx(tmp_path / f'{part}-images-idx3-ubyte.gz', random.randint(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f'{part}-labels-idx1-ubyte.gz', np.arange(count) % 10)
    for name, value in (('DEBIANS', str(tmp_path)), ('SIZE', 32), ('BATCH_SIZE', 8), ('ERF_IMAGES', 2),
                        ('TASKS', {'fashion': run.Task('FMNIST', 1)}),
                        ('FASHION_IMAGES', {'train': 16, 't10k': 12})):
        monkeypatch.setattr(run, name, value)
    return tmp_path / 'output'


def test_a_run_is_measured_once_and_reported(short_plan, tmp_path, capsys, monkeypatch):
    words = ['--output', str(short_plan), '--tasks', 'fashion', '--networks', 'k7_small5', '--seeds', '3']
    run.main(run.get_args_parser().parse_args(words))
    result = json.loads((short_plan / 'fashion' / 'k7_small5' / '3' / 'result.json').read_text())
    assert (result['network'], result['seed'], len(result['acc1_of_epochs'])) == ('k7_small5', 3, 1)
    assert result['acc1'] in [100 * i / 12 for i in range(13)] and set(result['erf']) == {'0.5', '0.99'}
    monkeypatch.setattr(run, 'train', lambda *_: pytest.fail('trained again'))
    run.main(run.get_args_parser().parse_args(words))
    words = ['--output', str(short_plan), '--json', str(tmp_path / 'all.json'), '--plot',
             str(tmp_path / 'all.png')]
    report.main(report.get_args_parser().parse_args(words))
    assert f'| k7_small5 | {result["acc1"]:.1f} |  | {result["erf"]["0.5"]:.2f} |' in capsys.readouterr().out
    assert json.loads((tmp_path / 'all.json').read_text()) == [result]
    assert (tmp_path / 'all.png').stat().st_size > 10_000


def test_a_run_that_fails_ends_the_study(short_plan, monkeypatch):
    monkeypatch.setattr(run, 'BATCH_SIZE', 0)
    words = ['--output', str(short_plan), '--networks', 'k3', 'k7', '--tasks', 'fashion', '--seeds', '0']
    with pytest.raises(UserError, match=r'main.py failed: .*console.log'):
        run.main(run.get_args_parser().parse_args(words))
    assert '--batch_size' in (short_plan / 'fashion' / 'k3' / '0' / 'console.log').read_text()


def test_a_mean_has_the_deviation_of_its_seeds():
    runs = [{'task': 'fashion', 'network': 'k3', 'seed': seed, 'acc1': 90 + 2 * seed,
             'erf': {'0.5': 0.25, '0.99': (0.7, None, 1.0)[seed]}} for seed in range(3)]
    runs.append({'task': 'digits', 'network': 'k3', 'seed': 0, 'acc1': 70})
    assert '| k3 | 92.0 ± 2.0 | 70.0 | 0.25 ± 0.00 | 0.90 ± 0.17 | 3 |' in report.table(runs)
    assert '| k7 |  |  |  |  | 0 |' in report.table(runs)


def test_the_table_is_that_of_the_published_results():
    runs = json.loads((run.ROOT / 'study' / 'results.json').read_text())
    planned = itertools.product(run.TASKS, networks.NETWORKS, run.SEEDS)
    assert [(one['task'], one['network'], one['seed']) for one in runs] == list(planned)
    assert report.table(runs) in (run.ROOT / 'study' / 'README.md').read_text()


def test_nothing_to_report_is_told(tmp_path):
    with pytest.raises(UserError, match='there is no result'):
        report.read_runs(tmp_path)
