"""The small RepLKNets of run.py: one kernel size in all stages, with or without small kernels and shortcuts.

Each is a model for main.py and erf/visualize_erf.py: --model study/networks.py:k13_small5
"""
from functools import partial

from torch import Tensor

from replknet import RepLKBlock, RepLKNet


class RepLKBlockWithoutShortcut(RepLKBlock):
    """RepLKBlock whose output is its branch alone: (N, C, H, W) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.prelkb_bn(x))
        return self.pw2(self.lk_nonlinear(self.large_kernel(out)))


def small_replknet(kernel: int, small_kernel: int | None = None, shortcut: bool = True,
                   num_classes: int = 10) -> RepLKNet:
    """RepLKNet-31T's blocks and channels with kernels of side `kernel` in all stages.

    shortcut: false takes those of the RepLKBlocks away; ConvFFNs keep theirs.
    """
    model = RepLKNet([kernel] * 4, (1, 1, 2, 1), (16, 32, 64, 128), 0.0, small_kernel,
                     num_classes=num_classes, use_sync_bn=False)
    if not shortcut:
        for module in model.modules():
            if isinstance(module, RepLKBlock):
                module.__class__ = RepLKBlockWithoutShortcut
    return model


k3 = partial(small_replknet, 3)
k7 = partial(small_replknet, 7)
k13 = partial(small_replknet, 13)
k31 = partial(small_replknet, 31)
k7_small5 = partial(small_replknet, 7, 5)
k13_small5 = partial(small_replknet, 13, 5)
k31_small5 = partial(small_replknet, 31, 5)
k3_no_shortcut = partial(small_replknet, 3, shortcut=False)
k13_no_shortcut = partial(small_replknet, 13, shortcut=False)
NETWORKS = ('k3', 'k7', 'k13', 'k31', 'k7_small5', 'k13_small5', 'k31_small5', 'k3_no_shortcut',
            'k13_no_shortcut')
