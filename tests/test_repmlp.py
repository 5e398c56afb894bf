"""RepMLPNet's published command lines, its augmentation, int8, and its training by main.py."""
import functools
import importlib
import json
import pickle
import random
import re
import shlex
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import datasets
import main
import replknet_zoo
import repmlp.convert
import repmlp.main_repmlp
import repmlp.test
from conftest import (
    GOLDEN,
    ROOT,
    assert_same,
    launch,
    log_lines,
    relative_error,
    run_first_epoch,
    run_main,
    run_script,
    with_random_weights,
    write_images,
)
from options import get_args_parser
from repmlp.main_repmlp import KEYS, REFUSED, VALUES, translate
from repmlp.quantization import fake_quantized_forward, insert_batchnorms
from repmlp.raug15 import OPERATIONS, RandAugment15, cutout
from repmlpnet import RepMLPBlock
from utils import UserError

TOY = ['--model', 'RepMLPNet-T32', '--input_size', '32', '--num_workers', '0', '--device', 'cpu']
SHORT = [*TOY, '--nb_classes', '2', '--batch_size', '4', '--epochs', '2', '--warmup_epochs', '1']


LAUNCH = 'python -m torch.distributed.launch --nproc_per_node 8 --master_port 12349 main_repmlp.py '
TRAINED, DEPLOY = 'RepMLPNet-D256-train-acc80.828.pth', 'RepMLPNet-D256-deploy.pth'
COMMANDS = [  # published
    LAUNCH + '--data-path [imagenet-folder] --arch RepMLPNet-D256 --batch-size 32 --tag test --eval --resume '
    f'{TRAINED} --opts DATA.IMG_SIZE 256',
    LAUNCH + '--arch RepMLPNet-B256 --batch-size 32 --tag my_experiment --opts TRAIN.EPOCHS 100 '
    'TRAIN.BASE_LR 0.001 TRAIN.WEIGHT_DECAY 0.1 TRAIN.OPTIMIZER.NAME adamw TRAIN.OPTIMIZER.MOMENTUM 0.9 '
    'TRAIN.WARMUP_LR 5e-7 TRAIN.MIN_LR 0.0 TRAIN.WARMUP_EPOCHS 10 AUG.PRESET raug15 AUG.MIXUP 0.4 '
    'AUG.CUTMIX 1.0 DATA.IMG_SIZE 256',
    f'python test.py [imagenet-folder] train {TRAINED} -a RepMLPNet-D256 -r 256',
    f'python convert.py {TRAINED} {DEPLOY} -a RepMLPNet-D256',
    f'python test.py [imagenet-folder] deploy {DEPLOY} -a RepMLPNet-D256 -r 256',
    f'python test.py [imagenet-folder] check {TRAINED} -a RepMLPNet-D256 -r 256']


@pytest.fixture(scope='module')
def published() -> dict:
    return json.loads((GOLDEN / 'repmlp.json').read_text())


@pytest.fixture(scope='module')
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / 'repmlp.npz'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """ImageNet's layout with 2 classes, a toy's weights as trained.pth, and injected ones as deploy.pth."""
    folder = tmp_path_factory.mktemp('repmlp')
    for part in ('train', 'val'):
        write_images(folder / 'data' / part, 2, 4)
    torch.manual_seed(0)
    model = with_random_weights(replknet_zoo.create_model('RepMLPNet-T32', num_classes=2))
    torch.save(model.state_dict(), folder / 'trained.pth')
    model.structural_reparam()
    torch.save({'model': model.state_dict()}, folder / 'deploy.pth')
    return folder


# ---- main_repmlp.py ----------------------------------------------------------------------------------------


def translated(*words: str) -> dict:
    """main.py's options for a published command line."""
    args = repmlp.main_repmlp.get_args_parser().parse_args(list(map(str, words)))
    return vars(get_args_parser().parse_args(translate(args)))


def flat(tree: dict, prefix: str = '') -> dict:
    found = {}
    for name, branch in tree.items():
        found |= (flat(branch, f'{prefix}{name}.') if isinstance(branch, dict)
                  else {f'{prefix}{name}': branch})
    return found


