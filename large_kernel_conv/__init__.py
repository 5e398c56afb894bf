"""Depthwise convolution with large kernels: one function, the fastest way for the tensor at hand.

`depthwise_conv2d(x, weight, bias)` is F.conv2d(x, weight, bias, padding=K // 2, groups=C), with any padding
and dilation, computed faster where an implementation applies: Fourier transforms or vectorised sums on CPUs,
matrix products on GPUs. It is made of torch operators, so torch.compile, torch.export, autocast and
DistributedDataParallel take it.

    from large_kernel_conv import DepthwiseConv2d, depthwise_conv2d, implementation
    layer = DepthwiseConv2d(128, 31)           # an nn.Conv2d, computed by depthwise_conv2d
    y = depthwise_conv2d(x, weight, bias)      # x (N, C, H, W), weight (C, 1, Kh, Kw), bias (C,)
    print(implementation(x, weight))           # which implementation runs, and why
    print(accelerate(model))                   # the depthwise layers of any model, computed by ours

geometry.py     kernel, padding, dilation, and the shapes that fit
tracing.py      what torch.compile and torch.func need to be told
cpu.py          the CPU implementation, of the C++ in cpu_kernels/
triton_conv.py  the GPU implementation, of the kernels in triton_kernels.py
choice.py       which implementation computes a convolution
operators.py    the torch operators, with gradients, shapes, FLOPs
functional.py   depthwise_conv2d, depthwise_conv1d, implementation
layers.py       DepthwiseConv2d, DepthwiseConv1d, FrozenDepthwiseConv2d, depthwise_layer
acceleration.py  accelerate, restore: the layers of models that were built elsewhere
dilated_reparam.py  DilatedReparamBlock, UniRepLKNet's
batch_norm.py   what a BatchNorm does in evaluation
external.py     a layer of the authors' CUDA extension
extension/      ours by the name of that extension, for code that imports it
__main__.py     what is compiled and what runs on this machine
memory.py       the memory of CPU tensors, kept by scripts
toeplitz_model.py  what the GPU kernels cost by count
"""
from large_kernel_conv.acceleration import accelerate, restore
from large_kernel_conv.dilated_reparam import DilatedReparamBlock
from large_kernel_conv.functional import depthwise_conv1d, depthwise_conv2d, implementation
from large_kernel_conv.layers import DepthwiseConv1d, DepthwiseConv2d, FrozenDepthwiseConv2d, depthwise_layer
from large_kernel_conv.operators import DECOMPOSITIONS

__all__ = ['DECOMPOSITIONS', 'DepthwiseConv1d', 'DepthwiseConv2d', 'DilatedReparamBlock',
           'FrozenDepthwiseConv2d', 'accelerate', 'depthwise_conv1d', 'depthwise_conv2d', 'depthwise_layer',
           'implementation', 'restore']
