"""RepLKNet, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (arXiv 2203.06717).

The whole model, read from top to bottom: the convolution and how its implementation is chosen, structural
re-parameterization, the two kinds of block, the network, the three published sizes. `python replknet.py`
shows that merging the kernels keeps the outputs. Weights, named models and the fast form for inference are in
replknet_zoo/.
"""
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of BatchNorm2d and SyncBatchNorm
from torch.nn.modules.utils import _pair
from torch.utils.checkpoint import checkpoint

from large_kernel_conv import depthwise_layer
from large_kernel_conv.batch_norm import scale_and_shift

IntOrPair = int | tuple[int, int]


def get_conv2d(in_channels: int, out_channels: int, kernel_size: IntOrPair, stride: IntOrPair,
               padding: IntOrPair, dilation: IntOrPair, groups: int, bias: bool,
               implementation: str | None = None) -> nn.Conv2d:
    """Build a 2-D convolution; a depthwise one of stride 1 and same padding by large_kernel_conv.

    implementation: depthwise_layer's, None being what the environment variable LARGE_KERNEL_CONV_IMPL says.
    """
    kernel = _pair(kernel_size)
    k = kernel[0]
    same_depthwise = (in_channels == out_channels == groups and kernel == (k, k) and k % 2 == 1
                      and _pair(stride) == (1, 1) and _pair(padding) == (k // 2, k // 2)
                      and _pair(dilation) == (1, 1))
    if same_depthwise:
        return depthwise_layer(in_channels, k, bias, implementation)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


class ConvBN(nn.Sequential):
    """Convolution of same padding without bias, BatchNorm, ReLU if asked: children conv, bn, nonlinear."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 groups: int = 1, relu: bool = False, implementation: str | None = None):
        super().__init__()
        self.conv = get_conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, 1, groups,
                               False, implementation)
        self.bn = nn.BatchNorm2d(out_channels)
        if relu:
            self.nonlinear = nn.ReLU()


# ---- Folding BatchNorm, merging kernels --------------------------------------------------------------------

def fuse_bn(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Kernel (O, I/groups, K, K) and bias (O,) of the one convolution that equals bn(conv(x)) in evaluation.

    Computed in float64 and rounded once. `bn` may be Identity (folded already).
    """
    kernel = conv.weight.double()
    bias = conv.bias.double() if conv.bias is not None else kernel.new_zeros(len(kernel))
    affine = scale_and_shift(bn)
    if affine is not None:
        scale, shift = affine
        kernel, bias = kernel * scale.view(-1, 1, 1, 1), bias * scale + shift
    return kernel.to(conv.weight.dtype), bias.to(conv.weight.dtype)


@torch.no_grad()
def fold_bn_after(block: ConvBN) -> None:
    """Fold the BatchNorm of a ConvBN into its convolution; Identity takes its place. No-op where it has."""
    if isinstance(block.bn, nn.Identity):
        return
    kernel, bias = fuse_bn(block.conv, block.bn)
    block.conv.weight.copy_(kernel)
    block.conv.bias = nn.Parameter(bias)
    block.bn = nn.Identity()


@torch.no_grad()
def fold_bn_before(bn: nn.Module, linear: nn.Conv2d | nn.Linear) -> None:
    """Fold the BatchNorm that feeds a 1x1 convolution or a linear layer, with bias, into that layer."""
    affine = scale_and_shift(bn)
    if affine is None:
        return
    scale, shift = affine
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight.flatten(1) @ shift)
    linear.weight.copy_(weight * scale.view(1, -1, *[1] * (weight.dim() - 2)))


