"""The geometry of a depthwise convolution of stride 1, and the shapes that fit it."""
import functools
from typing import NamedTuple

import torch
from torch import Tensor

Pair = int | tuple[int, int]
# None: zeros that keep a map's size, of odd kernels; or what F.conv2d takes: zeros on each side, of a pair
# (vertical, horizontal), 'same', 'valid'; or ((top, bottom), (left, right))
Padding = None | str | int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]
# of a sequence: the same, a pair being (before, after)
Padding1d = None | str | int | tuple[int, int]


class Geometry(NamedTuple):
    """A depthwise convolution's kernel, the zeros around its map, and its dilation."""
    kernel_height: int
    kernel_width: int
    top: int
    bottom: int
    left: int
    right: int
    dilation_height: int
    dilation_width: int
    # zeros (left, right, top, bottom) so far out that no tap meets an input, where there are any
    surplus: tuple[int, int, int, int] | None = None
    shrinks: bool = False  # whether outputs are smaller than their maps

    @property
    def where(self) -> tuple[int, ...]:
        """As the operators take it: zeros above, below, left and right; dilation, vertical and horizontal."""
        return self[2:8]

    @property
    def is_dilated(self) -> bool:
        """Whether taps do not lie side by side."""
        return self.dilation_height > 1 or self.dilation_width > 1

    @property
    def reach(self) -> tuple[int, int]:
        """Rows from the first to the last of a kernel, and columns."""
        return ((self.kernel_height - 1) * self.dilation_height,
                (self.kernel_width - 1) * self.dilation_width)

    @property
    def largest_side(self) -> int:
        """The larger of the kernel's height and width."""
        return max(self.kernel_height, self.kernel_width)

    @property
    def is_symmetric(self) -> bool:
        """Whether there are as many zeros above as below, and left as right: what F.conv2d can add itself."""
        return self.top == self.bottom and self.left == self.right

    def without_surplus(self) -> 'Geometry':
        """The same with as many zeros as meet a tap."""
        left, right, top, bottom = self.surplus or (0, 0, 0, 0)
        return self._replace(top=self.top - top, bottom=self.bottom - bottom, left=self.left - left,
                             right=self.right - right, surplus=None)

    def reversed(self) -> 'Geometry':
        """That of the convolution from the gradient of y to that of x, with kernels turned by 180 degrees."""
        down, across = self.reach
        return self._replace(top=down - self.top, bottom=down - self.bottom, left=across - self.left,
                             right=across - self.right)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of a map of height x width; one without pixels stays so."""
        down, across = self.reach
        return (height and height + self.top + self.bottom - down,
                width and width + self.left + self.right - across)

    def __str__(self) -> str:
        text, step = f'{self.kernel_height} x {self.kernel_width}', self[6:8]
        if not self.is_dilated:
            return text
        return f'{text} (dilation {step[0] if step[0] == step[1] else step})'


def make_geometry(kernel_height: int, kernel_width: int, padding: Padding = None,
                  dilation: Pair = 1) -> Geometry:
    """The geometry of a kernel; ValueError where the padding or the dilation is none, or does not fit it."""
    if torch.compiler.is_compiling():  # it traces through a cache with a warning
        return _made.__wrapped__(kernel_height, kernel_width, as_key(padding), as_key(dilation))
    try:
        return _made(kernel_height, kernel_width, padding, dilation)
    except TypeError:  # a list has no key
        return _made(kernel_height, kernel_width, as_key(padding), as_key(dilation))


@functools.lru_cache(1024)
def _made(kernel_height: int, kernel_width: int, padding: Padding, dilation: Pair) -> Geometry:
    down, across = _pair(dilation, 'dilation', least=1)
    reach = (kernel_height - 1) * down, (kernel_width - 1) * across
    if padding is None and (kernel_height % 2 == 0 or kernel_width % 2 == 0):
        raise ValueError(f'a {kernel_height} x {kernel_width} kernel has no centre: give the padding '
                         "('same' puts the odd row or column of zeros below and to the right)")
    if padding is None or padding == 'same':
        sides = [(zeros // 2, zeros - zeros // 2) for zeros in reach]
    elif padding == 'valid':
        sides = [(0, 0)] * 2
    elif isinstance(padding, tuple) and len(padding) == 2 and all(isinstance(p, tuple) for p in padding):
        sides = [_pair(side, 'padding', least=0) for side in padding]
    else:
        sides = [(zeros, zeros) for zeros in _pair(padding, 'padding', least=0)]
    (top, bottom), (left, right) = sides
    surplus = tuple(max(0, zeros - most) for zeros, most in (
        (left, reach[1]), (right, reach[1]), (top, reach[0]), (bottom, reach[0])))
    return Geometry(kernel_height, kernel_width, top, bottom, left, right, down, across,
                    surplus if any(surplus) else None, top + bottom < reach[0] or left + right < reach[1])


def as_key(value: object) -> object:
    """A padding or a dilation in tuples, whether given so, as lists or as a torch.Size."""
    return tuple(map(as_key, value)) if isinstance(value, (list, tuple)) else value


def of_one_row(padding: Padding1d) -> Padding:
    """The padding of a map of one row, of that of a sequence; (zeros,) is nn.Conv1d's form of `zeros`."""
    padding = as_key(padding)
    if isinstance(padding, tuple):
        return ((0, 0), padding) if len(padding) == 2 else (0, *padding)
    return padding if padding is None or isinstance(padding, str) else (0, padding)


def _pair(value: object, name: str, least: int) -> tuple[int, int]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        forms = (f'a whole number from {least} on or a pair of those' if name == 'dilation' else
                 "None, 'same', 'valid', a whole number from 0 on, a pair of those (vertical, horizontal), "
                 'or ((top, bottom), (left, right))')
        raise ValueError(f'{name} must be {forms}, not {value!r}')
    return pair


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding = None,
                 dilation: Pair = 1) -> Geometry:
    """Return the geometry of the convolution; ValueError where shapes or devices do not fit."""
    size, weight_size = x.shape, weight.shape  # each look at a shape makes a new one
    if len(size) != 4:
        raise ValueError(f'x must be (N, C, H, W), not {tuple(size)}')
    channels = size[1]
    if len(weight_size) != 4 or weight_size[0] != channels or weight_size[1] != 1 or 0 in weight_size[2:]:
        raise ValueError(f'weight must be (C, 1, Kh, Kw) with the C = {channels} channels of x '
                         f'{tuple(size)}, not {tuple(weight_size)}')
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f'bias must be (C,) with the C = {channels} channels of x {tuple(size)}, '
                         f'not {tuple(bias.shape)}')
    device = x.device
    if weight.device != device or (bias is not None and bias.device != device):
        other = weight if weight.device != device else bias
        raise ValueError(f'x, weight and bias must be on one device, not on {device} and {other.device}')
    found = make_geometry(weight_size[2], weight_size[3], padding, dilation)
    if found.surplus and 0 in size[2:]:
        raise ValueError(f'x {tuple(size)} has no pixels, and padding {padding!r} has more zeros than the '
                         f'{found} kernel reaches')
    if found.shrinks and min(found.output_size(size[2] or 1, size[3] or 1)) < 1:
        raise ValueError(f'a {found} kernel is larger than a {size[2]} x {size[3]} map with padding '
                         f'{padding!r}')
    return found
