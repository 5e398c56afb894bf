"""Data sets in tars that are not unpacked: the same samples as unpacked, and what may be wrong with a tar."""
import os
import pickle
import re
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import image_data.index
import image_data.tars
import main
import utils
from conftest import SHORT, assert_same, log_lines, run_main, run_to_step, write_images
from datasets import build_dataset
from image_data.class_folders import folders_of
from image_data.index import open_index
from tools import check_images

IMAGE_FOLDER = ['--data_set', 'image_folder', '--data_path']


def parse(*options):
    return main.get_args_parser().parse_args([str(option) for option in options])


@pytest.fixture
def unpacked(tmp_path):
    """Classes whose names and folders sort differently as paths and as names."""
    for name in ('b/1.png', 'a/10.png', 'a/9.png', 'a/x/1.png', 'a-b/2.JPG', 'a/x-y/1.png', 'a/z/deep/0.png'):
        path = tmp_path / 'unpacked' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (len(str(path)) % 7, len(name), ord(name[0]))).save(path)
    return tmp_path / 'unpacked'


def pack(tar: Path, folder: Path, name: str = '.', **options) -> Path:
    """`folder` as a tar in which it is called `name`, its files in no order."""
    with tarfile.open(tar, 'w', **options) as packed:
        for path in sorted(folder.rglob('*'), key=lambda path: zlib.crc32(path.name.encode())):
            packed.add(path, f'{name}/{path.relative_to(folder)}', recursive=False)
    return tar


def one_tar(unpacked: Path, tmp_path: Path) -> Path:
    return pack(tmp_path / 'all.tar', unpacked)


def a_folder_in_a_tar(unpacked: Path, tmp_path: Path) -> Path:
    return pack(tmp_path / 'all.tar', unpacked, 'imagenet/train') / 'imagenet' / 'train'


def a_tar_for_each_class(unpacked: Path, tmp_path: Path) -> Path:
    (tmp_path / 'classes').mkdir()
    for folder in unpacked.iterdir():
        pack(tmp_path / 'classes' / f'{folder.name}.tar', folder, format=tarfile.GNU_FORMAT)
    (tmp_path / 'classes' / 'md5sums.txt').write_text('beside')
    return tmp_path / 'classes'


def a_tar_of_tars(unpacked: Path, tmp_path: Path) -> Path:
    return pack(tmp_path / 'ILSVRC2012_img_train.tar', a_tar_for_each_class(unpacked, tmp_path), '',
                format=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize('packed', [one_tar, a_folder_in_a_tar, a_tar_for_each_class, a_tar_of_tars])
def test_samples_are_those_of_the_unpacked_folder_in_its_order(packed, unpacked, tmp_path):
    expected = torchvision.datasets.ImageFolder(unpacked)
    root = packed(unpacked, tmp_path)
    index = open_index(root)
    assert index.classes == expected.classes
    assert [(os.path.relpath(index.name(i), root), index.labels[i]) for i in range(len(index))] == [
        (os.path.relpath(path, unpacked), label) for path, label in expected.samples]
    for i, (path, _) in enumerate(expected.samples):
        assert index.open(i).read() == Path(path).read_bytes()


def test_tars_in_the_class_folders_are_read_and_those_beside_images_or_folders_are_not(unpacked, tmp_path,
                                                                                       capsys):
    pack(unpacked / 'a.tar', unpacked / 'a')  # as an extraction leaves it
    (unpacked / 'c').mkdir()
    for part in ('0', '1'):
        pack(unpacked / 'c' / f'part{part}.tar', unpacked / 'b', f'n{part}')
    dataset, _ = build_dataset(False, parse('--data_set', 'image_folder', '--eval_data_path', unpacked,
                                            '--nb_classes', 4, '--input_size', 32))
    assert [(os.path.relpath(path, unpacked), label) for path, label in dataset.samples[-2:]] == [
        ('c/part0/n0/1.png', 3), ('c/part1/n1/1.png', 3)]
    assert torch.equal(dataset[len(dataset) - 1][0], dataset[dataset.targets.index(2)][0])
    assert 'passed over 1 file that Pillow cannot read: 1 .tar' in capsys.readouterr().out


def test_hidden_members_and_those_of_systems_are_left_out_and_non_images_counted(unpacked, tmp_path, capsys):
    for name in ('a/._9.png', '__MACOSX/a/9.png', 'a/.hidden/0.png', 'a/Thumbs.db', 'a/list.txt',
                 'a/more.txt', 'a/noise'):
        path = unpacked / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'no image')
    tar = pack(tmp_path / 'all.tar', unpacked)
    dataset, _ = build_dataset(True, parse(*IMAGE_FOLDER, tar, '--nb_classes', 3))
    assert (len(dataset), dataset.dataset.classes) == (7, ['a', 'a-b', 'b'])
    assert capsys.readouterr().out == (f'{tar}: passed over 3 files that Pillow cannot read: '
                                       '2 .txt, 1 without a suffix\n')


