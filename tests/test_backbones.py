"""The backbones that MMSegmentation and MMDetection find in their registry.

`make downstream` installs these packages, `make test-downstream` runs this.
"""
import copy
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import replknet
import repmlpnet
from conftest import TINY, TINY_XL, relative_error, with_random_weights
from large_kernel_conv import DepthwiseConv2d

pytest.importorskip('mmseg', reason='run `make downstream` first')
pytest.importorskip('mmdet', reason='run `make downstream` first')

from mmengine.logging import HistoryBuffer
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict

import segmentation.backbone
import segmentation.replknet
import segmentation.repmlpnet

# the packages' own, a hundred lines
pytestmark = [pytest.mark.downstream, pytest.mark.filterwarnings('ignore')]


def backbone(**options) -> segmentation.replknet.RepLKNet:
    """A tiny one of the registry, with statistics that are not those of initialization."""
    torch.manual_seed(0)
    return with_random_weights(MODELS.build({'type': 'RepLKNet', **TINY, **options}))


# ---- The backbone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [TINY, TINY_XL], ids=['31B', 'XL'])
def test_its_maps_are_those_of_the_model(shape):
    ours = backbone(**shape, norm_intermediate_features=True).eval()
    model = replknet.RepLKNet(**shape, num_classes=None, out_indices=(0, 1, 2, 3), use_sync_bn=False,
                              norm_intermediate_features=True).eval()
    model.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        maps, expected = ours(x), model(x)
    assert [tuple(y.shape) for y in maps] == [(1, 8, 18, 23), (1, 16, 9, 12), (1, 32, 5, 6), (1, 64, 3, 3)]
    assert all(map(torch.equal, maps, expected))
    assert isinstance(ours.stages[0].blocks[0].large_kernel.lkb_origin.conv, DepthwiseConv2d)


@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('use_checkpoint', [False, True])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_what_trains_has_a_gradient_and_what_is_frozen_stays(frozen_stages, out_indices, use_checkpoint,
                                                             norm_eval):
    model = backbone(frozen_stages=frozen_stages, out_indices=out_indices, use_checkpoint=use_checkpoint,
                     norm_eval=norm_eval, norm_intermediate_features=True)
    assert model.train() is model
    frozen = []
    if frozen_stages >= 0:
        frozen = ['stem.'] + [f'stages.{i}.blocks.' for i in range(frozen_stages)]
        frozen += [f'transitions.{i}.' for i in range(frozen_stages - 1)]
    before = copy.deepcopy(model.state_dict())
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not (parameter.requires_grad and name.startswith(tuple(frozen))), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith('stages.0') for name in trained) == (frozen_stages < 1 or 0 in out_indices)
    for name, value in model.state_dict().items():
        if name.endswith('num_batches_tracked'):
            part, i, *rest = name.split('.')
            unused = part == 'stages' and rest[0] == 'norm' and int(i) not in out_indices
            # nothing is computed behind the last map that is wanted
            behind = part != 'stem' and int(i) >= max(out_indices) + (part == 'stages')
            still = norm_eval or unused or behind or name.startswith(tuple(frozen))
            assert value - before[name] == (0 if still else 1), name


def test_freezing_holds_before_and_after_train_is_called():
    model = backbone(frozen_stages=2, drop_path_rate=0.5)
    for mode in (None, True, False, True):
        if mode is not None:
            model.train(mode)
        assert not model.stem.training and not model.transitions[0].training
        assert not any(module.training for module in model.stages[1].blocks.modules())
        assert model.stages[2].training == (mode is not False)


def write_weights(path: Path, layout: str) -> dict[str, torch.Tensor]:
    """A classifier's weights in a file of that layout; returns them."""
    torch.manual_seed(1)
    model = with_random_weights(replknet.RepLKNet(**TINY, num_classes=5, use_sync_bn=False))
    if layout in ('merged', 'folded'):
        model.structural_reparam()
    if layout == 'folded':
        model.deep_fuse_BN()
    state = model.state_dict()
    renamed = {'norm': 'backbone.stages.3.norm', 'head': 'head.fc'}
    theirs = {re.sub(r'^\w+', lambda part: renamed.get(part[0], f'backbone.{part[0]}'), key): value
              for key, value in state.items()}
    files = {'bare': state, 'merged': state, 'folded': state, 'model': {'model': state, 'epoch': 3},
             'mmpretrain': {'state_dict': theirs},
             'module': {'state_dict': {f'module.{key}': value for key, value in state.items()}}}
    torch.save(files[layout], path)
    return state


