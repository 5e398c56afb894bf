"""RepLKNet as a backbone for MMSegmentation 1.x and MMDetection 3.x: importing this registers it.

In a config: custom_imports = dict(imports=['segmentation.replknet'], allow_failed_imports=False)
"""
import logging
import pickle
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # mmengine's reverted SyncBatchNorm is no BatchNorm2d

import replknet
import replknet_zoo


def _method_of_history_buffer(owner: object, name: str) -> Callable:
    """What getattr may do while a checkpoint is read: a HistoryBuffer lists its own methods."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'{name} of {owner} is refused: it could run code')
    return getattr(HistoryBuffer, name)


# What mmengine's and mmcv's checkpoints hold beside tensors. Without it torch refuses to resume from or test
# them.
torch.serialization.add_safe_globals([
    HistoryBuffer, (_method_of_history_buffer, 'builtins.getattr'),
    np._core.multiarray._reconstruct, np.ndarray, *replknet_zoo.CHECKPOINT_TYPES,
])


def check_form(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Raise ValueError where the kernels of a state dict are merged and the model's are not, or reverse.

    Called before one is loaded, by whomever: else mmengine would warn of missing keys, leave the large
    kernels random, and print a score.
    """
    if f'{prefix}stem.0.conv.bias' in state:
        raise ValueError('the BatchNorms of these weights are folded, which is for inference without these '
                         'packages: take the weights that they were made from')
    kernels = [key for key in state if key.startswith(prefix) and '.large_kernel.' in key]
    in_file, in_model = (any('.lkb_reparam.' in key for key in keys)
                         for keys in (kernels, model.state_dict()))
    if not kernels or in_file == in_model:
        return
    if in_file:
        raise ValueError('the kernels of these weights are merged: '
                         'pass model.backbone.small_kernel_merged=True')
    raise ValueError('the kernels of these weights are not merged: leave out small_kernel_merged, and call '
                     'structural_reparam() afterwards')


@MODELS.register_module()
class RepLKNet(replknet.RepLKNet):
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

    def __init__(self, large_kernel_sizes: Sequence[int], layers: Sequence[int], channels: Sequence[int],
                 drop_path_rate: float, small_kernel: int | None, dw_ratio: float = 1, ffn_ratio: float = 4,
                 in_channels: int = 3, num_classes: None = None, out_indices: Sequence[int] = (0, 1, 2, 3),
                 use_checkpoint: bool = False, small_kernel_merged: bool = False, use_sync_bn: bool = True,
                 norm_intermediate_features: bool = False, frozen_stages: int = -1, norm_eval: bool = False,
                 pretrained: str | None = None, init_cfg: dict | list[dict] | None = None):
        if num_classes is not None:
            raise ValueError(f'num_classes is {num_classes}, but a backbone has no classifier: leave it out')
        if not -1 <= frozen_stages <= len(layers):
            raise ValueError(f'frozen_stages is {frozen_stages}: -1 freezes none, {len(layers)} all stages')
        if not out_indices or list(out_indices) != sorted(set(out_indices)):
            raise ValueError(f'out_indices is {out_indices}: name the stages in their order, each once')
        if pretrained and init_cfg:
            raise ValueError('pretrained and init_cfg both say where the weights come from: pass one of them')
        super().__init__(large_kernel_sizes, layers, channels, drop_path_rate, small_kernel, dw_ratio,
                         ffn_ratio, in_channels, None, out_indices, use_checkpoint, small_kernel_merged,
                         use_sync_bn and torch.cuda.is_available(), norm_intermediate_features)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.init_cfg = {'type': 'Pretrained', 'checkpoint': pretrained} if pretrained else init_cfg
        self.register_load_state_dict_pre_hook(check_form)
        self._freeze_what_no_map_needs()
        self.train()

    def _freeze_what_no_map_needs(self) -> None:
        """Else a trainable parameter had no gradient, which DistributedDataParallel takes for an error."""
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
            transitions = self.transitions[:max(len(stages) - 1, 0)]
            for module in (self.stem, *(stage.blocks for stage in stages), *transitions):
                module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Called by mmengine before training: do what init_cfg says."""
        if not self.init_cfg:
            print_log('The backbone starts from random weights: pass --cfg-options '
                      'model.backbone.pretrained=FILE for others', 'current', logging.WARNING)
        for init_cfg in [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []:
            if init_cfg['type'] == 'Pretrained':
                self._load_pretrained(**{key: value for key, value in init_cfg.items() if key != 'type'})
            else:
                initialize(self, init_cfg)

    def _load_pretrained(self, checkpoint: str, prefix: str = '', model_key: str = 'model|module') -> None:
        """Load what fits, and warn of what does not.

        Raises ValueError where no weight fits, or what stays random is frozen.
        """
        state = replknet_zoo.load_weights(checkpoint, model_key, prefix)
        try:
            check_form(self, state, '')
        except ValueError as error:
            raise ValueError(f'{checkpoint}: {error}') from error
        first = 'stem.0.conv.weight'
        if first in state and self.stem[0].conv.in_channels == 1:
            state[first] = state[first].sum(1, keepdim=True)  # what it gives for three equal colours
        own = self.state_dict()
        fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
        if not any(value.dim() > 1 for value in fitting.values()):
            whole = any(key.startswith('backbone.') for key in state)
            hint = " (pass init_cfg with prefix='backbone.')" if whole else ''
            raise ValueError(f'no weight of {checkpoint} fits this backbone{hint}: '
                             f'it has {next(iter(state))} and so on')
        # the norms of returned maps are no classifier's
        left = [key for key in own if key not in fitting and not re.match(r'stages\.\d+\.norm\.', key)]
        told = f'{", ".join(left[:8])}{" ..." if len(left) > 8 else ""}'
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        if frozen & set(left):
            raise ValueError(f'frozen_stages is {self.frozen_stages}, but {checkpoint} lacks, '
                             f'or has in another shape, {told}')
        self.load_state_dict(fitting, strict=False)
        print_log(f'{len(fitting)} of {len(own)} entries of the backbone come from {checkpoint}', 'current')
        if left:
            print_log(f'{len(left)} stay random, for {checkpoint} lacks them, '
                      f'or has them in another shape: {told}', 'current', logging.WARNING)
