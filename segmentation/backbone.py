"""What the registered backbones share: weights from files, what is frozen, and which form weights have."""
import logging
import pickle
import re
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import initialize
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # mmengine's reverted SyncBatchNorm is no BatchNorm2d

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


class Backbone(nn.Module):
    """Stands before a model of ours among the bases of a registered backbone, which calls set_up().

    A family says how its state dicts are known: `first`, the key of its first convolution's weight; a part of
    the keys of merged weights, and one of those as trained; the argument that builds a merged model.
    """
    first: ClassVar[str]
    merged_part: ClassVar[str]
    trained_part: ClassVar[str]
    merged_argument: ClassVar[str]

    def set_up(self, frozen_stages: int, norm_eval: bool, pretrained: str | None,
               init_cfg: dict | list[dict] | None) -> None:
        """Check these arguments and self.out_indices, and freeze what they say. Raises ValueError."""
        if not -1 <= frozen_stages <= len(self.stages):
            raise ValueError(f'frozen_stages is {frozen_stages}: -1 freezes none, {len(self.stages)} all '
                             'stages')
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError(f'out_indices is {self.out_indices}: name the stages in their order, each once')
        if pretrained and init_cfg:
            raise ValueError('pretrained and init_cfg both say where the weights come from: pass one of them')
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.init_cfg = {'type': 'Pretrained', 'checkpoint': pretrained} if pretrained else init_cfg
        self.register_load_state_dict_pre_hook(check_form)
        # else a trainable parameter had no gradient, which DistributedDataParallel takes for an error
        for module in self.without_gradient(max(self.out_indices)):
            module.requires_grad_(False)
        self.train()

    def without_gradient(self, last: int) -> list[nn.Module]:
        """The modules that no returned map needs, stage `last` being the last of these."""
        raise NotImplementedError

    def up_to_stage(self, stages: int) -> list[nn.Module]:
        """The modules from the images to the end of the first `stages` stages, without norms of maps."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> 'Backbone':
        """As nn.Module's, but what is frozen stays so."""
        super().train(mode)
        if self.frozen_stages >= 0:
            for module in self.up_to_stage(self.frozen_stages):
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
        own = self.state_dict()
        if self.first in state and own[self.first].shape[1] == 1:
            state[self.first] = state[self.first].sum(1, keepdim=True)  # what three equal colours give
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


def check_form(model: Backbone, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Raise ValueError where the kernels of a state dict are merged and the model's are not, or reverse.

    Called before one is loaded, by whomever: else mmengine would warn of missing keys, leave the large
    kernels or FCs random, and print a score.
    """
    if f'{prefix}{model.first.removesuffix("weight")}bias' in state:
        raise ValueError('the BatchNorms of these weights are folded, which is for inference without these '
                         'packages: take the weights that they were made from')
    keys = [key for key in state if key.startswith(prefix)]
    merged, trained = (any(part in key for key in keys) for part in (model.merged_part, model.trained_part))
    if merged and not model.is_merged:
        raise ValueError('the kernels of these weights are merged: '
                         f'pass model.backbone.{model.merged_argument}=True')
    if trained and not merged and model.is_merged:
        raise ValueError(f'the kernels of these weights are not merged: leave out {model.merged_argument}, '
                         'and call structural_reparam() afterwards')