class ReparamLargeKernelConv(nn.Module):
    """K x K depthwise convolution trained beside a small one, with BatchNorms; merge_kernel() makes them one.

    A large kernel alone tends to neglect local structure; the parallel small kernel restores it at no cost in
    inference, since padded with zeros to K x K it adds into the large one (paper, section 3, guideline 3).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int,
                 small_kernel: int | None, small_kernel_merged: bool = False,
                 implementation: str | None = None):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        # remembered as ints: a built convolution reports pairs, the external one even padding (0, 0)
        self.kernel_size, self.stride, self.small_kernel = kernel_size, stride, small_kernel
        self.implementation = implementation
        if small_kernel_merged:
            self.lkb_reparam = self._merged_conv()
            return
        if small_kernel is not None and small_kernel > kernel_size:
            raise ValueError(f'small kernel {small_kernel} does not fit into large kernel {kernel_size}: '
                             'pass small_kernel=None')
        channels = in_channels, out_channels
        self.lkb_origin = ConvBN(*channels, kernel_size, stride, groups, False, implementation)
        if small_kernel is not None:
            self.small_conv = ConvBN(*channels, small_kernel, stride, groups, False, implementation)

    def _merged_conv(self) -> nn.Conv2d:
        return get_conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride,
                          self.kernel_size // 2, 1, self.groups, True, self.implementation)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, 'lkb_reparam'):
            return self.lkb_reparam(x)
        out = self.lkb_origin(x)
        return out + self.small_conv(x) if hasattr(self, 'small_conv') else out

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, K, K) and bias (C,) of the convolution that equals this module in evaluation."""
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

    reparameterize = merge_kernel  # the name that other projects' tools look for


# ---- Blocks and stages -------------------------------------------------------------------------------------

