"""Train and evaluate on image classification.

One process:     python main.py --model RepLKNet-31T --data_set DIGITS --input_size 32 ...
One node:        python -m torch.distributed.launch --nproc_per_node=8 main.py --model RepLKNet-31B
                 --data_path IMAGENET ...  (torchrun works the same)
Two nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500
                 main.py ...

docs/training.md has the published commands and the lines to expect.
"""
import argparse
import atexit
import copy
import datetime
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import distributed  # isort: split  before torch is loaded
import options
from options import get_args_parser

if __name__ == '__main__':  # --help and a wrong option are answered before the slow imports below
    ARGS = options.RecipeParser('main.py', description='Train and evaluate on image classification',
                                parents=[get_args_parser()]).parse_args()

import numpy as np
import timm.loss
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset, Subset

import checkpoints
import datasets
import optim_factory
import replknet_zoo
import utils
from engine import broadcast_buffers, evaluate, is_read, merge_and_compare, train_one_epoch
from image_data.eval_sets import EvalSet
from large_kernel_conv.memory import give_back_freed_memory, keep_freed_memory
from replknet_zoo.quantized import count_parameters
from replknet_zoo.weights import load_state, state_dict_of
from utils import UserError, log


def main(args: argparse.Namespace) -> None:
    """Train, or with --eval evaluate. Raises UserError (a ValueError) for what a user can mend."""
    device = start_process(args)
    dataset_train, dataset_val, others = datasets.one_of_each_node_first(lambda: build_datasets(args))
    facts = datasets.facts_of('training', dataset_train) | datasets.facts_of('validation', dataset_val)
    for other in others:
        facts |= datasets.facts_of(other.name, other.dataset)
    distributed.check_agreement(**facts)
    give_back_freed_memory()  # that a scan of the data took
    if args.num_workers:
        distributed.start_worker_server()  # it gets ready while the model is made
    model = build_model(args)
    checkpoint = load_initial_weights(args, model)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    log(f'{args.model}: {count_parameters(model) / 1e6:.2f} M parameters')

    if device.type == 'cpu' and not args.compile:  # the compiler starts processes of its own
        distributed.bind_this_thread()
    if args.eval:
        own = [] if dataset_val is None else [EvalSet('', dataset_val)]
        evaluate_only(args, model, own + others, device)
    else:
        with distributed.StopRequests(device) as stop:
            try:
                run = Run(args, model, checkpoint, dataset_train, dataset_val, device, stop)
                run.dry_run() if args.dry_run else run.train()
            except distributed.Stopped:  # all processes at once
                distributed.end_distributed()
                raise
    distributed.end_distributed()


# ---- What a run is made of ---------------------------------------------------------------------------------

def start_process(args: argparse.Namespace) -> torch.device:
    """Check the options, meet the other processes, and agree with them; return this process's device."""
    options.check_options(args)  # before the processes meet: a wrong one ends each of them at once
    distributed.init_distributed(args)
    atexit.register(distributed.ignore_stop_signals)
    distributed.share_out_threads()
    options.check_batch_norm(args, options.shares_batch_norm(args))
    options.warn_of_preprocessing(args)
    torch.backends.cudnn.benchmark = True
    if args.device == 'cpu':
        keep_freed_memory()
    log(str(args))
    options.check_processes(args)
    return torch.device(args.device)


