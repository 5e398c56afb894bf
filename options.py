"""What the values of main.py's options may be, and what cannot go together."""
import re
from argparse import Namespace
from pathlib import Path

import torch

import replknet
import utils
from datasets import check_augmentation

LARGEST_SIDE = 16384  # pixels; beyond it a single image fills the memory

# what a value must be, as words and as a condition, and the options that it holds for; of several values, for each
RANGES = (
    ('at least 1 and at most 1000000', lambda value: 1 <= value <= 10 ** 6, ('batch_size', 'epochs', 'update_freq')),
    ('at least 1', lambda value: value >= 1, ('save_ckpt_freq', 'save_ckpt_num', 'nb_classes', 'world_size')),
    ('at least 1 and at most 1000', lambda value: 1 <= value <= 1000, ('recount',)),
    ('at least 0 and at most 1000', lambda value: 0 <= value <= 1000, ('num_workers',)),
    ('at least 0', lambda value: value >= 0, ('warmup_epochs', 'start_epoch', 'save_ckpt_steps')),
    ('at least -1', lambda value: value >= -1, ('warmup_steps', 'local_rank')),
    ('at least 0 and less than 2 ** 32', lambda value: 0 <= value < 2 ** 32, ('seed',)),
    (f'at least 1 and at most {LARGEST_SIDE}', lambda value: 1 <= value <= LARGEST_SIDE, ('input_size',)),
    (f'-1, or at least 1 and at most {LARGEST_SIDE}', lambda value: value == -1 or 1 <= value <= LARGEST_SIDE, ('test_size',)),
    ('at least 0 and at most 1e38', lambda value: 0 <= value <= 1e38,  # float32's range
     ('lr', 'min_lr', 'weight_decay', 'weight_decay_end', 'clip_grad', 'opt_eps', 'head_init_scale', 'mixup', 'cutmix',
      'color_jitter')),
    ('at least 0 and less than 1', lambda value: 0 <= value < 1,
     ('drop_path', 'smoothing', 'model_ema_decay', 'momentum', 'opt_betas')),
    ('at least 0 and at most 1', lambda value: 0 <= value <= 1,
     ('reprob', 'mixup_prob', 'mixup_switch_prob', 'cutmix_minmax')),
    ('more than 0 and at most 1', lambda value: 0 < value <= 1, ('layer_decay', 'crop_pct')),
)