def test_of_members_with_one_name_the_last_counts_as_in_unpacking(unpacked, tmp_path, capsys):
    tar = pack(tmp_path / 'all.tar', unpacked)
    Image.new('RGB', (8, 8), 'red').save(unpacked / 'b' / '1.png')
    with tarfile.open(tar, 'a') as packed:
        packed.add(unpacked / 'b' / '1.png', 'b/1.png')
    index = open_index(tar)
    assert len(index) == 7
    assert index.open(6).read() == (unpacked / 'b' / '1.png').read_bytes()
    assert 'in tars a later member of the same name replaces b/1.png' in capsys.readouterr().out


def test_in_a_tar_too_a_tar_beside_folders_or_images_is_what_was_unpacked_there(unpacked, tmp_path):
    pack(unpacked / 'a.tar', unpacked / 'b')
    pack(unpacked / 'b' / 'part.tar', unpacked / 'a')
    expected = torchvision.datasets.ImageFolder(unpacked)
    index = open_index(pack(tmp_path / 'all.tar', unpacked))
    assert [os.path.relpath(index.name(i), tmp_path / 'all.tar') for i in range(len(index))] == [
        os.path.relpath(path, unpacked) for path, _ in expected.samples]
    assert index.details['passed_over'] == {'.tar': 2}


def test_of_two_tars_of_one_name_in_a_tar_the_last_counts(unpacked, tmp_path):
    tar = a_tar_of_tars(unpacked, tmp_path)
    pack(tmp_path / 'classes' / 'a.tar', unpacked / 'b')
    with tarfile.open(tar, 'a') as packed:
        packed.add(tmp_path / 'classes' / 'a.tar', 'a.tar')
    index = open_index(tar)
    assert [os.path.relpath(index.name(i), tar) for i in range(len(index))] == ['a/1.png', 'a-b/2.JPG',
                                                                               'b/1.png']


@pytest.mark.parametrize('part, expected', [('train', 'train'), ('val', 'val'), ('', 'both')])
def test_the_tar_that_is_named_is_read_whatever_lies_beside(part, expected, tmp_path):
    for folder, classes in (('train', 3), ('val', 3), ('other', 2)):
        write_images(tmp_path / folder, classes, 2)
    for name in ('train', 'val'):
        pack(tmp_path / f'ILSVRC2012_img_{name}.tar', tmp_path / 'other')
    given = tmp_path / f'ILSVRC2012_img_{part}.tar' if part else tmp_path
    train, val = folders_of(parse('--data_path', given))
    named = {'train': train, 'val': val}
    for name in named:
        wanted = f'ILSVRC2012_img_{name}.tar' if name == expected else name
        assert named[name] == tmp_path / wanted


