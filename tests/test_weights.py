"""Reading checkpoints: every published form, and what is refused."""
import argparse
import copy
import functools
import http.server
import pathlib
import pickle
import threading

import numpy as np
import pytest
import safetensors.torch
import torch

import replknet_zoo
from conftest import TINY, assert_same, relative_error
from golden.fill import fill, image
from replknet import RepLKNet
from replknet_zoo import create_model, load_state, load_weights, model_for, name_of


@pytest.fixture
def model():
    return fill(RepLKNet(**TINY, num_classes=10))


def mmpretrain_keys(state: dict) -> dict:
    """Our keys in mmpretrain's spelling: the final norm in the last stage, the head under head.fc, all else
    in backbone."""
    renamed = {}
    for key, value in state.items():
        if key.startswith('norm.'):
            key = 'backbone.stages.3.' + key
        elif key.startswith('head.'):
            key = 'head.fc.' + key.removeprefix('head.')
        else:
            key = 'backbone.' + key
        renamed[key] = value
    return renamed


FORMS = {
    'bare': lambda state: state,
    'model': lambda state: {'model': state},
    'module': lambda state: {'module': state},
    'state_dict': lambda state: {'meta': {'epoch': 300}, 'state_dict': state},
    'ddp': lambda state: {'model': {f'module.{key}': value for key, value in state.items()}},
    'compiled in ddp': lambda state: {'model': {f'module._orig_mod.{key}': value for key,
                                                value in state.items()}},
    'ddp compiled': lambda state: {'model': {f'_orig_mod.module.{key}': value for key,
                                             value in state.items()}},
    'mmpretrain': lambda state: {'state_dict': mmpretrain_keys(state)},
    # what the published trainer saved: a Namespace, a path, schedule values as NumPy scalars
    'published training': lambda state: {
        'model': state, 'optimizer': {'state': {},
                                      'param_groups': [{'lr': np.float64(4e-3),
                                                        'weight_decay': np.float32(0.05)}]},
        'epoch': 3, 'scaler': {}, 'args': argparse.Namespace(output_dir=pathlib.Path('/runs/a'), lr=4e-3)},
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_every_published_form_is_read(form, zipped, model, tmp_path):
    torch.save(FORMS[form](model.state_dict()), tmp_path / 'weights.pth',
               _use_new_zipfile_serialization=zipped)
    state = load_weights(tmp_path / 'weights.pth')
    assert type(state) is dict
    assert list(state) == list(model.state_dict())
    fresh = RepLKNet(**TINY, num_classes=10)
    assert load_state(fresh, state, 'weights.pth') is False
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(),
                                                 strict=True))


def test_numpy_1_names_of_scalars_are_read(tmp_path):
    torch.save({'lr': np.float64(0.5)}, tmp_path / 'new.pth', _use_new_zipfile_serialization=False)
    old = (tmp_path / 'new.pth').read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    (tmp_path / 'old.pth').write_bytes(old)
    assert b'numpy.core.multiarray' in old
    assert replknet_zoo.read_checkpoint(tmp_path / 'old.pth') == {'lr': 0.5}


def test_a_url_is_downloaded_once(model, tmp_path, monkeypatch):
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_address[1]}/weights.pth'
        first = load_weights(url)
        with pytest.raises(ValueError, match='cannot be downloaded'):
            load_weights(url.replace('weights', 'other'))
        (tmp_path / 'other').mkdir()  # the same file name under another address, at first a page
        (tmp_path / 'other' / 'weights.pth').write_text('<html>come back later</html>')
        with pytest.raises(ValueError, match='web page'):
            load_weights(url.replace('weights', 'other/weights'))
        torch.save({'head.bias': torch.ones(1)}, tmp_path / 'other' / 'weights.pth')
        assert list(load_weights(url.replace('weights', 'other/weights'))) == ['head.bias']
        server.shutdown()
    assert list(first) == list(load_weights(url)) == list(model.state_dict())


