"""RepLKNet as a backbone for MMSegmentation 1.x and MMDetection 3.x, out of tree: importing this registers it.

In a config: custom_imports = dict(imports=['segmentation.replknet'], allow_failed_imports=False)
"""
import logging
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import initialize
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm  # mmengine reverts SyncBatchNorm to a class that is no BatchNorm2d

import replknet


def _method_of_history_buffer(owner: object, name: str) -> Callable:
    """What getattr may do while a checkpoint is read: a HistoryBuffer lists its own methods."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'{name} of {owner} is refused: it could run code')
    return getattr(HistoryBuffer, name)


# What mmengine's and mmcv's checkpoints hold beside tensors. Without it torch >= 2.6 refuses to resume from or test them.
torch.serialization.add_safe_globals([
    HistoryBuffer, (_method_of_history_buffer, 'builtins.getattr'), np._core.multiarray._reconstruct, np.ndarray, np.dtype,
    np._core.multiarray.scalar, (np._core.multiarray.scalar, 'numpy.core.multiarray.scalar'),
    *{type(np.dtype(kind)) for kind in 'bhilqBHILQefd?'},
])


@MODELS.register_module()
class RepLKNet(replknet.RepLKNet):
    """replknet.RepLKNet without a head: images (N, in_channels, H, W) to a tuple of the out_indices' maps, strides 4 to 32.

    Takes RepLKNet's arguments, and:

    frozen_stages: -1 freezes nothing, 0 the stem, n the stem, the first n stages and the transitions between them: no
    gradients, and evaluation mode. The norms of returned maps stay trainable: no pretraining has them.
    norm_eval: every BatchNorm stays in evaluation mode.
    pretrained, or init_cfg=dict(type='Pretrained', checkpoint=..., prefix=''): weights of any form that main.py reads.

    SyncBatchNorm is used where there are GPUs; mmengine reverts it in a run of one process.
    """

    def __init__(self, large_kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int], drop_path_rate: float,
                 small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4, in_channels: int = 3,
                 num_classes: None = None, out_indices: Sequence[int] = (0, 1, 2, 3), use_checkpoint: bool = False,
                 small_kernel_merged: bool = False, use_sync_bn: bool = True, norm_intermediate_features: bool = False,
                 frozen_stages: int = -1, norm_eval: bool = False, pretrained: str | None = None,
                 init_cfg: dict | list[dict] | None = None):
        if num_classes is not None:
            raise ValueError(f'num_classes is {num_classes}, but a backbone has no classifier: leave it out')
        if not -1 <= frozen_stages <= len(layers):
            raise ValueError(f'frozen_stages is {frozen_stages}: -1 freezes nothing, {len(layers)} all stages')
        if pretrained and init_cfg:
            raise ValueError('pretrained and init_cfg both say where the weights come from: pass one of them')
        super().__init__(large_kernel_sizes, layers, channels, drop_path_rate, small_kernel, dw_ratio, ffn_ratio, in_channels,
                         None, out_indices, use_checkpoint, small_kernel_merged, use_sync_bn and torch.cuda.is_available(),
                         norm_intermediate_features)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.init_cfg = {'type': 'Pretrained', 'checkpoint': pretrained} if pretrained else init_cfg
        self._leave_out_what_no_map_needs()
        self.train()

    def _leave_out_what_no_map_needs(self) -> None:
        """So that no trainable parameter is left without a gradient, which DistributedDataParallel takes for an error."""
        last = max(self.out_indices)
        unused = [*self.stages[last + 1:], *self.transitions[last:]]
        unused += [stage.norm for i, stage in enumerate(self.stages) if i not in self.out_indices]
        for module in unused:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'RepLKNet':
        """As nn.Module's, but what is frozen stays so."""
        super().train(mode)
        if self.frozen_stages >= 0:
            stages = self.stages[:self.frozen_stages]
            for module in (self.stem, *(stage.blocks for stage in stages), *self.transitions[:max(len(stages) - 1, 0)]):
                module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Called by mmengine before training: do what init_cfg says."""
        if not self.init_cfg:
            print_log('The backbone starts from random weights: pass --cfg-options model.backbone.pretrained=FILE for others',
                      'current', logging.WARNING)
        for init_cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if init_cfg['type'] == 'Pretrained':
                self._load_pretrained(init_cfg['checkpoint'], init_cfg.get('prefix', ''))
            else:
                initialize(self, init_cfg)

    def _load_pretrained(self, checkpoint: str, prefix: str) -> None:
        """Load what fits, and say what does not. Raises ValueError where no weight fits, or the kernels' form does not."""
        state = replknet.load_weights(checkpoint, prefix=prefix)
        if replknet.is_folded(state):
            raise ValueError(f'{checkpoint} cannot be trained: its BatchNorms are folded, which is for inference')
        if any('lkb_reparam' in key for key in state):
            print_log(f'{checkpoint} has merged kernels, so training goes on without the small ones', 'current')
            self.structural_reparam()
        elif any('lkb_reparam' in key for key in self.state_dict()):
            raise ValueError(f'small_kernel_merged is True, but the kernels of {checkpoint} are not merged: leave it out and '
                             'call structural_reparam() after training')
        own = self.state_dict()
        fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
        if not any(value.dim() > 1 for value in fitting.values()):
            hint = " (pass init_cfg with prefix='backbone.')" if any(key.startswith('backbone.') for key in state) else ''
            raise ValueError(f'no weight of {checkpoint} fits this backbone{hint}: it has {next(iter(state))} and so on')
        self.load_state_dict(fitting, strict=False)
        left = [key for key in own if key not in fitting]
        random = f'; left as they were: {", ".join(left[:8])}{" ..." if len(left) > 8 else ""}' if left else ''
        print_log(f'{len(fitting)} of {len(own)} entries of the backbone come from {checkpoint}{random}', 'current')
