"""The fastest form of a model for inference: merged, folded, and on CPUs its layers fused, in int8 too."""
import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import replknet
import repmlpnet
from large_kernel_conv import DepthwiseConv2d, FrozenDepthwiseConv2d, cpu
from replknet import fold_bn_before, scale_and_shift
from replknet_zoo.calibration import quantize
from replknet_zoo.quantized import QuantizedConv2d, dequantize


# weights made in inference mode have no versions, so that no layer could keep what it computes of them
@torch.inference_mode(False)
def compile_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32,
                          calibration: Iterable[Tensor] | None = None) -> nn.Module:
    """Return the fastest form of `model` for inference in `dtype`; `model` itself stays as it is.

    Kernels are merged, every BatchNorm is folded, and activations computed in dtype (float32, bfloat16 or
    int8); logits, or a backbone's maps, are float32. Takes and returns what the model does, any batch and
    image size, without gradients.
    int8: the model is quantized by `calibration`, batches of normalised images (N, 3, H, W); one that has
    int8 layers already is compiled in int8 whatever dtype says. Needs a CPU with VNNI or AMX; elsewhere a
    warning says so, and the layers are computed in bfloat16 or float32.
    On CPUs each convolution becomes one fused oneDNN call with weights packed beforehand; on GPUs
    torch.compile is used. What is returned stays as it is: it cannot be moved, copied, saved or exported, nor
    asked for its parameters and state dict, most weights being packed: the original model can.
    Raises ValueError for another dtype, and for int8 without images.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f'dtype must be torch.float32, torch.bfloat16 or torch.int8, not {dtype}')
    on_cpu = next(model.parameters()).device.type == 'cpu'
    in_int8 = any(isinstance(module, QuantizedConv2d) for module in model.modules())
    if dtype == torch.int8 and not in_int8 and calibration is None:
        raise ValueError('int8 needs images: pass calibration=batches')
    if in_int8 or dtype == torch.int8:
        dtype = torch.bfloat16 if not on_cpu or onednn_computes(torch.bfloat16) else torch.float32
        computed = on_cpu and onednn_computes(torch.int8)
        if not computed:
            warnings.warn(f'int8 is for CPUs with VNNI or AMX: here the model is computed in {dtype}',
                          stacklevel=3)
        elif not in_int8:
            model, _ = quantize(model, calibration)
        in_int8 = computed
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.structural_reparam()
    model.deep_fuse_BN()
    if not in_int8:
        dequantize(model)
    if not on_cpu:
        return _Inference(torch.compile(model.to(dtype=dtype, memory_format=torch.channels_last)), dtype,
                          math.inf)
    if not onednn_computes(dtype):
        return _Inference(model.to(dtype=dtype, memory_format=torch.channels_last), dtype, math.inf)
    if in_int8:
        cpu.load()  # for the operator that quantizes pixels
    _fuse(model, dtype)
    if hasattr(model, 'head'):
        model.head.to(dtype)
    # Slices of a batch keep the largest map, the hidden one of the first ConvFFN, a quarter of the image's
    # side, in the cache; and glibc would fetch memory anew from the system for every buffer above 32 MiB,
    # which cost a fifth of the time at batch 16.
    widest = next((m.hidden_channels for m in model.modules() if hasattr(m, 'hidden_channels')), 0)
    size = 1 if in_int8 else dtype.itemsize
    return _Inference(model, dtype, (13 << 20) / (widest / 16 * size) if widest else math.inf)


def _fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace what FUSED has a form for, in place, wherever it stands in a merged and folded model."""
    for name, child in module.named_children():
        if type(child) in FUSED:
            setattr(module, name, FUSED[type(child)](child, dtype))
        else:
            _fuse(child, dtype)


def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this torch has the fused oneDNN calls, and this CPU the instructions for dtype."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, '_linear_pointwise'):
        return False
    if dtype == torch.int8:
        return any(torch.cpu.get_capabilities().get(name) for name in ('avx512_vnni', 'avx_vnni', 'amx_int8'))
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


