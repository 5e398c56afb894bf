"""The depthwise convolution as layers, and the choice between them that LARGE_KERNEL_CONV_IMPL makes."""
import os
import pathlib

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair, _single
from torch.overrides import has_torch_function_variadic

from large_kernel_conv import choice
from large_kernel_conv.external import external_conv
from large_kernel_conv.functional import depthwise_conv1d, depthwise_conv2d
from large_kernel_conv.geometry import (
    Padding,
    Padding1d,
    Pair,
    check_shapes,
    make_geometry,
    of_one_row,
)

EXTENSION = pathlib.Path(__file__).resolve().parent / 'extension'  # our stand-in for the authors' extension


def depthwise_layer(channels: int, kernel_size: int, bias: bool = True,
                    implementation: str | None = None) -> nn.Conv2d:
    """Build a depthwise layer, stride 1, padding kernel_size // 2, kernel_size odd: (N, C, H, W) to the same.

    implementation: 'auto', empty, or this package's folder `extension`: DepthwiseConv2d, the fastest for the
    tensor at hand. 'pytorch': nn.Conv2d. Anything else is the folder of the external CUDA extension, which
    serves kernels larger than 5 and leaves others to nn.Conv2d; ImportError where it cannot be had. None:
    what the environment variable LARGE_KERNEL_CONV_IMPL says now.
    """
    if implementation is None:
        implementation = os.environ.get('LARGE_KERNEL_CONV_IMPL')
    if (not implementation or implementation == 'auto'
            or pathlib.Path(implementation).resolve() == EXTENSION):
        return DepthwiseConv2d(channels, kernel_size, bias)
    if implementation != 'pytorch' and kernel_size > 5:
        # the extension pads inside and reports padding (0, 0): nothing may take its padding from it
        return external_conv(implementation, channels, kernel_size, bias)
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d of `channels` groups and stride 1, computed by depthwise_conv2d, which says what fits.

    Its state dict and attributes are nn.Conv2d's. kernel_size and dilation: an int or a pair; padding: None
    keeps the map's size, of odd kernels. x (N, C, H, W) or (C, H, W) to the same with the size of the output.
    """

    def __init__(self, channels: int, kernel_size: Pair, bias: bool = True, padding: Padding = None,
                 dilation: Pair = 1):
        found = make_geometry(*_pair(kernel_size), padding, dilation)
        known = padding if isinstance(padding, str) else (found.top, found.left)
        super().__init__(channels, channels, kernel_size, padding=known, dilation=dilation, groups=channels,
                         bias=bias)
        if not (found.is_symmetric or isinstance(padding, str)):  # more than nn.Conv2d knows
            self.padding = found[2:4], found[4:6]

    def forward(self, x: Tensor) -> Tensor:
        if not has_torch_function_variadic(x) and x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return depthwise_conv2d(x, self.weight, self.bias, self.padding, self.dilation)


class DepthwiseConv1d(nn.Conv1d):
    """nn.Conv1d of `channels` groups and stride 1, computed by depthwise_conv1d, which says what fits.

    Its state dict and attributes are nn.Conv1d's. padding: None keeps the length, of odd kernels;
    (kernel_size - 1, 0) makes it causal. x (N, C, T) or (C, T) to the same with the length of the output.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True,
                 padding: Padding1d = None, dilation: int = 1):
        found = make_geometry(1, *_single(kernel_size), of_one_row(padding), (1, *_single(dilation)))
        known = padding if isinstance(padding, str) else found.left
        super().__init__(channels, channels, kernel_size, padding=known, dilation=dilation, groups=channels,
                         bias=bias)
        if not (found.is_symmetric or isinstance(padding, str)):  # more than nn.Conv1d knows
            self.padding = found[4:6]

    def forward(self, x: Tensor) -> Tensor:
        if not has_torch_function_variadic(x) and x.dim() == 2:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return depthwise_conv1d(x, self.weight, self.bias, self.padding, self.dilation)


class FrozenDepthwiseConv2d(nn.Module):
    """A DepthwiseConv2d for inference, with a ReLU behind it if asked: x and the result are that layer's.

    What is computed from the weight, for maps of one size, is kept as long as that size stays. A weight that
    is loaded, moved, cast or changed in place is seen; one that is changed through .data, which no version
    counter follows, is not.
    """

    def __init__(self, conv: DepthwiseConv2d, relu: bool = False):
        super().__init__()
        self.register_buffer('weight', conv.weight.detach())
        self.register_buffer('bias', None if conv.bias is None else conv.bias.detach())
        self.padding, self.dilation, self.relu = conv.padding, conv.dilation, relu
        self.prepared = None, None  # what the spectra were made for, and they
        # whose memory must not become another weight's, which would look the same
        self.prepared_weight = None

    def __getstate__(self) -> dict:
        # another CPU, or another version, may lay spectra out otherwise
        return {**self.__dict__, 'prepared': (None, None), 'prepared_weight': None}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        recorded = has_torch_function_variadic(x) or torch.jit.is_tracing()
        found = None if recorded else check_shapes(x, weight, self.bias, self.padding, self.dilation)
        # an inference tensor has no version: depthwise_conv2d knows it by its content
        if (recorded or weight.is_inference() or found.surplus or choice.is_for_triton(x)
                or not choice.load(x, weight, found)):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = depthwise_conv2d(x, weight.to(x.dtype), bias, self.padding, self.dilation)
            return y.relu_() if self.relu else y
        where = found.where
        made_for, spectra = self.prepared
        wanted = x.shape[2:], weight.data_ptr(), weight._version
        if made_for != wanted:
            spectra = torch.ops.large_kernel_conv.prepared_spectra(weight, *x.shape[2:], *where)
            self.prepared, self.prepared_weight = (wanted, spectra), weight.detach()
        return torch.ops.large_kernel_conv.depthwise_conv2d_prepared(
            x, weight, spectra, self.bias, *where, self.relu)
