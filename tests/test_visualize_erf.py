"""erf/visualize_erf.py: the published arithmetic, the models and images it takes, nothing lost."""
import argparse
import json
import re
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageFile

import replknet
import replknet_zoo
import utils
from conftest import ROOT, TINY, relative_error
from erf import visualize_erf
from golden.fill import fill
from test_tools import run_command
from test_weights import mmpretrain_keys

TOY = ['--model', 'RepLKNet-31T', '--input_size', '64', '--device', 'cpu']


def parsed(*options) -> argparse.Namespace:
    """Options of erf/visualize_erf.py; on the CPU if nothing else is said, for GPUs round to TF32."""
    return visualize_erf.get_args_parser().parse_args(['--device', 'cpu', *map(str, options)])


def run_visualize(*options) -> None:
    """erf/visualize_erf.py in this process."""
    visualize_erf.main(parsed(*options))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three photographs of noise, of unequal sides, in images of the working directory, which is tmp_path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    random = np.random.RandomState(0)
    for i in range(3):
        pixels = random.randint(0, 256, (50 + 9 * i, 70, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / f'{i}.png')
    return tmp_path / 'images'


def own_model(tmp_path: Path, body: str) -> str:
    """--model for a file with a convolution, 3 x 3 ones, that has `body` in the place of forward(self, x)."""
    (tmp_path / 'mine.py').write_text(f"""
import os
import time
import torch
from torch import nn

class Mine(nn.Conv2d):
    calls = 0
    def forward(self, x):
        self.calls += 1
        {body}

def build():
    model = Mine(3, 1, 3, padding=1, bias=False)
    nn.init.ones_(model.weight)
    return model
""")
    return f'{tmp_path}/mine.py:build'


CONVOLVE = 'return super().forward(x)'


def expected_erf(features, images: list[Path], size: int, mean, std) -> np.ndarray:
    """The published definition, written anew: float64, in-place gradients, one image after the other."""
    total = np.zeros((size, size))
    for path in images:
        with Image.open(path) as image:
            image = image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(image, np.float32) / 255
        pixels = (pixels - np.float32(mean)) / np.float32(std)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double().requires_grad_()
        maps = features(x)
        middle = maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2]
        middle[middle > 0].sum().backward()
        total += x.grad[0].clamp(min=0).sum(0).numpy()
    return total / len(images)


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_two_layers_of_ones_have_the_erf_one_computes_by_hand(folder, tmp_path):
    for path in folder.iterdir():
        # positive after normalisation, so that no ReLU is closed
        Image.new('RGB', (40, 30), 'white').save(path)
    model = own_model(tmp_path, 'return super().forward(super().forward(x).expand(-1, 3, -1, -1))')
    run_visualize('--model', model, '--data_path', folder, '--save_path', 'erf.npy', '--input_size', 16)
    matrix, expected = np.load(tmp_path / 'erf.npy'), np.zeros((16, 16))
    # 1 2 3 2 1 around the centre at 16 // 2 each way, from 3 hidden channels, for 3 colours
    expected[6:11, 6:11] = 9 * np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1])
    assert matrix.dtype == np.float32
    assert np.allclose(matrix, expected, rtol=1e-6)


@pytest.mark.parametrize('merged', [False, True])
def test_replknet_has_the_published_erf(merged, folder, tmp_path):
    model = fill(replknet_zoo.create_model('RepLKNet-31T', num_classes=7, use_sync_bn=False)).eval()
    if merged:
        model.structural_reparam()
    torch.save({'model': model.state_dict()}, tmp_path / 'weights.pth')
    run_visualize(*TOY, '--weights', 'weights.pth', '--data_path', folder, '--save_path', 'erf.npy')
    expected = expected_erf(model.double().forward_features, sorted(folder.iterdir()), 64,
                            replknet_zoo.IMAGENET_MEAN, replknet_zoo.IMAGENET_STD)
    assert expected.max() > 0
    assert relative_error(np.load(tmp_path / 'erf.npy'), expected) < 1e-4


def test_resnet_has_the_published_erf(folder, tmp_path):
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=5).eval()
    torch.save({f'module.{key}': value for key, value in model.state_dict().items()},
               tmp_path / 'weights.pth')
    run_visualize('--model', 'resnet18', '--weights', 'weights.pth', '--input_size', 96,
                  '--data_path', folder, '--save_path', 'erf')  # becomes erf.npy, as with np.save
    model.avgpool = model.fc = torch.nn.Identity()
    expected = expected_erf(lambda x: model.double()(x).view(1, 512, 3, 3), sorted(folder.iterdir()), 96,
                            replknet_zoo.IMAGENET_MEAN, replknet_zoo.IMAGENET_STD)
    # a ReLU whose input is all but 0 may be open in float32 and closed in float64: 2e-3 on one CPU
    assert relative_error(np.load(tmp_path / 'erf.npy'), expected) < 1e-2


