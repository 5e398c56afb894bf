"""RepMLPNet's published training script: its command line, in terms of main.py, which it runs.

python main_repmlp.py --data-path IMAGENET --arch RepMLPNet-B256 --opts AUG.PRESET raug15 DATA.IMG_SIZE 256

The first line that is printed is the command of main.py that does the same. Every published option and key is
honoured, or refused with what to use instead; an unknown one is an error.
"""
import argparse
import ast
import difflib
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import main
import options
from utils import UserError, script

# published keys and their defaults, and main.py's option of the same meaning
KEYS = {
    'DATA.IMG_SIZE': ('224', 'input_size'), 'DATA.TEST_SIZE': ('None', 'test_size'),
    'DATA.PIN_MEMORY': ('True', 'pin_mem'), 'DATA.NUM_WORKERS': ('8', 'num_workers'),
    'MODEL.ARCH': ('RepMLPNet-B224', 'model'), 'MODEL.RESUME': ('', 'resume'),
    'MODEL.NUM_CLASSES': ('1000', 'nb_classes'), 'MODEL.LABEL_SMOOTHING': ('0.1', 'smoothing'),
    'TRAIN.START_EPOCH': ('0', 'start_epoch'), 'TRAIN.EPOCHS': ('100', 'epochs'),
    'TRAIN.WARMUP_EPOCHS': ('10', 'warmup_epochs'), 'TRAIN.WEIGHT_DECAY': ('0.1', 'weight_decay'),
    'TRAIN.BASE_LR': ('0.002', 'base_lr'), 'TRAIN.WARMUP_LR': ('0.0', 'warmup_lr'),
    'TRAIN.MIN_LR': ('0.0', 'min_lr'), 'TRAIN.CLIP_GRAD': ('5.0', 'clip_grad'),
    'TRAIN.AUTO_RESUME': ('True', 'auto_resume'), 'TRAIN.ACCUMULATION_STEPS': ('0', 'update_freq'),
    'TRAIN.USE_CHECKPOINT': ('False', 'use_checkpoint'),
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': ('30', 'decay_epochs'),
    'TRAIN.LR_SCHEDULER.DECAY_RATE': ('0.1', 'decay_rate'), 'TRAIN.OPTIMIZER.NAME': ('adamw', 'opt'),
    'TRAIN.OPTIMIZER.EPS': ('1e-8', 'opt_eps'), 'TRAIN.OPTIMIZER.BETAS': ('(0.9, 0.999)', 'opt_betas'),
    'TRAIN.OPTIMIZER.MOMENTUM': ('0.9', 'momentum'),
    'AUG.MIXUP': ('0.0', 'mixup'), 'AUG.CUTMIX': ('0.0', 'cutmix'),
    'AUG.CUTMIX_MINMAX': ('None', 'cutmix_minmax'), 'AUG.MIXUP_PROB': ('1.0', 'mixup_prob'),
    'AUG.MIXUP_SWITCH_PROB': ('0.5', 'mixup_switch_prob'), 'AUG.MIXUP_MODE': ('batch', 'mixup_mode'),
    'AUG.COLOR_JITTER': ('0.4', 'color_jitter'), 'AUG.AUTO_AUGMENT': ('rand-m9-mstd0.5-inc1', 'aa'),
    'AUG.REPROB': ('0.25', 'reprob'), 'AUG.REMODE': ('pixel', 'remode'), 'AUG.RECOUNT': ('1', 'recount'),
    'SAVE_FREQ': ('20', 'save_ckpt_freq'), 'SEED': ('0', 'seed'),
}
# keys whose values have other names in main.py: value to options
VALUES = {
    'DATA.DATASET': ('imagenet', {'imagenet': {'data_set': 'IMNET'}, 'cf100': {'data_set': 'CIFAR'}}),
    'AUG.PRESET': ('None', {
        'None': {'train_interpolation': 'bilinear'},
        'raug15': {'aa': 'raug15', 'reprob': '0', 'train_interpolation': 'bilinear'},
        'weak': {'aa': 'none', 'color_jitter': '0', 'reprob': '0', 'train_interpolation': 'bilinear'}}),
    'TRAIN.LR_SCHEDULER.NAME': ('cosine', {
        'cosine': {'lr_schedule': 'swin'}, 'linear': {'lr_schedule': 'swin_linear'},
        'step': {'lr_schedule': 'swin_step'}}),
    'TEST.CROP': ('False', {'False': {}, 'True': {'crop_pct': '0.875'}}),
    'EVAL_MODE': ('False', {'False': {}, 'True': {'eval': 'true'}}),
}
# keys of which only the default can be had, and what to use for another value
REFUSED = {
    'DATA.BATCH_SIZE': (None, 'pass --batch-size'), 'DATA.DATA_PATH': (None, 'pass --data-path'),
    'OUTPUT': (None, 'pass --output'), 'TAG': (None, 'pass --tag'),
    'AMP_OPT_LEVEL': (None, 'pass --amp-opt-level'),
    'LOCAL_RANK': (None, 'launch with torchrun, which sets it'),
    'BASE': (None, 'pass the keys of the file by --opts'),
    'DATA.ZIP_MODE': ('False', 'unpack the archive and pass its folder as --data-path'),
    'DATA.CACHE_MODE': ('part', 'leave it out: it is for zip archives, which are not read'),
    'DATA.TEST_BATCH_SIZE': ('None', 'leave it out: an evaluation takes 1.5 times --batch-size'),
    'DATA.INTERPOLATION': ('bilinear', 'use main.py --train_interpolation; evaluations are bilinear'),
    'TRAIN.EMA_ALPHA': ('0.0', 'use main.py --model_ema true --model_ema_decay'),
    'TRAIN.EMA_UPDATE_PERIOD': ('8', 'use main.py --model_ema true, which follows every step'),
    'PRINT_FREQ': ('10', 'leave it out: every tenth line is printed'),
    'THROUGHPUT_MODE': ('False', 'use tools/benchmark.py model --models NAME'),
}


