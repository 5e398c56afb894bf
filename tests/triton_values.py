"""The Triton kernels' values against float64, and what PyTorch does with the operators: in Triton's
interpreter, or on a GPU.

The interpreter must be asked for before the kernels are imported, so test_triton.py runs this file in a
process of its own, with it and, where there is a GPU, without; by hand: TRITON_INTERPRET=1 python -m pytest
tests/triton_values.py [-m slow]. The interpreter shows what the kernels compute, not what a GPU makes of it:
it knows neither TF32 nor threads.
"""
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder

from conftest import relative_error
from large_kernel_conv import (
    DepthwiseConv2d,
    FrozenDepthwiseConv2d,
    depthwise_conv2d,
    implementation,
    toeplitz_model,
    triton_conv,
    triton_kernels,
)
from large_kernel_conv.geometry import Geometry, make_geometry

pytestmark = pytest.mark.usefixtures('float32_is_float32')
DEVICE = 'cpu' if triton_conv.INTERPRETED else 'cuda'
interpreted = pytest.mark.skipif(not triton_conv.INTERPRETED, reason='of the interpreter')
GUARD = 4096  # elements on either side of a buffer
WHERE = 4, 4, 4, 4, 1, 1  # padding and dilation of `drawn`, as the operators take them
# half precisions: their rounding
TOLERANCE = {'ieee': 1e-6, 'tf32': 1e-6 if triton_conv.INTERPRETED else 2e-3,
             'bfloat16': 8e-3, 'float16': 1e-3}
SHORT = [  # N, C, H, W, K
    (2, 3, 14, 14, 13), (1, 2, 7, 7, 13), (3, 2, 17, 23, 7), (1, 1, 1, 1, 31), (2, 2, 9, 40, 9),
    (70, 1, 3, 5, 7),
    (1, 1, 33, 8, 31), (1, 1, 3, 70, 21), (65, 1, 6, 6, 13)]
LONG = [(1, 1, 56, 56, 31), (2, 2, 28, 28, 29), (5, 3, 14, 14, 27), (2, 4, 7, 7, 13), (1, 1, 64, 64, 51),
        (1, 2, 32, 32, 31), (1, 2, 33, 8, 31), (1, 3, 3, 70, 21), (1, 1, 40, 9, 17), (2, 1, 3, 130, 31),
        (1, 1, 96, 80, 7), (257, 1, 2, 2, 3)]
# N, C, H, W; kernel; padding; dilation: rectangles, strips, dilated, any padding
SHORT_OTHERS = [
    ((2, 2, 9, 19), (7, 13), None, 1), ((2, 1, 19, 18), (7, 7), None, 3),
    ((1, 3, 1, 40), (1, 9), ((0, 0), (8, 0)), 1), ((3, 1, 20, 11), (8, 6), 'valid', (1, 2)),
    ((1, 2, 7, 33), (5, 7), ((0, 12), (3, 1)), (3, 1))]
LONG_OTHERS = [
    ((2, 2, 28, 28), (25, 5), None, 1), ((1, 1, 5, 60), (5, 31), None, 1),
    ((2, 1, 14, 14), (7, 7), None, 2), ((1, 1, 64, 64), (1, 21), None, 1),
    ((1, 2, 30, 34), (21, 1), None, 1), ((1, 1, 1, 200), (1, 31), 'same', 2),
    ((65, 1, 6, 9), (4, 3), 'same', 2), ((1, 1, 40, 41), (9, 9), 'valid', 4),
    ((1, 2, 3, 4), (7, 7), (18, 18), 3)]


@pytest.fixture(autouse=True)
def new_tensors_are_on_the_device():
    # but for those that torch.empty makes: torch may have met the double below first
    with torch.device(DEVICE):
        yield


def guarded(values: Tensor) -> Tensor:
    """A copy of the values between NaNs, which would spread into every sum that reads them."""
    memory = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
    memory[GUARD:GUARD + values.numel()] = values.flatten()
    return memory[GUARD:GUARD + values.numel()].view(values.shape)


