"""RepMLPNet: published outputs, gradients, keys and sizes; locality injection; maps of several parts."""
import copy
import gzip
import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import engine
import optim_factory
import replknet_zoo
import repmlpnet
import utils
from conftest import GOLDEN, norms, relative_error, run_script, with_random_weights
from golden.fill import fill, image
from options import get_args_parser
from repmlpnet import FFNBlock, RepMLPBlock, RepMLPNet, conv_bn, conv_bn_relu, fuse_bn, get_RepMLPNet_model
from tools.benchmarks.model import gmacs

# the shapes that the golden data was recorded with
TINY = dict(channels=(8, 16, 32, 64), hs=(16, 8, 4, 2), ws=(16, 8, 4, 2), num_blocks=(1, 1, 2, 1),
            sharesets_nums=(1, 2, 4, 8), reparam_conv_k=(1, 3), num_class=10)
NAMES = list(repmlpnet.model_map)


@pytest.fixture(scope='module')
def arrays() -> dict[str, np.ndarray]:
    return {**np.load(GOLDEN / 'repmlp.npz'), **np.load(GOLDEN / 'repmlpnet.npz')}


@pytest.fixture(scope='module')
def counts() -> dict:
    return json.loads((GOLDEN / 'repmlp.json').read_text())['models']


def tiny(**options) -> RepMLPNet:
    return fill(RepMLPNet(**{**TINY, **options})).eval()


def golden_block() -> RepMLPBlock:
    return fill(RepMLPBlock(6, 6, 3, 4, (1, 3, 5), globalperceptron_reduce=2, num_sharesets=2)).eval()


def random_block(*arguments, **options) -> RepMLPBlock:
    torch.manual_seed(0)
    return with_random_weights(RepMLPBlock(*arguments, **options)).eval()


# ---- Against the published code ----------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_are_the_published_ones(arrays):
    assert relative_error(tiny()(image('repmlp/tiny', 2, 3, 64, 64)), arrays['repmlp/tiny']) < 2e-6
    for name, kernels in (('none', None), ('3', (3,)), ('7', (7,))):
        model = tiny(reparam_conv_k=kernels)
        x = image('repmlp/kernels', 1, 3, 64, 64)
        for form in ('trained', 'injected', 'folded'):
            if form != 'trained':
                {'injected': model.locality_injection, 'folded': model.deep_fuse_BN}[form]()
            assert relative_error(model(x), arrays[f'tiny/k{name}']) < 2e-6, (name, form)
    assert relative_error(golden_block()(image('repmlp/block', 2, 6, 3, 4)), arrays['block/eval']) < 1e-6


@pytest.mark.parametrize('name, key', [
    ('T224', 'repmlp/T224'), pytest.param('B224', 'B224/eval', marks=pytest.mark.slow)])
@torch.no_grad()
def test_outputs_of_full_size_are_the_published_ones(name, key, arrays):
    model = fill(get_RepMLPNet_model(f'RepMLPNet-{name}')).eval()
    x = image(f'repmlp/{name}', 1, 3, 224, 224)
    for change in (lambda: None, model.locality_injection, model.deep_fuse_BN):
        change()
        assert relative_error(model(x), arrays[key]) < 3e-5


@torch.no_grad()
def test_maps_of_the_stages_are_the_published_ones(arrays):
    model = tiny(num_class=None, out_indices=(0, 1, 2, 3), norm_last_map=False)
    x = image('repmlp/stages', 1, 3, 64, 64)
    for i, value in enumerate(model(x)):
        assert relative_error(value, arrays[f'tiny/stages/{i}']) < 2e-6
    normed = tiny(num_class=None, out_indices=(1, 3))(x)[1]
    assert torch.equal(normed, model.head_norm(model(x)[3]))
    assert torch.equal(normed, tiny(num_class=None)(x))


