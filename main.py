"""Train and evaluate RepLKNet on image classification.

One process:     python main.py --model RepLKNet-31T --data_set DIGITS --input_size 32 ...
One node:        python -m torch.distributed.launch --nproc_per_node=8 main.py --model RepLKNet-31B --data_path IMAGENET ...
                 (torchrun works the same)
Two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main.py ...

The README has the published commands and the lines to expect.
"""
import argparse
import atexit
import copy
import datetime
import functools
import hashlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import distributed  # isort: split

import timm.loss
import torch
import torchvision
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset, Subset

import replknet
import utils
from datasets import ResumableSampler, add_max_image_pixels, build_dataset, mean_and_std
from engine import DIVERGED, evaluate, train_one_epoch
from large_kernel_conv.memory import keep_freed_memory
from optim_factory import create_optimizer, layer_decay_assigner, load_optimizer_state, timm_name
from options import check_batch_norm, check_options, uses_mixup


def str2bool(value: str) -> bool:
    """True or false from the spellings of the published commands and their like; argparse's error for others."""
    if value.lower() in ('true', '1', 'yes', 'y', 'on'):
        return True
    if value.lower() in ('false', '0', 'no', 'n', 'off'):
        return False
    raise argparse.ArgumentTypeError(f'{value!r} is neither true nor false')