def test_replknets_run_merged(folder, monkeypatch):
    seen = []

    def note(model, image):
        """A double of the arithmetic: notes the model."""
        seen.append(model)
        return np.ones((64, 64), np.float32), (1, 2, 2)
    monkeypatch.setattr(visualize_erf, 'contribution', note)
    run_visualize(*TOY, '--data_path', folder)
    assert not seen[0].training
    assert not any('small_conv' in name or '.bn.' in name for name in seen[0].state_dict())


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, size, expected', [
    ('RepLKNet-31B', 256, (1024, 8)), ('RepLKNet-13', 256, (1024, 8)), ('RepLKNet-XL', 256, (2048, 8)),
    ('resnet152', 256, (2048, 8)), ('convnext_tiny', 256, (768, 8)), ('efficientnet_b0', 256, (1280, 8)),
    ('mobilenet_v2', 256, (1280, 8)), ('mobilenet_v3_small', 256, (576, 8)), ('densenet121', 256, (1024, 8)),
    ('vgg11', 256, (512, 8)), ('squeezenet1_1', 256, (1000, 15)), ('swin_t', 256, (768, 8)),
    ('vit_b_16', 256, (768, 16)), ('convnext_atto', 256, (320, 8)), ('tf_efficientnet_lite0', 256, (1280, 8)),
    ('levit_128s', 256, (384, 4)), ('vit_tiny_patch16_224', 256, (192, 16)),
    ('deit_tiny_distilled_patch16_224', 256, (192, 16)), ('swin_tiny_patch4_window7_224', 224, (768, 7)),
    ('swin_tiny_patch4_window7_224', 448, (768, 14)), ('vit_small_patch14_reg4_dinov2', 224, (384, 16)),
])
def test_the_last_map_of_named_models_is_found(name, size, expected):
    args = parsed('--model', name, '--input_size', size, '--weights', 'random')
    with torch.device('meta'):  # shapes alone
        model, _ = visualize_erf.build_model(args)
        features = visualize_erf.last_map(model, torch.randn(1, 3, size, size))
    channels, side = expected
    assert tuple(features.shape) == (1, channels, side, side)


def test_tokens_become_the_map_of_their_places():
    torch.manual_seed(0)
    model, x = timm.create_model('vit_tiny_patch16_224', img_size=64).eval(), torch.randn(2, 3, 64, 64)
    tokens, features = model.forward_features(x), visualize_erf.last_map(model, x)
    assert torch.equal(features[:, :, 2, 1], tokens[:, 1 + 2 * 4 + 1])  # after the class token, row by row


def test_a_map_with_channels_last_is_turned():
    torch.manual_seed(0)
    model, x = timm.create_model('swin_tiny_patch4_window7_224').eval(), torch.randn(1, 3, 224, 224)
    assert torch.equal(visualize_erf.last_map(model, x)[:, :, 3, 2], model.forward_features(x)[:, 3, 2])


@pytest.mark.parametrize('body, expected', [
    (CONVOLVE, (1, 16)),
    ('torch.nn.functional.adaptive_avg_pool2d(x, 1); return '
     'torch.nn.functional.avg_pool2d(super().forward(x), 16).flatten(1)',
     (1, 16)),  # a pooling on the way, as of squeeze and excitation
    ('return x[:, :1], super().forward(x)[:, :, ::2, ::2]', (1, 8)),
    ('return super().forward(x).mean((-2, -1))', (1, 16)),
    ('return torch.nn.functional.adaptive_avg_pool2d(x[:, :, ::4, ::4], 1).flatten(1)', (3, 4)),
    ('return x.mean(-1)', None),  # no square number of tokens
    ('return x.mean((0, 2))', None),
    ('return {"out": x}', None),
])
def test_maps_of_models_of_ones_own(body, expected, tmp_path):
    model = own_model(tmp_path, body)
    args = parsed('--model', model)
    built, about = visualize_erf.build_model(args)
    assert about['weights'] == 'own'
    if expected is None:
        with pytest.raises(ValueError, match='forward_features'):
            visualize_erf.last_map(built, torch.randn(1, 3, 16, 16))
    else:
        channels, side = expected
        found = visualize_erf.last_map(built, torch.randn(1, 3, 16, 16))
        assert tuple(found.shape) == (1, channels, side, side)


