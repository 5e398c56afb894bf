"""Every model of MODELS in timm, by `import replknet_zoo.timm_models`.

    timm.create_model('replknet_31b.in1k', pretrained=True)
    timm.create_model('replknet_31b', features_only=True, out_indices=(1, 3), in_chans=1)

Names are MODELS' in small letters with underscores; behind the dot stands which weights. The models are those
of replknet.py and repmlpnet.py, with their state dicts, and the methods that timm's models have beside.
"""
import contextlib
import math
from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from replknet import RepLKNet
from replknet_zoo import CROP_PCT, MODELS, WARP_FROM, create_model, name_of
from replknet_zoo.layer_ids import layer_id
from replknet_zoo.weights import state_dict_of
from repmlpnet import RepMLPNet


class _OfTimm:
    """What timm asks of a model, over what both families have: stage_maps, head, depths, channels.

    final_norm and between: the names of the norm behind the last stage, and of the layers between stages.
    norm_in_features: whether that norm is a part of forward_features, or of forward_head.
    """
    final_norm: str
    between: str
    norm_in_features: bool

    def adopt(self, in_chans: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Set what timm reads. The model has in_chans already, and a head, which 0 classes take away."""
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.channels[-1]
        self.feature_info = [{'num_chs': channels, 'reduction': 4 * 2 ** i, 'module': self.name_of_stage(i)}
                             for i, channels in enumerate(self.channels)]
        self._modules.pop('avgpool', None)  # global_pool takes its place
        self._set_pool(global_pool, num_classes)
        if num_classes == 0 or self.head_hidden_size != self.num_features:
            self.reset_classifier(num_classes)

    def _set_pool(self, global_pool: str, num_classes: int) -> None:
        if num_classes and not global_pool:
            raise ValueError(f'{num_classes} classes need a global_pool, such as avg: without one the model '
                             'gives maps, for num_classes=0')
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head, of random weights; none for 0 classes, where global_pool may be ''."""
        self._set_pool(self.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
                     if num_classes else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_chans, H, W) to logits (N, num_classes); for 0 classes to what forward_head gives."""
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to what they are computed from: (N, C), a map without global_pool."""
        if not self.norm_in_features:
            x = getattr(self, self.final_norm)(x)
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: int | Collection[int] | None = None,
                              norm: bool = False, stop_early: bool = False, output_fmt: str = 'NCHW',
                              intermediates_only: bool = False) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What forward_features gives, and the maps behind the stages `indices`, or these maps alone.

        indices: None for all, a number for as many last ones, negative ones count from the end. norm: the
        last stage's map goes through the final norm. stop_early: what no map needs is not computed, and the
        first result is the last map. Raises ValueError for another output_fmt than NCHW.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt must be NCHW, not {output_fmt}')
        final = len(self.stages) - 1
        taken = sorted({*feature_take_indices(final + 1, indices)[0]})
        computed = taken if stop_early or intermediates_only else sorted({*taken, final})
        maps = dict(zip(computed, self.stage_maps(x, computed), strict=True))
        features = maps[computed[-1]]
        if final in maps and (norm or (self.norm_in_features and not intermediates_only)):
            normed = getattr(self, self.final_norm)(features)
            features = normed if self.norm_in_features else features
            maps[final] = normed if norm else maps[final]
        intermediates = [maps[i] for i in taken]
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(self, indices: int | Collection[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Take out what the maps behind the stages `indices` do not need; return these, counted from 0."""
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[:last + 1]
        setattr(self, self.between, getattr(self, self.between)[:last])
        if prune_norm or cut:
            setattr(self, self.final_norm, nn.Identity())
        self.num_features = self.channels[last]
        if prune_head or cut:
            self.reset_classifier(0, '')
        return taken

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Parameter names to main.py's layer ids; coarse: a group for the stem, each stage and the head.

        timm numbers the groups that there are: a third stage of fewer than 9 blocks leaves some ids out.
        """
        if not coarse:
            return lambda name: layer_id(name, self.depths)
        stem, last = ('stem', 'conv_embedding'), len(self.stages) + 1

        def group(name: str) -> int:
            part, *rest = name.split('.')
            return 0 if part in stem else 1 + int(rest[0]) if part in ('stages', self.between) else last
        return group

    def no_weight_decay(self) -> set[str]:
        """Empty: biases and norms, which timm leaves out by itself, are all that has no weight decay."""
        return set()

    def deep_fuse_BN(self) -> None:
        """Fold every BatchNorm, in place; the final norm only where the head sees means, which commute."""
        head, self.head = self.head, self.head if self.global_pool.pool_type == 'avg' else nn.Identity()
        super().deep_fuse_BN()
        self.head = head


class TimmRepLKNet(_OfTimm, RepLKNet):
    """RepLKNet with the methods of timm's models."""
    final_norm, between, norm_in_features = 'norm', 'transitions', False

    def name_of_stage(self, i: int) -> str:
        return f'stages.{i}'

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing on or off."""
        for module in (self, *self.stages):
            module.use_checkpoint = enable


class TimmRepMLPNet(_OfTimm, RepMLPNet):
    """RepMLPNet with the methods of timm's models."""
    final_norm, between, norm_in_features = 'head_norm', 'embeds', True

    def name_of_stage(self, i: int) -> str:
        return f'stages.{i}.{self.depths[i] - 1}'  # a stage is a list of units

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch activation checkpointing on or off."""
        self.use_checkpoint = enable


CLASSES = {RepLKNet: TimmRepLKNet, RepMLPNet: TimmRepMLPNet}


def _build(name: str, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg',
           drop_rate: float = 0.0, drop_path_rate: float = 0.0,
           img_size: int | tuple[int, int] | None = None, device: torch.device | str | None = None,
           dtype: torch.dtype | None = None, **options) -> nn.Module:
    """The model `name` of MODELS by timm's arguments; options: further keywords of its class."""
    if 'out_indices' in options:
        raise TypeError('out_indices goes with features_only=True')
    with torch.device(device) if device else contextlib.nullcontext():
        model = create_model(name, drop_path_rate, num_classes=max(num_classes, 1), in_channels=in_chans,
                             use_sync_bn=False, **options)
        # a class of the same model with more methods, so that the builders of MODELS serve here too
        model.__class__ = CLASSES[type(model)]
        model.adopt(in_chans, num_classes, global_pool, drop_rate)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size or model.size_multiples
    if any(side % multiple for side, multiple in zip(sides, model.size_multiples, strict=True)):
        raise ValueError(f'{name} takes images of multiples of {model.size_multiples} pixels, not {img_size}')
    return model.to(dtype=dtype)


# ---- Weights -----------------------------------------------------------------------------------------------

MMPRETRAIN = 'https://download.openmmlab.com/mmclassification/v0/'
# published files as mmpretrain converted them, by model and tag: side in pixels and plain URL
REPLKNET_URLS = {
    'RepLKNet-31B': {
        'in1k': (224, 'replknet-31B_3rdparty_in1k_20221118-fd08e268.pth'),
        'in1k_384': (384, 'replknet-31B_3rdparty_in1k-384px_20221118-03a170ce.pth'),
        'in22k_ft_in1k': (224, 'replknet-31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46.pth'),
        'in22k_ft_in1k_384': (384, 'replknet-31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24.pth')},
    'RepLKNet-31L': {
        'in22k_ft_in1k_384': (384, 'replknet-31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c.pth')},
    'RepLKNet-XL': {
        'meg73m_ft_in1k_320': (320, 'replknet-XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d.pth')},
}
# older weights than those of the published table, for another crop
REPMLPNET_URLS = {'RepMLPNet-B224': 'repmlp-base_3rdparty_8xb64_in1k_20220330-1cb1f11b.pth',
                  'RepMLPNet-B256': 'repmlp-base_3rdparty_8xb64_in1k-256px_20220330-7c5a91ce.pth'}


def _timm_name(name: str) -> str:
    return name.lower().replace('-', '_')


def _cfg(name: str, size: int | None = None, **more) -> dict:
    """timm's description of weights of the model `name`: pre-processing as main.py's, and where they are."""
    config = MODELS[name]
    size, of_replknet = size or config.input_size, name.startswith('RepLKNet')
    warped = size >= WARP_FROM and config.crop_pct is None
    crop_pct = config.crop_pct or (1.0 if warped or size <= 32 else CROP_PCT)
    return {'input_size': (3, size, size), 'pool_size': (math.ceil(size / 32),) * 2, 'num_classes': 1000,
            'mean': config.mean, 'std': config.std, 'interpolation': config.interpolation,
            'crop_pct': crop_pct, 'crop_mode': 'squash' if warped else 'center', 'classifier': 'head',
            'first_conv': 'stem.0.conv' if of_replknet else 'conv_embedding.conv',
            'fixed_input_size': not of_replknet, 'origin_url': (config.links or (None,))[0], **more}


def _cfgs() -> dict[str, dict]:
    """_cfg of all weights, by timm's names with tags."""
    found = {}
    for name in MODELS:
        for tag, (size, file) in REPLKNET_URLS.get(name, {}).items():
            found[f'{_timm_name(name)}.{tag}'] = _cfg(name, size, url=f'{MMPRETRAIN}replknet/{file}')
        if name in REPMLPNET_URLS:
            url = f'{MMPRETRAIN}repmlp/{REPMLPNET_URLS[name]}'
            # as mmpretrain's configs evaluate them: at 224 px images are resized to a square first
            mode = 'squash' if MODELS[name].input_size == 224 else 'center'
            found[f'{_timm_name(name)}.mmpretrain_in1k'] = _cfg(name, crop_pct=CROP_PCT, crop_mode=mode,
                                                                url=url)
        if name not in REPLKNET_URLS:
            tag = '' if MODELS[name].top1 is None else '.in1k'  # a toy has no weights
            found[_timm_name(name) + tag] = _cfg(name)
    return found


default_cfgs = generate_default_cfgs(_cfgs())


def _check_source(variant: str, kwargs: dict) -> None:
    """Raise RuntimeError where pretrained weights are asked for that timm cannot fetch."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.has_weights or cfg.state_dict:
        return
    with_tag = '.'.join(filter(None, (variant, cfg.tag)))
    where = (f'are published on Google Drive alone: fetch {cfg.origin_url} with a browser' if cfg.origin_url
             else 'are not published')
    raise RuntimeError(f"the weights of {with_tag} {where}; pass pretrained_cfg_overlay={{'file': FILE}} for "
                       'a file, or pretrained=False')


def _filter(checkpoint: dict, model: nn.Module) -> dict[str, Tensor]:
    """The state dict in what timm read, by our keys; the model becomes merged where that is."""
    state = state_dict_of(checkpoint, 'the file of weights')
    model.take_form(state)
    if model.is_folded:
        raise ValueError('the BatchNorms of these weights are folded, which is for inference: pass those '
                         'that they were made from, or read them by replknet_zoo.model_for')
    own = ('head.', f'{model.final_norm}.')  # a backbone lacks them; some files lack the counters
    missing = [key for key in model.state_dict() if key not in state and not key.startswith(own)
               and not key.endswith('.num_batches_tracked')]
    if missing:  # where classes differ timm loads what fits, be it nothing
        raise ValueError(f'these are weights of {name_of(state) or "another model"}, not of this one: there '
                         f'is no {missing[0]}')
    return state


# ---- The registry ------------------------------------------------------------------------------------------

def _register(name: str) -> Callable[..., nn.Module]:
    """Register the model `name` of MODELS under its name in timm."""
    variant = _timm_name(name)

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        if pretrained:
            _check_source(variant, kwargs)
        features = {'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'}
        return build_model_with_cfg(partial(_build, name), variant, pretrained, feature_cfg=features,
                                    pretrained_filter_fn=_filter, **kwargs)
    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f'{name} ({MODELS[name].source}), by the arguments of timm.create_model.'
    return register_model(create)


ENTRYPOINTS = {_timm_name(name): _register(name) for name in MODELS}
