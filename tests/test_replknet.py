"""The model against the recorded outputs of the published code, and its re-parameterization."""
import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import replknet
import replknet_zoo
from conftest import TINY, TINY_XL, relative_error
from golden.fill import fill, image
from large_kernel_conv import DepthwiseConv2d, FrozenDepthwiseConv2d
from replknet import RepLKNet, get_conv2d
from replknet_zoo import create_model
from tools.benchmarks.model import gmacs

SHAPES = {'tiny': TINY, 'tinyxl': TINY_XL}


def with_random_norms(model: nn.Module) -> nn.Module:
    """Draw weights and statistics of every BatchNorm, which as built would fold to nothing; faster than fill()."""
    for norm in norms(model):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, std=0.1)
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize('name', SHAPES)
def test_logits_equal_the_published_ones(name, golden):
    model = fill(RepLKNet(**SHAPES[name], num_classes=10)).eval()
    assert relative_error(model(image(f'{name}/eval', 2, 3, 64, 64)).detach(), golden('forward')[f'{name}/eval']) < 1e-5


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
    """Activation checkpointing included: the running statistics move once a step, not once more in the second forward."""
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
    recorded = {key.removeprefix('tiny/merged/'): value for key, value in golden('forward').items() if 'merged' in key}
    assert recorded
    for key, value in recorded.items():
        assert relative_error(state[key], value) < 1e-6


@pytest.mark.parametrize(('name', 'kind'), [
    ('RepLKNet-31B', ''), ('RepLKNet-31B', '/merged'), ('RepLKNet-31B', '/backbone'), ('RepLKNet-31L', ''),
    ('RepLKNet-31L', '/merged'), ('RepLKNet-XL', ''), ('RepLKNet-XL', '/merged'), ('RepLKNet-XL', '/backbone')])
def test_state_dict_keys_and_shapes_are_the_published_ones(name, kind, golden):
    recorded = golden('state_dicts')
    options = {'': {}, '/merged': {'small_kernel_merged': True},
               '/backbone': {'num_classes': None, 'out_indices': range(4), 'norm_intermediate_features': 'XL' in name}}[kind]
    with torch.device('meta'):
        model = create_model(name, **options)
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == recorded['state_dict'][name + kind]
    if name + kind in recorded['parameters']:
        assert sum(p.numel() for p in model.parameters()) == recorded['parameters'][name + kind]


# merged, as published; Table 5 of the paper gives no third digit
@pytest.mark.parametrize(('name', 'size', 'millions', 'published_gmacs', 'tolerance'), [
    ('RepLKNet-31B', 224, 79.527, 15.354, 0.01), ('RepLKNet-31B', 384, 79.527, 45.119, 0.01),
    ('RepLKNet-31L', 384, 172.166, 95.989, 0.01), ('RepLKNet-XL', 320, 335.400, 128.730, 0.01),
    ('RepLKNet-3', 224, 71.8, 12.9, 0.1), ('RepLKNet-7', 224, 72.2, 13.1, 0.1), ('RepLKNet-13', 224, 73.7, 13.4, 0.1),
    ('RepLKNet-25', 224, 78.2, 14.8, 0.1), ('RepLKNet-31B', 224, 79.3, 15.3, 0.1),
])
def test_parameters_and_gmacs_are_the_published_ones(name, size, millions, published_gmacs, tolerance):
    with torch.device('meta'):
        model = create_model(name, small_kernel_merged=True, implementation='pytorch').eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.004)
    assert gmacs(model, size) == pytest.approx(published_gmacs, abs=tolerance)


