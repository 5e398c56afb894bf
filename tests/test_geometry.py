"""Depthwise convolutions of every geometry: rectangles, strips, sequences, any padding, dilation."""
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import relative_error
from large_kernel_conv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    FrozenDepthwiseConv2d,
    cpu,
    depthwise_conv1d,
    depthwise_conv2d,
    implementation,
)
from large_kernel_conv.geometry import make_geometry

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
# of the largest value; half types: their rounding. A transform computes the gradients of all taps that there
# could be: those of a few taps may be smaller than the others
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# N, C, H, W; kernel; padding; dilation
LAYERS = [
    ((2, 24, 56, 56), (7, 7), None, 3),  # VAN, LSKNet
    ((2, 40, 14, 14), (7, 7), None, 2), ((2, 40, 14, 14), (3, 3), None, 5),  # UniRepLKNet
    ((1, 35, 56, 56), (51, 5), None, 1), ((2, 17, 28, 28), (5, 49), None, 1),  # SLaK
    ((2, 20, 64, 64), (1, 21), None, 1), ((1, 20, 128, 40), (19, 1), None, 1),  # strips
    ((2, 33, 17, 23), (8, 8), 'same', 1), ((2, 5, 20, 20), (9, 9), 'valid', 1),
    ((1, 9, 21, 22), (4, 7), 'same', 3), ((2, 3, 12, 30), (5, 13), (0, 11), (2, 1)),
    ((1, 40, 9, 9), (3, 3), 5, 1), ((2, 18, 7, 8), (5, 1), (30, 2), 1),  # more zeros than taps reach
    ((1, 4, 19, 19), (13, 13), ((12, 0), (3, 40)), 1), ((1, 2, 200, 9), (31, 31), ((0, 30), (30, 0)), 1),
    ((3, 2, 5, 160), (1, 51), ((0, 0), (150, 0)), 3), ((1, 1, 1, 1), (3, 3), None, 2),
]


@pytest.fixture(scope='module', autouse=True)
def the_kernels_are_there():
    assert cpu.load() is None  # else all of this would test F.conv2d
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # that share their tasks
    yield
    torch.set_num_threads(threads)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, padding, dilation) -> Tensor:
    """F.conv2d of what ours takes."""
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    if padding is None:
        padding = tuple(k // 2 * step for k, step in zip(weight.shape[2:], dilation, strict=True))
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        x, padding = F.pad(x, (*padding[1], *padding[0])), 0
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=len(weight))


def results(function, inputs: list[Tensor], *where) -> list[Tensor]:
    """y, and the gradients of x, weight and bias."""
    *leaves, seed = (t.detach().requires_grad_() for t in inputs)
    y = function(*leaves, *where)
    return [y.detach(), *torch.autograd.grad(y, leaves, seed.detach().expand_as(y).contiguous())]


def drawn(shape: tuple[int, ...], kernel: tuple[int, ...], padding, dilation, dtype=torch.float32,
          memory_format=torch.contiguous_format) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    torch.manual_seed(sum(shape) + sum(kernel))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(shape[1], 1, *kernel).to(dtype), torch.randn(shape[1]).to(dtype)
    with torch.device('meta'):
        size = plain(torch.empty(shape), torch.empty(weight.shape), None, padding, dilation).shape
    return [x, weight, bias, torch.randn(size).to(dtype).contiguous(memory_format=memory_format)]