def test_gradients_and_statistics_are_the_published_ones(arrays):
    for key, model, shape in (('block', golden_block(), (3, 6, 3, 4)), ('tiny', tiny(), (4, 3, 64, 64))):
        tag = f'repmlp/{"block/train" if key == "block" else "train"}'
        x = image(tag, *shape).requires_grad_()
        out = model.train()(x)
        (out * image(f'{key}/train/cotangent', *out.shape)).sum().backward()
        assert relative_error(out.detach(), arrays[f'{key}/train/logits']) < 5e-6
        assert relative_error(x.grad, arrays[f'{key}/train/input_grad']) < 5e-5
        found = [p.grad.double().norm().item() for _, p in sorted(model.named_parameters())]
        # behind a BatchNorm some gradients are rounding
        np.testing.assert_allclose(found, arrays[f'{key}/train/grad_norms'], rtol=2e-4,
                                   atol=1e-5 * arrays[f'{key}/train/grad_norms'].max())
        running = [value.flatten() for name, value in sorted(model.state_dict().items())
                   if 'running' in name]
        assert relative_error(torch.cat(running), arrays[f'{key}/train/running']) < 1e-5


def test_the_published_training_is_followed_step_by_step(arrays):
    model = tiny().train()
    optimizer = torch.optim.AdamW(optim_factory.get_parameter_groups(model, 0.1), lr=1e-3)
    rates = utils.swin_schedule(0.064 * 4 / 256, 0, 4, 6, 1, 3.2e-5 * 4 / 256)
    np.testing.assert_allclose(rates, arrays['recipe/lr'], rtol=1e-12)
    batches = [(image(f'repmlp/recipe/x{i}', 4, 3, 64, 64),
                torch.from_numpy(np.random.RandomState(i).randint(0, 10, 4))) for i in range(6)]
    seen = {'loss': [], 'grad_norm': []}

    class Writer:
        """A test double: keeps what the curves would show."""
        def update(self, head, **values):
            for name, value in values.items():
                if name in seen and value is not None:
                    seen[name].append(value)

        def set_step(self):
            pass
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(4):
        engine.train_one_epoch(model, criterion, batches, optimizer, 'cpu', epoch, max_norm=5.0,
                               log_writer=Writer(), start_steps=6 * epoch, lr_schedule_values=rates)
    np.testing.assert_allclose(seen['loss'], arrays['recipe/loss'], rtol=1e-4)
    np.testing.assert_allclose(seen['grad_norm'], arrays['recipe/grad_norm'], rtol=1e-2)
    out = model.eval()(image('repmlp/recipe/eval', 2, 3, 64, 64))
    assert relative_error(out.detach(), arrays['recipe/eval']) < 1e-2


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_keys_shapes_and_counts_are_the_published_ones(name, deploy, counts):
    states = json.loads(gzip.decompress((GOLDEN / 'repmlp_state_dicts.json.gz').read_bytes()))
    with torch.device('meta'):
        model = get_RepMLPNet_model(name, deploy=deploy).eval()
    form = counts[name]['deploy' if deploy else 'train']
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == \
        states[name + '/deploy' * deploy]
    assert sum(p.numel() for p in model.parameters()) == form['parameters']
    of_norms = sum(p.numel() for norm in norms(model) for p in norm.parameters())
    assert form['parameters'] - of_norms == form['without_batchnorm']
    config = replknet_zoo.MODELS[name]
    assert gmacs(model, config.input_size) == pytest.approx(form['macs'] / 1e9, abs=1e-9)
    if deploy:
        assert form['without_batchnorm'] / 1e6 == pytest.approx(config.parameters, abs=5e-4)
        assert form['macs'] / 1e9 == pytest.approx(config.gmacs, abs=5e-4)
    else:
        groups = optim_factory.get_parameter_groups(model, 0.1)
        for group in groups:
            expected = counts[name]['weight_decay' if group['weight_decay'] else 'no_weight_decay']
            assert len(group['params']) == expected['tensors']
            assert sum(p.numel() for p in group['params']) == expected['elements']


