"""Parameter groups, layer-wise learning-rate decay, optimizer."""
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence

import timm.optim
import torch
from torch import nn

from replknet_zoo.layer_ids import LAYER_DECAY_GROUPS, layer_id

# parameter groups' entries for how a step is computed, not what it is: another machine or torch may differ
IMPLEMENTATION = {'foreach', 'fused', 'capturable', 'differentiable'}


class RepLKNetLayerDecayValueAssigner:
    """Map parameter names to layer ids, and ids to learning-rate scales: `values`, from stem to head.

    layers: the blocks of each stage, layer_id's `depths`; None for the published ids, made for 14 values.
    """

    def __init__(self, values: Sequence[float], layers: Sequence[int] | None = None):
        if layers is not None and (len(layers) != 4 or len(values) < 6):
            raise ValueError('layer decay is defined for four stages and at least 6 values, '
                             f'not {len(layers)} and {len(values)}')
        self.values = values
        self.layers = layers

    def get_scale(self, layer_id: int) -> float:
        """The factor of the learning rate of a layer id."""
        return self.values[layer_id]

    def get_layer_id(self, name: str) -> int:
        """The id of a parameter by its name: replknet_zoo.layer_ids says which."""
        # the published ids do not ask for the values
        groups = LAYER_DECAY_GROUPS if self.layers is None else len(self.values)
        return layer_id(name, self.layers, groups)


def layer_decay_assigner(decay: float, layers: Sequence[int]) -> RepLKNetLayerDecayValueAssigner:
    """The assigner of 14 ids for a model of these depths: scales from decay ** 13, the stem's, to 1."""
    values = [decay ** (LAYER_DECAY_GROUPS - 1 - i) for i in range(LAYER_DECAY_GROUPS)]
    return RepLKNetLayerDecayValueAssigner(values, layers)


def get_parameter_groups(model: nn.Module, weight_decay: float = 1e-5, skip_list: Collection[str] = (),
                         get_num_layer: Callable[[str], int] | None = None,
                         get_layer_scale: Callable[[int], float] | None = None) -> list[dict]:
    """Trainable parameters in groups of one layer id and one weight decay, ordered by first parameter.

    get_num_layer maps a parameter's name to its layer id, get_layer_scale an id to the factor of its learning
    rate. Parameters of one dimension (biases, norms) or none (scales) and those named in skip_list have no
    weight decay. Each group holds `params`, `weight_decay` and `lr_scale` (1 without get_layer_scale).
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
    """Build timm's optimizer args.opt: `sgd` has Nesterov momentum, `momentum` not; `lookahead_` may precede.

    Reads opt, lr, weight_decay, opt_eps, opt_betas and momentum of args; what an optimizer does not know is
    left out. skip_list None takes model.no_weight_decay() where there is one. On GPUs torch's own optimizers
    are the fused ones where there are such, whose steps need not be waited for (engine.py).
    Raises ValueError for an unknown or unusable optimizer.
    """
    if filter_bias_and_bn:
        if skip_list is None:
            skip_list = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
        parameters = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    else:
        parameters = [{'params': [p for p in model.parameters() if p.requires_grad],
                       'weight_decay': args.weight_decay}]
    betas = '' if args.opt_betas is None else f' with --opt_betas {" ".join(map(str, args.opt_betas))}'
    try:
        name = timm_name(args.opt)
        optimizer = timm.optim.create_optimizer_v2(parameters, name, lr=args.lr, weight_decay=0.0,
                                                   momentum=args.momentum, **_options(args, name),
                                                   **_implementation(name, model))
    except (ValueError, AssertionError, TypeError, IndexError, ImportError) as error:
        # timm passes on whatever a constructor raises
        raise ValueError(f'--opt {args.opt}{betas} cannot be built ({error}). Choose adamw, sgd, momentum, '
                         'lamb, nadam, radam or another of timm.optim.list_optimizers()') from error
    base = getattr(optimizer, '_base_optimizer', optimizer)  # of Lookahead
    if isinstance(base, timm.optim.kron.Kron):  # it would compile four functions for each shape, for minutes
        base.step = torch.compiler.set_stance('force_eager')(base.step)
    if isinstance(base, timm.optim.Adahessian):  # it draws from a generator that is not in its state
        base.register_state_dict_post_hook(_save_generator)
        base.register_load_state_dict_pre_hook(_load_generator)
    return optimizer


def check_second_order(args: Namespace) -> None:
    """Raise ValueError where adahessian, which differentiates the gradients, would fail or go wrong."""
    need = f'--opt {args.opt} differentiates the gradients: '
    if os.environ.get('LARGE_KERNEL_CONV_IMPL') != 'pytorch':
        raise ValueError(need + 'set LARGE_KERNEL_CONV_IMPL=pytorch, '
                                'for convolutions that can be differentiated twice')
    if args.distributed:
        raise ValueError(need + f'it trains in one process, not in {args.world_size}')
    if args.compile:
        raise ValueError(need + 'torch.compile allows that once only; leave out --compile')
    if args.use_checkpoint:
        raise ValueError(need + 'activation checkpointing allows that once only; leave out --use_checkpoint')
    if args.use_amp and args.amp_dtype == 'float16':
        raise ValueError(need + 'the loss scale of float16 would stay in; pass --amp_dtype bfloat16')


def timm_name(opt: str) -> str:
    """timm's own name of an --opt, the same for all its spellings. Raises ValueError for an unknown one."""
    name = opt.lower()
    lookahead = 'lookahead_' if name.startswith('lookahead_') else ''
    name = name.removeprefix('lookahead_')
    name = 'novograd' if name == 'nvnovograd' else name  # timm keeps one under two old names
    return lookahead + timm.optim.get_optimizer_info(name).name