def check(inputs: list[Tensor], padding, dilation) -> None:
    """All results against float64; and again without gradients, twice, when it may be F.conv2d's turn."""
    x, dtype = inputs[0], inputs[0].dtype
    # torch's own gradients of float16 are 1.4e-3 away on an AMD EPYC with AVX-512
    left_to_torch = implementation(*inputs[:2], padding, dilation)[0] == 'pytorch'
    tolerance = TOLERANCE[dtype] * (2 if left_to_torch else 1)
    expected = results(plain, [t.double() for t in inputs], padding, dilation)
    found = results(depthwise_conv2d, inputs, padding, dilation)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        # of taps that meet no pixel, all gradients are zero
        assert relative_error(value, wanted) < tolerance or not (wanted.any() or value.any())
    with torch.no_grad():
        for _ in range(2):  # the second time from kept spectra
            y = depthwise_conv2d(*inputs[:3], padding, dilation)
            assert relative_error(y, expected[0]) < tolerance
    in_channels_last = x.stride(1) == 1 and not x.is_contiguous()
    memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
    assert all(value.is_contiguous(memory_format=memory_format) for value in found[:2])


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape, kernel, padding, dilation', LAYERS, ids=str)
def test_outputs_and_gradients_are_those_of_float64(shape, kernel, padding, dilation, memory_format, dtype):
    check(drawn(shape, kernel, padding, dilation, dtype, FORMATS[memory_format]), padding, dilation)


def test_random_geometries():
    rng = random.Random(0)
    names = set()
    for _ in range(150):
        kernel = tuple(rng.choice([1, rng.randint(1, 12), rng.randint(1, 40)]) for _ in range(2))
        dilation = rng.choice([1, rng.randint(1, 4), (rng.randint(1, 3), rng.randint(1, 5))])
        zeros = tuple(rng.randint(0, 20) for _ in range(4))
        padding = rng.choice(['same', 'valid', zeros[0], zeros[:2], (zeros[:2], zeros[2:])])
        shape = (rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 60), rng.randint(1, 60))
        memory_format = rng.choice(list(FORMATS.values()))
        try:
            inputs = drawn(shape, kernel, padding, dilation, memory_format=memory_format)
        except RuntimeError:  # a kernel larger than the map
            weight = torch.zeros(shape[1], 1, *kernel)
            with pytest.raises(ValueError, match='kernel is larger than a'):
                depthwise_conv2d(torch.zeros(shape), weight, None, padding, dilation)
            continue
        check(inputs, padding, dilation)
        names.add(implementation(inputs[0], inputs[1], padding, dilation)[0])
    assert {'cpu direct', 'cpu fft'} <= names


@pytest.mark.parametrize('length', [10, 84, 513, 100_000])
@pytest.mark.parametrize('kernel, padding, dilation', [
    (31, None, 1), (31, (30, 0), 1), (15, 'same', 4), (8, (7, 0), 1), (51, 25, 1), (10, 'valid', 1),
    (3, (0, 5), 2)])
def test_sequences_of_any_length(length, kernel, padding, dilation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, length), torch.randn(9, 1, kernel), torch.randn(9)

    def expected(x, weight, bias):
        sides = padding if isinstance(padding, tuple) else (0, 0)
        given = (kernel // 2 * dilation) if padding is None else 0 if isinstance(padding, tuple) else padding
        return F.conv1d(F.pad(x, sides), weight, bias, padding=given, dilation=dilation, groups=9)
    seed = torch.randn(expected(x, weight, bias).shape)
    wanted = results(expected, [t.double() for t in (x, weight, bias, seed)])
    for inputs in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):  # (N, T, C) in memory
        found = results(depthwise_conv1d, [inputs, weight, bias, seed], padding, dilation)
        for value, target in zip(found, wanted, strict=True):
            assert value.shape == target.shape and relative_error(value, target) < 1e-5
    layer = DepthwiseConv1d(9, kernel, padding=padding, dilation=dilation)
    nn.init.ones_(layer.weight)
    assert relative_error(layer(x[0]), layer(x)[0]) < 1e-6  # one sequence, without a batch
    if isinstance(padding, tuple) and padding == (kernel - 1, 0):
        changed = x.clone()
        changed[..., -1] += 1
        assert layer.padding == padding
        before, after = layer(x), layer(changed)
        assert relative_error(after[..., :-1].detach(), before[..., :-1].detach()) < 1e-6
        assert not torch.allclose(after[..., -1], before[..., -1])


