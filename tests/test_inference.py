"""The fastest form of a model: the same outputs, from a model that stays as it is."""
import copy

import pytest
import torch
from torch import nn

import replknet_zoo
from conftest import TINY, TINY_XL, relative_error, with_random_weights
from large_kernel_conv import FrozenDepthwiseConv2d
from replknet import ConvBN, RepLKNet
from replknet_zoo import compile_for_inference, inference

VARIANTS = {'as trained': [], 'merged': ['structural_reparam'],
            'folded': ['structural_reparam', 'deep_fuse_BN']}


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('options', [
    {}, {'num_classes': None}, {'num_classes': None, 'out_indices': (0, 2, 3),
                                'norm_intermediate_features': True}])
def test_compiled_for_inference_gives_the_same_outputs(options, dtype, tolerance):
    torch.manual_seed(0)
    model = with_random_weights(RepLKNet(**TINY, **options, use_sync_bn=False)).eval()
    compiled = compile_for_inference(model, dtype)
    for shape in ((2, 3, 64, 96), (5, 3, 40, 40), (2, 3, 64, 96), (1, 3, 32, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected, found = model(x), compiled(x)
        for value, wanted in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)),
                                 strict=True):
            assert value.dtype == torch.float32 and relative_error(value, wanted) < tolerance


@pytest.mark.parametrize('variant', VARIANTS)
def test_compiling_for_inference_leaves_the_model_as_it_is(variant):
    model = with_random_weights(RepLKNet(**TINY_XL, use_sync_bn=False)).eval()
    for step in VARIANTS[variant]:
        getattr(model, step)()
    model.train()
    before = copy.deepcopy(model.state_dict())
    compiled = compile_for_inference(model)
    x = torch.randn(2, 3, 64, 64)
    found = compiled(x)
    assert model.training and list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(found, model.eval()(x)) < 2e-6


def test_a_large_batch_is_computed_in_slices(monkeypatch):
    model = with_random_weights(RepLKNet(**TINY, use_sync_bn=False)).eval()
    compiled = compile_for_inference(model)
    x = torch.randn(7, 3, 64, 64)
    whole = compiled(x)
    compiled.pixels = 3 * 64 * 64
    assert relative_error(compiled(x), whole) < 1e-6
    compiled.pixels = 1  # less than an image
    assert relative_error(compiled(x), whole) < 1e-6


def test_inference_without_onednn_and_under_autocast(monkeypatch):
    model = with_random_weights(RepLKNet(**TINY, use_sync_bn=False)).eval()
    x = torch.randn(2, 3, 32, 32)
    for onednn, implementation in ((True, 'auto'), (True, 'pytorch'), (False, 'auto')):
        monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', implementation)
        monkeypatch.setattr(inference, 'onednn_computes', lambda dtype, onednn=onednn: onednn)
        compiled = compile_for_inference(model)
        with torch.no_grad():
            assert relative_error(compiled(x), model(x)) < 2e-6
        with torch.autocast('cpu', torch.bfloat16):  # dtype is what was asked for
            assert relative_error(compiled(x), model.float().double()(x.double()).detach()) < 2e-6
        model.float()


def test_a_model_compiled_for_inference_stays_as_it_is():
    compiled = compile_for_inference(with_random_weights(RepLKNet(**TINY, use_sync_bn=False)))
    assert not compiled.train().model.training
    assert compiled(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)
    x = torch.zeros(1, 3, 64, 64)
    for use in (copy.deepcopy, copy.copy, lambda m: m.to(torch.bfloat16), nn.Module.half,
                nn.Module.share_memory, compile_for_inference, lambda m: m.state_dict(),
                lambda m: m.load_state_dict({}, strict=False), lambda m: list(m.parameters()),
                lambda m: next(m.buffers()), lambda m: dict(m.named_parameters(recurse=False)),
                lambda m: m.requires_grad_(False), lambda m: torch.jit.trace(m, x),
                lambda m: torch.export.export(m, (x,)), torch.fx.symbolic_trace,
                lambda m: replknet_zoo.load_state(m, {}, 'weights.pth')):
        with pytest.raises(TypeError, match='cannot be moved, copied or saved: compile the original model '
                                            'again'):
            use(compiled)
    assert compiled(x).shape == (1, 1000)


@pytest.mark.parametrize('built_in_it', [True, False])
@torch.inference_mode()
def test_compiling_in_inference_mode_keeps_the_spectra_too(built_in_it):
    with torch.inference_mode(built_in_it):
        model = RepLKNet(**TINY, use_sync_bn=False)
    compiled = compile_for_inference(model)
    compiled(torch.zeros(1, 3, 64, 64))
    frozen = [module for module in compiled.modules() if isinstance(module, FrozenDepthwiseConv2d)]
    assert len(frozen) == 5 and all(isinstance(layer.prepared[1], torch.Tensor) for layer in frozen)


def test_inference_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r'dtype must be torch\.float32, torch\.bfloat16 or torch\.int8, not '
                                         r'torch\.float16'):
        compile_for_inference(RepLKNet(**TINY, use_sync_bn=False), torch.float16)


def test_a_family_joins_by_its_rows(monkeypatch):
    class Block(nn.Module):
        """Another family's block."""
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return x * self.scale

    class Family(nn.Module):
        """A model that answers to the protocol, with a block that is no RepLKNet's."""
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(ConvBN(3, 4, 1), ConvBN(4, 4, 3, relu=True), Block())
            self.structural_reparam = lambda: None

        def forward(self, x):
            return self.stem(x)

        def deep_fuse_BN(self):
            for block in self.stem[:2]:
                block.conv.bias, block.bn = nn.Parameter(torch.ones(4)), nn.Identity()

    class Fused(nn.Module):
        def __init__(self, block, dtype):
            super().__init__()
            self.scale = block.scale.item()

        def forward(self, x):
            return x * self.scale
    monkeypatch.setitem(inference.FUSED, Block, Fused)
    model, x = Family().eval(), torch.randn(2, 3, 8, 8)
    model.deep_fuse_BN()
    compiled = compile_for_inference(model)
    assert [type(m) for m in compiled.model.stem] == [inference.FUSED[ConvBN]] * 2 + [Fused]
    assert relative_error(compiled(x), model(x).detach()) < 1e-5
