"""replknet_zoo/timm_models.py: what timm's own test suite asks of its models, of each of ours."""
import copy
import gzip
import itertools
import json
import pickle
import subprocess
import sys
import sysconfig
import textwrap

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.task
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_input_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import reparameterize_model
from torch import nn

import datasets
import hubconf
import replknet_zoo
from conftest import GOLDEN, ROOT, relative_error, with_random_weights
from optim_factory import get_parameter_groups, layer_decay_assigner
from replknet_zoo.timm_models import ENTRYPOINTS, default_cfgs
from replknet_zoo.weights import in_mmpretrains_keys

TOYS = ['replknet_31t', 'repmlpnet_t32']
OURS = {name.lower().replace('-', '_'): name for name in replknet_zoo.MODELS}
QUICK = [*TOYS, 'replknet_31b', 'repmlpnet_b224']
EVERY_NAME = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ENTRYPOINTS]
ALL_WEIGHTS = [f'{name}.{tag}' if tag else name for name, cfg in default_cfgs.items() for tag in cfg.cfgs]


def on_meta(name: str, **options) -> tuple[nn.Module, torch.Tensor]:
    """The model, and two images of its size, as shapes alone."""
    with torch.device('meta'):
        model = timm.create_model(name, **options)
        channels, *sides = model.pretrained_cfg['input_size']
        return model, torch.randn(2, options.get('in_chans', channels), *sides)


def toy(name: str, **options) -> nn.Module:
    """A toy in evaluation with BatchNorms that do something."""
    torch.manual_seed(0)
    return with_random_weights(timm.create_model(name, **{'num_classes': 7, **options})).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- every name ---------------------------------------------------------------------------------------------


def test_timm_lists_every_named_model_and_its_weights():
    ours = timm.list_models(module='timm_models')
    assert sorted(ours) == sorted(ENTRYPOINTS) == sorted(OURS)
    assert {'replknet_31b.in1k', 'replknet_31b.in1k_384', 'replknet_31b.in22k_ft_in1k',
            'replknet_31b.in22k_ft_in1k_384', 'replknet_31l.in22k_ft_in1k_384',
            'replknet_xl.meg73m_ft_in1k_320'} <= set(timm.list_pretrained('replknet*'))


@pytest.mark.parametrize('name', EVERY_NAME)
def test_forward_backward_and_pooling_have_timms_shapes(name):
    model, x = on_meta(name, num_classes=42)
    assert model(x).shape == (2, 42) and model.num_classes == 42
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *model.pretrained_cfg['pool_size'])
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, '')
    bare, x = on_meta(name, num_classes=0, global_pool='')
    for maps in (model(x), bare(x)):
        assert maps.shape == features.shape


@pytest.mark.parametrize('name', EVERY_NAME)
def test_the_description_names_what_is_there(name):
    model, _ = on_meta(name)
    cfg, keys = model.pretrained_cfg, model.state_dict()
    assert len(keys[f'{cfg["classifier"]}.weight']) == cfg['num_classes'] == 1000
    assert keys[f'{cfg["first_conv"]}.weight'].shape[1] == cfg['input_size'][0]
    assert [feature['reduction'] for feature in model.feature_info] == [4, 8, 16, 32]
    modules = dict(model.named_modules())
    assert all(feature['module'] in modules for feature in model.feature_info)


@pytest.mark.parametrize(('name', 'out_indices', 'kept'), [
    *(pytest.param(*name.values, (1, 3), (1, 3), marks=name.marks) for name in EVERY_NAME),
    *((name, out_indices, kept) for name in TOYS for out_indices, kept in (
        ((0, 1, 2, 3), (0, 1, 2, 3)), ((-2,), (2,)), ((2, 0), (0, 2)), (2, (2, 3)), ((0,), (0,))))])