@pytest.mark.parametrize('keyword', ['pretrained', 'init_cfg'])
@pytest.mark.parametrize('layout', ['bare', 'model', 'module', 'mmpretrain', 'merged'])
def test_pretrained_weights_of_every_layout_arrive(layout, keyword, tmp_path):
    expected = write_weights(tmp_path / 'weights.pth', layout)
    file = str(tmp_path / 'weights.pth')
    value = file if keyword == 'pretrained' else {'type': 'Pretrained', 'checkpoint': file}
    model = backbone(**{keyword: value}, small_kernel_merged=layout == 'merged')
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_weights_of_which_none_fits_are_an_error(tmp_path):
    write_weights(tmp_path / 'weights.pth', 'bare')
    with pytest.raises(ValueError, match=r'no weight of .*weights.pth fits this backbone'):
        backbone(channels=[4, 8, 16, 32], pretrained=str(tmp_path / 'weights.pth')).init_weights()
    torch.save({'state_dict': {'backbone.stem.0.conv.weight': torch.zeros(8, 3, 3, 3)}},
               tmp_path / 'detector.pth')
    with pytest.raises(ValueError, match=r"prefix='backbone\.'"):
        backbone(pretrained=str(tmp_path / 'detector.pth')).init_weights()


@pytest.mark.parametrize('load', ['init_weights', 'load_state_dict', 'mmengine'])
@pytest.mark.parametrize('layout, merged, message', [
    ('bare', True, 'are not merged: leave out small_kernel_merged'),
    ('merged', False, 'small_kernel_merged=True'), ('folded', False, 'folded')])
def test_kernels_merged_on_one_side_alone_are_an_error(layout, merged, message, load, tmp_path):
    """mmengine would leave them random, and give a score."""
    state = write_weights(tmp_path / 'weights.pth', layout)
    model = backbone(small_kernel_merged=merged, pretrained=str(tmp_path / 'weights.pth'))
    with pytest.raises(ValueError, match=message):
        if load == 'init_weights':
            model.init_weights()
        elif load == 'load_state_dict':
            model.load_state_dict(state, strict=False)
        else:
            load_state_dict(nn.ModuleDict({'backbone': model}),
                            {f'backbone.{key}': value for key, value in state.items()})


def test_the_average_of_a_training_run_can_be_taken(tmp_path):
    state = write_weights(tmp_path / 'weights.pth', 'bare')
    other = {key: value + 1 for key, value in state.items()}
    torch.save({'model': other, 'model_ema': state}, tmp_path / 'latest.pth')
    model = backbone(init_cfg={'type': 'Pretrained', 'checkpoint': str(tmp_path / 'latest.pth'),
                               'model_key': 'model_ema'})
    model.init_weights()
    assert torch.equal(model.stem[0].conv.weight, state['stem.0.conv.weight'])


def test_grey_images_give_what_three_equal_colours_give(tmp_path):
    write_weights(tmp_path / 'weights.pth', 'bare')
    models = [backbone(in_channels=channels, pretrained=str(tmp_path / 'weights.pth')).eval()
              for channels in (1, 3)]
    x = torch.randn(1, 1, 64, 64)
    for model in models:
        model.init_weights()
    with torch.no_grad():
        for grey, colour in zip(models[0](x), models[1](x.expand(-1, 3, -1, -1)), strict=True):
            assert relative_error(grey, colour) < 1e-4