def test_the_key_and_prefix_can_be_chosen(model, tmp_path):
    average = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save({'model': model.state_dict(), 'model_ema': average}, tmp_path / 'run.pth')
    assert torch.equal(load_weights(tmp_path / 'run.pth', 'model_ema')['head.bias'], average['head.bias'])
    torch.save({'state_dict': {f'net.{key}': value for key, value in average.items()}},
               tmp_path / 'prefixed.pth')
    assert list(load_weights(tmp_path / 'prefixed.pth', prefix='net.')) == list(average)
    with pytest.raises(ValueError, match=r"no key that begins with 'nett\.'"):
        load_weights(tmp_path / 'prefixed.pth', prefix='nett.')
    torch.save({'generator': average, 'epoch': 1}, tmp_path / 'foreign.pth')
    with pytest.raises(ValueError, match=r'no state dict under model\|module or state_dict: it holds '
                                         r'generator, epoch'):
        load_weights(tmp_path / 'foreign.pth')


def test_files_without_counters_of_batches_are_read(model):
    state = {key: value for key, value in model.state_dict().items()
             if not key.endswith('num_batches_tracked')}
    fresh = RepLKNet(**TINY, num_classes=10)
    load_state(fresh, state, 'old.pth')
    assert_same({key: fresh.state_dict()[key] for key in state}, state, 'state')


def test_a_merged_checkpoint_makes_the_model_a_merged_one(model, tmp_path):
    model.structural_reparam()
    torch.save(model.state_dict(), tmp_path / 'merged.pth')
    fresh = RepLKNet(**TINY, num_classes=10)
    load_state(fresh, load_weights(tmp_path / 'merged.pth'), 'merged.pth')
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_safetensors_are_read_to_the_bit(model, tmp_path):
    state = {**model.state_dict(), 'half': torch.randn(3).bfloat16()}
    safetensors.torch.save_file(state, tmp_path / 'weights.safetensors',
                                {'format': 'pt', 'classes': '10', 'mean': '[0.5, 0.5]'})
    assert_same(load_weights(tmp_path / 'weights.safetensors'), state, 'state')
    assert_same(load_weights(tmp_path / 'weights.safetensors', prefix='head.'),
                {'weight': model.head.weight.data, 'bias': model.head.bias.data}, 'head')
    metadata = replknet_zoo.read_checkpoint(tmp_path / 'weights.safetensors')['metadata']
    assert metadata == {'format': 'pt', 'classes': 10, 'mean': [0.5, 0.5]}
    (tmp_path / 'weights.safetensors').rename(tmp_path / 'named otherwise')
    assert_same(load_weights(tmp_path / 'named otherwise'), state, 'state')


@pytest.mark.parametrize('merged', [True, False])
def test_folded_weights_fold_the_model(merged, model, tmp_path):
    x = image('x', 2, 3, 64, 64)
    expected = model.eval()(x).detach()
    model.deep_fuse_BN()
    if merged:
        model.structural_reparam()
    torch.save(model.state_dict(), tmp_path / 'folded.pth')
    state, fresh = load_weights(tmp_path / 'folded.pth'), RepLKNet(**TINY, num_classes=10).eval()
    load_state(fresh, state, 'folded.pth')
    assert_same(fresh.state_dict(), model.state_dict(), 'state')
    assert relative_error(fresh(x).detach(), expected) < 1e-5


@pytest.mark.parametrize(('name', 'form'), [
    ('RepLKNet-31T', 'trained'), ('RepLKNet-31T', 'merged'), ('RepLKNet-31T', 'folded'),
    ('RepLKNet-31T', 'backbone'), ('RepLKNet-25', 'merged'), ('RepLKNet-XL', 'folded')])
def test_weights_tell_their_model(name, form):
    with torch.device('meta'):
        model = create_model(name, num_classes=None if form == 'backbone' else 7)
    if form in ('merged', 'folded'):
        model.structural_reparam()
    if form == 'folded':
        model.deep_fuse_BN()
    state = model.state_dict()
    assert name_of(state) == name
    del state['transitions.0.1.conv.weight']
    assert name_of(state) is None


