"""Post-training quantization: the 1x1 convolutions of a merged and folded model in int8, by images.

Depthwise kernels, stem, gates, shortcuts and head stay in floating point: 18 percent of RepLKNet-31B's
multiply-adds, 3 percent of RepMLPNet-B224's. A layer's input has a scale for each of its channels, which
takes the place of the BatchNorm that was folded into the layer; behind a GELU, which is computed together
with the layer before, one for all. Weights have a symmetric scale for each output channel.
"""
import copy
import warnings
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn

import replknet
import repmlpnet
from replknet_zoo.quantized import INPUT_LEVELS, QuantizedConv2d

FEWEST_IMAGES = 32  # from which each channel's scale is taken; of fewer, one for all channels of a layer
LEAST_DECIBELS = 20.0  # the error's variance is 1 percent of the output's
# An input's range is from the least to the largest value seen, or this part of it, whichever makes the
# smaller squared error: a percentile would be cut off whether or not that makes the error smaller.
PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
MOST_PIXELS = 1 << 14  # of a batch, on which the parts are compared

See = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def quantize(model: nn.Module, batches: Iterable[Tensor]) -> tuple[nn.Module, dict[str, float]]:
    """Return a copy of the model on the CPU, merged, folded, in int8, and what each layer keeps, in decibels.

    batches: normalised images (N, 3, H, W), of which all are kept in memory. Decibels: the variance of the
    error of each of a layer's output channels, as part of that channel's variance, 1 at most, the mean of all
    channels; a layer with less than LEAST_DECIBELS stays in floating point. Of the others each output
    channel's mean error is taken off its bias.
    With fewer than FEWEST_IMAGES images, without copies and those of one colour, a layer's channels share one
    scale, and a warning says so. Raises ValueError where there is no image, for batches of something else,
    and where values are not finite.
    """
    batches = _checked(batches)
    images = _count(batches)
    if images < FEWEST_IMAGES:
        warnings.warn(f'calibrated by {images} images only, without copies and those of one colour: a layer '
                      f'has one scale for all channels; {FEWEST_IMAGES} or more make better scales',
                      stacklevel=3)
    model = copy.deepcopy(model).to('cpu', torch.float32).eval().requires_grad_(False)
    model.structural_reparam()
    model.deep_fuse_BN()
    layers = quantizable(model)
    one_scale = layers if images < FEWEST_IMAGES else _with_one_scale(model, layers)
    ranges = _ranges(model, layers, one_scale, batches)
    layers = {name: layers[name] for name in ranges}  # a backbone without maps of its last stages skips those
    quantized = {name: QuantizedConv2d.of(layers[name], *ranges[name]) for name in layers}
    decibels = _correct_biases(model, layers, quantized, batches)
    for name, layer in quantized.items():
        if decibels[name] >= LEAST_DECIBELS:
            model.set_submodule(name, layer)
    return model, decibels


