"""Training checkpoints, and the log that goes with them: write, prune, choose, resume from."""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import struct
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from distributed import check_agreement, gather, together
from options import OF_A_LAUNCH, effective_batch, options_without
from replknet_zoo import weights
from utils import DIVERGED, TensorboardLogger, UserError, get_rank, get_world_size, log, replace_file


def plain(value: object) -> object:
    """`value` in tensors, numbers, strings, dicts and lists, which torch.load(weights_only=True) takes.

    Tuples become lists, and anything else its name: 'torch.bfloat16'.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    return str(value)


def save(args: Namespace, checkpoint: dict, links: Sequence[str] = ()) -> None:
    """Write a training checkpoint to latest.pth in --output_dir, and under the names `links`; prune old ones.

    `epoch` is the last that was trained to its end, `train_stats` stands in one whose evaluation is still to
    come, and `step` in one within the next epoch. A save that fails is told, and training goes on; that of
    the last epoch is an error.
    Raises UserError on all processes, which must all call it, where a value to be saved is not finite.
    """
    broken = next(filter(None, gather(non_finite(checkpoint))), None)
    epoch, ends = checkpoint['epoch'], not {'step', 'train_stats'} & checkpoint.keys()
    if broken:
        where = f'epoch {epoch}'
        if 'step' in checkpoint:
            where = f'step {checkpoint["step"]} of epoch {epoch + 1}'
        raise UserError(f'after {where} there are values that are not finite, the first in {broken}: nothing '
                        f'of this is saved, and the checkpoints are as they were. {DIVERGED}')
    if get_rank() != 0:
        return
    output_dir = Path(args.output_dir)
    try:
        save_checkpoint(output_dir / 'latest.pth', checkpoint, [output_dir / name for name in links])
        prune_checkpoints(output_dir, args.save_ckpt_num)
    except OSError as error:
        if epoch + 1 == args.epochs and ends:
            raise UserError(f'{error}. The older checkpoints are as they were: make room, '
                            'and the same command goes on from them') from error
        log(f'WARNING: {error}. The older checkpoints are as they were, and training goes on')


def save_checkpoint(path: Path, checkpoint: dict, links: Sequence[Path] = ()) -> None:
    """Write a checkpoint of plain values to `path`, atomically, and make `links` names of the same file.

    The links come first: a run that goes on from `path` counts on them. Raises OSError where something fails;
    each path then holds what it did before, or this.
    """
    def write(temporary: Path) -> None:
        torch.save(plain(checkpoint), temporary)
        for link in links:
            replace_file(link, lambda other: _link(temporary, other))
    try:
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f'{path} could not be written ({reason}; {free:.0f} MiB are free there)') from error


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, target)


def numbered_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of every checkpoint-{epoch}.pth, the newest first."""
    found = [(re.fullmatch(r'checkpoint-(\d+)\.pth', path.name), path)
             for path in output_dir.glob('checkpoint-*.pth')]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all numbered checkpoints but the newest `keep`, which is taken as at least 1."""
    for _, path in numbered_checkpoints(output_dir)[max(keep, 1):]:
        path.unlink()


def choose_checkpoint(args: Namespace) -> tuple[str | Path | None, object]:
    """(source, content) of --output_dir's newest checkpoint, or --resume if that went further, or --finetune.

    With --eval a named file comes first.
    """
    named = args.resume or args.finetune
    own = None
    if args.output_dir and args.auto_resume and not (args.eval and named):
        own = newest_checkpoint(Path(args.output_dir))
        if own is not None and not args.eval:
            check_same_run(args, *own)
    if own is not None and not args.resume:
        if named:
            log(f'{own[0]} holds the progress of this run, so {named} is not used')
        return own
    if not named:
        return None, None
    try:
        content = read_checkpoint(named)
    except UserError as error:
        if own is None:
            raise
        log(f'Passed over: {error}')  # a requeued job needs the file no more
        return own
    check_same_content(content)
    if own is not None and progress(own[1]) >= (progress(content) or (0, 0)):
        log(f'{own[0]} holds the progress of this run, so {named} is not used')
        return own
    return named, content


def check_same_run(args: Namespace, path: Path, checkpoint: dict) -> None:
    """Raise UserError where a checkpoint in --output_dir is of a run with other options that shape it."""
    before = options_of(checkpoint)
    now = options_without(OF_A_LAUNCH, args)
    if {'batch_size', 'update_freq'} <= before.keys():  # some checkpoints hold no options
        before['effective batch'] = before['batch_size'] * before['update_freq'] * before.get('world_size', 1)
        now['effective batch'] = effective_batch(args)
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(f'{path} is of a run with {name} {before[name]}, not {value}: the same '
                            '--output_dir is the same run. Pass another one (and --resume, to go on from '
                            'there all the same), or --auto_resume false to start over')


def options_of(checkpoint: dict) -> dict[str, object]:
    """main.py's options of the run that a training checkpoint is of; some hold none."""
    options = checkpoint.get('args') or {}
    return dict(vars(options) if isinstance(options, Namespace) else options)


