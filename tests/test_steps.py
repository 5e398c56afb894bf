"""Steps that do not wait for the device: what is read from it and when, and what a step that is not finite
changes, which then is found late."""
import copy
import functools
import json
import math
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import utils
from conftest import assert_same
from engine import Step, is_read, train_one_epoch
from forks import fork

AdamW, SGD = torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)
OPTIMIZERS = {'plain AdamW': AdamW, 'fused AdamW': functools.partial(AdamW, fused=True),
              'plain SGD': SGD, 'fused SGD': functools.partial(SGD, fused=True)}
every_optimizer = pytest.mark.parametrize('name', OPTIMIZERS)


class Recorder:
    """A test double of the log writer: all it was given, one dictionary for each micro-batch."""

    def __init__(self):
        self.batches = [{}]

    def update(self, head, **values):
        self.batches[-1].update({name: value for name, value in values.items() if value is not None})

    def set_step(self):
        self.batches.append({})


class Reads(TorchDispatchMode):
    """Counts how often Python is told what is in a tensor, or how large what is in it makes another."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.scalars = self.copies = 0
        for name in ('tolist', 'numpy', 'cpu'):  # these come by no dispatcher on CPUs
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def wrapper(*arguments, **named):
            self.copies += 1
            return method(*arguments, **named)
        return wrapper

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.scalars += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
            torch.ops.aten.masked_select)
        return function(*arguments, **(named or {}))


def problem(batches: int) -> tuple[nn.Module, list]:
    """A model with a BatchNorm, and batches for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(16, 3))
    return model, [(torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4,))) for _ in range(batches)]


class Run:
    """A small model, what trains it, and what was logged."""

    def __init__(self, name: str, float16: bool = False, **options):
        self.model, _ = problem(0)
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), lr=0.01)
        self.ema, self.log = ModelEmaV3(self.model, decay=0.9), Recorder()
        self.scaler = torch.amp.GradScaler('cpu', init_scale=256.0, enabled=float16)
        self.options = options

    def train(self, batches: list, criterion: nn.Module | None = None) -> 'Run':
        self.stats = train_one_epoch(self.model, criterion or nn.CrossEntropyLoss(), batches, self.optimizer,
                                     'cpu', 0, self.scaler, 5.0, self.ema, log_writer=self.log,
                                     **self.options)
        return self

    def state(self) -> dict:
        """Weights, buffers, average, moments and numbers of steps: all that a step may change."""
        model, ema = self.model.state_dict(), self.ema.module.state_dict()
        return copy.deepcopy({'model': dict(model), 'ema': dict(ema),
                              'optimizer': self.optimizer.state_dict()['state']})


@pytest.mark.parametrize('float16', [False, True])
def test_steps_ask_nothing_of_the_device_before_a_read(float16, monkeypatch):
    """It is meta, whose tensors have no values that could be asked for."""
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, '_device_dtype_check_for_fused', lambda _: None)  # it does not know meta
    run, (_, batches) = Run('fused AdamW', float16), problem(4)
    for module in (run.model, run.ema):
        module.to('meta')
    metrics = utils.MetricLogger(torch.device('meta'))
    optimizer = OPTIMIZERS['fused AdamW'](run.model.parameters())
    step = Step(run.model, nn.CrossEntropyLoss(), optimizer, run.scaler, 5.0, run.ema, 2,
                torch.autocast('cpu', enabled=False), metrics, run.log)
    for i, batch in enumerate(batches):
        step.accumulate(*(tensor.to('meta') for tensor in batch), ends_step=i % 2 == 1)
        if i % 2 == 1:
            step.take('')
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'):
        step.read()


@pytest.mark.parametrize('name, flags', [('fused AdamW', 0), ('fused SGD', 0), ('plain SGD', 25)])
@pytest.mark.parametrize('float16', [False, True])
def test_values_are_read_every_ten_steps_and_one_flag_a_step_where_there_must_be(name, flags, float16,
                                                                                monkeypatch):
    run, (_, batches) = Run(name, float16, update_freq=2), problem(50)
    with Reads(monkeypatch) as reads:
        run.train(batches)
    assert reads.scalars == flags
    assert reads.copies == 5  # after steps 1, 11, 21 and 25, and of the means


@every_optimizer
def test_curves_and_lines_are_complete_in_order_and_of_the_same_numbers(name, capsys):
    run, (_, batches) = Run(name, update_freq=2, lr_schedule_values=[0.0] * 25), problem(50)
    model = copy.deepcopy(run.model).train()
    losses = [nn.functional.cross_entropy(model(images), targets).item() for images, targets in batches]
    run.train(batches)
    assert [batch['loss'] for batch in run.log.batches[:-1]] == losses and run.log.batches[-1] == {}
    assert ['grad_norm' in batch for batch in run.log.batches[:-1]] == [False, True] * 25
    assert run.stats['loss'] == pytest.approx(sum(losses) / 50)
    lines = re.findall(r'\[ *(\d+)/50\].* loss \S+ \((\S+)\)', capsys.readouterr().out)
    assert lines == [(str(n), f'{sum(losses[:n]) / n:.4g}') for n in (2, 22, 42, 50)]


