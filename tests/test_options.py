"""What options.py takes and refuses of main.py's options, before anything is built or any process is met."""
import argparse
import re

import pytest
import torch

import main
import options
from conftest import SHORT, run_main
from options import check_options
from utils import UserError

NOT_A_NUMBER = ('nan', 'inf', '-inf', '-1')
# every option that is neither a switch nor has argparse's choices: values to refuse, values to take
NUMBERS = {
    '--batch_size': (('-1', '0', str(10 ** 9)), ('2', '1024')),
    '--epochs': (('-1', '0', str(10 ** 12)), ('1', '600')),
    '--update_freq': (('-1', '0', str(10 ** 20)), ('1', '64')),
    '--start_epoch': (('-1', '300'), ('0', '299')),
    '--seed': (('-1', str(2 ** 32), str(2 ** 70)), ('0', str(2 ** 32 - 1))),
    '--drop_path': ((*NOT_A_NUMBER, '1', '1.5'), ('0', '0.8')),
    '--input_size': (('-32', '0', str(10 ** 6)), ('1', '32', '384')),
    '--test_size': (('-5', '0', str(10 ** 6)), ('-1', '1', '448')),
    '--head_init_scale': (NOT_A_NUMBER, ('0', '0.001', '2')),
    '--model_ema_decay': ((*NOT_A_NUMBER, '1', '1.5'), ('0', '0.9999')),
    '--opt_eps': (NOT_A_NUMBER, ('0', '1e-3')),
    '--opt_betas': ((*NOT_A_NUMBER, '2', '0.9', '0.9 1', '0.9 nan', '0.9 0.99 0.999'), ('0 0', '0.9 0.999')),
    '--clip_grad': ((*NOT_A_NUMBER, '-5'), ('0', '0.1', '5')),
    '--momentum': ((*NOT_A_NUMBER, '1', '2'), ('0', '0.99')),
    '--weight_decay': (NOT_A_NUMBER, ('0', '1e-8', '1')),
    '--weight_decay_end': (NOT_A_NUMBER, ('0', '0.1')),
    '--lr': ((*NOT_A_NUMBER, '1e39'), ('1e-6', '10')),
    '--base_lr': ((*NOT_A_NUMBER, '1e39'), ('1e-6', '10')),
    '--warmup_lr': ((*NOT_A_NUMBER, '0.005'), ('0', '5e-7', '4e-3')),
    '--decay_rate': ((*NOT_A_NUMBER, '1e39'), ('0', '0.1', '1')),
    '--decay_epochs': (('-1', '0'), ('1', '30')),
    '--min_lr': ((*NOT_A_NUMBER, '0.005'), ('0', '3e-4', '4e-3')),
    '--layer_decay': ((*NOT_A_NUMBER, '0', '1.5'), ('0.7', '1')),
    '--warmup_epochs': (('-1',), ('0', '1000')),
    '--warmup_steps': (('-2',), ('-1', '0', '400')),
    '--color_jitter': ((*NOT_A_NUMBER, '1e300'), ('0', '0.4', '2')),
    '--smoothing': ((*NOT_A_NUMBER, '1', '1.5'), ('0', '0.1')),
    '--crop_pct': ((*NOT_A_NUMBER, '0', '1.1', '1e-9'), ('0.875', '1')),
    '--reprob': ((*NOT_A_NUMBER, '1.1', '2'), ('0', '0.25', '1')),
    '--recount': (('-1', '0', str(10 ** 9)), ('1', '3')),
    '--mixup': (NOT_A_NUMBER, ('0', '0.8', '2')),
    '--cutmix': (NOT_A_NUMBER, ('0', '1', '2')),
    '--cutmix_minmax': ((*NOT_A_NUMBER, '0.2', '0.8 0.2', '0.2 0.2', '0.5 0.501', '0 1.5', '0 nan',
                         '0.1 0.2 0.3'),
                        ('0.2 0.8', '0 1')),
    '--mixup_prob': ((*NOT_A_NUMBER, '2'), ('0', '1')),
    '--mixup_switch_prob': ((*NOT_A_NUMBER, '2'), ('0', '1')),
    '--nb_classes': (('-1', '0'), ('1', '21841')),
    '--num_workers': (('-1', str(10 ** 6)), ('0', '64')),
    '--save_ckpt_freq': (('-1', '0'), ('1', '1000')),
    '--save_ckpt_steps': (('-1',), ('0', '1000')),
    '--save_ckpt_num': (('-1', '0'), ('1', '1000')),
    '--world_size': (('-1', '0'), ('1', '8')),
    '--local_rank': (('-2',), ('-1', '7')),
}
TEXTS = {
    '--model': (('', 'RepLKNet-32B'), ('RepLKNet-XL',)),
    '--aa': (('foo', 'rand-m99-mstd-inc1', 'rand-x9', 'rand-mabc', 'rand-m9-foo', 'rand-m9.5', 'random',
              'rand-tfoo',
              'rand-n20-tweights', 'augmix-tweights', 'augmix-a0', 'original-m9', 'v1'),
             ('', 'none', 'raug15', 'rand', 'rand-m9-mstd0.5-inc1', 'rand-m15-n2-tweights', 'augmix-m5-w4-d2',
              'original-mstd0.5', 'v0r',
              '3a')),
    '--train_interpolation': (('', 'foo', 'lanczos', 'box'),
                              ('random', 'nearest', 'bilinear', 'bicubic', 'lanczos --aa none')),
    '--remode': (('', 'foo'), ('const', 'rand', 'pixel')),
    '--dist_url': (('', 'foo', 'tcp://node7'),
                   ('env://', 'tcp://node7:29500', 'tcp://[::1]:29500', 'file:///shared/run')),
}
# theirs is another check: of the device, the optimizer, the files and folders when they are read
ELSEWHERE = {'--device', '--opt', '--finetune', '--resume', '--model_key', '--model_prefix', '--data_path',
             '--eval_data_path', '--eval_set', '--val_labels', '--output_dir', '--log_dir',
             '--max_image_pixels'}


