"""tools/convert.py: what it writes, that it is what was read, and that nothing is written where it is not."""
import re

import pytest
import safetensors
import torch

import replknet
import replknet_zoo
import utils
from conftest import SHORT, assert_same, relative_error, run_main, write_images
from golden.fill import fill, image
from replknet_zoo import create_model, load_weights
from test_tools import run_command
from test_weights import mmpretrain_keys
from tools import convert


def run_convert(*options, model='RepLKNet-31T') -> None:
    """tools/convert.py in this process; model None: it finds out by itself, which takes a second."""
    options = [*(['--model', model] if model else []), *map(str, options)]
    convert.main(convert.get_args_parser().parse_args(options))


@pytest.fixture
def state():
    """Weights of RepLKNet-31T with 2 classes."""
    return fill(create_model('RepLKNet-31T', num_classes=2)).state_dict()


@pytest.fixture
def source(state, tmp_path):
    torch.save({'model': state}, tmp_path / 'source.pth')
    return tmp_path / 'source.pth'


def logits(path, size=32) -> torch.Tensor:
    """Of the model in a file, without any merging or folding but the file's own."""
    with torch.inference_mode():
        return replknet_zoo.model_for('RepLKNet-31T', load_weights(path), path)(image('x', 4, 3, size, size))


FORMS = {'merged': [], 'folded': ['--fold_bn', 'true'], 'folded alone': ['--fold_bn', '--merge', 'false'],
         'as trained': ['--merge', 'false']}


@pytest.mark.parametrize(('form', 'suffix'), [
    ('merged', '.pth'), ('folded', '.safetensors'), ('folded alone', '.pth'), ('as trained', '.safetensors'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('merged', '.safetensors'), ('folded', '.pth'), ('folded alone', '.safetensors'),
        ('as trained', '.pth')))])
def test_converted_weights_keep_the_logits(form, suffix, source, imagenet, tmp_path, capsys):
    converted = tmp_path / f'converted{suffix}'
    run_convert(source, converted, *FORMS[form])
    printed = capsys.readouterr().out
    line = r'4 random images: largest difference of the logits \S+ \((\S+) of the largest'
    assert float(re.search(line, printed)[1]) < 1e-5
    assert 'predictions agree on 4' in printed
    assert f'Wrote {converted}' in printed
    keys = ' '.join(load_weights(converted))
    assert ('lkb_reparam' in keys) == (form in ('merged', 'folded'))
    assert ('running_var' in keys) == ('folded' not in form)
    assert relative_error(logits(converted), logits(source)) < 1e-5
    results = []
    for file in (source, converted):
        run_main(*SHORT, '--data_path', imagenet, '--eval', 'true', '--resume', file)
        results.append(capsys.readouterr().out.splitlines()[-1])
    assert results[0] == results[1]
    assert results[0].startswith('* Acc@1 ')


def test_weights_come_back_from_safetensors_to_the_bit(source, state, tmp_path):
    run_convert(source, tmp_path / 'a.safetensors', '--merge', 'false', model=None)
    assert_same(load_weights(tmp_path / 'a.safetensors'), dict(sorted(state.items())), 'safetensors')
    run_convert(tmp_path / 'a.safetensors', tmp_path / 'b.pth', '--merge', 'false')
    assert_same(load_weights(tmp_path / 'b.pth'), dict(state), 'pth')
    assert (tmp_path / 'a.safetensors').stat().st_mode == source.stat().st_mode  # others may read it too


def test_weights_come_back_from_mmpretrain_to_the_bit(source, state, tmp_path):
    run_convert(source, tmp_path / 'theirs.pth', '--to', 'mmpretrain', '--merge', 'false')
    # the key that mmengine looks for
    theirs = torch.load(tmp_path / 'theirs.pth', weights_only=True)['state_dict']
    assert_same(theirs, mmpretrain_keys(state), 'theirs')
    run_convert(tmp_path / 'theirs.pth', tmp_path / 'ours.pth', '--merge', 'false', model=None)
    assert_same(torch.load(tmp_path / 'ours.pth', weights_only=True)['model'], dict(state), 'ours')


