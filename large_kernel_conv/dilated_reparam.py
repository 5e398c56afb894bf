"""The block of UniRepLKNet and its relatives: a large kernel trained beside dilated small ones, merged after.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", CVPR 2024, section 3.1.
"""
import torch
from torch import Tensor, nn

from large_kernel_conv.batch_norm import scale_and_shift
from large_kernel_conv.layers import DepthwiseConv2d

# of each large kernel: the parallel ones, (kernel, dilation); (kernel - 1) * dilation + 1 fits into it
BRANCHES = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparamBlock(nn.Module):
    """A K x K depthwise convolution and the dilated ones of BRANCHES[K], each with a BatchNorm, summed.

    merge() makes them one convolution, as they are built where `deploy` is true. State dicts are those of the
    published block. x (N, C, H, W) to the same. ValueError for a kernel_size that is not in BRANCHES.
    """

    def __init__(self, channels: int, kernel_size: int, deploy: bool = False):
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f'kernel_size must be one of {sorted(BRANCHES)}, not {kernel_size}')
        self.kernel_size = kernel_size
        self.lk_origin = DepthwiseConv2d(channels, kernel_size, bias=deploy)
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for k, dilation in BRANCHES[kernel_size]:
            conv = DepthwiseConv2d(channels, k, bias=False, dilation=dilation)
            self.add_module(f'dil_conv_k{k}_{dilation}', conv)
            self.add_module(f'dil_bn_k{k}_{dilation}', nn.BatchNorm2d(channels))

    def _branches(self) -> list[tuple[DepthwiseConv2d, nn.Module]]:
        names = [f'k{k}_{dilation}' for k, dilation in BRANCHES[self.kernel_size]]
        return [(self.lk_origin, self.origin_bn),
                *((getattr(self, f'dil_conv_{name}'), getattr(self, f'dil_bn_{name}')) for name in names)]

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, 'origin_bn'):
            return self.lk_origin(x)
        (conv, bn), *others = self._branches()
        y = bn(conv(x))
        for conv, bn in others:
            y = y + bn(conv(x))
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Make the branches one convolution, computed in float64. Does nothing where that has been done."""
        if not hasattr(self, 'origin_bn'):
            return
        weight = self.lk_origin.weight
        kernel, bias = torch.zeros_like(weight, dtype=torch.float64), 0.
        for conv, bn in self._branches():
            scale, shift = scale_and_shift(bn)
            step, = set(conv.dilation)
            margin = (self.kernel_size - 1 - (conv.kernel_size[0] - 1) * step) // 2
            taps = slice(margin, self.kernel_size - margin, step)
            kernel[:, :, taps, taps] += conv.weight.double() * scale.view(-1, 1, 1, 1)
            bias = bias + shift
        weight.copy_(kernel)
        self.lk_origin.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        for name in [name for name, _ in self.named_children() if name != 'lk_origin']:
            delattr(self, name)

    reparameterize = merge  # the name that other projects' tools look for
