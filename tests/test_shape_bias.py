"""tools/shape_bias.py: shape bias by hand on images that are made here, and what is refused."""
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn
from torchvision.transforms import functional

import replknet_zoo
import utils
from test_tools import run_command
from tools import common, shape_bias

# a class of each category, by common knowledge
ONE_CLASS = {'airplane': 404, 'bear': 294, 'bicycle': 671, 'bird': 94, 'boat': 814, 'bottle': 898, 'car': 817,
             'cat': 281, 'chair': 559, 'clock': 409, 'dog': 207, 'elephant': 386, 'keyboard': 508,
             'knife': 499, 'oven': 766, 'truck': 717}
NAMES = list(ONE_CLASS)
# what the name or the description of a class of the category holds
WORDS = {
    'airplane': 'airplane', 'bear': 'bear', 'bicycle': 'bicycle',
    'bird': 'bird|finch|bunting|thrush|nightingale|crow|eagle|owl|grouse|parrot|cockatoo|lories|cuckoo|'
            'merganser|swan|stork|heron|gallinule|coot|turnstone|sandpiper|penguin',
    'boat': 'boat', 'bottle': 'bottle|jug', 'car': r'\bcar\b', 'cat': r'\bcat\b|feline', 'chair': 'chair',
    'clock': 'clock',
    'dog': 'dog|hound|spaniel|terrier|retriever|pointer|setter|schnauzer|collie|mastiff|poodle|corgi|'
           'pinscher|griffon|Swiss breeds|Sennenhunde|Bouvier|basenji',
    'elephant': 'elephant', 'keyboard': 'keyboard', 'knife': 'knife', 'oven': 'oven',
    'truck': r'truck|\bvan\b',
}


def run_shape_bias(*options) -> None:
    """tools/shape_bias.py in this process."""
    shape_bias.main(shape_bias.get_args_parser().parse_args([str(option) for option in options]))


def write_image(folder, name: str, decision: str) -> None:
    """A grey image named as the authors' are, whose brightness tells the double what to see in it."""
    category = folder / re.match('[a-z]+', name)[0]
    category.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (224, 224), (16 * NAMES.index(decision) + 8,) * 3).save(category / f'{name}.png')


