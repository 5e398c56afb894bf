"""Layer-wise learning-rate decay for RepLKNet in MMSegmentation and MMDetection.

In a config: custom_imports = dict(imports=['segmentation.replknet', 'segmentation.layer_decay'], allow_failed_imports=False)
optim_wrapper = dict(constructor='RepLKNetLayerDecay', paramwise_cfg=dict(decay_rate=0.9), ...)
"""
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from optim_factory import RepLKNetLayerDecayValueAssigner, get_parameter_groups

GROUPS = 14  # of the published fine-tuning: stem 0, stages 1 to 12, head 13


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepLKNetLayerDecay(DefaultOptimWrapperConstructor):
    """The learning rate of layer id i is lr * decay_rate ** (13 - i): that of necks and heads is lr itself.

    Ids are those of main.py's --layer_decay. Biases, norms and single numbers have no weight decay. paramwise_cfg has decay_rate
    and nothing else.
    """

    def _validate_cfg(self) -> None:
        if set(self.paramwise_cfg) != {'decay_rate'} or not 0 < self.paramwise_cfg['decay_rate'] <= 1:
            raise ValueError(f'paramwise_cfg of RepLKNetLayerDecay is decay_rate alone, above 0 and up to 1, not '
                             f'{dict(self.paramwise_cfg)}')

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """Fill `params` with the groups of all trainable parameters of a model that has a `backbone`."""
        values = [self.paramwise_cfg['decay_rate'] ** (GROUPS - 1 - i) for i in range(GROUPS)]
        assigner = RepLKNetLayerDecayValueAssigner(values, [len(stage.blocks) // 2 for stage in module.backbone.stages])

        def layer_id(name: str) -> int:
            return assigner.get_layer_id(name.removeprefix('backbone.')) if name.startswith('backbone.') else GROUPS - 1

        for group in get_parameter_groups(module, self.base_wd, (), layer_id, assigner.get_scale):
            params.append({**group, 'lr': self.base_lr * group['lr_scale']})