def get_args_parser() -> argparse.ArgumentParser:
    """All options with their published defaults. Booleans are given as true or false; a bare switch means true."""
    parser = argparse.ArgumentParser('RepLKNet', add_help=False)

    def switch(group, name: str, default: bool, help: str) -> None:
        group.add_argument(name, type=str2bool, nargs='?', const=True, default=default, metavar='BOOL', help=help)

    run = parser.add_argument_group('run')
    run.add_argument('--batch_size', default=64, type=int, help='images per process and micro-batch; the effective batch '
                     'is batch_size * processes * update_freq')
    run.add_argument('--epochs', default=300, type=int)
    run.add_argument('--update_freq', default=1, type=int, help='micro-batches whose gradients are accumulated for one step')
    run.add_argument('--start_epoch', default=0, type=int, help='first epoch, where no checkpoint says it')
    run.add_argument('--seed', default=0, type=int)
    run.add_argument('--device', default='auto', help='auto (CUDA if there is any), cpu, cuda, cuda:1 ...')
    switch(run, '--dry_run', False, 'build everything, take two steps, print parameters, effective batch and memory; write '
           'nothing')

    model = parser.add_argument_group('model')
    model.add_argument('--model', default='RepLKNet-31B', type=str, metavar='NAME', help=', '.join(replknet.MODELS))
    model.add_argument('--drop_path', default=0, type=float, metavar='RATE', help='rate of the last block')
    model.add_argument('--input_size', default=224, type=int, help='side of the images, in pixels')
    model.add_argument('--test_size', default=-1, type=int, help='side in evaluation, if it is another')
    model.add_argument('--head_init_scale', default=1.0, type=float, help="factor on the new head's initial weights")
    switch(model, '--use_checkpoint', False, 'activation checkpointing: less memory for a second forward pass')
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
    optim.add_argument('--clip_grad', default=None, type=float, metavar='NORM', help='clip the gradient norm; default, and 0: do '
                       'not')
    optim.add_argument('--momentum', default=0.9, type=float)
    optim.add_argument('--weight_decay', default=0.05, type=float)
    optim.add_argument('--weight_decay_end', default=None, type=float, help='final weight decay of a cosine; default: constant')
    optim.add_argument('--lr', default=4e-3, type=float, help='after warm-up; not scaled by the batch')
    optim.add_argument('--layer_decay', default=1.0, type=float, help='factor of the learning rate from layer to layer')
    optim.add_argument('--min_lr', default=1e-6, type=float, help='at the end of the cosine')
    optim.add_argument('--warmup_epochs', default=20, type=int)
    optim.add_argument('--warmup_steps', default=-1, type=int, help='replaces --warmup_epochs if positive')
    switch(optim, '--use_amp', False, 'automatic mixed precision')
    optim.add_argument('--amp_dtype', default='float16', choices=['float16', 'bfloat16'], help='its data type; float16 scales '
                       'the loss')

    augmentation = parser.add_argument_group('augmentation')
    augmentation.add_argument('--color_jitter', default=0.4, type=float, help='used only with --aa none')
    augmentation.add_argument('--aa', default='rand-m9-mstd0.5-inc1', type=str, help="timm's AutoAugment policy, or none")
    augmentation.add_argument('--smoothing', default=0.1, type=float, help='label smoothing')
    augmentation.add_argument('--train_interpolation', default='bicubic', type=str, help='random, nearest, bilinear, bicubic; '
                              'with --aa none box, hamming, lanczos too')
    augmentation.add_argument('--crop_pct', default=None, type=float, help='centre crop in evaluation; default: 0.875, and from '
                              '384 px on none (the image is warped)')
    augmentation.add_argument('--reprob', default=0.25, type=float, metavar='P', help='random erasing')
    augmentation.add_argument('--remode', default='pixel', type=str, help='what is erased becomes: const, rand, pixel')
    augmentation.add_argument('--recount', default=1, type=int, help='areas erased, at most')
    switch(augmentation, '--resplit', False, 'accepted; has no effect, as published')
    augmentation.add_argument('--mixup', default=0.8, type=float, metavar='ALPHA')
    augmentation.add_argument('--cutmix', default=1.0, type=float, metavar='ALPHA')
    augmentation.add_argument('--cutmix_minmax', default=None, type=float, nargs='+')
    augmentation.add_argument('--mixup_prob', default=1.0, type=float)
    augmentation.add_argument('--mixup_switch_prob', default=0.5, type=float)
    augmentation.add_argument('--mixup_mode', default='batch', type=str, choices=['batch', 'pair', 'elem'])

    weights = parser.add_argument_group('weights: files or URLs')
    weights.add_argument('--finetune', default='', help='start from these weights; a head that does not fit is replaced')
    weights.add_argument('--resume', default='', help='go on from this training checkpoint, or evaluate these weights')
    weights.add_argument('--model_key', default='model|module', type=str, help='key of the weights in the file; model_ema for '
                         'the EMA')
    weights.add_argument('--model_prefix', default='', type=str, help='take the keys that begin with this')

    data = parser.add_argument_group('data')
    data.add_argument('--data_set', default='IMNET', type=str, choices=['CIFAR', 'IMNET', 'image_folder', 'DIGITS'],
                      help='IMNET: DATA_PATH/train and DATA_PATH/val; image_folder: DATA_PATH and EVAL_DATA_PATH; CIFAR: '
                      "CIFAR-100; DIGITS: scikit-learn's, needs no path")
    data.add_argument('--data_path', default='path_to_imagenet', type=str)
    data.add_argument('--eval_data_path', default=None, type=str)
    data.add_argument('--nb_classes', default=1000, type=int)
    switch(data, '--imagenet_default_mean_and_std', True, "ImageNet's; false means 0.5 and 0.5, which RepLKNet-XL needs")
    data.add_argument('--num_workers', default=10, type=int, help='loader processes for each training process, and as '
                      'many for its evaluations')
    add_max_image_pixels(data)
    switch(data, '--pin_mem', True, 'pin memory for faster transfer to a GPU')

    evaluation = parser.add_argument_group('evaluation')
    switch(evaluation, '--eval', False, 'evaluate only')
    switch(evaluation, '--with_small_kernel_merged', False, 'with --eval: merge the kernels, compare, evaluate the merged model')
    switch(evaluation, '--dist_eval', True, 'share the images among the processes')
    switch(evaluation, '--disable_eval', False, 'train without evaluating')

    output = parser.add_argument_group('output')
    output.add_argument('--output_dir', default='', help='checkpoints and log.txt; empty: none are written')
    output.add_argument('--log_dir', default=None, help='TensorBoard')
    switch(output, '--auto_resume', True, 'go on from the newest checkpoint in --output_dir')
    switch(output, '--save_ckpt', True, 'write checkpoints')
    output.add_argument('--save_ckpt_freq', default=20, type=int, metavar='EPOCHS', help='between numbered checkpoints')
    output.add_argument('--save_ckpt_steps', default=0, type=int, metavar='STEPS', help='save within an epoch too, after every '
                        'so many steps; 0: only after each epoch')
    output.add_argument('--save_ckpt_num', default=3, type=int, metavar='N', help='numbered checkpoints to keep')

    distributed = parser.add_argument_group('distributed; launchers set these')
    distributed.add_argument('--world_size', default=1, type=int)
    distributed.add_argument('--local_rank', '--local-rank', default=-1, type=int)
    switch(distributed, '--dist_on_itp', False, 'launched by Open MPI')
    distributed.add_argument('--dist_url', default='env://')
    return parser


