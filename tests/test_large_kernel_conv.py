"""The depthwise convolution against float64, and everything that PyTorch may do with it."""
import contextlib
import copy
import itertools
import pickle
import random
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import relative_error, run_script
from large_kernel_conv import (
    DepthwiseConv2d,
    FrozenDepthwiseConv2d,
    cpu,
    depthwise_conv2d,
    depthwise_layer,
    implementation,
)

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
# of the largest value; half types: their rounding
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [  # N, C, H, W, K: the four stages; then what is odd about them
    (2, 40, 56, 56, 31), (2, 64, 28, 28, 29), (1, 33, 14, 14, 27), (2, 17, 7, 7, 13),
    (1, 3, 1, 1, 3), (1, 1, 9, 12, 5), (1, 5, 40, 9, 7), (2, 31, 16, 20, 9), (1, 64, 32, 32, 3),
    (1, 70, 8, 8, 31), (1, 20, 3, 70, 31),  # kernels larger than the map
    (2, 9, 100, 130, 31), (1, 7, 256, 40, 31), (1, 4, 200, 32, 51),  # maps larger than a transform
    (1, 16, 13, 240, 7), (1, 8, 13, 450, 7),  # direct, with a last band of one row: of 16 lanes, of 8
]


def drawn(n: int, c: int, h: int, w: int, k: int, dtype=torch.float32,
          memory_format=torch.contiguous_format) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    torch.manual_seed(n + c + h + w + k)
    x, grad = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    return [x, torch.randn(c, 1, k, k).to(dtype), torch.randn(c).to(dtype), grad]