@pytest.fixture
def outputs(monkeypatch):
    """Lets torch.empty_like and torch.empty hand out NaNs between NaNs, which must be there still at the
    end."""
    memories = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        memories.append((torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device), size))
        return memories[-1][0][GUARD:GUARD + size].view(shape)
    monkeypatch.setattr(torch, 'empty', empty)
    monkeypatch.setattr(torch, 'empty_like', lambda t: empty(t.shape, t.dtype, t.device))
    yield
    monkeypatch.undo()
    assert len(memories) == 5  # y and the gradients, and the taps laid out twice
    for memory, size in memories:
        for guard in (memory[:GUARD], memory[GUARD + size:]):
            assert guard.isnan().all()


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor,
          geometry: Geometry | None = None) -> tuple[Tensor, ...]:
    """y and the gradients of x and weight, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    bias = None if bias is None else bias.double()
    geometry = geometry or same(weight)
    padded = F.pad(x, (geometry.left, geometry.right, geometry.top, geometry.bottom))
    y = F.conv2d(padded, weight, bias, dilation=geometry[6:8], groups=len(weight))
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())


def same(weight: Tensor) -> Geometry:
    """Of a kernel without dilation, the padding that keeps a map's size."""
    return make_geometry(*weight.shape[2:])


@pytest.mark.parametrize('precision', TOLERANCE)
@pytest.mark.parametrize('shape', [*SHORT, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LONG)])
def test_the_kernels_agree_with_float64_and_touch_only_their_tensors(shape, precision, outputs):
    *size, kernel = shape
    check(size, make_geometry(kernel, kernel), precision)


@pytest.mark.parametrize('precision', ['ieee', 'float16'])
@pytest.mark.parametrize('size, kernel, padding, dilation', [
    *SHORT_OTHERS, *(pytest.param(*other, marks=pytest.mark.slow) for other in LONG_OTHERS)], ids=str)
def test_other_geometries_do_too(size, kernel, padding, dilation, precision, outputs):
    check(size, make_geometry(*kernel, padding, dilation), precision)


def check(size: tuple[int, ...], geometry: Geometry, precision: str) -> None:
    if precision == 'tf32':
        torch.backends.cudnn.allow_tf32 = True
    dtype = getattr(torch, precision, torch.float32)
    seed = sum(size) + geometry.kernel_width
    torch.manual_seed(seed)
    out_size = *size[:2], *geometry.output_size(*size[2:])
    x, grad = (guarded(torch.randn(shape).to(dtype)) for shape in (size, out_size))
    weight = guarded(torch.randn(size[1], 1, *geometry[:2]).to(dtype))
    bias = [None, guarded(torch.randn(size[1]).to(dtype)), guarded(torch.randn(size[1]))][seed % 3]
    y = triton_conv.convolve(x, weight, geometry, bias)
    grad_x = triton_conv.convolve(grad, weight, geometry.reversed(), turned=True)
    grad_weight = triton_conv.weight_gradient(x, grad, geometry)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    expected_y, expected_grad_x, expected_grad_weight = exact(x, weight, bias, grad, geometry)
    assert relative_error(y, expected_y) <= TOLERANCE[precision]
    assert relative_error(grad_x, expected_grad_x) <= TOLERANCE[precision]
    assert relative_error(grad_weight, expected_grad_weight) <= TOLERANCE['ieee']


@pytest.fixture
def plans():
    """The cached plans, to be made anew."""
    yield triton_conv._convolve_plan, triton_conv._weight_gradient_plan
    triton_conv._convolve_plan.cache_clear()
    triton_conv._weight_gradient_plan.cache_clear()