def test_features_have_the_channels_and_strides_that_they_say(name, out_indices, kept):
    model, x = on_meta(name, features_only=True, out_indices=out_indices, in_chans=1)
    maps = model(x)
    assert len(maps) == len(kept)
    described = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert sorted(described) == [(y.shape[1], x.shape[2] // y.shape[2]) for y in maps]
    assert [y.shape[1] for y in maps] == [model.model.channels[i] for i in kept]
    # DistributedDataParallel would wait for parameters that nothing reaches
    sum(y.sum() for y in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', EVERY_NAME)
def test_state_dicts_are_the_published_ones(name, golden):
    states = golden('state_dicts')['state_dict'] | json.loads(
        gzip.decompress((GOLDEN / 'repmlp_state_dicts.json.gz').read_bytes()))
    found = {key: list(value.shape) for key, value in on_meta(name)[0].state_dict().items()}
    if OURS[name] in states:  # the others are of the classes that these are of
        recorded = states[OURS[name]]
        recorded = recorded['train'] if isinstance(recorded, dict) and 'train' in recorded else recorded
        assert found == {key: list(shape) for key, shape in dict(recorded).items()}
    with torch.device('meta'):
        ours = replknet_zoo.create_model(OURS[name], use_sync_bn=False).state_dict()
    assert [*found] == [*ours] and all(found[key] == list(ours[key].shape) for key in found)


@pytest.mark.parametrize('name', EVERY_NAME)
def test_timms_layer_decay_gives_main_pys_groups(name):
    model, _ = on_meta(name)
    assigner = layer_decay_assigner(0.7, model.depths)
    ours = {key: assigner.get_layer_id(key) for key, _ in model.named_parameters()}
    found = group_parameters(model, model.group_matcher(), reverse=True)
    numbers = {layer: i for i, layer in enumerate(sorted({*ours.values()}))}  # without gaps
    assert found == {key: numbers[layer] for key, layer in ours.items()}
    if model.depths[2] < 9:
        return
    assert found == ours and len(numbers) == 14
    groups = [get_parameter_groups(model, 0.05, (), assigner.get_layer_id, assigner.get_scale),
              param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)]
    scales = [{id(p): (group['lr_scale'], group['weight_decay']) for group in one for p in group['params']}
              for one in groups]
    assert scales[0].keys() == scales[1].keys()
    assert all(scales[0][p] == pytest.approx(scales[1][p]) for p in scales[0])


@pytest.mark.parametrize('name', TOYS)
def test_coarse_groups_are_stem_stages_and_head(name):
    model = toy(name)
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted({*groups.values()}) == [0, 1, 2, 3, 4, 5]
    assert all(groups[key] == int(key.split('.')[1]) + 1 for key in groups if key.startswith('stages.'))
    assert groups['head.weight'] == 5


@pytest.mark.parametrize('weights', ALL_WEIGHTS)
def test_timms_transform_is_main_pys(weights):
    cfg = timm.get_pretrained_cfg(weights)
    config, size = replknet_zoo.MODELS[OURS[cfg.architecture or weights]], cfg.input_size[1]
    crop_pct = 0.875 if cfg.tag == 'mmpretrain_in1k' else config.crop_pct
    ours = datasets.evaluation_transform(size, crop_pct, config.interpolation, config.mean, config.std)
    if weights == 'repmlpnet_b224.mmpretrain_in1k':  # as its config says
        ours.transforms[0].size = (256, 256)
    theirs = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 450, 3), np.uint8))
    torch.testing.assert_close(theirs(image), ours(image), rtol=0, atol=2e-6)


# --- values, by the toys ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TOYS)
def test_logits_are_those_of_the_model_here(name):
    model = toy(name, in_chans=4)
    ours = replknet_zoo.create_model(OURS[name], num_classes=7, in_channels=4, use_sync_bn=False).eval()
    ours.load_state_dict(model.state_dict())
    x = images(2, 4, 64, 32)
    assert torch.equal(model(x), ours(x))
    assert torch.equal(model.forward_features(x), ours.forward_features(x))