def parse(*options) -> argparse.Namespace:
    return main.get_args_parser().parse_args([str(option) for option in options])


def as_words(option: str, value: str) -> list[str]:
    """The words of a command line; what looks like an option, such as -1, goes after a sign of equality."""
    first, *others = value.split(' ')
    return [f'{option}={first}', *others] if first.startswith('-') or not first else [option, first, *others]


def cases(place: int) -> list:
    return [pytest.param(option, value, id=f'{option} {value}') for table in (NUMBERS, TEXTS) for option,
            values in table.items()
            for value in values[place]]


@pytest.mark.parametrize(('option', 'value'), cases(0))
def test_a_wrong_value_is_refused_and_named(option, value):
    with pytest.raises(UserError, match=rf'{option}\b'):
        check_options(parse(*as_words(option, value)))


@pytest.mark.parametrize(('words', 'message'), [
    (['--clip_grad=-1'], '--clip_grad -1.0 must be at least 0 and at most 1e38'),
    (['--smoothing', 'nan'], '--smoothing nan must be at least 0 and less than 1'),
    (['--opt_betas', '0.9', '1.5'], '--opt_betas 0.9 1.5 must be at least 0 and less than 1'),
    (['--test_size', '0'], '--test_size 0 must be -1, or at least 1 and at most 16384'),
    (['--remode', 'foo'], 'unknown --remode foo: choose one of const, rand, pixel')])
def test_an_error_names_option_value_and_range(words, message):
    with pytest.raises(UserError, match=f'^{re.escape(message)}$'):
        check_options(parse(*words))


@pytest.mark.parametrize(('option', 'value'), cases(1))
def test_the_values_of_recipes_are_taken(option, value):
    check_options(parse(*as_words(option, value)))


def test_no_option_is_forgotten():
    """Every numeric one refuses nan, inf and, but for a -1 that means something, what is negative."""
    for action in main.get_args_parser()._actions:
        option = action.option_strings[0]
        if action.type in (int, float):
            wrong = NUMBERS[option][0]
            assert any(value.startswith('-') for value in wrong), option
            assert action.type is int or {'nan', 'inf'} <= set(wrong), option
        elif action.type is not options.str2bool and not action.choices:
            assert option in TEXTS or option in ELSEWHERE, option