@pytest.mark.parametrize('part', [slice(1, None, 30), pytest.param(slice(None), marks=pytest.mark.slow)],
                         ids=['some', 'all'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [(2, 2, 14, 14, 13), (3, 1, 17, 70, 7)])
def test_every_size_that_is_timed_on_request_gives_the_same(shape, dtype, part, plans):
    *size, kernel = shape
    x, grad, weight = (torch.randn(n).to(dtype) for n in (size, size, (size[1], 1, kernel, kernel)))
    expected_y, _, expected_grad_weight = exact(x, weight, None, grad)
    tolerance = TOLERANCE['ieee' if dtype == torch.float32 else 'float16']
    for tile in triton_conv.convolve_candidates(tuple(size), dtype, triton_conv.precision())[part]:
        plans[0].cache_clear()
        with mock.patch.object(triton_conv, 'convolve_tile', lambda *_, tile=tile, **options: tile):
            y = triton_conv.convolve(x, weight, same(weight))
            assert relative_error(y, expected_y) <= tolerance, tile
        assert plans[0].cache_info().currsize == 1
    for tile in triton_conv.weight_gradient_candidates(tuple(size), dtype)[part]:
        plans[1].cache_clear()
        with mock.patch.object(triton_conv, 'weight_gradient_tile', lambda *_, tile=tile, **options: tile):
            grad_weight = triton_conv.weight_gradient(x, grad, same(weight))
            assert relative_error(grad_weight, expected_grad_weight) <= TOLERANCE['ieee'], tile
        assert plans[1].cache_info().currsize == 1


def drawn(kernel: int = 9, memory_format=torch.contiguous_format) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 14).to(memory_format=memory_format).requires_grad_()
    return x, torch.randn(3, 1, kernel, kernel, requires_grad=True), torch.randn(3, requires_grad=True)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_function_keeps_the_memory_format_and_differentiates(memory_format):
    inputs = drawn(memory_format=memory_format)
    assert implementation(*inputs[:2])[0] == 'triton'
    y, expected = depthwise_conv2d(*inputs), plain(*inputs)
    assert y.is_contiguous(memory_format=memory_format)
    assert relative_error(y.detach(), expected.detach()) < 1e-6
    grad = torch.randn(y.shape[0], 1, 1, y.shape[3]).expand(y.shape)  # one that is not contiguous
    gradients = (torch.autograd.grad(result, inputs, grad) for result in (y, expected))
    for found, wanted in zip(*gradients, strict=True):
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize('memory_format, want', [
    (torch.channels_last, (True, True)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (torch.contiguous_format, (True, True)), (torch.contiguous_format, (True, False)),
        (torch.contiguous_format, (False, True)), (torch.channels_last, (True, False)),
        (torch.channels_last, (False, True))))])
def test_the_operators_pass_opcheck(memory_format, want):
    x, weight, bias = drawn(memory_format=memory_format)
    torch.library.opcheck(torch.ops.large_kernel_conv.depthwise_conv2d, (x, weight, bias, *WHERE, False))
    grad = torch.randn(x.shape).to(memory_format=memory_format)
    torch.library.opcheck(torch.ops.large_kernel_conv.depthwise_conv2d_backward,
                          (grad, x.detach(), weight.detach(), *WHERE, *want, False))


def test_autocast_computes_in_its_dtype_and_leaves_the_weight_float32():
    x, weight, bias = drawn()
    with torch.autocast(DEVICE, torch.float16):
        y = depthwise_conv2d(x, weight, bias)
    assert y.dtype == torch.float16
    assert relative_error(y.detach().float(), plain(x, weight, bias).detach()) < 2e-3
    grad_weight, = torch.autograd.grad(y.float().sum(), weight)
    assert grad_weight.dtype == torch.float32


def test_the_function_compiles_without_a_break():
    inputs = drawn()
    compiled = torch.compile(depthwise_conv2d, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*inputs), depthwise_conv2d(*inputs))


def test_activation_checkpointing_gives_the_same_gradients():
    inputs = drawn()
    repeated = checkpoint(depthwise_conv2d, *inputs, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(repeated.sum(), inputs),
                   torch.autograd.grad(depthwise_conv2d(*inputs).sum(), inputs)))


def test_a_frozen_layer_computes_the_same_and_a_relu():
    x, layer = drawn()[0], DepthwiseConv2d(3, 13).to(DEVICE)
    assert torch.equal(FrozenDepthwiseConv2d(layer, relu=True)(x), layer(x).relu())


def test_offsets_of_more_than_32_bits_are_reached():
    """The second image lies 2^31 values after the first. Nearly none of those is ever touched; one channel is
    computed."""
    channels = 2 ** 31 // 256
    x, y, grad = (torch.empty(2 ** 31 + 256, dtype=torch.float16, device=DEVICE) for _ in range(3))
    weight = torch.randn(1, 1, 7, 7).half()
    for memory in (x, grad):
        memory[:256], memory[-256:] = 0, torch.randn(256)
    last_x, last_y, last_grad = (memory[-256:].view(1, 1, 16, 16) for memory in (x, y, grad))
    size, geometry = (2, channels, 16, 16), make_geometry(7, 7)
    constants = {'ALIGN': 16, 'OUT_ALIGN': 16, 'PRECISION': 'tf32', 'IN_FLOAT32': False}
    tile = triton_conv.convolve_tile(size, x.dtype, 'tf32')
    assert tile['IMAGES'] == 1
    margins = top, _, left, _ = triton_conv.taps_margins(geometry, 16, tile)
    taps_shape = triton_conv.taps_shape(1, geometry, *margins, x.dtype)
    taps = torch.empty(taps_shape, dtype=torch.float16, device=DEVICE)
    triton_kernels.lay_out_taps[math.ceil(taps.numel() / 1024), 1](
        weight, taps, *taps.shape[1:3], top, left, **triton_conv.taps_constants(geometry), PACK=4,
        TURNED=False, BLOCK=1024)
    triton_kernels.convolve[2 * math.ceil(16 / (tile['BANDS'] * tile['ROWS'])), 1](
        x, taps.view(torch.int64), None, y, *size[:3], 1, 16, 1, *taps.shape[1:3], top, left, **constants,
        **triton_conv.convolve_constants(geometry), HAS_BIAS=False, **tile)
    expected = exact(last_x, weight, None, last_grad)
    assert relative_error(last_y, expected[0]) < 1e-3
    sums = torch.empty(1, 1, 7, 7, device=DEVICE)
    tile = triton_conv.weight_gradient_tile(size, x.dtype)
    triton_kernels.weight_gradient[math.ceil(7 / tile['KERNEL_ROWS']), 1, 1](
        x, grad, sums, *size[:3], 1, 16, 1, 1, **constants,
        **triton_conv.weight_gradient_constants(geometry), **tile)
    assert relative_error(sums, expected[2]) < 1e-6


