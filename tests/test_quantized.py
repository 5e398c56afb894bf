"""int8: the layer's arithmetic, calibration, the compiled form, files."""
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import replknet_zoo
from conftest import SHORT, relative_error, run_main, with_random_weights
from erf import visualize_erf
from replknet import ReparamLargeKernelConv
from replknet_zoo import calibration, compile_for_inference, create_model, inference, quantize
from replknet_zoo.quantized import QuantizedConv2d, dequantize
from utils import UserError

TOYS = {'RepLKNet-31T': 23, 'RepMLPNet-T32': 15}  # and how many layers of each are quantized


def toy(name: str = 'RepLKNet-31T') -> nn.Module:
    torch.manual_seed(0)
    return with_random_weights(create_model(name, num_classes=10, use_sync_bn=False)).eval()


def images(count: int = 32, size: int = 32) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).split(16))


def lost_part(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's root mean square, of that of the expected values: largest errors are those of inputs beyond
    the calibrated range."""
    return ((found - expected).norm() / expected.norm()).item()


# ---- The layer ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('groups', [1, 3])
def test_a_layer_is_its_definition(groups):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 9, 1, groups=groups), 3 * torch.randn(2, 6, 5, 4)
    layer = QuantizedConv2d.of(conv, x.amin((0, 2, 3)), x.amax((0, 2, 3)))
    levels = (x * layer.input_scale[:, None, None] + layer.input_shift[:, None, None]).round().clamp(0, 255)
    assert levels.amin() == 0 and levels.amax() == 255
    assert layer.weight.flatten(1).abs().amax(1).tolist() == [127] * 9
    products = F.conv2d(levels.double(), layer.weight.double(), groups=groups)
    expected = products * layer.weight_scale[:, None, None] + layer.bias[:, None, None]
    assert relative_error(layer(x), expected) < 1e-6
    assert relative_error(layer(x), conv(x)) < 2e-2
    assert relative_error(layer.dequantized()(x), conv(x)) < 1e-2


def test_inputs_that_are_always_the_same_keep_their_value():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 1), torch.tensor([0.0, 5.0, -2.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    layer = QuantizedConv2d.of(conv, x.amin((0, 2, 3)), x.amax((0, 2, 3)))
    assert relative_error(layer(x), conv(x)) < 1e-2  # that of the weights


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(7, 35), (400, 128), (0, 4)])
def test_pixels_are_quantized_as_defined(dtype, shape):
    torch.manual_seed(0)
    x = (300 * torch.randn(shape)).to(dtype)
    scale, shift = torch.rand(shape[1]) + 0.5, torch.randint(0, 200, (shape[1],)).float()
    exact = x.double() * scale.double() + shift.double()
    inference.cpu.load()
    found = torch.ops.large_kernel_conv.quantize_pixels(x, scale, shift)
    assert found.dtype == torch.uint8 and found.shape == shape
    # within float32's rounding of the nearest level
    assert ((found.double() - exact.clamp(0, 255)).abs() < 0.5001).all()


def test_ties_go_to_even_levels_and_no_number_to_zero():
    x = torch.tensor([[0.5, 1.5, 2.5, 254.5, 255.5, 1e30, -1e30, float('nan')]])
    inference.cpu.load()
    found = torch.ops.large_kernel_conv.quantize_pixels(x, torch.ones(8), torch.zeros(8))
    assert found.tolist() == [[0, 2, 2, 254, 255, 255, 0, 0]]


# ---- Calibration -------------------------------------------------------------------------------------------

@torch.no_grad()
def inputs_of(model: nn.Module, names, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the submodules get where the model gets x."""
    found = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs, name=name: found.setdefault(name, inputs[0].clone())) for name in names]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize('name', TOYS)
