"""main.py --model FILE.py:FUNCTION, and study/mobilenet.py, which is one."""
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

import replknet_zoo
import utils
from conftest import ROOT, SHORT, relative_error, run_main, with_random_weights
from large_kernel_conv import DepthwiseConv2d
from study import mobilenet

MOBILENET = ROOT / 'study' / 'mobilenet.py'


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_kernels_of_3_with_shortcuts_are_torchvisions_to_the_bit():
    torch.manual_seed(0)
    theirs = with_random_weights(torchvision.models.mobilenet_v2()).eval()
    ours = mobilenet.mobilenet_v2_k3().eval()
    ours.load_state_dict(theirs.state_dict())
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    x = torch.randn(2, 3, 96, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(('build', 'kernels', 'shortcuts'), [
    (mobilenet.mobilenet_v2_k3, [3] * 17, 10), (mobilenet.mobilenet_v2_k13, [13] * 17, 10),
    (mobilenet.mobilenet_v2_k13_no_shortcut, [13] * 17, 0),
    (mobilenet.mobilenet_v2_last_k7, [3] * 13 + [7] * 4, 10)])
def test_a_networks_kernels_and_shortcuts_are_what_its_name_says(build, kernels, shortcuts):
    model = build(num_classes=5)
    depthwise = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert [conv.kernel_size[0] for conv in depthwise] == kernels
    assert all(isinstance(conv, DepthwiseConv2d) for conv in depthwise
               if conv.kernel_size[0] > 3 and conv.stride == (1, 1))
    blocks = [module for module in model.modules() if isinstance(module, InvertedResidual)]
    assert sum(block.use_res_connect for block in blocks) == shortcuts
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize('build', [mobilenet.mobilenet_v2_k13, mobilenet.mobilenet_v2_k13_reparam3])
@torch.no_grad()
def test_merging_and_folding_keep_the_logits(build):
    torch.manual_seed(0)
    model, x = with_random_weights(build(num_classes=5)).eval(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert not model.is_folded
    for step in (model.structural_reparam, model.deep_fuse_BN, model.deep_fuse_BN):
        step()
        assert relative_error(model(x), expected) < 1e-5
    assert model.is_merged and model.is_folded
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    again = build(num_classes=5).eval()
    again.take_form(model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_main_trains_evaluates_merges_and_finetunes_it(imagenet, tmp_path, capsys):
    options = [*SHORT, '--model', f'{MOBILENET}:mobilenet_v2_k13_reparam3', '--data_path', imagenet]
    run_main(*options, '--output_dir', tmp_path / 'run')
    weights = tmp_path / 'run' / 'latest.pth'
    run_main(*options, '--eval', '--resume', weights, '--with_small_kernel_merged')
    assert 'Kernels merged' in capsys.readouterr().out
    state = torchvision.models.mobilenet_v2().state_dict()
    torch.save(state, tmp_path / 'torchvision.pth')
    run_main(*options, '--model', f'{MOBILENET}:mobilenet_v2_k3', '--finetune', tmp_path / 'torchvision.pth',
             '--output_dir', tmp_path / 'finetuned')
    assert 'with a new head for 2 classes' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('nowhere.py:f', [], 'there is no file nowhere.py'),
    (f'{MOBILENET}:f', [], 'mobilenet.py has no function f'),
    (f'{MOBILENET}:mobilenet_v2_k3', ['--drop_path', '0.1'], 'drop path and activation checkpointing'),
    (f'{MOBILENET}:mobilenet_v2_k3', ['--layer_decay', '0.7'], 'layer decay is defined for four stages')])
def test_what_does_not_fit_is_told(name, options, message, imagenet):
    with pytest.raises(utils.UserError, match=message):
        run_main(*SHORT, '--model', name, '--data_path', imagenet, *options)


def test_a_model_that_lacks_methods_is_told_which(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text('from torch import nn\ndef f(num_classes):\n    return nn.Linear(3, 4)\n'
                    'def g(num_classes):\n    return 3\n')
    for function, message in (('f', 'lacks forward_features, head, depths'),
                              ('g', r'g\(\) must return an nn\.Module, not int')):
        with pytest.raises(ValueError, match=message):
            replknet_zoo.create_model(f'{file}:{function}')