def test_published_names_and_signatures():
    assert [name for name, _ in conv_bn(3, 4, 3, 1, 1).named_children()] == ['conv', 'bn']
    layer = conv_bn_relu(4, 4, 3, 2, 1, groups=2)
    assert [name for name, _ in layer.named_children()] == ['conv', 'bn', 'relu']
    assert layer.conv.bias is None and layer.conv.groups == 2 and layer.conv.stride == (2, 2)
    assert FFNBlock(4, 8, 6)(torch.zeros(1, 4, 2, 2)).shape == (1, 6, 2, 2)
    assert FFNBlock(4)(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    assert isinstance(RepMLPNet(**TINY).stages[0][0].repmlp_block.fc3, nn.Conv2d)
    with pytest.raises(ValueError, match='RepMLPNet-X'):
        get_RepMLPNet_model('RepMLPNet-X')
    assert [f'RepMLPNet-{name}' for name in ('T224', 'B224', 'T256', 'B256', 'D256', 'L256')] == NAMES


# ---- Parts -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_map_of_several_parts_gives_each_what_it_gives_alone(arrays):
    assert relative_error(golden_block()(image('repmlp/block/parts', 2, 6, 6, 12)),
                          arrays['block/parts']) < 1e-6
    assert relative_error(tiny()(image('repmlp/parts', 2, 3, 128, 192)), arrays['tiny/parts']) < 2e-6
    for shape in ((6, 6, 3, 4), (8, 8, 5, 1), (4, 4, 1, 6)):
        block = random_block(*shape, (1, 3), 2, num_sharesets=2)
        x = torch.randn(2, shape[0], 3 * shape[2], 2 * shape[3])
        block.gp = nn.Identity()  # but for the gate, which sees the whole map
        block.gp.forward = lambda x: torch.ones(1)
        for _ in range(2):
            whole = block(x)
            for i in range(3):
                for j in range(2):
                    part = (..., slice(i * shape[2], (i + 1) * shape[2]),
                            slice(j * shape[3], (j + 1) * shape[3]))
                    assert relative_error(whole[part], block(x[part].clone())) < 1e-6
            block.local_inject()


@torch.no_grad()
def test_an_fc_that_is_the_identity_returns_the_map():
    block = RepMLPBlock(6, 6, 3, 4, num_sharesets=2, deploy=True)
    block.fc3.weight.copy_(torch.eye(12).repeat(2, 1).view_as(block.fc3.weight))
    block.fc3.bias.zero_()
    x = torch.randn(2, 6, 9, 8)
    assert torch.allclose(block(x), x * block.gp(x))
    parts = block.partition(x, 3, 2)
    assert parts.shape == (2, 3, 2, 6, 3, 4) and torch.equal(parts[1, 2, 1], x[1, :, 6:9, 4:8])
    assert torch.allclose(block.partition_affine(parts, 3, 2), parts)


@torch.no_grad()
def test_the_fcs_are_the_grouped_convolution_that_they_stand_for():
    for sets, bias in ((1, False), (1, True), (3, False), (3, True)):
        layer, convolution = (kind(12 * sets, 12 * sets, 1, groups=sets, bias=bias)
                              for kind in (repmlpnet.SetSharingFC, nn.Conv2d))
        convolution.load_state_dict(layer.state_dict())
        for rows in (0, 1, 5):
            x = torch.randn(rows, 12 * sets, 1, 1)
            assert torch.allclose(layer(x), convolution(x), atol=1e-6)
    published = tiny(implementation='pytorch')
    assert type(published.stages[0][0].repmlp_block.fc3) is nn.Conv2d
    x = torch.randn(1, 3, 64, 64)
    assert relative_error(tiny()(x), published(x)) < 2e-6


@torch.no_grad()
def test_signals_are_maps_of_width_one():
    block = random_block(8, 8, 10, 1, (1, 3), num_sharesets=4)
    x = torch.randn(2, 8, 30, 1)
    expected = block(x)
    block.local_inject()
    assert relative_error(block(x), expected) < 1e-5


@pytest.mark.parametrize('shape', [(1, 3, 65, 64), (4, 3, 96, 96), (1, 3, 64, 32), (1, 3, 0, 64)])
def test_sizes_that_do_not_fit_are_an_error(shape):
    model = tiny()
    assert model.size_multiples == (64, 64)
    with pytest.raises(ValueError, match=rf'image of {shape[2]} x {shape[3]} .* parts of 64 x 64: resize'):
        model(torch.zeros(shape))
    block = model.stages[0][0].repmlp_block
    with pytest.raises(ValueError, match=r'map of 17 x 16 .* parts of 16 x 16'):
        block(torch.zeros(1, 8, 17, 16))
    with pytest.raises(ValueError, match=r'takes \(N, 8, H, W\), not \(1, 4, 16, 16\)'):
        block(torch.zeros(1, 4, 16, 16))


# ---- Locality injection ------------------------------------------------------------------------------------


@pytest.mark.parametrize('kernels', [None, (1,), (7,), (1, 3, 5), [9, 11]])
@pytest.mark.parametrize('shape, sets', [((6, 6, 3, 4), 2), ((4, 4, 7, 7), 1), ((8, 8, 1, 5), 8)])
@torch.no_grad()
def test_injection_is_exact(kernels, shape, sets):
    block = random_block(*shape, kernels, 2, sets).double()
    x = torch.randn(3, shape[0], 2 * shape[2], shape[3], dtype=torch.float64)
    expected = block(x)
    weight, bias = block.get_equivalent_fc3()
    block.local_inject()
    assert relative_error(block(x), expected) < 1e-11
    assert torch.equal(block.fc3.weight, weight) and torch.equal(block.fc3.bias, bias)
    assert [name for name, _ in block.named_children()] == ['gp', 'fc3', 'fc3_bn'] and block.deploy
    before = block.state_dict()
    block.local_inject()
    assert all(value is before[key] or torch.equal(value, before[key])
               for key, value in block.state_dict().items())
    assert torch.equal(block.get_equivalent_fc3()[0], weight)


@torch.no_grad()
def test_the_injected_weights_are_the_published_ones(arrays):
    weight, bias = golden_block().get_equivalent_fc3()
    assert relative_error(weight, arrays['block/fc3.weight']) < 1e-6
    assert relative_error(bias, arrays['block/fc3.bias']) < 1e-6
    model = tiny()
    model.locality_injection()
    state = model.state_dict()
    compared = [key for key in state if f'tiny/merged/{key}' in arrays]
    assert len(compared) >= 8
    for key in compared:
        assert relative_error(state[key], arrays[f'tiny/merged/{key}']) < 1e-6
    found = [state[key].double().norm().item() for key in state if '.fc3.' in key]
    np.testing.assert_allclose(found, arrays['repmlp/tiny/injected_fc3_norms'].ravel(), rtol=1e-6)


def test_the_equivalent_fcs_can_be_trained_through():
    block = random_block(6, 6, 3, 4, (1, 3), 2, 2).double().train()
    weight, bias = block.get_equivalent_fc3()
    (weight.square().sum() + bias.square().sum()).backward()
    assert {name for name, p in block.named_parameters() if p.grad is None} == {
        f'gp.fc{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
    entry = block.repconv3.conv.weight
    step = torch.zeros_like(entry)
    step[1, 0, 0, 2] = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            entry += sign * step
            values.append(sum(t.square().sum() for t in block.get_equivalent_fc3()))
            entry -= sign * step
    assert entry.grad[1, 0, 0, 2].item() == pytest.approx((values[0] - values[1]).item() / 2e-6, rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_injection_in_any_dtype_keeps_mode_dtype_and_what_is_frozen(dtype):
    block = random_block(6, 6, 3, 4, (1, 3), 2, 2)
    expected = block.get_equivalent_fc3()[0]
    block = block.to(dtype).train()
    block.fc3.weight.requires_grad_(False)
    block.local_inject()
    assert block.fc3.weight.dtype == block.fc3.bias.dtype == dtype
    assert block.training and block.fc3.training and block.fc3_bn.training
    assert not block.fc3.weight.requires_grad and not block.fc3.bias.requires_grad
    assert block.fc3.weight.is_contiguous()
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert relative_error(block.fc3.weight, expected) < tolerance
    safetensors.torch.save(block.state_dict())  # refuses what is not contiguous


@torch.no_grad()
def test_any_network_with_blocks_is_converted_as_the_published_readme_says():
    torch.manual_seed(0)
    block = RepMLPBlock(8, 8, 4, 4, (3,), num_sharesets=2)
    model = with_random_weights(nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.BatchNorm2d(8))).eval()
    x = torch.randn(2, 3, 8, 4)
    expected, trained = model(x), copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, 'local_inject'):
            module.local_inject()
    assert relative_error(model(x), expected) < 1e-5
    assert torch.equal(trained(x), expected) and not trained[1].deploy
    assert not any(hasattr(module, 'local_inject') for module in tiny().modules()
                   if not isinstance(module, RepMLPBlock))


@torch.no_grad()
def test_folding_leaves_the_first_norm_of_each_unit():
    model = with_random_weights(RepMLPNet(**TINY)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert not model.is_merged and not model.is_folded
    model.deep_fuse_BN()
    assert model.is_merged and model.is_folded and relative_error(model(x), expected) < 1e-5
    model.deep_fuse_BN()
    assert relative_error(model(x), expected) < 1e-5
    assert [name for name, module in model.named_modules() if module in norms(model)] == [
        f'stages.{i}.{j}.prebn1' for i, blocks in enumerate(TINY['num_blocks']) for j in range(blocks)]


def test_fusing_serves_several_rows_by_a_channel():
    layer, norm = nn.Linear(5, 12), with_random_weights(nn.BatchNorm1d(3)).eval()
    weight, bias = fuse_bn(layer, norm)
    x = torch.randn(4, 5)
    expected = norm(layer(x).view(4, 3, 4)).view(4, 12)
    assert torch.allclose(nn.functional.linear(x, weight, bias), expected, atol=1e-5)
    assert weight.shape == (12, 5) and bias.shape == (12,)


@pytest.mark.parametrize('arguments, message', [
    ((6, 8, 3, 4), 'in_channels 6 and out_channels 8'), ((6, 6, 0, 4), 'h 0'),
    ((6, 6, 3, 4, (1,), 4, 4), 'num_sharesets 4 .* divide the 6'), ((6, 6, 3, 4, None, 8), 'reduce 8'),
    *(((6, 6, 3, 4, kernels), r'reparam_conv_k is .*distinct odd')
      for kernels in ((2,), (), 3, (3, 3), (-1,), (1.0,)))])
def test_arguments_that_make_no_block_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepMLPBlock(*arguments)


def test_arguments_that_make_no_network_are_named():
    with pytest.raises(ValueError, match='one entry a stage'):
        RepMLPNet(**{**TINY, 'hs': (16, 8)})
    with pytest.raises(ValueError, match=r'out_indices \(4,\)'):
        RepMLPNet(**TINY, out_indices=(4,))


# ---- Training, and other people's tools --------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing():
    states, grads = [], []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint).train()
        model(image('x', 2, 3, 64, 64)).square().mean().backward()
        states.append(model.state_dict())
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert all(map(torch.equal, *grads))


@torch.no_grad()
def test_a_model_takes_weights_of_either_form():
    torch.manual_seed(0)
    trained = with_random_weights(RepMLPNet(**TINY)).eval()
    merged = copy.deepcopy(trained)
    merged.locality_injection()
    x = torch.randn(1, 3, 64, 64)
    for state in (trained.state_dict(), merged.state_dict()):
        for deploy in (False, True):
            model = RepMLPNet(**TINY, deploy=deploy).eval()
            replknet_zoo.load_state(model, state, 'weights.pth')
            assert relative_error(model(x), trained(x)) < 1e-5
            assert model.is_merged == (deploy or 'stages.0.0.repmlp_block.fc3.bias' in state)
    merged.requires_grad_(False)
    replknet_zoo.load_state(merged, trained.state_dict(), 'weights.pth')
    assert not any(p.requires_grad for p in merged.parameters()) and merged.is_merged
    expected, lacking = merged(x), dict(trained.state_dict())
    del lacking['stages.1.0.prebn2.bias']
    with pytest.raises(ValueError, match='1 missing'):
        replknet_zoo.load_state(merged, lacking, 'weights.pth')
    assert torch.equal(merged(x), expected)
    with pytest.raises(RuntimeError, match='Missing'):
        RepMLPNet(**TINY).load_state_dict(merged.state_dict())


@torch.no_grad()
def test_it_exports_and_runs_under_autocast():
    model = with_random_weights(RepMLPNet(**TINY)).eval()
    x = torch.randn(2, 3, 64, 128)
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch')}})
    other = torch.randn(3, 3, 64, 128)
    assert relative_error(program.module()(x), expected) < 1e-5
    assert relative_error(program.module()(other), model(other)) < 1e-5
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(model(x), expected) < 0.1


@pytest.mark.slow
def test_repmlpnet_shows_the_equivalence():
    done = run_script('python', 'repmlpnet.py')
    assert done.returncode == 0, done.stdout
    differences = re.findall(r'^(\w+) +largest difference of the logits (\S+) of', done.stdout, re.MULTILINE)
    assert [name for name, _ in differences] == ['locality_injection', 'deep_fuse_BN']
    assert max(float(value) for _, value in differences) < 1e-5


def test_layer_decay_knows_the_names():
    model = RepMLPNet(**TINY)
    assigner = optim_factory.layer_decay_assigner(0.5, model.depths)
    found = {name: assigner.get_layer_id(name) for name, _ in model.named_parameters()}
    for prefix, expected in (('conv_embedding.', 0), ('stages.0.', 1), ('embeds.0.', 1), ('stages.1.', 2),
                             ('stages.2.0.', 3), ('stages.2.1.', 7), ('embeds.2.', 11), ('stages.3.', 12),
                             ('head', 13)):
        assert {id for name, id in found.items() if name.startswith(prefix)} == {expected}, prefix


# ---- The recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, arguments', [
    ('cosine', (1e-3, 1e-5, 5, 6, 2, 5e-7)), ('cosine_nowarmup', (1e-3, 1e-5, 4, 5, 0, 0.0)),
    ('cosine_accumulate2', (2e-3, 2e-5, 4, 6, 1, 1e-6, 'cosine', 2)),
    ('linear', (1e-3, 0.0, 5, 6, 2, 5e-7, 'linear'))])