def test_every_published_key_and_option_is_known_with_its_default(published):
    keys = flat(published['config'])
    assert set(keys) == {*KEYS, *VALUES, *REFUSED}
    for key, (default, _) in {**KEYS, **VALUES}.items():
        value = repmlp.main_repmlp.value_of(default)
        assert (list(value) if isinstance(value, tuple) else value) == keys[key], key
    for script, module in (('main_repmlp.py', repmlp.main_repmlp), ('test.py', repmlp.test),
                           ('convert.py', repmlp.convert)):
        actions = {flag: action for action in module.get_args_parser()._actions
                   for flag in action.option_strings or [action.dest]}
        for option in published['options'][script]:
            for flag in option['flags']:
                assert flag in actions, (script, flag)
                if flag not in ('--local_rank', '--tag', 'mode'):  # set by launchers; 'default'; required
                    assert actions[flag].default == option['default'], (script, flag)


def test_published_commands_stand_in_the_readme_word_for_word_and_are_understood():
    text = (ROOT / 'repmlp' / 'README.md').read_text()
    for command in COMMANDS:
        assert f'| `{command}`' in text, command
        script, _, words = command.partition('.py ')
        module = {'main_repmlp': repmlp.main_repmlp, 'test': repmlp.test, 'convert': repmlp.convert}.get(
            script.split()[-1])
        if module is not None:
            module.get_args_parser().parse_args(shlex.split(words))
    assert '| `python repmlpnet.py`' in text


def test_the_published_recipe_is_translated():
    words = shlex.split(COMMANDS[1].split('main_repmlp.py ')[1])
    found = translated(*words, '--data-path', 'DATA')
    assert found['output_dir'] == 'output/RepMLPNet-B256/my_experiment'
    recipe = vars(get_args_parser().parse_args(['--model', 'RepMLPNet-B256', '--recipe', 'repmlp']))
    own = {'output_dir': found['output_dir'], 'data_path': 'DATA', 'batch_size': 32, 'num_workers': 8,
           'recipe': None, 'opt_betas': [0.9, 0.999]}
    assert found == {**recipe, **own}


def test_published_defaults_and_other_values_are_translated():
    found = translated()
    expected = dict(model='RepMLPNet-B224', batch_size=128, base_lr=0.002, warmup_lr=0.0, min_lr=0.0,
                    epochs=100, warmup_epochs=10, weight_decay=0.1, clip_grad=5.0, mixup=0.0, cutmix=0.0,
                    aa='rand-m9-mstd0.5-inc1', reprob=0.25, color_jitter=0.4, update_freq=1, use_amp=False,
                    lr_schedule='swin', output_dir='output/RepMLPNet-B224/default', seed=0, crop_pct=None,
                    train_interpolation='bilinear', eval=False, resume='')
    assert {name: found[name] for name in expected} == expected
    found = translated('--arch', 'RepMLPNet-T224', '--accumulation-steps', 4, '--amp-opt-level', 'O1',
                       '--eval', '--use-checkpoint', '--resume', 'a.pth', '--local_rank', 1, '--opts',
                       'TRAIN.LR_SCHEDULER.NAME', 'step', 'TRAIN.OPTIMIZER.NAME', 'sgd', 'DATA.DATASET',
                       'cf100', 'TEST.CROP', 'True', 'AUG.PRESET', 'weak', 'AUG.CUTMIX_MINMAX', '(0.2, 0.8)',
                       'TRAIN.EMA_ALPHA', '0', 'SEED', '3', 'DATA.TEST_SIZE', '448')
    expected = dict(model='RepMLPNet-T224', update_freq=4, use_amp=True, eval=True, use_checkpoint=True,
                    resume='a.pth', local_rank=1, lr_schedule='swin_step', opt='sgd', data_set='CIFAR',
                    crop_pct=0.875, aa='none', color_jitter=0.0, reprob=0.0, cutmix_minmax=[0.2, 0.8], seed=3,
                    test_size=448)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize('words, message', [
    (['--opts', 'TRAIN.EPOCHS'], 'pairs of KEY VALUE, and these are 1 words'),
    (['--opts', 'TRAIN.EPOCH', '3'], 'no such key; do you mean TRAIN.EPOCHS'),
    (['--opts', 'DATA.BATCH_SIZE', '3'], 'pass --batch-size'), (['--zip'], 'unpack the archive'),
    (['--throughput'], r'tools/benchmark\.py'), (['--opts', 'TRAIN.EMA_ALPHA', '0.9'], '--model_ema true'),
    (['--opts', 'AUG.PRESET', 'none'], 'choose one of None, raug15, weak')])
