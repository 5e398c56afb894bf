"""main.py's options, what their values may be, and what cannot go together."""
import math
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distributed import check_agreement
from replknet_zoo import HALF, IMAGENET_MEAN, IMAGENET_STD, MODELS, ModelConfig
from replknet_zoo.own_models import is_own
from utils import SWIN_SCHEDULES, UserError, get_world_size, log

MAX_IMAGE_PIXELS = 2 * 89_478_485  # where Pillow, left alone, begins to refuse; it warns from half of that on
PUBLISHED_DATA_PATH = 'path_to_imagenet'  # the default, which no one's data lies at
LARGEST_SIDE = 16384  # pixels; beyond it a single image fills the memory

# what a value, or each of several, must be, in words and as a condition, and the options that it holds for
RANGES = (
    ('at least 1 and at most 1000000', lambda value: 1 <= value <= 10 ** 6,
     ('batch_size', 'epochs', 'update_freq', 'decay_epochs')),
    ('at least 1', lambda value: value >= 1, ('save_ckpt_freq', 'save_ckpt_num', 'nb_classes', 'world_size')),
    ('at least 1 and at most 1000', lambda value: 1 <= value <= 1000, ('recount',)),
    ('at least 0 and at most 1000', lambda value: 0 <= value <= 1000, ('num_workers',)),
    ('at least 0', lambda value: value >= 0, ('warmup_epochs', 'start_epoch', 'save_ckpt_steps')),
    ('at least -1', lambda value: value >= -1, ('warmup_steps', 'local_rank')),
    ('at least 0 and less than 2 ** 32', lambda value: 0 <= value < 2 ** 32, ('seed',)),
    (f'at least 1 and at most {LARGEST_SIDE}', lambda value: 1 <= value <= LARGEST_SIDE, ('input_size',)),
    (f'-1, or at least 1 and at most {LARGEST_SIDE}', lambda value: value == -1 or 1 <= value <= LARGEST_SIDE,
     ('test_size',)),
    ('at least 0 and at most 1e38', lambda value: 0 <= value <= 1e38,  # float32's range
     ('lr', 'base_lr', 'warmup_lr', 'min_lr', 'decay_rate', 'weight_decay', 'weight_decay_end', 'clip_grad',
      'opt_eps', 'head_init_scale', 'mixup', 'cutmix', 'color_jitter')),
    ('at least 0 and less than 1', lambda value: 0 <= value < 1,
     ('drop_path', 'smoothing', 'model_ema_decay', 'momentum', 'opt_betas')),
    ('at least 0 and at most 1', lambda value: 0 <= value <= 1,
     ('reprob', 'mixup_prob', 'mixup_switch_prob', 'cutmix_minmax')),
    ('more than 0 and at most 1', lambda value: 0 < value <= 1, ('layer_decay', 'crop_pct')),
)