def test_learning_rates_are_the_published_ones(name, arguments, arrays):
    np.testing.assert_allclose(utils.swin_schedule(*arguments), arrays[f'lr/{name}'], rtol=1e-12)


def test_learning_rates_of_the_published_run():
    rates = utils.swin_schedule(1e-3, 0.0, 100, 5004, 10, 5e-7)
    expected = {0: 5e-7, 1: 5e-7, 2: 5.19974e-7, 5004: 1.0043e-4, 50040: 9.9998e-4, 50041: 9.75528e-4,
                250201: 5e-4}
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate, rel=1e-5)
    steps = utils.swin_schedule(1.0, 0.0, 5, 4, 1, 0.5, 'step', decay_epochs=2, decay_rate=0.1)
    np.testing.assert_allclose(steps[[0, 1, 4, 5, 8, 9, 17]], [0.5, 0.5, 0.875, 1.0, 1.0, 0.1, 0.01])
    # micro-batches that fill no step are left out, but count as time
    np.testing.assert_array_equal(utils.swin_schedule(1.0, 0.0, 2, 5, 0, 0.0, update_freq=2),
                                  utils.swin_schedule(1.0, 0.0, 2, 5, 0, 0.0)[[0, 2, 4, 7]])
    with pytest.raises(ValueError, match="unknown schedule 'square'"):
        utils.swin_schedule(1.0, 0.0, 2, 5, 0, 0.0, 'square')


def test_the_recipe_is_the_published_one_and_what_is_given_wins():
    args = get_args_parser().parse_args(['--model', 'RepMLPNet-B256', '--recip', 'repmlp'])  # short for it
    published = dict(epochs=100, warmup_epochs=10, base_lr=1e-3, warmup_lr=5e-7, min_lr=0.0, weight_decay=0.1,
                     clip_grad=5.0, opt='adamw', mixup=0.4, cutmix=1.0, aa='raug15', reprob=0.0, drop_path=0,
                     smoothing=0.1, lr_schedule='swin', input_size=256, train_interpolation='bilinear',
                     model_ema=False, use_amp=False)
    assert {name: getattr(args, name) for name in published} == published
    args = get_args_parser().parse_args(['--epochs', '300', '--recipe', 'repmlp', '--model', 'RepMLPNet-B256',
                                         '--input_size', '512', '--lr', '1e-4', '--aa', 'none'])
    assert (args.epochs, args.input_size, args.base_lr, args.lr, args.aa) == (300, 512, None, 1e-4, 'none')
    plain = get_args_parser().parse_args([])
    named = get_args_parser().parse_args(['--model', 'RepMLPNet-B256'])
    assert {**vars(named), 'model': plain.model} == vars(plain)
