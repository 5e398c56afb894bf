"""accelerate() on models that were built elsewhere, and the layers that published code imports."""
import copy
import importlib
import pickle
import sys
import textwrap

import pytest
import timm
import torch
from torch import nn

from conftest import relative_error, run_script
from large_kernel_conv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    DilatedReparamBlock,
    accelerate,
    cpu,
    depthwise_layer,
    restore,
)
from large_kernel_conv.dilated_reparam import BRANCHES
from large_kernel_conv.layers import EXTENSION


@pytest.fixture(scope='module', autouse=True)
def the_kernels_are_there():
    assert cpu.load() is None  # else all of this would test F.conv2d


class Mixed(nn.Module):
    """Layers that qualify, and one of each kind that does not."""

    def __init__(self):
        super().__init__()
        self.square = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.strip = nn.Conv2d(8, 8, (1, 11), padding='same', groups=8, bias=False)
        self.dilated = nn.Conv2d(8, 8, 5, padding=6, dilation=3, groups=8)
        self.sequence = nn.Conv1d(8, 8, 15, padding=7, groups=8)
        self.dense = nn.Conv2d(8, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 7, stride=2, padding=3, groups=8)
        self.reflected = nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode='reflect')
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 7, padding=3, groups=8))
        self.replaced = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.replaced.forward = self.square.forward
        self.ours = DepthwiseConv2d(8, 7)

    def forward(self, x):
        x = self.ours(self.parametrized(self.reflected(self.dilated(self.strip(self.square(x))))))
        return self.strided(self.dense(x)).mean((2, 3)) + self.sequence(x.mean(2)).mean(2)


QUALIFY = {'square': DepthwiseConv2d, 'strip': DepthwiseConv2d, 'dilated': DepthwiseConv2d,
           'sequence': DepthwiseConv1d}


def test_what_qualifies_is_replaced_and_the_rest_says_why():
    model = Mixed()
    dry = accelerate(model, dry_run=True)
    assert type(model.square) is nn.Conv2d
    done = accelerate(model)
    assert dry == done and str(done).splitlines() == [*done.replaced, *done.left]
    assert done.replaced == [
        'square: 8 channels, kernel 7 x 7: replaced', 'strip: 8 channels, kernel 1 x 11: replaced',
        'dilated: 8 channels, kernel 5 x 5: replaced', 'sequence: 8 channels, kernel 15: replaced']
    assert {name: type(getattr(model, name)) for name in QUALIFY} == QUALIFY
    for name, reason in {'dense': 'not depthwise: 8 channels to 8 in 1 groups', 'strided': r'stride (2, 2)',
                         'reflected': 'padding mode reflect', 'replaced': 'its forward was replaced',
                         'parametrized': 'ParametrizedConv2d'}.items():
        line, = (line for line in done.left if line.startswith(f'{name}: '))
        assert ': left, ' in line and line.endswith(reason)
    assert accelerate(model).replaced == []  # nothing is left to do
    assert restore(model) == 4 and restore(model) == 0
    assert all(type(getattr(model, name)) in (nn.Conv1d, nn.Conv2d) for name in QUALIFY)
    assert type(model.ours) is DepthwiseConv2d  # which accelerate() had not made


def test_parameters_hooks_state_and_mode_stay(monkeypatch):
    model, x, seen = Mixed().eval(), torch.randn(2, 8, 24, 24), []
    model.dense.register_forward_hook(lambda *_: seen.append('dense'))
    model.square.register_forward_hook(lambda layer, inputs, y: seen.append(type(layer)))
    model.strip.requires_grad_(False)
    before = model(x).detach()
    parameters, modules = list(model.parameters()), list(model.modules())
    state = copy.deepcopy(model.state_dict())
    accelerate(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == state.keys() and not model.square.training
    y = model(x)
    assert relative_error(y.detach(), before) < 1e-5
    assert seen == [nn.Conv2d, 'dense', DepthwiseConv2d, 'dense']
    y.sum().backward()
    assert model.square.weight.grad is not None and model.strip.weight.grad is None
    model.load_state_dict(state)
    assert restore(copy.deepcopy(model)) == 4 and restore(pickle.loads(pickle.dumps(model.dilated))) == 1
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'pytorch')
    restore(model)
    left = accelerate(model)
    assert not left.replaced and 'LARGE_KERNEL_CONV_IMPL is pytorch' in str(left)


