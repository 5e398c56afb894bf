"""The models whose effective receptive field is measured, by name, and what is the last feature map of
each."""
import argparse
import math
import textwrap
from collections import OrderedDict
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

import replknet_zoo
from replknet_zoo.own_models import build_own, is_own
from utils import UserError

PRETRAINED_BY_DEFAULT = ('resnet101', 'resnet152')  # as published


# ---- Names and weights -------------------------------------------------------------------------------------


def library_of(name: str) -> str:
    """Where --model is found: 'replknet', 'file', 'torchvision' or 'timm', in this order.

    Raises UserError if nowhere.
    """
    if name in replknet_zoo.MODELS:
        return 'replknet'
    if is_own(name):
        return 'file'
    if name in torchvision.models.list_models(module=torchvision.models):
        return 'torchvision'
    if timm.is_model(name):
        return 'timm'
    raise UserError(f'unknown --model {name}. It may be one of {", ".join(replknet_zoo.MODELS)}; a '
                    'classifier of torchvision or timm, such as resnet101 or convnext_base.fb_in1k '
                    '(torchvision.models.list_models() and timm.list_models() list them); or '
                    'FILE.py:FUNCTION, a function without arguments in your file that returns your model')


def build_model(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model of --model with its weights, on the CPU, in evaluation; its weights' name, mean and std.

    Raises UserError for weights that cannot be read or do not fit.
    """
    library, state = library_of(args.model), None
    kind = args.weights or ('pretrained' if args.model in PRETRAINED_BY_DEFAULT else 'random')
    if library == 'file' and kind == 'pretrained':
        raise UserError(f'--weights pretrained: {args.model} is in no library; its function may load them, '
                        'or --weights FILE')
    if kind not in ('pretrained', 'random'):
        try:
            state = replknet_zoo.load_weights(args.weights, args.model_key, args.model_prefix)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f'--weights: {error}') from error
        if replknet_zoo.is_quantized(state):
            raise UserError(f'--weights {args.weights} is in int8, which has no gradients: name the weights '
                            'that it was made from')
    build = {'replknet': replknet_model, 'file': own_model, 'torchvision': torchvision_model,
             'timm': timm_model}[library]
    torch.manual_seed(0)
    model, weights = build(args, kind, state)
    config = replknet_zoo.MODELS[args.model] if library == 'replknet' else None
    preprocessing = vars(config) if config else getattr(model, 'pretrained_cfg', {})
    mean = preprocessing.get('mean', replknet_zoo.IMAGENET_MEAN)
    std = preprocessing.get('std', replknet_zoo.IMAGENET_STD)
    if hasattr(model, 'structural_reparam'):  # the same to float32 rounding, in less time and memory
        model.eval().structural_reparam()
        model.deep_fuse_BN()
    return model.eval().requires_grad_(False), {'weights': weights, 'mean': list(mean), 'std': list(std)}


def replknet_model(args: argparse.Namespace, kind: str,
                   state: dict[str, Tensor] | None) -> tuple[nn.Module, str]:
    """A model of the registry, and the name of its weights."""
    if kind == 'pretrained':
        raise UserError(f'--weights pretrained: {args.model} is in no library; the README links to the '
                        'published weights, pass --weights FILE or --weights URL')
    if state is None:
        return replknet_zoo.create_model(args.model, num_classes=None, use_sync_bn=False), kind
    try:
        return replknet_zoo.model_for(args.model, state, args.weights), kind
    except ValueError as error:
        raise UserError(str(error)) from error


def own_model(args: argparse.Namespace, kind: str, state: dict[str, Tensor] | None) -> tuple[nn.Module, str]:
    """What FUNCTION of FILE.py returns, and the name of its weights."""
    try:
        model = build_own(args.model)
    except ValueError as error:
        raise UserError(f'--model {error}') from error
    if state is not None:
        load(model, state, args)
    return model, 'own' if state is None else kind


def torchvision_model(args: argparse.Namespace, kind: str,
                      state: dict[str, Tensor] | None) -> tuple[nn.Module, str]:
    """A classifier of torchvision, and the name of its weights."""
    name, size, options = args.model, args.input_size, {}
    if name.startswith('vit_'):
        options = {'image_size': size}
    elif name.startswith('maxvit'):
        options = {'input_size': (size, size)}
    if kind == 'pretrained':
        known = torchvision.models.get_model_weights(name)
        entry = known['IMAGENET1K_V1'] if 'IMAGENET1K_V1' in known.__members__ else known.DEFAULT
        try:
            if not options:
                return torchvision.models.get_model(name, weights=entry), entry.name
            state, kind = entry.get_state_dict(check_hash=True), entry.name
        except OSError as error:
            raise not_downloaded(args, error) from error
    try:
        model = torchvision.models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f'{name} does not take {size} x {size} pixels ({error}): pass another '
                        '--input_size') from error
    if state is not None:
        if name.startswith('vit_') and 'encoder.pos_embedding' in state:
            state = interpolate_embeddings(size, model.patch_size, state)
        load(model, state, args)
    return model, kind


def timm_model(args: argparse.Namespace, kind: str, state: dict[str, Tensor] | None) -> tuple[nn.Module, str]:
    """A model of timm, and the name of its weights; position embeddings are resized, as timm does it."""
    name, size, options, overlay = args.model, args.input_size, {}, {}
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the tag
        raise UserError(f'--model {name}: {error}') from error
    if kind == 'pretrained' and not config.has_weights:
        raise UserError(f'--weights pretrained: timm has none for {name}; pass --weights FILE')
    if config.fixed_input_size and config.input_size[-1] != size:
        options['img_size'] = size
    if state is not None:
        heads = [config.classifier] if isinstance(config.classifier, str) else config.classifier or []
        classes = [len(state[f'{head}.weight']) for head in heads if f'{head}.weight' in state]
        overlay = {'state_dict': state, **({'num_classes': classes[0]} if classes else {})}
    try:
        model = timm.create_model(name, pretrained=kind != 'random', pretrained_cfg_overlay=overlay,
                                  **options)
    except Exception as error:  # the hub's client and the models' own readers of weights raise anything
        if kind == 'pretrained':
            raise not_downloaded(args, error) from error
        what = f'{args.weights} does not fit {name}'
        if state is None:
            what = f'{name} cannot be built for {size} x {size} pixels'
        raise UserError(f'{what}: {textwrap.shorten(str(error), 600)}') from error
    return model, (config.tag or kind) if kind == 'pretrained' else kind


def load(model: nn.Module, state: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Load weights which must fit, but for the number of classes.

    Where that differs the last linear layer, which no map sees, is replaced.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weight = state.get(f'{linear[-1]}.weight') if linear else None
    if weight is not None and weight.dim() == 2:
        old = model.get_submodule(linear[-1])
        if len(weight) != old.out_features:
            model.set_submodule(linear[-1], nn.Linear(old.in_features, len(weight), old.bias is not None))
    state = OrderedDict(state)
    state._metadata = getattr(model.state_dict(), '_metadata', {})  # MNASNet asks for its version
    try:
        replknet_zoo.load_state(model, state, args.weights)
    except ValueError as error:
        raise UserError(f'{error} (--model {args.model})') from error


def not_downloaded(args: argparse.Namespace, error: Exception) -> UserError:
    """For pretrained weights that the library could not fetch."""
    reason = textwrap.shorten(f'{type(error).__name__}: {error}', 200)
    return UserError(f'the pretrained weights of {args.model} could not be downloaded ({reason}): download '
                     'them by hand and pass --weights FILE')


# ---- The last feature map ----------------------------------------------------------------------------------


def last_map(model: nn.Module, image: Tensor) -> Tensor:
    """The last feature map (N, C, H, W) of the model on a square image.

    What forward_features returns, the last if it returns several; without such a method, what enters the
    global pooling of a classifier; else the output. Tokens become a map, those of no place (class, registers)
    left out. Raises UserError where none of this is a map.
    """
    if hasattr(model, 'forward_features'):
        features = model.forward_features(image)
    elif isinstance(model, VisionTransformer):  # torchvision's: it pools nothing
        found = []
        with model.encoder.register_forward_hook(lambda *call: found.append(call[-1])):
            model(image)
        features = found[0]
    else:
        with GlobalPooling() as pooling:
            features = model(image)
        if isinstance(features, Tensor) and features.dim() == 2 and pooling.entered is not None:
            features = pooling.entered
    if isinstance(features, (tuple, list)):
        features = features[-1]
    if isinstance(features, Tensor) and features.dim() == 3:
        features = tokens_to_map(features, getattr(model, 'num_prefix_tokens', None))
    if not isinstance(features, Tensor) or features.dim() != 4:
        found = type(features).__name__
        if isinstance(features, Tensor):
            found = f'a tensor of shape {tuple(features.shape)}'
        raise UserError(f'no feature map is found in {type(model).__name__}, only {found}: load it with '
                        '--model FILE.py:FUNCTION and give it a method forward_features(x) that returns its '
                        'last map, (N, C, H, W)')
    channels_last = getattr(model, 'output_fmt', None) == 'NHWC' or features.shape[2] != features.shape[3]
    return features.permute(0, 3, 1, 2) if channels_last else features


class GlobalPooling(TorchFunctionMode):
    """While active, notes the map (N, C, H, W) that last entered an average over its pixels.

    Or an adaptive average (VGG's 7 x 7). Of a model of one's own that may be another map than the last: its
    shape is printed.
    """

    entered: Tensor | None = None

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        averages = function is F.adaptive_avg_pool2d
        if function in (torch.mean, torch.Tensor.mean):
            dims = kwargs.get('dim', args[1] if len(args) > 1 else None)
            averages = isinstance(dims, (tuple, list)) and sorted(dim % 4 for dim in dims) == [2, 3]
        result = function(*args, **kwargs)
        if function is F.avg_pool2d:
            averages = tuple(result.shape[2:]) == (1, 1)
        if averages and args[0].dim() == 4:
            self.entered = args[0]
        return result


def tokens_to_map(tokens: Tensor, prefix: int | None) -> Tensor:
    """(N, prefix + S * S, C) to (N, C, S, S); prefix None: one class token, or none. Raises UserError where
    that does not fit."""
    count = tokens.shape[1]
    if prefix is None:
        prefix = int(math.isqrt(count) ** 2 != count)
    side = math.isqrt(count - prefix)
    if side < 2 or side ** 2 != count - prefix:  # one token is the class token
        raise UserError(f'{count} tokens, {prefix} of them of no place, make no square map: load the model '
                        'with --model FILE.py:FUNCTION and give it a method forward_features(x) that '
                        'returns its last map, (N, C, H, W)')
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
