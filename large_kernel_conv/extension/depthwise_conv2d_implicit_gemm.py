"""The name under which published code imports the authors' CUDA extension, backed by large_kernel_conv.

With this folder in PYTHONPATH, or named by the variable that a repository reads for it
(LARGE_KERNEL_CONV_IMPL, DWCONV_IMPL, ...), such code runs as it is: on CPUs and GPUs, with nothing to build.
"""
from large_kernel_conv.layers import DepthwiseConv2d

__all__ = ['DepthWiseConv2dImplicitGEMM']


class DepthWiseConv2dImplicitGEMM(DepthwiseConv2d):
    """DepthwiseConv2d, built as the extension's layer is: an odd kernel or a pair, no bias by default.

    Its padding reads (kernel // 2, kernel // 2), which is what it adds; the extension's reads (0, 0).
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int], bias: bool = False):
        super().__init__(channels, kernel, bias)
