"""RepLKNet, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (CVPR 2022, arXiv 2203.06717).

The whole model in one file, read from top to bottom: the depthwise convolution and how an implementation of it is chosen,
structural re-parameterization, the two kinds of block, the network, its fast form for inference, the registry of named
models, and the reading of their published weights. `python replknet.py` shows that merging the kernels keeps the outputs.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of BatchNorm2d and SyncBatchNorm
from torch.nn.modules.utils import _pair
from torch.utils.checkpoint import checkpoint

from large_kernel_conv import DepthwiseConv2d, FrozenDepthwiseConv2d
from large_kernel_conv.external import external_conv

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------


IntOrPair = int | tuple[int, int]


def get_conv2d(in_channels: int, out_channels: int, kernel_size: IntOrPair, stride: IntOrPair, padding: IntOrPair,
               dilation: IntOrPair, groups: int, bias: bool) -> nn.Conv2d:
    """Build a 2-D convolution; a depthwise one of stride 1 and same padding in the implementation LARGE_KERNEL_CONV_IMPL names.

    The variable is read at each call. Unset or `auto`: large_kernel_conv, the fastest for the tensor at hand. `pytorch`:
    nn.Conv2d. Anything else is the folder of the external CUDA extension, which serves odd kernels larger than 5. Raises
    ImportError where it cannot be had.
    """
    kernel = _pair(kernel_size)
    k = kernel[0]
    same_depthwise = (in_channels == out_channels == groups and kernel == (k, k) and k % 2 == 1
                      and _pair(stride) == (1, 1) and _pair(padding) == (k // 2, k // 2) and _pair(dilation) == (1, 1))
    implementation = os.environ.get('LARGE_KERNEL_CONV_IMPL') or 'auto'
    if same_depthwise and implementation == 'auto':
        return DepthwiseConv2d(in_channels, k, bias)
    if same_depthwise and implementation != 'pytorch' and k > 5:
        # the extension pads k // 2 inside and reports padding (0, 0): nothing may take its padding from it
        return external_conv(implementation, in_channels, k, bias)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1,
            relu: bool = False) -> nn.Sequential:
    """Convolution with padding kernel_size // 2 and no bias, BatchNorm, and ReLU if asked: children conv, bn, nonlinear."""
    block = nn.Sequential()
    block.add_module('conv', get_conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, 1, groups, False))
    block.add_module('bn', nn.BatchNorm2d(out_channels))
    if relu:
        block.add_module('nonlinear', nn.ReLU())
    return block


# ---------------------------------------------------------------------------------------------------------------------
# Folding BatchNorm, merging kernels
# ---------------------------------------------------------------------------------------------------------------------


def _scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The affine map x * scale + shift of a BatchNorm in evaluation, each (C,) in float64; None for Identity."""
    if not isinstance(bn, _BatchNorm):
        return None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def fuse_bn(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the kernel (O, I/groups, K, K) and bias (O,) of the one convolution that equals bn(conv(x)) in evaluation.

    Computed in float64 and rounded once. `bn` may be Identity (folded already).
    """
    kernel = conv.weight.double()
    bias = conv.bias.double() if conv.bias is not None else kernel.new_zeros(len(kernel))
    affine = _scale_and_shift(bn)
    if affine is not None:
        scale, shift = affine
        kernel, bias = kernel * scale.view(-1, 1, 1, 1), bias * scale + shift
    return kernel.to(conv.weight.dtype), bias.to(conv.weight.dtype)


@torch.no_grad()
def _fold_bn_after(block: nn.Sequential) -> None:
    """Fold the BatchNorm of a conv_bn block into its convolution; Identity takes its place."""
    kernel, bias = fuse_bn(block.conv, block.bn)
    block.conv.weight.copy_(kernel)
    block.conv.bias = nn.Parameter(bias)
    block.bn = nn.Identity()


@torch.no_grad()
def _fold_bn_before(bn: nn.Module, linear: nn.Conv2d | nn.Linear) -> None:
    """Fold the BatchNorm that feeds a 1x1 convolution without padding, or a linear layer with bias, into that layer."""
    affine = _scale_and_shift(bn)
    if affine is None:
        return
    scale, shift = affine
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight.flatten(1) @ shift)
    linear.weight.copy_(weight * scale.view(1, -1, *[1] * (weight.dim() - 2)))


