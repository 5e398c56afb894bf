"""RepMLPNet, "Hierarchical Vision MLP with Re-parameterized Locality" (arXiv 2112.11081).

RepLKNet's sibling: a fully connected layer over a map's pixels takes the place of the large kernel. It is
trained beside small convolutions, and locality injection makes them one, as merging does with kernels. Read
from top to bottom: BatchNorm and convolutions as matrices, the block, the network, the six published models.
`python repmlpnet.py` shows that injecting and folding keep the outputs.
"""
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from large_kernel_conv import depthwise_layer
from replknet import checkpointed, fold_bn_after, fold_bn_before, scale_and_shift, show_equivalence


class ConvBN(nn.Sequential):
    """A convolution without bias, BatchNorm, ReLU if asked: children conv, bn, relu."""

    def __init__(self, conv: nn.Conv2d, relu: bool = False):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)
        if relu:
            self.relu = nn.ReLU()


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int,
            groups: int = 1) -> ConvBN:
    """A convolution without bias and its BatchNorm."""
    return ConvBN(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias=False))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int,
                 groups: int = 1) -> ConvBN:
    """conv_bn, and a ReLU."""
    return ConvBN(conv_bn(in_channels, out_channels, kernel_size, stride, padding, groups).conv, relu=True)


# ---- Folding BatchNorm, convolutions as matrices -----------------------------------------------------------

