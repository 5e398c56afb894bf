"""Parameter groups, layer decay and optimizers against the published ones."""
from argparse import Namespace

import pytest
import torch
from torch import nn

from optim_factory import RepLKNetLayerDecayValueAssigner, create_optimizer, get_parameter_groups
from replknet import MODELS, create_model

VALUES = [0.7 ** (13 - i) for i in range(14)]


def options(**changes) -> Namespace:
    """The only options that create_optimizer reads."""
    return Namespace(**{**dict(opt='adamw', lr=4e-3, weight_decay=0.05, opt_eps=1e-8, opt_betas=None, momentum=0.9), **changes})


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
    config = MODELS['RepLKNet-31T']
    from replknet import RepLKNet
    with torch.device('meta'):
        model = RepLKNet(config.kernels, layers, config.channels, 0.0, 5)
    decay = RepLKNetLayerDecayValueAssigner(VALUES, layers)
    ids = {name: decay.get_layer_id(name) for name, _ in model.named_parameters()}
    assert (ids['stem.0.conv.weight'], ids['head.weight'], ids['norm.bias']) == (0, 13, 13)
    on_the_way = [ids[f'stages.{s}.blocks.{b}.pw1.conv.weight'] for s in range(4) for b in range(2 * layers[s])]
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
    assert [(group['weight_decay'], len(group['params']), group['lr_scale']) for group in groups] == [(0.0, 5, 1.0)]


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'momentum', 'adam', 'nadam', 'radam', 'adamp', 'sgdp', 'adadelta', 'adafactor',
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


@pytest.mark.parametrize('name, cuda', [('adamwx', False), ('fusedadam', False), ('fusedadam', True)])
def test_an_optimizer_that_cannot_be_built_is_named(name, cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)  # timm asks, and then misses apex
    with pytest.raises(ValueError, match=rf'--opt {name} .*cannot be built.*adamw'):
        create_optimizer(options(opt=name), nn.Linear(4, 4))
