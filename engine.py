"""One epoch of training, one pass of evaluation."""
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import distributed
import utils

READ_EVERY = 10  # steps, whose values stay on the device meanwhile


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
                    after_step: Callable[[int, Callable[[], utils.MetricLogger]], None] | None = None
                    ) -> dict[str, float]:
    """Train for num_training_steps_per_epoch optimizer steps, or all that data_loader has.

    data_loader is a sized iterable of (images (N, 3, H, W), class indices (N,)), update_freq of which make a
    step. The schedules hold one value per step of the whole run, in which this epoch begins at start_steps; a
    group takes lr times its `lr_scale`, and the weight decay if it has any. max_norm None or 0: no clipping.
    loss_scaler is needed for float16 alone. model_ema takes part in every step that was not skipped.
    With `seed`, mixup and drop path draw from generators seeded anew each micro-step, from (seed, micro-step
    of the run, rank).
    An epoch of which first_step steps were taken goes on with the rest, which is all that data_loader has,
    and with their `metrics`. What a step computes stays on the device until a read, as there is one after
    every step of which is_read() says so, and the last: metrics and log_writer, in a call for each
    micro-batch, know no more. after_step(steps taken, read) follows each step; read() returns the metrics.
    Returns the means over all samples of all processes of loss, lr, min_lr, weight_decay, grad_norm (before
    clipping; absent if it was never finite) and, without mixup, class_acc (0 to 1).
    Raises utils.UserError, on all processes, at the read after a loss or the gradient was not finite. That
    step and those after it change neither weights, optimizer and model_ema nor buffers (BatchNorm's
    statistics). A float16 overflow skips its step alone, and changes as little.
    """
    model.train()
    device, update_freq, start_steps = torch.device(device), update_freq or 1, start_steps or 0
    steps = num_training_steps_per_epoch or len(data_loader) // update_freq
    loss_scaler = loss_scaler or torch.amp.GradScaler(device.type, enabled=False)
    metrics = metrics or utils.MetricLogger(device)
    autocast = torch.autocast(device.type, amp_dtype, enabled=use_amp)
    step = Step(model, criterion, optimizer, loss_scaler, max_norm, model_ema, update_freq, autocast, metrics,
                log_writer)
    first = first_step * update_freq
    micro_batches = itertools.islice(data_loader, steps * update_freq - first)
    logged = metrics.log_every(micro_batches, steps * update_freq, f'Epoch [{epoch}]', first, READ_EVERY,
                               update_freq)
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
        step.accumulate(images, targets, ends_step)
        if ends_step:
            step.take(f'epoch {epoch}, step {taken}')
            if is_read(taken + 1) or taken + 1 == steps:
                step.read()
            if after_step is not None:
                after_step(taken + 1, step.read)
    return step.read().means()


def is_read(steps: int) -> bool:
    """Whether the device's values are read after so many steps of an epoch; they are after its last, too."""
    return steps % READ_EVERY == 1