class ReparamLargeKernelConv(nn.Module):
    """K x K depthwise convolution trained beside a small one, both with BatchNorm; merge_kernel() makes them one.

    A large kernel alone tends to neglect local structure; the parallel small kernel restores it at no cost in inference,
    since padded with zeros to K x K it adds into the large one (paper, section 3, guideline 3).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int,
                 small_kernel: int | None, small_kernel_merged: bool = False):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        # remembered as ints: a built convolution reports pairs, the external one even padding (0, 0)
        self.kernel_size, self.stride, self.small_kernel = kernel_size, stride, small_kernel
        if small_kernel_merged:
            self.lkb_reparam = self._merged_conv()
            return
        if small_kernel is not None and small_kernel > kernel_size:
            raise ValueError(f'small kernel {small_kernel} does not fit into large kernel {kernel_size}: pass small_kernel=None')
        self.lkb_origin = conv_bn(in_channels, out_channels, kernel_size, stride, groups)
        if small_kernel is not None:
            self.small_conv = conv_bn(in_channels, out_channels, small_kernel, stride, groups)

    def _merged_conv(self) -> nn.Conv2d:
        return get_conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.kernel_size // 2, 1,
                          self.groups, True)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, 'lkb_reparam'):
            return self.lkb_reparam(x)
        out = self.lkb_origin(x)
        if hasattr(self, 'small_conv'):
            out = out + self.small_conv(x)
        return out

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Return the kernel (C, 1, K, K) and bias (C,) of the one convolution that equals this module in evaluation."""
        if hasattr(self, 'lkb_reparam'):
            return self.lkb_reparam.weight, self.lkb_reparam.bias
        kernel, bias = fuse_bn(self.lkb_origin.conv, self.lkb_origin.bn)
        if hasattr(self, 'small_conv'):
            small_kernel, small_bias = fuse_bn(self.small_conv.conv, self.small_conv.bn)
            kernel = kernel + F.pad(small_kernel, [(self.kernel_size - self.small_kernel) // 2] * 4)
            bias = bias + small_bias
        return kernel, bias

    @torch.no_grad()
    def merge_kernel(self) -> None:
        """Replace the branches by one convolution, `lkb_reparam`. Does nothing where that has been done."""
        if hasattr(self, 'lkb_reparam'):
            return
        kernel, bias = self.get_equivalent_kernel_bias()
        with torch.device('meta'):  # initial values would be drawn from the global generator
            merged = self._merged_conv()
        merged = merged.to_empty(device=kernel.device).to(kernel.dtype)
        merged.requires_grad_(self.lkb_origin.conv.weight.requires_grad)
        merged.weight.copy_(kernel)
        merged.bias.copy_(bias)
        self.lkb_reparam = merged
        del self.lkb_origin
        if hasattr(self, 'small_conv'):
            del self.small_conv


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and stages
# ---------------------------------------------------------------------------------------------------------------------


class RepLKBlock(nn.Module):
    """BN, 1x1, large depthwise kernel, 1x1, with a shortcut: (N, C, H, W) to the same shape."""

    def __init__(self, in_channels: int, dw_channels: int, block_lk_size: int, small_kernel: int | None, drop_path: float,
                 small_kernel_merged: bool = False):
        super().__init__()
        self.pw1 = conv_bn(in_channels, dw_channels, 1, relu=True)
        self.pw2 = conv_bn(dw_channels, in_channels, 1)
        self.large_kernel = ReparamLargeKernelConv(dw_channels, dw_channels, block_lk_size, 1, dw_channels, small_kernel,
                                                   small_kernel_merged)
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(in_channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.prelkb_bn(x))
        out = self.lk_nonlinear(self.large_kernel(out))
        return x + self.drop_path(self.pw2(out))


class ConvFFN(nn.Module):
    """BN, 1x1 to internal_channels, GELU, 1x1 back, with a shortcut: (N, C, H, W) to the same shape."""

    def __init__(self, in_channels: int, internal_channels: int, out_channels: int, drop_path: float):
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.preffn_bn = nn.BatchNorm2d(in_channels)
        self.pw1 = conv_bn(in_channels, internal_channels, 1)
        self.pw2 = conv_bn(internal_channels, out_channels, 1)
        self.nonlinear = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x))))
        return x + self.drop_path(out)


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of every BatchNorm in `module` as they are, in training mode too."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(bn.momentum, bn.num_batches_tracked) for bn in layers]
    for bn in layers:
        bn.momentum, bn.num_batches_tracked = 0.0, bn.num_batches_tracked.clone()  # a count to throw away
    try:
        yield
    finally:
        for bn, (momentum, count) in zip(layers, before, strict=True):
            bn.momentum, bn.num_batches_tracked = momentum, count