def test_preprocessing_is_the_models_own(tmp_path):
    def mean_of(name):
        args = parsed('--model', name, '--weights', 'random', '--input_size', '224')
        with torch.device('meta'):
            return visualize_erf.build_model(args)[1]['mean']
    assert mean_of('RepLKNet-XL') == [0.5, 0.5, 0.5]
    for name in ('RepLKNet-31B', 'resnet18', 'resnet18.a1_in1k'):
        assert mean_of(name) == [0.485, 0.456, 0.406]
    assert mean_of('vit_tiny_patch16_224') == [0.5, 0.5, 0.5]


@pytest.mark.parametrize('form', ['model_ema', 'mmpretrain', 'backbone'])
def test_weights_are_read_in_the_forms_that_main_reads(form, folder, tmp_path):
    state = fill(replknet_zoo.create_model('RepLKNet-31T', use_sync_bn=False)).state_dict()
    other = replknet_zoo.create_model('RepLKNet-31T', use_sync_bn=False).state_dict()
    bare = {f'backbone.{key}': value for key, value in state.items()
            if not key.startswith(('norm.', 'head.'))}
    content, options = {
        'model_ema': ({'model': other, 'model_ema': state}, ['--model_key', 'model_ema']),
        'mmpretrain': ({'state_dict': mmpretrain_keys(state)}, []),
        'backbone': ({**bare, 'decode_head.bias': torch.ones(3)}, ['--model_prefix', 'backbone.']),
    }[form]
    torch.save(content, tmp_path / f'{form}.pth')
    torch.save(state, tmp_path / 'plain.pth')
    options = ['--weights', f'{form}.pth', *options]
    run_visualize(*TOY, *options, '--data_path', folder, '--save_path', 'form.npy')
    run_visualize(*TOY, '--weights', 'plain.pth', '--data_path', folder, '--save_path', 'plain.npy')
    assert np.array_equal(np.load(tmp_path / 'form.npy'), np.load(tmp_path / 'plain.npy'))
    assert json.loads((tmp_path / 'form.json').read_text())['weights'] == f'{form}.pth'


@pytest.mark.parametrize('name, size', [('vit_tiny_patch16_224', 64), ('vit_b_32', 64),
                                        ('mobilenetv3_small_050', 32)])
def test_weights_of_other_classes_and_sizes_fit(name, size, folder, tmp_path):
    torch.manual_seed(1)
    library = torchvision.models.get_model if name == 'vit_b_32' else timm.create_model
    state = library(name, num_classes=9).state_dict()
    torch.save(state, tmp_path / 'weights.pth')
    args = parsed('--model', name, '--weights', 'weights.pth', '--input_size', size)
    loaded = visualize_erf.build_model(args)[0]
    same = [key for key, value in loaded.state_dict().items() if torch.equal(value, state[key])]
    resized = {key for key in state if 'pos_embed' in key}
    assert set(state) - set(same) == resized
    side = size // 16 if '16' in name else size // 32
    assert visualize_erf.last_map(loaded, torch.randn(1, 3, size, size)).shape[2:] == (side, side)


@pytest.mark.parametrize('weights', ['mobilenet', 'merged'])
@pytest.mark.parametrize('name', ['RepLKNet-31T', 'resnet18', 'resnet18.a1_in1k', 'vit_tiny_patch16_224'])
def test_weights_of_another_model_are_refused(name, weights, folder, tmp_path):
    other = (replknet.RepLKNet(**TINY, small_kernel_merged=True, use_sync_bn=False) if weights == 'merged'
             else torchvision.models.mobilenet_v3_small())
    torch.save(other.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(utils.UserError, match=r'(?s)weights\.pth does not fit .*([mM]issing|another shape)'):
        run_visualize('--model', name, '--weights', 'weights.pth', '--data_path', folder)
    assert not (tmp_path / 'temp.npy').exists()


def test_random_weights_are_pointed_out(folder, tmp_path, capsys):
    run_visualize(*TOY, '--data_path', folder)
    note = "NOTE: the weights are random, and an untrained network's ERF says nothing"
    assert capsys.readouterr().out.count(note) == 2  # before the run, which may be long, and under it
    assert json.loads((tmp_path / 'temp.json').read_text())['weights'] == 'random'
    torch.save(replknet_zoo.create_model('RepLKNet-31T').state_dict(), tmp_path / 'weights.pth')
    run_visualize(*TOY, '--weights', 'weights.pth', '--data_path', folder)
    assert 'NOTE' not in capsys.readouterr().out


def test_only_the_published_models_are_pretrained_by_default(folder, monkeypatch):
    def offline(entry, *args, **kwargs):
        raise urllib.error.URLError(f'no network for {entry}')
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, 'get_state_dict', offline)
    for name in ('resnet101', 'resnet152'):
        message = r'(?s)could not be downloaded.*IMAGENET1K_V1.*--weights FILE'
        with pytest.raises(utils.UserError, match=message):
            run_visualize('--model', name, '--data_path', folder)
    with pytest.raises(utils.UserError, match='could not be downloaded'):
        run_visualize('--model', 'vit_b_32', '--weights', 'pretrained', '--data_path', folder)
    run_visualize('--model', 'mobilenet_v3_small', '--data_path', folder, '--input_size', 32)