def test_a_compiled_model_may_be_accelerated_before_and_after():
    x = torch.randn(2, 8, 24, 24)
    model = nn.Sequential(nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.ReLU())
    expected = model(x).detach()
    compiled = torch.compile(model, backend='aot_eager')
    for change in (lambda: None, lambda: accelerate(compiled), lambda: restore(compiled)):
        change()
        assert relative_error(compiled(x).detach(), expected) < 1e-6
    accelerate(model)
    assert relative_error(torch.compile(model, backend='aot_eager')(x).detach(), expected) < 1e-6


def test_a_model_in_distributed_data_parallel_may_be_accelerated(tmp_path):
    """Around a model that is accelerated, and the other way round."""
    dist = torch.distributed
    dist.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        x, grads = torch.randn(2, 8, 24, 24), []
        for order in ('before', 'after', 'never'):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.ReLU())
            if order == 'before':
                accelerate(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if order == 'after':
                assert accelerate(wrapped).replaced == ['module.0: 8 channels, kernel 9 x 9: replaced']
            wrapped(x).square().sum().backward()
            grads.append(model[0].weight.grad)
        assert relative_error(grads[0], grads[2]) < 1e-5 and torch.equal(grads[0], grads[1])
    finally:
        dist.destroy_process_group()


# of timm's families with large depthwise kernels or strips, a small one each
TIMM = ['convmixer_768_32', 'convnext_atto', 'convnextv2_atto', 'inception_next_atto', 'starnet_s1',
        'mambaout_femto', 'rdnet_tiny', 'focalnet_tiny_lrf', 'mobilenetv4_conv_small', 'edgenext_xx_small',
        'caformer_s18', 'repvit_m0_9']


@pytest.mark.parametrize('name', TIMM)
@torch.no_grad()
def test_timm_models_keep_their_logits(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter_name, parameter in model.named_parameters():
        if 'gamma' in parameter_name or 'scale' in parameter_name:
            parameter.fill_(1)  # a block that is scaled by 1e-6 would hide whatever its layers compute
    config = timm.get_pretrained_cfg(name)
    x = torch.randn(1, 3, *[config.input_size[-1] if config.fixed_input_size else 160] * 2)
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    done = accelerate(model)
    assert done.replaced
    assert relative_error(model(x), expected) < 1e-4
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- the name that published code imports -----------------------------------------------------------------

# as SLaK, UniRepLKNet, HorNet and RepLKNet do it, in one small network; run where nothing else is imported
PUBLISHED = textwrap.dedent('''
    import os, sys, torch
    from torch import nn
    sys.path.append(os.environ['LARGE_KERNEL_CONV_IMPL'])
    from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM
    torch.manual_seed(0)
    layers = [DepthWiseConv2dImplicitGEMM(8, 31), DepthWiseConv2dImplicitGEMM(8, (51, 5), bias=True),
              DepthWiseConv2dImplicitGEMM(8, (5, 51), bias=False), DepthWiseConv2dImplicitGEMM(8, kernel=13)]
    same = [nn.Conv2d(8, 8, l.kernel_size, padding=[k // 2 for k in l.kernel_size], groups=8,
                      bias=l.bias is not None) for l in layers]
    ours, plain = nn.Sequential(*layers), nn.Sequential(*same)
    plain.load_state_dict(ours.state_dict())
    assert [l.padding for l in layers] == [tuple(l.padding) for l in same]
    x, ys = torch.randn(2, 8, 24, 24), []
    for model in (ours, plain):
        model(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), 1.0).step()
        ys.append(model(x))
    print('differ by', ((ys[0] - ys[1]).abs().max() / ys[1].abs().max()).item())
''')


def test_published_code_imports_the_extension_by_its_name(monkeypatch):
    run = run_script('python', '-c', PUBLISHED, LARGE_KERNEL_CONV_IMPL=str(EXTENSION))
    assert float(run.stdout.split()[-1]) < 1e-5
    monkeypatch.syspath_prepend(EXTENSION)
    monkeypatch.delitem(sys.modules, 'depthwise_conv2d_implicit_gemm', raising=False)
    with pytest.raises(ValueError, match='has no centre'):
        importlib.import_module('depthwise_conv2d_implicit_gemm').DepthWiseConv2dImplicitGEMM(8, 4)
    monkeypatch.delitem(sys.modules, 'depthwise_conv2d_implicit_gemm')


def test_the_variable_that_names_our_folder_means_auto(monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', str(EXTENSION))
    assert type(depthwise_layer(8, 13)) is DepthwiseConv2d


def test_the_module_says_where_the_extension_is_and_what_runs():
    lines = run_script('python', '-m', 'large_kernel_conv').stdout.splitlines()
    assert f'  export PYTHONPATH={EXTENSION}' in lines
    assert (EXTENSION / 'depthwise_conv2d_implicit_gemm.py').is_file()
    assert any(line.startswith('CPU kernels: ') and line.endswith('.so') for line in lines)
    assert any(line.startswith('cpu, 31 x 31 on 56 x 56: cpu fft: ') for line in lines)


# --- UniRepLKNet's block ----------------------------------------------------------------------------------


@pytest.mark.parametrize('kernel_size', BRANCHES)
def test_merged_branches_are_one_convolution(kernel_size):
    torch.manual_seed(0)
    block, x = DilatedReparamBlock(6, kernel_size), torch.randn(2, 6, 24, 24)
    for bn in (module for module in block.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    block.eval()
    expected = block(x).detach()
    branches = [f'k{k}_{dilation}' for k, dilation in BRANCHES[kernel_size]]
    keys = {'lk_origin.weight', *(f'dil_conv_{branch}.weight' for branch in branches)}
    for bn in ('origin_bn', *(f'dil_bn_{branch}' for branch in branches)):
        keys |= {f'{bn}.{name}' for name in ('weight', 'bias', 'running_mean', 'running_var',
                                             'num_batches_tracked')}
    assert block.state_dict().keys() == keys
    assert all((k - 1) * dilation < kernel_size for k, dilation in BRANCHES[kernel_size])
    for _ in range(2):  # the second time there is nothing to do
        assert block.reparameterize() is None
        assert list(block.state_dict()) == ['lk_origin.weight', 'lk_origin.bias']
        assert relative_error(block(x).detach(), expected) < 1e-5
    deployed = DilatedReparamBlock(6, kernel_size, deploy=True)
    deployed.load_state_dict(block.state_dict())
    assert torch.equal(deployed(x), block(x))


def test_the_branches_train():
    block, x = DilatedReparamBlock(6, 13), torch.randn(2, 6, 24, 24, requires_grad=True)
    plain = copy.deepcopy(block)
    for layer in plain.modules():
        if isinstance(layer, DepthwiseConv2d):
            layer.__class__ = nn.Conv2d  # the same in PyTorch's convolution
    seed = torch.randn(2, 6, 24, 24)
    grads = [torch.autograd.grad(model(x), [x, *model.parameters()], seed) for model in (block, plain)]
    for found, wanted in zip(*grads, strict=True):
        assert relative_error(found, wanted) < 1e-4
    with pytest.raises(ValueError, match=r'must be one of \[5, 7, 9, 11, 13, 15, 17\], not 3'):
        DilatedReparamBlock(6, 3)