def _checked(batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches in float32 on the CPU. Raises ValueError where there is none, and for something else."""
    found = []
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise ValueError(f'a calibration batch is a tensor of images, not {type(batch).__name__}: of a '
                             'loader of pairs pass (x for x, _ in loader)')
        if batch.dim() != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise ValueError('a calibration batch holds normalised images (N, 3, H, W) in floating point, '
                             f'not {tuple(batch.shape)} in {batch.dtype}')
        if len(batch):
            found.append(batch.detach().to('cpu', torch.float32))
    if not found:
        raise ValueError('there is no image to calibrate by')
    return found


def _count(batches: list[Tensor]) -> int:
    """How many images there are, without copies and those of one colour: they show little of the ranges."""
    return len({hash(image.numpy().tobytes()) for batch in batches for image in batch
                if (image.amax((1, 2)) > image.amin((1, 2))).any()})


def quantizable(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The 1x1 convolutions between all channels, and RepMLPNet's FCs between all pixels, by their names."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
            and (module.groups == 1 or name.endswith('.fc3'))
            and not name.startswith('stem.') and '.gp.' not in name}


def _with_one_scale(model: nn.Module, layers: dict[str, nn.Conv2d]) -> set[str]:
    """The layers whose input has one scale for all channels: behind a GELU, and where channels are pixels."""
    found = {conv for module in model.modules() for conv in (
        [module.pw2.conv] if isinstance(module, replknet.ConvFFN) else
        [module.ffn_fc2.conv] if isinstance(module, repmlpnet.FFNBlock) else
        [module.fc3] if isinstance(module, repmlpnet.RepMLPBlock) else [])}
    return {name for name, layer in layers.items() if layer in found}


def _watch(model: nn.Module, layers: dict[str, nn.Conv2d], batches: list[Tensor], see: See) -> None:
    """Call see(name, input, output) for each layer and batch."""
    hooks = [layer.register_forward_hook(lambda _, inputs, output, name=name: see(name, inputs[0], output))
             for name, layer in layers.items()]
    try:
        for batch in batches:
            model(batch.contiguous(memory_format=torch.channels_last))
    finally:
        for hook in hooks:
            hook.remove()


def _ranges(model: nn.Module, layers: dict[str, nn.Conv2d], one_scale: Container[str],
            batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The low and the high end of each layer's input, (C,) each, the same for all channels in `one_scale`.

    Raises ValueError where they are not finite.
    """
    found = {}

    def see_ends(name: str, x: Tensor, _: Tensor) -> None:
        low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = low, high

    _watch(model, layers, batches, see_ends)
    for name, (low, high) in found.items():
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f'the input of {name} is not finite: images or weights are broken')
        if name in one_scale:
            found[name] = low.min().expand_as(low), high.max().expand_as(high)
    errors = {name: torch.zeros(len(PARTS), len(low)) for name, (low, _) in found.items()}

    def see_errors(name: str, x: Tensor, _: Tensor) -> None:
        pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        pixels = pixels[::max(1, len(pixels) // MOST_PIXELS)]
        for errors_of_part, part in zip(errors[name], PARTS, strict=True):
            low, high = _part_of(*found[name], part)
            step = ((high - low) / INPUT_LEVELS).clamp_min(1e-30)
            rounded = ((pixels.clamp(low, high) - low) / step).round_().mul_(step).add_(low)
            errors_of_part += rounded.sub_(pixels).square_().sum(0)

    _watch(model, layers, batches, see_errors)
    for name, ends in found.items():
        of_parts = errors[name]
        if name in one_scale:
            of_parts = of_parts.sum(1, keepdim=True).expand_as(of_parts)
        found[name] = _part_of(*ends, torch.tensor(PARTS)[of_parts.argmin(0)])
    return found


def _part_of(low: Tensor, high: Tensor, part: float | Tensor) -> tuple[Tensor, Tensor]:
    """A range made narrower around 0, or around its end that is nearest to 0."""
    nearest = torch.zeros_like(low).clamp(low, high)
    return nearest + part * (low - nearest), nearest + part * (high - nearest)


def _correct_biases(model: nn.Module, layers: dict[str, nn.Conv2d], quantized: dict[str, QuantizedConv2d],
                    batches: list[Tensor]) -> dict[str, float]:
    """Take the mean error of each output channel off its bias; return the decibels that quantize() tells."""
    sums = {name: torch.zeros(4, layer.out_channels, dtype=torch.float64) for name, layer in layers.items()}
    pixels = dict.fromkeys(layers, 0)

    def see(name: str, x: Tensor, y: Tensor) -> None:
        error = quantized[name](x) - y
        pixels[name] += y.numel() // y.shape[1]
        squares = [values.double().square() for values in (y, error)]
        for total, values in zip(sums[name], (y, squares[0], error, squares[1]), strict=True):
            total += values.sum((0, 2, 3), dtype=torch.float64)

    _watch(model, layers, batches, see)
    decibels = {}
    for name, totals in sums.items():
        mean, square, error_mean, error_square = totals / pixels[name]
        quantized[name].bias -= error_mean.float()
        variance, error_variance = square - mean.square(), error_square - error_mean.square()
        error_variance -= 1e-12 * square  # which float32 does not resolve
        lost = (error_variance.clamp_min(0) / variance.clamp_min(1e-30)).clamp_max(1).mean()
        decibels[name] = -10 * lost.clamp_min(1e-30).log10().item()
    return decibels