def build_datasets(args: argparse.Namespace) -> tuple[Dataset | None, Dataset | None, list[EvalSet]]:
    """The training and the validation set, None for one that the run does not need, and --eval_set's.

    Sets args.nb_classes.
    """
    dataset_train = dataset_val = None
    if not args.eval:
        dataset_train, args.nb_classes = datasets.build_dataset(True, args)
    given = args.eval_data_path or args.data_path != options.PUBLISHED_DATA_PATH
    if not args.disable_eval and (given or not args.eval_set):
        dataset_val, args.nb_classes = datasets.build_dataset(False, args)
    return dataset_train, dataset_val, datasets.build_eval_sets(args)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model with random weights, the same for a seed; the head's are scaled by --head_init_scale."""
    utils.seed_generators('model', args.seed)
    try:
        model = replknet_zoo.create_model(args.model, args.drop_path, num_classes=args.nb_classes,
                                          use_checkpoint=args.use_checkpoint,
                                          use_sync_bn=options.shares_batch_norm(args))
    except ValueError as error:  # of options that the model does not have
        raise UserError(f'--model {args.model}: {error}') from error
    options.check_image_sizes(args, model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(args.head_init_scale)
    return model


def load_initial_weights(args: argparse.Namespace, model: nn.Module) -> dict | None:
    """Load the weights to start from; return the training checkpoint that holds them, to go on from it."""
    source, checkpoint = checkpoints.choose_checkpoint(args)
    if source is None:
        if args.eval:
            raise UserError('--eval has no weights to evaluate: pass --resume FILE')
        return None
    own = source not in (args.resume, args.finetune)  # --model_key speaks of a named file, or of --eval
    model_key, prefix = ('model', '') if own and not args.eval else (args.model_key, args.model_prefix)
    new_head = source == args.finetune and not args.resume and not args.eval
    as_built = model.state_dict().keys()
    try:
        head_kept = load_state(model, state_dict_of(checkpoint, source, model_key, prefix), source, new_head)
    except ValueError as error:
        hint = '' if new_head or args.eval else '. To replace the head, use --finetune'
        raise UserError(f'{error} (--model {args.model}, --nb_classes {args.nb_classes}){hint}') from error
    if not args.eval and model.is_folded:
        in_int8 = ', its layers in int8' if replknet_zoo.is_quantized(model.state_dict()) else ''
        raise UserError(f'{source} cannot be trained: its BatchNorms are folded{in_int8}, which is for '
                        'inference. Start from the weights that it was made from')
    log(f'Weights from {source}' + (f', with a new head for {args.nb_classes} classes' if head_kept else ''))
    if not args.eval and model.state_dict().keys() != as_built:
        log('WARNING: the kernels of these weights are merged, so training goes on without the small ones')
    return checkpoint if checkpoints.progress(checkpoint) is not None and not new_head else None


def build_mixup_and_criterion(args: argparse.Namespace) -> tuple[Mixup | None, nn.Module]:
    """Mixup and cutmix (None where switched off), and the loss that fits their targets or label smoothing."""
    if options.uses_mixup(args):
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, label_smoothing=args.smoothing, num_classes=args.nb_classes)
        return mixup, timm.loss.SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return None, timm.loss.LabelSmoothingCrossEntropy(args.smoothing)
    return None, nn.CrossEntropyLoss()


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with layer-wise learning-rate decay over the model's own depths if asked."""
    get_layer_id = get_scale = None
    try:
        if args.layer_decay != 1:
            assigner = optim_factory.layer_decay_assigner(args.layer_decay, model.depths)
            get_layer_id, get_scale = assigner.get_layer_id, assigner.get_scale
        optimizer = optim_factory.create_optimizer(args, model, get_layer_id, get_scale)
        if getattr(optimizer, 'is_second_order', False):
            optim_factory.check_second_order(args)
        return optimizer
    except ValueError as error:
        raise UserError(str(error)) from error


def steps_per_epoch(args: argparse.Namespace, images: int) -> int:
    """Print and return the optimizer steps that the training images make; UserError where they make none."""
    batch = options.effective_batch(args)
    log(f'Effective batch {batch} = {args.batch_size} images * {utils.get_world_size()} processes * '
        f'{args.update_freq} micro-batches, learning rate {options.learning_rates(args).peak:g}; '
        f'{images} training images, '
        f'{images // batch} steps per epoch')
    if images < batch:
        raise UserError(f'the {images} training images do not fill one effective batch of {batch}: lower '
                        '--batch_size or --update_freq')
    return images // batch


def build_lr_schedule(args: argparse.Namespace, images: int) -> np.ndarray:
    """The learning rate of each optimizer step of the run."""
    warmup, peak, end = options.learning_rates(args)
    micro_batches = images // (args.batch_size * utils.get_world_size())
    if args.lr_schedule == 'cosine':
        return utils.cosine_scheduler(peak, end, args.epochs, micro_batches // args.update_freq,
                                      args.warmup_epochs, warmup, args.warmup_steps)
    return utils.swin_schedule(peak, end, args.epochs, micro_batches, args.warmup_epochs, warmup,
                               utils.SWIN_SCHEDULES[args.lr_schedule], args.update_freq, args.decay_epochs,
                               args.decay_rate)


# ---- Evaluation --------------------------------------------------------------------------------------------