def test_both_formats_tell_what_they_hold(source, tmp_path):
    expected = {'model': 'RepLKNet-31T', 'num_classes': 2, 'input_size': 64, 'crop_pct': None,
                'interpolation': 'bicubic', 'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225],
                'merged': True, 'folded_bn': False}
    run_convert(source, tmp_path / 'a.safetensors', '--input_size', '64')
    with safetensors.safe_open(tmp_path / 'a.safetensors', framework='pt') as file:
        texts = file.metadata()
    assert texts == {'format': 'pt', 'model': 'RepLKNet-31T', 'num_classes': '2', 'input_size': '64',
                     'crop_pct': 'null', 'interpolation': 'bicubic', 'mean': '[0.485, 0.456, 0.406]',
                     'std': '[0.229, 0.224, 0.225]', 'merged': 'true', 'folded_bn': 'false'}
    run_convert(tmp_path / 'a.safetensors', tmp_path / 'b.pth')
    assert torch.load(tmp_path / 'b.pth', weights_only=True)['metadata'] == expected
    run_convert(tmp_path / 'b.pth', tmp_path / 'c.pth', '--fold_bn', model=None)
    assert torch.load(tmp_path / 'c.pth', weights_only=True)['metadata'] == {**expected, 'folded_bn': True}


def test_the_average_of_a_training_run_is_taken_with_its_preprocessing(imagenet, tmp_path):
    run_main(*SHORT, '--epochs', '1', '--input_size', '48', '--imagenet_default_mean_and_std', 'false',
             '--data_path', imagenet,
             '--model_ema', 'true', '--output_dir', tmp_path / 'run')
    latest = tmp_path / 'run' / 'latest.pth'
    run_convert(latest, tmp_path / 'ema.pth', '--model_key', 'model_ema', '--merge', 'false')
    run = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    assert_same(load_weights(tmp_path / 'ema.pth'), run['model_ema'], 'ema')
    assert not torch.equal(run['model_ema']['head.weight'], run['model']['head.weight'])
    metadata = torch.load(tmp_path / 'ema.pth', weights_only=True)['metadata']
    assert (metadata['input_size'], metadata['mean'], metadata['std']) == (48, [0.5] * 3, [0.5] * 3)


def test_training_starts_from_safetensors_and_not_from_folded_weights(source, imagenet, tmp_path, capsys):
    run_convert(source, tmp_path / 'trained.safetensors', '--merge', 'false')
    run_convert(source, tmp_path / 'folded.safetensors', '--fold_bn')
    short = [*SHORT, '--epochs', '1', '--data_path', imagenet]
    run_main(*short, '--finetune', tmp_path / 'trained.safetensors')
    assert f'Weights from {tmp_path / "trained.safetensors"}' in capsys.readouterr().out
    for option in ('--finetune', '--resume'):
        message = r'folded\.safetensors cannot be trained: its BatchNorms are folded'
        with pytest.raises(utils.UserError, match=message):
            run_main(*short, option, tmp_path / 'folded.safetensors')


def test_images_of_a_folder_are_compared_too(source, tmp_path, capsys):
    write_images(tmp_path / 'photos', 3, 6)
    (tmp_path / 'photos' / 'class2').rename(tmp_path / 'elsewhere')
    (tmp_path / 'photos' / 'class2').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'photos' / 'broken.jpg').write_bytes(b'not an image')
    run_convert(source, tmp_path / 'a.pth', '--data_path', tmp_path / 'photos', '--fold_bn')
    printed = capsys.readouterr().out
    assert f'18 images of {tmp_path / "photos"}: largest difference' in printed
    assert printed.count('Passed over: cannot read the image') == 1
    assert 'predictions agree on 18' in printed
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'broken.jpg').write_bytes(b'not an image')
    with pytest.raises(utils.UserError, match=r'none of the images of .*empty could be read'):
        run_convert(source, tmp_path / 'b.pth', '--data_path', tmp_path / 'empty')
    assert not (tmp_path / 'b.pth').exists()