def test_inf_stays_in_its_channel_of_its_image_and_near_the_kernels_reach():
    x, weight = torch.randn(2, 2, 40, 128), torch.randn(2, 1, 7, 7)
    x[1, 1, 20, 40] = torch.inf
    finite = depthwise_conv2d(x, weight).isfinite()
    assert finite[0].all() and finite[1, 0].all()
    assert not finite[1, 1, 17:24, 37:44].any()
    assert finite[1, 1, :, 96:].all() and finite[1, 1, :8].all() and finite[1, 1, 32:].all()


def test_an_empty_batch_works():
    x = torch.randn(0, 3, 9, 14, requires_grad=True)
    _, weight, bias = drawn()
    y = depthwise_conv2d(x, weight, bias)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == grad_x.shape == x.shape and not grad_weight.any() and not grad_bias.any()


@interpreted
def test_autotuning_times_every_size_once_a_shape(plans, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_AUTOTUNE', '1')
    timed = []

    def benchmark(call, quantiles):
        """A double of Triton's timer: runs each size; the fourth is the fastest."""
        call()
        timed.append(call)
        return [1.0 if len(timed) == 4 else 2.0] * 3
    monkeypatch.setattr(Autotuner, 'do_bench', property(lambda tuner: benchmark))
    x, weight, bias = (t.detach() for t in drawn(7))
    y = triton_conv.convolve(x, weight, same(weight), bias)
    sizes = triton_conv.convolve_candidates(x.shape, x.dtype, triton_conv.precision())
    assert len(timed) == len(sizes) > 3 and relative_error(y, plain(x, weight, bias)) < 1e-6
    assert torch.equal(triton_conv.convolve(x, weight, same(weight), bias), y) and len(timed) == len(sizes)
    tuned, *_ = plans[0](x.shape, x.dtype, make_geometry(7, 7), triton_conv.precision(), 4, True)
    assert tuned.best_config is tuned.configs[3]
    more = triton_conv.weight_gradient_candidates(x.shape, x.dtype)
    grad_weight = triton_conv.weight_gradient(x, y, same(weight))
    assert len(timed) == len(sizes) + len(more)
    assert relative_error(grad_weight, exact(x, weight, bias, y)[2]) < 1e-6


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [
    (2, 3, 14, 14, 13), (3, 2, 17, 23, 7), (1, 2, 33, 8, 31), (64, 1, 1, 1, 31), (2, 4, 4, 4, 31)])
def test_toeplitz_model_counts_the_products_that_kernels_execute(shape, dtype, monkeypatch):
    *size, kernel = shape
    executed, create_dot = [], InterpreterBuilder.create_dot

    def counted(builder, a, b, *others):
        executed.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(builder, a, b, *others)
    monkeypatch.setattr(InterpreterBuilder, 'create_dot', counted)
    x, weight = torch.randn(size).to(dtype), torch.randn(size[1], 1, kernel, kernel).to(dtype)
    triton_conv.convolve(x, weight, same(weight))
    counted = toeplitz_model.cost(tuple(size), kernel, dtype, 'forward', triton_conv.precision())
    assert sum(executed) == counted.executed
    executed.clear()
    triton_conv.weight_gradient(x, x, same(weight))
    assert sum(executed) == toeplitz_model.cost(tuple(size), kernel, dtype, 'weight gradient').executed