@pytest.mark.parametrize('padding, dilation, message', [
    (-1, 1, r'padding must be None, .* not -1'), ('full', 1, "not 'full'"),
    ((1, 2, 3), 1, r'not \(1, 2, 3\)'), (((1, 2), (3, -1)), 1, r'not \(3, -1\)'), (1.5, 1, 'not 1.5'),
    (1, (1, 2, 3), r'not \(1, 2, 3\)'),
    (1, 0, 'dilation must be a whole number from 1 on or a pair of those, not 0'),
    ('valid', 4, r'a 3 x 5 \(dilation 4\) kernel is larger than a 9 x 11 map with padding \'valid\'')])
def test_what_does_not_fit_is_an_error_that_says_so(padding, dilation, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(1, 2, 9, 11), torch.zeros(2, 1, 3, 5), None, padding, dilation)


def test_a_map_without_pixels_stays_so_or_is_an_error():
    x, weight = torch.zeros(1, 2, 0, 11), torch.zeros(2, 1, 3, 5)
    assert depthwise_conv2d(x, weight).shape == depthwise_conv2d(x, weight, None, (2, 2)).shape == x.shape
    with pytest.raises(ValueError, match=r'x \(1, 2, 0, 11\) has no pixels, and padding 3 has more zeros'):
        depthwise_conv2d(x, weight, None, 3)


def test_the_choice_says_why():
    def chosen(kernel, dilation=1, trained=False, memory_format=torch.channels_last, side=56):
        x = torch.randn(1, 32, side, side).contiguous(memory_format=memory_format)
        return implementation(x, torch.randn(32, 1, *kernel, requires_grad=trained), None, dilation)
    few, columns = 'of few taps in channels_last, without gradients', 'of up to 3 columns in channels_last'
    for kernel, dilation, reason in (((1, 21), 1, few), ((5, 5), 2, few), ((11, 1), 1, columns)):
        name, why = chosen(kernel, dilation)
        assert name == 'pytorch' and reason in why
        assert chosen(kernel, dilation, memory_format=torch.contiguous_format)[0] == 'cpu direct'
        assert chosen(kernel, dilation, trained=True)[0] == ('pytorch' if reason == columns else 'cpu direct')
    for kernel, dilation in (((7, 7), 3), ((51, 5), 1)):  # far from what F.conv2d is good at
        assert chosen(kernel, dilation)[0].startswith('cpu ')
    name, why = chosen((1, 51), memory_format=torch.contiguous_format)
    assert name == 'cpu fft' and why.startswith('transforms of ') and 'points along rows' in why
    assert 'points along columns' in chosen((51, 1), memory_format=torch.contiguous_format)[1]


def test_lists_are_as_good_as_tuples():
    inputs = drawn((1, 3, 9, 11), (3, 5), (2, 1), (1, 2))[:3]
    expected = depthwise_conv2d(*inputs, ((2, 2), (1, 1)), (1, 2))
    for padding in ([2, 1], [[2, 2], [1, 1]], torch.Size([2, 1])):
        assert torch.equal(depthwise_conv2d(*inputs, padding, [1, 2]), expected)