@pytest.mark.parametrize(('options', 'message'), [
    (['--model_ema_eval'], '--model_ema true'),
    (['--model_ema_force_cpu'], '--model_ema true'),
    (['--model_ema', '--model_ema_eval', '--disable_eval'], '--model_ema_eval and --disable_eval contradict'),
    (['--amp_dtype', 'bfloat16'], '--use_amp true'),
    (['--eval_data_path', 'val'], '--data_set image_folder'),
    (['--epochs', '2', '--start_epoch', '2'], '--start_epoch 2 must be less than --epochs 2'),
    (['--lr', '1e-4', '--min_lr', '1e-3'], '--min_lr 0.001.* must be at most --lr 0.0001'),
    (['--base_lr', '1e-4', '--min_lr', '1e-3'], '--min_lr 0.001.* must be at most --base_lr 0.0001'),
    (['--lr', '1e-4', '--warmup_lr', '1e-3'], '--warmup_lr 0.001, where the warm-up begins, must be at most'),
    (['--lr_schedule', 'swin', '--warmup_steps', '9'], 'pass --warmup_epochs'),
    (['--weight_decay', '0', '--weight_decay_end', '0.1'], '--weight_decay_end 0.1 has no effect with '
                                                           '--weight_decay 0'),
    (['--opt', 'adan', '--opt_betas', '0.9', '0.99'], '--opt adan takes 3 numbers as --opt_betas, not 2'),
    (['--input_size', '32', '--cutmix_minmax', '0.5', '0.51'], 'a pixel apart at --input_size 32')])
def test_options_that_cannot_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_options(parse(*options))


@pytest.mark.parametrize('options', [
    ['--model_ema', '--model_ema_eval'], ['--use_amp', '--amp_dtype', 'bfloat16'],
    ['--data_set', 'image_folder', '--eval_data_path', 'val'], ['--eval', '--lr', '1e-7'],
    ['--weight_decay', '0', '--weight_decay_end', '0'],
    ['--opt', 'adan', '--opt_betas', '0.98', '0.92', '0.99']])
def test_options_that_go_together_are_taken(options):
    check_options(parse(*options))


@pytest.mark.parametrize('option', ['--output_dir', '--log_dir'])
def test_a_file_in_the_place_of_a_folder_is_told(option, tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    for path in (file, file / 'run'):
        with pytest.raises(UserError, match=f'{option} {path} cannot be a folder: {file} is a file'):
            check_options(parse(option, path))
    with pytest.raises(UserError, match=f'{option} .* cannot be a folder: File name too long'):
        check_options(parse(option, tmp_path / ('x' * 300)))
    check_options(parse(option, tmp_path / 'not' / 'there' / '%j'))
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_one_value_a_channel_is_refused_where_it_is_trained_on():
    """The last maps of 32 px are one pixel."""
    one = ['--device', 'cpu', '--mixup', '0', '--cutmix', '0', '--batch_size', '1', '--input_size']
    for size in ('1', '31', '32'):
        with pytest.raises(UserError, match=f'--batch_size 1 with --input_size {size} gives the last '
                                            'BatchNorms one value'):
            check_options(parse(*one, size, '--update_freq', '8'))
        check_options(parse(*one, size, '--eval'))
        check_options(parse(*one, size), sync_bn=True)
        check_options(parse(*one, size, '--batch_size', '2'))
    check_options(parse(*one, '33'))


@pytest.mark.parametrize('options', [['--input_size', '33', '--batch_size', '1'], ['--batch_size', '2'],
                                     ['--test_size', '1']])
def test_the_smallest_batches_and_images_that_are_taken_train(options, imagenet, tmp_path):
    run_main(*SHORT, '--data_path', imagenet, '--epochs', '1', '--warmup_epochs', '0', '--mixup', '0',
             '--cutmix', '0',
             '--output_dir', tmp_path / 'run', *options)
    saved = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)['model']
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize('options', [['--clip_grad', '-1'], ['--input_size', '32', '--batch_size', '1'],
                                     ['--model_ema_eval']])
def test_a_process_of_several_refuses_without_the_others(options, monkeypatch):
    def double_of_the_meeting(*args, **named):
        raise AssertionError('the others would be waited for')

    monkeypatch.setattr(torch.distributed, 'init_process_group', double_of_the_meeting)
    for name, value in {'RANK': 1, 'WORLD_SIZE': 2, 'LOCAL_RANK': 1, 'MASTER_ADDR': '127.0.0.1',
                        'MASTER_PORT': 29500}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=options[-2] if options[-1].isdigit() else options[0]):
        run_main('--device', 'cpu', '--mixup', '0', '--cutmix', '0', *options)


def test_a_tensorboard_folder_that_cannot_be_made_is_told(imagenet):
    with pytest.raises(UserError, match='--log_dir /proc/curves cannot be written to'):
        run_main(*SHORT, '--data_path', imagenet, '--log_dir', '/proc/curves')