def main(args: argparse.Namespace) -> None:
    """Train, or with --eval evaluate, as the options say. Raises utils.UserError (a ValueError) for what a user can mend."""
    check_options(args)  # before the processes meet: a wrong one ends each of them at once
    utils.init_distributed(args)
    atexit.register(utils.ignore_stop_signals)
    distributed.share_out_threads(utils.gather)
    check_batch_norm(args, sync_bn=args.distributed and args.device.startswith('cuda'))
    warn_of_preprocessing(args)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu':
        keep_freed_memory()
    utils.log(str(args))
    check_processes(args)

    dataset_train, dataset_val = utils.together(lambda: build_datasets(args))
    utils.check_agreement(**facts_of('training', dataset_train), **facts_of('validation', dataset_val))
    if args.num_workers:
        utils.start_worker_server()  # it gets ready while the model is made
    utils.seed_generators('model', args.seed)
    model = replknet.create_model(args.model, args.drop_path, num_classes=args.nb_classes, use_checkpoint=args.use_checkpoint,
                                  use_sync_bn=args.distributed and device.type == 'cuda')
    with torch.no_grad():  # before the weights are loaded: only a head that stays new is scaled
        for parameter in model.head.parameters():
            parameter.mul_(args.head_init_scale)
    checkpoint = load_initial_weights(args, model)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    utils.log(f'{args.model}: {count_parameters(model) / 1e6:.2f} M parameters')

    if device.type == 'cpu' and not args.compile:  # the compiler starts processes of its own
        distributed.bind_this_thread()
    if args.eval:
        evaluate_only(args, model, dataset_val, device)
    else:
        with utils.StopRequests(device) as stop:
            try:
                train(args, model, checkpoint, dataset_train, dataset_val, device, stop)
            except utils.Stopped:  # all processes at once
                utils.end_distributed()
                raise
    utils.end_distributed()


# Options that say where things are and how they are computed: processes of one run may differ in the first set, a run that goes
# on in both.
OF_A_PROCESS = {'data_path', 'eval_data_path', 'output_dir', 'log_dir', 'resume', 'finetune', 'device', 'num_workers',
                'pin_mem', 'max_image_pixels', 'local_rank', 'dist_on_itp', 'dist_url'}
OF_A_LAUNCH = OF_A_PROCESS | {
    'model_key', 'model_prefix', 'start_epoch', 'auto_resume', 'dry_run', 'batch_size', 'update_freq', 'use_checkpoint',
    'channels_last', 'compile', 'use_amp', 'amp_dtype', 'model_ema', 'model_ema_force_cpu', 'model_ema_eval', 'eval',
    'with_small_kernel_merged', 'dist_eval', 'disable_eval', 'test_size', 'crop_pct', 'save_ckpt', 'save_ckpt_freq',
    'save_ckpt_steps', 'save_ckpt_num', 'world_size', 'resplit'}


def options_without(left_out: set[str], args: argparse.Namespace) -> dict[str, object]:
    """main.py's options, in the parser's order."""
    return {name: getattr(args, name) for name in vars(get_args_parser().parse_args([])) if name not in left_out}


def check_processes(args: argparse.Namespace) -> None:
    """Raise utils.UserError on all processes where one has another option that shapes the run, or another package version."""
    facts = options_without(OF_A_PROCESS, args)
    facts |= {f'whether --{name} is given': bool(getattr(args, name)) for name in ('resume', 'finetune', 'output_dir')}
    facts |= {f"{package.__name__}'s version": package.__version__ for package in (torch, torchvision, timm)}
    utils.check_agreement(**facts, LARGE_KERNEL_CONV_IMPL=os.environ.get('LARGE_KERNEL_CONV_IMPL') or 'auto')


def facts_of(name: str, dataset: Dataset | None) -> dict[str, object]:
    """What must be the same of a data set on all processes: the number of its images, and its classes."""
    if dataset is None:
        return {}
    classes = getattr(getattr(dataset, 'dataset', dataset), 'classes', [])
    facts = {f'the number of {name} images': len(dataset)}
    if classes:
        digest = hashlib.sha256('\0'.join(classes).encode(errors='surrogateescape')).hexdigest()[:8]
        facts[f'the list of {name} classes'] = f'{classes[0]} ... {classes[-1]} ({len(classes)}, digest {digest})'
    return facts


def warn_of_preprocessing(args: argparse.Namespace) -> None:
    """Point out a normalisation that is not the one of the model's published weights."""
    config = replknet.MODELS[args.model]
    if mean_and_std(args) != (config.mean, config.std) and (args.eval or args.resume or args.finetune):
        utils.log(f'WARNING: the published {args.model} weights expect mean {config.mean} and std {config.std}: pass '
                  f'--imagenet_default_mean_and_std {str(config.mean == replknet.IMAGENET_MEAN).lower()}, unless yours differ')


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build_datasets(args: argparse.Namespace) -> tuple[Dataset | None, Dataset | None]:
    """The training set (None with --eval) and the validation set (None with --disable_eval); sets args.nb_classes."""
    dataset_train = dataset_val = None
    if not args.eval:
        dataset_train, args.nb_classes = build_dataset(True, args)
    if not args.disable_eval:
        dataset_val, args.nb_classes = build_dataset(False, args)
    return dataset_train, dataset_val


