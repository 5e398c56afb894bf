"""Segmentation and detection with the real packages.

`make downstream` installs them, `make test-downstream` runs this.
"""
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import replknet_zoo
from conftest import ROOT, relative_error, run_script

pytest.importorskip('mmseg', reason='run `make downstream` first')
pytest.importorskip('mmdet', reason='run `make downstream` first')

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

# the packages' own, a hundred lines
pytestmark = [pytest.mark.downstream, pytest.mark.filterwarnings('ignore')]
CONFIGS = {file.stem: file for folder in ('segmentation', 'detection')
           for file in (ROOT / folder / 'configs').glob('*.py')}
OURS = 'RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640_layer_decay'
# published: parameters in millions (merged, without the auxiliary head), and images in training where known
PUBLISHED = {
    'RepLKNet-31B_1Kpretrain_upernet_80k_cityscapes_769': (110, 1_280_000),
    'RepLKNet-31B_1Kpretrain_upernet_160k_ade20k_512': (112, 5_120_000),
    'RepLKNet-31B_22Kpretrain_upernet_160k_ade20k_640': (112, 5_120_000),
    'RepLKNet-31L_22Kpretrain_upernet_160k_ade20k_640': (207, 5_120_000),
    'RepLKNet-XL_MegData73M_upernet_160k_ade20k_640': (374, 5_120_000),
    'RepLKNet-31B_1Kpretrain_fcos_2x_coco': (87, None),
    'RepLKNet-31B_1Kpretrain_cascade_mask_rcnn_3x_coco': (137, None),
    'RepLKNet-31B_22Kpretrain_cascade_mask_rcnn_3x_coco': (137, None),
    'RepLKNet-31L_22Kpretrain_cascade_mask_rcnn_3x_coco': (229, None),
    'RepLKNet-XL_MegData73Mpretrain_cascade_mask_rcnn_3x_coco': (392, None),
}


def config(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS[name])
    package = 'mmseg' if CONFIGS[name].parent.parent.name == 'segmentation' else 'mmdet'
    importlib.import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
    init_default_scope(package)
    return cfg


def on_meta(cfg: Config) -> nn.Module:
    """Shapes alone, for the full sizes."""
    with torch.device('meta'):
        return MODELS.build(cfg.model)


# ---- The configs -------------------------------------------------------------------------------------------


def test_every_full_size_config_has_its_published_figures():
    assert set(PUBLISHED) == {name for name in CONFIGS if re.match('RepLKNet-(31B|31L|XL)', name)} - {OURS}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_full_size_model_has_the_published_parameters(name):
    model = on_meta(config(name))
    model.backbone.structural_reparam()
    parameters = sum(p.numel() for key, p in model.named_parameters()
                     if not key.startswith('auxiliary_head.'))
    assert abs(parameters / 1e6 / PUBLISHED[name][0] - 1) < 0.02


@pytest.mark.parametrize('name', [name for name in PUBLISHED if PUBLISHED[name][1]])
def test_a_segmentation_schedule_sees_the_published_number_of_images(name):
    cfg = config(name)
    # the docstring says: iterations on GPUs x images
    iterations, gpus, images = re.search(r'([\d,]+) iterations on (\d+) GPUs x (\d)',
                                         CONFIGS[name].read_text()).groups()
    assert int(images) == cfg.train_dataloader.batch_size
    assert int(iterations.replace(',', '')) == cfg.train_cfg.max_iters
    assert cfg.train_cfg.max_iters * int(gpus) * int(images) == PUBLISHED[name][1]
    warmup, decay = cfg.param_scheduler
    assert decay.begin == warmup.end and decay.end == cfg.train_cfg.max_iters


@pytest.mark.parametrize('name', PUBLISHED)
def test_training_and_testing_are_as_published(name):
    cfg = config(name)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == ([127.5] * 3 if '-XL_' in name else [123.675, 116.28, 103.53])
    assert preprocessor.bgr_to_rgb
    assert cfg.model.backbone.get('norm_intermediate_features', False) == ('-XL_' in name)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW' and 'momentum' not in cfg.optim_wrapper.optimizer
    training, testing = (loader.dataset.pipeline for loader in (cfg.train_dataloader, cfg.test_dataloader))
    assert 'RandomFlip' in [step['type'] for step in training]
    assert 'RandomFlip' not in [step['type'] for step in testing]
    if 'upernet' in name:
        assert list(preprocessor['size']) == list(training[3].crop_size) == [int(name[-3:])] * 2
        assert cfg.model.test_cfg.mode == ('slide' if '640' in name else 'whole')
        scales = [step['scale'] for step in cfg.tta_pipeline[1]['transforms'][0]]
        assert scales[2] == testing[1].scale and len(scales) == 6