def evaluate_only(args: argparse.Namespace, model: nn.Module, sets: list[EvalSet],
                  device: torch.device) -> None:
    """Print the accuracy on each set, with --eval_set as JSON too, which --output_dir keeps as eval.json."""
    found = {}
    for i, (name, dataset, classes) in enumerate(sets):
        if args.dry_run:
            dataset = Subset(dataset, range(min(len(dataset), 2 * args.batch_size)))
            log(f'Dry run: the first {len(dataset)} images only')
        loader = datasets.evaluation_loader(args, dataset, device)
        if i == 0 and args.with_small_kernel_merged:
            merge_and_compare(model, loader, device)
        if i == 0 and args.compile:
            model.compile()
        log(f'Evaluating on {len(dataset)} images' + (f' of {name}' if name else ''))
        found[name or 'val'] = {'images': len(dataset), **evaluate(
            loader, model, device, args.use_amp, getattr(torch, args.amp_dtype), classes=classes, name=name)}
    if args.eval_set:
        log(json.dumps(found))
        if args.output_dir and utils.get_rank() == 0 and not args.dry_run:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            utils.replace_file(Path(args.output_dir, 'eval.json'),
                               lambda file: file.write_text(json.dumps(found) + '\n'))


# ---- Training ----------------------------------------------------------------------------------------------