def test_a_list_of_tars_is_made_anew_where_a_tar_has_changed(unpacked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_data.index, 'KEPT_FROM', 1)
    root = a_tar_for_each_class(unpacked, tmp_path)
    first = open_index(root)
    sent = pickle.dumps(first)
    assert [pickle.loads(sent).open(i).read() for i in range(7)] == [first.open(i).read() for i in range(7)]
    state = os.stat(root / 'a.tar')
    pack(root / 'a.tar', unpacked / 'b')
    os.utime(root, ns=(os.stat(root).st_atime_ns, os.stat(root).st_mtime_ns))
    assert os.stat(root / 'a.tar').st_mtime_ns != state.st_mtime_ns
    capsys.readouterr()
    assert len(open_index(root)) == 3
    assert f'.classes.index is out of date ({root}/a.tar has changed)' in capsys.readouterr().out
    with pytest.raises(utils.UserError, match='was replaced while the run that reads it began'):
        pickle.loads(sent)


def test_parts_of_a_tar_have_lists_of_their_own(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data.index, 'KEPT_FROM', 8)
    write_images(tmp_path / 'two' / 'val', 2, 2)
    unpacked.rename(tmp_path / 'two' / 'train')
    tar = pack(tmp_path / 'all.tar', tmp_path / 'two')
    assert [len(open_index(tar / part)) for part in ('train', 'val')] == [7, 4]
    # the few of val too: all members were read for them
    assert {'.all.tar.train.index', '.all.tar.val.index'} <= set(os.listdir(tmp_path))
    shutil.copy(tmp_path / '.all.tar.train.index', tmp_path / '.all.tar.val.index')
    assert len(open_index(tar / 'val')) == 4


def test_forks_and_threads_read_what_they_ask_for(unpacked, tmp_path):
    index = open_index(pack(tmp_path / 'all.tar', unpacked))
    wanted = [index.open(i).read() for i in range(7)]

    def misread(_) -> int:
        return sum(index.open(i).read() != wanted[i] for i in range(7) for _ in range(200))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(misread, range(4))) == [0] * 4


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = '') -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize('info, told', [
    (member('/etc/a.png'), 'holds /etc/a.png, and names with / in front or .. are refused'),
    (member('a/../../b.png'), r'holds a/../../b.png, and names with / in front or .. are refused'),
    (member('a/c.png', tarfile.SYMTYPE, '9.png'), 'holds a link, a/c.png to 9.png: unpack it, or'),
    (member('a/c.png', tarfile.LNKTYPE, 'a/9.png'), 'holds a link, a/c.png to a/9.png: unpack it, or'),
])
def test_members_that_would_lead_elsewhere_are_refused(info, told, unpacked, tmp_path):
    tar = pack(tmp_path / 'all.tar', unpacked)
    with tarfile.open(tar, 'a') as packed:
        packed.addfile(info)
    with pytest.raises(utils.UserError, match=re.escape(told)):
        open_index(tar)


@pytest.mark.parametrize('packed', [one_tar, a_tar_of_tars])
def test_a_tar_that_is_cut_off_anywhere_is_told(packed, unpacked, tmp_path):
    tar = packed(unpacked, tmp_path)
    data = tar.read_bytes()
    with tarfile.open(tar) as opened:
        opened.getmembers()
        end = opened.offset  # of the members; then follow blocks of zeros
    for length in (0, 100, *range(512, end + 1, 512), end + 100):
        tar.write_bytes(data[:length])
        with pytest.raises(utils.UserError, match=r'\.tar is (cut off|no tar, or damaged|empty)'):
            open_index(tar)
    tar.write_bytes(data[:end + 512])  # one block of zeros marks the end
    assert len(open_index(tar)) == 7


def test_a_compressed_tar_is_told(unpacked, tmp_path):
    with tarfile.open(tmp_path / 'all.tar', 'w:gz') as packed:
        packed.add(unpacked, '.')
    with pytest.raises(utils.UserError, match=r'all.tar is compressed, and cannot be read in place'):
        open_index(tmp_path / 'all.tar')