def _checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), storing only x for the backward pass, which runs the module again."""
    if torch.jit.is_tracing():
        return module(x)
    # the second run must not move the BatchNorm statistics a second time
    return checkpoint(module, x, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(module)))


class RepLKNetStage(nn.Module):
    """num_blocks times RepLKBlock and ConvFFN; `drop_path` is one rate, or one for each of the num_blocks pairs.

    `norm` serves whoever takes this stage's map as a feature; it does not stand on the way to the next stage.
    """

    def __init__(self, channels: int, num_blocks: int, stage_lk_size: int, drop_path: float | Sequence[float],
                 small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4, use_checkpoint: bool = False,
                 small_kernel_merged: bool = False, norm_intermediate_features: bool = False):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        rates = [drop_path] * num_blocks if isinstance(drop_path, (int, float)) else drop_path
        if len(rates) != num_blocks:
            raise ValueError(f'{len(rates)} drop path rates for {num_blocks} blocks')
        blocks = []
        for rate in rates:
            blocks.append(RepLKBlock(channels, int(channels * dw_ratio), stage_lk_size, small_kernel, rate,
                                     small_kernel_merged))
            blocks.append(ConvFFN(channels, int(channels * ffn_ratio), channels, rate))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(channels) if norm_intermediate_features else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _checkpointed(block, x) if self.use_checkpoint and torch.is_grad_enabled() else block(x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


class RepLKNet(nn.Module):
    """A stem of stride 4 and one stage for each large kernel size, the transitions between them of stride 2.

    large_kernel_sizes, layers (numbers of RepLKBlock + ConvFFN pairs) and channels have one entry a stage. Drop path grows
    linearly over the pairs up to drop_path_rate. small_kernel: side of the parallel kernels, None for none.
    num_classes None: no final norm and no head. out_indices: stages whose maps forward() returns instead of logits,
    through a BatchNorm each with norm_intermediate_features. use_checkpoint: activation checkpointing, less memory for a
    second forward pass. small_kernel_merged: built as structural_reparam() leaves it. use_sync_bn: SyncBatchNorm in
    this model, which needs GPUs once torch.distributed is initialized.
    """

    def __init__(self, large_kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int],
                 drop_path_rate: float, small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4,
                 in_channels: int = 3, num_classes: int | None = 1000, out_indices: Iterable[int] | None = None,
                 use_checkpoint: bool = False, small_kernel_merged: bool = False, use_sync_bn: bool = True,
                 norm_intermediate_features: bool = False):
        super().__init__()
        stages = len(layers)
        if not len(large_kernel_sizes) == stages == len(channels):
            raise ValueError(f'one entry a stage is needed, not {len(large_kernel_sizes)} kernel sizes, {stages} layers, '
                             f'{len(channels)} channels')
        self.out_indices = None if out_indices is None else tuple(out_indices)
        if self.out_indices is not None and not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f'out_indices {self.out_indices} must lie in 0 ... {stages - 1}')
        self.use_checkpoint = use_checkpoint

        base = channels[0]
        self.stem = nn.ModuleList([
            conv_bn(in_channels, base, 3, stride=2, relu=True),
            conv_bn(base, base, 3, groups=base, relu=True),
            conv_bn(base, base, 1, relu=True),
            conv_bn(base, base, 3, stride=2, groups=base, relu=True),
        ])
        # plain Python numbers: tensor.item() would fail under torch.device('meta')
        rates = [drop_path_rate * i / max(sum(layers) - 1, 1) for i in range(sum(layers))]
        self.stages = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i in range(stages):
            first = sum(layers[:i])
            self.stages.append(RepLKNetStage(channels[i], layers[i], large_kernel_sizes[i], rates[first:first + layers[i]],
                                             small_kernel, dw_ratio, ffn_ratio, use_checkpoint, small_kernel_merged,
                                             norm_intermediate_features))
            if i < stages - 1:
                self.transitions.append(nn.Sequential(
                    conv_bn(channels[i], channels[i + 1], 1, relu=True),
                    conv_bn(channels[i + 1], channels[i + 1], 3, stride=2, groups=channels[i + 1], relu=True),
                ))
        if num_classes is not None:
            self.norm = nn.BatchNorm2d(channels[-1])
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(channels[-1], num_classes)
        if use_sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def forward_features(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to the last stage's map (N, C, H/32, W/32), or to a tuple of the out_indices' maps."""
        x = self.stem[0](x)
        for layer in self.stem[1:]:
            x = _checkpointed(layer, x) if self.use_checkpoint and torch.is_grad_enabled() else layer(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.out_indices is not None and i in self.out_indices:
                maps.append(stage.norm(x))
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return x if self.out_indices is None else tuple(maps)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to logits (N, num_classes), or to what forward_features gives where there is no head."""
        x = self.forward_features(x)
        if self.out_indices is not None or not hasattr(self, 'head'):
            return x
        return self.head(torch.flatten(self.avgpool(self.norm(x)), 1))

    def structural_reparam(self) -> None:
        """Merge every small kernel into its large one, in place; evaluation gives the same outputs to float32 rounding.

        May be called twice, before or after deep_fuse_BN(). Equal only to the model in .eval(): in training BatchNorm
        normalises by the batch.
        """
        for module in self.modules():
            if isinstance(module, ReparamLargeKernelConv):
                module.merge_kernel()

    def deep_fuse_BN(self) -> None:
        """Fold every BatchNorm into the layer before it or, where it stands first, into the 1x1 or linear layer after it.

        In place; evaluation gives the same outputs to float32 rounding; for inference only. A classification model keeps
        no BatchNorm. A backbone keeps the norms of its returned maps, which have no layer of ours to fold into.
        """
        for module in self.modules():
            if isinstance(module, nn.Sequential) and hasattr(module, 'bn'):
                _fold_bn_after(module)
        for module in self.modules():
            if isinstance(module, RepLKBlock):
                _fold_bn_before(module.prelkb_bn, module.pw1.conv)
                module.prelkb_bn = nn.Identity()
            elif isinstance(module, ConvFFN):
                _fold_bn_before(module.preffn_bn, module.pw1.conv)
                module.preffn_bn = nn.Identity()
        if hasattr(self, 'head'):
            _fold_bn_before(self.norm, self.head)  # the pooling between them commutes with an affine map
            self.norm = nn.Identity()


# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # called in inference mode it would make tensors without versions, of which nothing is kept
def compile_for_inference(model: RepLKNet, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the fastest form of `model` for inference in `dtype`; `model` itself stays as it is.

    Kernels are merged, every BatchNorm is folded, and activations computed in dtype (float32 or bfloat16); logits, or a
    backbone's maps, are float32. Takes and returns what the model does, any batch and image size, without gradients.
    On CPUs each convolution becomes one fused oneDNN call with weights packed beforehand; on GPUs torch.compile is used.
    What is returned stays as it is: it cannot be moved, copied, saved or exported, nor asked for its parameters and state dict,
    most weights being packed: the original model can. Raises ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'dtype must be torch.float32 or torch.bfloat16, not {dtype}')
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.structural_reparam()
    model.deep_fuse_BN()
    if next(model.parameters()).device.type != 'cpu':
        return _Inference(torch.compile(model.to(dtype=dtype, memory_format=torch.channels_last)), dtype, math.inf)
    if not _onednn_computes(dtype):
        return _Inference(model.to(dtype=dtype, memory_format=torch.channels_last), dtype, math.inf)
    hidden_channels = model.stages[0].blocks[1].pw1.conv.out_channels
    model.stem = nn.ModuleList(_FusedLayer(layer.conv, dtype) for layer in model.stem)
    for stage in model.stages:
        stage.blocks = nn.ModuleList(_FusedBlock(block, dtype) for block in stage.blocks)
    model.transitions = nn.ModuleList(nn.Sequential(*(_FusedLayer(layer.conv, dtype) for layer in transition))
                                      for transition in model.transitions)
    if hasattr(model, 'head'):
        model.head.to(dtype)
    # Slices of a batch keep the largest map, the hidden one of the first ConvFFN, in the cache; and glibc would fetch memory
    # anew from the system for every buffer above 32 MiB, which cost a fifth of the time at batch 16.
    return _Inference(model, dtype, (13 << 20) / (hidden_channels / 16 * dtype.itemsize))


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
        x = x.to(self.dtype, memory_format=torch.channels_last)
        images = max(1, int(min(len(x), self.pixels / (x.shape[2] * x.shape[3]))))
        with torch.autocast(x.device.type, enabled=False):
            parts = [self.model(part) for part in x.split(images)]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(maps).float() for maps in zip(*parts, strict=True))
        return torch.cat(parts).float()

    def train(self, mode: bool = True) -> nn.Module:
        return self  # stays in evaluation

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError('a model compiled for inference cannot be moved, copied or saved: compile the original model again '
                        '(only the original has parameters and a state dict: here most weights are packed)')

    _apply = __reduce_ex__ = state_dict = load_state_dict = named_parameters = named_buffers = _refuse


class _PackedPointwise:
    """A 1x1 convolution with bias on the pixels of a map, and what follows it: an activation, or the shortcut's addition.

    As a matrix product of the (N * H * W, C) view that a channels_last map has. Its weight is packed once, in a layout that
    depends neither on the number of pixels nor on what follows. A convolution's does: packed for a plain one, the weight was
    reordered in each call with a shortcut (4096 to 1024 channels at 7 x 7: 105 ms instead of 1.5).
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, activation: str = 'none'):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(conv.weight.flatten(1).to(dtype))
        self.bias, self.activation = conv.bias.to(dtype), activation
        self.algorithm = 'none' if activation == 'gelu' else ''  # of the GELU: by erf, not by tanh

    def __call__(self, pixels: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(pixels, shortcut, self.weight, self.bias, 'add')
        return torch.ops.mkldnn._linear_pointwise(pixels, self.weight, self.bias, self.activation, [], self.algorithm)


def _pixels(x: Tensor) -> Tensor:
    """The view (N * H * W, C) of a channels_last map (N, C, H, W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(pixels: Tensor, like: Tensor) -> Tensor:
    """The channels_last map of pixels (N * H * W, C), with N, H and W of `like`."""
    n, _, h, w = like.shape
    return pixels.view(n, h, w, pixels.shape[1]).permute(0, 3, 1, 2)


class _FusedBlock(nn.Module):
    """A folded RepLKBlock or ConvFFN."""

    def __init__(self, block: RepLKBlock | ConvFFN, dtype: torch.dtype):
        super().__init__()
        large = isinstance(block, RepLKBlock)
        self.pw1 = _PackedPointwise(block.pw1.conv, dtype, 'relu' if large else 'gelu')
        self.pw2 = _PackedPointwise(block.pw2.conv, dtype)
        self.large_kernel = None
        if large:
            conv = block.large_kernel.lkb_reparam
            self.large_kernel = (FrozenDepthwiseConv2d(conv, relu=True) if isinstance(conv, DepthwiseConv2d)
                                 else nn.Sequential(conv.to(dtype), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = _pixels(x)
        hidden = self.pw1(shortcut)
        if self.large_kernel is not None:
            hidden = _pixels(self.large_kernel(_map(hidden, x)))
        return _map(self.pw2(hidden, shortcut), x)


class _FusedLayer(nn.Module):
    """A folded convolution with its ReLU."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.packed = _PackedPointwise(conv, dtype, 'relu') if conv.kernel_size == (1, 1) else None
        self.conv, self.bias = conv, conv.bias.to(dtype)
        self.weight = conv.weight.to(dtype, memory_format=torch.channels_last)  # small: oneDNN may reorder it in each call

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return _map(self.packed(_pixels(x)), x)
        conv = self.conv
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, conv.padding, conv.stride, conv.dilation,
                                                       conv.groups, 'relu', [], '')