class Run:
    """A training run: what a checkpoint holds of it, what the loop needs beside, and the loop, train().

    Begins where `checkpoint` stopped, or with the weights that `model` has. UserError if that does not fit.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, checkpoint: dict | None,
                 dataset_train: Dataset, dataset_val: Dataset | None, device: torch.device,
                 stop: distributed.StopRequests):
        self.args, self.model, self.device, self.stop = args, model, device, stop
        self.dataset_val = dataset_val
        self.steps = steps_per_epoch(args, len(dataset_train))
        self.loader_train = datasets.training_loader(args, dataset_train, device)
        self.loader_val = (None if dataset_val is None
                           else datasets.evaluation_loader(args, dataset_val, device))
        mixup, self.criterion = build_mixup_and_criterion(args)
        self.finish = datasets.finish_batches(args, mixup, device)
        self.ema = None
        if args.model_ema:  # a copy, so after the weights were loaded
            device_of_ema = 'cpu' if args.model_ema_force_cpu else None
            self.ema = ModelEmaV3(model, args.model_ema_decay, device=device_of_ema)
        self.optimizer = build_optimizer(args, model)
        self.amp_dtype = getattr(torch, args.amp_dtype)
        scales = args.use_amp and self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)
        self.lr_schedule = build_lr_schedule(args, len(dataset_train))
        wd_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        self.wd_schedule = utils.cosine_scheduler(args.weight_decay, wd_end, args.epochs, self.steps)
        self.epoch, self.step = args.start_epoch, 0  # the next to train
        self.metrics = utils.MetricLogger(device)  # of the epoch that has begun
        self.best = {'model': 0.0, 'model_ema': 0.0}  # top-1, in percent
        self.unfinished = None  # statistics of an epoch that was trained, and is still to be evaluated
        self.curves = None  # TensorBoard's
        if checkpoint is not None:
            self.load_state_dict(checkpoint)
            checkpoint.clear()  # gigabytes, which the caller would keep alive
        if args.compile:
            model.compile()
        self.parallel = model
        if args.distributed:
            # find_unused_parameters=True keeps the buckets of gradients: else a step after a resume would add
            # up the processes' gradients in another order. On GPUs runs are not the same to the bit anyway
            own = {'device_ids': [device]} if device.type == 'cuda' else {'find_unused_parameters': True}
            self.parallel = nn.parallel.DistributedDataParallel(model, **own)

    def train(self) -> None:
        """Train to the last epoch; evaluate, log and save after each. Raises Stopped after a signal."""
        start = time.time()
        self.open_output()
        if self.unfinished is not None:
            self.finish_epoch(self.epoch - 1, self.unfinished)
        for epoch in range(self.epoch, self.args.epochs):
            train_stats = self.train_epoch(epoch)
            if self.loader_val is not None:  # an evaluation that fails must not cost the epoch
                self.save(epoch, train_stats=train_stats)
            self.finish_epoch(epoch, train_stats)
        log(f'Training took {datetime.timedelta(seconds=int(time.time() - start))}')

    def dry_run(self) -> None:
        """Take two steps, print what they take, and write nothing."""
        steps, self.step = min(self.steps, 2), 0
        self.train_epoch(min(self.epoch, self.args.epochs - 1), steps)
        log(f'Dry run: {steps} steps of effective batch {options.effective_batch(self.args)}, '
            f'{count_parameters(self.model) / 1e6:.2f} M parameters, peak memory '
            f'{utils.peak_memory_mb(self.device):.0f} MiB per process; nothing was written')

    def train_epoch(self, epoch: int, steps: int | None = None) -> dict[str, float]:
        """Train the rest of an epoch, up to `steps` of it; return its statistics, as train_loss and so on."""
        args = self.args
        self.loader_train.sampler.set_epoch(epoch)
        self.loader_train.sampler.seen = self.step * args.update_freq * args.batch_size
        if self.curves is not None:
            self.curves.set_step((epoch * self.steps + self.step) * args.update_freq)
        stats = train_one_epoch(
            model=self.parallel, criterion=self.criterion, data_loader=self.loader_train,
            optimizer=self.optimizer, device=self.device, epoch=epoch, loss_scaler=self.scaler,
            max_norm=args.clip_grad, model_ema=self.ema, mixup_fn=self.finish, log_writer=self.curves,
            start_steps=epoch * self.steps, lr_schedule_values=self.lr_schedule,
            wd_schedule_values=self.wd_schedule, num_training_steps_per_epoch=steps or self.steps,
            update_freq=args.update_freq, use_amp=args.use_amp, amp_dtype=self.amp_dtype, seed=args.seed,
            metrics=self.metrics, first_step=self.step, after_step=functools.partial(self.after_step, epoch))
        self.step, self.metrics = 0, utils.MetricLogger(self.device)
        return {f'train_{name}': value for name, value in stats.items()}

    def after_step(self, epoch: int, step: int, read: Callable[[], utils.MetricLogger]) -> None:
        """After each step of an epoch but the last: save if it is time to; on a signal save and leave."""
        if step == self.steps or self.args.dry_run:
            return
        due = self.args.save_ckpt_steps and step % self.args.save_ckpt_steps == 0
        number = self.stop.agreed(cheap=due or is_read(step))
        if number or due:  # read() before save(): a step that was not finite may be among the last
            metrics = distributed.gather(read().totals())
            self.save(epoch - 1, step=step, metrics=metrics)
        if number:
            self.leave(number, f'epoch {epoch}, step {step} of {self.steps}')

    def finish_epoch(self, epoch: int, train_stats: dict[str, float]) -> None:
        """Evaluate, log and save. After a stop in here it is done again, and stands once in the log."""
        test_stats = self.evaluate(epoch) if self.loader_val is not None else {}
        links = []
        if (epoch + 1) % self.args.save_ckpt_freq == 0 or epoch + 1 == self.args.epochs:
            links.append(f'checkpoint-{epoch}.pth')
        for name, suffix, link in (('model', '', 'checkpoint-best.pth'),
                                   ('model_ema', '_ema', 'checkpoint-best-ema.pth')):
            accuracy = test_stats.get(f'test_acc1{suffix}', 0.0)
            if accuracy > self.best[name]:
                self.best[name] = accuracy
                links.append(link)
        if test_stats:
            ema = f', EMA {self.best["model_ema"]:.3f}' if 'test_acc1_ema' in test_stats else ''
            log(f'Best Acc@1 {self.best["model"]:.3f}{ema}')
        if self.curves is not None:
            self.curves.update(head='perf', step=epoch, **test_stats)
        if self.args.output_dir and utils.get_rank() == 0:
            checkpoints.append_to_log(self.args.output_dir, {
                **train_stats, **test_stats, 'epoch': epoch, 'n_parameters': count_parameters(self.model)})
        self.save(epoch, links)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluate the model and, with --model_ema_eval, its EMA: names such as test_acc1, test_acc1_ema."""
        args = self.args
        models = {'': self.model}
        if self.ema is not None and args.model_ema_eval:
            models['_ema'] = (copy.deepcopy(self.ema.module).to(self.device) if args.model_ema_force_cpu
                              else self.ema.module)
        stats = {}
        for suffix, model in models.items():
            broadcast_buffers(model)  # BatchNorm statistics that the processes gathered apart
            found = evaluate(self.loader_val, model, self.device, args.use_amp, self.amp_dtype,
                             functools.partial(self.leave_evaluation, epoch))
            stats.update({f'test_{name}{suffix}': value for name, value in found.items()})
        return stats

    def leave_evaluation(self, epoch: int, batch: int) -> None:
        """After each batch that all processes have: leave on a signal. What was trained is saved."""
        share = len(self.dataset_val) // (utils.get_world_size() if self.args.dist_eval else 1)
        common = math.ceil(share / datasets.evaluation_batch(self.args))
        if batch <= common and (number := self.stop.agreed()):
            self.leave(number, f'the evaluation of epoch {epoch}')

    def leave(self, number: int, where: str) -> None:
        """Raise Stopped, unless SLURM asks and is to decide: a job that ends by itself is not requeued."""
        what = 'nothing is saved: there is no --output_dir'
        if self.args.output_dir and self.args.save_ckpt:
            what = f'saved in {self.args.output_dir}'
        name = signal.Signals(number).name
        if distributed.in_slurm_job_of_submitit() and number not in (signal.SIGINT, distributed.SIGHUP):
            log(f'{name} in {where}: {what}; going on until SLURM ends the job')
            self.stop.forget()
            return
        log(f'{name} in {where}: {what}; leaving. The same command goes on from there')
        raise distributed.Stopped(number)

    def save(self, epoch: int, links: Sequence[str] = (), **more: object) -> None:
        """Write latest.pth, `epoch` being the last that was trained to its end; `links` name the same file.

        more: `train_stats` of that epoch where its evaluation is still to come; within the next epoch the
        `step` that it goes on with, and `metrics`, what each process measured. Every process must call it.
        """
        if self.args.output_dir and self.args.save_ckpt:
            if self.curves is not None:  # what the checkpoint goes on from must not be lost
                self.curves.flush()
            checkpoints.save(self.args, {**self.state_dict(), 'epoch': epoch, **more}, links)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint holds of the run, beside how far it is."""
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'scaler': self.scaler.state_dict(), 'args': vars(self.args),
                 'max_accuracy': self.best['model'], 'max_accuracy_ema': self.best['model_ema']}
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        return state

    def load_state_dict(self, checkpoint: dict) -> None:
        """Put back what a checkpoint holds beside the weights. UserError where it does not fit."""
        args = self.args
        saved_opt = checkpoints.options_of(checkpoint).get('opt', args.opt)
        try:  # of a copy: else its tensors stay pages of the file
            optim_factory.restore_optimizer(self.optimizer, args.opt,
                                            copy.deepcopy(checkpoint['optimizer']), saved_opt)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.scaler.is_enabled() and checkpoint.get('scaler'):  # {} where it was saved without float16
            self.scaler.load_state_dict(checkpoint['scaler'])
        if self.ema is not None and checkpoint.get('model_ema'):  # else it begins at the model's weights
            try:
                state = state_dict_of(checkpoint, 'the checkpoint', 'model_ema')
                load_state(self.ema.module, state, "the checkpoint's model_ema")
            except ValueError as error:
                raise UserError(f'{error}: pass --model_ema false, or another checkpoint') from error
        self.best = {'model': float(checkpoint.get('max_accuracy', 0.0)),
                     'model_ema': float(checkpoint.get('max_accuracy_ema', 0.0))}
        self.unfinished = checkpoint.get('train_stats')
        self.epoch, self.step = checkpoints.progress(checkpoint)
        if self.step >= self.steps:  # with --resume; a run of its own has been checked
            raise UserError(f'the checkpoint is at step {self.step} of an epoch, which has {self.steps} '
                            'here: go on with the same data and effective batch')
        self.metrics.restore(checkpoint.get('metrics') or [])
        log(f'Going on with epoch {self.epoch} of {args.epochs}'
            + (f', step {self.step} of {self.steps}' if self.step else ''))

    def open_output(self) -> None:
        """Make --output_dir, and drop from log.txt and TensorBoard's curves what will be written again."""
        epoch = self.epoch if self.unfinished is None else self.epoch - 1
        micro_step = (self.epoch * self.steps + self.step) * self.args.update_freq
        self.curves = distributed.together(lambda: checkpoints.open_output(self.args, epoch, micro_step))


if __name__ == '__main__':
    with utils.script():
        main(ARGS)
