"""tools/benchmark.py: what it measures, in which order, and what it writes; never how long it takes."""
import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import threading
from unittest import mock

import pytest
import torch
from torch import nn

import datasets
import large_kernel_conv
import replknet_zoo
from image_data.fast import is_usual
from image_data.jpeg import read_header
from tools import benchmark
from tools.benchmarks import accelerated, common, conv, data, fc, gpu, gpu_sections, model, published
from utils import UserError

TINY = ['conv', '--kernels', '3', '7', '--resolutions', '4', '6', '--channels', '4', '--batch', '2',
        '--device', 'cpu']
TOY = ['model', '--models', 'RepLKNet-31T', '--device', 'cpu']


def run_benchmark(*options) -> None:
    """tools/benchmark.py in this process."""
    benchmark.main(benchmark.get_args_parser().parse_args([str(option) for option in options]))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Turns of one call."""
    monkeypatch.setattr(common, 'TURN', 1e-6)
    monkeypatch.setattr(conv, 'SECONDS', 1e-3)
    monkeypatch.setattr(model, 'SECONDS', 1e-3)
    monkeypatch.setattr(accelerated, 'SECONDS', 1e-3)
    monkeypatch.setattr(fc, 'SECONDS', 1e-3)
    monkeypatch.setattr(data, 'SECONDS', 1e-3)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    tf32, search = cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    cudnn.allow_tf32, cudnn.benchmark = tf32, search


@pytest.fixture
def unmeasured(monkeypatch):
    """Fails where anything is measured."""
    monkeypatch.setattr(common, 'measure', lambda *_: pytest.fail('measured'))


# --- measuring ----------------------------------------------------------------------------------------------


@pytest.fixture
def clocked(monkeypatch):
    """clocked(name, *costs): a call that moves the clock by each cost in turn; clocked.order: the names."""
    now, order = [0.0], []
    monkeypatch.setattr(common.time, 'perf_counter', lambda: now[0])

    def contestant(name, *costs):
        costs = itertools.cycle(costs)

        def call():
            order.append(name)
            now[0] += next(costs)
        return call
    contestant.order = order
    return contestant


def test_contestants_take_turns_and_slow_ones_fewer(clocked, monkeypatch):
    monkeypatch.setattr(common, 'TURN', 1 / 64)
    names = {'tiny': 1 / 128, 'small': 1 / 4, 'slow': 4.0}
    times = common.measure({name: clocked(name, cost) for name, cost in names.items()}, seconds=2)
    assert times == names
    # two calls of warm-up each; tiny: 128 turns of 2 calls, small: 8 turns, slow: one
    counts = {name: clocked.order.count(name) for name in names}
    assert counts == {'tiny': 2 + 256, 'small': 2 + 8, 'slow': 2 + 1}
    runs = [(name, len(list(group))) for name, group in itertools.groupby(clocked.order[6:])]
    assert runs == [('tiny', 32), ('small', 1)] * 8 + [('slow', 1)]


def test_a_time_is_the_median_without_the_warm_up(clocked):
    # the first call is thrown away, the second only counted since it fills a turn by itself
    assert common.measure({'a': clocked('a', 1000, 1, 1, 50, 3)}, seconds=3) == {'a': 2.0}


# --- layers -------------------------------------------------------------------------------------------------


def test_the_table_has_every_cell_and_field(tmp_path, capsys):
    outputs = ['--json', tmp_path / 'table.json', '--plot', tmp_path / 'table.png']
    run_benchmark(*TINY, '--threads', '1', *outputs)
    table = json.loads((tmp_path / 'table.json').read_text())
    assert set(table) == {'machine', 'versions', 'arguments', 'results'}
    assert {'name', 'date'} <= set(table['machine'])
    assert table['versions']['torch'] == torch.__version__
    assert table['arguments']['kernels'] == [3, 7]
    cells = [tuple(row[key] for key in ('resolution', 'kernel', 'pass', 'contestant', 'layout'))
             for row in table['results']]
    assert sorted(cells) == sorted(itertools.product(
        (4, 6), (3, 7), ('forward', 'forward+backward'), ('nn.Conv2d', 'ours'), ('NCHW', 'channels_last')))
    x, weight = torch.ones(2, 4, 6, 6), torch.ones(4, 1, 7, 7)
    for row in table['results']:
        assert set(row) >= set(conv.COLUMNS)
        assert (row['dtype'], row['threads'], row['batch'], row['channels']) == ('float32', 1, 2, 4)
        assert row['ms'] > 0
    large = [row for row in table['results']
             if (row['resolution'], row['kernel'], row['pass']) == (6, 7, 'forward')]
    assert {row['shape'] for row in large} == {'2x4x6x6'}
    fastest, _ = large_kernel_conv.implementation(x, weight)
    assert {row['implementation'] for row in large} == {'nn.Conv2d', fastest}
    theirs, ours = (min(row['ms'] for row in large if row['contestant'] == name)
                    for name in ('nn.Conv2d', 'ours'))
    assert [row['best_ratio'] for row in large] == pytest.approx([theirs / ours] * 4)
    assert [row['ratio'] for row in large] == pytest.approx([theirs / row['ms'] for row in large])
    assert (tmp_path / 'table.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['table.json', 'table.png']
    printed = capsys.readouterr().out
    assert f'torch {torch.__version__}' in printed.splitlines()[0]
    assert 'batch 2: scaled to the machine, the paper has 64' in printed
    assert 'a time is for 1 layer, in the paper for 24' in printed
    assert printed.count('2x4x6x6') == 16


def test_a_time_is_for_as_many_layers_as_asked_for(tmp_path, monkeypatch):
    timed = []

    def count_calls(contestants, seconds):
        """A double of the stopwatch: counts how often a layer runs instead."""
        for call in contestants.values():
            layer, times = call.args
            counter = mock.Mock(side_effect=layer)
            call.func(counter, times)
            timed.append(counter.call_count)
        return dict.fromkeys(contestants, 1.0)
    monkeypatch.setattr(common, 'measure', count_calls)
    run_benchmark(*TINY, '--layers', '3', '--json', tmp_path / 'table.json')
    assert set(timed) == {3}
    assert {row['layers'] for row in json.loads((tmp_path / 'table.json').read_text())['results']} == {3}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_layers_agree_and_are_measured(dtype, tmp_path):
    run_benchmark(*TINY, '--dtype', dtype, '--json', tmp_path / 'table.json')
    assert {row['dtype'] for row in json.loads((tmp_path / 'table.json').read_text())['results']} == {dtype}


def test_stages_replace_the_grid(tmp_path, monkeypatch):
    with torch.device('meta'):
        stages = replknet_zoo.create_model('RepLKNet-31B', small_kernel_merged=True).stages
    kernels = [stage.blocks[0].large_kernel.lkb_reparam.weight for stage in stages]
    expected = [(len(kernel), kernel.shape[-1]) for kernel in kernels]
    assert [(channels, side) for channels, _, side in conv.STAGES] == expected
    monkeypatch.setattr(conv, 'STAGES', ((4, 5, 7), (2, 3, 5)))
    run_benchmark('conv', '--stages', '--batch', '1', '--device', 'cpu', '--json', tmp_path / 'stages.json')
    results = json.loads((tmp_path / 'stages.json').read_text())['results']
    assert len(results) == 16
    assert {(row['channels'], row['resolution'], row['kernel']) for row in results} == {(4, 5, 7), (2, 3, 5)}


def test_layers_of_other_networks_replace_the_grid(tmp_path, monkeypatch):
    geometries = (1, 4, 9, 3, 2), (2, 3, (7, 8), (5, 1), 1), (1, 4, (1, 30), (1, 11), 1)
    monkeypatch.setattr(conv, 'GEOMETRY', geometries)
    run_benchmark('conv', '--geometry', '--device', 'cpu', '--json', tmp_path / 'others.json')
    results = json.loads((tmp_path / 'others.json').read_text())['results']
    assert len(results) == 24
    assert {(row['shape'], row['kernel'], row['dilation']) for row in results} == {
        ('1x4x9x9', 3, 2), ('2x3x7x8', '5x1', 1), ('1x4x1x30', '1x11', 1)}


@pytest.mark.parametrize(('wrong', 'what'), [
    (lambda out, weight: out * 1.001, 'output differs by 1.0e-03'),
    (lambda out, weight: out * float('nan'), 'output differs by nan'),
    # the same output, with another gradient
    (lambda out, weight: out + (weight.sum() - weight.sum().detach()), 'weight gradient'),
])
def test_a_wrong_result_is_not_timed(wrong, what, tmp_path, monkeypatch):
    right = large_kernel_conv.depthwise_conv2d  # the double below is a wrong implementation
    monkeypatch.setattr(large_kernel_conv, 'depthwise_conv2d',
                        lambda x, weight, **where: wrong(right(x, weight, **where), weight))
    with pytest.raises(UserError, match=f'K 3: ours NCHW and nn.Conv2d NCHW do not agree: the {what}'):
        run_benchmark(*TINY, '--plot', tmp_path / 'table.png')
    assert not (tmp_path / 'table.png').exists()


# --- models of others ---------------------------------------------------------------------------------------


def test_models_of_others_are_measured_before_and_after(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerated, 'DilatedNet', functools.partial(accelerated.DilatedNet, (8, 16), (1, 1)))
    run_benchmark('accelerated', '--models', 'convnext_atto', 'dilated', '--input_size', '64', '--batch', '1',
                  '--device', 'cpu', '--json', tmp_path / 'others.json')
    results = json.loads((tmp_path / 'others.json').read_text())['results']
    assert [row['contestant'] for row in results] == ['before', 'before', 'after', 'after'] * 4
    assert {(row['model'], row['replaced']) for row in results} == {('convnext_atto', 12), ('dilated', 12)}
    for row in results:
        assert row['images_per_s'] == pytest.approx(1e3 * row['batch'] / row['ms'])
    with pytest.raises(UserError, match='unknown --models resnet17: choose from timm'):
        run_benchmark('accelerated', '--models', 'resnet17')


def test_an_accelerated_model_that_computes_something_else_is_not_timed(monkeypatch, unmeasured):
    right = large_kernel_conv.functional.depthwise_conv2d  # the double below is a wrong implementation
    monkeypatch.setattr(large_kernel_conv.layers, 'depthwise_conv2d', lambda *args: 1.01 * right(*args))
    with pytest.raises(UserError, match='dilated after NCHW: the logits differ by'):
        run_benchmark('accelerated', '--models', 'dilated', '--input_size', '64', '--device', 'cpu')


# --- models -------------------------------------------------------------------------------------------------


def test_models_are_measured_in_inference_and_training(tmp_path, monkeypatch, capsys):
    # a double: each takes a process of its own
    monkeypatch.setattr(model, 'peak_memory', lambda c: 100.0 + c.batch)
    run_benchmark(*TOY, '--batch', '1', '2', '--train_batch', '3', '--json', tmp_path / 'models.json')
    results = json.loads((tmp_path / 'models.json').read_text())['results']
    eager = {('published', 'NCHW'), ('published', 'channels_last'), ('ours eager', 'channels_last')}
    dtypes = ('float32', 'bfloat16')
    compiled = {('ours compiled', 'channels_last', dtype) for dtype in dtypes}
    inference = {(*way, 'float32') for way in eager} | compiled
    training = {(*way, dtype) for way in eager for dtype in dtypes}
    groups = ('inference', 1, inference), ('inference', 2, inference), ('training', 3, training)
    for mode, batch, expected in groups:
        rows = [row for row in results if (row['mode'], row['batch']) == (mode, batch)]
        assert len(rows) == len(expected)
        assert {(row['contestant'], row['layout'], row['dtype']) for row in rows} == expected
        for row in rows:
            assert set(row) >= set(model.COLUMNS)
            assert row['images_per_s'] == pytest.approx(batch / row['ms'] * 1e3)
            published = [other['ms'] for other in rows if other['contestant'] == 'published']
            assert row['ratio'] == pytest.approx(min(published) / row['ms'])  # of all dtypes
            ours = (mode, row['contestant']) == ('training', 'ours eager')
            assert row['memory_mib'] == (103.0 if ours else None)
    # the registry's resolution
    assert {row['shape'] for row in results} == {'1x3x32x32', '2x3x32x32', '3x3x32x32'}
    printed = capsys.readouterr().out
    assert printed.count('RepLKNet-31T') == 17
    assert '\nRepLKNet-31T at 32 px: ' in printed


# parameters in millions, and GMACs: as trained, then merged; all merged ones are in test_replknet.py too
@pytest.mark.parametrize(('name', 'size', 'trained', 'merged'), [
    ('RepLKNet-31B', 224, (79.864, 15.431), (79.527, 15.354)),
    pytest.param('RepLKNet-31B', 384, (79.864, 45.347), (79.527, 45.119), marks=pytest.mark.slow),
    ('RepLKNet-31L', 384, (172.671, 96.332), (172.166, 95.989)),
    pytest.param('RepLKNet-XL', 320, (335.436, 128.730), (335.400, 128.730), marks=pytest.mark.slow),
])
def test_sizes_are_those_of_the_models_table(name, size, trained, merged, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, 'groups', lambda args: [[]])  # nothing is timed
    run_benchmark('model', '--models', name, '--input_size', size, '--json', tmp_path / 'sizes.json')
    (found,) = json.loads((tmp_path / 'sizes.json').read_text())['sizes']
    assert (found['model'], found['input_size']) == (name, size)
    assert (found['parameters'], found['gmacs']) == pytest.approx(trained, abs=5.1e-4)
    assert (found['parameters_merged'], found['gmacs_merged']) == pytest.approx(merged, abs=5.1e-4)
    assert (f'{name} at {size} px: {trained[0]:.3f} M parameters, {trained[1]:.3f} GMACs; merged '
            f'{merged[0]:.3f} M, {merged[1]:.3f} GMACs') in capsys.readouterr().out


def test_the_published_model_is_built_plain_and_unmerged(monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'auto')
    plain, merged = {}, {}
    for contestant in ('published', 'ours eager', 'onnxruntime'):
        c = model.Contestant('RepLKNet-31T', contestant, 'NCHW', 'float32', 'inference', 1, 32, 'cpu', 1)
        built = model.build_model(c)
        assert not built.training
        plain[contestant] = not any(isinstance(m, large_kernel_conv.DepthwiseConv2d) for m in built.modules())
        keys = ' '.join(built.state_dict())
        merged[contestant] = 'lkb_origin' not in keys and 'running_mean' not in keys
    assert plain == {'published': True, 'ours eager': False, 'onnxruntime': True}
    assert merged == {'published': False, 'ours eager': True, 'onnxruntime': True}
    training = model.build_model(c._replace(contestant='ours eager', mode='training'))
    assert 'stages.0.blocks.0.large_kernel.small_conv.conv.weight' in training.state_dict()


def test_peers_that_are_not_installed_are_told(monkeypatch, capsys):
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: installed(name) if name == 'onnx' else None)
    args = benchmark.get_args_parser().parse_args([*TOY, '--peers', '--dtype', 'float32'])
    benchmark.check_options(args)
    assert 'openvino is left out: ' in capsys.readouterr().out
    assert args.runtimes == []
    args.runtimes = ['onnxruntime', 'openvino']  # as if they were
    peers = [(c.model, c.contestant, c.input_size)
             for c in model.contestants_of(args, 'RepLKNet-31T', 'inference', 1)]
    of_timm = [(name, f'timm {way}', 224) for name in model.TIMM_PEERS for way in ('eager', 'compiled')]
    ours = [('RepLKNet-31T', name, 32) for name in ('torch.compile', 'onnxruntime', 'openvino')]
    assert peers[4:] == ours + of_timm


def test_int8_is_left_out_where_the_cpu_does_not_compute_it(monkeypatch, capsys):
    for computed in (True, False):
        monkeypatch.setattr(model, 'onednn_computes', lambda dtype, computed=computed: computed)
        args = benchmark.get_args_parser().parse_args([*TOY, '--int8'])
        benchmark.check_options(args)
        dtypes = {c.dtype for c in model.contestants_of(args, 'RepLKNet-31T', 'inference', 1)}
        assert ('int8' in dtypes) == args.int8 == computed
    assert capsys.readouterr().out == 'int8 is left out: it needs a CPU with VNNI or AMX\n'


def test_memory_is_that_of_a_process_with_one_contestant():
    c = model.Contestant('RepLKNet-31T', 'published', 'NCHW', 'float32', 'training', 2, 32, 'cpu', 1)
    assert 50 < model.peak_memory(c) < 2 ** 20


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('options', 'message'), [
    (['conv', '--kernels', '3', '4'], r'--kernels 4 is even, and same padding needs odd ones: pass 3 or 5'),
    (['conv', '--kernels', '0'], r'--kernels 0 must be at least 1'),
    (['conv', '--batch', '0'], r'--batch 0 must be at least 1'),
    (['conv', '--threads', '-1'], r'--threads -1 must be at least 1'),
    (['conv', '--stages', '--plot', 'table.png'], r'leave out all but one'),
    (['conv', '--stages', '--geometry'], r'leave out all but one'),
    (['conv', '--plot', 'nowhere/table.png'], r'there is no folder nowhere'),
    (['model', '--json', 'nowhere/models.json'], r'there is no folder nowhere'),
    (['model', '--models', 'RepLKNet-32B'],
     r'unknown --models RepLKNet-32B: choose from RepLKNet-31B, .* or from timm'),
    (['model', '--models', 'swin_base_patch4_window7_224', '--input_size', '192'],
     r'takes 224 px, not 192: pass --input_size'),
    (['model', '--batch', '1', '0'], r'--batch 0 must be at least 1'),
    (['gpu', '--device', 'cpu'], r'of a GPU, and this would run on the CPU: --small'),
    (['gpu', '--small', '--minutes', '0'], r'--minutes 0.0 must be more than 0'),
    (['gpu', '--small', '--dtype', 'float16'], r'--dtype float16: the report has several'),
    (['gpu', '--small', '--json', 'report.md'], r'--json report.md: .* name a file that ends in .json'),
])
def test_bad_options_are_told_before_anything_is_measured(options, message, unmeasured):
    with pytest.raises(UserError, match=message):
        run_benchmark(*options)


def test_a_plot_without_matplotlib_is_told_before_anything_is_measured(unmeasured, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"needs matplotlib.*pip install -e '\.\[plot\]'"):
        run_benchmark(*TINY, '--plot', tmp_path / 'table.png')


def test_cuda_that_is_not_there_is_told(unmeasured, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--device cuda was asked for, but this machine has no usable'):
        run_benchmark('conv', '--device', 'cuda')


# --- benchmark.py fc ----------------------------------------------------------------------------------------


def test_the_fcs_of_each_stage_are_timed_in_both_ways(tmp_path, capsys):
    run_benchmark('fc', '--models', 'RepMLPNet-T32', '--batch', '2', '--device', 'cpu', '--json',
                  tmp_path / 'fc.json')
    rows = json.loads((tmp_path / 'fc.json').read_text())['results']
    assert [(row['stage'], row['shape']) for row in rows[::2]] == [
        (1, '32x1x64'), (2, '16x4x16'), (3, '8x16x4'), (4, '8x32x1')]
    assert [row['contestant'] for row in rows] == ['nn.Conv2d', 'ours'] * 4
    assert all(row['ms'] > 0 for row in rows) and rows[0]['ratio'] == 1
    assert 'ratio: time of nn.Conv2d over this one' in capsys.readouterr().out
    for name in ('RepLKNet-31T', 'resnet50'):
        with pytest.raises(UserError, match=f'--models {name}: choose from those of RepMLPNet'):
            run_benchmark('fc', '--models', name)


# --- benchmark.py gpu ---------------------------------------------------------------------------------------

REPORT = ['gpu', '--small', '--device', 'cpu', '--json']
PUBLISHED = ('295.5', '97.0', '50.2', '39.1', '171.4', '734.8', '3,090.4', '8.4', '96.7', '431.7')


def only(monkeypatch, *names) -> None:
    """Leaves these sections, and the checks, with equal shares of the time."""
    kept = [section for section in gpu_sections.SECTIONS if section.name in ('checks', *names)]
    shares = [section._replace(share=1 / len(kept)) for section in kept]
    monkeypatch.setattr(gpu_sections, 'SECTIONS', shares)


def read_report(folder) -> tuple[dict, str]:
    """The sections, and the Markdown."""
    content = json.loads((folder / 'report.json').read_text(),
                         parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    return content['sections'], (folder / 'report.md').read_text()


def test_the_report_has_all_sections_and_what_is_published(tmp_path, capsys):
    run_benchmark(*REPORT, tmp_path / 'report.json')
    sections, text = read_report(tmp_path)
    assert list(sections) == [section.name for section in gpu_sections.SECTIONS]
    assert not any(section['left_out'] for section in sections.values())
    checks = sections['checks']['rows']
    assert len(checks) == 3 * 4 * 2 and all(row['passed'] for row in checks)
    assert {row['precision'] for row in checks} == set(gpu_sections.BOUNDS)
    assert f'{len(checks)} checks passed.' in text and 'Toys on small batches' in text
    rows = [row for name, section in sections.items() if name != 'checks' for row in section['rows']]
    noted = [row for row in rows if 'note' in row]
    assert {row['way'] for row in noted} == {'torch.compile'} and 'left to GPUs' in noted[0]['note']
    timed = [row for row in rows if 'note' not in row]
    assert all(row['ms'] > 0 and row.get('images_per_s', 1) > 0 for row in timed)
    models = {(row['model'], row['form'], row['mode'], row['way']) for row in timed if 'model' in row}
    merged, trained = gpu_sections.MERGED, gpu_sections.TRAINED
    assert models == {
        ('RepLKNet-31T', merged, 'inference', 'eager'), ('RepLKNet-31T', trained, 'training', 'eager'),
        ('convnext_atto', trained, 'inference', 'eager'), ('convnext_atto', trained, 'training', 'eager'),
        ('RepMLPNet-T32', trained, 'inference', 'eager'), ('RepMLPNet-T32', merged, 'inference', 'eager'),
        ('RepLKNet-31T', merged, 'inference', 'compile_for_inference')}
    assert all(0 < row['depthwise_share'] < 1 for row in timed if row.get('way') == 'eager')
    for part in (*PUBLISHED, common.machine_name('cpu'), f'torch {torch.__version__}', '2080 Ti (published)'):
        assert part in text, part
    assert 'Wrote ' in capsys.readouterr().out


def test_the_published_figures_have_a_time_for_each_kernel():
    assert {len(times) for both in published.TABLE_1.values() for times in both.values()} == {10}
    plan = gpu_sections.plan_of(argparse.Namespace(small=False, device='cuda', threads=1))
    wanted = {(384, side, kernel) for side in published.TABLE_1 for kernel in published.TABLE_1_KERNELS}
    assert set(plan.table_1) == wanted and set(plan.table_6) == set(published.TABLE_6)
    assert sum(section.share for section in gpu_sections.SECTIONS) == pytest.approx(1)


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def without_memory(*_):
        """A double: a GPU without memory."""
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 8 GiB\nmore of it')
    monkeypatch.setattr(gpu_sections, 'measure_layer', without_memory)
    monkeypatch.setattr(gpu_sections, 'depthwise_share', without_memory)
    only(monkeypatch, 'stages', 'table 1', 'RepMLPNet')
    run_benchmark(*REPORT, tmp_path / 'report.json')
    sections, text = read_report(tmp_path)
    for name, number in (('stages', 8), ('table 1', 2)):
        notes = [row['note'] for row in sections[name]['rows']]
        assert notes == ['OutOfMemoryError: CUDA out of memory. Tried to allocate 8 GiB'] * number
    rows = sections['RepMLPNet']['rows']  # whose time is had
    assert len(rows) == 4 and all(row['ms'] > 0 and row['note'] == notes[0] for row in rows)
    assert text.count('Tried to allocate 8 GiB') == 14


@pytest.mark.parametrize('wrong', [
    lambda y, weight: y * 1.01,
    lambda y, weight: y * float('nan'),
    lambda y, weight: y + (weight.sum() - weight.sum().detach()),  # the same output, with another gradient
], ids=['output', 'nan', 'gradient'])
def test_a_wrong_convolution_ends_the_report_in_an_error(wrong, tmp_path, monkeypatch):
    right = large_kernel_conv.depthwise_conv2d  # the double below is a wrong implementation
    monkeypatch.setattr(large_kernel_conv, 'depthwise_conv2d',
                        lambda x, weight: wrong(right(x, weight), weight))
    only(monkeypatch, 'table 1')
    with pytest.raises(UserError, match='24 checks of the convolution failed'):
        run_benchmark(*REPORT, tmp_path / 'report.json')
    sections, text = read_report(tmp_path)
    assert not any(row['passed'] for row in sections['checks']['rows']) and sections['table 1']['rows']
    assert '**24 of 24 checks FAILED.**' in text and text.count('| **FAIL** |') == 24


def test_what_does_not_fit_into_the_time_is_named(tmp_path, monkeypatch):
    def tasks(plan):
        """A double of a section: its first task would never end."""
        yield {'layer': 'endless'}, lambda: threading.Event().wait(60) or []
        yield {'layer': 'next'}, lambda: pytest.fail('measured')
    monkeypatch.setattr(gpu, 'AROUND', 0)
    only(monkeypatch, 'inference')
    checks, _ = gpu_sections.SECTIONS
    monkeypatch.setattr(gpu_sections, 'SECTIONS', [
        checks._replace(share=0), gpu_sections.Section('inference', 1, tasks),
        gpu_sections.Section('RepMLPNet', 0, gpu_sections.mlp_tasks)])
    run_benchmark(*REPORT, tmp_path / 'report.json', '--minutes', '0.03')
    sections, text = read_report(tmp_path)
    (row,) = sections['inference']['rows']
    assert (row['layer'], row['note']) == ('endless', 'The time of the report is over.')
    assert sections['inference']['left_out'] == [{'layer': 'next'}]
    assert 'Left out for want of time: next.' in text
    for name in ('checks', 'RepMLPNet'):
        assert not sections[name]['rows'] and len(sections[name]['left_out']) > 3
    assert text.count('Left out for want of time: all of it.') == 2


def test_compiled_models_are_measured_where_the_compiler_is_asked(monkeypatch):
    compiled = []

    def compiler(built, dynamic):
        """A double of torch.compile."""
        compiled.append(dynamic)
        return built
    monkeypatch.setattr(torch, 'compile', compiler)
    plan = gpu_sections.plan_of(argparse.Namespace(small=True, device='cpu', threads=1))
    plan = plan._replace(compiler=True, peer=plan.model)
    tasks = [*gpu_sections.compiled_inference_tasks(plan), *gpu_sections.compiled_training_tasks(plan)]
    rows = [row for _, measure in tasks for row in measure()]
    assert compiled == [False] * 8 and len(rows) == 9 and all(row['ms'] > 0 for row in rows)


def test_the_depthwise_share_is_of_depthwise_layers_alone(clocked):
    class Layer(nn.Conv2d):
        """A double of a layer that takes its time."""

        def __init__(self, seconds, groups):
            super().__init__(4, 4, 3, padding=1, groups=groups)
            self.spend = clocked('layer', seconds)

        def forward(self, x):
            self.spend()
            return super().forward(x)
    built = nn.Sequential(Layer(1.0, groups=4), Layer(6.0, groups=1), Layer(1.0, groups=4)).eval()
    x = torch.zeros(1, 4, 5, 5)
    assert gpu_sections.depthwise_share(lambda: built(x), built, 'cpu') == 0.25
    assert gpu_sections.depthwise_share(lambda: built(x), built[1], 'cpu') is None


def test_the_hosts_time_ends_before_the_gpus(clocked, monkeypatch):
    # a double: waiting for the GPU takes 1000 seconds
    monkeypatch.setattr(torch.cuda, 'synchronize', clocked('gpu', 1000))
    # the first step compiles
    assert gpu_sections.host_seconds(clocked('step', 100, 1, 5, 3, 9, 2)) == 3


@pytest.mark.skipif(os.name != 'posix', reason='the double is a shell script')
def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert gpu.driver_version() == 'unknown'
    program = tmp_path / 'nvidia-smi'
    for script, version in (('echo 580.65.06; echo 580.65.06', '580.65.06'), ('exit 9', 'unknown')):
        program.write_text(f'#!/bin/sh\n{script}\n')  # a double
        program.chmod(0o755)
        assert gpu.driver_version() == version


# --- benchmark.py data --------------------------------------------------------------------------------------


def test_a_worker_is_timed_in_three_pipelines_step_by_step(imagenet, tmp_path, capsys):
    run_benchmark('data', '--folder', imagenet, '--images', 4, '--input_size', 48, '--device', 'cpu',
                  '--images_per_second', 9999, '--json', tmp_path / 'data.json')
    content = json.loads((tmp_path / 'data.json').read_text())
    rows = content['results']
    assert [(row['mode'], row['pipeline']) for row in rows] == [
        (mode, name) for mode in ('training', 'evaluation') for name in ('before', 'pillow', 'fast')]
    for row in rows:
        assert row['images_per_s'] == pytest.approx(1e3 / row['ms'])
        assert row['workers'] == math.ceil(9999 / row['images_per_s'])
        steps = {step for step in data.STEPS if row[step] is not None}
        left_out = {'training': set(), 'evaluation': {'flip', 'augment', 'erase'}}[row['mode']]
        assert steps == set(data.STEPS) - left_out - ({'erase'} if row['pipeline'] == 'fast' else set())
        assert (row['device'] is not None) == (row['pipeline'] == 'fast')
    assert [row['ratio'] for row in rows if row['pipeline'] == 'before'] == [1, 1]
    assert '4 images of ' in capsys.readouterr().out and content['machine']


def test_the_pipelines_of_the_loader_benchmark_are_those_of_main(imagenet):
    args = benchmark.get_args_parser().parse_args(['data', '--folder', str(imagenet), '--input_size', '48'])
    data.check_options(args)
    paths = data.choose_images(args)
    assert len(paths) == len(set(paths)) == 15
    for is_train in (True, False):
        batch = {name: data.load(data.samples_of(args, name, is_train, paths), is_train, range(15))
                 for name in data.PIPELINES}
        assert torch.equal(batch['before'], batch['pillow']) and batch['pillow'].dtype == torch.float32
        assert batch['fast'].dtype == torch.uint8
    main_options = data.options_of(args, 'pillow')
    main_options.data_path, main_options.nb_classes = imagenet, 2
    dataset, _ = datasets.build_dataset(False, main_options)
    images = {path: image for (path, _), (image, _) in zip(dataset.samples, dataset, strict=True)}
    for path, found in zip(paths, batch['pillow'], strict=True):
        assert path not in images or torch.equal(found, images[path])


def test_images_that_are_made_are_like_those_of_a_camera(tmp_path):
    (path,) = data.make_images(tmp_path, 1)
    with open(path, 'rb') as file:
        header = read_header(file.read())
    assert (header.width, header.height) == (500, 375) and is_usual(header)
    assert 40e3 < os.path.getsize(path) < 150e3  # ImageNet's are 110 kB on average


@pytest.mark.parametrize(('options', 'message'), [
    (['--images', '0'], '--images 0 must be at least 1'),
    (['--images_per_second', '0'], '--images_per_second 0 must be more than 0'),
    (['--model', 'RepLKNet-32B'], 'unknown --model RepLKNet-32B'),
    (['--folder', '.'], r'--folder \. holds no images'),
    (['--folder', 'nowhere'], 'the folder nowhere cannot be read'),
])
def test_bad_options_of_the_loader_benchmark_are_told(options, message, unmeasured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_benchmark('data', *options)