def test_what_cannot_be_had_is_refused_by_name(words, message):
    with pytest.raises(UserError, match=message):
        translated(*words)


def test_a_mistyped_option_is_an_error(capsys):
    with pytest.raises(SystemExit):
        translated('--batchsize', 8)
    assert 'unrecognized arguments: --batchsize' in capsys.readouterr().err


def test_published_defaults_without_data_end_with_a_line_that_names_the_option(monkeypatch):
    with pytest.raises(UserError, match='--data-path /path/to/imgnet/: there is no such folder'):
        repmlp.main_repmlp.run(repmlp.main_repmlp.get_args_parser().parse_args([]))


@pytest.mark.slow
def test_the_scripts_run_from_their_folder(folder):
    here = ROOT / 'repmlp'
    common = ['--data-path', folder / 'data', '--arch', 'RepMLPNet-T32', '--batch-size', '4', '--output',
              folder / 'out']
    keys = ['DATA.IMG_SIZE', '32', 'MODEL.NUM_CLASSES', '2', 'DATA.NUM_WORKERS', '1']
    done = run_script('python', 'main_repmlp.py', *common, '--tag', 'run', '--opts', *keys,
                      'TRAIN.EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0', 'AUG.PRESET', 'raug15', 'AUG.MIXUP',
                      '0.4', cwd=here)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith('python main.py ') and len(log_lines(folder / 'out/RepMLPNet-T32/run')) == 1
    launcher = ['-m', 'torch.distributed.launch', '--nproc_per_node', '2', '--master_port', '12349']
    done = run_script('python', *launcher, 'main_repmlp.py', *common, '--tag', 'test', '--eval', '--resume',
                      folder / 'trained.pth', '--opts', *keys, cwd=here)
    assert done.stdout.count('python main.py') == 1 and re.search(r'\* Acc@1 .*\n$', done.stdout), done.stdout
    data = [folder / 'data', 'check', folder / 'trained.pth', '-a', 'RepMLPNet-T32', '-r', '32', '-j', '1']
    assert 'predictions agree on 8' in run_script('python', here / 'test.py', *data, cwd=folder).stdout
    done = run_script('python', 'convert.py', folder / 'trained.pth', folder / 'new.pth', '-a',
                      'RepMLPNet-T32', cwd=here)
    assert done.returncode == 0, done.stdout


# ---- test.py, convert.py -----------------------------------------------------------------------------------


def run(module, *words) -> None:
    module.main(module.get_args_parser().parse_args(list(map(str, words))))


def test_both_forms_score_the_same_and_check_compares(folder, capsys):
    lines = []
    for mode, weights in (('train', 'trained'), ('check', 'trained'), ('deploy', 'deploy'),
                          ('deploy', 'trained')):
        run(repmlp.test, folder / 'data', mode, folder / f'{weights}.pth', '-a', 'RepMLPNet-T32', '-r', 32,
            '-j', 0)
        lines.append(capsys.readouterr().out)
    assert len({text.splitlines()[-1] for text in lines}) == 1 and '* Acc@1 ' in lines[0]
    difference = re.search(r'largest difference of the logits (\S+) .* predictions agree on 8', lines[1])
    assert 0 < float(difference[1]) < 1e-4  # of logits up to 16
    assert 'is of the training form: injected' in lines[3]