def test_layer_decay_gives_every_parameter_one_group():
    cfg = config(OURS)
    model = on_meta(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): group for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(found) == len(list(model.parameters()))
    powers = {'backbone.stem.0.conv.weight': 13, 'backbone.stages.0.blocks.0.prelkb_bn.weight': 12,
              'backbone.transitions.1.0.conv.weight': 11, 'backbone.stages.2.blocks.0.pw1.conv.weight': 10,
              'backbone.stages.2.blocks.35.pw1.conv.weight': 2,
              'backbone.stages.3.blocks.3.pw1.conv.weight': 1,
              'decode_head.conv_seg.weight': 0, 'auxiliary_head.conv_seg.bias': 0}
    for name, power in powers.items():
        assert found[id(model.get_parameter(name))]['lr'] == pytest.approx(2e-4 * 0.9 ** power), name
    assert {found[id(p)]['weight_decay'] for p in model.parameters() if p.dim() <= 1} == {0.0}
    assert {found[id(p)]['weight_decay'] for p in model.parameters() if p.dim() > 1} == {0.05}
    for wrong in ({'decay_rate': 0.9, 'num_layers': 12}, {}, {'decay_rate': 7}):
        cfg.optim_wrapper.paramwise_cfg = wrong
        with pytest.raises(ValueError, match='decay_rate alone'):
            build_optim_wrapper(model, cfg.optim_wrapper)