class DropPath(nn.Module):
    """In training, zero an image's branch (N, C, H, W) with probability `rate`, and scale the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class RepLKBlock(nn.Module):
    """BN, 1x1, large depthwise kernel, 1x1, with a shortcut: (N, C, H, W) to the same shape."""

    def __init__(self, in_channels: int, dw_channels: int, block_lk_size: int, small_kernel: int | None,
                 drop_path: float, small_kernel_merged: bool = False, implementation: str | None = None):
        super().__init__()
        self.pw1 = ConvBN(in_channels, dw_channels, 1, relu=True)
        self.pw2 = ConvBN(dw_channels, in_channels, 1)
        self.large_kernel = ReparamLargeKernelConv(dw_channels, dw_channels, block_lk_size, 1, dw_channels,
                                                   small_kernel, small_kernel_merged, implementation)
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(in_channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.prelkb_bn(x))
        out = self.lk_nonlinear(self.large_kernel(out))
        return x + self.drop_path(self.pw2(out))


class ConvFFN(nn.Module):
    """BN, 1x1 to internal_channels, GELU, 1x1 back, with a shortcut: (N, C, H, W) to the same shape."""

    def __init__(self, in_channels: int, internal_channels: int, out_channels: int, drop_path: float):
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.preffn_bn = nn.BatchNorm2d(in_channels)
        self.pw1 = ConvBN(in_channels, internal_channels, 1)
        self.pw2 = ConvBN(internal_channels, out_channels, 1)
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


def checkpointed(module: nn.Module, x: Tensor, enabled: bool) -> Tensor:
    """module(x); where `enabled`, only x is stored for the backward pass, which runs the module again."""
    if not enabled or not torch.is_grad_enabled() or torch.jit.is_tracing():
        return module(x)
    # the second run must not move the BatchNorm statistics a second time
    return checkpoint(module, x, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(module)))


class RepLKNetStage(nn.Module):
    """num_blocks times RepLKBlock and ConvFFN; `drop_path` is one rate, or one for each of these pairs.

    `norm` serves whoever takes this stage's map as a feature; it does not stand on the way to the next stage.
    """

    def __init__(self, channels: int, num_blocks: int, stage_lk_size: int, drop_path: float | Sequence[float],
                 small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4,
                 use_checkpoint: bool = False, small_kernel_merged: bool = False,
                 norm_intermediate_features: bool = False, implementation: str | None = None):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        rates = [drop_path] * num_blocks if isinstance(drop_path, (int, float)) else drop_path
        if len(rates) != num_blocks:
            raise ValueError(f'{len(rates)} drop path rates for {num_blocks} blocks')
        blocks = []
        for rate in rates:
            blocks.append(RepLKBlock(channels, int(channels * dw_ratio), stage_lk_size, small_kernel, rate,
                                     small_kernel_merged, implementation))
            blocks.append(ConvFFN(channels, int(channels * ffn_ratio), channels, rate))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(channels) if norm_intermediate_features else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpointed(block, x, self.use_checkpoint)
        return x


# ---- The network -------------------------------------------------------------------------------------------

class RepLKNet(nn.Module):
    """A stem of stride 4 and one stage for each large kernel size, the transitions between them of stride 2.

    large_kernel_sizes, layers (numbers of RepLKBlock + ConvFFN pairs) and channels have one entry a stage.
    Drop path grows linearly over the pairs up to drop_path_rate. small_kernel: side of the parallel kernels,
    None for none. num_classes None: no final norm and no head. out_indices: stages whose maps forward()
    returns instead of logits, through a BatchNorm each with norm_intermediate_features. use_checkpoint:
    activation checkpointing, less memory for a second forward pass. small_kernel_merged: built as
    structural_reparam() leaves it. use_sync_bn: SyncBatchNorm in this model, which needs GPUs once
    torch.distributed is initialized. implementation: get_conv2d's.
    """
    size_multiples = (1, 1)  # images may have any height and width

    def __init__(self, large_kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int],
                 drop_path_rate: float, small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4,
                 in_channels: int = 3, num_classes: int | None = 1000,
                 out_indices: Iterable[int] | None = None, use_checkpoint: bool = False,
                 small_kernel_merged: bool = False, use_sync_bn: bool = True,
                 norm_intermediate_features: bool = False, implementation: str | None = None):
        super().__init__()
        stages = len(layers)
        if not len(large_kernel_sizes) == stages == len(channels):
            raise ValueError(f'one entry a stage is needed, not {len(large_kernel_sizes)} kernel sizes, '
                             f'{stages} layers, {len(channels)} channels')
        self.out_indices = None if out_indices is None else tuple(out_indices)
        if self.out_indices is not None and not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f'out_indices {self.out_indices} must lie in 0 ... {stages - 1}')
        self.use_checkpoint = use_checkpoint
        self.depths, self.channels = tuple(layers), tuple(channels)

        base = channels[0]
        self.stem = nn.ModuleList([
            ConvBN(in_channels, base, 3, stride=2, relu=True),
            ConvBN(base, base, 3, groups=base, relu=True, implementation=implementation),
            ConvBN(base, base, 1, relu=True),
            ConvBN(base, base, 3, stride=2, groups=base, relu=True),
        ])
        # plain Python numbers: tensor.item() would fail under torch.device('meta')
        rates = [drop_path_rate * i / max(sum(layers) - 1, 1) for i in range(sum(layers))]
        self.stages = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i in range(stages):
            first = sum(layers[:i])
            self.stages.append(RepLKNetStage(channels[i], layers[i], large_kernel_sizes[i],
                                             rates[first:first + layers[i]], small_kernel, dw_ratio,
                                             ffn_ratio, use_checkpoint, small_kernel_merged,
                                             norm_intermediate_features, implementation))
            if i < stages - 1:
                self.transitions.append(nn.Sequential(
                    ConvBN(channels[i], channels[i + 1], 1, relu=True),
                    ConvBN(channels[i + 1], channels[i + 1], 3, stride=2, groups=channels[i + 1], relu=True),
                ))
        if num_classes is not None:
            self.norm = nn.BatchNorm2d(channels[-1])
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.head = nn.Linear(channels[-1], num_classes)
        if use_sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def stage_maps(self, x: Tensor, indices: Collection[int]) -> list[Tensor]:
        """x (N, in_channels, H, W) to the maps behind the stages `indices`, ascending, before their norms."""
        x = self.stem[0](x)
        for layer in self.stem[1:]:
            x = checkpointed(layer, x, self.use_checkpoint)
        maps = []
        for i in range(max(indices, default=-1) + 1):
            x = self.stages[i](self.transitions[i - 1](x) if i else x)
            if i in indices:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to the last map (N, C, H/32, W/32), or to a tuple of out_indices' maps."""
        if self.out_indices is None:
            return self.stage_maps(x, (len(self.stages) - 1,))[0]
        norms = [self.stages[i].norm for i in sorted({*self.out_indices})]
        return tuple(norm(y) for norm, y in zip(norms, self.stage_maps(x, self.out_indices), strict=True))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to logits (N, num_classes); without a head what forward_features gives."""
        x = self.forward_features(x)
        if self.out_indices is not None or not hasattr(self, 'head'):
            return x
        return self.head(torch.flatten(self.avgpool(self.norm(x)), 1))

    def structural_reparam(self) -> None:
        """Merge every small kernel into its large one, in place.

        Evaluation gives the same outputs to float32 rounding; training does not, for there BatchNorm
        normalises by the batch. May be called twice, before or after deep_fuse_BN().
        """
        for module in self.modules():
            if isinstance(module, ReparamLargeKernelConv):
                module.merge_kernel()

    switch_to_deploy = structural_reparam  # the name that other projects' tools look for

    @property
    def is_merged(self) -> bool:
        """Whether the small kernels have been merged into the large ones."""
        return all(hasattr(module, 'lkb_reparam') for module in self.modules()
                   if isinstance(module, ReparamLargeKernelConv))

    @property
    def is_folded(self) -> bool:
        """Whether deep_fuse_BN() has been called."""
        return isinstance(self.stem[0].bn, nn.Identity)

    def take_form(self, state: Mapping[str, Tensor]) -> None:
        """Merge the kernels, and fold the BatchNorms, if those of a state dict of this model are."""
        if any(key.endswith('.lkb_reparam.weight') for key in state):
            self.structural_reparam()
        if 'stem.0.conv.bias' in state:  # which stands for the BatchNorm
            self.deep_fuse_BN()

    def deep_fuse_BN(self) -> None:
        """Fold every BatchNorm into the layer before it or, where it stands first, into the one after it.

        In place; evaluation gives the same outputs to float32 rounding; for inference only. A classification
        model keeps no BatchNorm. A backbone keeps the norms of its returned maps, which have no layer of ours
        to fold into.
        """
        for module in self.modules():
            if isinstance(module, ConvBN):
                fold_bn_after(module)
        for module in self.modules():
            if isinstance(module, RepLKBlock):
                fold_bn_before(module.prelkb_bn, module.pw1.conv)
                module.prelkb_bn = nn.Identity()
            elif isinstance(module, ConvFFN):
                fold_bn_before(module.preffn_bn, module.pw1.conv)
                module.preffn_bn = nn.Identity()
        if isinstance(getattr(self, 'head', None), nn.Linear):
            fold_bn_before(self.norm, self.head)  # the pooling between them commutes with an affine map
            self.norm = nn.Identity()


# ---- The published sizes -----------------------------------------------------------------------------------

def create_RepLKNet31B(drop_path_rate: float = 0.3, num_classes: int | None = 1000,
                       use_checkpoint: bool = True, small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-31B: 79.9M parameters, 15.4 GMACs at 224 px (merged)."""
    shape = [31, 29, 27, 13], [2, 2, 18, 2], [128, 256, 512, 1024]
    return RepLKNet(*shape, drop_path_rate, kwargs.pop('small_kernel', 5), num_classes=num_classes,
                    use_checkpoint=use_checkpoint, small_kernel_merged=small_kernel_merged, **kwargs)