def load_initial_weights(args: argparse.Namespace, model: replknet.RepLKNet) -> dict | None:
    """Load the weights to start from; return the training checkpoint that holds them, if there is one to go on from."""
    source, checkpoint = choose_checkpoint(args)
    if source is None:
        if args.eval:
            raise utils.UserError('--eval has no weights to evaluate: pass --resume FILE')
        return None
    own = source not in (args.resume, args.finetune)  # in --output_dir; --model_key speaks of a named file, or of --eval
    model_key, prefix = ('model', '') if own and not args.eval else (args.model_key, args.model_prefix)
    new_head = source == args.finetune and not args.resume and not args.eval
    try:
        state = replknet.state_dict_of(checkpoint, source, model_key, prefix)
        head_kept = replknet.load_state(model, state, source, new_head)
    except ValueError as error:
        hint = '' if new_head or args.eval else '. To replace the head, use --finetune'
        raise utils.UserError(f'{error} (--model {args.model}, --nb_classes {args.nb_classes}){hint}') from error
    if not args.eval and replknet.is_folded(state):
        raise utils.UserError(f'{source} cannot be trained: its BatchNorms are folded, which is for inference. Start from the '
                              'weights that it was made from')
    utils.log(f'Weights from {source}' + (f', with a new head for {args.nb_classes} classes' if head_kept else ''))
    if not args.eval and any('lkb_reparam' in key for key in state):
        utils.log('WARNING: the kernels of these weights are merged, so training goes on without the small ones')
    return checkpoint if utils.progress(checkpoint) is not None and not new_head else None


def choose_checkpoint(args: argparse.Namespace) -> tuple[str | Path | None, object]:
    """(source, content): the newest checkpoint in --output_dir, unless --resume went further; else --resume; else --finetune.

    With --eval a named file comes first.
    """
    named = args.resume or args.finetune
    own = None
    if args.output_dir and args.auto_resume and not (args.eval and named):
        own = utils.newest_checkpoint(Path(args.output_dir))
        if own is not None and not args.eval:
            check_same_run(args, *own)
    if own is not None and not args.resume:
        if named:
            utils.log(f'{own[0]} holds the progress of this run, so {named} is not used')
        return own
    if not named:
        return None, None
    try:
        content = utils.read_checkpoint(named)
    except utils.UserError as error:
        if own is None:
            raise
        utils.log(f'Passed over: {error}')  # a requeued job needs the file no more
        return own
    utils.check_same_content(content)
    if own is not None and utils.progress(own[1]) >= (utils.progress(content) or (0, 0)):
        utils.log(f'{own[0]} holds the progress of this run, so {named} is not used')
        return own
    return named, content


def check_same_run(args: argparse.Namespace, path: Path, checkpoint: dict) -> None:
    """Raise utils.UserError where a checkpoint in --output_dir is of a run with other options that shape it."""
    before = checkpoint.get('args') or {}
    before = dict(vars(before) if isinstance(before, argparse.Namespace) else before)
    now = options_without(OF_A_LAUNCH, args)
    if {'batch_size', 'update_freq'} <= before.keys():  # some checkpoints hold no options
        before['effective batch'] = before['batch_size'] * before['update_freq'] * before.get('world_size', 1)
        now['effective batch'] = effective_batch(args)
    for name, value in now.items():
        if name in before and before[name] != value:
            raise utils.UserError(f'{path} is of a run with {name} {before[name]}, not {value}: the same --output_dir is the '
                                  'same run. Pass another one (and --resume, to go on from there all the same), or --auto_resume '
                                  'false to start over')


def evaluation_loader(args: argparse.Namespace, dataset: Dataset, device: torch.device) -> utils.Loader:
    """Every image once: a process's share is every world_size-th, with none repeated to fill up."""
    if args.dist_eval:
        dataset = Subset(dataset, range(utils.get_rank(), len(dataset), utils.get_world_size()))
    return utils.Loader(dataset, evaluation_batch(args), pin_memory=args.pin_mem and device.type == 'cuda',
                        **utils.worker_options(args.num_workers))


def evaluation_batch(args: argparse.Namespace) -> int:
    """Images per process: they take less memory than in training."""
    return int(1.5 * args.batch_size)


def evaluate_only(args: argparse.Namespace, model: replknet.RepLKNet, dataset: Dataset, device: torch.device) -> None:
    """Print the accuracy on `dataset`, with --with_small_kernel_merged after merging the kernels."""
    if args.dry_run:
        dataset = Subset(dataset, range(min(len(dataset), 2 * args.batch_size)))
        utils.log(f'Dry run: the first {len(dataset)} images only')
    loader = evaluation_loader(args, dataset, device)
    if args.with_small_kernel_merged:
        merge_and_compare(model, loader, device)
    if args.compile:
        model.compile()
    utils.log(f'Evaluating on {len(dataset)} images')
    evaluate(loader, model, device, args.use_amp, getattr(torch, args.amp_dtype))