def test_a_model_is_built_for_weights_with_their_classes():
    model = fill(create_model('RepLKNet-31T', num_classes=3)).eval()
    x = image('x', 1, 3, 32, 32)
    built = model_for('RepLKNet-31T', model.state_dict(), 'a.pth')
    assert torch.equal(built(x), model(x))
    backbone = create_model('RepLKNet-31T', num_classes=None)
    assert_same(model_for('RepLKNet-31T', backbone.state_dict(), 'b.pth').state_dict(), backbone.state_dict(),
                'backbone')


def test_weights_of_another_model_are_named():
    state = create_model('RepLKNet-31T', num_classes=3).state_dict()
    with pytest.raises(ValueError, match=r'a\.pth holds weights of RepLKNet-31T, not of RepLKNet-13'):
        model_for('RepLKNet-13', state, 'a.pth')
    del state['norm.bias']
    with pytest.raises(ValueError, match=r'a\.pth does not fit the model\. 1 missing: norm\.bias '
                                         r'\(RepLKNet-31T\)'):
        model_for('RepLKNet-31T', state, 'a.pth')
    with pytest.raises(ValueError, match=r'unknown model .RepLKNet-32B.: choose one of RepLKNet-31B'):
        model_for('RepLKNet-32B', state, 'a.pth')


def test_keys_and_shapes_that_do_not_fit_are_listed_and_change_nothing(model):
    state = fill(RepLKNet(**dict(TINY, large_kernel_sizes=[31, 29, 27, 15]), num_classes=10)).state_dict()
    state['extra'] = state.pop('norm.bias')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = (r'other\.pth does not fit the model\. 1 missing: norm\.bias; 1 unexpected: extra; 1 of another '
            r'shape: stages\.3.*\(64, 1, 15, 15\), not \(64, 1, 13, 13\)')
    with pytest.raises(ValueError, match=told):
        load_state(model, state, 'other.pth')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_finetuning_replaces_the_head_alone(model):
    other = RepLKNet(**TINY, num_classes=3)
    head = other.head.weight.clone()
    with pytest.raises(ValueError, match=r'head\.weight \(10, 64\), not \(3, 64\)'):
        load_state(other, model.state_dict(), 'a.pth')
    assert load_state(other, model.state_dict(), 'a.pth', new_head=True) is True
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.norm.weight, model.norm.weight)
    state = model.state_dict()
    del state['norm.bias']
    with pytest.raises(ValueError, match=r'missing: norm\.bias'):
        load_state(other, state, 'a.pth', new_head=True)


@pytest.mark.parametrize('form', ['trained', 'merged', 'folded', 'mmpretrain'])
def test_a_backbone_takes_a_classifiers_weights(form, model, tmp_path):
    x = image('x', 2, 3, 64, 64)
    expected = model.eval().forward_features(x)
    if form in ('merged', 'folded'):
        model.structural_reparam()
    if form == 'folded':
        model.deep_fuse_BN()
    state = model.state_dict()
    torch.save({'model': mmpretrain_keys(state) if form == 'mmpretrain' else state},
               tmp_path / 'classifier.pth')
    state = load_weights(tmp_path / 'classifier.pth')
    backbone = RepLKNet(**TINY, num_classes=None, out_indices=range(4)).eval()
    left_out = 'head' if form == 'folded' else 'norm, head'
    with pytest.warns(UserWarning, match=rf'classifier\.pth: a backbone has no classifier, left out: '
                                         rf'{left_out}$'):
        assert load_state(backbone, state, 'classifier.pth') is False
    maps = backbone(x)
    assert len(maps) == 4 and relative_error(maps[3].detach(), expected.detach()) < 1e-5
    assert 'head.weight' in state  # as it was
    load_state(backbone, {key: value for key, value in state.items() if key in backbone.state_dict()},
               'a backbone.pth')