def results(function, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in float64, by PyTorch's own Fourier transforms: its float64 convolution takes seconds with
    large kernels."""
    (h, w), k = x.shape[2:], weight.shape[-1]
    size = h + k - 1, w + k - 1
    full = torch.fft.irfft2(torch.fft.rfft2(x, size) * torch.fft.rfft2(weight.flip(2, 3)[:, 0], size), size)
    return full[:, :, k // 2:k // 2 + h, k // 2:k // 2 + w] + bias.view(-1, 1, 1)


def check(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> None:
    """All results against float64, with their dtypes and memory formats; and again without gradients,
    twice."""
    expected = results(exact, *(t.double() for t in (x, weight, bias, grad)))
    found = results(depthwise_conv2d, x, weight, bias, grad)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == x.dtype
        assert relative_error(value, wanted) < TOLERANCE[x.dtype]
    with torch.no_grad():
        for _ in range(2):  # the second time from kept spectra
            y = depthwise_conv2d(x, weight, bias)
            assert torch.equal(y, found[0])
            assert relative_error(y, expected[0]) < TOLERANCE[x.dtype]
    in_channels_last = x.stride(1) == 1 and not x.is_contiguous()
    memory_format = torch.channels_last if in_channels_last else torch.contiguous_format
    for value in (y, found[0], found[1]):
        assert value.is_contiguous(memory_format=memory_format)


@pytest.fixture(scope='module', autouse=True)
def the_kernels_are_there():
    assert cpu.load() is None  # else all of this would test F.conv2d
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # that share their tasks
    yield
    torch.set_num_threads(threads)


def test_the_reference_is_pytorchs_convolution():
    inputs = [t.double() for t in drawn(2, 3, 9, 12, 7)]
    for value, wanted in zip(results(exact, *inputs), results(plain, *inputs), strict=True):
        assert relative_error(value, wanted) < 1e-13


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_float64(shape, memory_format, dtype):
    check(*drawn(*shape, dtype, FORMATS[memory_format]))


def test_random_shapes():
    rng = random.Random(0)
    for _ in range(60):
        side = lambda: rng.choice([rng.randint(1, 12), rng.randint(1, 40), rng.randint(1, 90)])  # noqa: E731
        shape = (rng.randint(1, 3), rng.randint(1, 70), side(), side(), 2 * rng.randint(0, 16) + 1)
        check(*drawn(*shape, torch.float32, rng.choice(list(FORMATS.values()))))


@pytest.mark.parametrize('view', [
    lambda t: t[:, :, 1:-2, 3:], lambda t: t.transpose(2, 3), lambda t: t[::2], lambda t: t[:, ::3],
    lambda t: t.flip(3), lambda t: t[:, :1].expand(-1, 7, -1, -1), lambda t: t.transpose(0, 1)])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_views_of_any_strides(view, memory_format):
    x, grad = (view(t) for t in drawn(3, 12, 20, 23, 1, memory_format=FORMATS[memory_format])[::3])
    _, weight, bias, _ = drawn(1, x.shape[1], 1, 1, 13)
    check(x, weight.transpose(2, 3), bias, grad)


@pytest.mark.parametrize('shape', [
    # of weight gradients: 131072 products and more
    (2, 3, 256, 256, 3), (300, 2, 28, 28, 5), (150, 2, 14, 14, 13),
    (1, 1, 90, 90, 179)], ids=str)  # of outputs
def test_large_sums_keep_their_accuracy(shape):
    check(*drawn(*shape))


def test_an_empty_batch_or_map():
    for shape in ((0, 4, 56, 56, 31), (0, 4, 7, 7, 5), (2, 4, 0, 9, 5)):
        x, weight, bias, grad = drawn(*shape)
        y, grad_x, grad_weight, grad_bias = results(depthwise_conv2d, x, weight, bias, grad)
        assert y.shape == grad_x.shape == x.shape
        assert torch.equal(grad_weight, torch.zeros_like(weight))
        assert torch.equal(grad_bias, torch.zeros_like(bias))


def test_every_choice_of_gradients():
    inputs = drawn(2, 20, 24, 24, 13)
    all_gradients = results(depthwise_conv2d, *inputs)[1:]
    for wanted in ([0], [1], [2], [0, 1], [1, 2]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs[:3])]
        depthwise_conv2d(*leaves).backward(inputs[3])
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i in wanted)
            assert leaf.grad is None or relative_error(leaf.grad, all_gradients[i]) < 1e-6


def test_float64_is_exact_and_differentiable_twice():
    x, weight, bias, _ = (t.double().requires_grad_() for t in drawn(1, 2, 5, 4, 3))
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight, bias))
    assert torch.autograd.gradgradcheck(depthwise_conv2d, (x, weight, bias))
    assert implementation(x, weight) == ('pytorch', 'torch.float64 is left to F.conv2d')


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = drawn(1, 4, 9, 9, 7)
    x.requires_grad_()
    grad_x, = torch.autograd.grad(depthwise_conv2d(x, weight, bias).square().sum(), x, create_graph=True)
    message = r'differentiated once only: .* LARGE_KERNEL_CONV_IMPL=pytorch'
    with pytest.raises(NotImplementedError, match=message):
        grad_x.sum().backward()


def test_function_transforms_and_forward_mode_are_those_of_conv2d():
    x, weight, _, tangent = drawn(2, 4, 9, 9, 7)
    for function in (depthwise_conv2d, plain):
        found = [torch.func.jvp(lambda t, function=function: function(t, weight), (x,), (tangent,))[1],
                 torch.func.grad(lambda t, function=function: function(x, t).square().sum())(weight),
                 torch.func.vmap(function, (0, None))(x[:, None], weight)]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            found.append(torch.autograd.forward_ad.unpack_dual(function(dual, weight)).tangent)
        if function is depthwise_conv2d:
            ours = found
    for value, wanted in zip(ours, found, strict=True):
        assert torch.equal(value, wanted)


def test_other_layouts_are_those_of_conv2d():
    x, weight, _, _ = drawn(1, 8, 24, 20, 13)
    assert relative_error(depthwise_conv2d(x.to_mkldnn(), weight).to_dense(), plain(x, weight)) < 1e-6


@pytest.mark.parametrize('x, weight, bias, message', [
    ((2, 4, 8, 8), (4, 1, 6, 6), None,
     r"a 6 x 6 kernel has no centre: give the padding \('same' "),
    ((2, 4, 8, 8), (8, 1, 5, 5), None, r'not \(8, 1, 5, 5\)'),
    ((2, 4, 8, 8), (4, 4, 5, 5), None, r'not \(4, 4, 5, 5\)'),
    ((2, 4, 8, 8), (), None, r'not \(\)'),
    ((4, 8, 8), (4, 1, 5, 5), None, r'x must be \(N, C, H, W\), not \(4, 8, 8\)'),
    ((2, 4, 8, 8), (4, 1, 5, 5), (5,), r'bias must be \(C,\) with the C = 4 .* not \(5,\)'),
])
def test_what_does_not_fit_is_an_error_that_names_the_shapes(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_devices_and_dtypes_must_agree():
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4, 1, 5, 5)
    with pytest.raises(ValueError, match='one device, not on cpu and meta'):
        depthwise_conv2d(x, weight.to('meta'))
    with pytest.raises(ValueError, match=r'one dtype, not torch\.float32 and torch\.bfloat16'):
        depthwise_conv2d(x, weight.bfloat16())
    with pytest.raises(ValueError, match='a 4 x 4 kernel has no centre'):
        DepthwiseConv2d(8, 4)


def test_nan_stays_with_its_image_and_channel_pair():
    # Fourier transforms, of two tiles, direct
    shapes = (2, 40, 30, 30, 17), (2, 40, 12, 170, 31), (2, 40, 7, 7, 13)
    for shape, memory_format in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        x, weight, bias, grad = drawn(*shape, memory_format=memory_format)
        clean = results(depthwise_conv2d, x, weight, bias, grad)
        x[1, 5, 3, 4], grad[1, 5, 2, 2] = float('inf'), float('nan')
        spoilt = results(depthwise_conv2d, x, weight, bias, grad)
        # of y and grad_x: (N, C)
        same = [(a == b).flatten(2).all(2) for a, b in zip(clean[:2], spoilt[:2], strict=True)]
        for maps in (*same, (clean[2] == spoilt[2]).flatten(1).all(1)[None].expand(2, -1)):
            assert not maps[1, 5] and (~maps[1]).sum() <= 2
        assert all(maps[0].all() for maps in same)


def test_results_do_not_depend_on_the_run_and_hardly_on_threads():
    threads = torch.get_num_threads()
    try:
        for shape in ((3, 20, 24, 24, 13), (3, 20, 7, 7, 13)):
            found = {}
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found[n] = results(depthwise_conv2d, *drawn(*shape))
                for first, second in zip(found[n], results(depthwise_conv2d, *drawn(*shape)), strict=True):
                    assert torch.equal(first, second)
                for one, many in zip(found[1], found[n], strict=True):
                    assert relative_error(many, one) < 1e-6
    finally:
        torch.set_num_threads(threads)


# Spectra of weights are kept between calls without gradients. None may outlive its weights.

CHANGES = {
    'in place': lambda w: w.mul_(2),
    'through .data': lambda w: w.data.mul_(2),  # as some EMA code does; no version counter moves
    'one value through .data': lambda w: w.data[-1, 0, -1].fill_(9),
    'all signs': lambda w: w.data.neg_(),
    'two signs that a weak digest would miss': lambda w: w.data.view(-1)[1:129:127].neg_(),
    'another storage': lambda w: setattr(w, 'data', w.data * 2),
    'set_': lambda w: w.set_((w * 2).clone()),
    'NumPy': lambda w: w.numpy().__setitem__((0, 0, 3, 3), 5),
}


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_changed_weights_are_seen(change):
    x, weight, _, _ = drawn(1, 40, 24, 24, 13)
    before = depthwise_conv2d(x, weight)
    assert torch.equal(before, depthwise_conv2d(x, weight))
    CHANGES[change](weight)
    for _ in range(2):
        after = depthwise_conv2d(x, weight)
        assert relative_error(after, exact(x.double(), weight.double(), torch.zeros(len(weight)))) < 2e-6
        assert not torch.equal(after, before)


@torch.no_grad()
def test_memory_that_is_used_again_and_other_maps_are_seen():
    for size in (14, 13, 24, 14):  # the same transform may serve two sizes, of which one crops the kernel
        x, weight, _, _ = drawn(1, 8, size, size, 27)
        for _ in range(3):
            fresh = weight.clone().mul_(torch.rand(1))  # likely where the last one was
            expected = exact(x.double(), fresh.double(), torch.zeros(len(fresh)))
            assert relative_error(depthwise_conv2d(x, fresh), expected) < 2e-6
            del fresh
    shared = torch.randn(2, 40 * 13 * 13).bfloat16().flatten()
    x = torch.randn(1, 40, 24, 24)
    for weight in (shared[:40 * 13 * 13].view(40, 1, 13, 13), shared.view(torch.float32).view(40, 1, 13, 13)):
        x = x.to(weight.dtype)
        expected = exact(x.double(), weight.double(), torch.zeros(40))
        assert relative_error(depthwise_conv2d(x, weight), expected) < TOLERANCE[x.dtype]


@torch.no_grad()
def test_threads_share_the_kept_spectra():
    x, weight, _, _ = drawn(1, 40, 24, 24, 13)
    expected = depthwise_conv2d(x, weight)

    def work(i: int) -> bool:
        own = weight.clone()
        return all(torch.equal(depthwise_conv2d(x, w), expected) for _ in range(20) for w in (weight, own))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_kept_spectra_are_bounded():
    output = run_script('python', '-c', textwrap.dedent('''
        import pathlib, torch
        from large_kernel_conv import depthwise_conv2d
        def resident():  # MiB
            return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096 // 2 ** 20
        x = torch.randn(1, 640, 96, 96)
        weights = [torch.randn(640, 1, 31, 31) for _ in range(40)]
        with torch.no_grad():
            depthwise_conv2d(x, weights[0])
            before = resident()
            for weight in weights:
                depthwise_conv2d(x, weight)
        print('grew by', resident() - before)
    ''')).stdout
    # 36 MiB of spectra each, 1440 in all, of which 512 are kept, and what the allocator does not give back
    assert 200 < int(output.split()[-1]) < 1000, output


# What PyTorch does with operators.

WHERE = 6, 6, 6, 6, 1, 1  # padding and dilation, as the operators take them


@pytest.mark.parametrize('memory_format, wanted', [
    ('channels_last', (True, True, True)), ('contiguous', (True, False, False)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('contiguous', (True, True, True)), ('contiguous', (False, True, False)),
        ('channels_last', (True, False, False)), ('channels_last', (False, True, False))))])
def test_the_differentiable_operator_passes_opcheck(memory_format, wanted):
    *inputs, _ = drawn(2, 20, 20, 20, 13, memory_format=FORMATS[memory_format])
    inputs = [t.requires_grad_(r) for t, r in zip(inputs, wanted, strict=True)]
    torch.library.opcheck(torch.ops.large_kernel_conv.depthwise_conv2d.default,
                          (*inputs, *WHERE, not wanted[1]))


@pytest.mark.parametrize('memory_format', FORMATS)
def test_the_other_operators_pass_opcheck(memory_format):
    x, weight, bias, grad = drawn(2, 20, 20, 20, 13, memory_format=FORMATS[memory_format])
    ops = torch.ops.large_kernel_conv
    torch.library.opcheck(ops.depthwise_conv2d_backward.default, (grad, x, weight, *WHERE, True, False, True))
    torch.library.opcheck(ops.prepared_spectra.default, (weight, 20, 20, *WHERE))
    spectra = ops.prepared_spectra(weight, 20, 20, *WHERE)
    torch.library.opcheck(ops.depthwise_conv2d_prepared.default, (x, weight, spectra, bias, *WHERE, True))


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend):
    layer = DepthwiseConv2d(12, 13)
    compiled = torch.compile(nn.Sequential(nn.ReLU(), layer, nn.Sigmoid()), fullgraph=True, backend=backend)
    for batch in (2, 3):
        x = torch.randn(batch, 12, 20, 20).to(memory_format=torch.channels_last)
        y = compiled(x)
        expected = torch.sigmoid(plain(x.relu(), layer.weight, layer.bias))
        assert relative_error(y.detach(), expected.detach()) < 1e-5
        assert y.is_contiguous(memory_format=torch.channels_last)
        wanted = torch.autograd.grad(expected.sum(), layer.weight)[0]
        assert relative_error(torch.autograd.grad(y.sum(), layer.weight)[0], wanted) < 1e-5


def test_a_frozen_compiled_model_holds_its_spectra_as_constants():
    layer = DepthwiseConv2d(12, 13).eval().requires_grad_(False)
    x = torch.randn(2, 12, 20, 20)
    expected = plain(x, layer.weight, layer.bias)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        run = torch.compile(layer, fullgraph=True)
        run(x)
        with torch.profiler.profile() as profile:
            assert relative_error(run(x), expected) < 1e-5
    names = {event.key for event in profile.key_averages()}
    assert 'large_kernel_conv::depthwise_conv2d_prepared' in names
    assert 'large_kernel_conv::prepared_spectra' not in names


def test_an_exported_program_runs_in_a_fresh_process(tmp_path):
    layer = DepthwiseConv2d(12, 13).eval()
    x = torch.randn(2, 12, 20, 20)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / 'layer.pt2')
    torch.save((x, layer(x).detach()), tmp_path / 'values.pt')
    output = run_script('python', '-c', textwrap.dedent('''
        import sys, torch, large_kernel_conv
        x, y = torch.load(sys.argv[2])
        print(torch.equal(torch.export.load(sys.argv[1]).module()(x), y))
    '''), tmp_path / 'layer.pt2', tmp_path / 'values.pt').stdout
    assert output.strip().endswith('True'), output


def test_autocast_gives_its_dtype_and_float32_gradients():
    layer = DepthwiseConv2d(12, 13)
    x = torch.randn(2, 12, 20, 20)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    assert relative_error(y.float().detach(), plain(x, layer.weight, layer.bias).detach()) < 1e-2


def test_activation_checkpointing_gives_the_same_gradients():
    layer = nn.Sequential(DepthwiseConv2d(12, 13), nn.ReLU())
    x = torch.randn(2, 12, 20, 20, requires_grad=True)
    stored = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, *layer.parameters()])
    assert all(map(torch.equal, stored, again))


def test_the_layer_is_nn_conv2d_to_the_rest_of_pytorch():
    layer = DepthwiseConv2d(12, 13)
    same = nn.Conv2d(12, 12, 13, padding=6, groups=12)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 20, 20)
    for other in (same, copy.deepcopy(layer)):
        assert relative_error(other(x).detach(), layer(x).detach()) < 1e-6
    assert isinstance(layer, nn.Conv2d) and layer.padding == (6, 6)


@torch.no_grad()
def test_a_frozen_layer_follows_the_size_of_the_map():
    layer = DepthwiseConv2d(12, 13)
    for relu in (False, True):
        frozen = FrozenDepthwiseConv2d(layer, relu)
        for size in (20, 28, 20, 5):
            for memory_format in FORMATS.values():
                x = torch.randn(2, 12, size, size).to(memory_format=memory_format)
                expected = plain(x, layer.weight, layer.bias)
                assert relative_error(frozen(x), expected.relu() if relu else expected) < 1e-5
                assert relative_error(frozen(x.double()), expected.relu() if relu else expected) < 1e-5


FROZEN_CHANGES = {
    'load_state_dict': lambda f, state: f.load_state_dict(state),
    'load_state_dict, assigned': lambda f, state: f.load_state_dict(state, assign=True),
    'in place': lambda f, _: f.weight.mul_(2),
    'in inference mode': torch.inference_mode()(lambda f, _: f.weight.mul_(2)),
    'loaded in inference mode': torch.inference_mode()(lambda f, state: f.load_state_dict(state)),
    'moved and back': lambda f, _: f.bfloat16().float(),
    'to half': lambda f, _: f.half(),
    'another buffer': lambda f, state: setattr(f, 'weight', state['weight'].clone()),
    'another storage, twice': lambda f, _: [setattr(f.weight, 'data', f.weight.data * factor)
                                            for factor in (3, 0.5)],
    # as by the layer it was made of
    'in place, by another name': lambda f, _: f.weight.detach().view(-1).mul_(2),
}


@pytest.mark.parametrize('built_in', [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize('change', FROZEN_CHANGES)
@torch.no_grad()
def test_a_frozen_layer_sees_its_weight_change(change, built_in):
    x = torch.randn(2, 12, 20, 20)
    with built_in():
        frozen, state = FrozenDepthwiseConv2d(DepthwiseConv2d(12, 13)), DepthwiseConv2d(12, 13).state_dict()
    for _ in range(2):
        frozen(x)
        with built_in():
            FROZEN_CHANGES[change](frozen, state)
        assert relative_error(frozen(x), plain(x, frozen.weight.float(), frozen.bias.float())) < 1e-5


@torch.no_grad()
def test_a_saved_frozen_layer_leaves_its_spectra_behind():
    frozen, x = FrozenDepthwiseConv2d(DepthwiseConv2d(12, 13)), torch.randn(2, 12, 20, 20)
    expected = frozen(x)
    loaded = pickle.loads(pickle.dumps(frozen))
    assert frozen.prepared[1].numel() > 0 and loaded.prepared == (None, None)
    assert torch.equal(loaded(x), expected)


def test_the_implementation_says_its_name_and_reason():
    x, weight, _, _ = drawn(1, 4, 56, 56, 31)
    name, reason = implementation(x, weight)
    assert name == 'cpu fft' and '72 x 72 points' in reason and 'a 31 x 31 kernel on a 56 x 56 map' in reason
    assert implementation(x[..., :7, :7], weight[..., :13, :13])[0] == 'cpu direct'
    assert ' tiles of ' in implementation(torch.randn(1, 4, 256, 256), weight)[1]
    name, reason = implementation(x.to('meta'), weight.to('meta'))
    assert name == 'pytorch' and 'meta' in reason
    with pytest.raises(ValueError, match='must be'):
        implementation(x[0], weight)


@pytest.mark.parametrize('given, kind', [('auto', DepthwiseConv2d), ('', DepthwiseConv2d),
                                         ('pytorch', nn.Conv2d)])
def test_a_layer_is_built_in_the_implementation_that_is_named(given, kind, monkeypatch, tmp_path):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', str(tmp_path))  # an argument is before the variable
    layer = depthwise_layer(4, 7, bias=False, implementation=given)
    assert type(layer) is kind and layer.padding == (3, 3) and layer.groups == 4 and layer.bias is None
    assert type(depthwise_layer(4, 5)) is nn.Conv2d  # the extension serves larger kernels
    with pytest.raises(ImportError, match=rf'LARGE_KERNEL_CONV_IMPL is .*there is no {tmp_path}'):
        depthwise_layer(4, 7)
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', given)
    assert type(depthwise_layer(4, 7)) is kind
