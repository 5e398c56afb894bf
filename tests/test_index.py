"""The list of a data set's images: its file, when it is used, and what each process holds of it."""
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torchvision
from torch.utils.data import DistributedSampler

import datasets
import image_data.index
import utils
from conftest import SHORT, run_main, write_images
from image_data.class_folders import ClassFolders
from image_data.index import ImageIndex, open_index
from image_data.scan import Progress


@pytest.fixture
def kept(monkeypatch):
    """An index of any size leaves a file."""
    monkeypatch.setattr(image_data.index, 'KEPT_FROM', 1)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images, and what may lie between."""
    write_images(tmp_path / 'set' / 'train', 2, 3)
    (tmp_path / 'set' / 'train' / 'class0' / 'notes.txt').write_text('no image')
    return tmp_path / 'set' / 'train'


def samples(index: ImageIndex) -> list[tuple[str, int]]:
    return [(index.name(i), int(index.labels[i])) for i in range(len(index))]


def test_a_kept_list_is_image_folders_and_is_read_instead_of_the_folders(kept, folder, monkeypatch, capsys):
    expected = torchvision.datasets.ImageFolder(folder)
    scanned = open_index(folder)
    assert capsys.readouterr().out == f'The list of 6 images is kept as {folder.parent}/.train.index\n'
    monkeypatch.setattr(image_data.index, 'Scan', None)
    again = open_index(folder)
    for index in (scanned, again):
        assert (samples(index), index.classes) == (expected.samples, expected.classes)
    assert again.details == scanned.details
    assert again.details['passed_over'] == {'.txt': 1}


def test_below_100_000_images_nothing_is_written(folder):
    assert image_data.index.KEPT_FROM == 100_000
    assert len(open_index(folder)) == 6
    assert os.listdir(folder.parent) == ['train']


@pytest.mark.parametrize('change', ['added', 'removed', 'renamed', 'new class', 'deep'])
def test_a_list_is_made_anew_where_a_folder_has_changed(change, kept, folder, capsys):
    (folder / 'class1' / 'deep').mkdir()
    open_index(folder)
    image = folder / 'class0' / '0.png'
    if change == 'added':
        shutil.copy(image, folder / 'class1' / '9.png')
    elif change == 'removed':
        image.unlink()
    elif change == 'renamed':
        image.rename(folder / 'class0' / '7.png')
    elif change == 'new class':
        shutil.copytree(folder / 'class0', folder / 'class2')
    else:
        shutil.copy(image, folder / 'class1' / 'deep' / '0.png')
    capsys.readouterr()
    assert samples(open_index(folder)) == torchvision.datasets.ImageFolder(folder).samples
    changed = {'added': '/class1', 'removed': '/class0', 'renamed': '/class0', 'new class': '/',
               'deep': '/class1/deep'}[change]
    told = capsys.readouterr().out.splitlines()[0]
    assert told == f'{folder.parent}/.train.index is out of date (the folder {folder}{changed} has changed)'


@pytest.mark.parametrize('damage', ['cut', 'longer', 'other version', 'empty', 'no index', 'header', 'zeros',
                                    'nested'])
def test_a_damaged_list_is_never_used(damage, kept, folder, capsys):
    file = Path(open_index(folder).file)
    data = file.read_bytes()
    start, end = data.index(b'\n') + 1, data.index(b'}')
    zeros = bytes(len(data) - 4096)
    file.write_bytes({'zeros': data[:4096] + zeros, 'cut': data[:-1], 'longer': data + b'\0',
                      'other version': data.replace(b'1\n', b'9\n', 1), 'empty': b'',
                      'no index': b'x' * len(data),
                      'nested': data[:start] + b'[' * 3900 + data[start + 3900:],
                      'header': data[:start] + b'[' * (end - start) + data[end:]}[damage])
    capsys.readouterr()
    assert samples(open_index(folder)) == torchvision.datasets.ImageFolder(folder).samples
    assert f'{file} is out of date (it is damaged)' in capsys.readouterr().out
    assert image_data.index.read_index(str(file), str(folder)).digest == open_index(folder).digest
    assert capsys.readouterr().out == ''  # it was written again


def test_a_list_of_another_data_set_is_told_by_its_folders(kept, folder, tmp_path, capsys):
    write_images(tmp_path / 'other' / 'train', 2, 4)
    shutil.copy(open_index(tmp_path / 'other' / 'train').file, folder.parent / '.train.index')
    capsys.readouterr()
    assert samples(open_index(folder)) == torchvision.datasets.ImageFolder(folder).samples
    assert f'.train.index is out of date (the folder {folder}/ has changed)' in capsys.readouterr().out


def test_where_the_folder_cannot_hold_the_list_the_users_cache_does(kept, folder, tmp_path, monkeypatch,
                                                                   capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (folder.parent / '.train.index').mkdir()  # as root, who may write anywhere, an obstacle stands in
    index = open_index(folder)
    assert Path(index.file).parent == tmp_path / 'cache' / 'replknet'
    monkeypatch.setattr(image_data.index, 'Scan', None)
    assert samples(open_index(folder)) == samples(index)
    monkeypatch.undo()
    assert 'is damaged' in capsys.readouterr().out


def test_without_room_anywhere_the_run_goes_on_with_a_warning(kept, folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(image_data.index, 'write_index', full)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    index = open_index(folder)
    assert samples(pickle.loads(pickle.dumps(index))) == torchvision.datasets.ImageFolder(folder).samples
    told = capsys.readouterr().out
    assert 'WARNING: the list of 6 images can be kept nowhere' in told and 'No space left on device' in told
    assert os.listdir(folder.parent) == ['train'] and os.listdir(tmp_path / 'cache' / 'replknet') == []


def test_images_beside_the_class_folders_have_a_list_of_their_own(kept, folder, monkeypatch, capsys):
    assert (len(open_index(folder)), len(open_index(folder, flat=True))) == (6, 0)
    shutil.copy(folder / 'class0' / '0.png', folder)
    assert (len(open_index(folder)), len(open_index(folder, flat=True))) == (6, 1)
    capsys.readouterr()
    monkeypatch.setattr(image_data.index, 'Scan', None)
    assert (len(open_index(folder)), len(open_index(folder, flat=True))) == (6, 1)
    shutil.copy(folder.parent / '.train.index', folder.parent / '.train.flat.index')
    with pytest.raises(TypeError):  # a new scan, which is None
        open_index(folder, flat=True)
    assert 'it lists another part of it' in capsys.readouterr().out


def test_a_list_is_made_anew_where_pillow_reads_other_formats(kept, folder, monkeypatch, capsys):
    open_index(folder)
    monkeypatch.setattr(image_data.index, 'image_suffixes', lambda: {'.png', '.new'})
    open_index(folder)
    assert 'Pillow reads other formats now' in capsys.readouterr().out


def test_lists_in_the_cache_are_kept_apart_by_path_and_node(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    files = [image_data.index.index_files(root, False)[1] for root in ('/data/train', '/data/val')]
    monkeypatch.setattr('platform.node', lambda: 'another')
    files.append(image_data.index.index_files('/data/train', False)[1])
    assert len(set(files)) == 3
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '~')  # as os.path.expanduser leaves it where nobody knows a home
    assert image_data.index.index_files('/data/train', False) == ['/data/.train.index']


def test_a_list_goes_to_another_process_as_the_name_of_its_file(kept, folder):
    index = open_index(folder)
    sent = pickle.dumps(index)
    assert len(sent) < 400
    assert samples(pickle.loads(sent)) == samples(index)
    (folder / 'class0' / '0.png').unlink()
    open_index(folder)
    with pytest.raises(utils.UserError, match='was replaced while the run that reads it began'):
        pickle.loads(sent)
    assert len(samples(index)) == 6  # the run that has it open keeps what it has


def test_names_of_any_bytes_are_kept(kept, folder):
    odd = os.fsdecode(b'class0/\xff\xe9 \n.png')
    (folder / 'class0' / '0.png').rename(folder / odd)
    open_index(folder)
    assert (str(folder / odd), 0) in samples(open_index(folder))


def test_a_training_run_sends_its_workers_the_name_of_the_list(kept, folder, tmp_path, monkeypatch):
    write_images(tmp_path / 'set' / 'val', 2, 3)
    sent, state_of = [], ImageIndex.__getstate__

    def note(index) -> dict:
        sent.append(state_of(index))
        return sent[-1]
    monkeypatch.setattr(ImageIndex, '__getstate__', note)
    run_main(*SHORT, '--data_path', folder.parent, '--batch_size', 2, '--num_workers', 1, '--output_dir',
             tmp_path / 'run')
    assert (tmp_path / 'run' / 'latest.pth').exists()
    files = [f'{folder.parent}/.{name}.index' for name in ('train', 'val')]
    assert [state['file'] for state in sent] == files
    assert all('columns' not in state for state in sent)


def test_a_scan_tells_how_far_it_is_every_ten_seconds(monkeypatch, capsys):
    clock = iter([0, 5, 11, 15, 40])
    monkeypatch.setattr('time.monotonic', lambda: next(clock))
    progress = Progress('data/train')
    for images, part in ((10, 0.1), (110_000, 0.25), (150_000, 0.3), (300_000, 0.8)):
        progress(images, part)
    monkeypatch.undo()
    assert capsys.readouterr().out.splitlines() == [
        'Scanning data/train: 110,000 images, 25%, eta 0:00:33',
        'Scanning data/train: 300,000 images, 80%, eta 0:00:10']


@pytest.mark.parametrize('world', [1, 3])
def test_the_order_of_an_epoch_is_that_of_torchs_sampler(world, monkeypatch):
    monkeypatch.setattr(utils, 'get_world_size', lambda: world)
    for rank in range(world):
        monkeypatch.setattr(utils, 'get_rank', lambda rank=rank: rank)
        sampler = datasets.ResumableSampler(range(1000), 5)
        published = DistributedSampler(range(1000), world, rank, seed=utils.seed_of('order', 5),
                                       drop_last=True)
        sampler.set_epoch(3)
        published.set_epoch(3)
        assert [index for _, index in sampler] == list(published)
        sampler.seen = 40
        assert [index for _, index in sampler] == list(published)[40:]


def test_two_lists_of_as_many_images_differ_in_their_digest(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / 'copy'))
    assert open_index(folder).digest == open_index(copy).digest
    (copy / 'class0' / '0.png').rename(copy / 'class0' / '00.png')
    facts = [datasets.facts_of('training', ClassFolders(open_index(root), None, None))
             for root in (folder, copy)]
    differ = [name for name in facts[0] if facts[0][name] != facts[1][name]]
    assert differ == ['the digest of the list of training images']
