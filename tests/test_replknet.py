"""The model against the recorded outputs of the published code, and its re-parameterization."""
import copy

import pytest
import timm.utils
import torch
from torch import nn

import replknet
import replknet_zoo
from conftest import TINY, TINY_XL, norms, relative_error, with_random_weights
from golden.fill import fill, image
from replknet import RepLKNet
from replknet_zoo import create_model
from tools.benchmarks.model import gmacs

NAMES = [name for name in replknet_zoo.MODELS if name.startswith('RepLKNet')]

SHAPES = {'tiny': TINY, 'tinyxl': TINY_XL}


@pytest.mark.parametrize('name', SHAPES)
def test_logits_equal_the_published_ones(name, golden):
    model = fill(RepLKNet(**SHAPES[name], num_classes=10)).eval()
    assert relative_error(model(image(f'{name}/eval', 2, 3, 64, 64)).detach(),
                          golden('forward')[f'{name}/eval']) < 1e-5


@pytest.mark.parametrize('name', SHAPES)
def test_features_equal_the_published_ones(name, golden):
    model = fill(RepLKNet(**SHAPES[name], num_classes=None, out_indices=(0, 1, 2, 3),
                          norm_intermediate_features=name == 'tinyxl')).eval()
    maps = model(image(f'{name}/features', 1, 3, 64, 64))
    for i, feature in enumerate(maps):
        assert relative_error(feature.detach(), golden('forward')[f'{name}/features/{i}']) < 1e-5


@pytest.mark.parametrize('use_checkpoint', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_a_training_step_equals_the_published_one(use_checkpoint, channels_last, golden):
    """Activation checkpointing included: the running statistics move once a step, not once more in the second
    forward."""
    recorded = golden('forward')
    model = fill(RepLKNet(**TINY, num_classes=10, use_checkpoint=use_checkpoint))
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    x = image('tiny/train', 4, 3, 64, 64).requires_grad_()
    logits = model(x)
    (logits * image('tiny/train/cotangent', 4, 10)).sum().backward()
    assert relative_error(logits.detach(), recorded['tiny/train/logits']) < 1e-4
    assert relative_error(x.grad, recorded['tiny/train/input_grad']) < 1e-3
    grad_norms = torch.stack([p.grad.double().norm() for _, p in sorted(model.named_parameters())])
    torch.testing.assert_close(grad_norms, torch.from_numpy(recorded['tiny/train/grad_norms']), rtol=1e-3,
                               atol=1e-5)  # of biases in front of a BatchNorm it is 0 but for rounding
    state = sorted(model.state_dict().items())
    running = torch.cat([tensor for name, tensor in state if 'running' in name])
    assert relative_error(running, recorded['tiny/train/running']) < 1e-5
    assert {tensor.item() for name, tensor in state if 'tracked' in name} == {1}


def test_31b_logits_equal_the_published_ones(golden):
    model = fill(create_model('RepLKNet-31B')).eval()
    with torch.inference_mode():
        assert relative_error(model(image('31B/eval', 1, 3, 224, 224)), golden('forward')['31B/eval']) < 1e-5


def test_merged_kernels_equal_the_published_ones(golden):
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    model.structural_reparam()
    state = model.state_dict()
    recorded = {key.removeprefix('tiny/merged/'): value for key, value in golden('forward').items()
                if 'merged' in key}
    assert recorded
    for key, value in recorded.items():
        assert relative_error(state[key], value) < 1e-6


@pytest.mark.parametrize(('name', 'kind'), [
    ('RepLKNet-31B', ''), ('RepLKNet-31B', '/merged'), ('RepLKNet-31B', '/backbone'), ('RepLKNet-31L', ''),
    ('RepLKNet-31L', '/merged'), ('RepLKNet-XL', ''), ('RepLKNet-XL', '/merged'),
    ('RepLKNet-XL', '/backbone')])
def test_state_dict_keys_and_shapes_are_the_published_ones(name, kind, golden):
    recorded = golden('state_dicts')
    options = {'': {}, '/merged': {'small_kernel_merged': True},
               '/backbone': {'num_classes': None, 'out_indices': range(4),
                             'norm_intermediate_features': 'XL' in name}}[kind]
    with torch.device('meta'):
        model = create_model(name, **options)
    assert [[key, list(value.shape)] for key,
            value in model.state_dict().items()] == recorded['state_dict'][name + kind]
    if name + kind in recorded['parameters']:
        assert sum(p.numel() for p in model.parameters()) == recorded['parameters'][name + kind]


# merged, as published; Table 5 of the paper gives no third digit
@pytest.mark.parametrize(('name', 'size', 'millions', 'published_gmacs', 'tolerance'), [
    ('RepLKNet-31B', 224, 79.527, 15.354, 0.01), ('RepLKNet-31B', 384, 79.527, 45.119, 0.01),
    ('RepLKNet-31L', 384, 172.166, 95.989, 0.01), ('RepLKNet-XL', 320, 335.400, 128.730, 0.01),
    ('RepLKNet-3', 224, 71.8, 12.9, 0.1), ('RepLKNet-7', 224, 72.2, 13.1, 0.1),
    ('RepLKNet-13', 224, 73.7, 13.4, 0.1), ('RepLKNet-25', 224, 78.2, 14.8, 0.1),
    ('RepLKNet-31B', 224, 79.3, 15.3, 0.1),
])
def test_parameters_and_gmacs_are_the_published_ones(name, size, millions, published_gmacs, tolerance):
    with torch.device('meta'):
        model = create_model(name, small_kernel_merged=True, implementation='pytorch').eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.004)
    assert gmacs(model, size) == pytest.approx(published_gmacs, abs=tolerance)
    entry = replknet_zoo.MODELS[name]
    assert entry.parameters == pytest.approx(millions, rel=0.01)
    assert size != entry.input_size or entry.gmacs == pytest.approx(published_gmacs, abs=0.1)