# --- images -------------------------------------------------------------------------------------------------


def test_folders_of_imagenet_are_read_in_image_folders_order(imagenet):
    expected = [Path(path) for path, _ in torchvision.datasets.ImageFolder(imagenet / 'val').samples]
    assert len(expected) == 7
    (imagenet / 'val' / 'class1' / 'upwards').symlink_to(imagenet / 'val')
    for given in (imagenet, imagenet / 'val'):
        assert visualize_erf.images_under(given) == expected
    assert visualize_erf.images_under(imagenet / 'val' / 'class0') == expected[:4]


def test_a_models_file_may_import_a_utils_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])  # which the script extends
    (tmp_path / 'utils.py').write_text('from torch import nn\ndef build(): return nn.Conv2d(3, 1, 3)')
    (tmp_path / 'datasets.py').write_text('import sys, utils\nassert sys.modules[__name__]\n'
                                          'def build(): return utils.build()')
    with mock.patch.dict(sys.modules):
        run_visualize('--model', 'datasets.py:build', '--data_path', folder, '--input_size', 16)
    assert (tmp_path / 'temp.npy').exists()


def test_what_is_no_image_is_passed_over(folder, tmp_path, capsys):
    for name in ('a.heic', 'b.heic', '._0.png'):
        (folder / name).write_text('no image')
    (folder / '.ipynb_checkpoints').mkdir()
    Image.new('RGB', (9, 9)).save(folder / '.ipynb_checkpoints' / '0.png')
    assert [path.name for path in visualize_erf.images_under(folder)] == ['0.png', '1.png', '2.png']
    assert capsys.readouterr().out == f'{folder}: passed over 2 files that Pillow cannot read: 2 .heic\n'


def test_every_kind_of_image_is_read_and_broken_ones_are_skipped(folder, tmp_path, capsys):
    reference = Image.open(folder / '0.png').convert('L').convert('RGB')
    for path in folder.iterdir():
        path.unlink()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown rotated; ImageFolder does not, and the published code used it
    reference.save(folder / 'a.png')
    reference.convert('L').save(folder / 'b.png')
    reference.convert('RGBA').save(folder / 'c.png')
    reference.save(folder / 'd.png', exif=turned)
    reference.convert('P').save(folder / 'e.PNG')
    model = own_model(tmp_path, 'return super().forward(x * x)')  # its gradient tells what the image was
    for path in sorted(folder.iterdir()):
        (tmp_path / path.stem).mkdir()
        path.rename(tmp_path / path.stem / path.name)
        run_visualize('--model', model, '--data_path', path.stem, '--save_path', f'{path.stem}.npy',
                      '--input_size', 40)
    matrices = {name: np.load(tmp_path / f'{name}.npy') for name in 'abcde'}
    for name in 'bcd':
        assert np.array_equal(matrices[name], matrices['a']), name
    assert matrices['e'].any()
    Image.fromarray(np.asarray(reference.convert('L')).astype(np.uint16) * 257).save(folder / 'deep.png')
    run_visualize('--model', model, '--data_path', folder, '--save_path', 'deep.npy', '--input_size', 40)
    assert np.array_equal(np.load(tmp_path / 'deep.npy'), matrices['a'])
    (folder / 'deep.png').unlink()
    reference.convert('CMYK').save(folder / 'f.jpg')
    (folder / 'g.png').write_bytes((tmp_path / 'a' / 'a.png').read_bytes()[:200])
    (folder / 'h.jpg').write_text('<html>not found</html>')
    capsys.readouterr()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    run_visualize('--model', model, '--data_path', folder, '--save_path', 'f.npy', '--input_size', 40)
    printed = capsys.readouterr().out
    assert len(re.findall(r'WARNING: skipped: \S+/[gh]\.\w+ cannot be read', printed)) == 2
    assert 'The average over 1 image, not 50; skipped: 2 unreadable, 0 that gave NaN or inf' in printed
    about = json.loads((tmp_path / 'f.json').read_text())
    assert (about['num_images'], about['skipped_unreadable'], about['skipped_not_finite']) == (1, 2, 0)
    assert about['last_map'] == [1, 40, 40] and 'Last feature map: 1 channels, 40 x 40' in printed


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_images_that_give_no_number_are_skipped_and_others_take_their_place(value, folder, tmp_path, capsys):
    model = own_model(tmp_path, f'return super().forward(x) * (torch.{value} if self.calls == 1 else 1)')
    run_visualize('--model', model, '--data_path', folder, '--save_path', 'erf.npy', '--input_size', 8,
                  '--num_images', 2)
    printed = capsys.readouterr().out
    assert 'The average over 2 images; skipped: 0 unreadable, 1 that gave NaN or inf' in printed
    model = own_model(tmp_path, CONVOLVE)
    run_visualize('--model', model, '--data_path', folder, '--save_path', 'all.npy', '--input_size', 8)
    assert np.load(tmp_path / 'erf.npy').any() and np.isfinite(np.load(tmp_path / 'erf.npy')).all()


