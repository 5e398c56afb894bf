"""The authors' CUDA extension in the place of our convolution, with a test double that behaves as it does."""
import copy
import sys

import pytest
import torch
from torch import nn

from conftest import TINY, relative_error
from golden.fill import fill, image
from large_kernel_conv import DepthwiseConv2d
from replknet import RepLKNet, get_conv2d

STAND_IN = '''
"""A test double of the CUDA extension: its names, its padding that reads (0, 0) while it pads K // 2 inside,
its two dtypes, its functions that want contiguous tensors, and its behaviour under autocast: the dtype of x
is computed in."""
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
        return {type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv2d)
                and m.kernel_size[0] > 5}
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
    with pytest.raises(TypeError, match='not in bfloat16: use float16, bfloat16 autocast, or '
                                        'LARGE_KERNEL_CONV_IMPL=auto'):
        conv.bfloat16()(x.bfloat16())
    conv.float()
    # under autocast the weight stays float32, and x comes from a layer before
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast('cpu', dtype):
            y = conv(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y.detach().float(), conv(x.to(dtype).float()).detach()) < 8e-3
        y.sum().backward()
        assert conv.weight.grad.dtype == torch.float32


def test_the_extension_is_chosen_by_the_layer(extension):
    def kind(channels=4, out_channels=4, kernel=7, stride=1, padding=3, dilation=1, groups=4):
        return type(get_conv2d(channels, out_channels, kernel, stride, padding, dilation, groups,
                               False)).__name__
    assert kind() == kind(kernel=(7, 7), stride=(1, 1), padding=(3, 3),
                          dilation=(1, 1)) == 'DepthWiseConv2dImplicitGEMM'
    for other in ({'kernel': 5, 'padding': 2}, {'stride': 2}, {'padding': 0}, {'dilation': 2}, {'groups': 2},
                  {'out_channels': 8}, {'kernel': (7, 9), 'padding': (3, 4)}, {'kernel': 8, 'padding': 4}):
        assert kind(**other) == 'Conv2d'


@pytest.mark.parametrize('value, kind', [('auto', DepthwiseConv2d), ('', DepthwiseConv2d),
                                         ('pytorch', nn.Conv2d)])
def test_without_a_folder_the_variable_chooses_our_own_or_pytorchs(value, kind, extension, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', value)
    for kernel in (1, 3, 7):
        assert type(get_conv2d(4, 4, kernel, 1, kernel // 2, 1, 4, False)) is kind
    conv = get_conv2d(4, 4, 7, 1, 3, 1, 4, True)
    assert (conv.kernel_size, conv.padding, conv.groups) == ((7, 7), (3, 3), 4)
    assert {key: value.shape for key, value in conv.state_dict().items()} == {'weight': (4, 1, 7, 7),
                                                                              'bias': (4,)}
    # strided, padded otherwise or dilated, grouped or even-sized ones are PyTorch's
    for other in ((4, 4, 7, 2, 3, 1, 4), (4, 4, 7, 1, 0, 1, 4), (4, 4, 7, 1, 3, 2, 4), (4, 4, 7, 1, 3, 1, 2),
                  (4, 4, 8, 1, 4, 1, 4)):
        assert type(get_conv2d(*other, False)) is nn.Conv2d


def test_a_missing_or_broken_extension_says_what_was_looked_for_and_where(extension, monkeypatch):
    file = extension / 'depthwise_conv2d_implicit_gemm.py'
    file.write_text('import a_module_that_was_never_built')
    with pytest.raises(ImportError, match=rf'{file} is there.*a_module_that_was_never_built.*set '
                                          r'LARGE_KERNEL_CONV_IMPL to'):
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
        file = folder / 'depthwise_conv2d_implicit_gemm.py'
        assert sys.modules[type(conv).__module__].__file__ == str(file)