def test_layers_of_a_quantized_model_stay_near_the_originals(name):
    model = toy(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized, decibels = quantize(model, images(256))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    layers = {key: layer for key, layer in quantized.named_modules() if isinstance(layer, QuantizedConv2d)}
    assert len(layers) == len(decibels) == TOYS[name]
    model.structural_reparam()
    model.deep_fuse_BN()
    inputs = inputs_of(model, layers, torch.randn(5, 3, 32, 32))
    dequantize(quantized)
    for key, layer in layers.items():
        expected = model.get_submodule(key)(inputs[key])
        assert 0 < lost_part(layer(inputs[key]), expected) < 4e-2, key
        assert lost_part(quantized.get_submodule(key)(inputs[key]), expected) < 1e-2, key


def test_decibels_are_the_part_of_a_channels_variance_that_is_lost():
    model = toy()
    quantized, decibels = quantize(model, images())
    model.structural_reparam()
    model.deep_fuse_BN()
    name = 'stages.2.blocks.1.pw2.conv'
    x = inputs_of(model, [name], torch.cat(images()))[name]
    expected = model.get_submodule(name)(x).double()
    lost = (quantized.get_submodule(name)(x) - expected).var((0, 2, 3)) / expected.var((0, 2, 3))
    assert decibels[name] == pytest.approx(-10 * lost.mean().log10().item(), abs=0.01)


def make_a_large_channel(ffn: nn.Module) -> None:
    ffn.pw1.conv.weight[0] *= 1e4
    ffn.pw1.conv.bias[0] = 1e4
    ffn.pw2.conv.weight[:, 0] /= 1e6


def make_a_constant_channel(ffn: nn.Module) -> None:
    ffn.pw1.conv.weight[0] = 0
    ffn.pw1.conv.bias[0] = 1e4
    ffn.pw2.conv.bias -= 1e4 * ffn.pw2.conv.weight[:, 0, 0, 0]


def make_a_large_channel_for_one_output(ffn: nn.Module) -> None:
    ffn.pw1.conv.weight[0] *= 1e4
    ffn.pw2.conv.weight[1:, 0] = 0


@pytest.mark.parametrize('spoil', [make_a_large_channel, make_a_constant_channel,
                                   make_a_large_channel_for_one_output])
def test_a_layer_that_loses_too_much_stays_in_floating_point(spoil):
    model = toy()
    model.structural_reparam()
    model.deep_fuse_BN()
    with torch.no_grad():
        spoil(model.stages[3].blocks[1])  # a ConvFFN, whose hidden channels share a scale
    quantized, decibels = quantize(model, images())
    lost = [name for name, kept in decibels.items() if kept < calibration.LEAST_DECIBELS]
    assert lost == ['stages.3.blocks.1.pw2.conv']
    assert type(quantized.stages[3].blocks[1].pw2.conv) is nn.Conv2d
    layers = [module for module in quantized.modules() if isinstance(module, QuantizedConv2d)]
    assert len(layers) == len(decibels) - 1


@pytest.mark.parametrize('batches', [
    [images()[0][:1]], [images()[0][:1].expand(40, 3, 32, 32)],
    [torch.linspace(-2, 2, 40).view(-1, 1, 1, 1).expand(40, 3, 32, 32)]])
def test_of_few_images_a_layer_has_one_scale(batches):
    with pytest.warns(UserWarning, match=r'calibrated by [01] images only'):
        quantized, _ = quantize(toy(), batches)
    layers = [layer for layer in quantized.modules() if isinstance(layer, QuantizedConv2d)]
    assert layers and all((layer.input_scale == layer.input_scale[0]).all() for layer in layers)
    layers = [layer for layer in quantize(toy(), images())[0].modules() if isinstance(layer, QuantizedConv2d)]
    assert any((layer.input_scale != layer.input_scale[0]).any() for layer in layers)


@pytest.mark.parametrize(('batches', 'reason'), [
    ([], 'no image'), ([torch.zeros(0, 3, 32, 32)], 'no image'),
    ([(torch.zeros(2, 3, 32, 32), torch.zeros(2))], r'not tuple: .* pass \(x for x, _ in loader\)'),
    (torch.zeros(2, 3, 32, 32), r'not \(3, 32, 32\)'), ([torch.zeros(2, 1, 32, 32)], r'not \(2, 1, 32, 32\)'),
    ([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], r'in torch.uint8'),
    ([torch.full((2, 3, 32, 32), torch.nan)], 'is not finite'),
])
@pytest.mark.filterwarnings('ignore:calibrated by')
def test_what_is_no_batch_of_images_is_refused(batches, reason):
    with pytest.raises(ValueError, match=reason):
        quantize(toy(), batches)


@pytest.mark.parametrize(('name', 'layers'), [('RepLKNet-31T', 9), ('RepMLPNet-T32', 6)])
def test_layers_that_a_backbone_does_not_run_stay_as_they_are(name, layers):
    model = with_random_weights(create_model(name, num_classes=None, out_indices=(0, 1))).eval()
    _, decibels = quantize(model, images())
    assert len(decibels) == layers and not any(key.startswith(('stages.2', 'stages.3')) for key in decibels)


def test_biases_take_off_the_mean_error():
    model = toy()
    model.structural_reparam()
    model.deep_fuse_BN()
    quantized, _ = quantize(model, images())
    layer, name = quantized.transitions[1][0].conv, 'transitions.1.0.conv'
    errors = []
    calibration._watch(model, {name: model.get_submodule(name)}, images(),
                       lambda _, x, y: errors.append((layer(x) - y).mean((0, 2, 3))))
    assert torch.stack(errors).mean(0).abs().max() < 1e-6


# ---- The compiled form -------------------------------------------------------------------------------------

needs_int8 = pytest.mark.skipif(not inference.onednn_computes(torch.int8), reason='needs VNNI or AMX')


@pytest.fixture
def in_float32(monkeypatch):
    """What is not in int8 is in float32."""
    computes = inference.onednn_computes
    monkeypatch.setattr(inference, 'onednn_computes',
                        lambda dtype: dtype != torch.bfloat16 and computes(dtype))


@needs_int8
@pytest.mark.usefixtures('in_float32')
@pytest.mark.parametrize(('name', 'fcs'), [('RepLKNet-31T', 0), ('RepMLPNet-T32', 0), ('RepMLPNet-T32', 5)])
def test_the_compiled_blocks_compute_what_the_layers_define(name, fcs, monkeypatch):
    if fcs:  # so small that int8 would not be worth it
        monkeypatch.setattr(inference, 'LEAST_INT8_PIXELS', 1)
    quantized, _ = quantize(toy(name), images())
    model = compile_for_inference(quantized).model
    assert sum(bool(getattr(module, 'int8', None)) for module in model.modules()) == fcs
    blocks = {key: block for key, block in model.named_modules() if type(block) in inference.FUSED.values()}
    for shape in ((2, 3, 64, 96), (1, 3, 32, 32)):
        for key, x in inputs_of(quantized, blocks, torch.randn(shape)).items():
            with torch.inference_mode():
                expected = quantized.get_submodule(key)(x)
                found = blocks[key](x.contiguous(memory_format=torch.channels_last).clone())
            shortcut = x if x.shape == expected.shape else 0
            # a level here and there, after another order of sums; all of them where FCs are not in int8
            assert lost_part(found - shortcut, expected - shortcut) < 5e-2, key


@needs_int8
@pytest.mark.parametrize('name', TOYS)
def test_the_compiled_form_takes_any_batch_and_leaves_it_as_it_is(name):
    compiled = compile_for_inference(quantize(toy(name), images())[0])
    x = torch.randn(5, 3, 64, 96)
    copy = x.clone()
    logits = compiled(x)
    assert torch.equal(x, copy) and torch.equal(compiled(x), logits)
    assert relative_error(torch.cat([compiled(part) for part in x.split(2)]), logits) < 1e-2


@pytest.mark.usefixtures('in_float32')
def test_maps_of_a_backbone_are_those_of_the_model():
    torch.manual_seed(0)
    model = with_random_weights(create_model('RepLKNet-31T', num_classes=None, out_indices=(0, 1, 2, 3),
                                           use_sync_bn=False)).eval()
    x = torch.randn(3, 3, 64, 64)
    compiled = compile_for_inference(model, torch.int8, images(size=64))
    with torch.inference_mode():
        for found, expected in zip(compiled(x), model(x), strict=True):
            assert relative_error(found, expected) < 6e-2


def test_int8_needs_images():
    with pytest.raises(ValueError, match='pass calibration=batches'):
        compile_for_inference(toy(), torch.int8)


def test_where_int8_is_not_computed_it_is_said(monkeypatch):
    computes = inference.onednn_computes
    monkeypatch.setattr(inference, 'onednn_computes', lambda dtype: dtype != torch.int8 and computes(dtype))
    model, x = toy(), torch.randn(4, 3, 32, 32)
    with pytest.warns(UserWarning, match='int8 is for CPUs with VNNI or AMX'):
        compiled = compile_for_inference(model, torch.int8, images())
    with torch.inference_mode():
        assert relative_error(compiled(x), model(x)) < 3e-2


# ---- Files -------------------------------------------------------------------------------------------------

@pytest.fixture
def int8_file(tmp_path):
    quantized, _ = quantize(toy(), images())
    torch.save({'model': quantized.state_dict()}, tmp_path / 'int8.pth')
    return tmp_path / 'int8.pth', quantized


def test_a_file_gives_the_model_again(int8_file):
    file, quantized = int8_file
    state = replknet_zoo.load_weights(file)
    assert replknet_zoo.is_quantized(state) and replknet_zoo.name_of(state) == 'RepLKNet-31T'
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(replknet_zoo.model_for('RepLKNet-31T', state, file)(x), quantized(x))
        loaded = create_model('RepLKNet-31T', num_classes=10, use_sync_bn=False).eval()
        replknet_zoo.load_state(loaded, state, file)
        assert torch.equal(loaded(x), quantized(x))


def test_a_file_of_another_model_is_refused_and_the_model_stays(int8_file):
    file, _ = int8_file
    model = create_model('RepMLPNet-T32', num_classes=10)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match='does not fit the model'):
        replknet_zoo.load_state(model, replknet_zoo.load_weights(file), file)
    assert list(model.state_dict()) == before


