"""Layer-wise learning-rate decay for RepLKNet in MMSegmentation and MMDetection.

In a config:
    custom_imports = dict(imports=['segmentation.replknet', 'segmentation.layer_decay'],
                          allow_failed_imports=False)
    optim_wrapper = dict(constructor='RepLKNetLayerDecay', paramwise_cfg=dict(decay_rate=0.9), ...)
"""
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from optim_factory import LAYER_DECAY_GROUPS, get_parameter_groups, layer_decay_assigner


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepLKNetLayerDecay(DefaultOptimWrapperConstructor):
    """The learning rate of layer id i is lr * decay_rate ** (13 - i): that of necks and heads is lr itself.

    Ids are those of main.py's --layer_decay. Biases, norms and single numbers have no weight decay.
    paramwise_cfg has decay_rate and nothing else.
    """

    def _validate_cfg(self) -> None:
        if set(self.paramwise_cfg) != {'decay_rate'} or not 0 < self.paramwise_cfg['decay_rate'] <= 1:
            raise ValueError('paramwise_cfg of RepLKNetLayerDecay is decay_rate alone, above 0 and up to 1, '
                             f'not {dict(self.paramwise_cfg)}')

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """Fill `params` with the groups of all trainable parameters of a model that has a `backbone`."""
        assigner = layer_decay_assigner(self.paramwise_cfg['decay_rate'], module.backbone.depths)

        def layer_id(name: str) -> int:
            part, _, rest = name.partition('.')
            return assigner.get_layer_id(rest) if part == 'backbone' else LAYER_DECAY_GROUPS - 1

        for group in get_parameter_groups(module, self.base_wd, (), layer_id, assigner.get_scale):
            params.append({**group, 'lr': self.base_lr * group['lr_scale']})