@pytest.mark.parametrize('norm_intermediate_features', [False, True])
@pytest.mark.parametrize('name', ['RepLKNet-31T_fcos_coco_toy', 'RepLKNet-31T_cascade_mask_rcnn_coco_toy'])
def test_every_parameter_up_to_the_pyramid_has_a_gradient(name, norm_intermediate_features):
    """One without would end a run of several processes."""
    cfg = config(name)
    cfg.model.backbone.norm_intermediate_features = norm_intermediate_features
    backbone, neck = MODELS.build(cfg.model.backbone), MODELS.build(cfg.model.neck)
    sum(y.square().mean() for y in neck(backbone(torch.randn(2, 3, 64, 64)))).backward()
    for module in (backbone, neck):
        assert [key for key, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


def test_xl_has_a_norm_for_each_map(golden):
    expected = {key: tuple(shape) for key, shape in golden('state_dicts')['state_dict']['RepLKNet-XL']
                if not key.startswith(('norm.', 'head.'))}
    for stage, channels in enumerate((256, 512, 1024, 2048)):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            expected[f'stages.{stage}.norm.{name}'] = (channels,)
        expected[f'stages.{stage}.norm.num_batches_tracked'] = ()
    model = on_meta(config('RepLKNet-XL_MegData73M_upernet_160k_ade20k_640')).backbone
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_the_cityscapes_config_of_repmlpnet_is_built():
    cfg = config('RepMLPNet-D256_upernet_80k_cityscapes_512x1024')
    model = on_meta(cfg)
    zoo = replknet_zoo.MODELS['RepMLPNet-D256'].build
    with torch.device('meta'):
        expected = {key for key in zoo().state_dict() if not key.startswith('head.')}
    assert set(model.backbone.state_dict()) == expected
    crops = cfg.train_dataloader.dataset.pipeline[3].crop_size, model.test_cfg.crop_size
    assert list(map(tuple, crops)) == [(512, 1024)] * 2
    assert model.backbone.size_multiples == (256, 256)


@pytest.mark.parametrize('name, heads', [
    ('RepLKNet-31B_1Kpretrain_upernet_160k_ade20k_512', 'upernet'),
    ('RepLKNet-31B_1Kpretrain_fcos_2x_coco', 'fcos'),
    ('RepLKNet-31B_1Kpretrain_cascade_mask_rcnn_3x_coco', 'cascade')])
def test_published_downstream_checkpoints_fit_todays_models(name, heads, golden):
    """Keys and shapes: necks and heads of the packages of the time, the backbone of the published code."""
    expected = {key: tuple(shape) for key, shape in golden('downstream')[heads]}
    for key, shape in golden('state_dicts')['state_dict']['RepLKNet-31B']:
        if not key.startswith(('norm.', 'head.')):
            expected[f'backbone.{key}'] = tuple(shape)
    assert {key: tuple(value.shape) for key, value in on_meta(config(name)).state_dict().items()} == expected


# ---- Toys: trained, stopped, resumed, tested and used with the packages' own tools -------------------------


@pytest.fixture(scope='module')
def checkout(tmp_path_factory) -> Path:
    """A checkout elsewhere than the one that is installed, links to this one's files, with the toys' data."""
    folder = tmp_path_factory.mktemp('checkout')
    for path in ROOT.iterdir():
        if path.name not in ('.venv', 'toy_data', 'work_dirs'):
            (folder / path.name).symlink_to(path)
    for script in ('segmentation/toy_data.py', 'detection/toy_data.py'):
        assert run_script('python', script, cwd=folder).returncode == 0
    return folder


def test_the_backbone_comes_by_pythonpath_alone(checkout, tmp_path):
    """No module of a name as common as `segmentation` is installed."""
    tool = tmp_path / 'train.py'
    tool.write_text('import replknet, segmentation.replknet as backbone\n'
                    'print(replknet.__file__, backbone.__file__)')
    done = run_script('python', tool, cwd=checkout, PYTHONPATH='.')
    assert done.stdout.split()[-2:] == [f'{checkout}/replknet.py', f'{checkout}/segmentation/replknet.py']
    done = run_script('python', tool, cwd=checkout, PYTHONPATH='')
    assert "No module named 'segmentation'" in done.stdout


def run_tool(name: str, tool: str, checkout: Path, *options) -> str:
    """mmseg's or mmdet's train.py or test.py, as in the READMEs; returns what it printed."""
    package = importlib.import_module('mmseg' if 'upernet' in name else 'mmdet')
    script = Path(package.__file__).parent / '.mim' / 'tools' / tool
    done = run_script('python', script, CONFIGS[name].relative_to(ROOT), *options, cwd=checkout,
                      PYTHONPATH='.', PYTHONWARNINGS='ignore')
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


TOYS = {  # name: (options that stop it half-way, its last checkpoint, what its test prints)
    'RepLKNet-31T_upernet_ade20k_toy': (['train_cfg.max_iters=30'], 'iter_60', ['mIoU']),
    'RepLKNet-31T_upernet_cityscapes_toy': (['train_cfg.max_iters=30'], 'iter_60', ['mIoU']),
    'RepMLPNet-T32_upernet_cityscapes_toy': (['train_cfg.max_iters=30'], 'iter_60', ['mIoU']),
    'RepLKNet-31T_fcos_coco_toy': (['train_cfg.max_epochs=5'], 'epoch_10', ['coco/bbox_mAP']),
    'RepLKNet-31T_cascade_mask_rcnn_coco_toy': (['train_cfg.max_epochs=5'], 'epoch_10',
                                                ['coco/bbox_mAP', 'coco/segm_mAP']),
}


@pytest.fixture(scope='module', params=TOYS)
def trained(request, checkout):
    """A toy that was trained for half its time and then resumed: (name, its folder)."""
    name, folder = request.param, checkout / request.param
    torch.save(replknet_zoo.create_model(name.split('_')[0]).state_dict(), checkout / 'pretrained.pth')
    pretrained = 'model.backbone.pretrained=pretrained.pth'
    train = name, 'train.py', checkout, '--work-dir', folder, '--cfg-options', pretrained
    printed = run_tool(*train, *TOYS[name][0])
    assert re.search(r'(\d+) of \1 entries of the backbone come from pretrained.pth', printed)
    printed = run_tool(*train, '--resume')
    assert re.search(r'resumed (from )?epoch: \d+, iter: \d+', printed), printed[-3000:]
    return name, folder


def test_a_toy_learns_and_goes_on_where_it_was_stopped(trained):
    name, folder = trained
    lines = [line for line in scalars(folder) if 'loss' in line]
    steps = [line['iter' if 'upernet' in name else 'step'] for line in lines]
    losses = [line['loss'] for line in lines]
    assert steps == sorted(set(steps)) and len(steps) >= 6
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0], losses


def scalars(folder: Path) -> list[dict]:
    """The lines of all runs in a work folder."""
    return [json.loads(line) for run in sorted(folder.glob('2*/vis_data/scalars.json'))
            for line in run.read_text().splitlines()]


@pytest.fixture(scope='module')
def tested(trained, checkout) -> str:
    """What test.py prints of a trained toy."""
    name, folder = trained
    return run_tool(name, 'test.py', checkout, folder / f'{TOYS[name][1]}.pth', '--work-dir', folder / 'test')


def test_a_trained_toy_is_tested(trained, tested):
    name, folder = trained
    for metric in TOYS[name][2]:  # as the validation at the end of the training
        found = float(re.search(rf'{metric}: ([\d.]+)', tested)[1])
        assert found == pytest.approx(scalars(folder)[-1][metric], abs=1e-3)