@pytest.mark.parametrize('words, message', [
    (['check', 'deploy.pth', '-a', 'RepMLPNet-T32'], 'has no training form: use the mode deploy'),
    (['train', 'deploy.pth', '-a', 'RepMLPNet-T32'], 'has no training form'),
    (['train', 'trained.pth'], 'holds weights of RepMLPNet-T32, not of RepMLPNet-B224'),
    (['train', 'trained.pth', '-a', 'RepMLPNet-T32', '-r', '40'], 'multiples of 32'),
    (['train', 'missing.pth'], 'there is no checkpoint')])
def test_nothing_is_evaluated_on_other_weights(words, message, folder):
    mode, weights, *rest = words
    with pytest.raises(UserError, match=message):
        run(repmlp.test, folder / 'data', mode, folder / weights, *rest)


def test_converted_weights_are_a_bare_state_dict(folder, tmp_path, capsys):
    run(repmlp.convert, folder / 'trained.pth', tmp_path / 'new.pth', '-a', 'RepMLPNet-T32')
    assert 'predictions agree on 4' in capsys.readouterr().out
    state = torch.load(tmp_path / 'new.pth', weights_only=True)
    assert_same(dict(state), torch.load(folder / 'deploy.pth', weights_only=True)['model'], 'new.pth')
    with pytest.raises(UserError, match='not of RepMLPNet-B224'):
        run(repmlp.convert, folder / 'trained.pth', tmp_path / 'other.pth')


# ---- Weights -----------------------------------------------------------------------------------------------


def write_published_checkpoint(path, state: dict) -> None:
    """A training checkpoint with a yacs node, written by a test double of yacs that is gone afterwards."""
    class CfgNode(dict):
        """Pickles as yacs' does: a dict with attributes."""

        def __reduce_ex__(self, protocol):
            return super().__reduce_ex__(2)
    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    config = mock.Mock(CfgNode=CfgNode, spec=['CfgNode'])
    node = CfgNode(TRAIN=CfgNode(EPOCHS=100, BETAS=(0.9, 0.999)), TAG='x')
    node.__immutable__ = True
    with mock.patch.dict(sys.modules, {'yacs': mock.Mock(config=config), 'yacs.config': config}):
        torch.save({'model': state, 'optimizer': {}, 'lr_scheduler': {}, 'max_accuracy': 80.0, 'epoch': 3,
                    'config': node}, path)


def test_published_training_checkpoints_are_read_without_yacs(folder, tmp_path):
    state = torch.load(folder / 'trained.pth', weights_only=True)
    write_published_checkpoint(tmp_path / 'latest.pth', state)
    assert 'yacs' not in sys.modules
    found = replknet_zoo.read_checkpoint(tmp_path / 'latest.pth')
    assert found['config']['TRAIN']['BETAS'] == (0.9, 0.999)
    assert_same(replknet_zoo.load_weights(tmp_path / 'latest.pth'), dict(state), 'latest.pth')