WORDS = {
    'model': tuple(MODELS),
    'remode': ('const', 'rand', 'pixel'),
    'train_interpolation': ('random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
}


# defaults of published recipes, in the place of the parser's; --input_size becomes the model's own
RECIPES = {
    'repmlp': dict(epochs=100, warmup_epochs=10, base_lr=1e-3, warmup_lr=5e-7, min_lr=0.0,
                   lr_schedule='swin', weight_decay=0.1, clip_grad=5.0, aa='raug15', mixup=0.4, cutmix=1.0,
                   reprob=0.0, train_interpolation='bilinear'),
}


class RecipeParser(ArgumentParser):
    """Takes its defaults from the --recipe that is named: options that are given win."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        given = super().parse_known_args(args)[0]
        defaults = dict(RECIPES.get(given.recipe, {}))
        if defaults and given.model in MODELS:
            defaults['input_size'] = MODELS[given.model].input_size
        if given.lr is not self.get_default('lr'):  # it was given, and is not scaled
            defaults.pop('base_lr', None)
        own = {name: self.get_default(name) for name in defaults}
        self.set_defaults(**defaults)
        try:
            return super().parse_known_args(args, namespace)
        finally:
            self.set_defaults(**own)


def str2bool(value: str) -> bool:
    """True or false, as the published commands and their like spell it; argparse's error for others."""
    if value.lower() in ('true', '1', 'yes', 'y', 'on'):
        return True
    if value.lower() in ('false', '0', 'no', 'n', 'off'):
        return False
    raise ArgumentTypeError(f'{value!r} is neither true nor false')


def get_args_parser() -> ArgumentParser:
    """All options with their published defaults. Booleans are true or false; a bare switch means true."""
    parser = RecipeParser('RepLKNet', add_help=False)

    def switch(group, name: str, default: bool, help: str) -> None:
        group.add_argument(name, type=str2bool, nargs='?', const=True, default=default, metavar='BOOL',
                           help=help)

    run = parser.add_argument_group('run')
    run.add_argument('--recipe', default=None, choices=list(RECIPES),
                     help='start from the published options of a family; those that are given win')
    run.add_argument('--batch_size', default=64, type=int,
                     help='images per process and micro-batch; the effective batch is '
                          'batch_size * processes * update_freq')
    run.add_argument('--epochs', default=300, type=int)
    run.add_argument('--update_freq', default=1, type=int,
                     help='micro-batches whose gradients are accumulated for one step')
    run.add_argument('--start_epoch', default=0, type=int, help='first epoch, where no checkpoint says it')
    run.add_argument('--seed', default=0, type=int)
    run.add_argument('--device', default='auto', help='auto (CUDA if there is any), cpu, cuda, cuda:1 ...')
    switch(run, '--dry_run', False,
           'build everything, take two steps, print parameters, effective batch and memory; write nothing')

    model = parser.add_argument_group('model')
    model.add_argument('--model', default='RepLKNet-31B', type=str, metavar='NAME',
                       help=f'{", ".join(MODELS)}; or FILE.py:FUNCTION, which returns a model of yours')
    model.add_argument('--drop_path', default=0, type=float, metavar='RATE', help='rate of the last block')
    model.add_argument('--input_size', default=224, type=int, help='side of the images, in pixels')
    model.add_argument('--test_size', default=-1, type=int, help='side in evaluation, if it is another')
    model.add_argument('--head_init_scale', default=1.0, type=float, help="factor on the new head's weights")
    switch(model, '--use_checkpoint', False, 'activation checkpointing: less memory, a second forward pass')
    switch(model, '--channels_last', False, 'channels_last memory format')
    switch(model, '--compile', False, 'torch.compile; the first steps compile, which takes a while')

    ema = parser.add_argument_group('exponential moving average of the weights')
    switch(ema, '--model_ema', False, 'keep one')
    ema.add_argument('--model_ema_decay', default=0.9999, type=float)
    switch(ema, '--model_ema_force_cpu', False, 'keep it in CPU memory')
    switch(ema, '--model_ema_eval', False, 'evaluate it too, after every epoch')

    optim = parser.add_argument_group('optimizer')
    optim.add_argument('--opt', default='adamw', type=str, help="timm's name")
    optim.add_argument('--opt_eps', default=1e-8, type=float)
    optim.add_argument('--opt_betas', default=None, type=float, nargs='+')
    optim.add_argument('--clip_grad', default=None, type=float, metavar='NORM',
                       help='clip the gradient norm; default, and 0: do not')
    optim.add_argument('--momentum', default=0.9, type=float)
    optim.add_argument('--weight_decay', default=0.05, type=float)
    optim.add_argument('--weight_decay_end', default=None, type=float,
                       help='final weight decay of a cosine; default: constant')
    rate = optim.add_mutually_exclusive_group()
    rate.add_argument('--lr', default=4e-3, type=float, help='after warm-up; not scaled by the batch')
    rate.add_argument('--base_lr', default=None, type=float,
                      help='instead of --lr, for 256 images: it, --warmup_lr and --min_lr are multiplied by '
                           'effective batch / 256')
    optim.add_argument('--warmup_lr', default=0.0, type=float, help='at the first step of the warm-up')
    optim.add_argument('--lr_schedule', default='cosine', choices=['cosine', *SWIN_SCHEDULES],
                       help="cosine: a half of it after the warm-up; swin: Swin Transformer's, of the whole "
                            'run, one update behind; its line down to 1%%, its steps')
    optim.add_argument('--decay_epochs', default=30, type=int, help='between the steps of swin_step')
    optim.add_argument('--decay_rate', default=0.1, type=float, help='factor of each of these steps')
    optim.add_argument('--layer_decay', default=1.0, type=float, help='factor of the rate, layer by layer')
    optim.add_argument('--min_lr', default=1e-6, type=float, help='at the end of the cosine')
    optim.add_argument('--warmup_epochs', default=20, type=int)
    optim.add_argument('--warmup_steps', default=-1, type=int, help='replaces --warmup_epochs if positive')
    switch(optim, '--use_amp', False, 'automatic mixed precision')
    optim.add_argument('--amp_dtype', default='float16', choices=['float16', 'bfloat16'],
                       help='its data type; float16 scales the loss')

    augmentation = parser.add_argument_group('augmentation')
    augmentation.add_argument('--color_jitter', default=0.4, type=float, help='used only with --aa none')
    augmentation.add_argument('--aa', default='rand-m9-mstd0.5-inc1', type=str,
                              help="timm's AutoAugment policy, raug15, or none")
    augmentation.add_argument('--smoothing', default=0.1, type=float, help='label smoothing')
    augmentation.add_argument('--train_interpolation', default='bicubic', type=str,
                              help='random, nearest, bilinear, bicubic; '
                                   'with --aa none box, hamming, lanczos too')
    augmentation.add_argument('--crop_pct', default=None, type=float,
                              help="centre crop in evaluation; default: the model's, or else 0.875, "
                                   'and from 384 px on none (the image is warped)')
    augmentation.add_argument('--reprob', default=0.25, type=float, metavar='P', help='random erasing')
    augmentation.add_argument('--remode', default='pixel', help='what is erased becomes: const, rand, pixel')
    augmentation.add_argument('--recount', default=1, type=int, help='areas erased, at most')
    switch(augmentation, '--resplit', False, 'accepted; has no effect, as published')
    augmentation.add_argument('--mixup', default=0.8, type=float, metavar='ALPHA')
    augmentation.add_argument('--cutmix', default=1.0, type=float, metavar='ALPHA')
    augmentation.add_argument('--cutmix_minmax', default=None, type=float, nargs='+')
    augmentation.add_argument('--mixup_prob', default=1.0, type=float)
    augmentation.add_argument('--mixup_switch_prob', default=0.5, type=float)
    augmentation.add_argument('--mixup_mode', default='batch', type=str, choices=['batch', 'pair', 'elem'])

    weights = parser.add_argument_group('weights: files or URLs')
    weights.add_argument('--finetune', default='', help='start from these weights, a new head where needed')
    weights.add_argument('--resume', default='', help='go on from this checkpoint, or evaluate these weights')
    weights.add_argument('--model_key', default='model|module', type=str,
                         help='key of the weights in the file; model_ema for the EMA')
    weights.add_argument('--model_prefix', default='', type=str, help='take the keys that begin with this')

    data = parser.add_argument_group('data')
    data.add_argument('--data_set', default='IMNET', type=str,
                      choices=['CIFAR', 'IMNET', 'image_folder', 'FMNIST', 'DIGITS'],
                      help='IMNET: DATA_PATH/train and DATA_PATH/val; image_folder: DATA_PATH and '
                           "EVAL_DATA_PATH; CIFAR: CIFAR-100; FMNIST: Fashion-MNIST, Debian's without "
                           "--data_path; DIGITS: scikit-learn's, needs no path")
    data.add_argument('--data_path', default=PUBLISHED_DATA_PATH, type=str)
    data.add_argument('--eval_data_path', default=None, type=str)
    data.add_argument('--val_labels', default='', metavar='FILE', help='classes of ILSVRC2012_img_val.tar')
    data.add_argument('--nb_classes', default=1000, type=int)
    switch(data, '--imagenet_default_mean_and_std', True,
           "ImageNet's; false means 0.5 and 0.5, which RepLKNet-XL needs")
    data.add_argument('--num_workers', default=10, type=int,
                      help='loader processes for each training process, and as many for its evaluations')
    data.add_argument('--loader', default='pillow', choices=['pillow', 'fast'],
                      help='fast: a JPEG takes less of a core; within rounding of the published transforms')
    add_max_image_pixels(data)
    switch(data, '--pin_mem', True, 'pin memory for faster transfer to a GPU')

    evaluation = parser.add_argument_group('evaluation')
    switch(evaluation, '--eval', False, 'evaluate only')
    switch(evaluation, '--with_small_kernel_merged', False,
           'with --eval: merge the kernels, compare, evaluate the merged model')
    evaluation.add_argument('--eval_set', default='', metavar='NAME=FOLDER,...',
                            help='with --eval: of real, v2, a, r, sketch; without --data_path these alone')
    switch(evaluation, '--dist_eval', True, 'share the images among the processes')
    switch(evaluation, '--disable_eval', False, 'train without evaluating')

    output = parser.add_argument_group('output')
    output.add_argument('--output_dir', default='', help='checkpoints and log.txt; empty: none are written')
    output.add_argument('--log_dir', default=None, help='TensorBoard')
    switch(output, '--auto_resume', True, 'go on from the newest checkpoint in --output_dir')
    switch(output, '--save_ckpt', True, 'write checkpoints')
    output.add_argument('--save_ckpt_freq', default=20, type=int, metavar='EPOCHS',
                        help='between numbered checkpoints')
    output.add_argument('--save_ckpt_steps', default=0, type=int, metavar='STEPS',
                        help='save within an epoch too, after every so many steps; 0: only after each epoch')
    output.add_argument('--save_ckpt_num', default=3, type=int, metavar='N', help='numbered ones to keep')

    distributed = parser.add_argument_group('distributed; launchers set these')
    distributed.add_argument('--world_size', default=1, type=int)
    distributed.add_argument('--local_rank', '--local-rank', default=-1, type=int)
    switch(distributed, '--dist_on_itp', False, 'launched by Open MPI')
    distributed.add_argument('--dist_url', default='env://')
    return parser


def add_max_image_pixels(parser: ArgumentParser) -> None:
    """The option that load_image's limit comes from."""
    def pixels(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentTypeError(f'{text!r} is no number of pixels: it must be a whole one of at least 1')
        return int(text)
    parser.add_argument('--max_image_pixels', default=MAX_IMAGE_PIXELS, type=pixels, metavar='N',
                        help='refuse larger images: a small file may hold more than fits into memory; '
                             f'default: {MAX_IMAGE_PIXELS}')


def check_options(args: Namespace, sync_bn: bool | None = None) -> None:
    """Raise UserError for values that make no sense, and for options that cannot go together.

    sync_bn: whether the processes share the statistics of their batches; None, before they met: if on GPUs.
    """
    for words, condition, names in RANGES:
        for name in names:
            value = getattr(args, name)
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not all(condition(v) for v in values):
                raise UserError(f'--{name} {" ".join(map(str, values))} must be {words}')
    for name, words in WORDS.items():
        if getattr(args, name) not in words and not (name == 'model' and is_own(args.model)):
            raise UserError(f'unknown --{name} {getattr(args, name)}: choose one of {", ".join(words)}')
    if not re.fullmatch(r'env://|file://.+|tcp://.+:\d+', args.dist_url):
        raise UserError(f'--dist_url {args.dist_url} must be env://, tcp://HOST:PORT or file:///PATH')
    for name in ('output_dir', 'log_dir'):
        check_folder(name, getattr(args, name))
    for contradicts, message in contradictions(args):
        if contradicts:
            raise UserError(message)
    check_sizes(args)
    from datasets import check_augmentation, parse_eval_sets  # timm, which takes seconds to import
    check_augmentation(args)
    parse_eval_sets(args.eval_set)
    if sync_bn is None:
        sync_bn = not args.device.startswith('cpu') and torch.cuda.is_available()
    check_batch_norm(args, sync_bn)


def contradictions(args: Namespace) -> list[tuple[bool, str]]:
    """Options that cannot go together, or do nothing without another: (whether they stand so, message)."""
    betas = 3 if 'adan' in args.opt.lower() else 2
    peak = args.lr if args.base_lr is None else args.base_lr
    return [
        (args.eval and args.disable_eval, '--eval and --disable_eval contradict each other'),
        (args.with_small_kernel_merged and not args.eval,
         '--with_small_kernel_merged goes with --eval: training needs the small kernels'),
        (bool(args.eval_set) and not args.eval, '--eval_set goes with --eval'),
        (args.compile and args.use_checkpoint, '--compile and --use_checkpoint: choose one'),
        (args.model_ema_eval and not args.model_ema,
         '--model_ema_eval has nothing to evaluate: pass --model_ema true too'),
        (args.model_ema_force_cpu and not args.model_ema,
         '--model_ema_force_cpu has nothing to keep: pass --model_ema true too'),
        (args.model_ema_eval and args.disable_eval,
         '--model_ema_eval and --disable_eval contradict each other'),
        (args.amp_dtype != 'float16' and not args.use_amp,
         f'--amp_dtype {args.amp_dtype} has no effect: pass --use_amp true too'),
        (bool(args.eval_data_path) and args.data_set != 'image_folder',
         f'--eval_data_path is not read with --data_set {args.data_set}: pass --data_set image_folder'),
        (bool(args.val_labels) and args.data_set in ('CIFAR', 'FMNIST', 'DIGITS'),
         f'--val_labels is not read with --data_set {args.data_set}'),
        (not args.eval and args.start_epoch >= args.epochs,
         f'--start_epoch {args.start_epoch} must be less than --epochs {args.epochs}'),
        *((not args.eval and getattr(args, name) > peak,
           f'--{name} {getattr(args, name):g}, where the {where}, must be at most '
           f'--{"lr" if args.base_lr is None else "base_lr"} {peak:g}')
          for name, where in (('min_lr', 'cosine ends'), ('warmup_lr', 'warm-up begins'))),
        (args.lr_schedule != 'cosine' and args.warmup_steps > 0,
         f'--lr_schedule {args.lr_schedule} is not for --warmup_steps: pass --warmup_epochs'),
        (bool(args.weight_decay_end) and args.weight_decay == 0,
         f'--weight_decay_end {args.weight_decay_end} has no effect with --weight_decay 0, '
         'which is none for good: pass more'),
        (args.opt_betas is not None and len(args.opt_betas) != betas,
         f'--opt {args.opt} takes {betas} numbers as --opt_betas, not {len(args.opt_betas or ())}'),
        (not args.eval and uses_mixup(args) and args.batch_size % 2 == 1,
         f'--batch_size {args.batch_size} is odd, and mixup and cutmix mix pairs: '
         'make it even, or pass --mixup 0 --cutmix 0'),
    ]


def uses_mixup(args: Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_folder(name: str, path: str | None) -> None:
    """Raise UserError where the path of the option `name` is there but no folder, or lies below such."""
    if not path:
        return
    try:
        nearest = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f'--{name} {path} cannot be a folder: {error.strerror}') from error
    if not nearest.is_dir():
        raise UserError(f'--{name} {path} cannot be a folder: {nearest} is a file')


def check_sizes(args: Namespace) -> None:
    """Raise UserError for ratios that give no images, or rectangles, of the sizes asked for."""
    side = args.test_size if args.test_size > 0 else args.input_size
    if args.crop_pct is not None and side / args.crop_pct > LARGEST_SIDE:
        raise UserError(f'--crop_pct {args.crop_pct} makes images of {side / args.crop_pct:.0f} px to crop '
                        f'{side} from, which must be at most {LARGEST_SIDE}')
    if args.cutmix_minmax is None:
        return
    if len(args.cutmix_minmax) != 2:
        raise UserError(f'--cutmix_minmax takes two ratios, not {len(args.cutmix_minmax)}')
    least, most = args.cutmix_minmax
    # timm draws the sides from what lies between
    if int(least * args.input_size) >= int(most * args.input_size):
        raise UserError(f'--cutmix_minmax {least} {most} must be the least and the most of the side that is '
                        f'cut out, at least a pixel apart at --input_size {args.input_size}')


def check_batch_norm(args: Namespace, sync_bn: bool) -> None:
    """Raise UserError where training would give the last BatchNorms one value a channel: it has no variance.

    The last maps are 1/32 of the input's side, rounded up. sync_bn: the batch is that of several processes.
    """
    if not args.eval and args.batch_size == 1 and args.input_size <= 32 and not sync_bn:
        raise UserError(f'--batch_size 1 with --input_size {args.input_size} gives the last BatchNorms one '
                        'value a channel, which they cannot normalise: make the batch at least 2, '
                        'or the images larger than 32 px')


# Options that say where things are, how they are computed, or (--recipe) what others default to: processes of
# one run may differ in the first set, a run that goes on in both.
OF_A_PROCESS = {
    'recipe', 'data_path', 'eval_data_path', 'eval_set', 'val_labels', 'output_dir', 'log_dir', 'resume',
    'finetune', 'device', 'num_workers', 'pin_mem', 'max_image_pixels', 'local_rank', 'dist_on_itp',
    'dist_url'}
OF_A_LAUNCH = OF_A_PROCESS | {
    'model_key', 'model_prefix', 'start_epoch', 'auto_resume', 'dry_run', 'batch_size', 'update_freq',
    'use_checkpoint', 'channels_last', 'compile', 'use_amp', 'amp_dtype', 'model_ema', 'model_ema_force_cpu',
    'model_ema_eval', 'eval', 'with_small_kernel_merged', 'dist_eval', 'disable_eval', 'test_size', 'loader',
    'crop_pct', 'save_ckpt', 'save_ckpt_freq', 'save_ckpt_steps', 'save_ckpt_num', 'world_size', 'resplit'}


def options_without(left_out: set[str], args: Namespace) -> dict[str, object]:
    """main.py's options but those `left_out`, in the parser's order."""
    return {key: getattr(args, key) for key in vars(get_args_parser().parse_args([])) if key not in left_out}


def effective_batch(args: Namespace) -> int:
    """Images behind one optimizer step."""
    return args.batch_size * get_world_size() * args.update_freq


class LearningRates(NamedTuple):
    """Of a run."""
    warmup: float  # at its first step
    peak: float
    end: float


def learning_rates(args: Namespace) -> LearningRates:
    """What the options give; --base_lr scales all by the effective batch, once the processes have met."""
    if args.base_lr is None:
        return LearningRates(args.warmup_lr, args.lr, args.min_lr)
    factor = effective_batch(args) / 256
    return LearningRates(factor * args.warmup_lr, factor * args.base_lr, factor * args.min_lr)


def shares_batch_norm(args: Namespace) -> bool:
    """Whether the processes share the statistics of their batches: on GPUs, unless the recipe does not."""
    return (args.distributed and args.device.startswith('cuda')
            and MODELS.get(args.model, ModelConfig).sync_bn)


def check_image_sizes(args: Namespace, model: torch.nn.Module) -> None:
    """Raise UserError where the model does not take a size that is used."""
    names = ['test_size'] if args.test_size > 0 else []
    for name in names if args.eval and names else ['input_size', *names]:
        check_image_size(name, getattr(args, name), model)


def check_image_size(option: str, size: int, model: torch.nn.Module) -> None:
    """Raise UserError where the model takes no images of size x size pixels."""
    multiple = math.lcm(*getattr(model, 'size_multiples', (1,)))
    if size % multiple:
        raise UserError(f'--{option} {size}: this model takes multiples of {multiple} pixels: '
                        f'pass --{option} {multiple}')


def mean_and_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalisation that --imagenet_default_mean_and_std chooses: ImageNet's, or 0.5 and 0.5."""
    return (IMAGENET_MEAN, IMAGENET_STD) if args.imagenet_default_mean_and_std else (HALF, HALF)


def warn_of_preprocessing(args: Namespace) -> None:
    """Point out a normalisation that is not the one of the model's published weights."""
    config = MODELS.get(args.model, ModelConfig)
    if mean_and_std(args) != (config.mean, config.std) and (args.eval or args.resume or args.finetune):
        log(f'WARNING: the published {args.model} weights expect mean {config.mean} and std {config.std}: '
            f'pass --imagenet_default_mean_and_std {str(config.mean == IMAGENET_MEAN).lower()}, '
            'unless yours differ')


def check_processes(args: Namespace) -> None:
    """Raise UserError on all processes where options that shape the run, or package versions, differ."""
    import timm  # takes seconds
    import torchvision
    facts = options_without(OF_A_PROCESS, args)
    facts |= {f'whether --{name} is given': bool(getattr(args, name))
              for name in ('resume', 'finetune', 'output_dir')}
    facts |= {f"{package.__name__}'s version": package.__version__ for package in (torch, torchvision, timm)}
    check_agreement(**facts, LARGE_KERNEL_CONV_IMPL=os.environ.get('LARGE_KERNEL_CONV_IMPL') or 'auto')