@pytest.mark.parametrize('name', TOYS)
@torch.no_grad()
def test_intermediates_are_the_stages_maps_and_the_features(name):
    model, x = toy(name), images(2, 3, 64, 64)
    options = {'num_classes': None, 'out_indices': range(4), 'use_sync_bn': False}
    if name == 'repmlpnet_t32':
        options['norm_last_map'] = False
    backbone = replknet_zoo.create_model(OURS[name], **options).eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    maps = backbone(x)
    features, found = model.forward_intermediates(x)
    assert torch.equal(features, model.forward_features(x)) and all(map(torch.equal, found, maps))
    assert all(map(torch.equal, model.forward_intermediates(x, [0, -1], intermediates_only=True),
                   (maps[0], maps[3])))
    last, found = model.forward_intermediates(x, [1, 0], stop_early=True)
    assert torch.equal(last, maps[1]) and all(map(torch.equal, found, maps[:2]))
    norm = model.norm if name == 'replknet_31t' else model.head_norm
    features, found = model.forward_intermediates(x, 1, norm=True)
    assert torch.equal(features, model.forward_features(x)) and torch.equal(found[0], norm(maps[3]))
    with pytest.raises(ValueError, match='output_fmt must be NCHW, not NLC'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', TOYS)
def test_checkpointing_changes_neither_outputs_nor_gradients(name):
    model, x = toy(name).train(), images(4, 3, 64, 64)
    runs = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        features, maps = model.forward_intermediates(x)
        model.forward_head(features).square().sum().backward()
        runs.append([features, *maps, *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*runs, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize('name', TOYS)
@torch.no_grad()
def test_timm_merges_the_kernels(name, capfd):
    model, x = toy(name, drop_path_rate=0.2 if name == 'replknet_31t' else 0.0), images(2, 3, 64, 32)
    features = timm.create_model(name, features_only=True).eval()
    for one, run in ((model, lambda m: m(x)), (features, lambda m: torch.cat([y.flatten() for y in m(x)]))):
        merged = reparameterize_model(one)
        assert relative_error(run(merged), run(one)) < 1e-5
        inner = getattr(merged, 'model', merged)
        assert inner.is_merged and not getattr(one, 'model', one).is_merged
        inner.switch_to_deploy()  # once more: nothing is left to do
        assert relative_error(run(merged), run(one)) < 1e-5
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('name', TOYS)
@pytest.mark.parametrize(('global_pool', 'num_classes'), [('avg', 7), ('max', 7), ('catavgmax', 7), ('', 0)])
@torch.no_grad()
def test_folding_keeps_the_outputs_whatever_the_pooling(name, global_pool, num_classes):
    model, x = toy(name, global_pool=global_pool, num_classes=num_classes), images(2, 3, 64, 64)
    expected = model(x)
    assert relative_error(replknet_zoo.compile_for_inference(model)(x), expected) < 1e-5
    model.deep_fuse_BN()
    assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize('name', TOYS)
def test_torch_fx_records_a_model(name):
    model = toy(name)
    for training, enable, x in itertools.product((True, False), (True, False), (images(2, 3, 32, 32),
                                                                                images(3, 3, 64, 96))):
        model.train(training).set_grad_checkpointing(enable)
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(x), model(x))
    merged = torch.fx.symbolic_trace(reparameterize_model(model))
    assert relative_error(merged(x).detach(), model(x).detach()) < 1e-5
    if name == 'repmlpnet_t32':  # the other takes any size
        with pytest.raises(ValueError, match='an image of 33 x 96'):
            merged(x[:, :, :33])
    extract = timm.create_model(name, features_only=True, feature_cls='fx', out_indices=(1, 3)).eval()
    assert [y.shape[1] for y in extract(x)] == [32, 128]


def test_dropout_and_sync_batchnorm_of_timms_scripts_apply():
    model, x = toy('replknet_31t', drop_rate=0.5).train(), images(8, 3, 32, 32)
    torch.manual_seed(0)
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    assert 0.3 < (hidden == 0).float().mean() < 0.7
    assert any(isinstance(m, nn.SyncBatchNorm) for m in convert_sync_batchnorm(model).modules())


@pytest.mark.parametrize('name', TOYS)
def test_models_are_copied_and_pickled(name):
    model, x = toy(name), images(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other.feature_info == model.feature_info


def test_device_and_dtype_are_taken():
    model = timm.create_model('repmlpnet_t32', device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', TOYS)
@pytest.mark.parametrize('spelling', [dict, in_mmpretrains_keys])
def test_files_of_either_spelling_merged_or_not_are_loaded(name, spelling, tmp_path):
    model, x = toy(name, num_classes=1000), images(2, 3, 32, 32)
    expected = model(x).detach()
    for merged in (False, True):
        if merged:
            model.structural_reparam()
        torch.save({'state_dict': spelling(model.state_dict())}, tmp_path / 'weights.pth')
        overlay = {'pretrained_cfg_overlay': {'file': str(tmp_path / 'weights.pth')}}
        found = timm.create_model(name, pretrained=True, **overlay).eval()
        assert relative_error(found(x).detach(), expected) < 1e-5
        one = timm.create_model(name, pretrained=True, num_classes=0, in_chans=1, **overlay)
        first = one.pretrained_cfg['first_conv']
        summed = model.get_submodule(first).weight.sum(1, keepdim=True)  # timm's way to one channel
        torch.testing.assert_close(one.get_submodule(first).weight, summed)
        features = timm.create_model(name, pretrained=True, features_only=True, **overlay).eval()
        assert relative_error(features(x)[1].detach(), model.forward_intermediates(x)[1][1].detach()) < 1e-5


@pytest.mark.parametrize('name', TOYS)
def test_safetensors_and_state_dicts_are_loaded(name, tmp_path):
    model, x = toy(name, in_chans=4), images(2, 4, 32, 32)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    for source in ({'file': str(tmp_path / 'weights.safetensors')}, {'state_dict': model.state_dict()}):
        overlay = {'num_classes': 7, 'input_size': (4, 32, 32), **source}
        found = timm.create_model(name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(found(x), model(x))


@pytest.mark.parametrize('options', [{}, {'num_classes': 5}, {'features_only': True}])
def test_weights_of_another_model_are_refused(options):
    overlay = {'state_dict': toy('repmlpnet_t32', num_classes=1000).state_dict()}
    with pytest.raises(ValueError, match=r'these are weights of RepMLPNet-T32, .* no stem\.0\.conv\.weight'):
        timm.create_model('replknet_31t', pretrained=True, pretrained_cfg_overlay=overlay, **options)


def test_folded_weights_are_refused(tmp_path):
    model = toy('replknet_31t', num_classes=1000)
    model.structural_reparam()
    model.deep_fuse_BN()
    torch.save(model.state_dict(), tmp_path / 'folded.pth')
    with pytest.raises(ValueError, match='BatchNorms of these weights are folded'):
        timm.create_model('replknet_31t', pretrained=True,
                          pretrained_cfg_overlay={'file': str(tmp_path / 'folded.pth')})


@pytest.mark.parametrize(('name', 'message'), [
    ('repmlpnet_t224', r'repmlpnet_t224\.in1k are published on Google Drive alone: fetch https://drive\.goo'),
    ('repmlpnet_b224.in1k', r'repmlpnet_b224\.in1k are published on Google Drive alone'),
    ('replknet_13', r'replknet_13\.in1k are not published; .* pretrained=False')])
def test_weights_that_cannot_be_fetched_are_told(name, message):
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(name, pretrained=True)


def test_urls_are_mmpretrains():
    links = json.dumps(json.loads((ROOT / 'tests' / 'published_links.json').read_text()))
    urls = [cfg.url for default in default_cfgs.values() for cfg in default.cfgs.values() if cfg.url]
    assert len(urls) == 8 and all(url in links or url in (ROOT / 'README.md').read_text() for url in urls)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('replknet_31t', {'global_pool': ''}, '1000 classes need a global_pool'),
    ('replknet_31t', {'out_indices': (1,)}, 'out_indices goes with features_only=True'),
    ('repmlpnet_t32', {'drop_path_rate': 0.1}, 'RepMLPNet has no drop path'),
    ('repmlpnet_t32', {'img_size': 40}, r'takes images of multiples of \(32, 32\) pixels, not 40')])
def test_what_a_model_does_not_have_is_told(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        timm.create_model(name, **options)


@pytest.mark.parametrize('name', TOYS)
def test_a_checkpoint_of_main_py_is_loaded_by_its_path(name, tmp_path):
    model, x = toy(name), images(2, 3, 32, 32)
    torch.save({'model': model.state_dict(), 'epoch': 3}, tmp_path / 'latest.pth')
    found = timm.create_model(name, num_classes=7, checkpoint_path=tmp_path / 'latest.pth').eval()
    assert torch.equal(found(x), model(x))


# --- timm's scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'given', 'size'), [
    ('replknet_31t', {'img_size': 48, 'in_chans': 1}, (1, 48, 48)),
    ('repmlpnet_t32', {'img_size': 64}, (3, 64, 64)),
    ('repmlpnet_t32', {'input_size': (3, 64, 32)}, (3, 64, 32))])
def test_sizes_given_to_timms_scripts_reach_the_model_and_the_images(name, given, size):
    arguments = timm.models.resolve_model_input_args(name, given, pretrained=False, global_pool=None,
                                                     scriptable=False, drop_rate=0.1, bn_eps=None)
    model = timm.create_model(**arguments).eval()
    found = resolve_input_data_config(model, given, use_test_size=True)['input_size']
    assert found == size and model(images(2, *found)).shape == (2, 1000)


def digits(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits at 32 px, normalised by ImageNet's mean and std."""
    data = datasets.Digits(train)
    cfg = timm.get_pretrained_cfg('replknet_31t')
    transform = datasets.evaluation_transform(32, None, 'bicubic', cfg.mean, cfg.std)
    return torch.stack([transform(data[i][0]) for i in range(len(data))]), torch.tensor(data.targets)


def fit(task: nn.Module, model: nn.Module, epochs: int) -> float:
    """Train a task of timm.task on the digits; top-1 of the model on those held out, in percent."""
    x, targets = digits(train=True)
    steps = epochs * (len(x) // 64)
    optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=8e-3, weight_decay=0.05, layer_decay=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr_scale'] * 8e-3 for group in optimizer.param_groups], total_steps=steps)
    task.train()
    for step in range(steps):
        if step % (len(x) // 64) == 0:
            order = torch.randperm(len(x))
        chosen = order[step % (len(x) // 64) * 64:][:64]
        optimizer.zero_grad()
        task(x[chosen], targets[chosen])['loss'].backward()
        optimizer.step()
        schedule.step()
    model.eval()
    x, targets = digits(train=False)
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == targets).float().mean().item()


def test_a_small_kernel_student_learns_from_a_large_kernel_teacher():
    torch.manual_seed(0)
    teacher = timm.create_model('replknet_31t', num_classes=10)
    assert fit(timm.task.ClassificationTask(teacher, criterion=nn.CrossEntropyLoss()), teacher, 6) > 90
    merged = reparameterize_model(teacher.eval())
    student = timm.create_model('replknet_31t', num_classes=10, large_kernel_sizes=(3, 3, 3, 3),
                                small_kernel=3)
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    task = timm.task.LogitDistillationTask(student, merged, criterion=nn.CrossEntropyLoss(),
                                           task_loss_weight=0.3, temperature=2.0)
    assert fit(task, student, 6) > 90
    assert all(map(torch.equal, merged.state_dict().values(), before.values()))  # the teacher only teaches


# --- torch.hub ----------------------------------------------------------------------------------------------


def test_torch_hub_finds_every_model_in_a_checkout(tmp_path):
    assert {*OURS} <= {name for name, value in vars(hubconf).items() if callable(value)}  # what hub offers
    program = textwrap.dedent(f"""
        import sys, torch
        model = torch.hub.load({str(ROOT)!r}, 'replknet_31t', source='local', num_classes=5).eval()
        print(model(torch.randn(2, 3, 32, 32)).shape, sys.modules['replknet'].__file__)
        features = torch.hub.load({str(ROOT)!r}, 'repmlpnet_t32', source='local', features_only=True)
        print(len(features(torch.randn(2, 3, 32, 32))))
        try:
            torch.hub.load({str(ROOT)!r}, 'repmlpnet_d256', source='local', pretrained=True)
        except RuntimeError as error:
            print(error)
    """)
    # -S: this environment's packages without its .pth files, of which one names the checkout
    paths = f'import sys; sys.path.append({sysconfig.get_path("platlib")!r})\n'
    done = subprocess.run([sys.executable, '-I', '-S', '-c', paths + program], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    *_, shape, maps, error = done.stdout.splitlines()
    assert shape == f'torch.Size([2, 5]) {ROOT / "replknet.py"}' and maps == '4'
    assert 'repmlpnet_d256.in1k are published on Google Drive alone' in error