class Double(nn.Module):
    """A double of a classifier: it sees the category whose number the brightness of the image is."""
    head = nn.Linear(1, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 1000)
        for i, image in enumerate(x):
            logits[i, ONE_CLASS[NAMES[int(image.mean() * 255) // 16]]] = 20
        return logits


@pytest.fixture
def double(monkeypatch):
    """The double in the place of the model, with pixels from 0 to 1."""
    preprocessing = {'input_size': 224, 'crop_pct': None, 'mean': (0, 0, 0), 'std': (1, 1, 1)}
    monkeypatch.setattr(common, 'read_model', lambda *_: ('a double', Double(), preprocessing))
    monkeypatch.setattr(common, 'fast_form', lambda model, device: model)


@pytest.fixture
def conflicts(tmp_path):
    """Images with what the double sees in them."""
    seen = {'cat1-dog1': 'cat', 'cat2-dog1': 'dog', 'cat3-truck1': 'cat', 'cat14-truck3': 'oven',
            'dog1-cat1': 'cat', 'dog2-truck10': 'truck', 'truck1-car1': 'knife', 'bear1-bear2': 'bear'}
    for name, decision in seen.items():
        write_image(tmp_path / 'images', name, decision)
    return tmp_path / 'images'


def test_shape_bias_is_the_share_of_shape_decisions(conflicts, double, tmp_path, capsys):
    (conflicts / 'cat' / '.DS_Store').write_text('of a file browser')
    (conflicts / 'cat' / 'Thumbs.db').write_text('of a file browser')
    for folder in (conflicts, conflicts / 'cat'):
        (folder / '@eaDir').mkdir()
    with Image.open(conflicts / 'dog' / 'dog1-cat1.png') as image:
        deep = np.asarray(image.convert('L')).astype(np.uint16) * 257
    Image.fromarray(deep).save(conflicts / 'dog' / 'dog1-cat1.png')  # of 16 bits
    (conflicts / 'dog').rename(tmp_path / 'elsewhere')
    (conflicts / 'dog').symlink_to(tmp_path / 'elsewhere')
    run_shape_bias(conflicts, '--weights', 'double.pth', '--json', tmp_path / 'bias.json')
    found = json.loads((tmp_path / 'bias.json').read_text())
    assert found['categories'] == {  # the bear with a bear's texture is left out
        'cat': {'shape': 2, 'texture': 1, 'other': 1, 'shape_bias': pytest.approx(2 / 3)},
        'dog': {'shape': 0, 'texture': 2, 'other': 0, 'shape_bias': 0.0},
        'truck': {'shape': 0, 'texture': 0, 'other': 1, 'shape_bias': None},
    }
    assert found['shape_bias'] == pytest.approx(1 / 3)  # of cat and dog
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith('7 images; 1 with shape and texture of one category are left out')
    assert [line.split() for line in lines[2:6]] == [
        ['cat', '4', '2', '1', '1', '0.667'], ['dog', '2', '0', '2', '0', '0.000'],
        ['truck', '1', '0', '0', '1', '-'], ['all', '7', '2', '3', '2', '0.400']]
    assert lines[6] == 'Shape bias 0.333, the mean over 2 categories'


def test_a_category_is_as_likely_as_its_classes_are_in_the_mean():
    probabilities = torch.zeros(2, 1000)
    probabilities[0, 152:192] = 0.02  # 40 dogs: together 0.8, in the mean of all dogs less than 0.01
    probabilities[0, 499] = 0.2  # the one knife
    probabilities[1, 472] = 0.3  # of five boats: 0.06
    probabilities[1, 385:387] = 0.1  # both elephants
    assert shape_bias.decide(probabilities) == ['knife', 'elephant']


def test_the_classes_of_a_category_are_named_like_it():
    info = ImageNetInfo()
    assert list(shape_bias.CATEGORIES) == NAMES
    for category, classes in shape_bias.CATEGORIES.items():
        assert ONE_CLASS[category] in classes
        for index in classes:
            description = info.index_to_description(index, detailed=True)
            assert re.search(WORDS[category], description), (category, index)
    every = [index for classes in shape_bias.CATEGORIES.values() for index in classes]
    assert len(set(every)) == len(every)


def test_a_model_is_measured_on_images(tmp_path, capsys):
    torch.manual_seed(0)
    model = replknet_zoo.create_model('RepLKNet-31T', use_sync_bn=False).eval()
    nn.init.normal_(model.head.weight)  # else the image hardly matters
    torch.save(model.state_dict(), tmp_path / 'toy.pth')
    random = np.random.RandomState(0)
    counts = {}
    for i, shape in enumerate(NAMES):
        (tmp_path / 'images' / shape).mkdir(parents=True)
        for offset in range(1, 6):
            texture = NAMES[(i + offset) % 16]
            image = Image.fromarray(random.randint(0, 256, (4, 4, 3)).astype(np.uint8)).resize((32, 32))
            image.save(tmp_path / 'images' / shape / f'{shape}{offset}-{texture}1.png')
            x = functional.normalize(functional.to_tensor(image), replknet_zoo.IMAGENET_MEAN,
                                     replknet_zoo.IMAGENET_STD)
            with torch.inference_mode():
                probabilities = model(x[None])[0].softmax(0).numpy()
            decision = max(NAMES, key=lambda name: probabilities[list(shape_bias.CATEGORIES[name])].mean())
            of_shape = counts.setdefault(shape, {'shape': 0, 'texture': 0, 'other': 0})
            of_shape['shape' if decision == shape else 'texture' if decision == texture else 'other'] += 1
    (tmp_path / 'images' / 'cat' / 'cat9-dog9.png').write_text('broken')
    ended = run_command(shape_bias.__file__, tmp_path / 'images', '--weights', tmp_path / 'toy.pth',
                        '--device', 'cpu', '--json', tmp_path / 'bias.json', '--plot', tmp_path / 'bias.png')
    printed = capsys.readouterr()
    found = json.loads((tmp_path / 'bias.json').read_text())
    assert {category: {kind: row[kind] for kind in ('shape', 'texture', 'other')}
            for category, row in found['categories'].items()} == counts
    assert sum(row['shape'] + row['texture'] for row in counts.values()) > 5
    assert found['model'] == 'RepLKNet-31T'
    assert f'Shape bias {found["shape_bias"]:.3f}, the mean over ' in printed.out
    assert 'RepLKNet-31T, 32 px, on cpu: 81 images; 0 with shape and texture of one category' in printed.out
    assert (tmp_path / 'bias.png').read_bytes().startswith(b'\x89PNG')
    # what could not be read costs the measurement nothing, but is not passed over in silence
    assert 'cat9-dog9.png' in printed.err
    assert ended == 'ERROR: 1 of 81 images could not be read'


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('file', 'message'), [
    ('cat/cat4.png', r'cat/cat4.png is not named catNUMBER-TEXTURENUMBER.png, like cat4-truck3.png'),
    ('cat/dog4-truck3.png', 'dog4-truck3.png is not named catNUMBER'),
    ('cat/cat4-lion3.png', 'cat4-lion3.png is not named catNUMBER'),
    ('cat/notes.txt', 'notes.txt is not named catNUMBER'),
    ('lion/lion1-cat2.png', 'lion is none of the 16 categories airplane, bear, '),
])
def test_files_that_are_not_of_the_data_set_are_told(file, message, conflicts, double):
    (conflicts / file).parent.mkdir(exist_ok=True)
    (conflicts / file).write_text('')
    with pytest.raises(utils.UserError, match=message):
        run_shape_bias(conflicts, '--weights', 'double.pth')


def test_a_folder_without_conflicts_is_told(tmp_path, double):
    with pytest.raises(utils.UserError, match=r'there is no folder .*nowhere'):
        run_shape_bias(tmp_path / 'nowhere', '--weights', 'double.pth')
    write_image(tmp_path / 'images', 'cat1-cat2', 'cat')
    message = 'images holds no image whose shape and texture are of two categories'
    with pytest.raises(utils.UserError, match=message):
        run_shape_bias(tmp_path / 'images', '--weights', 'double.pth')


def test_a_model_that_sees_neither_shape_nor_texture_is_told(tmp_path, double, capsys):
    write_image(tmp_path / 'images', 'cat1-dog2', 'oven')
    message = 'so there is no shape bias: are these the weights of a trained model'
    with pytest.raises(utils.UserError, match=message):
        run_shape_bias(tmp_path / 'images', '--weights', 'double.pth', '--plot', tmp_path / 'bias.png')
    assert 'cat             1      0        0      1           -' in capsys.readouterr().out
    assert not (tmp_path / 'bias.png').exists()


def test_images_none_of_which_can_be_read_are_told(tmp_path, double):
    (tmp_path / 'images' / 'cat').mkdir(parents=True)
    (tmp_path / 'images' / 'cat' / 'cat1-dog2.png').write_text('broken')
    with pytest.raises(utils.UserError, match=r'none of the images of .* could be read'):
        run_shape_bias(tmp_path / 'images', '--weights', 'double.pth')


@pytest.mark.parametrize(('classes', 'bias', 'message'), [
    (10, 0.0, "toy.pth has 10 classes, and the categories are made of ImageNet-1K's 1000"),
    (1000, float('nan'), 'are not finite: the weights are broken'),
])
def test_weights_that_cannot_be_measured_are_told(classes, bias, message, conflicts, tmp_path):
    state = replknet_zoo.create_model('RepLKNet-31T', num_classes=classes).state_dict()
    torch.save({**state, 'head.bias': state['head.bias'] + bias}, tmp_path / 'toy.pth')
    with pytest.raises(utils.UserError, match=message):
        run_shape_bias(conflicts, '--weights', tmp_path / 'toy.pth', '--model', 'RepLKNet-31T',
                       '--device', 'cpu')


@pytest.mark.parametrize(('options', 'message'), [
    (['--input_size', '0'], '--input_size 0 must be at least 1'),
    (['--plot', 'nowhere/bias.png'], 'there is no folder nowhere'),
    (['--plot', 'bias.pdf'], 'must end in .png'),
    (['--json', '.'], r'--json \. is a folder or a device: name a file'),
])
def test_bad_options_are_told_before_anything_is_read(options, message, conflicts, monkeypatch):
    monkeypatch.setattr(common, 'read_model', lambda *_: pytest.fail('read'))
    with pytest.raises(utils.UserError, match=message):
        run_shape_bias(conflicts, '--weights', 'toy.pth', *options)


def test_a_plot_without_matplotlib_is_told(conflicts, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(utils.UserError, match=r"needs matplotlib.*pip install -e '\.\[plot\]'"):
        run_shape_bias(conflicts, '--weights', 'toy.pth', '--plot', 'bias.png')