@pytest.mark.parametrize('name', replknet_zoo.MODELS)
def test_merged_and_folded_models_keep_the_logits(name):
    torch.manual_seed(0)
    model = with_random_norms(create_model(name, num_classes=7)).eval()
    x = image('x', 1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        model.structural_reparam()
        assert not any('small_conv' in key or 'lkb_origin' in key for key in model.state_dict())
        assert relative_error(model(x), expected) < 1e-5
        model.deep_fuse_BN()
        assert not norms(model)
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize('order', [['structural_reparam', 'structural_reparam', 'deep_fuse_BN', 'deep_fuse_BN'],
                                   ['deep_fuse_BN', 'deep_fuse_BN', 'structural_reparam', 'structural_reparam']])
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
    model = fill(RepLKNet(**TINY_XL, num_classes=None, out_indices=(1, 3), norm_intermediate_features=True)).eval()
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
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_sync_bn_concerns_the_one_model_that_was_asked_for_it():
    assert isinstance(norms(RepLKNet(**TINY, use_sync_bn=True))[0], nn.SyncBatchNorm)
    assert not isinstance(norms(RepLKNet(**TINY, use_sync_bn=False))[0], nn.SyncBatchNorm)


def test_checkpointed_gradients_with_drop_path_equal_the_plain_ones():
    gradients = []
    for use_checkpoint in (False, True):
        model = fill(RepLKNet(**dict(TINY, drop_path_rate=0.5), num_classes=10, use_checkpoint=use_checkpoint)).train()
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


def test_compiled_and_exported_models_keep_the_logits():
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    x = image('x', 2, 3, 64, 64)
    expected = model(x).detach()
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x).detach(), expected) < 1e-5
    assert relative_error(torch.compile(model, fullgraph=True)(x).detach(), expected) < 1e-5


# --- the external extension --------------------------------------------------------------------------------------------

STAND_IN = '''
"""A test double of the CUDA extension: its names, its padding that reads (0, 0) while it pads K // 2 inside, its two dtypes,
its functions that want contiguous tensors, and its behaviour under autocast: the dtype of x is computed in."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        assert x.is_contiguous() and weight.is_contiguous()
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_contiguous()
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = F.conv2d(*inputs, padding=weight.shape[-1] // 2, groups=len(weight))
        return torch.autograd.grad(y, inputs, grad)


class DepthWiseConv2dImplicitGEMM(nn.Conv2d):
    def __init__(self, channels, kernel, bias=False):
        super().__init__(channels, channels, kernel, groups=channels, bias=bias)

    def forward(self, x):
        if x.dtype not in (torch.float32, torch.float16):
            raise TypeError('Only support fp32 and fp16')
        with torch.autocast(x.device.type, enabled=False):
            y = Convolution.apply(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x).view(1, -1, 1, 1)
'''


@pytest.fixture
def extension(tmp_path, monkeypatch):
    (tmp_path / 'depthwise_conv2d_implicit_gemm.py').write_text(STAND_IN)
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', str(tmp_path))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    yield tmp_path
    sys.modules.pop('depthwise_conv2d_implicit_gemm', None)


def test_the_extension_serves_every_large_depthwise_layer_also_merged_and_folded(extension):
    model = fill(RepLKNet(**TINY, num_classes=10)).eval()
    x = image('x', 2, 3, 64, 64)
    expected = model(x).detach()

    def kinds():
        return {type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 5}
    assert kinds() == {'DepthWiseConv2dImplicitGEMM'}
    model.structural_reparam()
    model.deep_fuse_BN()
    assert kinds() == {'DepthWiseConv2dImplicitGEMM'}
    assert relative_error(model(x).detach(), expected) < 1e-5
    assert sys.path.count(str(extension)) == 1


def test_the_extension_gets_contiguous_tensors_and_gradients(extension):
    x = image('x', 2, 4, 16, 16).to(memory_format=torch.channels_last)
    conv = get_conv2d(4, 4, 7, 1, 3, 1, 4, True)
    plain = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    plain.load_state_dict(conv.state_dict())
    y = conv(x)
    grad = torch.randn(2, 1, 1, 16).expand(y.shape)
    for found, expected in zip(torch.autograd.grad(y, [*conv.parameters()], grad),
                               torch.autograd.grad(plain(x), [*plain.parameters()], grad), strict=True):
        assert relative_error(found, expected) < 1e-5
    assert relative_error(copy.deepcopy(conv)(x).detach(), y.detach()) == 0


def test_the_extension_has_no_bfloat16(extension):
    x = image('x', 2, 4, 16, 16)
    conv = get_conv2d(4, 4, 7, 1, 3, 1, 4, False)
    with pytest.raises(TypeError, match='not in bfloat16: use float16, bfloat16 autocast, or LARGE_KERNEL_CONV_IMPL=auto'):
        conv.bfloat16()(x.bfloat16())
    conv.float()
    for dtype in (torch.float16, torch.bfloat16):  # under autocast the weight stays float32, and x comes from a layer before
        with torch.autocast('cpu', dtype):
            y = conv(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y.detach().float(), conv(x.to(dtype).float()).detach()) < 8e-3
        y.sum().backward()
        assert conv.weight.grad.dtype == torch.float32


