"""Weights from any file: checkpoints of all published forms, safetensors, mmpretrain's, from disk or a URL.

Knows no model: load_state() asks the model to take the form of the file (merged, folded, int8) by its
take_form().
"""
import argparse
import collections
import contextlib
import copy
import hashlib
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from replknet_zoo.quantized import take_form

# What published training checkpoints hold beside tensors: a Namespace or a yacs node of options (read as a
# dict, without yacs), paths, NumPy scalars (as NumPy 1 and 2 name them). All are inert; anything else is
# refused.
CHECKPOINT_TYPES = [
    argparse.Namespace, (collections.OrderedDict, 'yacs.config.CfgNode'),
    pathlib.PosixPath, pathlib.PurePosixPath,
    (pathlib.PosixPath, 'pathlib._local.PosixPath'), np._core.multiarray.scalar,
    (np._core.multiarray.scalar, 'numpy.core.multiarray.scalar'), np.dtype,
    *{type(np.dtype(kind)) for kind in 'bhilqBHILQefdU?'},
]

# mmpretrain's spelling of a family's keys, known by the first of ours: (theirs, ours). A pair that begins
# with a dot stands anywhere in a key, of the others the first that fits at its beginning counts.
MMPRETRAIN = {
    'stem.0.conv.weight': (('backbone.stages.3.norm.', 'norm.'), ('head.fc.', 'head.'), ('backbone.', '')),
    'conv_embedding.conv.weight': (
        ('backbone.patch_embed.projection.', 'conv_embedding.conv.'),
        ('backbone.patch_embed.norm.', 'conv_embedding.bn.'),
        ('backbone.downsample_layers.', 'embeds.'), ('backbone.final_norm.', 'head_norm.'),
        ('.gp.conv1.conv.', '.gp.fc1.'), ('.gp.conv2.conv.', '.gp.fc2.'),
        ('.norm1.', '.prebn1.'), ('.norm2.', '.prebn2.'), ('head.fc.', 'head.'), ('backbone.', '')),
}


def is_url(path_or_url: str | os.PathLike) -> bool:
    return str(path_or_url).startswith(('http://', 'https://'))


def read_checkpoint(path_or_url: str | os.PathLike, mmap: bool = False) -> object:
    """Return what a checkpoint file holds, its tensors on the CPU, without ever running code from it.

    A safetensors file, known by its first bytes, is returned as {'model': its tensors, 'metadata': its texts,
    read as JSON}. URLs (http, https) are downloaded once, into torch.hub's folder. mmap: tensors are the
    file's pages, which processes share, as long as it is there; an older format is read all the same.
    Raises FileNotFoundError for a missing file and ValueError for one that is truncated, no checkpoint,
    larger than the memory, or holds objects that could run code.
    """
    url = str(path_or_url) if is_url(path_or_url) else None
    path = download(url) if url else pathlib.Path(path_or_url)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    try:
        if _first_bytes(path)[8:9] == b'{':  # eight bytes of length, then JSON
            return _read_safetensors(path)
        # of what is allowed already nothing may be listed: the context takes all it lists away again
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in CHECKPOINT_TYPES if kind not in allowed]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and _can_be_mapped(path))
    except Exception as error:  # torch raises half a dozen types here
        if isinstance(error, MemoryError) or 'allocate memory' in str(error):  # torch's own is a RuntimeError
            raise ValueError(f'there is not enough memory to read {path} '
                             f'({path.stat().st_size / 2 ** 20:.0f} MiB)') from error
        # torch's own text is not passed on: it advises to load without weights_only, which would run code
        forbidden = re.search(r'GLOBAL (\S+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            message = (f'{path} is refused: beside tensors, numbers and strings it holds {forbidden[1]}, '
                       'which could run code')
        elif isinstance(error, OSError):
            message = f'{path} cannot be read: {error}'
        elif _first_bytes(path).lstrip().startswith(b'<'):
            message = f'{path} cannot be read as a checkpoint: it is a web page, so download the file by hand'
        else:
            message = (f'{path} cannot be read as a checkpoint: it is truncated, or of another format '
                       f'({type(error).__name__})')
        if url:
            path.unlink(missing_ok=True)  # else the next call would find it again
        raise ValueError(message) from error


