"""The fastest form of a model for inference: merged, folded, and on CPUs its layers fused."""
import copy
import math

import torch
from torch import Tensor, nn

import replknet
import repmlpnet
from large_kernel_conv import DepthwiseConv2d, FrozenDepthwiseConv2d
from replknet import fold_bn_before, scale_and_shift


# weights made in inference mode have no versions, so that no layer could keep what it computes of them
@torch.inference_mode(False)
def compile_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the fastest form of `model` for inference in `dtype`; `model` itself stays as it is.

    Kernels are merged, every BatchNorm is folded, and activations computed in dtype (float32 or bfloat16);
    logits, or a backbone's maps, are float32. Takes and returns what the model does, any batch and image
    size, without gradients.
    On CPUs each convolution becomes one fused oneDNN call with weights packed beforehand; on GPUs
    torch.compile is used. What is returned stays as it is: it cannot be moved, copied, saved or exported, nor
    asked for its parameters and state dict, most weights being packed: the original model can.
    Raises ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'dtype must be torch.float32 or torch.bfloat16, not {dtype}')
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.structural_reparam()
    model.deep_fuse_BN()
    if next(model.parameters()).device.type != 'cpu':
        return _Inference(torch.compile(model.to(dtype=dtype, memory_format=torch.channels_last)), dtype,
                          math.inf)
    if not _onednn_computes(dtype):
        return _Inference(model.to(dtype=dtype, memory_format=torch.channels_last), dtype, math.inf)
    _fuse(model, dtype)
    if hasattr(model, 'head'):
        model.head.to(dtype)
    # Slices of a batch keep the largest map, the hidden one of the first ConvFFN, a quarter of the image's
    # side, in the cache; and glibc would fetch memory anew from the system for every buffer above 32 MiB,
    # which cost a fifth of the time at batch 16.
    widest = next((m.hidden_channels for m in model.modules() if hasattr(m, 'hidden_channels')), 0)
    return _Inference(model, dtype, (13 << 20) / (widest / 16 * dtype.itemsize) if widest else math.inf)


def _fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace what FUSED has a form for, in place, wherever it stands in a merged and folded model."""
    for name, child in module.named_children():
        if type(child) in FUSED:
            setattr(module, name, FUSED[type(child)](child, dtype))
        else:
            _fuse(child, dtype)


def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this torch has the fused oneDNN calls, and this CPU the instructions for dtype."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, '_linear_pointwise'):
        return False
    return dtype == torch.float32 or ops._is_mkldnn_bf16_supported()


class _Inference(nn.Module):
    """Runs a model on slices of at most `pixels` input pixels, but at least one image."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, pixels: float):
        super().__init__()
        self.model, self.dtype, self.pixels = model.eval(), dtype, pixels

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if torch.jit.is_tracing() or not isinstance(x, Tensor):  # torch.fx's stand-in
            self._refuse()
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)  # in one step 2.5 times the time
        images = max(1, int(min(len(x), self.pixels / (x.shape[2] * x.shape[3]))))
        with torch.autocast(x.device.type, enabled=False):
            parts = [self.model(part) for part in x.split(images)]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(maps).float() for maps in zip(*parts, strict=True))
        return torch.cat(parts).float()

    def train(self, mode: bool = True) -> nn.Module:
        return self  # stays in evaluation

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError('a model compiled for inference cannot be moved, copied or saved: '
                        'compile the original model again '
                        '(only the original has parameters and a state dict: here most weights are packed)')

    _apply = __reduce_ex__ = state_dict = load_state_dict = named_parameters = named_buffers = _refuse