def test_mmpretrains_files_are_read_and_written(folder, tmp_path):
    state = torch.load(folder / 'trained.pth', weights_only=True)
    theirs = {}
    for key, value in state.items():
        for ours, name in (('conv_embedding.conv.', 'patch_embed.projection.'), ('head_norm.', 'final_norm.'),
                           ('conv_embedding.bn.', 'patch_embed.norm.'), ('embeds.', 'downsample_layers.')):
            key = name + key.removeprefix(ours) if key.startswith(ours) else key
        for ours, name in (('.gp.fc1.', '.gp.conv1.conv.'), ('.gp.fc2.', '.gp.conv2.conv.'),
                           ('.prebn', '.norm')):
            key = key.replace(ours, name)
        in_head = key.startswith('head.')
        theirs[f'head.fc.{key.removeprefix("head.")}' if in_head else f'backbone.{key}'] = value
    torch.save({'state_dict': theirs}, tmp_path / 'mm.pth')
    assert_same(replknet_zoo.load_weights(tmp_path / 'mm.pth'), dict(state), 'mm.pth')
    assert replknet_zoo.name_of(state) == 'RepMLPNet-T32'
    run(sys.modules['tools.convert'], folder / 'trained.pth', tmp_path / 'new.pth', '--to', 'mmpretrain',
        '--merge', 'false')
    assert_same(torch.load(tmp_path / 'new.pth', weights_only=True)['state_dict'], theirs, 'new.pth')


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('options', [{}, {'out_indices': (0, 2, 3), 'num_classes': None}])
@torch.no_grad()
def test_the_fast_form_gives_the_same_outputs(options, dtype, tolerance):
    torch.manual_seed(0)
    model = with_random_weights(replknet_zoo.create_model('RepMLPNet-T32', **options)).eval()
    fast = replknet_zoo.compile_for_inference(model, dtype)
    for shape in ((2, 3, 32, 32), (3, 3, 64, 32), (1, 3, 32, 96), (0, 3, 32, 32)):
        x = torch.randn(shape)
        expected, found = (y if isinstance(y, tuple) else (y,) for y in (model(x), fast(x)))
        for value, wanted in zip(found, expected, strict=True):
            assert value.dtype == torch.float32 and value.shape == wanted.shape
            assert not len(x) or relative_error(value, wanted) < tolerance, shape


# ---- Pre-processing, augmentation --------------------------------------------------------------------------


def test_evaluation_takes_the_models_crop_and_interpolation(arrays):
    photo = Image.fromarray(arrays['preprocess/photo'])
    transform = datasets.evaluation_transform(64, 1.0, 'bilinear', (0, 0, 0), (1, 1, 1))
    pixels = (transform(photo) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels, arrays['preprocess/crop'])
    for name, size in (('RepMLPNet-B224', 224), ('RepMLPNet-D256', 256), ('RepMLPNet-D256', 512)):
        args = get_args_parser().parse_args(['--model', name, '--input_size', str(size)])
        resize, crop, *_ = datasets.build_transform(False, args).transforms
        assert (resize.size, crop.size) == (size, (size, size))
        assert resize.interpolation == transforms.InterpolationMode.BILINEAR
    args.crop_pct = 0.875
    assert datasets.build_transform(False, args).transforms[0].size == int(512 / 0.875)


@pytest.mark.parametrize('magnitude', [2, 9, 14])
@pytest.mark.parametrize('name', OPERATIONS)
def test_raug15_gives_the_published_pictures(name, magnitude, arrays):
    augmentation = augmentation_of('DIGITS')
    operation = next(op for op in augmentation.ops if op.name == name)
    operation.magnitude = magnitude
    # positive signs, bilinear, and the centre of Cutout
    with mock.patch('random.random', lambda: 0.1), \
            mock.patch('random.choice', lambda _: Image.Resampling.BILINEAR), \
            mock.patch('random.randrange', side_effect=[20, 15]):
        found = operation(Image.fromarray(arrays['raug15/photo']))
    published = 'PosterizeTpu' if name == 'Posterize' else name
    np.testing.assert_array_equal(np.asarray(found), arrays[f'raug15/{published}/{magnitude}'])


def augmentation_of(data_set: str) -> RandAugment15:
    args = get_args_parser().parse_args(['--aa', 'raug15', '--data_set', data_set, '--reprob', '0'])
    steps = datasets.build_transform(True, args).transforms
    assert not any('ColorJitter' in str(step) or 'Erasing' in str(step) for step in steps)
    assert type(steps[2 if data_set == 'IMNET' else 1]) is RandAugment15
    return next(step for step in steps if isinstance(step, RandAugment15))


def test_raug15_draws_two_operations_of_any_magnitude_below_15():
    augmentation = pickle.loads(pickle.dumps(augmentation_of('IMNET')))  # as workers get it
    seen = []

    class Operation:
        """A test double: notes the magnitude."""
        def __call__(self, image):
            seen.append(self.magnitude)
            return image
    augmentation.ops = [Operation()]
    random.seed(0)
    for _ in range(300):
        augmentation(Image.new('RGB', (8, 8)))
    assert len(seen) == 600 and set(seen) == set(range(15))