class _Int8Pointwise:
    """A quantized 1x1 convolution of pixels, or of levels, and what follows, as one oneDNN call.

    then: the quantized layer behind the activation, whose levels this one returns.
    """

    def __init__(self, conv: QuantizedConv2d, dtype: torch.dtype, activation: str = 'none',
                 then: nn.Module | None = None):
        self.levels_of = conv.input_scale, conv.input_shift
        self.weight = torch.ops.onednn.qlinear_prepack(conv.weight.flatten(1), None)
        self.scale, self.zeros = conv.weight_scale, torch.zeros(conv.out_channels, dtype=torch.int64)
        self.bias, self.dtype = conv.bias, dtype
        self.activation, self.algorithm = activation, 'none' if activation == 'gelu' else ''
        self.output = 1.0, 0, dtype
        if isinstance(then, QuantizedConv2d):
            self.output = 1 / then.input_scale[0].item(), int(then.input_shift[0]), torch.uint8

    def __call__(self, pixels: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Pixels (P, C), or levels in uint8, to (P, O). The shortcut's memory becomes the result's."""
        if pixels.dtype != torch.uint8:
            pixels = torch.ops.large_kernel_conv.quantize_pixels(pixels, *self.levels_of)
        layer = self.weight, self.scale, self.zeros
        if shortcut is not None:
            return torch.ops.onednn.qlinear_pointwise.binary(
                pixels, 1.0, 0, *layer, shortcut, self.bias, *self.output, 1.0, 0, 'sum', 1.0, 'none', [], '')
        return torch.ops.onednn.qlinear_pointwise(pixels, 1.0, 0, *layer, self.bias, *self.output,
                                                  self.activation, [], self.algorithm)


def _packed(conv: nn.Module, dtype: torch.dtype, activation: str = 'none',
            then: nn.Module | None = None) -> _PackedPointwise | _Int8Pointwise:
    """The packed form of a 1x1 convolution; `then` is the one that follows, if it alone uses the result."""
    if isinstance(conv, QuantizedConv2d):
        return _Int8Pointwise(conv, dtype, activation, then)
    return _PackedPointwise(conv, dtype, activation)


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
        self.pw1 = _packed(block.pw1.conv, dtype, 'relu')
        self.pw2 = _packed(block.pw2.conv, dtype)
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
        self.pw1 = _packed(block.pw1.conv, dtype, 'gelu', then=block.pw2.conv)
        self.pw2 = _packed(block.pw2.conv, dtype)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = _pixels(x)
        return _map(self.pw2(self.pw1(shortcut), shortcut), x)


class _FusedConvBN(nn.Module):
    """A folded ConvBN of either family, with its ReLU if it has one."""

    def __init__(self, block: replknet.ConvBN | repmlpnet.ConvBN, dtype: torch.dtype):
        super().__init__()
        conv = block.conv
        self.activation = 'relu' if len(block) == 3 else 'none'
        self.packed = _packed(conv, dtype, self.activation) if conv.kernel_size == (1, 1) else None
        self.conv, self.bias = conv, conv.bias.to(dtype)
        # small: oneDNN may reorder it in each call
        self.weight = conv.weight.to(dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return _map(self.packed(_pixels(x)), x)
        conv = self.conv
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, conv.padding, conv.stride,
                                                       conv.dilation, conv.groups, self.activation, [], '')


# A set's FC is one call, which is not worth it for smaller maps: 32 sets of 14 x 14 pixels took 1.5 ms at
# batch 1 and 2.6 ms at batch 16, as one product in bfloat16 0.2 and 1.3 ms (AMD EPYC with VNNI, 2 threads).
LEAST_INT8_PIXELS = 512


class _Int8FCs:
    """A RepMLPBlock's quantized FCs, with the BatchNorm before them, of maps (N, H, W, C) to the same."""

    def __init__(self, block: repmlpnet.RepMLPBlock, bn: nn.BatchNorm2d, dtype: torch.dtype):
        fc, (scale, shift) = block.fc3, scale_and_shift(bn)
        level_scale, level_shift = fc.input_scale[0], fc.input_shift[0]  # one for all pixels
        self.levels_of = (scale * level_scale).float(), (shift * level_scale + level_shift).float()
        self.h, self.w, self.dtype = block.h, block.w, dtype
        self.zeros = torch.zeros(block.h * block.w, dtype=torch.int64)
        self.sets = [(torch.ops.onednn.qlinear_prepack(weight.flatten(1), None), scales, self.zeros, bias)
                     for weight, scales, bias in zip(*(values.chunk(block.S) for values in (
                         fc.weight, fc.weight_scale, fc.bias)), strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        sets, h_parts, w_parts = len(self.sets), height // self.h, width // self.w
        levels = torch.ops.large_kernel_conv.quantize_pixels(x.reshape(-1, channels), *self.levels_of)
        levels = levels.view(n, h_parts, self.h, w_parts, self.w, channels // sets, sets)
        rows = levels.permute(6, 0, 1, 3, 5, 2, 4).contiguous()  # of pixels, for each channel of each set
        out = torch.stack([torch.ops.onednn.qlinear_pointwise(
            rows_of_set.view(-1, self.h * self.w), 1.0, 0, *layer, 1.0, 0, self.dtype, 'none', [], '')
            for rows_of_set, layer in zip(rows, self.sets, strict=True)])
        return out.view(rows.shape).permute(1, 2, 5, 3, 6, 4, 0).contiguous().view(x.shape)


class _FusedRepMLPNetUnit(nn.Module):
    """A folded RepMLPNetUnit, with the BatchNorm before its FCs, which scales each channel by its own factor.

    FCs mix pixels, not channels, so that factor is taken behind them: W (s x + t) + b is s W x + base, where
    base (h, w, C) holds t times the sums of W's rows, and b. In int8 it is taken where levels are made.
    """

    def __init__(self, unit: repmlpnet.RepMLPNetUnit, dtype: torch.dtype):
        super().__init__()
        block, ffn = unit.repmlp_block, unit.ffn_block
        scale, shift = scale_and_shift(unit.prebn1)
        self.ffn_fc1 = _packed(ffn.ffn_fc1.conv, dtype, 'gelu', then=ffn.ffn_fc2.conv)
        self.ffn_fc2 = _packed(ffn.ffn_fc2.conv, dtype)
        fold_bn_before(unit.prebn1, block.gp.fc1)
        self.fc1 = _PackedPointwise(block.gp.fc1, dtype, 'relu')
        self.fc2 = _PackedPointwise(block.gp.fc2, dtype)
        self.sets, self.h, self.w = block.S, block.h, block.w
        quantized = isinstance(block.fc3, QuantizedConv2d)
        self.int8 = (_Int8FCs(block, unit.prebn1, dtype)
                     if quantized and self.h * self.w >= LEAST_INT8_PIXELS else None)
        if self.int8:
            return
        fc3 = block.fc3.dequantized() if quantized else block.fc3
        weight = fc3.weight.view(self.sets, self.h * self.w, self.h * self.w)
        sums, bias = weight.double().sum(2), fc3.bias.view(self.sets, -1).double()
        groups = block.C // self.sets
        base = (sums.repeat(groups, 1) * shift[:, None] + bias.repeat(groups, 1)).T.reshape(
            self.h, self.w, block.C)
        self.scale, self.base = scale.to(dtype), base.to(dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight[0].to(dtype)) if self.sets == 1 else None
        self.weight = weight.transpose(1, 2).to(dtype) if self.sets > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3)))).sigmoid()[:, None, None]
        _, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1)
        if self.int8:
            x = torch.addcmul(x, self.int8(x), gate)
        else:
            h_parts, w_parts = height // self.h, width // self.w
            base = self.base if h_parts == w_parts == 1 else self.base.repeat(h_parts, w_parts, 1)
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
