"""Parameter groups, layer decay and optimizers against the published ones; optimizers that are stopped and go
on."""
import copy
from argparse import Namespace

import pytest
import timm.optim
import torch
from torch import nn

import checkpoints
import main
import utils
from conftest import assert_same
from engine import takes_found_inf, train_one_epoch
from optim_factory import (
    RepLKNetLayerDecayValueAssigner,
    create_optimizer,
    get_parameter_groups,
    load_optimizer_state,
    restore_optimizer,
)
from replknet import RepLKNet
from replknet_zoo import create_model, read_checkpoint

VALUES = [0.7 ** (13 - i) for i in range(14)]


def options(**changes) -> Namespace:
    """The only options that create_optimizer reads."""
    return Namespace(**{**dict(opt='adamw', lr=4e-3, weight_decay=0.05, opt_eps=1e-8, opt_betas=None,
                               momentum=0.9), **changes})


@pytest.mark.parametrize('layers', [None, (2, 2, 18, 2)], ids=['published', 'own depths'])
def test_groups_of_31b_are_the_published_ones(layers, golden):
    with torch.device('meta'):
        model = create_model('RepLKNet-31B')
    decay = RepLKNetLayerDecayValueAssigner(VALUES, layers)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in get_parameter_groups(model, 0.05, (), decay.get_layer_id, decay.get_scale):
        found.update({names[id(p)]: [group['lr_scale'], group['weight_decay']] for p in group['params']})
    recorded = golden('training')['param_groups/RepLKNet-31B/layer_decay=0.7/weight_decay=0.05']
    assert list(found.items()) == list(recorded.items())  # the order too: optimizer states go by it


@pytest.mark.parametrize('layers', [(1, 1, 1, 1), (1, 1, 2, 1), (2, 2, 9, 2), (3, 3, 27, 3)])
def test_every_parameter_of_any_depths_has_a_layer_that_grows_with_depth(layers):
    with torch.device('meta'):
        model = RepLKNet([31, 29, 27, 13], layers, [16, 32, 64, 128], 0.0, 5)
    decay = RepLKNetLayerDecayValueAssigner(VALUES, layers)
    ids = {name: decay.get_layer_id(name) for name, _ in model.named_parameters()}
    assert (ids['stem.0.conv.weight'], ids['head.weight'], ids['norm.bias']) == (0, 13, 13)
    on_the_way = [ids[f'stages.{s}.blocks.{b}.pw1.conv.weight'] for s in range(4)
                  for b in range(2 * layers[s])]
    assert on_the_way == sorted(on_the_way)
    assert (on_the_way[0], on_the_way[-1]) == (1, 12)
    assert ids['transitions.2.0.conv.weight'] == 11
    assert all(decay.get_scale(i) == VALUES[i] for i in ids.values())


def test_layer_decay_that_is_not_defined_is_an_error():
    with pytest.raises(ValueError, match='four stages'):
        RepLKNetLayerDecayValueAssigner(VALUES, (1, 1, 1))


def test_one_dimensional_and_skipped_parameters_have_no_weight_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    groups = get_parameter_groups(model, 0.1, skip_list=('0.weight',))
    assert [(group['weight_decay'], len(group['params']), group['lr_scale'])
            for group in groups] == [(0.0, 5, 1.0)]


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'momentum', 'adam', 'nadam', 'radam', 'adamp', 'sgdp',
                                  'adadelta', 'adafactor',
                                  'rmsprop', 'rmsproptf', 'novograd', 'nvnovograd', 'lamb', 'lookahead_adam'])
@pytest.mark.parametrize('betas', [None, [0.9, 0.99]])
def test_published_optimizers_step(name, betas):
    model = nn.Linear(4, 4)
    optimizer = create_optimizer(options(opt=name, opt_betas=betas), model)
    before = model.weight.detach().clone()
    for _ in range(2):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.05, 0.0}


def test_sgd_has_nesterov_momentum_and_momentum_has_not():
    model = nn.Linear(4, 4)
    assert create_optimizer(options(opt='sgd'), model).defaults['nesterov'] is True
    assert create_optimizer(options(opt='momentum'), model).defaults['nesterov'] is False


@pytest.fixture
def on_gpu(monkeypatch):
    """Parameters that say, without a GPU, that they are on one."""
    monkeypatch.setattr(nn.Parameter, 'is_cuda', True, raising=False)


@pytest.mark.parametrize('name, fused', [('adamw', True), ('adam', True), ('sgd', True), ('momentum', True),
                                         ('lookahead_adamw', True), ('nadam', None), ('lamb', None)])
