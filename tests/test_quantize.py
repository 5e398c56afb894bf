"""tools/quantize.py: what it prints and writes, who reads that, and what is refused."""
import re

import onnx
import openvino
import pytest
import torch
from PIL import Image

import replknet_zoo
from conftest import TOY, relative_error, run_main, with_random_weights, write_images
from datasets import Digits
from replknet_zoo import calibration, create_model, load_weights
from test_export import run_export, runtime_logits
from tools import convert, predict, quantize
from utils import UserError


def run_quantize(*options) -> None:
    """tools/quantize.py in this process; without a --model it would take seconds to find out."""
    options = [str(option) for option in ('--model', 'RepLKNet-31T', *options)]
    quantize.main(quantize.get_args_parser().parse_args(options))


def write_source(path, name):
    torch.manual_seed(0)
    model = with_random_weights(create_model(name, num_classes=2, use_sync_bn=False))
    torch.save({'model': model.state_dict()}, path)
    return path


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / 'source.pth', 'RepLKNet-31T')


@pytest.fixture
def photos(tmp_path):
    """40 images in 2 class folders, one of them grey."""
    write_images(tmp_path / 'photos', 2, 20)
    Image.open(tmp_path / 'photos' / 'class0' / '3.png').convert('L').save(
        tmp_path / 'photos' / 'class0' / '3.png')
    return tmp_path / 'photos'


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_is_written_compared_and_read(suffix, source, photos, tmp_path, capsys):
    written = tmp_path / f'int8{suffix}'
    run_quantize(source, written, '--data_path', photos, '--images', 32)
    printed = capsys.readouterr().out
    assert 'RepLKNet-31T, 2 classes, 32 px: 32 images to calibrate by, 8 to compare on' in printed
    lines = re.findall(r'^ *([\d.]+) dB  \S+(.*)$', printed, re.MULTILINE)
    decibels = [float(value) for value, _ in lines]
    assert len(decibels) == 23 and decibels == sorted(decibels)
    assert all(note == ('  stays in floating point' if float(value) < 20 else '') for value, note in lines)
    shares = [float(value) for value in re.findall(r'top-1 ([\d.]+)%  top-5 100.00%', printed)]
    assert len(shares) == 2 and all(share % 12.5 == 0 for share in shares)  # of 8 images
    assert re.search(r'predictions agree on [678] of 8 images; largest difference of the logits', printed)
    state = load_weights(written)
    assert replknet_zoo.is_quantized(state)
    assert written.stat().st_size < 0.65 * source.stat().st_size  # the depthwise kernels stay as they are
    metadata = replknet_zoo.read_checkpoint(written)['metadata']
    assert (metadata['model'], metadata['int8'], metadata['input_size']) == ('RepLKNet-31T', True, 32)
    image = str(photos / 'class0' / '3.png')
    predict.main(predict.get_args_parser().parse_args(
        [image, '--weights', str(written), '--model', 'RepLKNet-31T', '--device', 'cpu']))
    assert re.search(r'^ +\d+\.\d\d% +[01]  class [01]$', capsys.readouterr().out, re.MULTILINE)


def test_one_image_is_enough_and_a_folder_without_classes(source, photos, tmp_path, capsys):
    with pytest.warns(UserWarning, match='calibrated by 1 images only'):
        run_quantize(source, tmp_path / 'int8.pth', '--data_path', photos / 'class1', '--images', 1)
    printed = capsys.readouterr().out
    assert '1 images to calibrate by, 19 to compare on' in printed and 'of 19 images' in printed
    assert f'without top-1: {photos}/class1 does not hold one folder for each of 2 classes' in printed
    assert 'top-1 ' not in printed.replace('without top-1: ', '')


@pytest.mark.parametrize(('options', 'reason'), [
    (['--images', '0'], '--images 0 must be at least 1'),
    (['--model', 'mine.py:model'], '--model mine.py:model: this takes the named models only'),
    (['--model', 'RepLKNet-31B'], 'holds weights of RepLKNet-31T, not of RepLKNet-31B'),
    (['--data_path', 'nowhere'], 'there is no file or folder nowhere'),
    (['--data_path', __file__], 'is no folder'),
])
def test_what_cannot_work_is_refused(options, reason, source, photos, tmp_path):
    with pytest.raises(UserError, match=reason):
        run_quantize(source, tmp_path / 'int8.pth', '--data_path', photos, *options)
    assert not (tmp_path / 'int8.pth').exists()


def test_other_names_and_weights_are_refused(source, photos, tmp_path):
    with pytest.raises(UserError, match=r'ends in neither .pth nor .safetensors'):
        run_quantize(source, tmp_path / 'int8.onnx', '--data_path', photos)
    with pytest.raises(UserError, match='is the file to convert'):
        run_quantize(source, source, '--data_path', photos)
    run_quantize(source, tmp_path / 'int8.pth', '--data_path', photos)
    with pytest.raises(UserError, match='is in int8: name the weights that it was made from'):
        run_quantize(tmp_path / 'int8.pth', tmp_path / 'again.pth', '--data_path', photos)


