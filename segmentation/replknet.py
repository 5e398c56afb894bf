"""RepLKNet as a backbone for MMSegmentation 1.x and MMDetection 3.x: importing this registers it.

In a config: custom_imports = dict(imports=['segmentation.replknet'], allow_failed_imports=False)
"""
from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import nn

import replknet
from segmentation.backbone import Backbone


@MODELS.register_module()
class RepLKNet(Backbone, replknet.RepLKNet):
    """replknet.RepLKNet without a head: images (N, in_channels, H, W) to a tuple of out_indices' maps.

    Takes RepLKNet's arguments, and:

    frozen_stages: -1 freezes nothing, 0 the stem, n the stem, the first n stages and the transitions between
    them: no gradients, and evaluation mode. The norms of returned maps stay trainable: classifiers' weights
    lack them.

    norm_eval: every BatchNorm stays in evaluation mode.

    pretrained, or init_cfg=dict(type='Pretrained', checkpoint=..., prefix='', model_key='model|module'):
    weights of any form that main.py reads. With in_channels=1 the first convolution's are summed over the
    colours.

    use_sync_bn counts where there are GPUs; mmengine reverts SyncBatchNorm in a run of one process.
    """
    first = 'stem.0.conv.weight'
    merged_part, trained_part, merged_argument = '.lkb_reparam.', '.lkb_origin.', 'small_kernel_merged'

    def __init__(self, large_kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int],
                 drop_path_rate: float, small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4,
                 in_channels: int = 3, num_classes: None = None, out_indices: Sequence[int] = (0, 1, 2, 3),
                 use_checkpoint: bool = False, small_kernel_merged: bool = False, use_sync_bn: bool = True,
                 norm_intermediate_features: bool = False, frozen_stages: int = -1, norm_eval: bool = False,
                 pretrained: str | None = None, init_cfg: dict | list[dict] | None = None):
        if num_classes is not None:
            raise ValueError(f'num_classes is {num_classes}, but a backbone has no classifier: leave it out')
        super().__init__(large_kernel_sizes, layers, channels, drop_path_rate, small_kernel, dw_ratio,
                         ffn_ratio, in_channels, None, out_indices, use_checkpoint, small_kernel_merged,
                         use_sync_bn and torch.cuda.is_available(), norm_intermediate_features)
        self.set_up(frozen_stages, norm_eval, pretrained, init_cfg)

    def without_gradient(self, last: int) -> list[nn.Module]:
        norms = [stage.norm for i, stage in enumerate(self.stages) if i not in self.out_indices]
        return [*self.stages[last + 1:], *self.transitions[last:], *norms]

    def up_to_stage(self, stages: int) -> list[nn.Module]:
        return [self.stem, *(stage.blocks for stage in self.stages[:stages]),
                *self.transitions[:max(stages - 1, 0)]]