class Step:
    """Optimizer steps, one after another: gradients of update_freq micro-batches, then the step.

    Values go to `metrics` and log_writer in read(), and are read from the device there, but for one flag a
    step where optimizer or average cannot do without (`waits`).
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                 loss_scaler: torch.amp.GradScaler, max_norm: float | None, model_ema: nn.Module | None,
                 update_freq: int, autocast: torch.autocast, metrics: utils.MetricLogger,
                 log_writer: utils.TensorboardLogger | None):
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.loss_scaler, self.autocast = loss_scaler, autocast
        self.max_norm, self.model_ema, self.update_freq = max_norm, model_ema, update_freq
        self.metrics, self.log_writer = metrics, log_writer
        self.waits = not (takes_found_inf(optimizer) and (model_ema is None or moves_by_weight(model_ema)))
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.buffers = Buffers(model)
        self.one = torch.ones((), device=metrics.device)
        # NaN once a loss of this process, or the gradient of all, was not finite. Losses are multiplied by
        # it, so that all processes get a gradient of NaN and take no step, without a word between them
        self.sound = self.one
        self.rows = []  # of each micro-batch since the last read: its values, images, the number of its step
        self.ends = []  # of each step since: what an error would tell
        self.gradients = []  # of each step since: parameters, and the largest entry of each one's gradient
        optimizer.zero_grad()

    def accumulate(self, images: Tensor, targets: Tensor, ends_step: bool) -> None:
        """Add the gradient of a micro-batch; keep its loss, class_acc (of class indices) and the rates."""
        # DistributedDataParallel all-reduces once a step, not once a micro-batch
        alone = hasattr(self.model, 'no_sync') and not ends_step
        with self.model.no_sync() if alone else contextlib.nullcontext():
            with self.autocast:
                output = self.model(images)
                loss = self.criterion(output, targets)
            row = {'step': len(self.ends), 'images': len(images), 'loss': loss.detach(),
                   **optimizer_values(self.optimizer)}
            self.sound = self.sound * (loss.detach() * 0 + 1)
            twice = getattr(self.optimizer, 'is_second_order', False)
            self.loss_scaler.scale(loss * self.sound / self.update_freq).backward(create_graph=twice)
        if targets.dim() == 1:
            row['class_acc'] = (output.argmax(1) == targets).float().mean()
        self.rows.append(row)

    @torch.no_grad()
    def take(self, where: str) -> None:
        """Step, unless the gradient's norm is not finite; `where` is for errors."""
        parameters = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in parameters]
        scale = self.loss_scaler.scale(self.one)
        self.loss_scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        finite = norm.isfinite()
        taken = bool(finite) if self.waits else finite
        largest = None if taken is True else torch.stack(torch._foreach_norm(gradients, math.inf))
        self.gradients.append((parameters, largest))
        if self.max_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        step_if(taken, self.optimizer)
        self.loss_scaler.update()
        self.buffers.keep_if(taken)
        if self.model_ema is not None:
            move_average_if(taken, self.model_ema, self.model)
        self.optimizer.zero_grad()
        # a float16 overflow, unless the loss scale is not to blame
        good = finite | (self.loss_scaler.scale(self.one) >= 1) if self.loss_scaler.is_enabled() else finite
        self.sound = torch.where(good, self.sound, math.nan)
        self.rows[-1]['grad_norm'] = norm
        self.ends.append({'where': where, 'norm': norm, 'scale': scale, 'good': good})
        if taken is False:
            self.read()

    def read(self) -> utils.MetricLogger:
        """Give the values since the last read to log_writer and to the metrics, which are returned.

        Raises utils.UserError, on all processes, where training diverged; that step gives no values.
        """
        found = to_host(self.rows + self.ends)
        rows, ends, gradients = found[:len(self.rows)], found[len(self.rows):], self.gradients
        self.rows, self.ends, self.gradients = [], [], []
        diverged, what = self.divergence(rows, ends, gradients)
        for row in rows:
            step, images = row.pop('step'), row.pop('images')
            if 'grad_norm' in row and step == diverged:
                end = ends[step]
                raise utils.UserError(f'{what} at {end["where"]} (learning rate {row["lr"]:.3g}, loss scale '
                                      f'{end["scale"]:g}). This step was not taken, and the checkpoints are '
                                      f'as they were. {utils.DIVERGED}')
            if not math.isfinite(row.get('grad_norm', 0)):
                del row['grad_norm']
            self.metrics.update(images, **row)
            write_curves(self.log_writer, row)
        return self.metrics

    def divergence(self, rows: list[dict], ends: list[dict],
                   gradients: list[tuple]) -> tuple[int | None, str]:
        """The first step that was not finite, but for overflows of float16, and what of it; None if all were.

        The gradients, and so the ends, are those of all processes, which hence come to gather() together.
        """
        if all(math.isfinite(end['norm']) for end in ends):
            return None, ''
        own = next(((row['step'], row['loss']) for row in rows if not math.isfinite(row['loss'])), None)
        losses = [(bad[0], rank, bad[1]) for rank, bad in enumerate(distributed.gather(own)) if bad]
        step = next((step for step, end in enumerate(ends) if not end['good']), None)
        if losses and (step is None or min(losses)[0] <= step):
            step, rank, loss = min(losses)
            return step, f'the loss is {loss}' + (f' on process {rank}' if utils.get_world_size() > 1 else '')
        return step, '' if step is None else self.bad_gradients(*gradients[step])

    def bad_gradients(self, parameters: list[Tensor], largest: Tensor) -> str:
        """What was not finite; largest: the largest entry of each parameter's gradient."""
        finite = dict(zip(map(id, parameters), largest.isfinite().tolist(), strict=True))
        bad = [name.removeprefix('module.') for name, p in self.model.named_parameters()
               if not finite.get(id(p), True)]
        if not bad:
            return "the gradient's norm is not finite: its values are too large for it"
        more = f' and {len(bad) - 3} more of {len(parameters)} parameters' if len(bad) > 3 else ''
        return 'the gradient is not finite: NaN or infinity in ' + ', '.join(bad[:3]) + more