@pytest.mark.parametrize('plain, fused', [('plain AdamW', 'fused AdamW'), ('plain SGD', 'fused SGD')])
def test_steps_that_nobody_waits_for_are_the_same_steps(plain, fused):
    _, batches = problem(12)
    one, other = (Run(name).train(batches).state() for name in (plain, fused))
    for part in ('model', 'ema'):
        torch.testing.assert_close(one[part], other[part])


class SpoilsGradients(nn.Module):
    """A test double of a criterion: calls of these numbers get an infinite gradient, and a finite loss."""

    def __init__(self, *bad: int):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, output, targets):
        if self.calls in self.bad:
            output.register_hook(lambda gradient: gradient * math.inf)
        self.calls += 1
        return nn.functional.cross_entropy(output, targets)


@every_optimizer
@pytest.mark.parametrize('spoilt, float16', [('loss', False), ('loss', True), ('gradient', False)])
@pytest.mark.parametrize('bad', [0, 13])
def test_training_that_diverged_leaves_what_was_before_whenever_that_is_found(name, spoilt, float16, bad):
    (run, before), (_, batches) = (Run(name, float16, update_freq=2) for _ in range(2)), problem(50)
    criterion = SpoilsGradients(2 * bad) if spoilt == 'gradient' else None
    if bad:
        before.train(batches[:2 * bad])
    if spoilt == 'loss':
        batches[2 * bad][0][1].fill_(math.inf)
    what = 'the loss is nan' if spoilt == 'loss' else 'infinity in 0.weight, 1.weight, 1.bias and 2 more'
    with pytest.raises(utils.UserError, match=f'{what}.* at epoch 0, step {bad} .*This step was not taken'):
        run.train(batches, criterion)
    found, expected = run.state(), before.state()
    if not bad:  # a state that has begun is one of zeros
        expected['optimizer'] = found['optimizer']
        assert all(not value.any() for state in found['optimizer'].values() for value in state.values())
    assert_same(found, expected, 'state')
    assert run.log.batches[:2 * bad] == before.log.batches[:-1]


@every_optimizer
def test_nothing_is_saved_after_a_step_that_was_not_finite(name):
    _, batches = problem(20)
    batches[13][0].fill_(math.nan)
    saved = []

    def save(step, read):
        if step % 4 == 0:
            read()
            saved.append(step)
    with pytest.raises(utils.UserError, match='epoch 0, step 13 '):
        Run(name, after_step=save).train(batches)
    assert saved == [4, 8, 12]


@every_optimizer
def test_a_step_that_float16_overflow_skips_changes_nothing(name):
    """The first, where the optimizer has no state, and one in the middle."""
    _, batches = problem(14)
    taken = [batch for number, batch in enumerate(batches) if number not in (0, 6)]
    run, other = (Run(name, float16=True) for _ in range(2))
    run.train(batches, SpoilsGradients(0, 6))
    assert run.scaler.get_scale() == 64
    assert_same(run.state(), other.train(taken).state(), 'state')
    assert [n for n, batch in enumerate(run.log.batches[:-1]) if 'grad_norm' not in batch] == [0, 6]


def diverge(folder: str) -> None:
    """In a process of two, the second of which has a loss that is not finite in step 3 of 12: print how each
    optimizer ended."""
    rank = int(os.environ['RANK'])
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    for name, float16 in (('plain AdamW', False), ('fused AdamW', False), ('fused AdamW', True)):
        _, batches = problem(12)
        before, run = (Run(name, float16) for _ in range(2))
        for each in (before, run):
            each.model = nn.parallel.DistributedDataParallel(each.model)
        before.train(batches[:3])
        if rank == 1:
            batches[3][0].fill_(math.nan)
        told = ''
        try:
            run.train(batches)
        except utils.UserError as error:
            told = str(error)
        assert_same(run.state(), before.state(), 'state')
        print('TOLD', json.dumps([name, float16, told]), flush=True)
    dist.destroy_process_group()


def test_two_processes_stop_at_the_same_step_of_which_one_alone_has_a_bad_loss(tmp_path):
    runs = [fork('test_steps:diverge', str(tmp_path), printed=tmp_path / f'printed{rank}', RANK=str(rank))
            for rank in range(2)]
    statuses = [run.wait() for run in runs]
    printed = [(tmp_path / f'printed{rank}').read_text() for rank in range(2)]
    assert statuses == [0, 0], printed
    told = [[json.loads(line.removeprefix('TOLD')) for line in text.splitlines() if line.startswith('TOLD')]
            for text in printed]
    assert told[0] == told[1] and len(told[0]) == 3
    for *_, message in told[0]:
        assert message.startswith('the loss is nan on process 1 at epoch 0, step 3 '), message


@pytest.mark.parametrize('seconds, asked', [(0.4, [1, 11, 21]), (0.6, list(range(1, 25)))])
def test_processes_ask_each_other_for_signals_at_reads_and_in_slow_steps_always(seconds, asked, monkeypatch):
    """Of two processes, this one is fast: a test double of the other's part takes `seconds` for a step."""
    found, step = [], 0

    def all_reduce(values, _):
        values[1] = max(values[1].item(), 10 * seconds)
        values[0] = 15 if step > 20 else 0
        found.append(step)
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', all_reduce)
    stop = distributed.StopRequests(torch.device('cpu'))
    numbers = {}
    for step in range(1, 25):
        numbers[step] = stop.agreed(cheap=is_read(step))
    assert found == asked
    assert numbers[20] == 0 and numbers[21] == 15
