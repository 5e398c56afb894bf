"""Training steps against the recorded trajectory; what evaluation counts."""
import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import utils
from conftest import TINY
from engine import evaluate, train_one_epoch
from golden.fill import fill, image
from optim_factory import RepLKNetLayerDecayValueAssigner, get_parameter_groups
from replknet import RepLKNet


class Recorder:
    """A test double of the log writer: it keeps the losses and learning rates it is given."""

    def __init__(self):
        self.values, self.steps = {'loss': [], 'lr': []}, 0

    def update(self, head='scalar', **values):
        for name in self.values.keys() & values.keys():
            self.values[name].append(values[name])

    def set_step(self):
        self.steps += 1


def entry_norms(model: nn.Module) -> torch.Tensor:
    return torch.stack([value.double().norm() for key, value in sorted(model.state_dict().items())
                        if 'tracked' not in key])


@pytest.mark.parametrize('implementation', ['pytorch', 'auto'])
@pytest.mark.parametrize('use_checkpoint', [False, True])
def test_the_recipe_follows_the_published_trajectory(use_checkpoint, implementation, golden, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', implementation)
    recorded = golden('trajectory')
    model = fill(RepLKNet(**TINY, num_classes=10, use_checkpoint=use_checkpoint))
    batches = [(image(f'recipe/x{i}', 4, 3, 64, 64),
                torch.from_numpy(np.random.RandomState(i).randint(0, 10, 4)))
               for i in range(8)]
    decay = RepLKNetLayerDecayValueAssigner([0.7 ** (13 - i) for i in range(14)])
    groups = get_parameter_groups(model, 0.05, (), decay.get_layer_id, decay.get_scale)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8, weight_decay=0.0)
    ema, log = ModelEmaV3(model, decay=0.9), Recorder()
    for epoch in range(2):
        train_one_epoch(model, LabelSmoothingCrossEntropy(0.1), batches, optimizer, torch.device('cpu'),
                        epoch, None, None, ema, log_writer=log, start_steps=epoch * 4,
                        lr_schedule_values=utils.cosine_scheduler(1e-3, 1e-6, 2, 4, warmup_epochs=1),
                        wd_schedule_values=utils.cosine_scheduler(0.05, 0.05, 2, 4),
                        num_training_steps_per_epoch=4, update_freq=2)
    assert log.steps == 16
    np.testing.assert_allclose(log.values['loss'], recorded['recipe/loss'], rtol=1e-4)
    np.testing.assert_allclose(log.values['lr'], recorded['recipe/lr'], rtol=1e-12)
    # These biases meet a 1x1 convolution and a BatchNorm, which takes constants away: their gradient is
    # rounding alone, from which Adam makes whole steps. nn.Conv2d takes the recorded ones where it rounds as
    # it did then, on an AMD EPYC; on an Intel Xeon they end 1.6e-3 away, and the running mean that takes them
    # away 1.2e-3.
    names = [key for key in sorted(model.state_dict()) if 'tracked' not in key]
    rounding = ('prelkb_bn.bias', 'preffn_bn.bias',
                *(('pw1.bn.running_mean',) if implementation == 'pytorch' else ()))
    wide = np.array([key.endswith(rounding) for key in names])
    for norms, name in ((entry_norms(model), 'recipe/norms'), (entry_norms(ema.module), 'recipe/ema_norms')):
        np.testing.assert_allclose(norms[~wide], recorded[name][~wide], rtol=1e-3)
        np.testing.assert_allclose(norms[wide], recorded[name][wide], rtol=3e-3)


def small_problem(batches=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2,))) for _ in range(batches)]
    return model, data