def create_RepLKNet31L(drop_path_rate: float = 0.3, num_classes: int | None = 1000,
                       use_checkpoint: bool = True, small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-31L: 172.7M parameters, 96.0 GMACs at 384 px (merged)."""
    shape = [31, 29, 27, 13], [2, 2, 18, 2], [192, 384, 768, 1536]
    return RepLKNet(*shape, drop_path_rate, kwargs.pop('small_kernel', 5), num_classes=num_classes,
                    use_checkpoint=use_checkpoint, small_kernel_merged=small_kernel_merged, **kwargs)


def create_RepLKNetXL(drop_path_rate: float = 0.3, num_classes: int | None = 1000,
                      use_checkpoint: bool = True, small_kernel_merged: bool = False, **kwargs) -> RepLKNet:
    """RepLKNet-XL, without small kernels: 335.4M parameters, 128.7 GMACs at 320 px."""
    shape = [27, 27, 27, 13], [2, 2, 18, 2], [256, 512, 1024, 2048]
    return RepLKNet(*shape, drop_path_rate, kwargs.pop('small_kernel', None), kwargs.pop('dw_ratio', 1.5),
                    num_classes=num_classes, use_checkpoint=use_checkpoint,
                    small_kernel_merged=small_kernel_merged, **kwargs)


def show_equivalence(create: Callable[[], nn.Module]) -> None:
    """Print what merging a model of random weights, and folding its BatchNorms, does to its logits."""
    torch.manual_seed(0)
    model = create().eval()
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
            error = (model(x) - before).abs().max() / before.abs().max()
            print(f'{step.__name__:18} largest difference of the logits {error:.1e} of the largest logit')


if __name__ == '__main__':
    show_equivalence(lambda: create_RepLKNet31B(use_checkpoint=False, use_sync_bn=False))