def _options(args: Namespace, name: str) -> dict[str, object]:
    """What timm's optimizer `name` takes beside the common options."""
    info = timm.optim.get_optimizer_info(name.removeprefix('lookahead_'))
    if info.has_betas and args.opt_betas is not None and len(args.opt_betas) != info.num_betas:
        raise ValueError(f'it takes {info.num_betas} betas, not {len(args.opt_betas)}')
    options = {'eps': args.opt_eps, 'betas': args.opt_betas}
    if info.opt_class is timm.optim.kron.Kron:
        if not torch.backends.opt_einsum.is_available():
            raise ImportError('it needs the package opt_einsum: pip install opt_einsum. Without it a product '
                              'in its step takes 60 GB for 31 x 31 kernels of 128 channels')
        options['deterministic'] = True  # draws from a generator in its state, the same in all processes
    return {option: value for option, value in options.items() if value is not None}


def _implementation(name: str, model: nn.Module) -> dict[str, bool]:
    """How timm's optimizer `name` is to compute."""
    optimizer = timm.optim.get_optimizer_info(name.removeprefix('lookahead_')).opt_class
    fused = 'fused' in inspect.signature(optimizer).parameters and all(p.is_cuda for p in model.parameters())
    return {'fused': True} if fused else {}


def _save_generator(optimizer: timm.optim.Adahessian, state: dict) -> None:
    state['generator_state'] = optimizer.generator.get_state()


def _load_generator(optimizer: timm.optim.Adahessian, state: dict) -> None:
    if 'generator_state' in state:
        optimizer.generator = torch.Generator(optimizer.param_groups[0]['params'][0].device)
        optimizer.generator.set_state(state['generator_state'])


def restore_optimizer(optimizer: torch.optim.Optimizer, opt: str, state: dict, saved_opt: str) -> None:
    """load_optimizer_state() of a run of --opt `saved_opt` into that of a run of --opt `opt`.

    Raises ValueError, which says what must be the same, where they do not fit.
    """
    try:
        if timm_name(saved_opt) != timm_name(opt):
            raise ValueError(f'it is of --opt {saved_opt}, not {opt}')
        load_optimizer_state(optimizer, state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f'the optimizer state of the checkpoint does not fit ({error}): --opt, '
                         '--layer_decay and --weight_decay must be those of its run') from error


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put back an optimizer's state_dict() as a checkpoint has it: tuples as lists, data types by name.

    eps, betas, momentum and lr_scale stay those that `optimizer` was built with, as does how it computes.
    Raises ValueError, or what load_state_dict raises, where the state is of another optimizer or of other
    parameter groups.
    """
    built = optimizer.state_dict()
    state = _in_the_types_of(built, state)
    # before it is loaded: where a fused optimizer keeps the number of steps, others do not
    groups = [{**saved, **{name: own[name] for name in IMPLEMENTATION & own.keys()}}
              for own, saved in zip(built['param_groups'], state['param_groups'], strict=False)]
    state = {**state, 'param_groups': groups + state['param_groups'][len(groups):]}
    other = set()
    # not strict: load_state_dict tells another number of groups
    for own, saved in zip(built['param_groups'], state['param_groups'], strict=False):
        # Adan's groups count once they have begun
        other |= {f'it has {name}' for name in saved.keys() - own.keys() - {'step'}}
        other |= {f'{name} is {saved[name]}, not {value}' for name, value in own.items()
                  if isinstance(value, (bool, str)) and name not in IMPLEMENTATION
                  and saved.get(name, value) != value}
    if not other:
        try:
            optimizer.load_state_dict(state)
        except KeyError as error:
            other = {f'it lacks {error}'}
    for own, group in zip(built['param_groups'], optimizer.param_groups, strict=True):
        # loading adds what older versions did not have
        other |= {f'it lacks {name}' for name in own.keys() - group.keys()}
        group.update({name: own[name] for name in ('eps', 'betas', 'momentum', 'lr_scale') if name in own})
    if other:
        raise ValueError(f'it is of another optimizer: {", ".join(sorted(other))}')


def _in_the_types_of(built: object, saved: object) -> object:
    """`saved` with tuples and data types where `built` has them."""
    if isinstance(built, dict) and isinstance(saved, dict):
        return {name: _in_the_types_of(built.get(name), value) for name, value in saved.items()}
    if isinstance(built, (list, tuple)) and isinstance(saved, (list, tuple)) and len(built) == len(saved):
        return type(built)(map(_in_the_types_of, built, saved))
    if isinstance(built, torch.dtype) and isinstance(saved, str):
        return getattr(torch, saved.removeprefix('torch.'))
    return saved