@pytest.mark.parametrize('shape, kernel, padding, dilation', LAYERS, ids=str)
def test_the_layer_is_nn_conv2d_to_the_rest_of_pytorch(shape, kernel, padding, dilation):
    layer = DepthwiseConv2d(shape[1], kernel, padding=padding, dilation=dilation)
    found = make_geometry(*kernel, padding, dilation)
    x = torch.randn(shape)
    expected = plain(x, layer.weight, layer.bias, padding, dilation)
    if found.is_symmetric:  # else nn.Conv2d has no such layer
        given = (found.top, found.left) if padding is None else padding
        same = nn.Conv2d(shape[1], shape[1], kernel, padding=given, dilation=dilation, groups=shape[1])
        same.load_state_dict(layer.state_dict())
        assert {key: value for key, value in vars(layer).items() if not key.startswith('_p')} == {
            key: value for key, value in vars(same).items() if not key.startswith('_p')}
        assert relative_error(same(x).detach(), expected.detach()) < 1e-6
    for ours in (layer, copy.deepcopy(layer), FrozenDepthwiseConv2d(layer)):
        assert relative_error(ours(x).detach(), expected.detach()) < 1e-6
    with_relu = FrozenDepthwiseConv2d(layer, relu=True)(x)
    assert torch.equal(with_relu, FrozenDepthwiseConv2d(layer)(x).relu())
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # one map, without a batch


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('layer', [LAYERS[0], LAYERS[3], LAYERS[5], LAYERS[12], LAYERS[13]], ids=str)
def test_the_operators_pass_opcheck(layer, memory_format):
    x, weight, bias, _ = drawn(*layer, memory_format=FORMATS[memory_format])
    ops, found = torch.ops.large_kernel_conv, make_geometry(*layer[1], *layer[2:]).without_surplus()
    where, size = found.where, found.output_size(*x.shape[2:])
    grad = torch.randn(*x.shape[:2], *size).contiguous(memory_format=FORMATS[memory_format])
    tests = ('test_schema', 'test_faketensor')  # gradients: above
    ops_and_arguments = [
        (ops.depthwise_conv2d.default, (x, weight, bias, *where, True)),
        (ops.depthwise_conv2d_backward.default, (grad, x, weight, *where, True, True, False)),
        (ops.prepared_spectra.default, (weight, *x.shape[2:], *where)),
        (ops.depthwise_conv2d_prepared.default,
         (x, weight, ops.prepared_spectra(weight, *x.shape[2:], *where), bias, *where, True))]
    for operator, arguments in ops_and_arguments:
        torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize('layer', [LAYERS[0], LAYERS[5], LAYERS[12], LAYERS[14]], ids=str)
def test_compile_and_export_take_every_geometry(layer):
    shape, kernel, padding, dilation = layer
    ours = DepthwiseConv2d(shape[1], kernel, padding=padding, dilation=dilation)
    x = torch.randn(shape)
    expected = plain(x, ours.weight, ours.bias, padding, dilation).detach()
    compiled = torch.compile(ours, fullgraph=True, backend='aot_eager')
    program = torch.export.export(ours, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch')}}
                                  if shape[0] > 1 else None)
    for call in (compiled, program.module(), torch.jit.trace(ours, x, check_trace=False)):
        assert relative_error(call(x).detach(), expected) < 1e-5
    gradient = torch.autograd.grad(compiled(x).sum(), ours.weight)[0]
    wanted = torch.autograd.grad(plain(x, ours.weight, ours.bias, padding, dilation).sum(), ours.weight)[0]
    assert relative_error(gradient, wanted) < 1e-5


def test_nan_stays_with_its_image_and_channel_pair():
    for shape, kernel, padding, dilation in (LAYERS[0], LAYERS[2], LAYERS[3], LAYERS[5], LAYERS[6]):
        for memory_format in FORMATS.values():
            inputs = drawn(shape, kernel, padding, dilation, memory_format=memory_format)
            if len(inputs[0]) < 2:
                inputs[0], inputs[3] = (t.repeat(2, 1, 1, 1) for t in (inputs[0], inputs[3]))
            clean = results(depthwise_conv2d, inputs, padding, dilation)
            inputs[0][1, 5, 3, 4] = inputs[3][1, 5, 2, 2] = torch.nan
            spoilt = results(depthwise_conv2d, inputs, padding, dilation)
            for before, after in zip(clean[:2], spoilt[:2], strict=True):
                same = (before == after).flatten(2).all(2)  # (N, C)
                assert same[0].all() and not same[1, 5] and (~same[1]).sum() <= 2


def test_flops_are_those_of_conv2d():
    from torch.utils.flop_counter import FlopCounterMode
    for shape, kernel, padding, dilation in LAYERS:
        counts = []
        for function in (depthwise_conv2d, plain):
            inputs = drawn(shape, kernel, padding, dilation)
            with FlopCounterMode(display=False) as counter:
                function(*inputs[:3], padding, dilation)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] or make_geometry(*kernel, padding, dilation).surplus