WORDS = {
    'model': tuple(replknet.MODELS),
    'remode': ('const', 'rand', 'pixel'),
    'train_interpolation': ('random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
}


def check_options(args: Namespace, sync_bn: bool | None = None) -> None:
    """Raise utils.UserError for values that make no sense, and for options that cannot go together.

    sync_bn: whether the processes share the statistics of their batches; None, before they have met: they may, on GPUs.
    """
    for words, condition, names in RANGES:
        for name in names:
            value = getattr(args, name)
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not all(condition(v) for v in values):
                raise utils.UserError(f'--{name} {" ".join(map(str, values))} must be {words}')
    for name, words in WORDS.items():
        if getattr(args, name) not in words:
            raise utils.UserError(f'unknown --{name} {getattr(args, name)}: choose one of {", ".join(words)}')
    if not re.fullmatch(r'env://|file://.+|tcp://.+:\d+', args.dist_url):
        raise utils.UserError(f'--dist_url {args.dist_url} must be env://, tcp://HOST:PORT or file:///PATH')
    for name in ('output_dir', 'log_dir'):
        check_folder(name, getattr(args, name))
    for contradicts, message in contradictions(args):
        if contradicts:
            raise utils.UserError(message)
    check_sizes(args)
    check_augmentation(args)
    if sync_bn is None:
        sync_bn = not args.device.startswith('cpu') and torch.cuda.is_available()
    check_batch_norm(args, sync_bn)


def contradictions(args: Namespace) -> list[tuple[bool, str]]:
    """Options that cannot go together, or that one without the other would have no effect: (whether they stand so, message)."""
    betas = 3 if 'adan' in args.opt.lower() else 2
    return [
        (args.eval and args.disable_eval, '--eval and --disable_eval contradict each other'),
        (args.with_small_kernel_merged and not args.eval,
         '--with_small_kernel_merged goes with --eval: training needs the small kernels'),
        (args.compile and args.use_checkpoint, '--compile and --use_checkpoint do not work together: choose one'),
        (args.model_ema_eval and not args.model_ema, '--model_ema_eval has nothing to evaluate: pass --model_ema true too'),
        (args.model_ema_force_cpu and not args.model_ema, '--model_ema_force_cpu has nothing to keep: pass --model_ema true too'),
        (args.model_ema_eval and args.disable_eval, '--model_ema_eval and --disable_eval contradict each other'),
        (args.amp_dtype != 'float16' and not args.use_amp,
         f'--amp_dtype {args.amp_dtype} has no effect: pass --use_amp true too'),
        (bool(args.eval_data_path) and args.data_set != 'image_folder',
         f'--eval_data_path is not read with --data_set {args.data_set}: pass --data_set image_folder'),
        (not args.eval and args.start_epoch >= args.epochs,
         f'--start_epoch {args.start_epoch} must be less than --epochs {args.epochs}'),
        (not args.eval and args.min_lr > args.lr,
         f'--min_lr {args.min_lr:g}, where the cosine ends, must be at most --lr {args.lr:g}'),
        (bool(args.weight_decay_end) and args.weight_decay == 0,
         f'--weight_decay_end {args.weight_decay_end} has no effect with --weight_decay 0, which is none for good: pass more'),
        (args.opt_betas is not None and len(args.opt_betas) != betas,
         f'--opt {args.opt} takes {betas} numbers as --opt_betas, not {len(args.opt_betas or ())}'),
        (not args.eval and uses_mixup(args) and args.batch_size % 2 == 1,
         f'--batch_size {args.batch_size} is odd, and mixup and cutmix mix pairs: make it even, or pass --mixup 0 --cutmix 0'),
    ]


def uses_mixup(args: Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_folder(name: str, path: str | None) -> None:
    """Raise utils.UserError where the option `name` names something that is there and no folder, or that lies below such."""
    if not path:
        return
    try:
        nearest = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    except OSError as error:
        raise utils.UserError(f'--{name} {path} cannot be a folder: {error.strerror}') from error
    if not nearest.is_dir():
        raise utils.UserError(f'--{name} {path} cannot be a folder: {nearest} is a file')


def check_sizes(args: Namespace) -> None:
    """Raise utils.UserError for ratios that give no images, or rectangles, of the sizes asked for."""
    side = args.test_size if args.test_size > 0 else args.input_size
    if args.crop_pct is not None and side / args.crop_pct > LARGEST_SIDE:
        raise utils.UserError(f'--crop_pct {args.crop_pct} makes images of {side / args.crop_pct:.0f} px to crop {side} from, '
                              f'which must be at most {LARGEST_SIDE}')
    if args.cutmix_minmax is None:
        return
    if len(args.cutmix_minmax) != 2:
        raise utils.UserError(f'--cutmix_minmax takes two ratios, not {len(args.cutmix_minmax)}')
    least, most = args.cutmix_minmax
    if int(least * args.input_size) >= int(most * args.input_size):  # timm draws the sides from what lies between
        raise utils.UserError(f'--cutmix_minmax {least} {most} must be the least and the most of the side that is cut out, at '
                              f'least a pixel apart at --input_size {args.input_size}')


def check_batch_norm(args: Namespace, sync_bn: bool) -> None:
    """Raise utils.UserError where training would give the last BatchNorms one value a channel, which has no variance.

    The last maps are 1/32 of the input's side, rounded up. sync_bn: the batch is that of several processes.
    """
    if not args.eval and args.batch_size == 1 and args.input_size <= 32 and not sync_bn:
        raise utils.UserError(f'--batch_size 1 with --input_size {args.input_size} gives the last BatchNorms one value a '
                              'channel, which they cannot normalise: make the batch at least 2, or the images larger than 32 px')
