"""The geometry of a depthwise convolution of stride 1, and the shapes that fit it."""
from typing import NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """A depthwise convolution's kernel, padding (so far always 'same') and dilation (so far always 1)."""
    kernel_height: int
    kernel_width: int
    padding: str = 'same'
    dilation: int = 1

    @property
    def pads(self) -> tuple[int, int]:
        """Rows of zeros above and below a map, columns left and right of it, that keep its size."""
        return self.kernel_height // 2 * self.dilation, self.kernel_width // 2 * self.dilation

    @property
    def largest_side(self) -> int:
        """The larger of the kernel's height and width."""
        return max(self.kernel_height, self.kernel_width)

    def __str__(self) -> str:
        return f'{self.kernel_height} x {self.kernel_width}'


def geometry_of(weight: Tensor) -> Geometry:
    """The geometry of a convolution with `weight` (C, 1, K, K)."""
    return Geometry(*weight.shape[2:])


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Geometry:
    """Return the geometry of the convolution; ValueError where shapes or devices do not fit."""
    size, weight_size = x.shape, weight.shape  # each look at a shape makes a new one
    if len(size) != 4:
        raise ValueError(f'x must be (N, C, H, W), not {tuple(size)}')
    channels, k = size[1], weight_size[-1] if weight_size else 0
    if weight_size != (channels, 1, k, k) or k % 2 == 0:
        raise ValueError('weight must be (C, 1, K, K) with odd K and the '
                         f'C = {channels} channels of x {tuple(size)}, not {tuple(weight_size)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'bias must be (C,) with the C = {channels} channels of x {tuple(size)}, '
                         f'not {tuple(bias.shape)}')
    device = x.device
    if weight.device != device or (bias is not None and bias.device != device):
        other = weight if weight.device != device else bias
        raise ValueError(f'x, weight and bias must be on one device, not on {device} and {other.device}')
    return Geometry(k, k)
