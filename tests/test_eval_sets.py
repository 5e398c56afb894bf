"""main.py --eval --eval_set: ReaL, ImageNet-V2, -A, -R, -Sketch, on made folders with a model that knows."""
import json
import math
import tarfile

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

import datasets
import main
import replknet_zoo
from conftest import TOY, launch, run_main
from image_data.eval_sets import _of_timm, parse_eval_sets
from replknet_zoo import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError

WNIDS = ImageNetInfo('imagenet-1k').label_names()
REAL = json.loads(_of_timm('real_labels.json'))
OF_A, OF_R = ([int(i) for i in _of_timm(f'{name}_indices.txt').split()] for name in 'ar')
# of neither; an image of its own would not be blue, see sets()
OUTSIDE = next(i for i in range(1000) if i % 4 and i not in OF_A and i not in OF_R)


class Reader(nn.Module):
    """A double of a model: reads the class from an image's colours, and prefers OUTSIDE where it is blue."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1000)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        red, green, blue = ((x * std + mean) * 255).mean((2, 3)).T
        known = (red / 8).floor() * 32 + (green / 8).floor()
        logits = torch.zeros(len(x), 1000).scatter_(1, known.long().unsqueeze(1), 2.0)
        logits[:, OUTSIDE] += 3 * (blue > 100)
        return logits


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    monkeypatch.setattr(main, 'build_model', lambda args: Reader())
    monkeypatch.setattr(main, 'load_initial_weights', lambda args, model: None)


def write(file, shown: int, blue: bool = False) -> None:
    """An image that the Reader takes for the class `shown`, or for OUTSIDE."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (shown // 32 * 8 + 4, shown % 32 * 8 + 4, 200 * blue)).save(file, 'PNG')


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """v2 and sketch: an image a class, of which every fourth is taken for OUTSIDE; a and r: all are."""
    root = tmp_path_factory.mktemp('sets')
    for i, wnid in enumerate(WNIDS):
        write(root / 'v2' / str(i) / '0.png', i, i % 4 == 0)
        write(root / 'sketch' / wnid / 'sketch_0.png', i, i % 4 == 0)
    for name, classes in (('a', OF_A), ('r', OF_R)):
        for i in classes:
            write(root / name / WNIDS[i] / '0.png', i, blue=True)
    (root / 'val').symlink_to('sketch')
    return root


def options(**folders) -> list[str]:
    return [*TOY, '--batch_size', '64', '--eval', '--eval_set',
            ','.join(f'{name}={folder}' for name, folder in folders.items())]


def printed_json(capsys) -> tuple[list[str], dict]:
    """The lines of results, and the JSON behind them."""
    *lines, last = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith('* Acc')], json.loads(last)


def test_each_set_counts_by_its_own_classes(sets, tmp_path, capsys):
    run_main(*options(v2=sets / 'v2', a=sets / 'a', r=sets / 'r', sketch=sets / 'sketch'),
             '--output_dir', tmp_path / 'run')
    lines, found = printed_json(capsys)
    ones = math.log(math.exp(2) + 999) - 2  # nothing but the class is known
    blue = math.log(math.exp(2) + math.exp(3) + 998) - 2
    hard = math.log(math.exp(2) + 199) - 2  # of 200 classes, OUTSIDE not among them
    whole = {'images': 1000, 'acc1': 75.0, 'acc5': 100.0, 'loss': 0.75 * ones + 0.25 * blue}
    part = {'images': 200, 'acc1': 100.0, 'acc5': 100.0, 'loss': hard}
    for name, expected in (('v2', whole), ('a', part), ('r', part), ('sketch', whole)):
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert list(found) == ['v2', 'a', 'r', 'sketch']
    assert lines == [f'* Acc@1 {values["acc1"]:.3f} Acc@5 100.000 loss {values["loss"]:.3f} on {name}'
                     for name, values in found.items()]
    assert json.loads((tmp_path / 'run' / 'eval.json').read_text()) == found


def test_the_validation_set_is_evaluated_too_where_it_is_given(sets, capsys):
    run_main(*options(r=sets / 'r'), '--data_path', sets)
    lines, found = printed_json(capsys)
    assert list(found) == ['val', 'r'] and found['val']['acc1'] == 75
    assert lines[0].endswith(f'loss {found["val"]["loss"]:.3f}') and lines[1].endswith(' on r')


@pytest.mark.parametrize('flat', [True, False])
def test_real_takes_any_of_an_images_labels_and_leaves_out_those_without(flat, tmp_path, capsys):
    numbers = [i for i, labels in enumerate(REAL) if len(labels) != 1][:8]
    labelled = [i for i in numbers if REAL[i]]
    assert 2 <= len(labelled) < 8  # some have no labels, some two or more
    for i in numbers:
        right = i != labelled[0]
        shown = REAL[i][-1] if REAL[i] and right else next(c for c in range(1000) if c not in REAL[i])
        folder = tmp_path / ('.' if flat else WNIDS[i % 7])
        write(folder / f'ILSVRC2012_val_{i + 1:08d}.JPEG', shown)
    run_main(*options(real=tmp_path))
    _, found = printed_json(capsys)
    assert found['real']['images'] == len(labelled)
    assert found['real']['acc1'] == pytest.approx(100 * (len(labelled) - 1) / len(labelled))
    total = math.log(math.exp(2) + 999)  # the cross-entropy with all labels, each as likely
    losses = [total - 2 / len(REAL[i]) * (i != labelled[0]) for i in labelled]
    assert found['real']['loss'] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize('way', [[], ['--loader', 'fast'], ['--use_amp', '--amp_dtype', 'bfloat16']])