class Buffers:
    """The buffers of a model, BatchNorm's statistics above all, which go with its steps."""

    def __init__(self, model: nn.Module):
        by_type = {}
        for buffer in model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self.kept = []  # of each data type: buffers, their values after the last step taken, views of these
        for buffers in by_type.values():
            values = torch.cat([buffer.flatten() for buffer in buffers])
            parts = values.split([buffer.numel() for buffer in buffers])
            views = [part.view(buffer.shape) for part, buffer in zip(parts, buffers, strict=True)]
            self.kept.append((buffers, values, views))

    def keep_if(self, taken: Tensor | bool) -> None:
        """Keep their values if `taken`, which may be on the device (0-D), else put back those kept last."""
        for buffers, values, views in self.kept:
            if isinstance(taken, Tensor):
                values.copy_(torch.where(taken, torch.cat([buffer.flatten() for buffer in buffers]), values))
            elif taken:
                torch._foreach_copy_(views, buffers)
            if taken is not True:
                torch._foreach_copy_(buffers, views)


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step looks at `found_inf` on the device, as torch's fused ones do for GradScaler.

    Dampening is left out: with it step_if() could not begin SGD's momentum at 0.
    """
    return (getattr(optimizer, '_step_supports_amp_scaling', False)
            and all(group.get('fused') and not group.get('dampening') for group in optimizer.param_groups))


def step_if(taken: Tensor | bool, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step() if `taken`, else nothing; on the device (0-D) for one that takes_found_inf()."""
    if not isinstance(taken, Tensor):
        if taken:
            optimizer.step()
        return
    if isinstance(optimizer, torch.optim.SGD):  # a first step without effect would leave its buffers unset
        for p in [p for group in optimizer.param_groups if group['momentum'] for p in group['params']]:
            if p.grad is not None and optimizer.state[p].get('momentum_buffer') is None:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    optimizer.grad_scale, optimizer.found_inf = None, (~taken).float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def moves_by_weight(model_ema: nn.Module) -> bool:
    """Whether model_ema.update() is no more than a move of each value, which may have a weight of 0."""
    return isinstance(model_ema, ModelEmaV3) and model_ema.foreach and not model_ema.exclude_buffers


@torch.no_grad()
def move_average_if(taken: Tensor | bool, model_ema: nn.Module, model: nn.Module) -> None:
    """model_ema.update(model) if `taken`, else nothing; on the device (0-D) if it moves_by_weight()."""
    if not isinstance(taken, Tensor):
        if taken:
            model_ema.update(model)
        return
    pairs = list(zip(model_ema.module.state_dict().values(), model.state_dict().values(), strict=True))
    average, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    moves = torch._foreach_sub(values, average)
    torch._foreach_mul_(moves, (1 - model_ema.get_decay()) * taken)
    torch._foreach_add_(average, moves)
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counters:  # as they were before a step that was not taken
        torch._foreach_copy_(*map(list, zip(*counters, strict=True)))


def to_host(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows with numbers in place of their tensors (0-D), which are all copied at once."""
    tensors = [value for row in rows for value in row.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [{name: next(numbers) if isinstance(value, Tensor) else value for name, value in row.items()}
            for row in rows]


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


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm statistics, which they gathered apart."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@torch.no_grad()
def evaluate(data_loader: Iterable, model: nn.Module, device: torch.device | str, use_amp: bool = False,
             amp_dtype: torch.dtype = torch.float16,
             after_batch: Callable[[int], None] | None = None, classes: list[int] | None = None,
             name: str = '') -> dict[str, float]:
    """Return loss (cross-entropy), acc1 and acc5 (percent) over all samples of all processes, each once.

    data_loader is a sized iterable of (images (N, 3, H, W), class indices (N,)), each process with its own
    share; or of (images, probabilities (N, classes)), where every class above 0 is right.
    after_batch(number of the batch, from 1) is called after each. classes: logits that alone count, in whose
    order indices are. Ends by printing `* Acc@1 83.480 Acc@5 96.570 loss 0.812`, and ` on name`.
    """
    model.eval()
    device = torch.device(device)
    metrics = utils.MetricLogger(device, 'loss', 'acc1', 'acc5')
    for i, (images, targets) in enumerate(metrics.log_every(data_loader, len(data_loader), 'Test'), 1):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=use_amp):
            output = model(images)
        output = output.float() if classes is None else output.float()[:, classes]
        best = output.topk(min(5, output.shape[1])).indices
        hits = best == targets.unsqueeze(1) if targets.dim() == 1 else targets.gather(1, best) > 0
        metrics.update(len(images), loss=F.cross_entropy(output, targets).item(),
                       acc1=100 * hits[:, 0].sum().item() / len(images),
                       acc5=100 * hits.any(1).sum().item() / len(images))
        if after_batch is not None:
            after_batch(i)
    stats = metrics.means()
    utils.log(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}'
              + (f' on {name}' if name else ''))
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