def fuse_bn(conv_or_fc: nn.Conv2d | nn.Linear, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias (rows,) of the one layer that equals bn(layer(x)) in evaluation.

    Where the BatchNorm has fewer channels than the layer has rows, each serves as many consecutive rows. It
    may be Identity. Computed in float64 and rounded once; gradients reach both modules.
    """
    weight, bias = _fused(conv_or_fc, bn)
    return weight.to(conv_or_fc.weight.dtype), bias.to(conv_or_fc.weight.dtype)


def _fused(layer: nn.Conv2d | nn.Linear, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """fuse_bn before rounding, in float64."""
    weight = layer.weight.double()
    bias = layer.bias.double() if layer.bias is not None else weight.new_zeros(len(weight))
    affine = scale_and_shift(bn)
    if affine is None:
        return weight, bias
    scale, shift = (values.repeat_interleave(len(weight) // len(values)) for values in affine)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + shift


def _depthwise_matrix(kernel: Tensor, h: int, w: int) -> Tensor:
    """The matrix (S h w, h w) of depthwise convolutions of maps (S, h, w), of same zero padding.

    kernel (S, 1, k, k), k odd: row (s, y, x) has at column (y', x') kernel[s, 0, y' - y + k // 2,
    x' - x + k // 2], or 0 outside it.
    """
    sides = [(size - 1 - kernel.shape[2] // 2,) * 2 for size in (w, h)]
    padded = F.pad(kernel[:, 0], [*sides[0], *sides[1]])  # (S, 2 h - 1, 2 w - 1), cropped where k is larger
    windows = padded.unfold(1, h, 1).unfold(2, w, 1)  # window (h - 1 - y, w - 1 - x) is row (y, x)
    return windows.flip(1, 2).reshape(-1, h * w)


# ---- The block ---------------------------------------------------------------------------------------------

class GlobalPerceptron(nn.Module):
    """A gate for each channel, from the mean of the whole map: (N, C, H, W) to (N, C, 1, 1) in 0 ... 1."""

    def __init__(self, input_channels: int, internal_neurons: int):
        super().__init__()
        self.fc1 = nn.Conv2d(input_channels, internal_neurons, 1)
        self.fc2 = nn.Conv2d(internal_neurons, input_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class SetSharingFC(nn.Conv2d):
    """One FC for each set of channels: (N, sets * pixels, 1, 1) to the same.

    Built as the 1x1 convolution of as many groups that it is, with its state dict, and computed as matrix
    products, which take a fraction of its time.
    """

    def forward(self, x: Tensor) -> Tensor:
        sets, pixels = self.groups, self.weight.shape[1]
        if sets == 1:
            return F.linear(x.flatten(1), self.weight.flatten(1), self.bias).view(x.shape)
        rows = x.reshape(-1, sets, pixels).transpose(0, 1)
        weight = self.weight.reshape(sets, pixels, pixels).transpose(1, 2)
        out = (torch.bmm(rows, weight) if self.bias is None
               else torch.baddbmm(self.bias.view(sets, 1, pixels), rows, weight))
        return out.transpose(0, 1).reshape(x.shape)


class RepMLPBlock(nn.Module):
    """FCs over parts of h x w pixels, beside small convolutions, times a gate: (N, C, H, W) to the same.

    A map is cut into parts of h x w, so H and W must be multiples. In each, channel c takes FC number
    c mod num_sharesets (paper, section 3.2), one matrix over the part's pixels. Depthwise convolutions of
    reparam_conv_k (odd, distinct sides; None for none) see the same part, with zeros around it;
    local_inject() adds them into the FCs. The gate sees the whole map, whatever the number of parts.
    deploy: built as local_inject() leaves it. implementation: depthwise_layer's, of the convolutions;
    with 'pytorch' the FCs are computed as a grouped convolution, as published.

    Maps of w = 1 are signals (N, C, length, 1). Raises ValueError for arguments that make no block, and in
    forward() for maps that do not fit.
    """

    def __init__(self, in_channels: int, out_channels: int, h: int, w: int,
                 reparam_conv_k: Sequence[int] | None = None, globalperceptron_reduce: int = 4,
                 num_sharesets: int = 1, deploy: bool = False, implementation: str | None = None):
        super().__init__()
        _check_block(in_channels, out_channels, h, w, reparam_conv_k, globalperceptron_reduce, num_sharesets)
        self.C, self.O, self.S = in_channels, out_channels, num_sharesets
        self.h, self.w, self.reparam_conv_k, self.implementation = h, w, reparam_conv_k, implementation
        self.gp = GlobalPerceptron(in_channels, in_channels // globalperceptron_reduce)
        self._set_form(deploy)

    def _set_form(self, deploy: bool) -> None:
        """Build the FCs new: with what is trained beside them, or with a bias instead."""
        self.deploy = deploy
        rows = self.S * self.h * self.w
        layer = nn.Conv2d if self.implementation == 'pytorch' else SetSharingFC
        self.fc3 = layer(rows, rows, 1, groups=self.S, bias=deploy)
        self.fc3_bn = nn.Identity() if deploy else nn.BatchNorm2d(self.S)
        for k in () if deploy else self.reparam_conv_k or ():
            setattr(self, f'repconv{k}', ConvBN(depthwise_layer(self.S, k, False, self.implementation)))
        for name in [name for name, _ in self.named_children() if deploy and name.startswith('repconv')]:
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        _check_parts(x, self.h, self.w, 'a map', self.C)
        parts = self.partition(x, x.shape[2] // self.h, x.shape[3] // self.w)
        out = self.partition_affine(parts, parts.shape[1], parts.shape[2])
        for branch in self._branches():
            out = out + branch(parts.reshape(-1, self.S, self.h, self.w)).reshape(out.shape)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape) * self.gp(x)

    def partition(self, x: Tensor, h_parts: int, w_parts: int) -> Tensor:
        """Cut maps (N, C, h_parts * h, w_parts * w) into parts (N, h_parts, w_parts, C, h, w)."""
        return x.reshape(-1, self.C, h_parts, self.h, w_parts, self.w).permute(0, 2, 4, 1, 3, 5)

    def partition_affine(self, x: Tensor, h_parts: int, w_parts: int) -> Tensor:
        """The FCs and their BatchNorm on partition()'s parts, to the same shape."""
        rows = x.reshape(-1, self.S * self.h * self.w, 1, 1)  # one for S channels, which follow each other
        out = self.fc3_bn(self.fc3(rows).reshape(-1, self.S, self.h, self.w))
        return out.reshape(-1, h_parts, w_parts, self.C, self.h, self.w)

    def _branches(self) -> list[nn.Module]:
        return [child for name, child in self.named_children() if name.startswith('repconv')]

    def get_equivalent_fc3(self) -> tuple[Tensor, Tensor]:
        """Weight (S h w, h w, 1, 1) and bias (S h w,) of the FCs that equal FCs, convolutions and BatchNorms.

        In evaluation, in either form; gradients reach all that they are made of (paper, section 3.4).
        """
        if not self._branches() and isinstance(self.fc3_bn, nn.Identity):
            return self.fc3.weight, self.fc3.bias
        weight, bias = _fused(self.fc3, self.fc3_bn)
        for branch in self._branches():
            kernel, shift = _fused(branch.conv, branch.bn)
            weight = weight + _depthwise_matrix(kernel, self.h, self.w).view_as(weight)
            bias = bias + shift.repeat_interleave(self.h * self.w)
        return weight.to(self.fc3.weight.dtype), bias.to(self.fc3.weight.dtype)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Make FCs, convolutions and BatchNorms one FC with bias, in place. No-op where that has been done.

        Evaluation gives the same outputs up to rounding. To train on, inject a copy.deepcopy of the model.
        """
        if not self._branches() and isinstance(self.fc3_bn, nn.Identity):
            return
        weight, bias = self.get_equivalent_fc3()
        trains = self.fc3.weight.requires_grad
        with torch.device('meta'):  # initial values would be drawn from the global generator
            self._set_form(deploy=True)
        self.fc3.weight, self.fc3.bias = (nn.Parameter(values.contiguous(), trains)
                                          for values in (weight, bias))
        self.train(self.training)

    reparameterize = local_inject  # the name that other projects' tools look for


def _check_block(channels: int, out_channels: int, h: int, w: int, kernels: Sequence[int] | None, reduce: int,
                 sets: int) -> None:
    """Raise ValueError for arguments that make no RepMLPBlock."""
    if channels != out_channels:
        raise ValueError(f'in_channels {channels} and out_channels {out_channels} must be the same: '
                         'the gate multiplies each channel')
    if min(h, w, sets, reduce) < 1 or channels % sets:
        raise ValueError(f'h {h}, w {w}, globalperceptron_reduce {reduce} and num_sharesets {sets} must be '
                         f'at least 1, and num_sharesets must divide the {channels} channels')
    if channels < reduce:
        raise ValueError(f'globalperceptron_reduce {reduce} leaves no neuron of {channels} channels')
    if kernels is not None and (not isinstance(kernels, Sequence) or not kernels
                                or len(set(kernels)) < len(kernels)
                                or not all(isinstance(k, int) and k > 0 and k % 2 for k in kernels)):
        raise ValueError(f'reparam_conv_k is {kernels!r}: it must be None or distinct odd sizes: (1, 3)')


def _check_parts(x: Tensor, h: int, w: int, what: str, channels: int | None = None) -> None:
    """Raise ValueError where x is no (N, channels, H, W), or does not divide into parts of h x w."""
    if channels is not None and (x.dim() != 4 or x.shape[1] != channels):
        raise ValueError(f'this RepMLPBlock takes (N, {channels}, H, W), not {tuple(x.shape)}')
    if x.shape[2] % h or x.shape[3] % w or 0 in x.shape[2:]:
        raise ValueError(f'{what} of {x.shape[2]} x {x.shape[3]} (height x width) does not divide into parts '
                         f'of {h} x {w}: resize it, or pad it, or build the model for another size')


torch.fx.wrap('_check_parts')  # recorded as one call: while torch.fx records, shapes are not known


class FFNBlock(nn.Module):
    """1x1 to hidden_channels, GELU, 1x1 to out_channels, a BatchNorm behind each convolution."""

    def __init__(self, in_channels: int, hidden_channels: int | None = None, out_channels: int | None = None,
                 act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        hidden_channels = hidden_channels or in_channels
        self.ffn_fc1 = conv_bn(in_channels, hidden_channels, 1, 1, 0)
        self.ffn_fc2 = conv_bn(hidden_channels, out_channels or in_channels, 1, 1, 0)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_fc2(self.act(self.ffn_fc1(x)))


class RepMLPNetUnit(nn.Module):
    """BN, RepMLPBlock; BN, FFNBlock; each with a shortcut: (N, C, H, W) to the same shape."""

    def __init__(self, channels: int, h: int, w: int, reparam_conv_k: Sequence[int] | None,
                 globalperceptron_reduce: int, ffn_expand: int = 4, num_sharesets: int = 1,
                 deploy: bool = False, implementation: str | None = None):
        super().__init__()
        self.repmlp_block = RepMLPBlock(channels, channels, h, w, reparam_conv_k, globalperceptron_reduce,
                                        num_sharesets, deploy, implementation)
        self.ffn_block = FFNBlock(channels, channels * ffn_expand)
        self.prebn1 = nn.BatchNorm2d(channels)
        self.prebn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.repmlp_block(self.prebn1(x))
        return x + self.ffn_block(self.prebn2(x))


# ---- The network -------------------------------------------------------------------------------------------

class RepMLPNet(nn.Module):
    """An embedding of patches and stages of RepMLPNetUnits, embeddings of 2 x 2 patches between them.

    num_blocks, channels, hs, ws (height and width of a part) and sharesets_nums have one entry a stage.
    Images must be multiples of `size_multiples` pixels high and wide, patch_size * 2 ** stage * (h, w):
    one part in each block at the size that the model is for, several at multiples; the gates see the whole.
    reparam_conv_k, globalperceptron_reduce, deploy, implementation: RepMLPBlock's. num_class None: no head.
    out_indices: stages whose maps forward() returns instead of logits; the last stage's comes through
    head_norm, unless norm_last_map is false. use_checkpoint: activation checkpointing.
    """

    def __init__(self, in_channels: int = 3, num_class: int | None = 1000,
                 patch_size: tuple[int, int] = (4, 4), num_blocks: Sequence[int] = (2, 2, 6, 2),
                 channels: Sequence[int] = (192, 384, 768, 1536), hs: Sequence[int] = (64, 32, 16, 8),
                 ws: Sequence[int] = (64, 32, 16, 8), sharesets_nums: Sequence[int] = (4, 8, 16, 32),
                 reparam_conv_k: Sequence[int] | None = (3,), globalperceptron_reduce: int = 4,
                 use_checkpoint: bool = False, deploy: bool = False,
                 out_indices: Iterable[int] | None = None, norm_last_map: bool = True,
                 implementation: str | None = None):
        super().__init__()
        stages = len(num_blocks)
        if not stages == len(channels) == len(hs) == len(ws) == len(sharesets_nums):
            raise ValueError(f'one entry a stage is needed, not {stages} num_blocks, {len(channels)} '
                             f'channels, {len(hs)} hs, {len(ws)} ws, {len(sharesets_nums)} sharesets_nums')
        self.out_indices = None if out_indices is None else tuple(out_indices)
        if self.out_indices is not None and not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f'out_indices {self.out_indices} must lie in 0 ... {stages - 1}')
        self.use_checkpoint, self.norm_last_map = use_checkpoint, norm_last_map
        self.depths, self.channels = tuple(num_blocks), tuple(channels)
        self.size_multiples = tuple(math.lcm(*(patch * 2 ** i * side for i, side in enumerate(sides)))
                                    for patch, sides in zip(patch_size, (hs, ws), strict=True))

        self.conv_embedding = conv_bn_relu(in_channels, channels[0], patch_size, patch_size, 0)
        self.stages = nn.ModuleList(nn.ModuleList(
            RepMLPNetUnit(channels[i], hs[i], ws[i], reparam_conv_k, globalperceptron_reduce,
                          num_sharesets=sharesets_nums[i], deploy=deploy, implementation=implementation)
            for _ in range(num_blocks[i])) for i in range(stages))
        self.embeds = nn.ModuleList(conv_bn_relu(channels[i], channels[i + 1], 2, 2, 0)
                                    for i in range(stages - 1))
        self.head_norm = nn.BatchNorm2d(channels[-1])
        if num_class is not None:
            self.head = nn.Linear(channels[-1], num_class)

    def stage_maps(self, x: Tensor, indices: Collection[int]) -> list[Tensor]:
        """x (N, in_channels, H, W) to the maps behind the stages `indices`, ascending, before head_norm."""
        _check_parts(x, *self.size_multiples, 'an image')
        x = self.conv_embedding(x)
        maps = []
        for i in range(max(indices, default=-1) + 1):
            x = self.embeds[i - 1](x) if i else x
            for unit in self.stages[i]:
                x = checkpointed(unit, x, self.use_checkpoint)
            if i in indices:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to the last map, through head_norm, or a tuple of out_indices' maps."""
        last = len(self.stages) - 1
        maps = self.stage_maps(x, (last,) if self.out_indices is None else self.out_indices)
        if self.out_indices is None or (last in self.out_indices and self.norm_last_map):
            maps[-1] = self.head_norm(maps[-1])
        return maps[-1] if self.out_indices is None else tuple(maps)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x (N, in_channels, H, W) to logits (N, num_class); without a head what forward_features gives."""
        x = self.forward_features(x)
        if self.out_indices is not None or not hasattr(self, 'head'):
            return x
        return self.head(x.mean((2, 3)))

    def locality_injection(self) -> None:
        """Call local_inject() of every submodule that has it, in place. May be called twice.

        Evaluation gives the same outputs up to rounding; training does not, for there BatchNorm normalises by
        the batch. To train on afterwards, inject a copy.deepcopy; of a DistributedDataParallel its `module`.
        """
        for module in self.modules():
            if hasattr(module, 'local_inject'):
                module.local_inject()

    structural_reparam = locality_injection  # what RepLKNet calls it
    switch_to_deploy = locality_injection  # the name that other projects' tools look for

    @property
    def is_merged(self) -> bool:
        """Whether the convolutions have been injected."""
        return not any(hasattr(module, 'local_inject') and not module.deploy for module in self.modules())

    @property
    def is_folded(self) -> bool:
        """Whether deep_fuse_BN() has been called."""
        return isinstance(self.conv_embedding.bn, nn.Identity)

    def take_form(self, state: Mapping[str, Tensor]) -> None:
        """Have or inject the convolutions, and fold the BatchNorms, as a state dict that is to be loaded."""
        if any(key.endswith('.fc3.bias') for key in state):
            self.locality_injection()
        elif not self.is_folded and any('.fc3_bn.' in key for key in state):
            for block in self.modules():
                if isinstance(block, RepMLPBlock) and block.deploy:
                    weight = block.fc3.weight
                    block._set_form(deploy=False)
                    block.to(weight.device, weight.dtype).train(block.training)
                    for branch in (block.fc3, block.fc3_bn, *block._branches()):
                        branch.requires_grad_(weight.requires_grad)
        if 'conv_embedding.conv.bias' in state:  # which stands for the BatchNorm
            self.deep_fuse_BN()

    def deep_fuse_BN(self) -> None:
        """Inject the convolutions, and fold every BatchNorm but prebn1 into the layer before it or after it.

        In place; evaluation gives the same outputs up to rounding; for inference only. prebn1 stays, since it
        scales the channels that share an FC each by its own factor; so does head_norm where there is no head.
        """
        self.locality_injection()
        for module in self.modules():
            if isinstance(module, ConvBN):
                fold_bn_after(module)
        for module in self.modules():
            if isinstance(module, RepMLPNetUnit):
                fold_bn_before(module.prebn2, module.ffn_block.ffn_fc1.conv)
                module.prebn2 = nn.Identity()
        if isinstance(getattr(self, 'head', None), nn.Linear):
            fold_bn_before(self.head_norm, self.head)  # the mean between them commutes with an affine map
            self.head_norm = nn.Identity()


# ---- The published models ----------------------------------------------------------------------------------

def _create(size: int, channels: int, third_stage: int, sharesets: Sequence[int], deploy: bool,
            options: dict) -> RepMLPNet:
    sides = tuple(size // 4 // 2 ** i for i in range(4))
    return RepMLPNet(channels=tuple(channels * 2 ** i for i in range(4)), hs=sides, ws=sides,
                     num_blocks=(2, 2, third_stage, 2), sharesets_nums=sharesets,
                     **{'reparam_conv_k': (1, 3), **options}, deploy=deploy)


def create_RepMLPNet_T224(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-T224: 38.3M parameters, 2.80 GMACs at 224 px (injected). options: RepMLPNet's arguments."""
    return _create(224, 64, 6, (1, 4, 16, 128), deploy, options)


def create_RepMLPNet_T256(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-T256: 58.7M parameters, 4.25 GMACs at 256 px (injected). options: RepMLPNet's arguments."""
    return _create(256, 64, 6, (1, 4, 16, 128), deploy, options)


def create_RepMLPNet_B224(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-B224: 68.2M parameters, 6.66 GMACs at 224 px (injected). options: RepMLPNet's arguments."""
    return _create(224, 96, 12, (1, 4, 32, 128), deploy, options)


def create_RepMLPNet_B256(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-B256: 96.5M parameters, 9.62 GMACs at 256 px (injected). options: RepMLPNet's arguments."""
    return _create(256, 96, 12, (1, 4, 32, 128), deploy, options)


def create_RepMLPNet_D256(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-D256: 86.9M parameters, 8.61 GMACs at 256 px (injected). options: RepMLPNet's arguments."""
    return _create(256, 80, 18, (1, 4, 16, 128), deploy, options)


def create_RepMLPNet_L256(deploy: bool = False, **options) -> RepMLPNet:
    """RepMLPNet-L256: 117.7M parameters, 11.58 GMACs at 256 px (injected). options: RepMLPNet's arguments."""
    return _create(256, 96, 18, (1, 4, 32, 256), deploy, options)


model_map = {
    'RepMLPNet-T224': create_RepMLPNet_T224,
    'RepMLPNet-B224': create_RepMLPNet_B224,
    'RepMLPNet-T256': create_RepMLPNet_T256,
    'RepMLPNet-B256': create_RepMLPNet_B256,
    'RepMLPNet-D256': create_RepMLPNet_D256,
    'RepMLPNet-L256': create_RepMLPNet_L256,
}


def get_RepMLPNet_model(name: str, deploy: bool = False) -> RepMLPNet:
    """Build one of model_map with random weights. Raises ValueError for another name."""
    if name not in model_map:
        raise ValueError(f'unknown model {name!r}: choose one of {", ".join(model_map)}')
    return model_map[name](deploy=deploy)


if __name__ == '__main__':
    show_equivalence(create_RepMLPNet_T224)
