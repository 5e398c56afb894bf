"""The named models: build one, its pre-processing and provenance, and from weights back to their model.

`create_model(name)`, `MODELS`, and what other code needs beside: `load_weights` and `load_state`
(weights.py), `compile_for_inference` (inference.py), `quantize` (calibration.py; quantized.py has the int8
layer). timm_models.py has them all for timm, own_models.py takes FILE.py:FUNCTION, layer_ids.py says what
layer decay goes by. A family joins by its entries in MODELS, and by its rows in inference.FUSED.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from replknet import RepLKNet, create_RepLKNet31B, create_RepLKNet31L, create_RepLKNetXL
from replknet_zoo.calibration import quantize
from replknet_zoo.inference import compile_for_inference
from replknet_zoo.own_models import is_own, own_model
from replknet_zoo.quantized import is_quantized, take_form
from replknet_zoo.weights import CHECKPOINT_TYPES, load_state, load_weights, read_checkpoint, state_dict_of
from repmlpnet import RepMLPNet, model_map

__all__ = ['CHECKPOINT_TYPES', 'CROP_PCT', 'HALF', 'IMAGENET_MEAN', 'IMAGENET_STD', 'MODELS', 'WARP_FROM',
           'ModelConfig', 'compile_for_inference', 'create_model', 'is_quantized', 'load_state',
           'load_weights', 'model_for', 'name_of', 'quantize', 'read_checkpoint', 'state_dict_of']

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # mean and std of RepLKNet-XL: pixels become -1 ... 1
WARP_FROM = 384  # pixels a side: published, from this size on images are warped in evaluation, not cropped
CROP_PCT = 224 / 256


@dataclass(frozen=True)
class ModelConfig:
    """A named model: how it is built, its published weights' pre-processing, and what is published of it."""
    build: Callable[..., nn.Module]
    source: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    input_size: int = 224  # pixels a side of the published weights; of the smallest where there are several
    crop_pct: float | None = None  # of the centre crop in evaluation; None: as main.py's --crop_pct says
    interpolation: str = 'bicubic'  # in evaluation
    sync_bn: bool = True  # whether its recipe shares the statistics of batches between GPUs
    top1: float | None = None  # percent, at input_size
    parameters: float | None = None  # millions, merged
    gmacs: float | None = None  # of convolutions and linear layers at input_size, merged
    links: tuple[str, ...] = ()  # to weights


# ---- RepLKNet ----------------------------------------------------------------------------------------------

def _of_table_5(kernels: tuple[int, ...], parameters: float, gmacs: float, top1: float,
                small_kernel: int | None = 5) -> ModelConfig:
    build = partial(RepLKNet, large_kernel_sizes=kernels, layers=(2, 2, 18, 2),
                    channels=(128, 256, 512, 1024), small_kernel=small_kernel)
    return ModelConfig(build, 'paper, Table 5: ImageNet-1K, 120 epochs, 224 px', top1=top1,
                       parameters=parameters, gmacs=gmacs)


# ---- RepMLPNet ---------------------------------------------------------------------------------------------

DRIVE = 'https://drive.google.com/file/d/{}/view'
OF_REPMLPNET = dict(interpolation='bilinear', crop_pct=1.0, sync_bn=False)


def _build_repmlpnet(create: Callable[..., nn.Module], drop_path_rate: float = 0.0,
                     num_classes: int | None = 1000, use_sync_bn: bool = False, **options) -> nn.Module:
    """A RepMLPNet by the arguments that all models here take."""
    if drop_path_rate:
        raise ValueError(f'RepMLPNet has no drop path: the rate must be 0, not {drop_path_rate}')
    model = create(num_class=num_classes, **options)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if use_sync_bn else model


def _repmlpnet(name: str, size: int, top1: float, parameters: float, gmacs: float, file: str) -> ModelConfig:
    # parameters are counted without BatchNorms, as published
    return ModelConfig(partial(_build_repmlpnet, model_map[name]), 'published: ImageNet-1K, 100 epochs',
                       input_size=size, top1=top1, parameters=parameters, gmacs=gmacs,
                       links=(DRIVE.format(file),), **OF_REPMLPNET)