def test_main_evaluates_a_file_and_refuses_to_train_it(imagenet, tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model('RepLKNet-31T', num_classes=2, use_sync_bn=False).eval()
    with warnings.catch_warnings(action='ignore'):
        quantized, _ = quantize(model, images(8))
    file = tmp_path / 'int8.pth'
    torch.save({'model': quantized.state_dict()}, file)
    run_main(*SHORT, '--data_path', imagenet, '--eval', 'true', '--resume', file)
    printed = capsys.readouterr().out
    assert 'Acc@1' in printed
    model.structural_reparam()
    model.deep_fuse_BN()
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters' in printed
    for option in ('--resume', '--finetune'):
        with pytest.raises(UserError, match=r'cannot be trained: .* its layers in int8'):
            run_main(*SHORT, '--data_path', imagenet, option, file)


def test_int8_has_no_receptive_field(int8_file):
    words = ['--model', 'RepLKNet-31T', '--weights', str(int8_file[0])]
    with pytest.raises(UserError, match='is in int8, which has no gradients'):
        visualize_erf.build_model(visualize_erf.get_args_parser().parse_args(words))


# ---- Training with quantization in mind --------------------------------------------------------------------

def fake_quantized(weight: torch.Tensor) -> torch.Tensor:
    """int8 weights, one scale for each output; gradients pass through the rounding."""
    scale = weight.detach().flatten(1).abs().amax(1) / 127
    return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(len(scale), dtype=torch.int32),
                                                  0, -127, 127)


def test_the_equivalent_kernel_is_trained_in_int8():
    torch.manual_seed(0)
    layer = ReparamLargeKernelConv(4, 4, 13, 1, 4, 5).eval()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x, target, losses = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), []
    for _ in range(20):
        weight, bias = layer.get_equivalent_kernel_bias()
        loss = F.mse_loss(F.conv2d(x, fake_quantized(weight), bias, padding=6, groups=4), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    assert losses[-1] < 0.8 * losses[0]