def test_the_extension_is_chosen_by_the_layer(extension):
    def kind(channels=4, out_channels=4, kernel=7, stride=1, padding=3, dilation=1, groups=4):
        return type(get_conv2d(channels, out_channels, kernel, stride, padding, dilation, groups, False)).__name__
    assert kind() == kind(kernel=(7, 7), stride=(1, 1), padding=(3, 3), dilation=(1, 1)) == 'DepthWiseConv2dImplicitGEMM'
    for other in ({'kernel': 5, 'padding': 2}, {'stride': 2}, {'padding': 0}, {'dilation': 2}, {'groups': 2},
                  {'out_channels': 8}, {'kernel': (7, 9), 'padding': (3, 4)}, {'kernel': 8, 'padding': 4}):
        assert kind(**other) == 'Conv2d'


@pytest.mark.parametrize('value, kind', [('auto', DepthwiseConv2d), ('', DepthwiseConv2d), ('pytorch', nn.Conv2d)])
def test_without_a_folder_the_variable_chooses_our_own_or_pytorchs(value, kind, extension, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', value)
    for kernel in (1, 3, 7):
        assert type(get_conv2d(4, 4, kernel, 1, kernel // 2, 1, 4, False)) is kind
    conv = get_conv2d(4, 4, 7, 1, 3, 1, 4, True)
    assert (conv.kernel_size, conv.padding, conv.groups) == ((7, 7), (3, 3), 4)
    assert {key: value.shape for key, value in conv.state_dict().items()} == {'weight': (4, 1, 7, 7), 'bias': (4,)}
    # strided, padded otherwise or dilated, grouped or even-sized ones are PyTorch's
    for other in ((4, 4, 7, 2, 3, 1, 4), (4, 4, 7, 1, 0, 1, 4), (4, 4, 7, 1, 3, 2, 4), (4, 4, 7, 1, 3, 1, 2),
                  (4, 4, 8, 1, 4, 1, 4)):
        assert type(get_conv2d(*other, False)) is nn.Conv2d


def test_a_missing_or_broken_extension_says_what_was_looked_for_and_where(extension, monkeypatch):
    file = extension / 'depthwise_conv2d_implicit_gemm.py'
    file.write_text('import a_module_that_was_never_built')
    with pytest.raises(ImportError, match=rf'{file} is there.*a_module_that_was_never_built.*set LARGE_KERNEL_CONV_IMPL to'):
        get_conv2d(4, 4, 7, 1, 3, 1, 4, False)
    file.write_text('raise RuntimeError("CUDA driver")')
    with pytest.raises(ImportError, match='RuntimeError: CUDA driver'):
        get_conv2d(4, 4, 7, 1, 3, 1, 4, False)
    file.unlink()
    with pytest.raises(ImportError, match=rf'there is no {file}.*set LARGE_KERNEL_CONV_IMPL to'):
        get_conv2d(4, 4, 7, 1, 3, 1, 4, False)


def test_each_folder_gives_its_own_extension(extension, tmp_path, monkeypatch):
    (tmp_path / 'second').mkdir()
    (tmp_path / 'second' / 'depthwise_conv2d_implicit_gemm.py').write_text(STAND_IN)
    for folder in (tmp_path, tmp_path / 'second', tmp_path):
        monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', str(folder))
        conv = get_conv2d(4, 4, 7, 1, 3, 1, 4, False)
        assert sys.modules[type(conv).__module__].__file__ == str(folder / 'depthwise_conv2d_implicit_gemm.py')


# Inference.

VARIANTS = {'as trained': [], 'merged': ['structural_reparam'], 'folded': ['structural_reparam', 'deep_fuse_BN']}


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('options', [
    {}, {'num_classes': None}, {'num_classes': None, 'out_indices': (0, 2, 3), 'norm_intermediate_features': True}])
def test_compiled_for_inference_gives_the_same_outputs(options, dtype, tolerance):
    torch.manual_seed(0)
    model = with_random_norms(RepLKNet(**TINY, **options, use_sync_bn=False)).eval()
    compiled = replknet_zoo.compile_for_inference(model, dtype)
    for shape in ((2, 3, 64, 96), (5, 3, 40, 40), (2, 3, 64, 96), (1, 3, 32, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected, found = model(x), compiled(x)
        for value, wanted in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
            assert value.dtype == torch.float32 and relative_error(value, wanted) < tolerance


@pytest.mark.parametrize('variant', VARIANTS)
def test_compiling_for_inference_leaves_the_model_as_it_is(variant):
    model = with_random_norms(RepLKNet(**TINY_XL, use_sync_bn=False)).eval()
    for step in VARIANTS[variant]:
        getattr(model, step)()
    model.train()
    before = copy.deepcopy(model.state_dict())
    compiled = replknet_zoo.compile_for_inference(model)
    x = torch.randn(2, 3, 64, 64)
    found = compiled(x)
    assert model.training and list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(found, model.eval()(x)) < 2e-6


def test_a_large_batch_is_computed_in_slices(monkeypatch):
    model = with_random_norms(RepLKNet(**TINY, use_sync_bn=False)).eval()
    compiled = replknet_zoo.compile_for_inference(model)
    x = torch.randn(7, 3, 64, 64)
    whole = compiled(x)
    compiled.pixels = 3 * 64 * 64
    assert relative_error(compiled(x), whole) < 1e-6
    compiled.pixels = 1  # less than an image
    assert relative_error(compiled(x), whole) < 1e-6


def test_inference_without_onednn_and_under_autocast(monkeypatch):
    model = with_random_norms(RepLKNet(**TINY, use_sync_bn=False)).eval()
    x = torch.randn(2, 3, 32, 32)
    for onednn, implementation in ((True, 'auto'), (True, 'pytorch'), (False, 'auto')):
        monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', implementation)
        monkeypatch.setattr(replknet, '_onednn_computes', lambda dtype, onednn=onednn: onednn)
        compiled = replknet_zoo.compile_for_inference(model)
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 2e-6
        with torch.autocast('cpu', torch.bfloat16):  # dtype is what was asked for
            assert relative_error(compiled(x), model.float().double()(x.double()).detach()) < 2e-6
        model.float()


def test_a_model_compiled_for_inference_stays_as_it_is():
    compiled = replknet_zoo.compile_for_inference(with_random_norms(RepLKNet(**TINY, use_sync_bn=False)))
    assert not compiled.train().model.training
    assert compiled(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)
    x = torch.zeros(1, 3, 64, 64)
    for use in (copy.deepcopy, copy.copy, lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.share_memory,
                replknet_zoo.compile_for_inference, lambda m: m.state_dict(), lambda m: m.load_state_dict({}, strict=False),
                lambda m: list(m.parameters()), lambda m: next(m.buffers()), lambda m: dict(m.named_parameters(recurse=False)),
                lambda m: m.requires_grad_(False), lambda m: torch.jit.trace(m, x), lambda m: torch.export.export(m, (x,)),
                torch.fx.symbolic_trace, lambda m: replknet_zoo.load_state(m, {}, 'weights.pth')):
        with pytest.raises(TypeError, match='cannot be moved, copied or saved: compile the original model again'):
            use(compiled)
    assert compiled(x).shape == (1, 1000)


@pytest.mark.parametrize('built_in_it', [True, False])
@torch.inference_mode()
def test_compiling_in_inference_mode_keeps_the_spectra_too(built_in_it):
    with torch.inference_mode(built_in_it):
        model = RepLKNet(**TINY, use_sync_bn=False)
    compiled = replknet_zoo.compile_for_inference(model)
    compiled(torch.zeros(1, 3, 64, 64))
    frozen = [module for module in compiled.modules() if isinstance(module, FrozenDepthwiseConv2d)]
    assert len(frozen) == 5 and all(isinstance(layer.prepared[1], torch.Tensor) for layer in frozen)


def test_inference_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r'dtype must be torch\.float32 or torch\.bfloat16, not torch\.float16'):
        replknet_zoo.compile_for_inference(RepLKNet(**TINY, use_sync_bn=False), torch.float16)