class _PackedPointwise:
    """A 1x1 convolution with bias on a map's pixels, and what follows: activation or shortcut's addition.

    As a matrix product of the (N * H * W, C) view that a channels_last map has. Its weight is packed once, in
    a layout that depends neither on the number of pixels nor on what follows. A convolution's does: packed
    for a plain one, the weight was reordered in each call with a shortcut (4096 to 1024 channels at 7 x 7:
    105 ms instead of 1.5).
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, activation: str = 'none'):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(conv.weight.flatten(1).to(dtype))
        self.bias, self.activation = conv.bias.to(dtype), activation
        self.algorithm = 'none' if activation == 'gelu' else ''  # of the GELU: by erf, not by tanh

    def __call__(self, pixels: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(pixels, shortcut, self.weight, self.bias, 'add')
        return torch.ops.mkldnn._linear_pointwise(pixels, self.weight, self.bias, self.activation, [],
                                                  self.algorithm)


def _pixels(x: Tensor) -> Tensor:
    """The view (N * H * W, C) of a channels_last map (N, C, H, W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(pixels: Tensor, like: Tensor) -> Tensor:
    """The channels_last map of pixels (N * H * W, C), with N, H and W of `like`."""
    n, _, h, w = like.shape
    return pixels.view(n, h, w, pixels.shape[1]).permute(0, 3, 1, 2)


class _FusedRepLKBlock(nn.Module):
    """A folded RepLKBlock."""

    def __init__(self, block: replknet.RepLKBlock, dtype: torch.dtype):
        super().__init__()
        self.pw1 = _PackedPointwise(block.pw1.conv, dtype, 'relu')
        self.pw2 = _PackedPointwise(block.pw2.conv, dtype)
        conv = block.large_kernel.lkb_reparam
        self.large_kernel = (FrozenDepthwiseConv2d(conv, relu=True) if isinstance(conv, DepthwiseConv2d)
                             else nn.Sequential(conv.to(dtype), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = _pixels(x)
        hidden = _pixels(self.large_kernel(_map(self.pw1(shortcut), x)))
        return _map(self.pw2(hidden, shortcut), x)


class _FusedConvFFN(nn.Module):
    """A folded ConvFFN."""

    def __init__(self, block: replknet.ConvFFN, dtype: torch.dtype):
        super().__init__()
        self.hidden_channels = block.pw1.conv.out_channels
        self.pw1 = _PackedPointwise(block.pw1.conv, dtype, 'gelu')
        self.pw2 = _PackedPointwise(block.pw2.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = _pixels(x)
        return _map(self.pw2(self.pw1(shortcut), shortcut), x)


class _FusedConvBN(nn.Module):
    """A folded ConvBN of either family, with its ReLU if it has one."""

    def __init__(self, block: replknet.ConvBN | repmlpnet.ConvBN, dtype: torch.dtype):
        super().__init__()
        conv = block.conv
        self.activation = 'relu' if len(block) == 3 else 'none'
        self.packed = _PackedPointwise(conv, dtype, self.activation) if conv.kernel_size == (1, 1) else None
        self.conv, self.bias = conv, conv.bias.to(dtype)
        # small: oneDNN may reorder it in each call
        self.weight = conv.weight.to(dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return _map(self.packed(_pixels(x)), x)
        conv = self.conv
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, conv.padding, conv.stride,
                                                       conv.dilation, conv.groups, self.activation, [], '')


class _FusedRepMLPNetUnit(nn.Module):
    """A folded RepMLPNetUnit, with the BatchNorm before its FCs, which scales each channel by its own factor.

    FCs mix pixels, not channels, so that factor is taken behind them: W (s x + t) + b is s W x + base, where
    base (h, w, C) holds t times the sums of W's rows, and b.
    """

    def __init__(self, unit: repmlpnet.RepMLPNetUnit, dtype: torch.dtype):
        super().__init__()
        block, ffn = unit.repmlp_block, unit.ffn_block
        scale, shift = scale_and_shift(unit.prebn1)
        fold_bn_before(unit.prebn1, block.gp.fc1)
        self.fc1 = _PackedPointwise(block.gp.fc1, dtype, 'relu')
        self.fc2 = _PackedPointwise(block.gp.fc2, dtype)
        self.sets, self.h, self.w = block.S, block.h, block.w
        weight = block.fc3.weight.view(self.sets, self.h * self.w, self.h * self.w)
        sums, bias = weight.double().sum(2), block.fc3.bias.view(self.sets, -1).double()
        groups = block.C // self.sets
        base = (sums.repeat(groups, 1) * shift[:, None] + bias.repeat(groups, 1)).T.reshape(
            self.h, self.w, block.C)
        self.scale, self.base = scale.to(dtype), base.to(dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight[0].to(dtype)) if self.sets == 1 else None
        self.weight = weight.transpose(1, 2).to(dtype) if self.sets > 1 else None
        self.ffn_fc1 = _PackedPointwise(ffn.ffn_fc1.conv, dtype, 'gelu')
        self.ffn_fc2 = _PackedPointwise(ffn.ffn_fc2.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3)))).sigmoid()[:, None, None]
        _, channels, height, width = x.shape
        h_parts, w_parts = height // self.h, width // self.w
        base = self.base if h_parts == w_parts == 1 else self.base.repeat(h_parts, w_parts, 1)
        x = x.permute(0, 2, 3, 1)
        x = torch.addcmul(x, self._mixed(x, h_parts, w_parts), gate * self.scale).addcmul_(base, gate)
        pixels = x.view(-1, channels)
        return self.ffn_fc2(self.ffn_fc1(pixels), pixels).view(x.shape).permute(0, 3, 1, 2)

    def _mixed(self, x: Tensor, h_parts: int, w_parts: int) -> Tensor:
        """The FCs' products with the parts of maps (N, H, W, C), in the same shape."""
        shape = -1, h_parts, self.h, w_parts, self.w, x.shape[3] // self.sets, self.sets
        parts = x.view(shape).permute(0, 1, 3, 5, 6, 2, 4).contiguous()  # a row of pixels for each channel
        rows = parts.view(-1, self.sets, self.h * self.w)
        if self.packed is not None:
            out = torch.ops.mkldnn._linear_pointwise(rows.flatten(1), self.packed, None, 'none', [], '')
            out = out.view(parts.shape)
        else:
            out = torch.bmm(rows.transpose(0, 1), self.weight)
            out = out.view(self.sets, *parts.shape[:4], self.h, self.w).permute(1, 2, 3, 4, 0, 5, 6)
        # contiguous: read across its order bfloat16 takes three times as long
        return out.permute(0, 1, 5, 2, 6, 3, 4).contiguous().view(x.shape)


# the fused form of each kind of block: a family of models adds its rows
FUSED = {replknet.ConvBN: _FusedConvBN, replknet.RepLKBlock: _FusedRepLKBlock,
         replknet.ConvFFN: _FusedConvFFN, repmlpnet.ConvBN: _FusedConvBN,
         repmlpnet.RepMLPNetUnit: _FusedRepMLPNetUnit}