def test_tars_within_that_are_compressed_or_empty_and_sparse_files_are_told(unpacked, tmp_path):
    def told(add) -> str:
        with tarfile.open(tmp_path / 'all.tar', 'w') as packed:
            add(packed)
        with pytest.raises(utils.UserError) as found:
            open_index(tmp_path / 'all.tar')
        return str(found.value).removeprefix(f'{tmp_path}/all.tar')
    with tarfile.open(tmp_path / 'a.tar', 'w:gz') as packed:
        packed.add(unpacked, '.')
    assert told(lambda packed: packed.add(tmp_path / 'a.tar', 'a.tar')).startswith('/a.tar is compressed')
    assert told(lambda packed: packed.addfile(member('a.tar'))) == '/a.tar is empty'
    sparse = member('a/b.png')
    sparse.pax_headers = {'GNU.sparse.map': '0,1', 'GNU.sparse.size': '1000000'}
    assert told(lambda packed: packed.addfile(sparse)).startswith(' holds a/b.png as a sparse file')
    sparse.name = 'a/notes.txt'  # no image is lost with it
    pack(tmp_path / 'all.tar', unpacked)
    with tarfile.open(tmp_path / 'all.tar', 'a') as packed:
        packed.addfile(sparse)
    assert len(open_index(tmp_path / 'all.tar')) == 7


def test_a_tar_that_grows_while_it_is_listed_is_told(unpacked, tmp_path, monkeypatch):
    tar = pack(tmp_path / 'all.tar', unpacked)
    read = image_data.tars._Listing.read

    def read_and_grow(self, *arguments):
        read(self, *arguments)
        with tar.open('ab') as file:
            file.write(bytes(512))
    monkeypatch.setattr(image_data.tars._Listing, 'read', read_and_grow)
    with pytest.raises(utils.UserError, match=r'all.tar changed while it was read: wait until it is written'):
        open_index(tar)


def test_a_tar_that_changes_during_a_run_is_told_at_the_next_image(unpacked, tmp_path):
    tar = pack(tmp_path / 'all.tar', unpacked)
    before, opened = open_index(tar), open_index(tar)
    opened.open(0)
    os.truncate(tar, 1000)
    with pytest.raises(utils.UserError, match=r'all.tar has changed since it was listed: start anew'):
        before.open(0)
    with pytest.raises(utils.UserError, match=r'all.tar has become shorter than it was'):
        opened.open(6)
    tar.unlink()
    with pytest.raises(utils.UserError, match=r'all.tar cannot be opened \(No such file or directory\)'):
        before.open(0)


def test_few_tars_stay_open(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data.tars, 'MOST_OPEN', 2)
    index = open_index(a_tar_for_each_class(unpacked, tmp_path))
    before = len(os.listdir('/proc/self/fd'))
    for i in (0, 5, 6, 0, 6):
        assert index.open(i).read()
    assert len(os.listdir('/proc/self/fd')) == before + 2


def test_a_folder_that_a_tar_does_not_hold_is_told_with_those_that_it_does(unpacked, tmp_path):
    tar = pack(tmp_path / 'all.tar', unpacked, 'imagenet/train')
    with pytest.raises(utils.UserError, match=r'all.tar holds no train: it holds the folders imagenet'):
        build_dataset(True, parse('--data_path', tar))


def test_an_unreadable_member_is_named(unpacked, tmp_path):
    (unpacked / 'b' / '1.png').write_bytes(b'broken')
    tar = pack(tmp_path / 'all.tar', unpacked)
    dataset, _ = build_dataset(True, parse(*IMAGE_FOLDER, tar, '--nb_classes', 3))
    with pytest.raises(utils.UserError, match=f'cannot read the image {tar}/b/1.png .it is damaged'):
        dataset[6]
    root = a_tar_for_each_class(unpacked, tmp_path)
    dataset, _ = build_dataset(True, parse(*IMAGE_FOLDER, root, '--nb_classes', 3))
    with pytest.raises(utils.UserError, match=f'the image {root}/b/1.png in {root}/b.tar .it is damaged'):
        dataset[6]


