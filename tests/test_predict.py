"""tools/predict.py: probabilities are those of main.py's evaluation, whatever the image and the file."""
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import utils
from golden.fill import fill
from replknet_zoo import create_model
from test_tools import run_command
from tools import common, convert, predict

BICUBIC = transforms.InterpolationMode.BICUBIC
IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def run_predict(*options, model='RepLKNet-31T') -> None:
    """tools/predict.py in this process; model None: it finds out by itself, which takes a second."""
    options = [*(['--model', model] if model else []), *map(str, options), '--device', 'cpu']
    predict.main(predict.get_args_parser().parse_args(options))


def run_convert(*options) -> None:
    """tools/convert.py in this process."""
    convert.main(convert.get_args_parser().parse_args(['--model', 'RepLKNet-31T', *map(str, options)]))


def predictions(capsys, *options, model='RepLKNet-31T') -> dict[str, dict[int, float]]:
    """The probabilities by class that --json prints for each image."""
    capsys.readouterr()
    run_predict(*options, '--json', model=model)
    return {result['image']: {one['class']: one['probability'] for one in result['predictions']}
            for result in json.loads(capsys.readouterr().out)}


def model_with(classes: int):
    """RepLKNet-31T whose logits differ from image to image."""
    model = fill(create_model('RepLKNet-31T', num_classes=classes)).eval()
    model.head.weight.data *= 10
    return model


@pytest.fixture
def model():
    return model_with(7)


@pytest.fixture
def weights(model, tmp_path):
    torch.save({'model': model.state_dict()}, tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


@pytest.fixture
def photos(tmp_path):
    """One image of each kind, taller or wider than square."""
    folder = tmp_path / 'photos'
    (folder / 'below').mkdir(parents=True)
    blocks = np.random.RandomState(0).randint(0, 256, (6, 9, 4), dtype=np.uint8)
    rgba = Image.fromarray(blocks).resize((90, 60), Image.Resampling.BICUBIC)
    rgb = rgba.convert('RGB')
    rgb.save(folder / 'rgb.png')
    rgba.rotate(180).save(folder / 'rgba.png')
    rgb.convert('L').save(folder / 'below' / 'grey.png')
    rgb.convert('CMYK').save(folder / 'cmyk.JPG')
    rgb.quantize(16).save(folder / 'palette.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    rgb.save(folder / 'rotated.jpeg', exif=exif)
    rgb.resize((40, 100)).save(folder / 'tall.webp')
    (folder / 'notes.txt').write_text('no image')
    return folder


def expected(model, file, *steps) -> dict[int, float]:
    """The five largest probabilities, of the model as trained and the published transform, written out."""
    transform = transforms.Compose([*steps[:-1], transforms.ToTensor(), steps[-1]])
    with Image.open(file) as image, torch.inference_mode():
        probabilities = model(transform(image.convert('RGB'))[None])[0].softmax(0)
    return {index.item(): probabilities[index].item() for index in probabilities.argsort(descending=True)[:5]}


def check(found, model, photos, *steps) -> None:
    files = sorted(file for file in photos.rglob('*') if file.is_file() and file.suffix != '.txt')
    assert list(found) == [str(file) for file in files]
    for file in files:
        wanted = expected(model, file, *steps)
        assert list(found[str(file)]) == list(wanted)
        assert found[str(file)] == pytest.approx(wanted, rel=1e-3)
    assert len({tuple(one.values()) for one in found.values()}) == len(files)  # the images can be told apart


SHAPES = {
    32: [transforms.Resize(32, BICUBIC), transforms.CenterCrop(32)],
    64: [transforms.Resize(73, BICUBIC), transforms.CenterCrop(64)],
    384: [transforms.Resize((384, 384), BICUBIC)],  # warped
}


@pytest.mark.parametrize(('form', 'size'), [
    ('trained', 32), ('trained', 384), ('merged', 64), ('folded', 64),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('trained', 64), ('merged', 32), ('merged', 384), ('folded', 32), ('folded', 384)))])
def test_probabilities_are_those_of_the_evaluation(form, size, model, weights, photos, tmp_path, capsys):
    options, known = ['--weights', weights, '--input_size', size], 'RepLKNet-31T'
    if form != 'trained':  # the model and the resolution are then known from the file
        switches = ['--fold_bn', 'true'] if form == 'folded' else []
        run_convert(weights, tmp_path / 'a.safetensors', '--input_size', size, *switches)
        options, known = ['--weights', tmp_path / 'a.safetensors'], None
    check(predictions(capsys, photos, *options, model=known), model, photos, *SHAPES[size], IMAGENET)