@torch.no_grad()
def merge_and_compare(model: replknet.RepLKNet, loader: utils.Loader, device: torch.device) -> None:
    """Merge the kernels; print what that changes on the first batch of the first process."""
    if not any('.lkb_origin.' in name for name in model.state_dict()):
        utils.log('The kernels of these weights were merged already')
        return
    model.eval()
    if utils.get_rank() != 0:  # it may have no image
        model.structural_reparam()
        return
    images = next(iter(loader))[0].to(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else a GPU's rounding is what would be compared
        before = model(images)
        model.structural_reparam()
        after = model(images)
    agree = (before.argmax(1) == after.argmax(1)).sum().item()
    utils.log(f'Kernels merged; on the first {len(images)} images: largest difference of the logits '
              f'{(after - before).abs().max().item():.2e} (largest logit {before.abs().max().item():.2f}), predictions agree on '
              f'{agree}')


def train(args: argparse.Namespace, model: replknet.RepLKNet, checkpoint: dict | None, dataset_train: Dataset,
          dataset_val: Dataset | None, device: torch.device, stop: utils.StopRequests) -> None:
    """Train from `checkpoint`, or from the weights that `model` has; evaluate, log and save after every epoch.

    Raises utils.Stopped after a signal, when all is saved.
    """
    steps = steps_per_epoch(args, len(dataset_train))
    loader_train = training_loader(args, dataset_train, device)
    loader_val = None if dataset_val is None else evaluation_loader(args, dataset_val, device)
    mixup, criterion = build_mixup_and_criterion(args)
    model_ema = None
    if args.model_ema:  # a copy, so after the weights were loaded
        model_ema = ModelEmaV3(model, args.model_ema_decay, device='cpu' if args.model_ema_force_cpu else None)
    optimizer = build_optimizer(args, model)
    amp_dtype = getattr(torch, args.amp_dtype)
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.use_amp and amp_dtype == torch.float16)
    lr_schedule = utils.cosine_scheduler(args.lr, args.min_lr, args.epochs, steps, args.warmup_epochs,
                                         warmup_steps=args.warmup_steps)
    wd_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    wd_schedule = utils.cosine_scheduler(args.weight_decay, wd_end, args.epochs, steps)

    first_epoch, first_step, best, unfinished = args.start_epoch, 0, {'': 0.0, '_ema': 0.0}, None
    metrics = utils.MetricLogger(device)
    if checkpoint is not None:
        best, unfinished = restore(args, checkpoint, optimizer, loss_scaler, model_ema)
        first_epoch, first_step = utils.progress(checkpoint)
        if first_step >= steps:  # with --resume; a run of its own has been checked
            raise utils.UserError(f'the checkpoint is at step {first_step} of an epoch, which has {steps} here: go on with the '
                                  'same data and effective batch')
        restore_metrics(metrics, checkpoint.get('metrics') or [])
        checkpoint.clear()  # gigabytes, which the caller would keep alive
        where = f', step {first_step} of {steps}' if first_step else ''
        utils.log(f'Going on with epoch {first_epoch} of {args.epochs}{where}')
    if args.compile:
        model.compile()
    parallel = model
    if args.distributed:
        # find_unused_parameters keeps the buckets of gradients as they are: else they are arranged anew after a first step, and
        # the step after a resume would add up the processes' gradients in another order
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None,
                                                       find_unused_parameters=True)
    state = {'model': model, 'optimizer': optimizer, 'scaler': loss_scaler}
    if model_ema is not None:
        state['model_ema'] = model_ema.module

    def train_epoch(epoch: int, steps_to_take: int, log_writer: utils.TensorboardLogger | None, first_step: int = 0,
                    metrics: utils.MetricLogger | None = None, after_step: Callable | None = None) -> dict[str, float]:
        loader_train.sampler.set_epoch(epoch)
        loader_train.sampler.seen = first_step * args.update_freq * args.batch_size
        stats = train_one_epoch(parallel, criterion, loader_train, optimizer, device, epoch, loss_scaler, args.clip_grad,
                                model_ema, mixup, log_writer, epoch * steps, lr_schedule, wd_schedule, steps_to_take,
                                args.update_freq, args.use_amp, amp_dtype, args.seed, metrics, first_step, after_step)
        return {f'train_{name}': value for name, value in stats.items()}

    if args.dry_run:
        train_epoch(min(first_epoch, args.epochs - 1), min(steps, 2), None)
        utils.log(f'Dry run: {min(steps, 2)} steps of effective batch {effective_batch(args)}, '
                  f'{count_parameters(model) / 1e6:.2f} M parameters, peak memory {utils.peak_memory_mb(device):.0f} MiB per '
                  'process; nothing was written')
        return

    utils.together(lambda: open_output_dir(args, first_epoch if unfinished is None else first_epoch - 1,
                                           (first_epoch * steps + first_step) * args.update_freq))
    log_writer = utils.together(lambda: open_tensorboard(args))

    def save_within_epoch(epoch: int, step: int, metrics: utils.MetricLogger) -> None:
        """After each step but the last: save if it is time to, or if a signal asked for it; then leave."""
        if step == steps:
            return
        number = stop.agreed()
        if number or (args.save_ckpt_steps and step % args.save_ckpt_steps == 0):
            save(args, state, best, epoch - 1, ['latest.pth'], log_writer, step=step, metrics=utils.gather(metrics.totals()))
        if number:
            leave(args, stop, number, f'epoch {epoch}, step {step} of {steps}')

    def leave_evaluation(epoch: int, batch: int) -> None:
        """After each batch that all processes have: leave if a signal asked for it. What was trained is saved."""
        number = stop.agreed() if batch <= common_batches(args, dataset_val) else 0
        if number:
            leave(args, stop, number, f'the evaluation of epoch {epoch}')

    start = time.time()
    if unfinished is not None:  # it was stopped between its training and the end of its evaluation
        finish_epoch(args, state, best, first_epoch - 1, unfinished, loader_val, device, log_writer, leave_evaluation)
    for epoch in range(first_epoch, args.epochs):
        if log_writer is not None:
            log_writer.set_step((epoch * steps + first_step) * args.update_freq)
        train_stats = train_epoch(epoch, steps, log_writer, first_step, metrics, functools.partial(save_within_epoch, epoch))
        first_step, metrics = 0, utils.MetricLogger(device)
        if loader_val is not None:  # an evaluation that fails must not cost the epoch
            save(args, state, best, epoch, ['latest.pth'], log_writer, train_stats=train_stats)
        finish_epoch(args, state, best, epoch, train_stats, loader_val, device, log_writer, leave_evaluation)
    utils.log(f'Training took {datetime.timedelta(seconds=int(time.time() - start))}')