# ---------------------------------------------------------------------------------------------------------------------
# The models by name
# ---------------------------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # mean and std of RepLKNet-XL: pixels become -1 ... 1


@dataclass(frozen=True)
class ModelConfig:
    """A named model: its shape, the pre-processing its published weights expect, and where it comes from."""
    kernels: tuple[int, ...]
    channels: tuple[int, ...]
    source: str
    layers: tuple[int, ...] = (2, 2, 18, 2)
    small_kernel: int | None = 5
    dw_ratio: float = 1
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    input_size: int = 224  # pixels a side of the published weights; of the smallest where there are several


BASE = (128, 256, 512, 1024)  # channels of 31B and of Table 5
TABLE_5 = 'paper, Table 5: ImageNet-1K, 120 epochs, 224 px'
MODELS = {
    'RepLKNet-31B': ModelConfig((31, 29, 27, 13), BASE, 'published: ImageNet-1K and 22K-to-1K, 224 and 384 px'),
    'RepLKNet-31L': ModelConfig((31, 29, 27, 13), (192, 384, 768, 1536), 'published: ImageNet-22K-to-1K, 384 px',
                                input_size=384),
    'RepLKNet-XL': ModelConfig((27, 27, 27, 13), (256, 512, 1024, 2048), 'published: MegData73M-to-1K, 320 px',
                               small_kernel=None, dw_ratio=1.5, mean=HALF, std=HALF, input_size=320),
    'RepLKNet-3': ModelConfig((3, 3, 3, 3), BASE, TABLE_5, small_kernel=None),
    'RepLKNet-7': ModelConfig((7, 7, 7, 7), BASE, TABLE_5),
    'RepLKNet-13': ModelConfig((13, 13, 13, 13), BASE, TABLE_5),
    'RepLKNet-25': ModelConfig((25, 25, 25, 13), BASE, TABLE_5),
    'RepLKNet-31T': ModelConfig((31, 29, 27, 13), (16, 32, 64, 128), 'a toy of this repository, for demonstrations and tests',
                                layers=(1, 1, 2, 1), input_size=32),
}