def get_args_parser() -> argparse.ArgumentParser:
    """The published options."""
    parser = argparse.ArgumentParser('main_repmlp.py', description=__doc__.splitlines()[0])
    parser.add_argument('--opts', nargs='+', metavar='KEY VALUE', help=', '.join((*KEYS, *VALUES)))
    parser.add_argument('--arch', help='default: RepMLPNet-B224')
    parser.add_argument('--batch-size', type=int, default=128, help='images per process')
    parser.add_argument('--data-path', default='/path/to/imgnet/', help='the folder with train/ and val/')
    parser.add_argument('--zip', action='store_true', help='refused: unpack the archive')
    parser.add_argument('--cache-mode', default='part', choices=['no', 'full', 'part'],
                        help='of zip archives: has no effect')
    parser.add_argument('--resume', help='weights to evaluate, or a training checkpoint to go on from')
    parser.add_argument('--accumulation-steps', type=int)
    parser.add_argument('--use-checkpoint', action='store_true')
    parser.add_argument('--amp-opt-level', default='O0', choices=['O0', 'O1', 'O2'],
                        help='O1 and O2: automatic mixed precision in float16')
    parser.add_argument('--output', default='output', help='files go to OUTPUT/ARCH/TAG')
    parser.add_argument('--tag', default='default')
    parser.add_argument('--eval', action='store_true')
    parser.add_argument('--throughput', action='store_true', help='refused: use tools/benchmark.py')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=-1, help='launchers set it')
    return parser


def translate(args: argparse.Namespace) -> list[str]:
    """main.py's options for the published ones. Raises UserError for what cannot be had."""
    given = pairs_of(args.opts or [])
    if args.zip:
        raise UserError(f'--zip: {REFUSED["DATA.ZIP_MODE"][1]}')
    if args.throughput:
        raise UserError(f'--throughput: {REFUSED["THROUGHPUT_MODE"][1]}')
    for key, value in given.items():
        default, advice = REFUSED.get(key, (value, ''))
        if default is None or value_of(value) != value_of(default):
            raise UserError(f'--opts {key} {value}: {advice}')
    for key, value in (('MODEL.ARCH', args.arch), ('MODEL.RESUME', args.resume),
                       ('TRAIN.ACCUMULATION_STEPS', args.accumulation_steps),
                       ('TRAIN.USE_CHECKPOINT', 'True' if args.use_checkpoint else None),
                       ('EVAL_MODE', 'True' if args.eval else None)):
        if value is not None:
            given[key] = str(value)
    found = {name: given.get(key, default) for key, (default, name) in KEYS.items()}
    for key, (default, values) in VALUES.items():
        value = given.get(key, default)
        if value not in values:
            raise UserError(f'--opts {key} {value}: choose one of {", ".join(values)}')
        found |= values[value]
    if found['update_freq'] == '0':
        found['update_freq'] = '1'
    found |= {'batch_size': str(args.batch_size), 'data_path': args.data_path,
              'use_amp': str(args.amp_opt_level != 'O0').lower(), 'local_rank': str(args.local_rank),
              'output_dir': str(Path(args.output, found['model'], args.tag))}
    words, parser = [], options.get_args_parser()
    for name, value in found.items():
        if value not in ('None', ''):
            option = [f'--{name}', *words_of(value)]
            if vars(parser.parse_args(option))[name] != parser.get_default(name):
                words += option
    return words


def pairs_of(opts: list[str]) -> dict[str, str]:
    """--opts as a dict. Raises UserError for a key without a value, and for an unknown one."""
    if len(opts) % 2:
        raise UserError(f'--opts takes pairs of KEY VALUE, and these are {len(opts)} words: '
                        f'{" ".join(opts)}')
    given = dict(zip(opts[::2], opts[1::2], strict=True))
    known = [*KEYS, *VALUES, *REFUSED]
    for key in sorted(given.keys() - set(known)):
        near = ', '.join(difflib.get_close_matches(key, known, 3, 0.5))
        raise UserError(f'--opts {key}: there is no such key{near and f"; do you mean {near}?"}')
    return given


def value_of(text: str) -> object:
    """A value of --opts, as yacs reads it: a Python literal, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def words_of(text: str) -> list[str]:
    """A value as main.py takes it: the elements of a tuple or list apart."""
    value = value_of(text)
    return [str(item) for item in value] if isinstance(value, (tuple, list)) else [text]


def run(args: argparse.Namespace) -> None:
    """Print main.py's command and run it. Raises UserError for what a user can mend."""
    words = translate(args)
    if os.environ.get('RANK', '0') == '0':
        print(f'python main.py {shlex.join(words)}', flush=True)
    if not Path(args.data_path).is_dir():
        raise UserError(f'--data-path {args.data_path}: there is no such folder. Pass that of ImageNet, with '
                        'train/ and val/')
    main.main(options.get_args_parser().parse_args(words))


if __name__ == '__main__':
    with script():
        run(get_args_parser().parse_args())