def leave(args: argparse.Namespace, stop: utils.StopRequests, number: int, where: str) -> None:
    """Raise utils.Stopped, unless SLURM asks and is to decide: a job that ends by itself is not requeued."""
    what = f'saved in {args.output_dir}' if args.output_dir and args.save_ckpt else 'nothing is saved: there is no --output_dir'
    name = signal.Signals(number).name
    if utils.in_slurm_job_of_submitit() and number not in (signal.SIGINT, utils.SIGHUP):
        utils.log(f'{name} in {where}: {what}; going on until SLURM ends the job')
        stop.forget()
        return
    utils.log(f'{name} in {where}: {what}; leaving. The same command goes on from there')
    raise utils.Stopped(number)


def common_batches(args: argparse.Namespace, dataset: Dataset) -> int:
    """Batches of an evaluation that every process has."""
    share = len(dataset) // utils.get_world_size() if args.dist_eval else len(dataset)
    return math.ceil(share / evaluation_batch(args))


def effective_batch(args: argparse.Namespace) -> int:
    """Images behind one optimizer step."""
    return args.batch_size * utils.get_world_size() * args.update_freq


def steps_per_epoch(args: argparse.Namespace, images: int) -> int:
    """Print and return the optimizer steps that the training images make; utils.UserError where they make none."""
    batch = effective_batch(args)
    utils.log(f'Effective batch {batch} = {args.batch_size} images * {utils.get_world_size()} processes * {args.update_freq} '
              f'micro-batches, learning rate {args.lr:g}; {images} training images, {images // batch} steps per epoch')
    if images < batch:
        raise utils.UserError(f'the {images} training images do not fill one effective batch of {batch}: lower --batch_size or '
                              '--update_freq')
    return images // batch


def training_loader(args: argparse.Namespace, dataset: Dataset, device: torch.device) -> utils.Loader:
    """Batches of this process; the sampler says which images."""
    return utils.Loader(dataset, args.batch_size, sampler=ResumableSampler(dataset, args.seed), drop_last=True,
                        pin_memory=args.pin_mem and device.type == 'cuda', **utils.worker_options(args.num_workers))


