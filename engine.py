"""One epoch of training, one pass of evaluation."""
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import utils


def train_one_epoch(model: nn.Module, criterion: nn.Module, data_loader: Iterable,
                    optimizer: torch.optim.Optimizer, device: torch.device | str, epoch: int,
                    loss_scaler: torch.amp.GradScaler | None = None, max_norm: float | None = 0,
                    model_ema: nn.Module | None = None, mixup_fn: Callable | None = None,
                    log_writer: utils.TensorboardLogger | None = None,
                    start_steps: int | None = None, lr_schedule_values: Sequence[float] | None = None,
                    wd_schedule_values: Sequence[float] | None = None,
                    num_training_steps_per_epoch: int | None = None, update_freq: int | None = None,
                    use_amp: bool = False, amp_dtype: torch.dtype = torch.float16, seed: int | None = None,
                    metrics: utils.MetricLogger | None = None, first_step: int = 0,
                    after_step: Callable[[int, utils.MetricLogger], None] | None = None) -> dict[str, float]:
    """Train for num_training_steps_per_epoch optimizer steps, or all that data_loader has.

    data_loader is a sized iterable of (images (N, 3, H, W), class indices (N,)), update_freq of which make a
    step. The schedules hold one value per step of the whole run, in which this epoch begins at start_steps; a
    group takes lr times its `lr_scale`, and the weight decay if it has any. max_norm None or 0: no clipping.
    loss_scaler is needed for float16 alone. model_ema.update(model) follows every step that was not skipped.
    With `seed`, mixup and drop path draw from generators seeded anew each micro-step, from (seed, micro-step
    of the run, rank).
    An epoch of which first_step steps were taken goes on with the rest, which is all that data_loader has,
    and with their `metrics`. after_step(steps taken, metrics) is called after each step.
    Returns the means over all samples of all processes of loss, lr, min_lr, weight_decay, grad_norm (before
    clipping; absent if it was never finite) and, without mixup, class_acc (0 to 1).
    Raises utils.UserError, on all processes, where a loss or the gradient is not finite, before weights or
    model_ema change; a float16 overflow skips the step instead. BatchNorm's statistics have moved, and stay.
    """
    model.train()
    device, update_freq, start_steps = torch.device(device), update_freq or 1, start_steps or 0
    steps = num_training_steps_per_epoch or len(data_loader) // update_freq
    loss_scaler = loss_scaler or torch.amp.GradScaler(device.type, enabled=False)
    metrics = metrics or utils.MetricLogger(device)
    autocast = torch.autocast(device.type, amp_dtype, enabled=use_amp)
    step = Step(model, criterion, optimizer, loss_scaler, max_norm, model_ema, update_freq, autocast)
    first = first_step * update_freq
    micro_batches = itertools.islice(data_loader, steps * update_freq - first)
    logged = metrics.log_every(micro_batches, steps * update_freq, f'Epoch [{epoch}]', first)
    for i, (images, targets) in enumerate(logged, first):
        taken, within = divmod(i, update_freq)
        ends_step = within == update_freq - 1
        if within == 0:
            set_schedules(optimizer, start_steps + taken, lr_schedule_values, wd_schedule_values)
        if seed is not None:
            utils.seed_generators('step', seed, start_steps * update_freq + i, utils.get_rank())
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        values = step.accumulate(images, targets, ends_step)
        if ends_step:
            values |= step.take(f'epoch {epoch}, step {taken}')
        metrics.update(len(images), **values)
        write_curves(log_writer, values)
        if ends_step and after_step is not None:
            after_step(taken + 1, metrics)
    return metrics.means()


class Step:
    """Optimizer steps, one after another: gradients of update_freq micro-batches, then the step."""

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                 loss_scaler: torch.amp.GradScaler, max_norm: float | None, model_ema: nn.Module | None,
                 update_freq: int, autocast: torch.autocast):
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.loss_scaler, self.autocast = loss_scaler, autocast
        self.max_norm, self.model_ema, self.update_freq = max_norm, model_ema, update_freq
        self.diverged = None  # a loss of this process that is not finite
        optimizer.zero_grad()

    def accumulate(self, images: Tensor, targets: Tensor, ends_step: bool) -> dict[str, float]:
        """Add the gradient of a micro-batch; return its loss, class_acc (of class indices) and the rates."""
        # DistributedDataParallel all-reduces once a step, not once a micro-batch
        alone = hasattr(self.model, 'no_sync') and not ends_step
        with self.model.no_sync() if alone else contextlib.nullcontext():
            with self.autocast:
                output = self.model(images)
                loss = self.criterion(output, targets)
            values = {'loss': loss.item(), **optimizer_values(self.optimizer)}
            if not math.isfinite(values['loss']):
                self.diverged = values['loss']
                loss = loss * math.nan  # all processes get this gradient, and stop together
            twice = getattr(self.optimizer, 'is_second_order', False)
            self.loss_scaler.scale(loss / self.update_freq).backward(create_graph=twice)
        if targets.dim() == 1:
            values['class_acc'] = (output.argmax(1) == targets).float().mean().item()
        return values

    def take(self, where: str) -> dict[str, float]:
        """Step, unless the gradient is not finite; return its norm as grad_norm, {} if a step was skipped."""
        scale = self.loss_scaler.get_scale()
        norm, taken = optimizer_step(self.optimizer, self.loss_scaler, self.max_norm)
        if not taken:
            rate = optimizer_values(self.optimizer)['lr']
            check_overflow(self.model, self.loss_scaler, self.diverged,
                           f'{where} (learning rate {rate:.3g}, loss scale {scale:g})')
        elif self.model_ema is not None:
            self.model_ema.update(self.model)
        self.optimizer.zero_grad()
        return {'grad_norm': norm} if taken else {}