@pytest.mark.parametrize('trained', ['RepLKNet-31T_upernet_ade20k_toy'], indirect=True)
def test_multi_scale_testing_runs(trained, checkout):
    name, folder = trained
    printed = run_tool(name, 'test.py', checkout, folder / 'iter_60.pth', '--work-dir', folder / 'tta',
                       '--tta', '--cfg-options', 'test_dataloader.dataset.indices=1')
    assert float(re.search(r'aAcc: ([\d.]+)', printed)[1]) > 60


def infer(name: str, checkpoint: Path, image: Path, merged: bool):
    """The packages' inference calls on one image, with merged kernels or not."""
    if 'upernet' in name:
        from mmseg.apis import inference_model, init_model
        from mmseg.utils import register_all_modules
        register_all_modules()
        model = init_model(str(CONFIGS[name]), str(checkpoint), device='cpu')
    else:
        from mmdet.apis import inference_detector as inference_model
        from mmdet.apis import init_detector
        from mmdet.utils import register_all_modules
        register_all_modules()
        model = init_detector(str(CONFIGS[name]), str(checkpoint), device='cpu')
    if merged:
        model.backbone.structural_reparam()
    return inference_model(model, str(image))


def test_a_trained_toy_gives_the_same_with_merged_kernels(trained, checkout):
    name, folder = trained
    checkpoint = folder / f'{TOYS[name][1]}.pth'
    image = {'ade20k': 'ade20k/images/validation/ADE_toy_00000000.jpg',
             'cityscapes': 'cityscapes/leftImg8bit/val/toytown/toytown_000000_000019_leftImg8bit.png',
             'coco': 'coco/val2017/000000000001.jpg'}[re.search('ade20k|cityscapes|coco', name)[0]]
    image = checkout / 'toy_data' / image
    plain, merged = (infer(name, checkpoint, image, merged) for merged in (False, True))
    if 'upernet' in name:
        assert plain.pred_sem_seg.data.shape == (1, 96, 128)
        assert (plain.pred_sem_seg.data == merged.pred_sem_seg.data).float().mean() > 0.999
        assert relative_error(merged.seg_logits.data, plain.seg_logits.data) < 1e-3
    else:
        assert len(plain.pred_instances.bboxes) > 0 and ('masks' in plain.pred_instances) == ('mask' in name)
        scores, expected = (result.pred_instances.scores[:5].tolist() for result in (merged, plain))
        assert scores == pytest.approx(expected, abs=1e-3)


def test_a_checkpoint_in_mmcv_1s_layout_is_used(trained, tested, checkout, tmp_path):
    """The published files: `meta` as mmcv 1.x wrote it, and `state_dict`."""
    name, folder = trained
    checkpoint = torch.load(folder / f'{TOYS[name][1]}.pth', weights_only=False)
    names = ('red', 'green', 'blue')
    meta = {'env_info': 'sys.platform: linux', 'seed': 0, 'epoch': 12, 'iter': 60, 'mmcv_version': '1.7.2',
            'time': 'Thu Mar 10 2022', 'config': 'model = dict()', 'CLASSES': names,
            'PALETTE': [[0, 0, 0], [9, 9, 9], [8, 8, 8]], 'hook_msgs': {'best_score': np.float64(0.5)}}
    torch.save({'meta': meta, 'state_dict': checkpoint['state_dict'],
                'optimizer': {'state': {}, 'param_groups': []}}, tmp_path / 'old.pth')
    printed = run_tool(name, 'test.py', checkout, tmp_path / 'old.pth', '--work-dir', tmp_path / 'test')
    metric = re.compile(rf'{TOYS[name][2][-1]}: [\d.]+')
    assert metric.search(printed)[0] == metric.search(tested)[0]
    assert 'unexpected key' not in printed and 'missing keys' not in printed


# ---- The READMEs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('folder', ['segmentation', 'detection'])
def test_the_readmes_commands_name_configs_and_options_that_exist(folder):
    text = (ROOT / folder / 'README.md').read_text().replace('\\\n', ' ')
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.DOTALL))
    commands = re.findall(r'^(.*)/(?:train|test)\.py\s+(\S+/configs/(\S+)\.py)(.*)', blocks, re.MULTILINE)
    assert len(commands) >= 5
    for start, path, name, rest in commands:
        assert start.startswith('PYTHONPATH=. ') and (ROOT / path).is_file()
        cfg = config(name)
        for option in rest.partition('--cfg-options')[2].split():
            node = cfg
            for part in option.split('=')[0].split('.'):
                node = node[int(part) if isinstance(node, list) else part]  # KeyError, or IndexError