def test_torchs_optimizers_are_fused_on_gpus_alone(name, fused, request):
    assert not stepped(name).param_groups[0].get('fused')
    request.getfixturevalue('on_gpu')
    assert stepped(name).param_groups[0].get('fused') is fused


@pytest.mark.parametrize('name', ['adamw', 'adam', 'sgd', 'adagrad'])
def test_a_state_goes_from_a_cpu_to_a_gpu_and_back(name, request):
    plain, other = stepped(name), stepped(name)
    request.getfixturevalue('on_gpu')
    fused, new = stepped(name), stepped(name)
    load_optimizer_state(new, checkpoints.plain(plain.state_dict()))
    assert takes_found_inf(new)  # else a step that is not finite would be taken
    load_optimizer_state(other, checkpoints.plain(fused.state_dict()))
    assert not takes_found_inf(other) and other.param_groups[0]['fused'] is plain.param_groups[0]['fused']
    for optimizer, origin in ((new, plain), (other, fused)):
        assert_same(optimizer.state_dict()['state'], origin.state_dict()['state'], 'state')
        optimizer.step()


@pytest.mark.parametrize('name, cuda', [('adamwx', False), ('foo_adam', False), ('lookahead_', False),
                                        ('lookahead_lookahead_adam', False), ('lookahead_fusedsgd', False),
                                        *((name, cuda)
                                          for name in timm.optim.list_optimizers(['fused*', 'bnb*'])
                                          for cuda in (False, True))])
def test_an_optimizer_that_cannot_be_built_is_named(name, cuda, monkeypatch):
    # timm asks, and then misses apex or bitsandbytes
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    with pytest.raises(ValueError, match=rf'^--opt {name} cannot be built .*adamw.*$'):  # one line
        create_optimizer(options(opt=name), nn.Linear(4, 4))


@pytest.mark.parametrize('name', ['kron', 'kronw', 'kronc', 'lookahead_kron'])
def test_kron_without_what_saves_its_memory_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=r'needs the package opt_einsum.*60 GB'):
        create_optimizer(options(opt=name), nn.Linear(4, 4))


@pytest.mark.parametrize('name, betas, takes', [('adam', [0.9], 2), ('adamw', [0.9, 0.99, 0.999], 2),
                                                ('lookahead_adan', [0.9, 0.99], 3)])
def test_another_number_of_betas_is_told(name, betas, takes):
    with pytest.raises(ValueError, match=rf'--opt {name} with --opt_betas .*it takes {takes} betas, not '
                                         rf'{len(betas)}'):
        create_optimizer(options(opt=name, opt_betas=betas), nn.Linear(4, 4))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first_step: int, steps: int) -> None:
    """From first_step to `steps`, of a run of 8 steps whose first has a learning rate of 0."""
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, 3, 32, 32, generator=draw), torch.tensor([0, 1]))
            for _ in range(steps)][first_step:]
    train_one_epoch(model, nn.CrossEntropyLoss(), data, optimizer, 'cpu', 0, max_norm=5.0, start_steps=0,
                    lr_schedule_values=utils.cosine_scheduler(4e-3, 1e-6, 1, 8, warmup_steps=2),
                    wd_schedule_values=utils.cosine_scheduler(0.05, 0.1, 1, 8),
                    num_training_steps_per_epoch=steps, seed=0, first_step=first_step)


# those of apex and bitsandbytes need CUDA
@pytest.mark.filterwarnings('ignore:Using backward')  # adahessian's, whose gradients engine.py clears
@pytest.mark.parametrize('name', ['nvnovograd',
                                  *timm.optim.list_optimizers(exclude_filters=['fused*', 'bnb*']),
                                  'lookahead_adan',
                                  'lookahead_adahessian', 'lookahead_lion', 'lookahead_muon'])