def test_cutout_is_cut_at_the_border_and_leaves_the_image():
    image = Image.new('RGB', (12, 8))
    with mock.patch('random.randrange', side_effect=[11, 0]):
        pixels = np.asarray(cutout(image, 6))
    assert (pixels[:3, 8:] == (125, 122, 113)).all() and pixels[3:].max() == pixels[:, :8].max() == 0
    assert np.asarray(image).max() == 0


# ---- Training by main.py -----------------------------------------------------------------------------------


def test_training_goes_on_to_the_bit_with_everything_that_has_a_state(folder, tmp_path):
    options = [*SHORT, '--recipe', 'repmlp', '--base_lr', '0.1', '--data_path', folder / 'data',
               '--model_ema', '--model_ema_eval', '--use_amp', '--amp_dtype', 'bfloat16', '--update_freq',
               '2']
    run_main(*options, '--output_dir', tmp_path / 'whole')
    run_first_epoch(*options, '--output_dir', tmp_path / 'stopped')
    run_main(*options, '--output_dir', tmp_path / 'stopped')
    one, other = (torch.load(tmp_path / name / 'latest.pth', weights_only=True)
                  for name in ('whole', 'stopped'))
    del one['args'], other['args']
    assert_same(one, other, 'latest.pth')
    assert log_lines(tmp_path / 'whole') == log_lines(tmp_path / 'stopped')
    # 0.1 * 8 / 256 scales all; one step an epoch: the warm-up's start, then f of its last micro-batch
    assert [line['train_lr'] for line in log_lines(tmp_path / 'whole')] == pytest.approx(
        [5e-7 / 32, (5e-7 + 0.5 * (0.1 - 5e-7)) / 32])


def test_wrong_sizes_drop_path_and_another_family_are_refused(folder, tmp_path):
    data = ['--data_path', folder / 'data']
    with pytest.raises(UserError, match=r'--input_size 40: this model .* of 32 pixels: pass --input_size 32'):
        run_main(*SHORT, *data, '--input_size', '40')
    with pytest.raises(UserError, match='--test_size 48'):
        run_main(*SHORT, *data, '--test_size', '48')
    with pytest.raises(UserError, match='RepMLPNet has no drop path'):
        run_main(*SHORT, *data, '--drop_path', '0.1')
    torch.save(replknet_zoo.create_model('RepLKNet-31T', num_classes=2).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(UserError, match='does not fit the model'):
        run_main(*SHORT, *data, '--resume', tmp_path / 'other.pth')
    with pytest.raises(SystemExit), mock.patch('sys.stderr') as stderr:
        run_main(*SHORT, '--base_lr', '1e-3', '--lr', '1e-3')
    assert 'not allowed with' in str(stderr.mock_calls)


def test_tools_refuse_sizes_that_do_not_fit(folder, tmp_path):
    for tool, words in (('convert', [folder / 'trained.pth', tmp_path / 'a.pth']),
                        ('predict', [folder / 'data' / 'val', '--weights', folder / 'trained.pth']),
                        ('benchmark', ['model', '--models', 'RepMLPNet-T32', '--device', 'cpu'])):
        with pytest.raises(UserError, match='--input_size 40: this model takes multiples of 32'):
            run(importlib.import_module(f'tools.{tool}'), *words, '--input_size', '40')
    assert not (tmp_path / 'a.pth').exists()
    args = get_args_parser().parse_args(['--model', 'RepMLPNet-D256', '--eval', '--test_size', '256'])
    with torch.device('meta'):  # 224, the size in training, is not used
        main.options.check_image_sizes(args, replknet_zoo.create_model('RepMLPNet-D256'))


def test_evaluation_merges_and_scores_the_same(folder, capsys):
    run_main(*SHORT, '--data_path', folder / 'data', '--eval', '--resume', folder / 'trained.pth',
             '--with_small_kernel_merged')
    printed = capsys.readouterr().out
    assert 'predictions agree on 6' in printed
    run_main(*SHORT, '--data_path', folder / 'data', '--eval', '--resume', folder / 'deploy.pth')
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]