def finish_epoch(args: argparse.Namespace, state: dict, best: dict[str, float], epoch: int, train_stats: dict[str, float],
                 loader_val: utils.Loader | None, device: torch.device, log_writer: utils.TensorboardLogger | None,
                 leave_evaluation: Callable[[int, int], None]) -> None:
    """Evaluate, update `best`, log and save. After a stop anywhere in here it is done again, and stands once in the log."""
    test_stats = {}
    if loader_val is not None:
        test_stats = evaluate_with_ema(args, state['model'], state.get('model_ema'), loader_val, device,
                                       functools.partial(leave_evaluation, epoch))
    names = ['latest.pth']
    for suffix, name in (('', 'checkpoint-best.pth'), ('_ema', 'checkpoint-best-ema.pth')):
        if test_stats.get(f'test_acc1{suffix}', 0.0) > best[suffix]:
            best[suffix] = test_stats[f'test_acc1{suffix}']
            names.insert(0, name)
    if (epoch + 1) % args.save_ckpt_freq == 0 or epoch + 1 == args.epochs:
        names.insert(0, f'checkpoint-{epoch}.pth')
    if test_stats:
        utils.log(f'Best Acc@1 {best[""]:.3f}' + (f', EMA {best["_ema"]:.3f}' if 'test_acc1_ema' in test_stats else ''))
    if log_writer is not None:
        log_writer.update(head='perf', step=epoch, **test_stats)
    if args.output_dir and utils.get_rank() == 0:
        line = {**train_stats, **test_stats, 'epoch': epoch, 'n_parameters': count_parameters(state['model'])}
        try:
            utils.append_to_log(Path(args.output_dir, 'log.txt'), line)
        except OSError as error:
            utils.log(f'WARNING: log.txt lacks epoch {epoch}: {error}')
    save(args, state, best, epoch, names, log_writer)


def evaluate_with_ema(args: argparse.Namespace, model: nn.Module, ema: nn.Module | None, loader: utils.Loader,
                      device: torch.device, after_batch: Callable[[int], None]) -> dict[str, float]:
    """Evaluate the model and, with --model_ema_eval, its EMA (names end in _ema), with the same buffers on all processes."""
    models = {'': model}
    if ema is not None and args.model_ema_eval:
        models['_ema'] = copy.deepcopy(ema).to(device) if args.model_ema_force_cpu else ema
    stats = {}
    for suffix, evaluated in models.items():
        utils.broadcast_buffers(evaluated)
        found = evaluate(loader, evaluated, device, args.use_amp, getattr(torch, args.amp_dtype), after_batch)
        stats.update({f'test_{name}{suffix}': value for name, value in found.items()})
    return stats


def save(args: argparse.Namespace, state: dict, best: dict[str, float], epoch: int, names: list[str],
         log_writer: utils.TensorboardLogger | None, **more: object) -> None:
    """Write a training checkpoint under each of `names`, `epoch` being the last that was trained to its end.

    more: `train_stats` of that epoch where its evaluation is still to come; within the next epoch the `step` that it goes on
    with, and `metrics`, what each process measured of it. A save that fails is told, and training goes on; the last is an error.
    Raises utils.UserError on all processes, which must all call it, where a value to be saved is not finite.
    """
    if not args.output_dir or not args.save_ckpt:
        return
    content = {name: part.state_dict() for name, part in state.items()}
    broken = next(filter(None, utils.gather(utils.non_finite(content))), None)
    if broken:
        where = f'step {more["step"]} of epoch {epoch + 1}' if 'step' in more else f'epoch {epoch}'
        raise utils.UserError(f'after {where} there are values that are not finite, the first in {broken}: nothing of this is '
                              f'saved, and the checkpoints are as they were. {DIVERGED}')
    if utils.get_rank() != 0:
        return
    if log_writer is not None:  # what the checkpoint goes on from must not be lost
        log_writer.flush()
    content.update(epoch=epoch, args=vars(args), max_accuracy=best[''], max_accuracy_ema=best['_ema'], **more)
    try:
        utils.save_checkpoint([Path(args.output_dir, name) for name in names], content)
        utils.prune_checkpoints(Path(args.output_dir), args.save_ckpt_num)
    except OSError as error:
        if epoch + 1 == args.epochs and not more:
            raise utils.UserError(f'{error}. The older checkpoints are as they were: make room, and the same command goes on '
                                  'from them') from error
        utils.log(f'WARNING: {error}. The older checkpoints are as they were, and training goes on')


def build_mixup_and_criterion(args: argparse.Namespace) -> tuple[Mixup | None, nn.Module]:
    """Mixup and cutmix (None where switched off), and the loss that fits: soft targets, label smoothing, or plain."""
    if uses_mixup(args):
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                      label_smoothing=args.smoothing, num_classes=args.nb_classes)
        return mixup, timm.loss.SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return None, timm.loss.LabelSmoothingCrossEntropy(args.smoothing)
    return None, nn.CrossEntropyLoss()


def build_optimizer(args: argparse.Namespace, model: replknet.RepLKNet) -> torch.optim.Optimizer:
    """The optimizer, with layer-wise learning-rate decay over the model's own depths if asked."""
    get_layer_id = get_scale = None
    if args.layer_decay != 1:
        assigner = layer_decay_assigner(args.layer_decay, replknet.MODELS[args.model].layers)
        get_layer_id, get_scale = assigner.get_layer_id, assigner.get_scale
    try:
        optimizer = create_optimizer(args, model, get_layer_id, get_scale)
    except ValueError as error:
        raise utils.UserError(str(error)) from error
    if getattr(optimizer, 'is_second_order', False):
        check_second_order(args)
    return optimizer


