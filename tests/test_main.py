"""main.py as users run it: training, evaluation, what it writes, what it refuses."""
import argparse
import fractions
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import engine
import main
import options
import utils
from conftest import SHORT, TOY, free_port, launch, log_lines, run_first_epoch, run_main, run_script
from forks import fork
from replknet_zoo import create_model


def test_every_published_option_has_its_default(golden):
    actions = {flag: action for action in main.get_args_parser()._actions for flag in action.option_strings}
    for published in golden('training')['arguments']:
        action = actions[published['flag']]
        expected = 'auto' if published['flag'] == '--device' else published['default']
        assert action.default == expected, published['flag']
        if published['choices']:
            assert set(published['choices']) <= set(action.choices)
        if published['type'] == 'str2bool':
            assert action.type is options.str2bool
            assert action.const is True  # a bare switch means true


@pytest.mark.parametrize(('options', 'expected'), [
    (['--eval'], True), (['--eval', 'True'], True), (['--eval', 'true'], True), (['--eval', 'false'], False),
    ([], False)])
def test_switches_take_true_false_or_nothing(options, expected):
    assert main.get_args_parser().parse_args(options).eval is expected


def test_training_writes_the_published_files(imagenet, tmp_path):
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--log_dir', tmp_path / 'tb',
             '--model_ema',
             '--model_ema_eval', '--save_ckpt_freq', '1', '--save_ckpt_num', '1', '--drop_path', '0.1',
             '--layer_decay', '0.7')
    assert {file.name for file in (tmp_path / 'run').iterdir()} == {
        'latest.pth', 'checkpoint-1.pth', 'checkpoint-best.pth', 'checkpoint-best-ema.pth', 'log.txt'}
    assert list((tmp_path / 'tb').glob('events.*'))
    lines = log_lines(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == [0, 1]
    assert {'train_loss', 'train_lr', 'test_acc1', 'test_acc5', 'test_loss', 'test_acc1_ema',
            'n_parameters'} <= lines[0].keys()
    assert lines[0]['n_parameters'] == sum(p.numel()
                                           for p in create_model('RepLKNet-31T', num_classes=2).parameters())
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    assert {'model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'args'} <= checkpoint.keys()
    assert checkpoint['epoch'] == 1
    assert checkpoint['args']['layer_decay'] == 0.7
    assert type(checkpoint['optimizer']['param_groups'][0]['lr']) is float


def weights(file) -> torch.Tensor:
    model = torch.load(file, weights_only=True)['model']
    return torch.cat([value.double().flatten() for value in model.values()])


def test_a_run_that_was_stopped_goes_on_and_ends_like_one_that_was_not(imagenet, tmp_path, capsys):
    options = [*SHORT, '--data_path', imagenet, '--drop_path', '0.2', '--model_ema', '--save_ckpt_freq', '1']
    run_main(*options, '--output_dir', tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'stopped')
    (tmp_path / 'stopped' / 'checkpoint-1.pth').unlink()
    (tmp_path / 'stopped' / 'latest.pth').write_bytes(b'cut off by a kill')
    capsys.readouterr()
    run_main(*options, '--output_dir', tmp_path / 'stopped')
    printed = capsys.readouterr().out
    assert 'Passed over' in printed
    assert 'Going on with epoch 1 of 2' in printed
    assert torch.equal(weights(tmp_path / 'stopped' / 'latest.pth'),
                       weights(tmp_path / 'whole' / 'latest.pth'))
    assert [line['epoch'] for line in log_lines(tmp_path / 'stopped')] == [0, 1]
    assert ([line['train_loss'] for line in log_lines(tmp_path / 'stopped')]
            == [line['train_loss'] for line in log_lines(tmp_path / 'whole')])


def test_a_finished_run_stays_as_it_is(imagenet, tmp_path):
    options = [*SHORT, '--epochs', '1', '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_main(*options)
    before = (tmp_path / 'run' / 'log.txt').read_text(), weights(tmp_path / 'run' / 'latest.pth')
    run_main(*options)
    assert (tmp_path / 'run' / 'log.txt').read_text() == before[0]
    assert torch.equal(weights(tmp_path / 'run' / 'latest.pth'), before[1])


def test_the_best_accuracy_survives_a_stop(imagenet, tmp_path):
    run_first_epoch(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run')
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    checkpoint['max_accuracy'] = 100.0
    torch.save(checkpoint, tmp_path / 'run' / 'latest.pth')
    best = weights(tmp_path / 'run' / 'checkpoint-best.pth')
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run')
    assert torch.equal(weights(tmp_path / 'run' / 'checkpoint-best.pth'), best)
    assert torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)['max_accuracy'] == 100.0


@pytest.fixture
def toy_weights(tmp_path):
    """Weights of RepLKNet-31T with 2 classes, as a published checkpoint holds them."""
    torch.manual_seed(1)
    torch.save({'model': create_model('RepLKNet-31T', num_classes=2).state_dict()}, tmp_path / 'toy.pth')
    return tmp_path / 'toy.pth'


def test_the_checkpoint_in_output_dir_wins_over_resume_and_finetune(imagenet, tmp_path, toy_weights, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir']
    run_first_epoch(*options, tmp_path / 'run')
    run_main(*options, tmp_path / 'run', '--eval', '--resume', toy_weights)
    assert f'Weights from {toy_weights}' in capsys.readouterr().out
    for option in ('--resume', '--finetune'):
        shutil.copytree(tmp_path / 'run', tmp_path / option)
        capsys.readouterr()
        run_main(*options, tmp_path / option, option, toy_weights)
        told = f'latest.pth holds the progress of this run, so {toy_weights} is not used'
        assert told in capsys.readouterr().out
    # another run's checkpoint that is further along is what the user means
    run_main(*options, tmp_path / 'run', '--resume', tmp_path / '--resume' / 'latest.pth')
    assert f'Weights from {tmp_path / "--resume" / "latest.pth"}' in capsys.readouterr().out


def test_an_empty_output_dir_writes_and_resumes_nothing(imagenet, tmp_path, monkeypatch, capsys):
    run_main(*SHORT, '--epochs', '1', '--data_path', imagenet, '--output_dir', tmp_path / 'here')
    before = weights(tmp_path / 'here' / 'latest.pth')
    monkeypatch.chdir(tmp_path / 'here')
    capsys.readouterr()
    run_main(*SHORT, '--data_path', imagenet)
    assert 'Going on' not in capsys.readouterr().out
    assert torch.equal(weights(tmp_path / 'here' / 'latest.pth'), before)


def test_checkpoints_of_which_none_loads_are_not_overwritten(imagenet, tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_main(*options, '--epochs', '1')
    for file in (tmp_path / 'run').glob('*.pth'):
        file.write_bytes(file.read_bytes()[:1000])
    before = {file.name: file.read_bytes() for file in (tmp_path / 'run').iterdir()}
    with pytest.raises(utils.UserError, match=r'none of the 3 checkpoints in .*run can be resumed '
                                              r'from.*--auto_resume false'):
        run_main(*options)
    assert {file.name: file.read_bytes() for file in (tmp_path / 'run').iterdir()} == before
    run_main(*options, '--auto_resume', 'false')
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]


def test_a_requeued_run_needs_the_file_it_began_from_no_more(imagenet, tmp_path, toy_weights, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--resume', toy_weights]
    run_first_epoch(*options)
    toy_weights.unlink()
    run_main(*options)
    assert 'Going on with epoch 1 of 2' in capsys.readouterr().out


def test_a_failed_evaluation_does_not_cost_the_epoch(imagenet, tmp_path, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    image = imagenet / 'val' / 'class0' / '0.png'
    good = image.read_bytes()
    image.write_bytes(b'broken')
    with pytest.raises(utils.UserError, match=f'cannot read the image {image}'):
        run_main(*options)
    image.write_bytes(good)
    capsys.readouterr()
    run_main(*options)
    printed = capsys.readouterr().out
    assert 'Going on with epoch 1 of 2' in printed
    assert 'Epoch [0]' not in printed
    run_main(*options[:-1], tmp_path / 'whole')
    assert log_lines(tmp_path / 'run') == log_lines(tmp_path / 'whole')


def test_another_optimizer_than_the_checkpoints_is_told(imagenet, tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_first_epoch(*options)
    for changed in (['--opt', 'sgd'], ['--layer_decay', '0.7']):
        with pytest.raises(utils.UserError,
                           match=r'optimizer state of the checkpoint .*--opt, --layer_decay'):
            run_main(*options, *changed, '--output_dir', '', '--resume', tmp_path / 'run' / 'latest.pth')


@pytest.mark.parametrize('option, before, now', [
    ('--model', 'RepLKNet-31T', 'RepLKNet-31B'), ('--epochs', 2, 3), ('--lr', 0.001, 0.002),
    ('--warmup_epochs', 1, 0), ('--batch_size', 4, 2), ('--seed', 0, 1), ('--drop_path', 0, 0.1),
    ('--smoothing', 0.1, 0.2), ('--reprob', 0.25, 0.1), ('--aa', 'rand-m9-mstd0.5-inc1', 'none'),
    ('--opt', 'adamw', 'sgd')])
def test_a_checkpoint_of_another_schedule_or_model_is_refused_with_both_values(option, before, now, imagenet,
                                                                               tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_first_epoch(*options)
    content = (tmp_path / 'run' / 'latest.pth').read_bytes()
    name = 'effective batch' if option == '--batch_size' else option[2:]
    with pytest.raises(utils.UserError, match=rf'latest.pth is of a run with {name} {before}, not {now}: '
                                              r'.*--auto_resume false'):
        run_main(*options, option, now)
    assert (tmp_path / 'run' / 'latest.pth').read_bytes() == content


def test_a_checkpoint_without_options_is_gone_on_from(imagenet, tmp_path, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_first_epoch(*options)
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    del checkpoint['args']
    torch.save(checkpoint, tmp_path / 'run' / 'latest.pth')
    run_main(*options)
    assert 'Going on with epoch 1 of 2' in capsys.readouterr().out


def test_how_a_run_is_computed_and_what_it_prints_may_change(imagenet, tmp_path, capsys):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_first_epoch(*options)
    run_main(*options, '--batch_size', '2', '--update_freq', '2', '--channels_last', 'false',
             '--save_ckpt_freq', '1',
             '--num_workers', '1', '--use_checkpoint')
    assert 'Going on with epoch 1 of 2' in capsys.readouterr().out


def test_values_that_are_not_finite_are_not_saved(imagenet, tmp_path, monkeypatch):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--save_ckpt_freq', '1']
    run_main(*options, '--epochs', '1')
    before = {file.name: file.read_bytes() for file in (tmp_path / 'run').glob('*.pth')}

    def spoil(**arguments):
        stats = engine.train_one_epoch(**arguments)
        arguments['model'].norm.bias.data[3] = math.inf
        return stats
    monkeypatch.setattr(main, 'train_one_epoch', spoil)
    with pytest.raises(utils.UserError, match=r'after epoch 0 there are values that are not finite, the '
                                              r'first in model/norm\.bias: nothing of this is saved'):
        run_main(*options, '--epochs', '1', '--auto_resume', 'false')
    assert {file.name: file.read_bytes() for file in (tmp_path / 'run').glob('*.pth')} == before


@pytest.mark.parametrize('option', ['--resume', '--finetune'])
def test_weights_that_are_not_finite_are_refused(option, imagenet, tmp_path):
    state = create_model('RepLKNet-31T', num_classes=2).state_dict()
    state['head.weight'][1, 5] = math.nan
    torch.save({'model': state}, tmp_path / 'broken.pth')
    with pytest.raises(utils.UserError, match=r'broken\.pth holds values that are not finite, the first in '
                                              r'model/head\.weight'):
        run_main(*SHORT, '--data_path', imagenet, option, tmp_path / 'broken.pth')


def test_merged_weights_are_pointed_out_in_training(imagenet, tmp_path, capsys):
    model = create_model('RepLKNet-31T', num_classes=2)
    model.structural_reparam()
    torch.save(model.state_dict(), tmp_path / 'merged.pth')
    run_main(*SHORT, '--epochs', '1', '--data_path', imagenet, '--finetune', tmp_path / 'merged.pth')
    assert 'WARNING: the kernels of these weights are merged' in capsys.readouterr().out


def test_resumed_weights_alone_start_the_average_too(imagenet, tmp_path, toy_weights):
    run_main(*SHORT, '--epochs', '1', '--lr', '0', '--min_lr', '0', '--data_path', imagenet, '--output_dir',
             tmp_path / 'run',
             '--resume', toy_weights, '--model_ema')
    average = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)['model_ema']
    torch.testing.assert_close(average['head.weight'],
                               torch.load(toy_weights, weights_only=True)['model']['head.weight'])


def test_an_average_can_be_switched_on_when_resuming(imagenet, tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run']
    run_first_epoch(*options)
    run_main(*options, '--model_ema', '--model_ema_eval', '--model_ema_force_cpu')
    assert 'test_acc1_ema' in log_lines(tmp_path / 'run')[1]


def test_a_published_training_checkpoint_is_resumed(imagenet, tmp_path):
    """As the published trainer of 2022 wrote it: a Namespace, NumPy scalars, parameter groups of its
    torch."""
    import pathlib

    import numpy as np
    options = [*SHORT, '--data_path', imagenet]
    run_main(*options, '--epochs', '1', '--output_dir', tmp_path / 'run')
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    for group in checkpoint['optimizer']['param_groups']:
        for added_since in set(group) - {'lr', 'betas', 'eps', 'weight_decay', 'amsgrad', 'lr_scale',
                                         'params'}:
            del group[added_since]
        group['lr'] = np.float64(group['lr'])
    checkpoint['args'] = argparse.Namespace(model='RepLKNet-31T', output_dir=pathlib.Path('/runs'))
    for ours in ('max_accuracy', 'max_accuracy_ema'):
        del checkpoint[ours]
    torch.save(checkpoint, tmp_path / 'published.pth')
    run_main(*options, '--resume', tmp_path / 'published.pth', '--output_dir', tmp_path / 'other')
    assert [line['epoch'] for line in log_lines(tmp_path / 'other')] == [1]
    checkpoint['epoch'] = 'best'  # so the published checkpoint-best.pth: weights to start from
    torch.save(checkpoint, tmp_path / 'checkpoint-best.pth')
    run_main(*options, '--epochs', '1', '--resume', tmp_path / 'checkpoint-best.pth')
    run_main(*options, '--eval', '--resume', tmp_path / 'checkpoint-best.pth')


def test_finetuning_replaces_a_head_that_does_not_fit(imagenet, tmp_path, capsys):
    torch.save({'model': create_model('RepLKNet-31T', num_classes=1000).state_dict()},
               tmp_path / 'pretrained.pth')
    run_main(*SHORT, '--epochs', '1', '--data_path', imagenet, '--finetune', tmp_path / 'pretrained.pth')
    assert 'with a new head for 2 classes' in capsys.readouterr().out
    with pytest.raises(utils.UserError, match=r'head\.weight \(1000, 128\), not \(2, 128\).*use --finetune'):
        run_main(*SHORT, '--data_path', imagenet, '--resume', tmp_path / 'pretrained.pth')


def test_pretraining_without_evaluation_data(imagenet, tmp_path):
    run_main(*SHORT, '--epochs', '1', '--data_set', 'image_folder', '--data_path', imagenet / 'train',
             '--disable_eval', 'true',
             '--output_dir', tmp_path / 'run')
    assert not any('test' in key for key in log_lines(tmp_path / 'run')[0])


def test_weight_decay_follows_a_cosine_to_its_end(imagenet, tmp_path):
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--weight_decay_end', '0.1')
    # the cosine of 4 steps from 0.05 to 0.1: 0.05, 0.0573, 0.075, 0.0927
    assert [line['train_weight_decay'] for line in log_lines(tmp_path / 'run')] == pytest.approx([0.0537,
                                                                                                  0.0838],
                                                                                                 abs=1e-4)


def test_head_init_scale_scales_the_new_head(imagenet, tmp_path):
    heads = []
    for scale in ('1', '0.1'):
        run_main(*SHORT, '--epochs', '1', '--lr', '0', '--min_lr', '0', '--data_path', imagenet,
                 '--head_init_scale', scale, '--output_dir', tmp_path / scale)
        heads.append(torch.load(tmp_path / scale / 'latest.pth', weights_only=True)['model']['head.weight'])
    torch.testing.assert_close(heads[1], 0.1 * heads[0])


@pytest.mark.slow
def test_a_compiled_model_trains_and_saves_plain_keys(imagenet, tmp_path):
    run_main(*SHORT, '--epochs', '1', '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--compile',
             '--disable_eval')
    saved = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)['model']
    assert list(saved) == list(create_model('RepLKNet-31T', num_classes=2).state_dict())


def test_a_dry_run_tells_and_writes_nothing(imagenet, tmp_path, capsys):
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--log_dir', tmp_path / 'tb',
             '--dry_run')
    assert re.search(r'Dry run: 2 steps of effective batch 4, 0\.\d\d M parameters, peak memory \d+ MiB',
                     capsys.readouterr().out)
    assert not (tmp_path / 'run').exists()
    assert not (tmp_path / 'tb').exists()
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run')
    # of a run that is finished
    run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--dry_run')


# --- evaluation
# --------------------------------------------------------------------------------------------------------


def test_evaluation_needs_no_training_folder_and_shows_the_equivalence(imagenet, toy_weights, capsys):
    shutil.rmtree(imagenet / 'train')
    run_main(*SHORT, '--data_path', imagenet, '--eval', 'true', '--resume', toy_weights,
             '--with_small_kernel_merged', 'true')
    printed = capsys.readouterr().out
    difference = float(re.search(r'Kernels merged.*largest difference of the logits (\S+)', printed)[1])
    assert difference < 1e-5
    assert 'on the first 6 images' in printed
    assert 'predictions agree on 6\n' in printed
    assert re.fullmatch(r'\* Acc@1 \d+\.\d{3} Acc@5 100\.000 loss \d+\.\d{3}', printed.splitlines()[-1])


def test_a_merged_checkpoint_is_evaluated(imagenet, toy_weights, tmp_path, capsys):
    run_main(*SHORT, '--data_path', imagenet, '--eval', '--resume', toy_weights)
    expected = capsys.readouterr().out.splitlines()[-1]
    model = create_model('RepLKNet-31T', num_classes=2)
    model.load_state_dict(torch.load(toy_weights, weights_only=True)['model'])
    model.structural_reparam()
    torch.save(model.state_dict(), tmp_path / 'merged.pth')
    run_main(*SHORT, '--data_path', imagenet, '--eval', '--resume', tmp_path / 'merged.pth',
             '--with_small_kernel_merged')
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == expected
    assert 'merged already' in printed


def test_the_average_of_a_run_is_evaluated_by_its_key(imagenet, tmp_path, capsys):
    run_main(*SHORT, '--epochs', '1', '--data_path', imagenet, '--output_dir', tmp_path / 'run',
             '--model_ema',
             '--model_ema_eval')
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith('* Acc')]
    for key, expected in zip(('model', 'model_ema'), trained, strict=True):
        run_main(*SHORT, '--data_path', imagenet, '--eval', '--resume', tmp_path / 'run' / 'latest.pth',
                 '--model_key', key)
        assert capsys.readouterr().out.splitlines()[-1] == expected


def test_pre_processing_that_is_not_the_models_is_pointed_out(imagenet, capsys):
    with pytest.raises(utils.UserError, match='no weights to evaluate'):
        run_main('--model', 'RepLKNet-XL', '--data_path', imagenet, '--nb_classes', '2', '--eval', '--device',
                 'cpu')
    assert '--imagenet_default_mean_and_std false' in capsys.readouterr().out
    with pytest.raises(utils.UserError):
        run_main('--model', 'RepLKNet-XL', '--data_path', imagenet, '--nb_classes', '2', '--eval', '--device',
                 'cpu',
                 '--imagenet_default_mean_and_std', 'false')
    assert 'WARNING' not in capsys.readouterr().out


# --- bad input
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('options', 'message'), [
    (['--model', 'RepLKNet-32B'], r'unknown --model RepLKNet-32B: choose one of RepLKNet-31B'),
    (['--opt', 'adamq'], r'--opt adamq'),
    (['--batch_size', '3'], r'--batch_size 3 is odd.*--mixup 0 --cutmix 0'),
    (['--batch_size', '16'], r'the 8 training images do not fill one effective batch of 16'),
    (['--update_freq', '4'], r'do not fill one effective batch of 16'),
    (['--nb_classes', '5'], r'--nb_classes is 5, but .*/train has 2 class folders'),
    (['--data_path', 'nowhere'], r'there is no folder nowhere/train'),
    (['--eval'], r'--eval has no weights to evaluate: pass --resume FILE'),
    (['--eval', '--disable_eval'], r'contradict'),
    (['--eval', '--resume', 'nowhere.pth'], r'there is no checkpoint nowhere\.pth'),
    (['--with_small_kernel_merged'], r'goes with --eval'),
    (['--compile', '--use_checkpoint'], r'choose one'),
    (['--cutmix_minmax', '0.2'], r'takes two ratios'),
    (['--aa', 'nothing-like-this'], r"--aa 'nothing-like-this'"),
    (['--update_freq', '0'], r'--update_freq 0 must be at least 1'),
    (['--save_ckpt_freq', '0'], r'--save_ckpt_freq 0 must be at least 1'),
    (['--num_workers', '-1'], r'--num_workers -1 must be at least 0'),
    (['--device', 'gpu'], r'unknown --device gpu'),
    (['--device', 'meta'], r'unknown --device meta'),
    (['--warmup_epochs', '-1'], r'--warmup_epochs -1 must be at least 0'),
    (['--drop_path', '1.5'], r'--drop_path 1\.5 must be at least 0 and less than 1'),
    (['--crop_pct', '0'], r'--crop_pct 0\.0 must be more than 0 and at most 1'),
    (['--dist_on_itp'], r'OMPI_COMM_WORLD_RANK is not set'),
])
def test_bad_options_are_told_and_write_nothing(options, message, imagenet, tmp_path):
    with pytest.raises(utils.UserError, match=message):
        run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', *options)
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_of_another_architecture_is_refused(imagenet, tmp_path):
    torch.save({'conv1.weight': torch.ones(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(utils.UserError, match=r'resnet\.pth does not fit the .*unexpected: conv1\.weight'):
        run_main(*SHORT, '--data_path', imagenet, '--eval', '--resume', tmp_path / 'resnet.pth')


def test_a_damaged_or_dangerous_checkpoint_is_refused(imagenet, tmp_path, toy_weights):
    whole = toy_weights.read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[:len(whole) // 2])
    torch.save({'model': fractions.Fraction(1, 2)}, tmp_path / 'object.pth')
    for option in (['--eval', '--resume'], ['--resume'], ['--finetune']):
        with pytest.raises(utils.UserError,
                           match=r'cut\.pth cannot be read as a checkpoint: it is truncated'):
            run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', *option,
                     tmp_path / 'cut.pth')
        with pytest.raises(utils.UserError, match=r'object\.pth is refused: .*fractions\.Fraction, which '
                                                  r'could run code'):
            run_main(*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', *option,
                     tmp_path / 'object.pth')
    assert not (tmp_path / 'run').exists()


def test_an_ema_that_does_not_fit_is_told(imagenet, tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--model_ema']
    run_first_epoch(*options)
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    del checkpoint['model_ema']['head.bias']
    torch.save(checkpoint, tmp_path / 'run' / 'latest.pth')
    with pytest.raises(utils.UserError, match=r'model_ema does not fit.*missing: head\.bias.*--model_ema '
                                              r'false'):
        run_main(*options)


def test_cuda_that_is_not_there_is_told(imagenet, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(utils.UserError, match='--device cuda was asked for, but this machine has no usable '
                                              'CUDA GPU'):
        run_main(*SHORT, '--data_path', imagenet, '--device', 'cuda')


def test_a_loss_that_is_not_finite_leaves_the_checkpoints(imagenet, tmp_path):
    options = [*SHORT, '--data_path', imagenet, '--output_dir', tmp_path / 'run', '--warmup_epochs', '0']
    run_main(*options, '--epochs', '1')
    before = weights(tmp_path / 'run' / 'latest.pth')
    resumed = ['--resume', tmp_path / 'run' / 'latest.pth', '--auto_resume', 'false']
    with pytest.raises(utils.UserError, match=r'loss is nan at epoch 1, step \d'):
        run_main(*options, *resumed, '--opt', 'adamw', '--lr', '1e38')
    assert torch.equal(weights(tmp_path / 'run' / 'latest.pth'), before)


@pytest.mark.parametrize('begin', ['fork', pytest.param('command', marks=pytest.mark.slow)])
def test_the_command_line_shows_one_paragraph_without_a_traceback(begin, imagenet, tmp_path):
    broken = imagenet / 'train' / 'class0' / '0.png'
    broken.write_bytes(b'not an image')
    options = [*map(str, (*SHORT, '--data_path', imagenet, '--num_workers', '1'))]
    if begin == 'fork':
        status = fork('forks:command_line', *options, printed=tmp_path / 'printed').wait()
        printed = (tmp_path / 'printed').read_text()
    else:
        done = run_script('python', 'main.py', *options)
        status, printed = done.returncode, done.stdout
    assert status == 1 and 'Traceback' not in printed, printed
    assert printed.strip().splitlines()[-1].startswith(f'ERROR: cannot read the image {broken}')


def test_an_extension_that_is_not_there_is_told_on_the_command_line(imagenet, tmp_path):
    options = [*map(str, (*SHORT, '--data_path', imagenet))]
    status = fork('forks:command_line', *options, printed=tmp_path / 'printed',
                  LARGE_KERNEL_CONV_IMPL='/nowhere').wait()
    assert status == 1
    last = (tmp_path / 'printed').read_text().strip().splitlines()[-1]
    assert last.startswith("ERROR: LARGE_KERNEL_CONV_IMPL is '/nowhere'")


# --- several processes
# -------------------------------------------------------------------------------------------------


def test_two_processes_evaluate_an_odd_data_set_to_the_same_digits_as_one(imagenet, toy_weights, capsys):
    """7 images: 4 and 3. The published command, by the launcher it names, which passes --local-rank."""
    options = [*TOY, '--nb_classes', '2', '--batch_size', '2', '--data_path', imagenet, '--eval', 'True',
               '--resume', toy_weights,
               '--with_small_kernel_merged', 'true']
    run_main(*options)
    expected = capsys.readouterr().out.splitlines()[-1]
    assert expected.startswith('* Acc@1')
    printed = launch(2, *options, launcher='torch.distributed.launch')
    assert expected in printed.splitlines()
    assert printed.count('* Acc@1') == 1


def fork_two(function: str, *arguments: str, printed: Path) -> str:
    """A function of JSON arguments in two forked processes of one run; what they printed."""
    meet = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    runs = [fork(function, *arguments, printed=printed, RANK=rank, LOCAL_RANK=rank, **meet) for rank in '01']
    assert [run.wait() for run in runs] == [0, 0], printed.read_text()
    return printed.read_text()


def train_and_record(folder: str, *options: str) -> None:
    """main.py, with the mean of every image that it trains on written down."""
    plain = utils.MetricLogger.log_every

    def log_every(self, batches, *rest, **named):
        for batch in plain(self, batches, *rest, **named):
            with open(f'{folder}/seen-{utils.get_world_size()}.txt', 'a') as file:
                means = batch[0].double().mean((1, 2, 3)).tolist()
                print(*[f'{value:.6f}' for value in means], sep='\n', file=file)
            yield batch
    utils.MetricLogger.log_every = log_every
    run_main(*options, '--disable_eval')


def test_two_processes_of_two_see_the_images_of_one_of_four(imagenet, tmp_path):
    """The same images, augmented alike, in each global batch."""
    options = [*TOY, '--nb_classes', '2', '--data_path', imagenet, '--epochs', '2', '--warmup_epochs', '1',
               '--lr', '1e-3',
               '--mixup', '0', '--cutmix', '0', '--output_dir']
    options = [*map(str, options)]
    fork('test_main:train_and_record', str(tmp_path), *options, str(tmp_path / 'one'), '--batch_size', '4',
         printed=tmp_path / 'one.out').wait()
    fork_two('test_main:train_and_record', str(tmp_path), *options, str(tmp_path / 'two'), '--batch_size',
             '2', printed=tmp_path / 'two.out')
    one, two = ((tmp_path / f'seen-{n}.txt').read_text().split() for n in (1, 2))
    assert len(one) == 16
    for step in range(4):
        assert sorted(one[4 * step:4 * step + 4]) == sorted(two[4 * step:4 * step + 4])


def test_a_run_of_two_processes_resumes_at_the_next_epoch(imagenet, tmp_path):
    options = [*TOY, '--nb_classes', '2', '--data_path', imagenet, '--batch_size', '2', '--update_freq', '2',
               '--warmup_epochs', '0', '--model_ema', '--model_ema_eval', '--output_dir', tmp_path / 'run']
    options = [*map(str, options), '--epochs', '2']
    fork_two('forks:command_line', *options, '--save_ckpt_freq', '1', printed=tmp_path / 'first.out')
    for file in (tmp_path / 'run').glob('*.pth'):  # as a kill after the first epoch leaves them
        if file.name != 'checkpoint-0.pth':
            file.unlink()
    printed = fork_two('forks:command_line', *options, printed=tmp_path / 'second.out')
    assert 'Effective batch 8 = 2 images * 2 processes * 2 micro-batches' in printed
    assert 'Going on with epoch 1 of 2' in printed
    assert [line['epoch'] for line in log_lines(tmp_path / 'run')] == [0, 1]