def _can_be_mapped(path: pathlib.Path) -> bool:
    """Whether torch can map the file: one of its newer format, with a name in UTF-8."""
    with contextlib.suppress(UnicodeEncodeError):
        str(path).encode()
        return zipfile.is_zipfile(path)
    return False


def _first_bytes(path: pathlib.Path) -> bytes:
    with path.open('rb') as file:
        return file.read(64)


def _read_safetensors(path: pathlib.Path) -> dict:
    with safetensors.safe_open(path, framework='pt') as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    for key, text in metadata.items():
        with contextlib.suppress(ValueError):  # texts that are no JSON stay as they are
            metadata[key] = json.loads(text)
    return {'model': tensors, 'metadata': metadata}


def download(url: str) -> pathlib.Path:
    """The file that holds the content of `url`, downloaded if this is the first time."""
    folder = pathlib.Path(torch.hub.get_dir(), 'checkpoints')
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]  # two URLs may end in the same file name
    file = folder / f'{digest}-{pathlib.PurePosixPath(url.split("?")[0]).name}'
    if not file.exists():
        try:
            torch.hub.download_url_to_file(url, str(file))
        except OSError as error:
            raise ValueError(f'{url} cannot be downloaded ({error}): '
                             'download it by hand and pass the file') from error
    return file


def load_weights(path_or_url: str | os.PathLike, model_key: str = 'model|module',
                 prefix: str = '') -> dict[str, Tensor]:
    """Return the plain state dict in a checkpoint, with this repository's keys and tensors on the CPU.

    Reads bare state dicts; dicts that hold one under a key of `model_key` (tried in order) or under
    `state_dict`; safetensors files; keys that DistributedDataParallel or torch.compile wrapped (`module.`,
    `_orig_mod.`); mmpretrain's files. `prefix` keeps the keys that begin with it, without it.
    Raises what read_checkpoint raises, and ValueError where no state dict is found.
    """
    return state_dict_of(read_checkpoint(path_or_url), path_or_url, model_key, prefix)


def state_dict_of(checkpoint: object, source: str | os.PathLike, model_key: str = 'model|module',
                  prefix: str = '') -> dict[str, Tensor]:
    """load_weights for a checkpoint that was read already; `source` names it in errors."""
    state = checkpoint
    if not _is_state_dict(state):
        keys = [key for key in (*model_key.split('|'), 'state_dict')
                if isinstance(checkpoint, dict) and key in checkpoint]
        state = checkpoint[keys[0]] if keys else None
    if not _is_state_dict(state):
        held = type(checkpoint).__name__
        if isinstance(checkpoint, dict):
            held = _first([*checkpoint]) or 'nothing'
        raise ValueError(f'{source} has no state dict under {model_key} or state_dict: it holds {held}')
    while wrapper := _wrapper_of(state):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not state:
        raise ValueError(f'{source} has no key that begins with {prefix!r}')
    for first, spelling in MMPRETRAIN.items():
        if 'head.fc.weight' in state and _respelled(first, _reversed(spelling)) in state:
            state = {_respelled(key, spelling): value for key, value in state.items()}
    return state


def _first(names: list, most: int = 6) -> str:
    return ', '.join(map(str, names[:most])) + (' ...' if len(names) > most else '')


def _wrapper_of(state: dict[str, Tensor]) -> str:
    """What DistributedDataParallel or torch.compile put before every key, the outer first, or ''."""
    return next((wrapper for wrapper in ('module.', '_orig_mod.')
                 if all(key.startswith(wrapper) for key in state)), '')


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def in_mmpretrains_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state dict as mmpretrain spells it, which load_weights reads again."""
    spelling = next(_reversed(spelling) for first, spelling in MMPRETRAIN.items() if first in state)
    return {_respelled(key, spelling): value for key, value in state.items()}


def _reversed(spelling: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(ours, theirs) for theirs, ours in spelling]


def _respelled(key: str, spelling: Sequence[tuple[str, str]]) -> str:
    """The key with what MMPRETRAIN's pairs say, read as (before, after)."""
    for before, after in spelling:
        if before.startswith('.'):
            key = key.replace(before, after)
    return next((after + key.removeprefix(before) for before, after in spelling
                 if not before.startswith('.') and key.startswith(before)), key)