def small_form(name: str, **options) -> RepLKNet:
    """A model of the kernels, depthwise ratio and small kernels of a named one, with few blocks and
    channels."""
    with torch.device('meta'):
        blocks = [stage.blocks[0] for stage in create_model(name).stages]
    kernels, ratio = [block.large_kernel.kernel_size for block in blocks], blocks[0].pw1.conv
    return RepLKNet(kernels, [1, 1, 2, 1], [8, 16, 32, 64], 0.0, blocks[0].large_kernel.small_kernel,
                    ratio.out_channels / ratio.in_channels, **options)


def check_merging_and_folding(model: nn.Module) -> None:
    x = image('x', 1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        model.structural_reparam()
        assert not any('small_conv' in key or 'lkb_origin' in key for key in model.state_dict())
        assert relative_error(model(x), expected) < 1e-5
        model.deep_fuse_BN()
        assert not norms(model)
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize('name', NAMES)
def test_merged_and_folded_models_keep_the_logits(name):
    torch.manual_seed(0)
    check_merging_and_folding(with_random_weights(small_form(name, num_classes=7)).eval())


@pytest.mark.parametrize('name', [name if name == 'RepLKNet-31B'
                                  else pytest.param(name, marks=pytest.mark.slow)
                                  for name in NAMES])
def test_merged_and_folded_models_of_full_size_keep_the_logits(name):
    torch.manual_seed(0)
    check_merging_and_folding(with_random_weights(create_model(name, num_classes=7)).eval())


@pytest.mark.parametrize('name', replknet_zoo.MODELS)
def test_a_model_takes_the_form_of_a_state_dict(name):
    with torch.device('meta'):
        merged, folded, own = (create_model(name) for _ in range(3))
        merged.structural_reparam()
        folded.structural_reparam()
        folded.deep_fuse_BN()
        for form in (own.state_dict(), merged.state_dict(), folded.state_dict()):
            own.take_form(form)
            assert own.state_dict().keys() == form.keys()


def test_other_projects_tools_merge_the_kernels():
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    x = image('x', 2, 3, 64, 64)
    expected = model(x).detach()
    merged = timm.utils.reparameterize_model(model)
    assert any('lkb_reparam' in key for key in merged.state_dict())
    assert relative_error(merged(x).detach(), expected) < 1e-5
    model.switch_to_deploy()
    assert model.state_dict().keys() == merged.state_dict().keys()


@pytest.mark.parametrize('order', [['structural_reparam', 'structural_reparam', 'deep_fuse_BN',
                                    'deep_fuse_BN'],
                                   ['deep_fuse_BN', 'deep_fuse_BN', 'structural_reparam',
                                    'structural_reparam']])
@pytest.mark.parametrize('sync_bn', [False, True])
def test_merging_and_folding_may_be_repeated_and_swapped(order, sync_bn):
    model = fill(RepLKNet(**TINY, num_classes=10, use_sync_bn=sync_bn)).eval()
    assert {type(norm) for norm in norms(model)} == {nn.SyncBatchNorm if sync_bn else nn.BatchNorm2d}
    x = image('x', 2, 3, 64, 64)
    expected = model(x).detach()
    for step in order:
        getattr(model, step)()
        assert relative_error(model(x).detach(), expected) < 1e-5
    assert not norms(model)


def test_merging_and_folding_draw_no_random_numbers():
    model = RepLKNet(**TINY, num_classes=10)
    before = torch.get_rng_state()
    model.structural_reparam()
    model.deep_fuse_BN()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folded_backbone_keeps_its_maps_and_their_norms():
    model = fill(RepLKNet(**TINY_XL, num_classes=None, out_indices=(1, 3),
                          norm_intermediate_features=True)).eval()
    x = image('x', 1, 3, 64, 64)
    expected = [m.detach() for m in model(x)]
    model.deep_fuse_BN()
    assert len(norms(model)) == 4
    for value, wanted in zip(model(x), expected, strict=True):
        assert relative_error(value.detach(), wanted) < 1e-5


def test_a_merged_model_loads_into_one_built_merged():
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    model.structural_reparam()
    built = RepLKNet(**TINY, num_classes=10, small_kernel_merged=True).eval()
    built.load_state_dict(model.state_dict())
    x = image('x', 1, 3, 64, 64)
    assert torch.equal(model(x), built(x))


@pytest.mark.parametrize('indices', [(0,), (3,), (1, 2), [0, 3]])
def test_out_indices_give_the_maps_of_any_stages(indices):
    maps = RepLKNet(**TINY, num_classes=None, out_indices=indices).eval()(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [(TINY['channels'][i], 16 >> i, 16 >> i) for i in indices]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='out_indices'):
        RepLKNet(**TINY, out_indices=(4,))
    with pytest.raises(ValueError, match='small kernel 5 does not fit into large kernel 3'):
        RepLKNet(**dict(TINY, large_kernel_sizes=[3, 3, 3, 3]))
    with pytest.raises(ValueError, match='3 layers'):
        RepLKNet(**dict(TINY, layers=[1, 1, 1]))
    with pytest.raises(ValueError, match='3 drop path rates for 2 blocks'):
        replknet.RepLKNetStage(8, 2, 7, [0.0, 0.1, 0.2], 5)
    with pytest.raises(ValueError, match='RepLKNet-31B'):
        create_model('RepLKNet-32B')


def test_named_models_take_the_models_own_keywords():
    with torch.device('meta'):
        model = replknet.create_RepLKNet31B(small_kernel=3, num_classes=None)
    assert model.stages[0].blocks[0].large_kernel.small_kernel == 3


def test_drop_path_grows_linearly_and_is_shared_by_the_halves_of_a_block():
    model = create_model('RepLKNet-31T', 0.4)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_drop_path_drops_whole_branches_and_keeps_their_mean():
    torch.manual_seed(0)
    layer = replknet.DropPath(0.25)
    y = layer(torch.ones(10_000, 2, 3, 3))
    assert sorted(y.unique().tolist()) == [0, pytest.approx(1 / 0.75)]
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y)) and y.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()(y), y)


def test_sync_bn_concerns_the_one_model_that_was_asked_for_it():
    assert isinstance(norms(RepLKNet(**TINY, use_sync_bn=True))[0], nn.SyncBatchNorm)
    assert not isinstance(norms(RepLKNet(**TINY, use_sync_bn=False))[0], nn.SyncBatchNorm)


def test_checkpointed_gradients_with_drop_path_equal_the_plain_ones():
    gradients = []
    for use_checkpoint in (False, True):
        model = fill(RepLKNet(**dict(TINY, drop_path_rate=0.5), num_classes=10,
                              use_checkpoint=use_checkpoint)).train()
        torch.manual_seed(0)
        model(image('x', 4, 3, 64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_deepcopy_keeps_a_merged_model():
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    model.structural_reparam()
    x = image('x', 1, 3, 64, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_and_exported_models_keep_the_logits(backend):
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    x = image('x', 2, 3, 64, 64)
    expected = model(x).detach()
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x).detach(), expected) < 1e-5
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert relative_error(compiled(x).detach(), expected) < 1e-5
