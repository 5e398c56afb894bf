"""Models of one's own: `FILE.py:FUNCTION`, a function in a file that returns one."""
import importlib.util
import sys
from pathlib import Path

from torch import nn

# what main.py and the tools ask of a model, beside forward
PROTOCOL = ('forward_features', 'head', 'depths', 'structural_reparam', 'deep_fuse_BN', 'take_form',
            'is_merged', 'is_folded')
# modules of ours whose names a user's file may mean modules of its own by
COMMON_NAMES = ('utils', 'datasets', 'options', 'distributed')


def is_own(name: str) -> bool:
    """Whether a model's name is FILE.py:FUNCTION."""
    return '.py:' in name


def own_model(name: str, drop_path_rate: float = 0.0, num_classes: int | None = 1000,
              use_checkpoint: bool = False, use_sync_bn: bool = False) -> nn.Module:
    """FUNCTION(num_classes=...), a model that answers to PROTOCOL, by create_model's arguments.

    Raises ValueError for those that FUNCTION does not get, for a model that lacks some of PROTOCOL, and what
    build_own raises.
    """
    if drop_path_rate or use_checkpoint:
        raise ValueError('drop path and activation checkpointing are for the named models: '
                         'let your function build yours so')
    model = build_own(name, num_classes=num_classes)
    missing = [word for word in PROTOCOL if not hasattr(model, word)]
    if missing:
        raise ValueError(f'the model of {name} lacks {", ".join(missing)}: study/mobilenet.py is an example')
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if use_sync_bn else model


def build_own(name: str, **options) -> nn.Module:
    """What FUNCTION of FILE.py returns; the file's folder is searched for what it imports.

    Raises ValueError where there is no such file or function, or it returns something else than a module.
    """
    file, function = name.rsplit(':', 1)
    if not Path(file).is_file():
        raise ValueError(f'{name}: there is no file {file}')
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    ours = {name: sys.modules.pop(name) for name in COMMON_NAMES if name in sys.modules}
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f'{name}: {file} has no function {function}')
        model = getattr(module, function)(**options)
    finally:
        for module_name in ours:
            sys.modules.setdefault(module_name, ours[module_name])
    if not isinstance(model, nn.Module):
        raise ValueError(f'{name}: {function}() must return an nn.Module, not {type(model).__name__}')
    return model