def test_clipping_works_without_amp():
    moved = []
    for max_norm in (None, 1e-3):
        model, data = small_problem()
        before = model[1].weight.detach().clone()
        stats = train_one_epoch(model, nn.CrossEntropyLoss(), data[:1],
                                torch.optim.SGD(model.parameters(), lr=1.0), 'cpu', 0, max_norm=max_norm)
        moved.append(torch.cat([model[1].weight.detach() - before, model[1].bias.detach()[:, None] * 0],
                               1).norm().item())
    assert stats['grad_norm'] > 0.1
    assert moved[0] > 0.1
    assert moved[1] < 1.001e-3


def test_accumulated_micro_batches_make_the_step_of_one_batch():
    weights = []
    for update_freq in (1, 4):
        model, data = small_problem(4)
        if update_freq == 1:
            data = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
        train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.1),
                        'cpu', 0, update_freq=update_freq)
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights)


def test_gradients_are_reduced_once_a_step():
    class CountsNoSync(nn.Module):
        """A test double of DistributedDataParallel: it counts the micro-batches that ask for no
        all-reduce."""
        unsynchronised = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

        @contextlib.contextmanager
        def no_sync(self):
            self.unsynchronised += 1
            yield

    model, data = small_problem(7)  # 2 steps of 3; the last micro-batch fills no step
    parallel = CountsNoSync(model)
    log = Recorder()
    train_one_epoch(parallel, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.1), 'cpu',
                    0, update_freq=3, log_writer=log)
    assert parallel.unsynchronised == 4
    assert log.steps == 6


def test_a_step_that_float16_overflow_skips_moves_neither_weights_nor_average():
    model, data = small_problem(2)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 127)
    ema = ModelEmaV3(model, decay=0.5)
    before = model[1].weight.detach().clone()
    with torch.no_grad():
        ema.module[1].weight.add_(1)
    stats = train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=1.0),
                            'cpu', 0, scaler, model_ema=ema, use_amp=True)
    assert scaler.get_scale() == 2.0 ** 125
    assert torch.equal(model[1].weight, before)
    assert torch.equal(ema.module[1].weight, before + 1)
    assert 'grad_norm' not in stats  # there was no finite one


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('max_norm', [None, 1.0])
def test_mixed_precision_trains(dtype, max_norm):
    model = fill(RepLKNet(**TINY, num_classes=3))
    data = [(image(f'amp{i}', 4, 3, 32, 32), torch.arange(4) % 3) for i in range(2)]
    before = model.head.weight.detach().clone()
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0, enabled=dtype == torch.float16)
    stats = train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=1e-3),
                            'cpu', 0, scaler, max_norm, use_amp=True, amp_dtype=dtype)
    assert math.isfinite(stats['loss'])
    assert math.isfinite(stats['grad_norm'])
    assert not torch.equal(model.head.weight, before)


def test_second_order_optimizers_work_without_amp():
    from timm.optim import Adahessian
    model, data = small_problem(2)
    before = model[1].weight.detach().clone()
    train_one_epoch(model, nn.CrossEntropyLoss(), data, Adahessian(model.parameters(), lr=0.1), 'cpu', 0)
    assert not torch.equal(model[1].weight, before)


def test_a_loss_that_is_not_finite_names_epoch_step_rate_scale_and_remedies():
    model, data = small_problem(3)
    data[1][0].fill_(math.nan)
    with pytest.raises(utils.UserError, match=r'loss is nan at epoch 7, step 1 \(learning rate 0.25, loss '
                                              r'scale 1\).*--lr'):
        train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.25),
                        'cpu', 7)
    scaler = torch.amp.GradScaler('cpu', init_scale=256.0)
    with pytest.raises(utils.UserError, match=r'step 1 .*loss scale 256\)'):
        train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.25),
                        'cpu', 7, scaler, use_amp=True)