def test_the_check_of_images_reads_tars(unpacked, tmp_path, capsys):
    (unpacked / 'b' / '1.png').write_bytes(b'broken')
    for root in (pack(tmp_path / 'all.tar', unpacked), a_tar_for_each_class(unpacked, tmp_path)):
        args = check_images.get_args_parser().parse_args([str(root), '--num_workers', '0'])
        assert check_images.main(args) == 1
        printed = capsys.readouterr().out
        assert re.search(rf'{root}/b(\.tar)?/1.png: it is damaged', printed)
        assert '7 images checked, 1 cannot be read' in printed
    (tmp_path / 'both').mkdir()
    pack(tmp_path / 'both' / 'train.tar', unpacked)
    unpacked.rename(tmp_path / 'both' / 'val')
    assert check_images.main(check_images.get_args_parser().parse_args(
        [str(tmp_path / 'both'), '--num_workers', '0'])) == 2
    assert '14 images checked, 2 cannot be read' in capsys.readouterr().out


# --- runs
# ------------------------------------------------------------------------------------------------------------


def tars_of(imagenet: Path) -> Path:
    """The fixture's data set as image-net.org gives it: two tars."""
    folder = imagenet.parent / 'tars'
    (folder / 'classes').mkdir(parents=True)
    for path in (imagenet / 'train').iterdir():
        pack(folder / 'classes' / f'{path.name}.tar', path)
    pack(folder / 'ILSVRC2012_img_train.tar', folder / 'classes')
    pack(folder / 'val.tar', imagenet / 'val')
    return folder


def test_a_run_over_tars_stopped_within_an_epoch_is_to_the_bit_that_over_folders(imagenet, tmp_path):
    tars = tars_of(imagenet)
    options = [*SHORT, '--save_ckpt_steps', 1]
    run_main(*options, '--data_path', imagenet, '--output_dir', tmp_path / 'folders')
    packed = [*options, '--data_path', tars / 'ILSVRC2012_img_train.tar', '--output_dir', tmp_path / 'tars']
    run_to_step(1, 1, *packed)
    run_main(*packed, '--data_path', tars)  # either names the two
    folders, over_tars = (torch.load(tmp_path / name / 'latest.pth') for name in ('folders', 'tars'))
    for name in ('model', 'optimizer'):
        assert_same(over_tars[name], folders[name], name)
    assert log_lines(tmp_path / 'tars') == log_lines(tmp_path / 'folders')


# --- --val_labels
# ------------------------------------------------------------------------------------------------------------

WNIDS = ['n01440764', 'n01443537', 'n02119789', 'n03041632']
NUMBERS = {1: 'n02119789', 2: 'n03041632', 3: 'n01443537', 4: 'n01440764', 5: 'n00001740'}  # no alphabet


@pytest.fixture
def flat(tmp_path):
    """Six validation images side by side in a tar, as in ILSVRC2012_img_val.tar, and training folders."""
    write_images(tmp_path / 'val', 1, 6)
    pack(tmp_path / 'ILSVRC2012_img_val.tar', tmp_path / 'val' / 'class0')
    for wnid in WNIDS:
        (tmp_path / 'train' / wnid).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / wnid / '0.png')
    (tmp_path / 'val').rename(tmp_path / 'flat')
    return tmp_path