def load_state(model: nn.Module, state: dict[str, Tensor], source: str | os.PathLike,
               new_head: bool = False) -> bool:
    """Load a plain state dict into the model: every key and shape must fit, the head's unless `new_head`.

    A backbone takes a classifier's weights too: their head and final norm are left out, and the norms of its
    maps, which they lack, stay as they are. A warning says so.
    Merged kernels in `state` merge the model's first, folded BatchNorms fold the model's, int8 layers take
    the place of the model's. A RepMLPNet that is merged takes weights as trained too, and merges them.
    `source` names the weights in errors.
    Returns whether the model's own head was kept because the file's does not fit. Raises ValueError, which
    lists what does not fit, and the model stays as it was.
    """
    merges, takes_form = getattr(model, 'is_merged', False), hasattr(model, 'take_form')
    own = _in_form_of(state, model).state_dict() if takes_form else model.state_dict()
    kept = set()
    if new_head:
        kept = {key for key in own if key.startswith(_head_of(model))}
        if all(key in state and state[key].shape == own[key].shape for key in kept):
            kept = set()
        state = {key: value for key, value in state.items() if key not in kept}
    left_out, fresh = _classifier_and_backbone(model, state, own)
    counters = {key for key in own if key.endswith('.num_batches_tracked')}  # some files lack them
    problems = {
        'missing': [key for key in own if key not in state and key not in (*kept, *fresh, *counters)],
        'unexpected': [key for key in state if key not in own and key not in left_out],
        'of another shape': [f'{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}' for key in own
                             if key in state and state[key].shape != own[key].shape],
    }
    if any(problems.values()):
        told = '; '.join(f'{len(keys)} {kind}: {_first(keys)}' for kind, keys in problems.items() if keys)
        raise ValueError(f'{source} does not fit the model. {told}')
    if takes_form:  # models of other kinds stay as they are
        take_form(model, state)
    model.load_state_dict({key: value for key, value in state.items() if key not in left_out}, strict=False)
    if merges:  # before, for weights that are not
        model.structural_reparam()
    for told, keys in (('a backbone has no classifier, left out:', left_out),
                       ('a classifier has no norms of maps, new:', fresh)):
        if keys:
            modules = dict.fromkeys(key.rpartition('.')[0] for key in keys)
            warnings.warn(f'{source}: {told} {", ".join(modules)}', stacklevel=2)
    return bool(kept)


def _head_of(model: nn.Module) -> str:
    """What the keys of the model's head begin with; it may be known by another name too."""
    head = getattr(model, 'head', None)
    return next((f'{name}.' for name, module in model.named_modules() if module is head), 'head.')


def _in_form_of(state: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """A copy of the model without values, which has taken the form of the state dict."""
    without_values = {id(p): nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad)
                      for p in model.parameters()}
    without_values |= {id(b): torch.empty_like(b, device='meta') for b in model.buffers()}
    shape = copy.deepcopy(model, without_values)
    with torch.device('meta'):
        take_form(shape, state)
    return shape


def _classifier_and_backbone(model: nn.Module, state: dict[str, Tensor],
                             own: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """What of a classifier's `state` has no place in a backbone, and what of the backbone's `own` is new."""
    if not hasattr(model, 'take_form'):  # a model of another kind
        return [], []
    head = [] if hasattr(model, 'head') else [key for key in state if key.startswith(('head.', 'norm.'))]
    norms = [key for key in own if re.match(r'stages\.\d+\.norm\.', key)]
    return head, [] if any(key in state for key in norms) else norms