@pytest.mark.parametrize(('options', 'steps'), [
    ({'input_size': 48, 'imagenet_default_mean_and_std': False, 'crop_pct': None},
     [transforms.Resize(54, BICUBIC), transforms.CenterCrop(48), HALF]),
    ({'input_size': 32, 'test_size': 64, 'imagenet_default_mean_and_std': True, 'crop_pct': 1.0},
     [transforms.Resize(64, BICUBIC), transforms.CenterCrop(64), IMAGENET])])
@pytest.mark.parametrize('converted', [False, True])
def test_weights_of_a_training_run_are_used_as_it_evaluated_them(converted, options, steps, model, photos,
                                                                 tmp_path, capsys):
    average = model_with(7)
    average.head.weight.data *= -1
    torch.save({'model': average.state_dict(), 'model_ema': model.state_dict(), 'args': options},
               tmp_path / 'run.pth')
    file, key = tmp_path / 'run.pth', ['--model_key', 'model_ema']
    if converted:
        run_convert(file, tmp_path / 'ema.pth', *key)
        file, key = tmp_path / 'ema.pth', []
    check(predictions(capsys, photos, '--weights', file, *key), model, photos, *steps)


def test_extra_large_models_expect_pixels_from_minus_one_to_one():
    assert common.preprocessing_of({'head.bias': torch.zeros(1)}, 'RepLKNet-XL') == {
        'input_size': 320, 'crop_pct': None, 'interpolation': 'bicubic', 'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5)}


def test_many_images_come_in_order_each_once(weights, photos, capsys):
    for i in range(2 * common.BATCH):
        shutil.copy(photos / ('rgb.png' if i % 2 else 'tall.webp'), photos / f'{i:02}')
    files = [photos / f'{i:02}' for i in range(2 * common.BATCH)]  # without a suffix, but named
    found = predictions(capsys, *reversed(files), files[0], photos / '.' / '01', '--weights', weights)
    assert list(found) == [str(file) for file in reversed(files)]
    assert [one == found[str(files[1])] for one in found.values()] == [True, False] * common.BATCH


def test_linked_folders_and_deep_images_are_read_and_hidden_ones_are_not(weights, photos, tmp_path, capsys):
    with Image.open(photos / 'below' / 'grey.png') as image:
        grey = np.asarray(image)
    (tmp_path / 'elsewhere').mkdir()
    Image.fromarray(grey).save(tmp_path / 'elsewhere' / 'of_8_bits.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'elsewhere' / 'of_16_bits.png')
    linked = photos / 'linked'
    linked.symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'back').symlink_to(photos)
    (photos / '.ipynb_checkpoints').mkdir()
    shutil.copy(photos / 'rgb.png', photos / '.ipynb_checkpoints')
    shutil.copy(photos / 'rgb.png', photos / '._rgb.png')
    found = predictions(capsys, photos, '--weights', weights)
    assert len(found) == 7 + 2
    assert found[str(linked / 'of_16_bits.png')] == pytest.approx(found[str(linked / 'of_8_bits.png')])


def test_the_limit_against_bombs_can_be_set(weights, photos, capsys):
    with pytest.raises(utils.UserError, match='1 of 1 images could not be read'):
        run_predict(photos / 'rgb.png', '--weights', weights, '--max_image_pixels', 5399)
    assert 'pass a larger --max_image_pixels' in capsys.readouterr().err
    run_predict(photos / 'rgb.png', '--weights', weights, '--max_image_pixels', 5400)


def test_patterns_need_no_shell(weights, photos, capsys):
    (photos / 'rgb.png').rename(photos / 'a[1].png')
    patterns = photos / '**' / '*gr*.png', photos / 'a[1].png', photos / 'r*'
    found = predictions(capsys, *patterns, '--weights', weights)
    names = ('below/grey.png', 'a[1].png', 'rgba.png', 'rotated.jpeg')
    assert list(found) == [str(photos / name) for name in names]


def test_imagenet_names_stand_in_the_table(photos, tmp_path, capsys):
    model = create_model('RepLKNet-31T')
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    for index, logit in {281: 9.0, 0: 8.0, 999: 7.0}.items():
        model.head.bias.data[index] = logit
    torch.save(model.state_dict(), tmp_path / 'cats.pth')
    run_predict(photos / 'rgb.png', '--weights', tmp_path / 'cats.pth', model=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['RepLKNet-31T, 1000 classes, 32 px, on cpu', str(photos / 'rgb.png')]
    total = np.exp([9, 8, 7]).sum() + 997
    names = ('281  tabby, tabby cat', '0  tench, Tinca tinca', '999  toilet tissue')
    for line, logit, name in zip(lines[2:5], (9, 8, 7), names, strict=True):
        assert line.split('%')[0].strip() == f'{100 * np.exp(logit) / total:.2f}'
        assert line.split('%')[1].strip().startswith(name)
    assert len(lines) == 2 + 5


@pytest.mark.parametrize('kind', ['lines', 'list', 'folder', 'none'])
def test_names_come_from_a_file_or_from_class_folders(kind, weights, photos, tmp_path, capsys):
    names = ['ant', 'bee', 'Cat', 'dög', 'elk', 'fox', 'a goat']
    file = tmp_path / 'labels'
    if kind == 'folder':
        names = sorted(names)
        for name in names:
            (file / name).mkdir(parents=True)
    elif kind == 'none':
        names = [f'class {i}' for i in range(7)]
    else:
        file.write_text('\n'.join(names) + '\n' if kind == 'lines' else json.dumps(names), encoding='utf-8')
    run_predict(photos / 'rgb.png', '--weights', weights, '--json',
                *([] if kind == 'none' else ['--labels', file]))
    (result,) = json.loads(capsys.readouterr().out)
    assert len(result['predictions']) == 5
    for one in result['predictions']:
        assert one['name'] == names[one['class']]


def test_two_classes_give_two_lines(photos, tmp_path, capsys):
    torch.save(model_with(2).state_dict(), tmp_path / 'two.pth')
    (found,) = predictions(capsys, photos / 'rgb.png', '--weights', tmp_path / 'two.pth').values()
    assert sorted(found) == [0, 1]
    assert sum(found.values()) == pytest.approx(1)


def test_broken_images_are_reported_and_the_others_predicted(weights, photos, capsys):
    (photos / 'broken.png').write_bytes(b'not an image')
    (photos / 'cut.jpeg').write_bytes((photos / 'rotated.jpeg').read_bytes()[:-200])
    with pytest.raises(utils.UserError, match='2 of 9 images could not be read'):
        run_predict(photos, '--weights', weights, '--json')
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 7
    assert [line.split(' (')[0] for line in printed.err.splitlines()] == [
        f'{photos}: passed over 1 file that Pillow cannot read: 1 .txt',
        *(f'cannot read the image {photos / name}' for name in ('broken.png', 'cut.jpeg'))]


def test_the_command_tells_failure(weights, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (photos / 'broken.png').write_bytes(b'not an image')
    command = [predict.__file__, 'photos/*r*.png', '--model', 'RepLKNet-31T', '--weights', 'weights.pth',
               '--device', 'cpu']
    assert run_command(*command) == 'ERROR: 1 of 3 images could not be read'
    (photos / 'broken.png').unlink()
    capsys.readouterr()
    assert run_command(*command) == 0
    assert capsys.readouterr().out.count('%') == 2 * 5


def test_interrupted_json_is_whole(capsys):
    def interrupted(after):
        for i in itertools.count():
            if i == after:
                raise KeyboardInterrupt
            yield {'image': f'{i}.png', 'predictions': []}
    for after in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            predict.show(interrupted(after), as_json=True)
        shown = [result['image'] for result in json.loads(capsys.readouterr().out)]
        assert shown == ['0.png', '1.png'][:after]


def test_logits_that_are_not_finite_are_an_error(model, photos, tmp_path):
    model.head.bias.data[3] = float('nan')
    torch.save(model.state_dict(), tmp_path / 'nan.pth')
    with pytest.raises(utils.UserError, match=r'the logits of .*rgb\.png are not numbers'):
        run_predict(photos / 'rgb.png', '--weights', tmp_path / 'nan.pth')


@pytest.mark.parametrize(('options', 'message'), [
    (['{}/none.png'], r'there is no file or folder .*none\.png'),
    (['{}/*.gif'], r'there is no file or folder .*\*\.gif'),
    (['{}/empty'], r'empty holds no image: none of its files ends in \.jpg'),
    (['{}', '--model', 'RepLKNet-31B'], r'weights\.pth holds weights of RepLKNet-31T, not of RepLKNet-31B'),
    (['{}', '--weights', '{}/none.pth'], r'there is no checkpoint .*none\.pth'),
    (['{}', '--labels', '{}/none.txt'], r'--labels .*none\.txt cannot be read'),
    (['{}', '--labels', '{}/notes.txt'],
     r'--labels .*notes\.txt has 1 names, but the weights have 7 classes'),
    (['{}', '--input_size', '0'], r'--input_size 0 must be at least 1'),
])
def test_bad_options_are_named(options, message, weights, photos):
    (photos / 'empty').mkdir()
    with pytest.raises(utils.UserError, match=message):
        run_predict('--weights', weights, *(option.format(photos) for option in options))