@pytest.mark.parametrize('fault', [1e-3, float('nan')])
def test_a_conversion_that_changes_the_logits_writes_nothing(fault, source, tmp_path, monkeypatch):
    merge = replknet.RepLKNet.structural_reparam

    def merge_wrongly(model):
        """A double of the merging, which spoils one bias."""
        merge(model)
        model.stages[0].blocks[0].large_kernel.lkb_reparam.bias.data += fault
    monkeypatch.setattr(replknet.RepLKNet, 'structural_reparam', merge_wrongly)
    (tmp_path / 'old.pth').write_bytes(b'older')
    message = r'logits on random images (differ by \S+ of the largest|are not finite)'
    with pytest.raises(utils.UserError, match=message):
        run_convert(source, tmp_path / 'old.pth')
    assert (tmp_path / 'old.pth').read_bytes() == b'older'
    assert {file.name for file in tmp_path.iterdir()} == {'old.pth', 'source.pth'}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_full_disk_keeps_the_older_file(suffix, source, tmp_path, monkeypatch):
    def full(*_):
        """A double of the writers on a full disk: torch's raises RuntimeError, pathlib's OSError."""
        raise {'.pth': RuntimeError, '.safetensors': OSError}[suffix]('No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    monkeypatch.setattr(convert.Path, 'write_bytes', full)
    old = tmp_path / f'old{suffix}'
    old.write_text('older')
    with pytest.raises(utils.UserError, match=rf'old\{suffix} could not be written: No space left'):
        run_convert(source, old)
    assert old.read_text() == 'older'
    assert {file.name for file in tmp_path.iterdir()} == {old.name, 'source.pth'}


@pytest.mark.parametrize(('options', 'message'), [
    (['{}/source.pth', '{}/source.pth'], r'source\.pth is the file to convert'),
    (['{}/source.pth', '{}/link.pth'], r'link\.pth is the file to convert'),
    (['{}/source.pth', '{}/a.onnx'], r'a\.onnx ends in neither \.pth nor \.safetensors'),
    (['{}/source.pth', '{}/nowhere/a.pth'], r'there is no folder .*nowhere'),
    (['{}/source.pth', '{}/folder.pth'], r'folder\.pth is a folder'),
    (['{}/none.pth', '{}/a.pth'], r'there is no checkpoint .*none\.pth'),
    (['{}/source.pth', '{}/a.pth', '--model', 'RepLKNet-31B'],
     r'holds weights of RepLKNet-31T, not of RepLKNet-31B'),
    (['{}/source.pth', '{}/a.pth', '--model', 'ResNet-50'],
     r"unknown model 'ResNet-50': choose one of RepLKNet-31B"),
    (['{}/source.pth', '{}/a.pth', '--model_key', 'model_ema'],
     r'no state dict under model_ema or state_dict: it holds model'),
    (['{}/source.pth', '{}/a.pth', '--input_size', '0'], r'--input_size 0 must be at least 1'),
    (['{}/source.pth', '{}/a.pth', '--data_path', '{}/folder.pth'], r'folder\.pth holds no image'),
    (['{}/source.pth', '{}/a.safetensors', '--to', 'mmpretrain'],
     r'--to mmpretrain writes no \.safetensors: name a \.pth'),
    (['{}/source.pth', '{}/a.pth', '--to', 'mmpretrain', '--fold_bn'],
     r'mmpretrain has no model without BatchNorms'),
    (['{}/backbone.pth', '{}/a.pth'], r'backbone\.pth is a backbone'),
    (['{}/foreign.pth', '{}/a.pth'], r'foreign\.pth holds weights of none of the models RepLKNet-31B'),
])
def test_what_cannot_be_converted_is_refused(options, message, source, tmp_path):
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'link.pth').symlink_to(source)
    torch.save(create_model('RepLKNet-31T', num_classes=None).state_dict(), tmp_path / 'backbone.pth')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'foreign.pth')
    before = sorted(tmp_path.iterdir())
    model = None if 'none of the models' in message else 'RepLKNet-31T'
    with pytest.raises(utils.UserError, match=message):
        run_convert(*(option.format(tmp_path) for option in options), model=model)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_runs(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(convert.__file__, 'source.pth', 'a.safetensors', '--model', 'RepLKNet-31T') == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == 'RepLKNet-31T, 2 classes, 32 px, kernels merged, BatchNorms not folded'
    assert run_command(convert.__file__, 'source.pth', 'b.pth', '--model', 'RepLKNet-13') == (
        'ERROR: source.pth holds weights of RepLKNet-31T, not of RepLKNet-13')