def test_sets_in_a_tar_are_the_same_whatever_the_loader(way, sets, tmp_path, capsys):
    with tarfile.open(tmp_path / 'r.tar', 'w') as tar:
        tar.add(sets / 'r', 'r')
    (tmp_path / 'tars').mkdir()
    with tarfile.open(tmp_path / 'tars' / 'v2.tar', 'w') as tar:
        tar.add(sets / 'v2', '.')
    run_main(*options(r=tmp_path / 'r.tar' / 'r', v2=tmp_path / 'tars' / 'v2.tar'), *way)
    _, found = printed_json(capsys)
    assert found['r']['acc1'] == 100 and found['v2']['acc1'] == 75


def test_two_processes_count_what_one_does(sets, tmp_path):
    torch.manual_seed(0)
    torch.save(replknet_zoo.create_model('RepLKNet-31T').state_dict(), tmp_path / 'toy.pth')
    words = [*options(a=sets / 'a'), '--resume', tmp_path / 'toy.pth']
    one, two = (json.loads(launch(n, *words).splitlines()[-1])['a'] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5) and one['images'] == 200


def test_every_sets_labels_are_compared_between_processes(sets):
    args = main.get_args_parser().parse_args(options(a=sets / 'a', v2=sets / 'v2'))
    facts = {}
    for found in datasets.build_eval_sets(args):
        facts |= datasets.facts_of(found.name, found.dataset)
    for what in ('labels', 'list'):
        assert len({facts[f'the digest of the {what} of {name} images'] for name in ('a', 'v2')}) == 2


def test_a_merged_model_is_compared_once(sets, capsys, monkeypatch):
    compared = []
    monkeypatch.setattr(main, 'merge_and_compare', lambda *arguments: compared.append(arguments))
    run_main(*options(a=sets / 'a', r=sets / 'r'), '--with_small_kernel_merged', '--dry_run')
    assert len(compared) == 1 and printed_json(capsys)[1]['a']['images'] == 128


@pytest.mark.parametrize(('change', 'message'), [
    (['--eval_set', 'v3=x'], r"'v3=x' must be NAME=FOLDER, .* of real .*, sketch \(ImageNet-Sk"),
    (['--eval_set', 'a'], "'a' must be NAME=FOLDER"),
    (['--eval_set', 'a=x,a=y'], "'a=y' must be NAME=FOLDER, without a comma in it, each NAME once"),
    (['--eval', 'false'], '--eval_set goes with --eval'),
    (['--eval_set', 'a=nowhere'], '--eval_set a=nowhere: there is no such folder'),
    (['--nb_classes', '21841'], "--eval_set is for models of ImageNet's 1000 classes, not of 21841"),
    (['--data_set', 'DIGITS', '--data_path', '.'], "models of ImageNet's 1000 classes, not of 10$"),
    (['--eval_set', 'sketch={root}/r'], 'the 1000 class folders of ImageNet-Sketch, n01440764 ... n1507'),
    (['--eval_set', 'a={root}/r'], r'class folders of ImageNet-A, .*Missing: .*; not among them: n0'),
    (['--eval_set', 'v2={root}/sketch'], 'folders of ImageNetV2, 0 ... 999, with images. Missing: 0, 1'),
    (['--eval_set', 'real={root}/r'], r'by their original names, ILSVRC2012_val_00000001.*, not 0\.png'),
])
def test_what_does_not_fit_is_told(change, message, sets):
    with pytest.raises(UserError, match=message):
        run_main(*options(r=sets / 'r'), *(word.format(root=sets) for word in change))


def test_images_of_real_that_cannot_be_meant_are_told(tmp_path):
    write(tmp_path / 'a' / 'ILSVRC2012_val_00000002.JPEG', 0)
    write(tmp_path / 'b' / 'ILSVRC2012_val_00000002.JPEG', 0)
    with pytest.raises(UserError, match=r'one name twice: ILSVRC2012_val_00000002\.JPEG'):
        run_main(*options(real=tmp_path))
    write(tmp_path / 'ILSVRC2012_val_00000003.JPEG', 0)
    with pytest.raises(UserError, match='holds images in folders and others beside these'):
        run_main(*options(real=tmp_path))
    without = REAL.index([]) + 1
    write(tmp_path / 'c' / f'ILSVRC2012_val_{without:08}.JPEG', 0)
    with pytest.raises(UserError, match='ReaL has no label for any of its 1 images'):
        run_main(*options(real=tmp_path / 'c'))


def test_eval_data_path_is_not_passed_over(sets):
    with pytest.raises(UserError, match='there is no folder nowhere'):
        run_main(*options(a=sets / 'a'), '--data_set', 'image_folder', '--eval_data_path', 'nowhere')


def test_a_home_is_found_behind_the_comma(monkeypatch):
    monkeypatch.setenv('HOME', '/home/x')
    assert parse_eval_sets('a=~/a,r=~/r') == {'a': '/home/x/a', 'r': '/home/x/r'}


def test_a_class_without_images_is_told(sets, tmp_path):
    for i in OF_R[1:]:
        write(tmp_path / WNIDS[i] / '0.png', i)
    (tmp_path / WNIDS[OF_R[0]]).mkdir()
    with pytest.raises(UserError, match=f'Missing: {WNIDS[OF_R[0]]}; not among them: none'):
        run_main(*options(r=tmp_path))
