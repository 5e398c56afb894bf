"""The depthwise convolutions of a model that was built elsewhere, computed by ours."""
import os
from typing import NamedTuple

from torch import nn

from large_kernel_conv.layers import DepthwiseConv1d, DepthwiseConv2d

OURS = {nn.Conv1d: DepthwiseConv1d, nn.Conv2d: DepthwiseConv2d}
MARK = '_accelerated'  # an attribute of the layers that restore() gives back


class Accelerated(NamedTuple):
    """What accelerate() did: a line for each convolution, which print() shows."""
    replaced: list[str]
    left: list[str]  # with the reason

    def __str__(self) -> str:
        return '\n'.join([*self.replaced, *self.left])


def accelerate(model: nn.Module, dry_run: bool = False) -> Accelerated:
    """Let each depthwise nn.Conv1d and nn.Conv2d of stride 1 in `model` be computed by this package.

    In place: the layers stay the objects that they are, with their parameters, hooks, names and training
    mode, and only their class becomes DepthwiseConv1d or DepthwiseConv2d; so it may be called before or after
    weights are loaded, DistributedDataParallel is put around the model or it is compiled. What else there is,
    subclasses and parametrized layers too, is left. dry_run: change nothing, say what would be. With
    LARGE_KERNEL_CONV_IMPL=pytorch in the environment all are left. restore() undoes it.
    """
    replaced, left = [], []
    for name, layer in model.named_modules():
        if not isinstance(layer, tuple(OURS)) or isinstance(layer, tuple(OURS.values())):
            continue
        kernel = ' x '.join(map(str, layer.kernel_size))
        line = f'{name or "the model itself"}: {layer.out_channels} channels, kernel {kernel}'
        reason = refusal(layer)
        if reason is not None:
            left.append(f'{line}: left, {reason}')
            continue
        replaced.append(f'{line}: replaced')
        if not dry_run:
            layer.__class__ = OURS[type(layer)]
            setattr(layer, MARK, True)
    return Accelerated(replaced, left)


def restore(model: nn.Module) -> int:
    """Make what accelerate() replaced nn.Conv1d and nn.Conv2d again; return how many layers that were."""
    theirs = {ours: given for given, ours in OURS.items()}
    layers = [layer for layer in model.modules() if MARK in vars(layer)]
    for layer in layers:
        layer.__class__ = theirs[type(layer)]
        delattr(layer, MARK)
    return len(layers)


def refusal(layer: nn.Conv1d | nn.Conv2d) -> str | None:
    """Why a convolution is left as it is, or None."""
    if type(layer) not in OURS:
        return f'a {type(layer).__module__}.{type(layer).__qualname__}'
    if not layer.in_channels == layer.out_channels == layer.groups:
        return f'not depthwise: {layer.in_channels} channels to {layer.out_channels} in {layer.groups} groups'
    if set(layer.stride) != {1}:
        return f'stride {layer.stride}'
    if layer.padding_mode != 'zeros':
        return f'padding mode {layer.padding_mode}'
    if 'forward' in vars(layer):
        return 'its forward was replaced'
    if os.environ.get('LARGE_KERNEL_CONV_IMPL') == 'pytorch':
        return 'LARGE_KERNEL_CONV_IMPL is pytorch'
    return None