def create_model(name: str, drop_path_rate: float = 0.0, **kwargs) -> RepLKNet:
    """Build the registry's model `name` with random weights; further keywords go to RepLKNet. ValueError if unknown."""
    if name not in MODELS:
        raise ValueError(f'unknown model {name!r}: choose one of {", ".join(MODELS)}')
    config = MODELS[name]
    options = {'small_kernel': config.small_kernel, 'dw_ratio': config.dw_ratio, **kwargs}
    return RepLKNet(config.kernels, config.layers, config.channels, drop_path_rate, **options)


def create_RepLKNet31B(drop_path_rate: float = 0.3, num_classes: int | None = 1000, use_checkpoint: bool = True,
                       small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-31B: 79.9M parameters, 15.4 GMACs at 224 px (merged)."""
    return create_model('RepLKNet-31B', drop_path_rate, num_classes=num_classes, use_checkpoint=use_checkpoint,
                        small_kernel_merged=small_kernel_merged, **kwargs)


def create_RepLKNet31L(drop_path_rate: float = 0.3, num_classes: int | None = 1000, use_checkpoint: bool = True,
                       small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-31L: 172.7M parameters, 96.0 GMACs at 384 px (merged)."""
    return create_model('RepLKNet-31L', drop_path_rate, num_classes=num_classes, use_checkpoint=use_checkpoint,
                        small_kernel_merged=small_kernel_merged, **kwargs)


def create_RepLKNetXL(drop_path_rate: float = 0.3, num_classes: int | None = 1000, use_checkpoint: bool = True,
                      small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-XL: 335.4M parameters, 128.7 GMACs at 320 px."""
    return create_model('RepLKNet-XL', drop_path_rate, num_classes=num_classes, use_checkpoint=use_checkpoint,
                        small_kernel_merged=small_kernel_merged, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights
# ---------------------------------------------------------------------------------------------------------------------

# What published training checkpoints hold beside tensors: a Namespace of options, paths, NumPy scalars (as NumPy 1 and 2
# name them). All are inert; anything else is refused.
CHECKPOINT_TYPES = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, (pathlib.PosixPath, 'pathlib._local.PosixPath'),
    np._core.multiarray.scalar, (np._core.multiarray.scalar, 'numpy.core.multiarray.scalar'), np.dtype,
    *{type(np.dtype(kind)) for kind in 'bhilqBHILQefdU?'},
]


def is_url(path_or_url: str | os.PathLike) -> bool:
    return str(path_or_url).startswith(('http://', 'https://'))


def read_checkpoint(path_or_url: str | os.PathLike, mmap: bool = False) -> object:
    """Return what a checkpoint file holds, its tensors on the CPU, without ever running code from it.

    A safetensors file, known by its first bytes, is returned as {'model': its tensors, 'metadata': its texts, read as JSON}.
    URLs (http, https) are downloaded once, into torch.hub's folder. mmap: tensors are the file's pages, which processes share,
    as long as it is there; of an older format they are read all the same. Raises FileNotFoundError for a missing file and
    ValueError for one that is truncated, no checkpoint, larger than the memory, or holds objects that could run code.
    """
    url = str(path_or_url) if is_url(path_or_url) else None
    path = download(url) if url else pathlib.Path(path_or_url)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    try:
        if _first_bytes(path)[8:9] == b'{':  # eight bytes of length, then JSON
            return _read_safetensors(path)
        # of what is allowed already nothing may be listed: the context takes all it lists away again
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in CHECKPOINT_TYPES if kind not in allowed]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap and _can_be_mapped(path))
    except Exception as error:  # torch raises half a dozen types here
        if isinstance(error, MemoryError) or 'allocate memory' in str(error):  # torch's own is a RuntimeError
            raise ValueError(f'there is not enough memory to read {path} ({path.stat().st_size / 2 ** 20:.0f} MiB)') from error
        # torch's own text is not passed on: it advises to load the file without weights_only, which would run its code
        forbidden = re.search(r'GLOBAL (\S+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            message = f'{path} is refused: beside tensors, numbers and strings it holds {forbidden[1]}, which could run code'
        elif isinstance(error, OSError):
            message = f'{path} cannot be read: {error}'
        elif _first_bytes(path).lstrip().startswith(b'<'):
            message = f'{path} cannot be read as a checkpoint: it is a web page, so download the file by hand'
        else:
            message = f'{path} cannot be read as a checkpoint: it is truncated, or of another format ({type(error).__name__})'
        if url:
            path.unlink(missing_ok=True)  # else the next call would find it again
        raise ValueError(message) from error


def _can_be_mapped(path: pathlib.Path) -> bool:
    """Whether torch can map the file: one of its newer format, with a name in UTF-8."""
    with contextlib.suppress(UnicodeEncodeError):
        str(path).encode()
        return zipfile.is_zipfile(path)
    return False


def _first_bytes(path: pathlib.Path) -> bytes:
    with path.open('rb') as file:
        return file.read(64)


def _read_safetensors(path: pathlib.Path) -> dict:
    with safetensors.safe_open(path, framework='pt') as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    for key, text in metadata.items():
        with contextlib.suppress(ValueError):  # texts that are no JSON stay as they are
            metadata[key] = json.loads(text)
    return {'model': tensors, 'metadata': metadata}


def download(url: str) -> pathlib.Path:
    """The file that holds the content of `url`, downloaded if this is the first time."""
    folder = pathlib.Path(torch.hub.get_dir(), 'checkpoints')
    folder.mkdir(parents=True, exist_ok=True)
    # two URLs may end in the same file name
    file = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{pathlib.PurePosixPath(url.split("?")[0]).name}'
    if not file.exists():
        try:
            torch.hub.download_url_to_file(url, str(file))
        except OSError as error:
            raise ValueError(f'{url} cannot be downloaded ({error}): download it by hand and pass the file') from error
    return file


def load_weights(path_or_url: str | os.PathLike, model_key: str = 'model|module', prefix: str = '') -> dict[str, Tensor]:
    """Return the plain state dict in a checkpoint, with this repository's keys and tensors on the CPU.

    Reads bare state dicts; dicts that hold one under a key of `model_key` (tried in order) or under `state_dict`; safetensors
    files; keys that DistributedDataParallel or torch.compile wrapped (`module.`, `_orig_mod.`); mmpretrain's RepLKNet files.
    `prefix` keeps the keys that begin with it, without it. Raises what read_checkpoint raises, and ValueError where no state
    dict is found.
    """
    return state_dict_of(read_checkpoint(path_or_url), path_or_url, model_key, prefix)


def state_dict_of(checkpoint: object, source: str | os.PathLike, model_key: str = 'model|module',
                  prefix: str = '') -> dict[str, Tensor]:
    """load_weights for a checkpoint that was read already; `source` names it in errors."""
    state = checkpoint
    if not _is_state_dict(state):
        keys = [key for key in [*model_key.split('|'), 'state_dict'] if isinstance(checkpoint, dict) and key in checkpoint]
        state = checkpoint[keys[0]] if keys else None
    if not _is_state_dict(state):
        held = (', '.join(map(str, [*checkpoint][:6])) + (' ...' if len(checkpoint) > 6 else '') if isinstance(checkpoint, dict)
                else type(checkpoint).__name__)
        raise ValueError(f'{source} has no state dict under {model_key} or state_dict: it holds {held or "nothing"}')
    while wrapper := _wrapper_of(state):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not state:
        raise ValueError(f'{source} has no key that begins with {prefix!r}')
    if 'head.fc.weight' in state and 'backbone.stem.0.conv.weight' in state:
        state = {_from_mmpretrain(key): value for key, value in state.items()}
    return state


def _wrapper_of(state: dict[str, Tensor]) -> str:
    """What DistributedDataParallel or torch.compile put before every key, the outer one first; '' for nothing."""
    return next((wrapper for wrapper in ('module.', '_orig_mod.') if all(key.startswith(wrapper) for key in state)), '')


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _from_mmpretrain(key: str) -> str:
    """mmpretrain's key in ours: its classifier keeps the final norm in the last stage, the head's linear layer in head.fc."""
    for theirs, ours in (('backbone.stages.3.norm.', 'norm.'), ('head.fc.', 'head.'), ('backbone.', '')):
        if key.startswith(theirs):
            return ours + key[len(theirs):]
    return key


def load_state(model: RepLKNet, state: dict[str, Tensor], source: str | os.PathLike, new_head: bool = False) -> bool:
    """Load a plain state dict into the model; every key and shape must fit, but for the head where `new_head`.

    A backbone takes a classifier's weights too: their head and final norm are left out, and the norms of its maps, which they
    lack, stay as they are. A warning says so.
    Returns whether the model's own head was kept because the file's does not fit. Raises ValueError, which lists what does
    not fit, before any weight is loaded. Merged kernels in `state` merge the model's first, and folded BatchNorms fold the
    model's, even where the rest then does not fit.
    """
    _take_form(model, state)
    own = model.state_dict()
    kept = set()
    if new_head:
        kept = {key for key in own if key.startswith('head.')}
        if all(key in state and state[key].shape == own[key].shape for key in kept):
            kept = set()
        state = {key: value for key, value in state.items() if key not in kept}
    left_out, fresh = _classifier_and_backbone(model, state, own)
    counters = {key for key in own if key.endswith('.num_batches_tracked')}  # old files lack them, and other projects'
    problems = {
        'missing': [key for key in own if key not in state and key not in (*kept, *fresh, *counters)],
        'unexpected': [key for key in state if key not in own and key not in left_out],
        'of another shape': [f'{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}' for key in own
                             if key in state and state[key].shape != own[key].shape],
    }
    if any(problems.values()):
        told = '; '.join(f'{len(keys)} {kind}: {", ".join(keys[:6])}{" ..." if len(keys) > 6 else ""}'
                         for kind, keys in problems.items() if keys)
        raise ValueError(f'{source} does not fit the model. {told}')
    model.load_state_dict({key: value for key, value in state.items() if key not in left_out}, strict=False)
    for told, keys in (('a backbone has no classifier, left out:', left_out), ('a classifier has no norms of maps, new:', fresh)):
        if keys:
            modules = dict.fromkeys(key.rpartition('.')[0] for key in keys)
            warnings.warn(f'{source}: {told} {", ".join(modules)}', stacklevel=2)
    return bool(kept)


def _classifier_and_backbone(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """What of a classifier's `state` a backbone has no place for, and what of the model's `own` no classifier has."""
    if not isinstance(model, RepLKNet):
        return [], []
    head = [] if hasattr(model, 'head') else [key for key in state if key.startswith(('head.', 'norm.'))]
    norms = [key for key in own if re.match(r'stages\.\d+\.norm\.', key)]
    return head, [] if any(key in state for key in norms) else norms


def _take_form(model: RepLKNet, state: dict[str, Tensor]) -> None:
    """Merge the model's kernels, and fold its BatchNorms, if those of `state` are; leave models of other kinds as they are."""
    if not isinstance(model, RepLKNet):
        return
    if any(key.endswith('.lkb_reparam.weight') for key in state):
        model.structural_reparam()
    if is_folded(state):
        model.deep_fuse_BN()


def is_folded(state: dict[str, Tensor]) -> bool:
    """Whether a plain state dict is that of a model after deep_fuse_BN(): for inference only."""
    return 'stem.0.conv.bias' in state  # which stands for the BatchNorm


def model_for(name: str, state: dict[str, Tensor], source: str | os.PathLike) -> RepLKNet:
    """Build the registry's model `name` with these weights: their classes, merged and folded as they are, in evaluation mode.

    Weights without a head make a backbone. Raises ValueError where they do not fit, and names the model that they are of.
    """
    with torch.device('meta'):  # without values, which are the state's: merging and folding random ones would take seconds
        model = create_model(name, num_classes=_classes(state), use_sync_bn=False)
        _take_form(model, state)
    model.to_empty(device='cpu').eval()
    try:
        load_state(model, state, source)
    except ValueError as error:
        other = name_of(state)
        raise ValueError(f'{source} holds weights of {other}, not of {name}' if other else f'{error} ({name})') from error
    return model


def name_of(state: dict[str, Tensor]) -> str | None:
    """The registry's name of the model with these keys and shapes, its number of classes aside; None where none has them."""
    for name, config in MODELS.items():
        if 'stem.0.conv.weight' not in state or state['stem.0.conv.weight'].shape[:1] != (config.channels[0],):
            continue
        with torch.device('meta'):
            model = create_model(name, num_classes=_classes(state), use_sync_bn=False)
            _take_form(model, state)
        if {key: value.shape for key, value in model.state_dict().items()} == {key: v.shape for key, v in state.items()}:
            return name
    return None


def _classes(state: dict[str, Tensor]) -> int | None:
    return len(state['head.weight']) if 'head.weight' in state and state['head.weight'].dim() else None


def show_equivalence() -> None:
    """Merge a RepLKNet-31B with random weights and statistics, fold its BatchNorms, and print what that does to the logits."""
    torch.manual_seed(0)
    model = create_model('RepLKNet-31B', use_sync_bn=False).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.1)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        before = model(x)
        for step in (model.structural_reparam, model.deep_fuse_BN):
            step()
            difference = (model(x) - before).abs().max() / before.abs().max()
            print(f'{step.__name__:18} largest difference of the logits {difference:.1e} of the largest logit')


if __name__ == '__main__':
    show_equivalence()
