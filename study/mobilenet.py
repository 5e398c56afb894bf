"""The paper's experiments on MobileNetV2 (section 3): large kernels, with and without shortcuts.

torchvision's model with other depthwise kernels. With kernels of 3, shortcuts and no small kernels its state
dict and logits are torchvision's. The functions at the end are networks of the tables, trained by

    python main.py --model study/mobilenet.py:mobilenet_v2_k13 --data_path IMAGENET ...
"""
import itertools
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

from replknet import ReparamLargeKernelConv, fuse_bn, get_conv2d

LAST_STAGE = 14  # the first of `features` whose map has 1/32 of the image's side


class LargeKernelMobileNetV2(MobileNetV2):
    """MobileNetV2 with depthwise kernels of side `kernel`: images (N, 3, H, W) to logits (N, num_classes).

    shortcut: false takes the identity shortcuts away. last_stage_only: kernels stay 3 where maps are larger
    than 1/32 of the image. small_kernel: side of kernels trained beside the large ones, None for none.
    """
    size_multiples = (1, 1)  # images may have any height and width
    depths = ()  # of stages: layer decay is not defined here

    def __init__(self, kernel: int, shortcut: bool = True, last_stage_only: bool = False,
                 small_kernel: int | None = None, num_classes: int = 1000):
        super().__init__(num_classes=num_classes)
        for i, block in enumerate(self.features):
            if isinstance(block, InvertedResidual):
                block.use_res_connect &= shortcut
                if i >= LAST_STAGE or not last_stage_only:
                    _enlarge(block.conv[-3], kernel, small_kernel)

    @property
    def head(self) -> nn.Linear:
        """The linear layer, under torchvision's keys: classifier.1.*"""
        return self.classifier[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) to the last map (N, 1280, H/32, W/32)."""
        return self.features(x)

    def structural_reparam(self) -> None:
        """Merge every small kernel into its large one, in place; evaluation gives the same outputs."""
        for module in self._large_kernels():
            module.merge_kernel()

    def deep_fuse_BN(self) -> None:
        """Merge the kernels, and fold every BatchNorm into the convolution before it, in place."""
        self.structural_reparam()
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                _fold(module)

    def take_form(self, state: Mapping[str, Tensor]) -> None:
        """Merge the kernels, and fold the BatchNorms, if those of a state dict of this model are."""
        if any(key.endswith('.lkb_reparam.weight') for key in state):
            self.structural_reparam()
        if 'features.0.0.bias' in state:  # which stands for the BatchNorm
            self.deep_fuse_BN()

    @property
    def is_merged(self) -> bool:
        """Whether no small kernel is left."""
        return all(hasattr(module, 'lkb_reparam') for module in self._large_kernels())

    @property
    def is_folded(self) -> bool:
        """Whether deep_fuse_BN() has been called."""
        return isinstance(self.features[0][1], nn.Identity)

    def _large_kernels(self) -> list[ReparamLargeKernelConv]:
        return [module for module in self.modules() if isinstance(module, ReparamLargeKernelConv)]


def _enlarge(layer: nn.Sequential, kernel: int, small_kernel: int | None) -> None:
    """Give a depthwise convolution, BatchNorm and ReLU6 another kernel, drawn as torchvision's are."""
    conv = layer[0]
    channels, stride = conv.out_channels, conv.stride[0]
    if small_kernel is None:
        if kernel == 3:
            return
        layer[0] = get_conv2d(channels, channels, kernel, stride, kernel // 2, 1, channels, False)
    else:  # it has BatchNorms of its own
        layer[0] = ReparamLargeKernelConv(channels, channels, kernel, stride, channels, small_kernel)
        layer[1] = nn.Identity()
    for module in layer[0].modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out')


@torch.no_grad()
def _fold(layers: nn.Sequential) -> None:
    """Fold each BatchNorm of a sequence into the convolution before it; Identity takes its place."""
    for i, (conv, bn) in enumerate(itertools.pairwise(layers)):
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            kernel, bias = fuse_bn(conv, bn)
            conv.weight.copy_(kernel)
            conv.bias = nn.Parameter(bias)
            layers[i + 1] = nn.Identity()


mobilenet_v2 = LargeKernelMobileNetV2
# Table 2
mobilenet_v2_k3 = partial(mobilenet_v2, 3)
mobilenet_v2_k13 = partial(mobilenet_v2, 13)
mobilenet_v2_k3_no_shortcut = partial(mobilenet_v2, 3, shortcut=False)
mobilenet_v2_k13_no_shortcut = partial(mobilenet_v2, 13, shortcut=False)
# re-parameterized
mobilenet_v2_k13_reparam3 = partial(mobilenet_v2, 13, small_kernel=3)
# Table 4
mobilenet_v2_last_k7 = partial(mobilenet_v2, 7, last_stage_only=True)
mobilenet_v2_last_k13 = partial(mobilenet_v2, 13, last_stage_only=True)