def write_curves(log_writer: utils.TensorboardLogger | None, values: dict[str, float]) -> None:
    """One point of TensorBoard's curves for a micro-batch; log_writer may be None."""
    if log_writer is None:
        return
    log_writer.update(loss=values['loss'], head='loss')
    log_writer.update(class_acc=values.get('class_acc'), head='loss')
    log_writer.update(head='opt', **{name: value for name, value in values.items()
                                     if name not in ('loss', 'class_acc')})
    log_writer.set_step()


def set_schedules(optimizer: torch.optim.Optimizer, step: int, lr_values: Sequence[float] | None,
                  wd_values: Sequence[float] | None) -> None:
    """Give every parameter group the learning rate and weight decay of an optimizer step."""
    for group in optimizer.param_groups:  # plain floats: they end in checkpoints
        if lr_values is not None:
            group['lr'] = float(lr_values[step]) * group.get('lr_scale', 1.0)
        if wd_values is not None and group['weight_decay'] > 0:
            group['weight_decay'] = float(wd_values[step])


def optimizer_values(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The largest and smallest learning rate and the largest weight decay of the groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return {'lr': max(rates), 'min_lr': min(rates),
            'weight_decay': max(group['weight_decay'] for group in optimizer.param_groups)}


def optimizer_step(optimizer: torch.optim.Optimizer, loss_scaler: torch.amp.GradScaler,
                   max_norm: float | None) -> tuple[float, bool]:
    """Clip and step, unless the gradients' norm is not finite.

    Returns their norm before clipping, and whether it stepped.
    """
    parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
    loss_scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    taken = math.isfinite(norm)
    if taken:
        if max_norm:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        loss_scaler.step(optimizer)
    loss_scaler.update()
    return norm.item(), taken


def check_overflow(model: nn.Module, loss_scaler: torch.amp.GradScaler, loss: float | None,
                   where: str) -> None:
    """Raise utils.UserError after gradients that are not finite, unless float16 overflowed (a skipped step).

    loss: this process's if it is not finite. Every process must call it, and all then raise.
    """
    losses = {rank: value for rank, value in enumerate(distributed.gather(loss)) if value is not None}
    if losses:
        rank, value = next(iter(losses.items()))
        what = f'the loss is {value}' + (f' on process {rank}' if utils.get_world_size() > 1 else '')
    elif loss_scaler.is_enabled() and loss_scaler.get_scale() >= 1:
        return
    else:
        gradients = {name.removeprefix('module.'): p.grad for name, p in model.named_parameters()
                     if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        more = f' and {len(bad) - 3} more of {len(gradients)} parameters' if len(bad) > 3 else ''
        what = ('the gradient is not finite: NaN or infinity in ' + ', '.join(bad[:3]) + more if bad
                else "the gradient's norm is not finite: its values are too large for it")
    raise utils.UserError(f'{what} at {where}. This step was not taken, '
                          f'and the checkpoints are as they were. {utils.DIVERGED}')


@torch.no_grad()
def evaluate(data_loader: Iterable, model: nn.Module, device: torch.device | str, use_amp: bool = False,
             amp_dtype: torch.dtype = torch.float16,
             after_batch: Callable[[int], None] | None = None) -> dict[str, float]:
    """Return loss (cross-entropy), acc1 and acc5 (percent) over all samples of all processes, each once.

    data_loader is a sized iterable of (images (N, 3, H, W), class indices (N,)), each process with its own
    share. after_batch(number of the batch, from 1) is called after each.
    Ends by printing `* Acc@1 83.480 Acc@5 96.570 loss 0.812`.
    """
    model.eval()
    device = torch.device(device)
    metrics = utils.MetricLogger(device, 'loss', 'acc1', 'acc5')
    for i, (images, targets) in enumerate(metrics.log_every(data_loader, len(data_loader), 'Test'), 1):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=use_amp):
            output = model(images)
        output = output.float()
        hits = output.topk(min(5, output.shape[1])).indices == targets.unsqueeze(1)
        metrics.update(len(images), loss=F.cross_entropy(output, targets).item(),
                       acc1=100 * hits[:, 0].sum().item() / len(images),
                       acc5=100 * hits.sum().item() / len(images))
        if after_batch is not None:
            after_batch(i)
    stats = metrics.means()
    utils.log(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    return stats


@torch.no_grad()
def merge_and_compare(model: nn.Module, data_loader: Iterable, device: torch.device) -> None:
    """Merge the kernels; print what that changes on the first batch of the first process."""
    images, was_merged = None, model.is_merged
    model.eval()
    if utils.get_rank() == 0:  # another may have no image
        images = next(iter(data_loader))[0].to(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else its rounding would be compared
        before = None if images is None else model(images)
        model.structural_reparam()
        after = None if images is None else model(images)
    if was_merged:
        utils.log('The kernels of these weights were merged already')
    elif images is not None:
        agree = (before.argmax(1) == after.argmax(1)).sum().item()
        utils.log(f'Kernels merged; on the first {len(images)} images: largest difference of the logits '
                  f'{(after - before).abs().max().item():.2e} (largest logit '
                  f'{before.abs().max().item():.2f}), predictions agree on {agree}')