class SpoilsGradients(nn.Module):
    """A test double of a criterion: its loss is finite, its gradient NaN, infinite, or too large to be
    squared."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, output, targets):
        output.register_hook(lambda gradient: gradient * self.factor)
        return F.cross_entropy(output, targets)


@pytest.mark.parametrize('factor', [math.nan, math.inf, 1e25])
@pytest.mark.parametrize('max_norm', [None, 5.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(factor, max_norm):
    model, data = small_problem()
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.1), ModelEmaV3(model, decay=0.5)
    train_one_epoch(model, nn.CrossEntropyLoss(), data[:2], optimizer, 'cpu', 0, model_ema=ema)
    before = [part.state_dict() for part in copy.deepcopy((model, ema.module))]
    states = copy.deepcopy(optimizer.state_dict()['state'])
    with pytest.raises(utils.UserError, match=r"the gradient('s norm)? is not finite: .* at epoch 3, step 0 "
                                              r"\(learning rate 0\.1"
                                              r'.*This step was not taken') as told:
        train_one_epoch(model, SpoilsGradients(factor), data, optimizer, 'cpu', 3, max_norm=max_norm,
                        model_ema=ema)
    assert ('NaN or infinity in 1.weight, 1.bias at' in str(told.value)) == (factor != 1e25)
    for part, state in zip((model, ema.module), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
    for number, state in optimizer.state_dict()['state'].items():
        assert all(torch.equal(value, states[number][key]) for key, value in state.items())


def test_a_loss_that_is_not_finite_in_any_micro_batch_takes_no_step():
    model, data = small_problem(4)
    data[2][0].fill_(math.inf)
    before = model[1].weight.detach().clone()
    with pytest.raises(utils.UserError, match='the loss is nan at epoch 0, step 0 '):
        train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=1.0),
                        'cpu', 0, update_freq=4)
    assert torch.equal(model[1].weight, before)


def test_float16_skips_steps_that_overflow_until_the_loss_scale_is_not_to_blame():
    model, data = small_problem(30)
    before = model[1].weight.detach().clone()
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    with pytest.raises(utils.UserError, match=r'the gradient is not finite: .* at epoch 0, step 3 \(.*, loss '
                                              r'scale 1\)'):
        train_one_epoch(model, SpoilsGradients(math.inf), data, torch.optim.SGD(model.parameters(), lr=1.0),
                        'cpu', 0, scaler)
    assert torch.equal(model[1].weight, before)


def test_with_a_seed_mixup_depends_on_the_step_alone():
    def mixed(start_steps, disturbance):
        model, data = small_problem(2)
        seen = []
        mixup = Mixup(0.8, 1.0, num_classes=3)
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)

        def recording(x, y):
            seen.append(mixup(x.clone(), y))
            return seen[-1]
        train_one_epoch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.0),
                        'cpu', 0, mixup_fn=recording, start_steps=start_steps, seed=3)
        return torch.cat([x.flatten() for x, _ in seen])
    assert torch.equal(mixed(0, 1), mixed(0, 2))
    assert not torch.equal(mixed(0, 1), mixed(2, 1))


def test_evaluation_weights_batches_by_their_samples(capsys):
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7)
    batches = [(logits[:4], targets[:4]), (logits[4:6], targets[4:6]), (logits[6:], targets[6:])]
    stats = evaluate(batches, nn.Identity(), 'cpu')
    order = logits.argsort(1, descending=True)
    assert stats['acc1'] == pytest.approx(100 * sum(order[i, 0] == i for i in range(7)).item() / 7)
    assert stats['acc5'] == pytest.approx(100 * sum(i in order[i, :5] for i in range(7)) / 7)
    assert stats['loss'] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert (f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}'
            in capsys.readouterr().out.splitlines())


def test_evaluation_of_fewer_than_five_classes():
    stats = evaluate([(torch.eye(3), torch.arange(3))], nn.Identity(), 'cpu')
    assert (stats['acc1'], stats['acc5']) == (100, 100)


def test_an_evaluation_loss_that_is_not_finite_is_not_hidden():
    batches = [(torch.full((1, 3), math.nan), torch.tensor([0])), (torch.eye(3), torch.arange(3))]
    assert math.isnan(evaluate(batches, nn.Identity(), 'cpu')['loss'])