def test_fewer_images_than_asked_for_are_enough_and_no_usable_one_is_an_error(folder, tmp_path, capsys):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    run_visualize(*TOY, '--data_path', folder, '--save_path', 'one.npy')
    assert 'The average over 1 image, not 50' in capsys.readouterr().out
    assert np.load(tmp_path / 'one.npy').shape == (64, 64)
    (folder / '0.png').write_bytes(b'broken')
    with pytest.raises(utils.UserError, match=r'none of the 1 images .* could be used: 1 unreadable'):
        run_visualize(*TOY, '--data_path', folder, '--save_path', 'none.npy')
    assert not (tmp_path / 'none.npy').exists()


# --- nothing is lost ----------------------------------------------------------------------------------------


@pytest.fixture
def not_under_nohup():
    """SIGHUP as it is in a terminal; nohup pytest ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_saves_what_it_has(number, not_under_nohup, folder, tmp_path, capsys):
    stopped = f'if self.calls == 3: os.kill(os.getpid(), {int(number)})'
    model = own_model(tmp_path, f'{stopped}\n        return super().forward(x * x)')
    assert run_command(visualize_erf.__file__, '--model', model, '--data_path', folder, '--device', 'cpu',
                       '--input_size', '32', '--save_path', 'erf.npy') == 128 + number
    printed = capsys.readouterr().out
    assert f'{number.name}: stopping\nSaved: erf.npy' in printed
    assert 'The average over 2 images, not 50' in printed
    (folder / '2.png').unlink()
    model = own_model(tmp_path, 'return super().forward(x * x)')
    run_visualize('--model', model, '--data_path', folder, '--input_size', 32, '--save_path', 'two.npy')
    assert np.array_equal(np.load(tmp_path / 'erf.npy'), np.load(tmp_path / 'two.npy'))
    assert json.loads((tmp_path / 'erf.json').read_text())['num_images'] == 2
    assert not list(tmp_path.glob('.*partial'))


def test_an_error_in_the_middle_saves_what_there_is(folder, tmp_path):
    model = own_model(tmp_path, 'assert self.calls < 3, "a bug"; return super().forward(x)')
    with pytest.raises(AssertionError, match='a bug'):
        run_visualize('--model', model, '--data_path', folder, '--save_path', 'erf.npy', '--input_size', 32)
    assert json.loads((tmp_path / 'erf.json').read_text())['num_images'] == 2


def test_a_disk_that_is_full_does_not_cost_the_matrix(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / 'temp').mkdir()
    monkeypatch.setattr(visualize_erf.tempfile, 'tempdir', str(tmp_path / 'temp'))
    replace_file = visualize_erf.replace_file

    def full(path, write):
        """A double of a full disk, in the folder of the results alone."""
        if path.parent == Path():
            raise OSError(28, 'No space left on device')
        replace_file(path, write)
    monkeypatch.setattr(visualize_erf, 'replace_file', full)
    run_visualize(*TOY, '--data_path', folder, '--save_path', 'erf.npy')
    assert 'WARNING: erf.npy cannot be written' in capsys.readouterr().out
    saved, = (tmp_path / 'temp').rglob('erf.npy')
    assert np.load(saved).any() and saved.with_suffix('.json').exists()


def test_a_pipe_that_ended_first_does_not_cost_the_matrix(folder, tmp_path):
    """Ctrl-C ends `| tee log` too; and a process of its own can be stopped."""
    model = own_model(tmp_path, 'time.sleep(60 * (self.calls == 3)); return super().forward(x * x)')
    command = [sys.executable, ROOT / 'erf' / 'visualize_erf.py', '--model', model, '--data_path', folder,
               '--device', 'cpu', '--input_size', '32', '--save_path', 'erf.npy']
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as run:
        for line in run.stdout:
            if '2/3 images' in line:
                break
        run.stdout.close()
        run.send_signal(signal.SIGINT)
    assert json.loads((tmp_path / 'erf.json').read_text())['num_images'] == 2
    assert np.load(tmp_path / 'erf.npy').any()


def test_two_full_disks_are_one_error(folder, tmp_path, monkeypatch):
    def full(path, write):
        """A double of a disk that holds the results and the temporary folder."""
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(visualize_erf, 'replace_file', full)
    with pytest.raises(OSError, match='No space left'):
        run_visualize(*TOY, '--data_path', folder, '--save_path', 'erf.npy')


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, message', [
    (['--model', 'your_model', '--weights', '/path/to/your/weights'],
     r'your_model.*RepLKNet-31B.*torchvision.*timm.*FILE\.py:FUNCTION'),
    (['--model', 'nowhere.py:build'], 'there is no file nowhere.py'),
    (['--model', 'mine.py:other'], 'has no function other'),
    (['--model', 'resnet18.wrong_tag'], 'wrong_tag'),
    (['--model', 'efficientformer_l1', '--input_size', '256'],
     r'efficientformer_l1 fails on 256 x 256 .*another --input_size'),
    (['--model', 'maxvit_t', '--input_size', '100'], 'another --input_size'),
    (['--model', 'RepLKNet-31B', '--weights', 'pretrained'], 'README'),
    (['--model', 'mine.py:build', '--weights', 'pretrained'], 'no library'),
    (['--weights', 'nowhere.pth'], 'there is no checkpoint nowhere.pth'),
    (['--num_images', '0'], '--num_images 0 must be at least 1'),
    (['--input_size', '-3'], '--input_size -3 must be at least 1'),
    (['--data_path', 'path_to_imagenet'], 'no such folder'),
    (['--data_path', 'empty'], 'there is no image'),
    (['--save_path', 'nowhere/erf.npy'], 'there is no folder nowhere'),
    (['--save_path', 'folder.npy'], 'is a folder'),
    (['--device', 'gpu'], 'unknown --device gpu'),
    (['--device', 'cuda:99'], 'no usable CUDA GPU|there is no GPU 99'),
])
def test_bad_options_are_explained(options, message, folder, tmp_path):
    own_model(tmp_path, CONVOLVE)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'folder.npy').mkdir()
    with pytest.raises(utils.UserError, match=message):
        run_visualize(*TOY, '--data_path', folder, *options)


# --- command lines ------------------------------------------------------------------------------------------


def test_published_commands_run_end_to_end(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet101().state_dict(), tmp_path / 'weights.pth')
    shorter = ['--input_size', '32', '--weights', 'weights.pth']  # published weights cannot be had here
    for command in (
            'erf/visualize_erf.py --model resnet101 --data_path data --save_path resnet101_erf_matrix.npy',
            'erf/analyze_erf.py --source resnet101_erf_matrix.npy --heatmap_save resnet101_heatmap.png'):
        script, *options = command.split()
        assert run_command(ROOT / script, *options, *(shorter if 'visualize' in script else [])) == 0
    assert (tmp_path / 'resnet101_heatmap.png').read_bytes().startswith(b'\x89PNG')
    assert 'resnet101, weights.pth weights       7      32' in capsys.readouterr().out
    ended = run_command(ROOT / 'erf/visualize_erf.py', '--model', 'your_model',
                        '--weights', '/path/to/your/weights', '--data_path', 'data',
                        '--save_path', 'your_model_erf_matrix.npy')
    assert ended.startswith('ERROR: unknown --model your_model')
    ended = run_command(ROOT / 'erf/analyze_erf.py', '--source', 'none.npy')
    assert ended.startswith('ERROR: --source none.npy: there is no such file; erf/visualize_erf.py ')