def test_a_broken_model_and_images_that_cannot_be_read_leave_nothing(source, tmp_path):
    for part in ('stem.0.conv', 'head'):
        state = load_weights(source)
        state[f'{part}.weight'][0] = float('nan')
        torch.save({'model': state}, tmp_path / f'{part}.pth')
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.png').write_text('no image')
    with pytest.raises(UserError, match='there is no image to calibrate by'):
        run_quantize(source, tmp_path / 'int8.pth', '--data_path', tmp_path / 'images')
    write_images(tmp_path / 'photos', 2, 2)
    for part, reason in (('stem.0.conv', 'is not finite'), ('head', 'logits are not finite')):
        with (pytest.raises(UserError, match=reason),
              pytest.warns(UserWarning, match='calibrated by 4 images only')):
            run_quantize(tmp_path / f'{part}.pth', tmp_path / 'int8.pth', '--data_path', tmp_path / 'photos')
    assert not (tmp_path / 'int8.pth').exists()


def test_a_model_that_int8_ruins_is_not_written(source, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, 'LEAST_DECIBELS', 1000)
    with pytest.raises(UserError, match='every layer loses too much in int8'):
        run_quantize(source, tmp_path / 'int8.pth', '--data_path', photos)
    assert not (tmp_path / 'int8.pth').exists()


def test_convert_keeps_the_mark_of_int8(source, photos, tmp_path, capsys):
    run_quantize(source, tmp_path / 'int8.pth', '--data_path', photos)
    convert.main(convert.get_args_parser().parse_args(
        [str(tmp_path / 'int8.pth'), str(tmp_path / 'int8.safetensors'), '--model', 'RepLKNet-31T']))
    assert 'BatchNorms folded, layers in int8' in capsys.readouterr().out
    assert replknet_zoo.read_checkpoint(tmp_path / 'int8.safetensors')['metadata']['int8'] is True


def openvino_logits(path, x: torch.Tensor) -> torch.Tensor:
    """In float32 around the int8 layers, which OpenVINO computes in bfloat16 where the CPU can."""
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return torch.from_numpy(compiled([x.numpy()])[0])


@pytest.mark.parametrize(('name', 'fewest', 'shape'), [('RepLKNet-31T', 20, (3, 3, 64, 32)),
                                                       ('RepMLPNet-T32', 15, (3, 3, 32, 32))])
def test_onnx_in_int8_computes_the_same_in_both_runtimes(name, fewest, shape, photos, tmp_path, capsys):
    int8, exported = tmp_path / 'int8.pth', tmp_path / 'int8.onnx'
    run_quantize(write_source(tmp_path / 'source.pth', name), int8, '--model', name, '--data_path', photos)
    run_export('--to', 'onnx', '--int8', '--weights', int8, '--model', name, exported)
    assert f'Wrote {exported}' in capsys.readouterr().out
    proto, state = onnx.load(exported), load_weights(int8)
    layers = sum(key.endswith('.weight_scale') for key in state)
    assert layers >= fewest
    operators = [node.op_type for node in proto.graph.node]
    assert (operators.count('QuantizeLinear'), operators.count('DequantizeLinear')) == (layers, 2 * layers)
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in proto.graph.initializer) >= layers
    x = torch.randn(shape)
    with torch.inference_mode():
        expected = replknet_zoo.model_for(name, state, int8)(x)
    for logits in (runtime_logits, openvino_logits):
        assert relative_error(logits(exported, x), expected) < 1e-2


def test_an_export_whose_form_does_not_fit_is_refused(source, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    int8 = tmp_path / 'int8.pth'
    run_quantize(source, int8, '--data_path', photos)
    refused = {'is in int8: pass --to onnx --int8': ['--to', 'pt2', '--weights', int8, 'other.pt2'],
               'is not in int8': ['--to', 'onnx', '--int8', '--weights', source, 'other.onnx'],
               '--int8 is for --to onnx': ['--to', 'onnx', '--int8', 'other.onnx']}
    for reason, options in refused.items():
        with pytest.raises(UserError, match=reason):
            run_export('--model', 'RepLKNet-31T', *options)


@pytest.mark.slow
def test_a_trained_toy_loses_at_most_half_a_point(tmp_path, capsys):
    digits = Digits(train=False)
    for i in range(len(digits)):
        image, label = digits[i]
        (tmp_path / 'val' / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'val' / str(label) / f'{i}.png')
    for model, lr in (('RepLKNet-31T', '8e-3'), ('RepMLPNet-T32', '4e-3')):
        output = tmp_path / model
        run_main(*TOY, '--model', model, '--data_set', 'DIGITS', '--epochs', 20, '--warmup_epochs', 3,
                 '--batch_size', 64, '--lr', lr, '--aa', 'none', '--reprob', 0, '--mixup', 0, '--cutmix', 0,
                 '--output_dir', output)
        run_quantize(output / 'latest.pth', output / 'int8.pth', '--data_path', tmp_path / 'val', '--model',
                     model)
        before, after = (float(x) for x in re.findall(r'top-1 ([\d.]+)%', capsys.readouterr().out))
        assert before > 85 and before - after <= 0.5