def check_second_order(args: argparse.Namespace) -> None:
    """Raise utils.UserError where an optimizer that differentiates gradients, adahessian, would fail or compute another thing."""
    need = f'--opt {args.opt} differentiates the gradients: '
    if os.environ.get('LARGE_KERNEL_CONV_IMPL') != 'pytorch':
        raise utils.UserError(need + 'set LARGE_KERNEL_CONV_IMPL=pytorch, for convolutions that can be differentiated twice')
    if args.distributed:
        raise utils.UserError(need + f'it trains in one process, not in {args.world_size}')
    if args.compile:
        raise utils.UserError(need + 'torch.compile allows that once only; leave out --compile')
    if args.use_checkpoint:
        raise utils.UserError(need + 'activation checkpointing allows that once only; leave out --use_checkpoint')
    if args.use_amp and args.amp_dtype == 'float16':
        raise utils.UserError(need + 'the loss scale of float16 would stay in; pass --amp_dtype bfloat16')


def restore(args: argparse.Namespace, checkpoint: dict, optimizer: torch.optim.Optimizer, loss_scaler: torch.amp.GradScaler,
            model_ema: ModelEmaV3 | None) -> tuple[dict[str, float], dict | None]:
    """Put a training checkpoint's state back; utils.UserError where it does not fit.

    Returns the best accuracies so far, and the training statistics of the last epoch if the checkpoint was written between
    its training and its evaluation.
    """
    advice = '--opt, --layer_decay and --weight_decay must be those of the run it comes from'
    try:
        before = checkpoint.get('args') or {}
        opt = (vars(before) if isinstance(before, argparse.Namespace) else before).get('opt', args.opt)
        if timm_name(opt) != timm_name(args.opt):
            raise ValueError(f'it is of --opt {opt}, not {args.opt}')
        load_optimizer_state(optimizer, copy.deepcopy(checkpoint['optimizer']))  # else its tensors stay pages of the file
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise utils.UserError(f'the optimizer state of the checkpoint does not fit ({error}): {advice}') from error
    if loss_scaler.is_enabled() and checkpoint.get('scaler'):  # {} where it was saved without float16
        loss_scaler.load_state_dict(checkpoint['scaler'])
    if model_ema is not None and checkpoint.get('model_ema'):  # a run without one begins it at the model's weights
        try:
            state = replknet.state_dict_of(checkpoint, 'the checkpoint', 'model_ema')
            replknet.load_state(model_ema.module, state, "the checkpoint's model_ema")
        except ValueError as error:
            raise utils.UserError(f'{error}: pass --model_ema false, or another checkpoint') from error
    best = {suffix: float(checkpoint.get(f'max_accuracy{suffix}', 0.0)) for suffix in ('', '_ema')}
    return best, checkpoint.get('train_stats')


def restore_metrics(metrics: utils.MetricLogger, totals: list[dict]) -> None:
    """Go on from what each process had measured; with another number of processes the first takes it all."""
    if len(totals) == utils.get_world_size():
        metrics.add_totals(totals[utils.get_rank()])
    elif utils.get_rank() == 0:
        for part in totals:
            metrics.add_totals(part)


def events_suffix(args: argparse.Namespace) -> str:
    """What marks the TensorBoard files of this run among those of others in --log_dir."""
    return f'.{hashlib.sha256(os.fsencode(Path(args.output_dir).resolve())).hexdigest()[:8]}'


def open_tensorboard(args: argparse.Namespace) -> utils.TensorboardLogger | None:
    """TensorBoard's curves in --log_dir, on the first process."""
    if not args.log_dir or utils.get_rank() != 0:
        return None
    try:
        return utils.TensorboardLogger(args.log_dir, events_suffix(args))
    except OSError as error:
        raise utils.UserError(f'--log_dir {args.log_dir} cannot be written to: {error}') from error


def open_output_dir(args: argparse.Namespace, first_epoch: int, first_micro_step: int) -> None:
    """Make --output_dir, and drop from its log, and from TensorBoard's, what will be written again."""
    if not args.output_dir or utils.get_rank() != 0:
        return
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        utils.cut_log(Path(args.output_dir, 'log.txt'), first_epoch)
        if args.log_dir:
            utils.cut_events(Path(args.log_dir), events_suffix(args), first_micro_step, first_epoch)
    except OSError as error:
        raise utils.UserError(f'--output_dir {args.output_dir} cannot be written to: {error}') from error


if __name__ == '__main__':
    parser = argparse.ArgumentParser('main.py', description='Train and evaluate RepLKNet', parents=[get_args_parser()])
    with utils.script():
        main(parser.parse_args())