MODELS = {
    'RepLKNet-31B': ModelConfig(create_RepLKNet31B, 'published: ImageNet-1K and 22K-to-1K, 224 and 384 px',
                                top1=83.5, parameters=79.9, gmacs=15.4),
    'RepLKNet-31L': ModelConfig(create_RepLKNet31L, 'published: ImageNet-22K-to-1K, 384 px', input_size=384,
                                top1=86.6, parameters=172.7, gmacs=96.0),
    'RepLKNet-XL': ModelConfig(create_RepLKNetXL, 'published: MegData73M-to-1K, 320 px', HALF, HALF,
                               input_size=320, top1=87.8, parameters=335.4, gmacs=128.7),
    'RepLKNet-3': _of_table_5((3, 3, 3, 3), 71.8, 12.9, 82.11, small_kernel=None),
    'RepLKNet-7': _of_table_5((7, 7, 7, 7), 72.2, 13.1, 82.73),
    'RepLKNet-13': _of_table_5((13, 13, 13, 13), 73.7, 13.4, 83.02),
    'RepLKNet-25': _of_table_5((25, 25, 25, 13), 78.2, 14.8, 83.00),
    'RepLKNet-31T': ModelConfig(partial(RepLKNet, large_kernel_sizes=(31, 29, 27, 13), layers=(1, 1, 2, 1),
                                        channels=(16, 32, 64, 128), small_kernel=5),
                                'a toy of this repository, for demonstrations and tests', input_size=32),
    'RepMLPNet-T224': _repmlpnet('RepMLPNet-T224', 224, 76.62, 38.288, 2.798,
                                 '1TgPDD78G-d3h_Y_vNTuqYdSJZHmnju7b'),
    'RepMLPNet-B224': _repmlpnet('RepMLPNet-B224', 224, 80.32, 68.234, 6.657,
                                 '1GwoUvxGXgzKArlCf0V9kvc9_3GtkGltp'),
    'RepMLPNet-T256': _repmlpnet('RepMLPNet-T256', 256, 77.44, 58.695, 4.246,
                                 '1mU0L76x20eAKzkHxEM7J2BvEOLWx_mux'),
    'RepMLPNet-B256': _repmlpnet('RepMLPNet-B256', 256, 81.03, 96.470, 9.616,
                                 '1W-__gXE7903cX-gOSXEGxNBCJjvqFCiJ'),
    'RepMLPNet-D256': _repmlpnet('RepMLPNet-D256', 256, 80.83, 86.876, 8.611,
                                 '1e5IYac0UHnJq2_lzbuE7J4rahMENX2ha'),
    'RepMLPNet-L256': _repmlpnet('RepMLPNet-L256', 256, 81.68, 117.690, 11.579,
                                 '1SHhNJ6pZax9qMLm8DJZtQ_XfmcmddPYU'),
    'RepMLPNet-T32': ModelConfig(
        partial(_build_repmlpnet, partial(RepMLPNet, channels=(16, 32, 64, 128), hs=(8, 4, 2, 1),
                                          ws=(8, 4, 2, 1), num_blocks=(1, 1, 2, 1),
                                          sharesets_nums=(1, 4, 16, 32), reparam_conv_k=(1, 3))),
        'a toy of this repository, for demonstrations and tests', input_size=32, **OF_REPMLPNET),
}


def create_model(name: str, drop_path_rate: float = 0.0, **kwargs) -> nn.Module:
    """Build the model `name` of MODELS with random weights; further keywords go to its class.

    Or that of FILE.py:FUNCTION, which takes num_classes alone. Raises ValueError for an unknown name.
    """
    if is_own(name):
        return own_model(name, drop_path_rate, **kwargs)
    if name not in MODELS:
        raise ValueError(f'unknown model {name!r}: choose one of {", ".join(MODELS)}')
    return MODELS[name].build(drop_path_rate=drop_path_rate, **{'use_checkpoint': False, **kwargs})


def model_for(name: str, state: dict[str, Tensor], source: str | os.PathLike, **options) -> nn.Module:
    """Build the model `name` of MODELS with these weights, in evaluation mode.

    It has their number of classes, and is merged, folded and in int8 as they are; weights without a head make
    a backbone. `source` names them in errors. options: further keywords of the model's class.
    Raises ValueError where they do not fit, and names the model that they are of.
    """
    with torch.device('meta'):  # no values: merging and folding random ones would take seconds
        model = create_model(name, num_classes=_classes(state), use_sync_bn=False, **options)
        take_form(model, state)
    model.to_empty(device='cpu').eval()
    try:
        load_state(model, state, source)
    except ValueError as error:
        other = name_of(state)
        message = f'{source} holds weights of {other}, not of {name}' if other else f'{error} ({name})'
        raise ValueError(message) from error
    return model


def name_of(state: dict[str, Tensor]) -> str | None:
    """The name in MODELS of the model with these keys and shapes, of any number of classes, or None."""
    for name in MODELS:
        with torch.device('meta'):
            # whatever LARGE_KERNEL_CONV_IMPL says: keys and shapes are the same in all implementations
            model = create_model(name, num_classes=_classes(state), use_sync_bn=False,
                                 implementation='pytorch')
            take_form(model, state)
        if _shapes(model.state_dict()) == _shapes(state):
            return name
    return None


def _classes(state: dict[str, Tensor]) -> int | None:
    return len(state['head.weight']) if 'head.weight' in state and state['head.weight'].dim() else None


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}