def devkit(folder: Path, numbers: list[int]) -> Path:
    """A development kit's folder `data`: ground truth and synset table; returns the ground truth."""
    table = np.zeros(len(NUMBERS), [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O')])
    for row, (number, wnid) in zip(table, NUMBERS.items(), strict=True):
        row['ILSVRC2012_ID'], row['WNID'], row['words'] = number, wnid, 'a word, another'
    folder.mkdir()
    scipy.io.savemat(folder / 'meta.mat', {'synsets': table.reshape(-1, 1)})
    file = folder / 'ILSVRC2012_validation_ground_truth.txt'
    file.write_text('\n'.join(map(str, numbers)) + '\n')
    return file


def labels(flat: Path, file: Path, *options) -> list[str]:
    dataset, _ = build_dataset(False, parse('--data_path', flat, '--nb_classes', 4, '--val_labels', file,
                                            *options))
    assert dataset.classes == WNIDS
    return [dataset.classes[label] for label in dataset.targets]


def test_the_development_kits_numbers_are_no_places_in_the_alphabet(flat):
    numbers = [4, 1, 1, 3, 2, 4]
    wanted = [NUMBERS[number] for number in numbers]
    file = devkit(flat / 'data', numbers)
    assert labels(flat, file) == wanted
    with tarfile.open(flat / 'devkit.tar.gz', 'w:gz') as kit:
        kit.add(flat / 'data', 'ILSVRC2012_devkit_t12/data')
    assert labels(flat, flat / 'devkit.tar.gz') == wanted
    (flat / 'wnids.txt').write_text('\n'.join(wanted))
    assert labels(flat, flat / 'wnids.txt') == wanted
    image_folder = ('--data_set', 'image_folder', '--eval_data_path', flat / 'flat' / 'class0', '--data_path')
    assert labels(flat, file, *image_folder, flat / 'train') == wanted  # a folder is as good as a tar
    assert labels(flat, file, *image_folder, flat / 'nowhere') == wanted  # so are no training images


def test_validation_images_without_labels_are_told_where_these_come_from(flat):
    with pytest.raises(utils.UserError, match=r'img_val.tar holds images but no class folders \(0.png, .*'
                                              r'ILSVRC2012_devkit_t12.tar.gz: pass --val_labels'):
        build_dataset(False, parse('--data_path', flat, '--nb_classes', 4))


@pytest.mark.parametrize('text, told', [
    ('4\n1\n', 'has 2 lines, but .*ILSVRC2012_img_val.tar 6 images'),
    ('4\n1\n1\n3\n2\n9\n', 'holds numbers that meta.mat does not know: 9'),
    ('5\n5\n5\n5\n5\n5\n', 'names classes that .*train does not have: n00001740'),
    ('cat\ndog\n', "holds neither wnids nor numbers .'cat'.: the ground truth comes with ImageNet"),
    ('', 'holds neither wnids nor numbers'),
])
def test_labels_that_do_not_fit_are_told(text, told, flat):
    file = devkit(flat / 'data', [])
    file.write_text(text)
    with pytest.raises(utils.UserError, match=told):
        labels(flat, file)


def test_numbers_without_their_table_and_a_missing_file_are_told(flat):
    (flat / 'truth.txt').write_text('1\n' * 6)
    with pytest.raises(utils.UserError, match=r'holds numbers, and .*/meta.mat, which says what they'):
        labels(flat, flat / 'truth.txt')
    (flat / 'meta.mat').write_bytes(b'no table')
    with pytest.raises(utils.UserError, match=r'meta.mat holds no table of synsets'):
        labels(flat, flat / 'truth.txt')
    with pytest.raises(utils.UserError, match=r'--val_labels .*nowhere.txt cannot be read'):
        labels(flat, flat / 'nowhere.txt')
    with pytest.raises(utils.UserError, match='--val_labels is not read with --data_set DIGITS'):
        run_main(*SHORT, '--data_set', 'DIGITS', '--val_labels', flat / 'truth.txt')


def test_an_evaluation_reads_a_tar_and_its_labels(flat, capsys, tmp_path):
    run_main(*SHORT, '--data_path', flat, '--nb_classes', 4, '--epochs', 1, '--disable_eval', 'true',
             '--output_dir', tmp_path / 'run')
    run_main(*SHORT, '--data_path', flat, '--nb_classes', 4, '--eval', 'true', '--resume',
             tmp_path / 'run' / 'latest.pth', '--val_labels', devkit(flat / 'data', [4, 1, 1, 3, 2, 4]))
    assert 'Evaluating on 6 images' in capsys.readouterr().out
