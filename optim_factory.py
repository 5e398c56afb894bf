"""Parameter groups, layer-wise learning-rate decay, optimizer."""
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence

import timm.optim
import torch
from torch import nn

# stem, 12 for the stages, head: the recipe's number, for models of other depths too, so that a decay means the same for all
LAYER_DECAY_GROUPS = 14


class RepLKNetLayerDecayValueAssigner:
    """Map parameter names to layer ids, and ids to learning-rate scales: `values`, from the stem's to the head's.

    Without `layers` the published ids, made for blocks 2 2 18 2 and 14 values: stem 0; first stage 1; second 2; third
    3 ... 11, four blocks an id; fourth 12; norm and head 13. A transition has the id of the last block before it.
    With a model's own `layers` (RepLKBlock + ConvFFN pairs a stage) the third stage, whatever its depth, is spread over the
    ids that the others leave of len(values), so that every parameter has one; for 2 2 18 2 and 14 values they are the same.
    """

    def __init__(self, values: Sequence[float], layers: Sequence[int] | None = None):
        if layers is not None and (len(layers) != 4 or len(values) < 6):
            raise ValueError(f'layer decay is defined for four stages and at least 6 values, not {len(layers)} and {len(values)}')
        self.values = values
        self.layers = layers

    def get_scale(self, layer_id: int) -> float:
        """The factor of the learning rate of a layer id."""
        return self.values[layer_id]

    def get_layer_id(self, name: str) -> int:
        """The id of a parameter, by its name in RepLKNet (with or without DistributedDataParallel's `module.`)."""
        part, *rest = name.removeprefix('module.').split('.')
        last = 13 if self.layers is None else len(self.values) - 1  # the published ids do not ask for the values
        if part == 'stem':
            return 0
        if part not in ('stages', 'transitions'):
            return last
        stage = int(rest[0])
        if stage < 2:
            return 1 + stage
        if stage == 3:
            return last - 1
        if part == 'transitions' or rest[1] != 'blocks':  # it follows the stage's last block
            return last - 2
        block = int(rest[2])
        if self.layers is None:
            return min(3 + block // 4, last - 2)
        return 3 + block // 2 * (last - 4) // self.layers[2]


def layer_decay_assigner(decay: float, layers: Sequence[int]) -> RepLKNetLayerDecayValueAssigner:
    """The assigner of the published 14 ids, for a model of these depths: decay ** 13 for the stem, 1 for the head."""
    values = [decay ** (LAYER_DECAY_GROUPS - 1 - i) for i in range(LAYER_DECAY_GROUPS)]
    return RepLKNetLayerDecayValueAssigner(values, layers)


def get_parameter_groups(model: nn.Module, weight_decay: float = 1e-5, skip_list: Collection[str] = (),
                         get_num_layer: Callable[[str], int] | None = None,
                         get_layer_scale: Callable[[int], float] | None = None) -> list[dict]:
    """Trainable parameters in groups of one layer id and one weight decay, in the order of their first parameter.

    get_num_layer maps a parameter's name to its layer id, get_layer_scale an id to the factor of its learning rate.
    Parameters of one dimension (biases, norms) or none (scales) and those named in skip_list have no weight decay. Each group
    holds `params`, `weight_decay` and `lr_scale` (1 without get_layer_scale).
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.dim() <= 1 or name in skip_list else weight_decay
        layer = get_num_layer(name) if get_num_layer is not None else None
        scale = get_layer_scale(layer) if get_layer_scale is not None else 1.0
        group = groups.setdefault((layer, decay), {'params': [], 'weight_decay': decay, 'lr_scale': scale})
        group['params'].append(parameter)
    return list(groups.values())


def create_optimizer(args: Namespace, model: nn.Module, get_num_layer: Callable[[str], int] | None = None,
                     get_layer_scale: Callable[[int], float] | None = None, filter_bias_and_bn: bool = True,
                     skip_list: Collection[str] | None = None) -> torch.optim.Optimizer:
    """Build timm's optimizer args.opt (`sgd` has Nesterov momentum, `momentum` has not; `lookahead_` may stand before).

    Reads opt, lr, weight_decay, opt_eps, opt_betas and momentum of args; what an optimizer does not know is left out.
    skip_list None takes model.no_weight_decay() where there is one. Raises ValueError for an unknown or unusable optimizer.
    """
    if filter_bias_and_bn:
        if skip_list is None:
            skip_list = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
        parameters = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    else:
        parameters = [{'params': [p for p in model.parameters() if p.requires_grad], 'weight_decay': args.weight_decay}]
    options = {'eps': args.opt_eps, 'betas': args.opt_betas}
    options = {name: value for name, value in options.items() if value is not None}
    name = 'novograd' if args.opt.lower() == 'nvnovograd' else args.opt.lower()  # timm keeps one under two old names
    try:
        return timm.optim.create_optimizer_v2(parameters, name, lr=args.lr, weight_decay=0.0, momentum=args.momentum, **options)
    except (ValueError, AssertionError, TypeError, IndexError, ImportError) as error:  # timm passes on what a constructor raises
        raise ValueError(f'--opt {args.opt} with --opt_betas {args.opt_betas} cannot be built ({error}). Choose adamw, sgd, '
                         'momentum, lamb, nadam, radam, novograd or another of timm.optim.list_optimizers()') from error