def test_what_stays_random_is_told_and_must_not_be_frozen(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(segmentation.backbone, 'print_log', lambda *message: logged.append(message))
    state = write_weights(tmp_path / 'weights.pth', 'bare')
    torch.save({key: value for key, value in state.items() if 'transitions.0' not in key},
               tmp_path / 'some.pth')
    backbone(pretrained=str(tmp_path / 'some.pth'), frozen_stages=1,
             norm_intermediate_features=True).init_weights()
    assert re.search(r'12 stay random, .*: transitions\.0\.0\.conv\.weight', logged[1][0])
    assert logged[1][2] == logging.WARNING
    with pytest.raises(ValueError, match=r'frozen_stages is 2, but .*some\.pth lacks.*transitions\.0'):
        backbone(pretrained=str(tmp_path / 'some.pth'), frozen_stages=2).init_weights()


@pytest.mark.parametrize('options, message', [
    ({'frozen_stages': 5}, 'frozen_stages is 5'),
    ({'num_classes': 1000}, 'num_classes is 1000'),
    ({'out_indices': ()}, r'out_indices is \(\)'),
    ({'out_indices': (3, 1)}, r'out_indices is \(3, 1\)'),
    ({'pretrained': 'a', 'init_cfg': {'type': 'Pretrained', 'checkpoint': 'b'}}, 'pass one of them'),
])
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        backbone(**options)


def test_merging_keeps_the_maps_with_the_norms_that_mmengine_reverts():
    model = backbone()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = revert_sync_batchnorm(model).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.structural_reparam()
        assert all(relative_error(y, e) < 1e-5 for y, e in zip(model(x), expected, strict=True))
    assert not any('small_conv' in name for name in model.state_dict())


class Reaches:
    """Pickles as a call of getattr."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_reading_a_checkpoint_reaches_no_more_than_histories(tmp_path):
    torch.save({'meta': HistoryBuffer([1.0, 2.0], [1, 1])}, tmp_path / 'history.pth')
    assert torch.load(tmp_path / 'history.pth', weights_only=True)['meta'].mean() == 1.5
    torch.save({'meta': Reaches()}, tmp_path / 'foreign.pth')
    with pytest.raises(pickle.UnpicklingError, match='__init__'):
        torch.load(tmp_path / 'foreign.pth', weights_only=True)


# ---- RepMLPNet's backbone ----------------------------------------------------------------------------------

MLP = dict(type='RepMLPNet', channels=(8, 16, 32, 64), hs=(16, 8, 4, 2), ws=(16, 8, 4, 2),
           num_blocks=(1, 1, 2, 1), sharesets_nums=(1, 2, 4, 8), reparam_conv_k=(1, 3))


def mlp_backbone(**options) -> segmentation.repmlpnet.RepMLPNet:
    torch.manual_seed(0)
    return with_random_weights(MODELS.build({**MLP, **options}))


@torch.no_grad()
def test_images_of_any_size_are_padded_to_parts():
    model = mlp_backbone().eval()
    x = torch.randn(2, 3, 70, 130)
    maps = model(x)
    assert [tuple(y.shape) for y in maps] == [(2, 8, 18, 33), (2, 16, 9, 17), (2, 32, 5, 9), (2, 64, 3, 5)]
    padded = mlp_backbone(pad_to_parts=False).eval()(nn.functional.pad(x, (0, 62, 0, 58)))
    for found, whole in zip(maps, padded, strict=True):
        assert torch.equal(found, whole[:, :, :found.shape[2], :found.shape[3]])
    with pytest.raises(ValueError, match='70 x 130'):
        mlp_backbone(pad_to_parts=False)(x)


@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_what_trains_of_repmlpnet_has_a_gradient(frozen_stages, out_indices, norm_eval):
    model = mlp_backbone(frozen_stages=frozen_stages, out_indices=out_indices, norm_eval=norm_eval)
    frozen = ['conv_embedding.'] if frozen_stages >= 0 else []
    frozen += [f'stages.{i}.' for i in range(frozen_stages)]
    frozen += [f'embeds.{i}.' for i in range(frozen_stages - 1)]
    before = copy.deepcopy(model.state_dict())
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    if any(p.requires_grad for p in model.parameters()):
        sum(y.square().mean() for y in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert not (parameter.requires_grad and name.startswith(tuple(frozen))), name
    for name, value in model.state_dict().items():
        if 'running' in name and (norm_eval or name.startswith(tuple(frozen))):
            assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_weights_of_repmlpnet_arrive_in_the_form_that_is_built(tmp_path):
    torch.manual_seed(1)
    shape = {key: value for key, value in MLP.items() if key != 'type'}
    classifier = with_random_weights(repmlpnet.RepMLPNet(**shape, num_class=5)).eval()
    file, x = str(tmp_path / 'weights.pth'), torch.randn(1, 3, 64, 64)
    expected = classifier.forward_features(x)
    torch.save({'model': classifier.state_dict()}, file)
    model = mlp_backbone(pretrained=file).eval()
    model.init_weights()
    assert torch.equal(model(x)[3], expected)
    with pytest.raises(ValueError, match='not merged: leave out deploy'):
        mlp_backbone(pretrained=file, deploy=True).init_weights()
    classifier.locality_injection()
    torch.save(classifier.state_dict(), file)
    with pytest.raises(ValueError, match=r'pass model\.backbone\.deploy=True'):
        mlp_backbone(pretrained=file).init_weights()
    injected = mlp_backbone(pretrained=file, deploy=True).eval()
    injected.init_weights()
    model.structural_reparam()
    for found in (injected, model):
        assert relative_error(found(x)[3], expected) < 1e-5
