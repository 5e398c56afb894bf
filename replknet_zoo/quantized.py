"""The int8 form of a 1x1 convolution, and models whose layers have it. calibration.py makes them."""
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators below

INPUT_LEVELS, WEIGHT_LEVELS = 255, 127  # inputs are 0 ... 255, weights -127 ... 127
# from these ONNX's QuantizeLinear and DequantizeLinear are exported
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default
SCALE = '.weight_scale'  # ends a key for each layer in a state dict


class QuantizedConv2d(nn.Module):
    """A 1x1 convolution of levels by int8 weights: (N, C, H, W) to (N, O, H, W), computed in floating point.

    levels = round(x * input_scale + input_shift) within 0 ... 255, input_scale and input_shift (C,); the
    result is weight_scale * (weight * levels) + bias, weight (O, C / groups, 1, 1), weight_scale (O,).
    """
    kernel_size = 1, 1

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.register_buffer('weight', torch.zeros(out_channels, in_channels // groups, 1, 1,
                                                   dtype=torch.int8))
        for name, size in (('weight_scale', out_channels), ('bias', out_channels),
                           ('input_scale', in_channels), ('input_shift', in_channels)):
            self.register_buffer(name, torch.zeros(size))

    @classmethod
    def of(cls, conv: nn.Conv2d, low: Tensor, high: Tensor) -> 'QuantizedConv2d':
        """The form of a convolution the channels of whose input lie in low ... high, (C,) each."""
        self = cls(conv.in_channels, conv.out_channels, conv.groups)
        # a channel that is always the same is its shift, whatever the scale
        width = torch.where(high > low, high - low, low.abs().clamp_min(1e-6))
        self.input_scale.copy_(INPUT_LEVELS / width)
        self.input_shift.copy_((-low * self.input_scale).round())  # whole, so that 0 keeps its value
        scale, shift = self._of_each_weight(self.input_scale), self._of_each_weight(self.input_shift)
        weight = conv.weight.detach().float() / scale
        self.weight_scale.copy_(weight.flatten(1).abs().amax(1).clamp_min(1e-30) / WEIGHT_LEVELS)
        levels = (weight / self.weight_scale[:, None, None, None]).round()
        self.weight.copy_(levels)
        # of an input of 0, or of the range's end that is nearest to 0, rounding the weights changes nothing
        nearest = shift.clamp(0, INPUT_LEVELS)
        at_zero = levels * self.weight_scale[:, None, None, None] * nearest + weight * (shift - nearest)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias.copy_(bias.double() - at_zero.double().flatten(1).sum(1))
        return self

    def forward(self, x: Tensor) -> Tensor:
        levels = x.permute(0, 2, 3, 1).float() * self.input_scale + self.input_shift
        levels = QUANTIZE(levels, 1.0, 0, 0, INPUT_LEVELS, torch.uint8)
        levels = DEQUANTIZE(levels, 1.0, 0, 0, INPUT_LEVELS, torch.uint8)
        if self.groups == 1:  # as a matrix product: ONNX runtimes have such in int8 with results in float32
            y = F.linear(levels, self._real_weight().flatten(1), self.bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(levels.permute(0, 3, 1, 2), self._real_weight(), self.bias, groups=self.groups)
        return y.to(x.dtype)

    def _real_weight(self) -> Tensor:
        zeros = torch.zeros_like(self.weight_scale, dtype=torch.int64)
        return DEQUANTIZE_CHANNELS(self.weight, self.weight_scale, zeros, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS,
                                   torch.int8)

    def _of_each_weight(self, values: Tensor) -> Tensor:
        """(C,) for the channels of an input to (O, C / groups, 1, 1)."""
        of_groups = values.view(self.groups, -1).repeat_interleave(self.out_channels // self.groups, 0)
        return of_groups[:, :, None, None]

    @torch.no_grad()
    def dequantized(self) -> nn.Conv2d:
        """The convolution in floating point, of inputs as they are."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, groups=self.groups)
        weight = self._real_weight()
        conv.weight.copy_(weight * self._of_each_weight(self.input_scale))
        conv.bias.copy_(self.bias + (weight * self._of_each_weight(self.input_shift)).flatten(1).sum(1))
        return conv.requires_grad_(False)


def is_quantized(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a model with int8 layers."""
    return any(key.endswith(SCALE) for key in state)


def count_parameters(model: nn.Module) -> int:
    """How many parameters a model has, with the weights and biases of int8 layers, which are buffers."""
    return sum(p.numel() for p in model.parameters()) + sum(
        layer.weight.numel() + layer.bias.numel() for layer in model.modules()
        if isinstance(layer, QuantizedConv2d))


def take_form(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Merge, fold and quantize the model where a state dict of it is, without its values."""
    model.take_form(state)
    layers = dict(model.named_modules())
    for key in state:
        conv = layers.get(key.removesuffix(SCALE)) if key.endswith(SCALE) else None
        if isinstance(conv, nn.Conv2d):
            layer = QuantizedConv2d(conv.in_channels, conv.out_channels, conv.groups)
            model.set_submodule(key.removesuffix(SCALE), layer.to(conv.weight.device))


def dequantize(model: nn.Module) -> None:
    """Put every int8 layer back into floating point, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedConv2d):
            model.set_submodule(name, module.dequantized())