def newest_checkpoint(output_dir: Path) -> tuple[Path, dict] | None:
    """(path, content) of output_dir's furthest training checkpoint that every process can read, or None.

    Says which were passed over, and why. Every process must call it.
    Raises UserError where there are some and none can be used, since starting anew would overwrite them, and
    where the processes find different ones.
    """
    # a network disk may show some processes a new file later than others
    epochs = set().union(*gather([epoch for epoch, _ in numbered_checkpoints(output_dir)]))
    numbered = [(epoch, output_dir / f'checkpoint-{epoch}.pth') for epoch in sorted(epochs, reverse=True)]
    latest = _read_training_checkpoint(output_dir / 'latest.pth')
    for epoch, path in numbered:
        if latest is not None and progress(latest[1]) >= (epoch + 1, 0):
            break
        found = _read_training_checkpoint(path)
        if found is not None:
            return found
    best = [output_dir / 'checkpoint-best.pth', output_dir / 'checkpoint-best-ema.pth']
    found = latest or _read_training_checkpoint(best[0]) or _read_training_checkpoint(best[1])
    tried = [path for path in [output_dir / 'latest.pth', *(path for _, path in numbered), *best]
             if _exists(path)]
    if found is None and tried:
        raise UserError(f'none of the {len(tried)} checkpoints in {output_dir} can be resumed from (the '
                        'lines above say why), and starting anew would overwrite them: pass another '
                        '--output_dir, or --auto_resume false')
    return found


def _exists(path: Path) -> bool:
    """For one of the processes at least."""
    return any(gather(path.exists()))


def _read_training_checkpoint(path: Path) -> tuple[Path, dict] | None:
    if not _exists(path):
        return None
    try:
        checkpoint = read_checkpoint(path)
    except UserError as error:
        log(f'Passed over: {error}')
        return None
    if progress(checkpoint) is None:
        log(f'Passed over: {path} is no training checkpoint '
            '(with model, optimizer and the number of its epoch)')
        return None
    check_same_content(checkpoint)
    return path, checkpoint


def read_checkpoint(path_or_url: str | Path) -> object:
    """replknet_zoo.read_checkpoint on every process at once, a URL downloaded by one process of each node.

    Its tensors are pages of the file: copy those that outlive it. Every process must call it, and then
    check_same_content() if it uses what was read.
    Raises UserError on all processes where one cannot read it, or finds values that are not finite.
    """
    def read() -> object:
        checkpoint = weights.read_checkpoint(path_or_url, mmap=True)
        broken = non_finite(checkpoint)
        if broken:
            raise UserError(f'{path_or_url} holds values that are not finite, the first in {broken}: '
                            'its run had diverged')
        return checkpoint
    if weights.is_url(path_or_url):
        nodes = gather(socket.gethostname())
        first = nodes.index(nodes[get_rank()]) == get_rank()
        together(lambda: weights.download(path_or_url) if first else None)
    return together(read)


def check_same_content(checkpoint: object) -> None:
    """Raise UserError on all processes where one has read another checkpoint. Every process must call it."""
    if get_world_size() > 1:
        check_agreement(**{'the checkpoint': content_of(checkpoint)})


