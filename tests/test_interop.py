"""What other people's tools make of the model and its operator: FLOP counters, torch.fx, torch.jit.trace."""
import itertools
import pickle
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from conftest import TINY, relative_error, run_script
from golden.fill import image
from large_kernel_conv import DECOMPOSITIONS, DepthwiseConv2d, FrozenDepthwiseConv2d, depthwise_conv2d
from replknet import RepLKNet
from replknet_zoo import create_model

BACKBONE = {'num_classes': None, 'out_indices': (0, 2, 3), 'norm_intermediate_features': True}
KINDS = {'classifier': {}, 'features': {'num_classes': None}, 'backbone': BACKBONE}


def outputs(y: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    values = y.values() if isinstance(y, dict) else y if isinstance(y, tuple) else (y,)
    return [value.detach() for value in values]


def macs(run) -> float:
    """What torch counts while run() runs, in units of 1e9 multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(('merged', 'gmacs'), [(True, 15.354), (False, 15.431)])
@torch.no_grad()
def test_torch_counts_the_published_multiply_adds(merged, gmacs):
    model = create_model('RepLKNet-31B', small_kernel_merged=merged, use_sync_bn=False).eval()
    assert macs(lambda: model(image('x', 1, 3, 224, 224))) == pytest.approx(gmacs, abs=5e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])  # the last is F.conv2d's
def test_torch_counts_each_pass_of_a_layer(dtype):
    layer, x = DepthwiseConv2d(8, 13).to(dtype), torch.randn(2, 8, 20, 24, dtype=dtype)
    forward = 2 * 8 * 20 * 24 * 13 * 13 / 1e9
    assert macs(lambda: layer(x)) == pytest.approx(forward)
    for wanted in ((True, False), (False, True), (True, True)):
        if wanted[1] and dtype == torch.float64:
            # of F.conv2d torch counts the gradient of each channel's weight as if it met all channels' maps
            continue
        y = layer.requires_grad_(wanted[1])(x.requires_grad_(wanted[0]))
        assert macs(y.sum().backward) == pytest.approx(sum(wanted) * forward)
    frozen = FrozenDepthwiseConv2d(layer)
    assert [macs(lambda: frozen(x.detach())) for _ in range(2)] == pytest.approx([forward, forward])


# --- torch.fx -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('merged', 'drop_path', 'use_checkpoint'), [
    (False, 0.0, True), (False, 0.5, False), (True, 0.5, True)])
def test_a_model_recorded_by_torch_fx_computes_the_same(kind, merged, drop_path, use_checkpoint):
    model = RepLKNet(**dict(TINY, drop_path_rate=drop_path), **KINDS[kind], use_checkpoint=use_checkpoint,
                     small_kernel_merged=merged, use_sync_bn=False)
    for training, x in itertools.product((False, True), (image('x', 2, 3, 64, 64), image('x', 3, 3, 96, 40))):
        graph = symbolic_trace(model.train(training))
        found = []
        for run in (model, graph):
            torch.manual_seed(0)
            found.append(outputs(run(x)))
        assert all(map(torch.equal, *found))


def test_torchvision_extracts_features():
    model = RepLKNet(**TINY, use_checkpoint=True, use_sync_bn=False)
    extract = create_feature_extractor(model, {f'stages.{i}': str(i) for i in range(4)}).eval()
    backbone = RepLKNet(**TINY, num_classes=None, out_indices=range(4), use_sync_bn=False).eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    x = image('x', 2, 3, 64, 64)
    assert all(map(torch.equal, outputs(extract(x)), outputs(backbone(x))))
    assert extract.train()(x)['3'].requires_grad


class Users(nn.Module):
    """A layer of somebody else's, around the function."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 1, 9, 9)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x.relu(), self.weight, bias=self.bias).sigmoid()


@pytest.mark.parametrize('layer', [
    Users(), DepthwiseConv2d(6, 9), FrozenDepthwiseConv2d(DepthwiseConv2d(6, 9), relu=True)])
def test_layers_are_recorded_as_calls_of_one_function_and_can_be_saved(layer):
    graph = symbolic_trace(layer)
    assert [node.target for node in graph.graph.nodes].count(depthwise_conv2d) == 1
    x = image('x', 2, 6, 20, 24)
    for run in (graph, pickle.loads(pickle.dumps(graph))):
        assert relative_error(run(x).detach(), layer(x).detach()) < 1e-6
    with pytest.raises(ValueError, match='x must be'):
        graph(x[0])


# --- torch.jit.trace ----------------------------------------------------------------------------------------


def traced(model: RepLKNet, file: Path) -> Tensor:
    torch.jit.trace(model, image('x', 2, 3, 64, 64)).save(file)
    return image('other', 1, 3, 32, 96)


def decomposed(model: RepLKNet, file: Path) -> Tensor:
    x = image('x', 2, 3, 64, 64)
    torch.export.save(torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS), file)
    return x


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(('kind', 'write'), [
    ('classifier', traced), ('backbone', decomposed),
    pytest.param('backbone', traced, marks=pytest.mark.slow),
    pytest.param('classifier', decomposed, marks=pytest.mark.slow)])
def test_a_file_runs_in_a_program_without_the_package(kind, write, tmp_path):
    """x is of another size than what was traced; a program of torch.export has the size it was made for."""
    model = RepLKNet(**TINY, **KINDS[kind], use_checkpoint=True, use_sync_bn=False).eval()
    x = write(model, tmp_path / 'file.pt2')
    torch.save((x, outputs(model(x))), tmp_path / 'values.pt')
    load = {traced: 'torch.jit.load("file.pt2")',
            decomposed: 'torch.export.load("file.pt2").module()'}[write]
    done = run_script('python', '-W', 'ignore', '-c', textwrap.dedent(f'''
        import sys, torch
        x, expected = torch.load('values.pt')
        y = {load}(x)
        assert 'large_kernel_conv' not in sys.modules
        for value, wanted in zip(y if isinstance(y, (tuple, list)) else (y,), expected, strict=True):
            print('differs by', ((value - wanted).abs().max() / wanted.abs().max()).item())
    '''), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert all(float(line.split()[-1]) < 1e-5 for line in done.stdout.splitlines())
    assert done.stdout.count('differs by') == len(outputs(model(x)))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
def test_a_traced_layer_is_one_convolution_of_pytorchs():
    x = image('x', 2, 6, 20, 24)
    for layer in (Users(), DepthwiseConv2d(6, 9), FrozenDepthwiseConv2d(DepthwiseConv2d(6, 9))):
        graph = str(torch.jit.trace(layer, x).inlined_graph)  # what fvcore counts, by the names of operators
        assert graph.count('aten::_convolution(') == 1 and 'large_kernel_conv::' not in graph
    with pytest.raises(ValueError, match=r'a 4 x 4 kernel has no centre'):
        torch.jit.trace(lambda x, weight: depthwise_conv2d(x, weight), (x, torch.zeros(6, 1, 4, 4)))