def test_every_optimizer_of_timm_goes_on_to_the_bit(name, tmp_path, monkeypatch):
    if name.startswith('kron') and not torch.backends.opt_einsum.is_available():
        pytest.skip('opt_einsum is not installed')
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'pytorch')  # adahessian's second derivatives
    torch.manual_seed(0)
    # shapes that some treat differently
    begin = RepLKNet((7, 7, 7, 5), (1, 1, 1, 1), (4, 4, 16, 16), 0.1, 3, num_classes=2)
    args = options(opt=name)
    model = copy.deepcopy(begin)
    optimizer = create_optimizer(args, model)
    steps = 7 if name.startswith('lookahead_') else 5  # the sixth is the first of Lookahead's own
    trained(model, optimizer, 0, 3)
    path = tmp_path / 'latest.pth'
    checkpoints.save_checkpoint(path, {'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                                       'args': vars(args)})
    trained(model, optimizer, 3, steps)

    other = copy.deepcopy(begin)
    checkpoint = read_checkpoint(path)
    other.load_state_dict(checkpoint['model'])
    restored = create_optimizer(args, other)
    restore_optimizer(restored, name, checkpoint['optimizer'], name)
    trained(other, restored, 3, steps)
    assert_same(other.state_dict(), model.state_dict(), 'model')
    assert_same(restored.state_dict(), optimizer.state_dict(), 'optimizer')
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model.head.weight, begin.head.weight)


def stepped(name: str, **changes) -> torch.optim.Optimizer:
    """An optimizer of a small model, after a step."""
    model = nn.Linear(4, 4)
    optimizer = create_optimizer(options(opt=name, **changes), model)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize('before, now', [('adamw', 'sgd'), ('sgd', 'adamw'), ('adam', 'adamw'),
                                         ('sgd', 'momentum'), ('lamb', 'adamw'), ('lamb', 'lambc'),
                                         ('muon', 'adamuon'), ('lookahead_adam', 'adam'), ('radam', 'nadam')])
def test_the_state_of_another_optimizer_is_refused(before, now):
    with pytest.raises(ValueError, match='it is of another optimizer: '):
        load_optimizer_state(stepped(now), checkpoints.plain(stepped(before).state_dict()))


@pytest.mark.parametrize('known', [dict, lambda args: Namespace(**args)], ids=['ours', 'published'])
def test_a_checkpoint_that_names_another_optimizer_is_refused_and_one_of_another_spelling_is_not(known):
    def restore(before: str, now: str) -> None:
        checkpoint = {'optimizer': checkpoints.plain(stepped(before).state_dict()),
                      'args': known({'opt': before})}
        restore_optimizer(stepped(now), now, checkpoint['optimizer'],
                          checkpoints.options_of(checkpoint)['opt'])
    # their groups could be the other's
    for before, now in (('adamax', 'adam'), ('adam', 'lookahead_adam'), ('radam', 'adamw')):
        with pytest.raises(ValueError, match=rf'it is of --opt {before}, not {now}\): --opt, .* must be '
                                                  r'those of its run'):
            restore(before, now)
    for before, now in (('nesterov', 'sgd'), ('nvnovograd', 'NovoGrad')):
        restore(before, now)


def test_a_state_of_older_versions_of_torch_is_taken():
    saved = stepped('adamw').state_dict()
    for group in saved['param_groups']:
        for name in ('foreach', 'maximize', 'capturable', 'differentiable', 'fused',
                     'decoupled_weight_decay'):
            del group[name]
    optimizer = stepped('adamw')
    built = copy.deepcopy(optimizer.state_dict()['param_groups'])
    load_optimizer_state(optimizer, saved)
    assert_same(optimizer.state_dict()['state'], saved['state'], 'state')
    assert all(group[name] == own[name] for own, group in zip(built, optimizer.param_groups, strict=True)
               for name in ('maximize', 'decoupled_weight_decay', 'lr_scale'))


def test_options_of_the_command_stand_above_those_of_the_state():
    optimizer = stepped('adamw', opt_betas=[0.8, 0.95], opt_eps=1e-6)
    load_optimizer_state(optimizer, checkpoints.plain(stepped('adamw').state_dict()))
    assert {(*group['betas'], group['eps']) for group in optimizer.param_groups} == {(0.8, 0.95, 1e-6)}


@pytest.mark.parametrize('changes, message', [
    ({}, None), ({'variable': 'auto'}, 'set LARGE_KERNEL_CONV_IMPL=pytorch'),
    ({'distributed': True}, 'in one process, not in 2'), ({'compile': True}, '--compile'),
    ({'use_checkpoint': True}, '--use_checkpoint'),
    ({'use_amp': True, 'amp_dtype': 'float16'}, '--amp_dtype bfloat16'), ({'use_amp': True}, None)])
def test_what_second_derivatives_need_is_told_before_training(changes, message, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', changes.pop('variable', 'pytorch'))
    args = options(opt='adahessian', layer_decay=1.0, world_size=2, **{**dict(
        distributed=False, compile=False, use_checkpoint=False, use_amp=False, amp_dtype='bfloat16'),
                                                                       **changes})
    if message is None:
        assert main.build_optimizer(args, nn.Linear(4, 4)).is_second_order
    else:
        with pytest.raises(utils.UserError, match=f'--opt adahessian differentiates the gradients: '
                                                  f'.*{message}'):
            main.build_optimizer(args, nn.Linear(4, 4))