def content_of(checkpoint: object) -> str:
    """What tells checkpoints apart, for messages: how far the training went, and a digest of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors_in(checkpoint):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    done = progress(checkpoint)
    return (f'epoch {done[0]}, step {done[1]}, ' if done else '') + f'digest {digest.hexdigest()[:8]}'


def tensors_in(content: object, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each tensor in dicts and lists, in order; a name is keys and indices with slashes."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors_in(value, f'{name}/{key}' if name else str(key))


def non_finite(content: object) -> str:
    """The name, as of tensors_in, of the first tensor that holds NaN or infinity; '' if none does."""
    for name, tensor in tensors_in(content):
        if tensor.is_floating_point() and tensor.numel():
            least, most = torch.aminmax(tensor.detach())  # NaN if there is one
            if not (math.isfinite(least) and math.isfinite(most)):
                return name
    return ''


def progress(checkpoint: object) -> tuple[int, int] | None:
    """(epochs, and steps of the next one) behind a training checkpoint; None for anything else."""
    if not isinstance(checkpoint, dict) or not {'model', 'optimizer', 'epoch'} <= checkpoint.keys():
        return None
    if not isinstance(checkpoint['epoch'], int):  # the published trainer's best checkpoints have 'best'
        return None
    return checkpoint['epoch'] + 1, checkpoint.get('step', 0)


def open_output(args: Namespace, epoch: int, micro_step: int) -> TensorboardLogger | None:
    """On the first process: make --output_dir, and open --log_dir's curves; None without --log_dir.

    What the log has of `epoch` or later, and the curves of micro_step or later, is dropped: it will be
    written again. Raises UserError where a folder cannot be written to.
    """
    if get_rank() != 0:
        return None
    digest = hashlib.sha256(os.fsencode(Path(args.output_dir).resolve())).hexdigest()
    suffix = f'.{digest[:8]}'  # marks this run's curves
    try:
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            cut_log(Path(args.output_dir, 'log.txt'), epoch)
            if args.log_dir:
                cut_events(Path(args.log_dir), suffix, micro_step, epoch)
    except OSError as error:
        raise UserError(f'--output_dir {args.output_dir} cannot be written to: {error}') from error
    try:
        return TensorboardLogger(args.log_dir, suffix) if args.log_dir else None
    except OSError as error:
        raise UserError(f'--log_dir {args.log_dir} cannot be written to: {error}') from error


def cut_log(file: Path, epoch: int) -> None:
    """Drop the lines of `epoch` and later, which a resumed run writes again, and any that a kill cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding='utf-8').splitlines():
        try:
            if json.loads(line)['epoch'] < epoch:
                kept.append(line + '\n')
        except (ValueError, KeyError, TypeError):  # cut off, or no line of ours
            continue
    replace_file(file, lambda temporary: temporary.write_text(''.join(kept), encoding='utf-8'))


def cut_events(log_dir: Path, suffix: str, micro_step: int, epoch: int) -> None:
    """Drop from a TensorboardLogger's files what a resumed run writes again.

    That is everything from micro_step on, evaluations from `epoch` on.
    """
    from tensorboardX.proto.event_pb2 import Event

    def is_kept(event: Event) -> bool:
        value = event.summary.value
        return not value or event.step < (epoch if value[0].tag.startswith('perf/') else micro_step)
    for file in log_dir.glob(f'events.out.tfevents.*{suffix}'):
        records, content, start = [], file.read_bytes(), 0
        # each record: the length of its data, 4 bytes of checksum, the data, 4 more
        while start + 12 <= len(content):
            end = start + 16 + struct.unpack_from('<Q', content, start)[0]
            if end > len(content):  # cut off by a kill
                break
            if is_kept(Event.FromString(content[start + 12:end - 4])):
                records.append(content[start:end])
            start = end
        replace_file(file, lambda temporary, records=records: temporary.write_bytes(b''.join(records)))


def append_to_log(output_dir: str, epoch_stats: dict) -> None:
    """Append a line of valid JSON to log.txt, numbers that are not finite as null. A failure is told."""
    file = Path(output_dir, 'log.txt')
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in epoch_stats.items()}
    size = file.stat().st_size if file.exists() else 0
    try:
        with file.open('a', encoding='utf-8') as lines:
            lines.write(json.dumps(finite, allow_nan=False) + '\n')
    except OSError as error:  # of a full disk, which may have taken a part of the line
        log(f'WARNING: log.txt lacks epoch {epoch_stats["epoch"]}: {error}')
        with contextlib.suppress(OSError):
            os.truncate(file, size)
