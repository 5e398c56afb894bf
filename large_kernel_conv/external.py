"""The authors' CUDA extension, from a folder. README, "The external CUDA extension"."""
import importlib
import pathlib
import sys

import torch
from torch import Tensor, nn

MODULE, CLASS = 'depthwise_conv2d_implicit_gemm', 'DepthWiseConv2dImplicitGEMM'


def external_conv(folder: str, channels: int, kernel: int, bias: bool) -> nn.Conv2d:
    """Build a depthwise convolution of the extension in `folder`, for CUDA: x (N, C, H, W) to the same.

    It computes in float32 and float16. The extension wants contiguous tensors, gradients too, and is given
    them. It has no bfloat16: under bfloat16 autocast it computes in float32 and its output is cast; without
    autocast a bfloat16 input is a TypeError. Its weight is nn.Conv2d's, but its padding reads (0, 0): it pads
    kernel // 2 inside. ImportError if it cannot be had.
    """
    conv = _extension_class(folder)(channels, kernel, bias=bias)
    conv.register_forward_pre_hook(_prepare_input)  # hooks, since a subclass made here could not be pickled
    conv.register_forward_hook(_prepare_gradient)
    return conv


def _extension_class(folder: str) -> type[nn.Conv2d]:
    file = pathlib.Path(folder).resolve() / f'{MODULE}.py'
    given = f'LARGE_KERNEL_CONV_IMPL is {folder!r}'
    advice = ('Build the extension there (README, "The external CUDA extension"), or set '
              'LARGE_KERNEL_CONV_IMPL to auto or pytorch, which need nothing built.')
    if not file.is_file():
        raise ImportError(f'{given}: neither auto nor pytorch, and there is no {file}. {advice}')
    loaded = sys.modules.get(MODULE)
    if loaded is None or pathlib.Path(loaded.__file__) != file:
        sys.modules.pop(MODULE, None)  # it came from another folder
        while str(file.parent) in sys.path:
            sys.path.remove(str(file.parent))
        sys.path.insert(0, str(file.parent))  # stays: the extension's compiled half lies in the same folder
    try:
        return getattr(importlib.import_module(MODULE), CLASS)
    except Exception as error:  # whatever a half-built extension raises
        raise ImportError(f'{given}: {file} is there, but importing {CLASS} from it failed '
                          f'({type(error).__name__}: {error}). {advice}') from error


def _bfloat16_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16


def _prepare_input(conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    x, = inputs
    if x.dtype is torch.bfloat16:
        if not _bfloat16_autocast(x):
            raise TypeError('the external CUDA extension computes in float32 and float16, not in bfloat16: '
                            'use float16, bfloat16 autocast, or LARGE_KERNEL_CONV_IMPL=auto')
        x = x.float()
    return x.contiguous(),


def _prepare_gradient(conv: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y.bfloat16() if _bfloat16_autocast(y) else y