@pytest.mark.slow
def test_processes_keep_batch_norms_of_their_own(folder, tmp_path):
    printed = launch(2, *SHORT, '--data_path', folder / 'data', '--output_dir', tmp_path, '--batch_size', '2',
                     '--recipe', 'repmlp')
    assert 'Effective batch 4' in printed and len(log_lines(tmp_path)) == 2
    args = get_args_parser().parse_args(['--model', 'RepMLPNet-T32'])
    args.distributed, args.device = True, 'cuda:0'
    assert not main.options.shares_batch_norm(args)
    args.model = 'RepLKNet-31T'
    assert main.options.shares_batch_norm(args)


@pytest.mark.slow
def test_a_toy_learns_the_digits_and_is_merged(tmp_path, capsys):
    run_main(*TOY, '--data_set', 'DIGITS', '--epochs', '15', '--warmup_epochs', '2', '--lr', '4e-3', '--aa',
             'none', '--reprob', '0', '--mixup', '0', '--cutmix', '0', '--output_dir', tmp_path)
    assert log_lines(tmp_path)[-1]['test_acc1'] >= 96
    capsys.readouterr()
    run_main(*TOY, '--data_set', 'DIGITS', '--eval', '--resume', tmp_path / 'latest.pth',
             '--with_small_kernel_merged')
    accuracy = re.search(r'\* Acc@1 (\S+)', capsys.readouterr().out)[1]
    assert float(accuracy) == pytest.approx(log_lines(tmp_path)[-1]['test_acc1'], abs=1e-3)


# ---- int8 --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batchnorm_behind_injected_fcs_keeps_the_outputs():
    torch.manual_seed(0)
    model = with_random_weights(replknet_zoo.create_model('RepMLPNet-T32', num_classes=7)).eval()
    batches = [torch.randn(5, 3, 32, 32), torch.randn(3, 3, 64, 32)]
    with pytest.raises(ValueError, match=r'call locality_injection\(\) first'):
        insert_batchnorms(model, batches)
    model.locality_injection()
    expected = model(batches[0])
    with pytest.raises(ValueError, match='no batch'):
        insert_batchnorms(model, [])
    insert_batchnorms(model.train(), batches)
    assert model.training and relative_error(model.eval()(batches[0]), expected) < 1e-5
    block = model.stages[2][0].repmlp_block
    seen = []
    with block.fc3_bn.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1))):
        for batch in batches:
            model(batch)
    values = torch.cat(seen, 1)
    assert relative_error(block.fc3_bn.running_mean, values.mean(1)) < 1e-5
    assert relative_error(block.fc3_bn.running_var, values.var(1, unbiased=False)) < 1e-4
    model.locality_injection()
    assert model.is_merged and relative_error(model(batches[0]), expected) < 1e-5


def test_training_through_fake_quantized_fcs():
    torch.manual_seed(0)
    model = with_random_weights(replknet_zoo.create_model('RepMLPNet-T32', num_classes=7)).eval()
    x = torch.randn(4, 3, 64, 32)
    plain = model(x).detach()
    block = model.stages[1][0].repmlp_block
    weight, bias = (value.detach() for value in block.get_equivalent_fc3())
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = RepMLPBlock(block.C, block.O, block.h, block.w, num_sharesets=block.S, deploy=True).eval()
    expected.load_state_dict({**expected.state_dict(), **block.gp.state_dict(prefix='gp.'), 'fc3.bias': bias,
                              'fc3.weight': (weight / scale).round() * scale})
    sample = torch.randn(2, block.C, 8, 4)
    assert relative_error(fake_quantized_forward(block, sample).detach(), expected(sample).detach()) < 1e-5
    for block in (module for module in model.modules() if isinstance(module, RepMLPBlock)):
        block.forward = functools.partial(fake_quantized_forward, block)
    assert 0 < relative_error(model(x).detach(), plain) < 0.05
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