@pytest.mark.filterwarnings('ignore:.*left out')
def test_the_norms_of_a_backbones_maps_stay_new(model):
    backbone = RepLKNet(**TINY, num_classes=None, out_indices=(1, 3), norm_intermediate_features=True)
    names = r'stages\.0\.norm, stages\.1\.norm, stages\.2\.norm, stages\.3\.norm'
    with pytest.warns(UserWarning, match=rf'\.pth: a classifier has no norms of maps, new: {names}$'):
        load_state(backbone, model.state_dict(), 'classifier.pth')
    assert torch.equal(backbone.stages[3].norm.running_var, torch.ones(64))
    assert torch.equal(backbone.stem[0].bn.running_var, model.stem[0].bn.running_var)
    state = backbone.state_dict()  # a backbone's own file must have them all
    del state['stages.2.norm.weight']
    with pytest.raises(ValueError, match=r'1 missing: stages\.2\.norm\.weight$'):
        load_state(backbone, state, 'backbone.pth')


@pytest.mark.parametrize('change', ['a block less', 'other channels', 'no classifier'])
def test_a_backbone_refuses_what_does_not_fit_it(change, model):
    backbone = RepLKNet(**TINY, num_classes=None, out_indices=range(4))
    state, before = model.state_dict(), copy.deepcopy(backbone.state_dict())
    if change == 'a block less':
        del state['stages.2.blocks.3.pw1.conv.weight']
    elif change == 'other channels':
        state['stem.0.conv.weight'] = torch.zeros(9, 3, 3, 3)
    else:
        state = {f'backbone.{key}': value for key, value in state.items()}
    with pytest.raises(ValueError, match=r'r\.pth does not fit the model\. .*(missing|another shape)'):
        load_state(backbone, state, 'classifier.pth')
    assert_same(backbone.state_dict(), before, 'backbone')


class Malicious:
    def __reduce__(self):
        return exec, ('import pathlib; pathlib.Path("ran").touch()',)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Malicious()}, 'evil.pth')
    pathlib.Path('bare.pth').write_bytes(pickle.dumps({'model': Malicious()}))
    for file in ('evil.pth', 'bare.pth'):
        with pytest.raises(ValueError, match=rf'{file} ') as refusal:
            load_weights(file)
        assert 'weights_only' not in str(refusal.value)  # torch's advice to switch the protection off
    with pytest.raises(ValueError, match=r'evil\.pth is refused: .*exec, which could run code'):
        load_weights('evil.pth')
    assert not pathlib.Path('ran').exists()


@pytest.mark.parametrize('content', ['truncated', 'truncated safetensors', 'empty', 'text', 'page'])
def test_a_file_that_is_no_checkpoint_is_named(content, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    half = (tmp_path / 'x.pth').read_bytes()
    contents = {'truncated': half[:len(half) // 2], 'empty': b'', 'text': b'hello there',
                'truncated safetensors': safetensors.torch.save(model.state_dict())[:-1],
                'page': b'<!DOCTYPE html><html>Quota exceeded</html>'}
    (tmp_path / 'x.pth').write_bytes(contents[content])
    told = r'x\.pth cannot be read as a checkpoint' + ('.*web page' if content == 'page' else '')
    with pytest.raises(ValueError, match=told):
        load_weights(tmp_path / 'x.pth')


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('DefaultCPUAllocator: can\'t allocate memory: '
                                                               'you tried')])
def test_too_little_memory_is_named_and_keeps_the_download(error, model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url,
                        file: torch.save(model.state_dict(), file))
    url = 'https://example.org/weights.pth'
    with monkeypatch.context() as patch:
        def fails(*arguments, **keywords):
            raise error
        patch.setattr(torch, 'load', fails)
        with pytest.raises(ValueError, match=r'not enough memory to read .*weights\.pth \(\d+ MiB\)'):
            load_weights(url)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, file: pytest.fail('downloaded again'))
    assert list(load_weights(url)) == list(model.state_dict())


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r'there is no checkpoint nowhere/x\.pth'):
        load_weights('nowhere/x.pth')


def test_reading_leaves_what_torch_allows_as_it_was(model, tmp_path):
    """MMEngine's checkpoints need types that this repository allows too."""
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    with torch.serialization.safe_globals([np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        load_weights(tmp_path / 'weights.pth')
        assert set(torch.serialization.get_safe_globals()) == before
