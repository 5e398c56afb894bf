"""Data sets and transforms."""
import pickle
import random
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

import datasets
import distributed
import image_data.decode
import main
import utils
from conftest import write_images
from datasets import ResumableSampler, build_dataset, build_transform
from image_data.decode import decode_image, load_image
from image_data.folders import find_images


def parse(*options):
    return main.get_args_parser().parse_args([str(option) for option in options])


def photo(width=500, height=375) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8))


def test_digits_are_split_by_every_fifth_and_never_flipped():
    args = parse('--data_set', 'DIGITS', '--input_size', '32')
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val), classes) == (1437, 360, 10)
    assert train[0][0].shape == val[0][0].shape == (3, 32, 32)
    assert val[0][1] == 0
    assert train[0][1] == 1  # images 0 and 1 are a zero and a one
    assert 'Flip' not in str(build_transform(True, args))


def test_imagenet_folders_and_nb_classes_are_honoured(imagenet):
    args = parse('--data_path', imagenet, '--nb_classes', '2')
    train, classes = build_dataset(True, args)
    val, _ = build_dataset(False, args)
    assert (len(train), len(val), classes) == (8, 7, 2)
    with pytest.raises(utils.UserError, match=re.escape(
            f'--nb_classes is 1000, but {imagenet}/train has 2 class folders: pass --nb_classes 2 (with '
            f'--finetune, to replace the head)')):
        build_dataset(True, parse('--data_path', imagenet))


def test_image_folder_takes_the_class_folders_parents(imagenet):
    args = parse('--data_set', 'image_folder', '--data_path', imagenet / 'train', '--eval_data_path',
                 imagenet / 'val',
                 '--nb_classes', '2')
    assert [len(build_dataset(is_train, args)[0]) for is_train in (True, False)] == [8, 7]
    args.eval_data_path = None
    with pytest.raises(utils.UserError, match='--eval_data_path FOLDER, or --disable_eval true'):
        build_dataset(False, args)


def test_missing_and_empty_folders_are_named(imagenet, tmp_path):
    with pytest.raises(utils.UserError, match=rf'there is no folder {tmp_path}/nothing/train.*train/CLASS'):
        build_dataset(True, parse('--data_path', tmp_path / 'nothing'))
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    with pytest.raises(utils.UserError, match=rf'{tmp_path}/empty/train is not complete'):
        build_dataset(True, parse('--data_path', tmp_path / 'empty'))
    (tmp_path / 'empty' / 'val').mkdir()
    with pytest.raises(utils.UserError, match=rf'{tmp_path}/empty/val is not complete'):
        build_dataset(False, parse('--data_path', tmp_path / 'empty'))
    args = parse('--data_set', 'image_folder', '--data_path', imagenet / 'train', '--eval_data_path',
                 'nowhere')
    with pytest.raises(utils.UserError, match='there is no folder nowhere: --eval_data_path must hold'):
        build_dataset(False, args)
    (imagenet / 'train' / 'class2').mkdir()
    with pytest.raises(utils.UserError, match='class2'):
        build_dataset(True, parse('--data_path', imagenet, '--nb_classes', '3'))


def test_a_class_missing_in_val_is_named(tmp_path):
    write_images(tmp_path / 'train', 3, 1)
    write_images(tmp_path / 'val', 3, 1)
    (tmp_path / 'val' / 'class1' / '0.png').unlink()
    (tmp_path / 'val' / 'class1').rmdir()
    for classes in (2, 3):
        with pytest.raises(utils.UserError, match=r'Missing: class1; not in .*train: none'):
            build_dataset(False, parse('--data_path', tmp_path, '--nb_classes', classes))


def test_an_unreadable_image_is_named_also_by_a_loader_process(imagenet):
    broken = imagenet / 'val' / 'class0' / '0.png'
    broken.write_bytes(broken.read_bytes()[:200])
    dataset, _ = build_dataset(False, parse('--data_path', imagenet, '--nb_classes', '2'))
    with pytest.raises(utils.UserError, match=f'cannot read the image {broken}'):
        dataset[0]
    with pytest.raises(utils.UserError, match=f'cannot read the image {broken}'):
        next(iter(DataLoader(dataset, 2, **distributed.worker_options(1))))


# --- folders
# -----------------------------------------------------------------------------------------------------------


def write_image(path: Path, **options) -> None:
    """A small image, in the format of the name, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(8, 8).save(path, **options)


def test_samples_are_those_of_image_folder_in_its_order(tmp_path):
    for name in ('b/1.png', 'a/10.png', 'a/9.png', 'a/x/1.png', 'a-b/2.JPG', 'a/x-y/1.png', 'B/1.webp',
                 'a/below/deep/0.png'):
        write_image(tmp_path / 'd' / name)
    write_image(tmp_path / 'elsewhere' / '0.png')
    (tmp_path / 'd' / 'linked').symlink_to(tmp_path / 'elsewhere')
    for name in ('once', 'twice'):
        (tmp_path / 'd' / 'b' / name).symlink_to(tmp_path / 'elsewhere')
    expected = torchvision.datasets.ImageFolder(tmp_path / 'd')
    assert len(expected) == 11
    found, _ = build_dataset(False, parse('--data_set', 'image_folder', '--eval_data_path', tmp_path / 'd',
                                          '--nb_classes', 5))
    assert (found.classes, found.samples, found.targets) == (expected.classes, expected.samples,
                                                             expected.targets)


def test_every_format_that_pillow_decodes_is_found_and_what_is_not_is_told_once(imagenet, capsys):
    written = {'.png', '.jpg', '.jpeg', '.jfif', '.gif', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.tga',
               '.ico', '.mpo',
               '.apng', *(['.jp2'] if features.check('jpg_2000') else []),
               *(['.avif'] if features.check('avif') else [])}
    for suffix in written:
        write_image(imagenet / 'train' / 'class0' / f'image{suffix.upper()}')
    for name in ('a.heic', 'b.HEIC', 'c.heic', 'notes.txt', 'LICENSE', 'scan.pdf', 'film.mpg', 'table.h5',
                 'drawing.eps'):
        (imagenet / 'train' / 'class0' / name).write_bytes(b'no image that Pillow decodes')
    write_image(imagenet / 'train' / 'beside.png')
    dataset, _ = build_dataset(True, parse('--data_path', imagenet, '--nb_classes', 2))
    printed = capsys.readouterr().out
    assert len(dataset) == 8 + len(written)
    for path, _ in dataset.dataset.samples:
        assert load_image(path).mode == 'RGB'
    passed_over, beside = printed.splitlines()
    assert passed_over == (f'{imagenet}/train: passed over 9 files that Pillow cannot read: 3 .heic, 1 '
                           f'without a suffix, 1 .eps, 1 .mpg, 1 .txt, 1 .pdf and 1 more')
    assert beside == f'{imagenet}/train: passed over 1 image beside the class folders'
    build_dataset(False, parse('--data_path', imagenet, '--nb_classes', 2))
    assert capsys.readouterr().out == ''  # nothing is passed over there


def test_hidden_files_and_those_of_systems_are_neither_classes_nor_images_nor_told(imagenet, capsys):
    train = imagenet / 'train'
    for where in (train, train / 'class0'):
        for folder in ('.ipynb_checkpoints', '@eaDir', '__MACOSX', 'lost+found', '.hidden', '$RECYCLE.BIN',
                       'System Volume Information', '#recycle'):
            write_image(where / folder / '0.png')
        for name in ('._0.png', '.DS_Store', 'Thumbs.db', 'desktop.ini'):
            (where / name).write_bytes(b'of a system')
    dataset, _ = build_dataset(True, parse('--data_path', imagenet, '--nb_classes', 2))
    assert (len(dataset), dataset.dataset.classes) == (8, ['class0', 'class1'])
    assert capsys.readouterr().out == ''
    hidden = imagenet.rename(imagenet.with_name('.data'))  # the user's own folder may be hidden
    assert len(find_images(hidden / 'train')[0]) == 8


def test_links_that_lead_back_up_are_not_followed(imagenet):
    class0 = imagenet / 'val' / 'class0'
    (class0 / 'self').symlink_to(class0)
    (class0 / 'root').symlink_to(imagenet / 'val')
    (class0 / 'top').symlink_to(imagenet)
    elsewhere = imagenet / 'elsewhere'
    write_image(elsewhere / 'own.png')
    (class0 / 'there').symlink_to(elsewhere)
    (elsewhere / 'and_back').symlink_to(class0)
    dataset, _ = build_dataset(False, parse('--data_path', imagenet, '--nb_classes', 2))
    assert [Path(path).relative_to(imagenet / 'val').as_posix() for path, index in dataset.samples
            if index == 0] == [
        *(f'class0/{i}.png' for i in range(4)), 'class0/there/own.png']
    assert len(dataset) == 4 + 3 + 1


def flat(folder: Path, images: int = 9) -> None:
    for i in range(images):
        write_image(folder / f'{i}.png')


def test_images_without_class_folders_are_told_in_a_short_line(tmp_path):
    for i in range(1000):
        write_image(tmp_path / 'train' / f'class{i:03}' / '0.png')
    flat(tmp_path / 'val')
    with pytest.raises(utils.UserError, match=re.escape(
            f'{tmp_path}/val holds images but no class folders (0.png, 1.png, 2.png, 3.png, 4.png, 5.png and '
            f'3 more): --data_path {tmp_path} must hold train/CLASS/*.jpg and val/CLASS/*.jpg')):
        build_dataset(False, parse('--data_path', tmp_path))
    write_image(tmp_path / 'val' / 'class999' / '0.png')
    write_image(tmp_path / 'val' / 'other' / '0.png')
    with pytest.raises(utils.UserError, match=re.escape(
            'class000, class001, class002, class003, class004, class005 and 993 more; not in')) as found:
        build_dataset(False, parse('--data_path', tmp_path))
    assert len(str(found.value)) < 400
    for folder in (tmp_path / 'train').iterdir():
        (folder / '0.png').rename(folder / '0.heic')
    with pytest.raises(utils.UserError, match=r'no image in the class folders class000, .* and 994 more '
                                              r'\(passed over 1000 files '
                       r'that Pillow cannot read: 1000 \.heic\)') as found:
        build_dataset(True, parse('--data_path', tmp_path))
    assert len(str(found.value)) < 400


def test_a_folder_of_the_wrong_level_is_told_with_what_it_holds(imagenet, tmp_path):
    def message(*options):
        with pytest.raises(utils.UserError) as found:
            build_dataset(True, parse('--nb_classes', 2, *options))
        return str(found.value)
    assert message('--data_path', imagenet / 'train').endswith(
        f'It holds the folders class0, class1: pass its parent, --data_path {imagenet}')
    told = message('--data_path', tmp_path)
    assert told.endswith(f'It holds the folders data: pass --data_path {imagenet}')
    assert 'There is no nowhere either' in message('--data_path', 'nowhere')
    image_folder = ['--data_set', 'image_folder', '--data_path']
    assert f'pass --data_path {imagenet}/train --eval_data_path {imagenet}/val' in message(*image_folder,
                                                                                           imagenet)
    assert 'train/class0 holds images but no class folders' in message(*image_folder,
                                                                       imagenet / 'train' / 'class0')
    (tmp_path / 'above').mkdir()
    (imagenet / 'train').rename(tmp_path / 'above' / 'train')
    assert f'the 2 seem to be one level lower, in {tmp_path}/above/train' in message(*image_folder,
                                                                                     tmp_path / 'above')


# --- images
# ------------------------------------------------------------------------------------------------------------


def tiff(path: Path, pixels: np.ndarray, **changed: int) -> None:
    """`pixels` as Pillow writes them, with other numbers in the tags bits, photometric or planar."""
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    for name, value in changed.items():
        tag, before = {'bits': (258, 16), 'photometric': (262, 1)}[name]
        old = struct.pack('<HHIHH', tag, 3, 1, before, 0)
        assert data.count(old) == 1
        data = data.replace(old, struct.pack('<HHIHH', tag, 3, 1, value, 0))
    path.write_bytes(data)


def test_deep_images_are_those_of_8_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    full = grey * 257  # 0 ... 65535
    for name, kind in (('a.png', '<u2'), ('b.tif', '<u2'), ('c.tif', '>u2')):
        Image.fromarray(full.astype(kind)).save(tmp_path / name)
    Image.fromarray(full).save(tmp_path / 'd.tif', compression='tiff_lzw')
    (tmp_path / 'e.pgm').write_bytes(b'P5 16 16 65535\n' + full.astype('>u2').tobytes())
    # 12 bits, and it says so
    (tmp_path / 'f.pgm').write_bytes(b'P5 16 16 4095\n' + (full >> 4).astype('>u2').tobytes())
    (tmp_path / 'g.pgm').write_text('P2 16 16 65535\n' + ' '.join(map(str, full.ravel())))
    tiff(tmp_path / 'h.tif', 65535 - full, photometric=0)  # white is zero
    twelve = full >> 4
    tiff(tmp_path / 'i.tif', twelve, bits=12)
    packed = np.stack([twelve.ravel()[::2] >> 4, (twelve.ravel()[::2] & 15) << 4 | twelve.ravel()[1::2] >> 8,
                       twelve.ravel()[1::2] & 255], 1).astype(np.uint8).tobytes()
    data = (tmp_path / 'i.tif').read_bytes()
    (tmp_path / 'i.tif').write_bytes(data.replace(twelve.tobytes(), packed.ljust(2 * twelve.size, b'\0')))
    if features.check('jpg_2000'):
        Image.fromarray(full).save(tmp_path / 'j.jp2')
    for path in sorted(tmp_path.iterdir()):
        found = np.asarray(load_image(str(path)))
        assert (found == grey[..., None]).all(), path.name
    Image.fromarray(grey * 256).save(tmp_path / 'shifted.png')
    assert np.abs(np.asarray(load_image(str(tmp_path / 'shifted.png'))).astype(int) - grey[...,
                                                                                           None]).max() <= 1


def test_images_of_an_unknown_range_are_refused_by_name(tmp_path):
    grey = np.arange(256).reshape(16, 16)
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / 'integers.tif')
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / 'floats.tif')
    (tmp_path / 'floats.pfm').write_bytes(b'Pf 16 16 -1.0\n' + (grey / 255).astype('<f4').tobytes())
    for name, kind in (('integers.tif', 'signed or 32-bit integers'),
                       ('floats.tif', 'floating-point numbers'), ('floats.pfm', 'floating-point numbers')):
        with pytest.raises(utils.UserError, match=f'cannot read the image .*{name} .its pixels are {kind}, '
                                                  'whose range no file tells: save it with 8 or 16 bits'):
            load_image(str(tmp_path / name))


def test_12_bits_in_16_are_told_once(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / 'twelve.png')
    with pytest.warns(UserWarning, match='16 bits that use 12 of them at most') as told:
        warnings.simplefilter('default')
        for _ in range(3):
            assert load_image(str(tmp_path / 'twelve.png')).getextrema() == ((0, 16),) * 3
    assert len(told) == 1


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
def test_images_of_8_bits_are_pillows_own_rgb(mode, tmp_path):
    path = tmp_path / 'a.tif'
    photo(16, 16).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        assert load_image(str(path)).tobytes() == image.convert('RGB').tobytes()


def test_the_first_frame_stands_for_all(tmp_path):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    assert load_image(str(tmp_path / 'a.gif')).getpixel((0, 0)) == (255, 0, 0)


def test_the_limit_against_bombs_is_named_and_can_be_raised_also_in_loader_processes(imagenet, monkeypatch):
    def first(*options, workers=1):
        dataset, _ = build_dataset(False, parse('--data_path', imagenet, '--nb_classes', 2, *options))
        return next(iter(DataLoader(dataset, None, **distributed.worker_options(workers))))[0]
    image = first('--max_image_pixels', 40 * 40)
    with pytest.raises(utils.UserError, match='it has 40 x 40 pixels: the limit against decompression bombs '
                                              'is 1599 pixels; pass a larger --max_image_pixels'):
        first('--max_image_pixels', 40 * 40 - 1)
    assert torch.equal(image, first())
    photo(40, 50).save(imagenet / 'val' / 'class0' / '0.png')
    # beyond twice the limit Pillow itself refuses
    monkeypatch.setattr(image_data.decode, 'MAX_IMAGE_PIXELS', 900)
    with pytest.raises(ValueError, match=r'2000 pixels.: the limit against decompression bombs is 899 '):
        decode_image(imagenet / 'val' / 'class0' / '0.png', 899)
    monkeypatch.undo()
    assert load_image(imagenet / 'val' / 'class0' / '0.png', 2000).size == (40, 50)
    with pytest.raises(SystemExit):
        parse('--max_image_pixels', '0')


def test_empty_and_lacking_files_are_told_as_such(tmp_path):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'link.png').symlink_to(tmp_path / 'nowhere.png')
    (tmp_path / 'text.png').write_text('text')
    for name, reason in (('empty', 'the file is empty'), ('link', 'No such file or directory'),
                         ('text', 'it is damaged, or no')):
        with pytest.raises(utils.UserError, match=rf'cannot read the image .*{name}\.png \({reason}'):
            load_image(str(tmp_path / f'{name}.png'))


# ------------------------------------------------------------------------------------------------------------


def test_cifar_tells_how_to_download(tmp_path):
    with pytest.raises(utils.UserError, match='download=True'):
        build_dataset(True, parse('--data_set', 'CIFAR', '--data_path', tmp_path))


def test_cifar_100_is_read(tmp_path, monkeypatch):
    """On a file of CIFAR-100's layout made here; only its checksum is not asked for."""
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'test'):
        pixels = np.random.RandomState(0).randint(0, 256, (4, 3072)).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({'data': pixels, 'fine_labels': [1, 2, 99, 0]}))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names': [f'c{i}' for i in range(100)]}))
    monkeypatch.setattr(datasets.datasets.CIFAR100, '_check_integrity', lambda self: True)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *_: True)
    args = parse('--data_set', 'CIFAR', '--data_path', tmp_path, '--input_size', '32')
    train, classes = build_dataset(True, args)
    assert (len(train), classes) == (4, 100)
    assert train[2][0].shape == (3, 32, 32)
    assert train[2][1] == 99


def normalised(image: Image.Image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> torch.Tensor:
    return TF.normalize(TF.to_tensor(image), mean, std)


@pytest.mark.parametrize(('options', 'shape'), [
    (['--input_size', '224'], ('crop', 256, 224)),
    (['--input_size', '320'], ('crop', 365, 320)),
    (['--input_size', '384'], ('warp', 384, 384)),
    (['--input_size', '224', '--test_size', '384'], ('warp', 384, 384)),
    (['--input_size', '384', '--test_size', '224'], ('crop', 256, 224)),
    (['--input_size', '384', '--crop_pct', '0.96'], ('crop', 400, 384)),
    (['--input_size', '32'], ('crop', 32, 32)),
])
def test_evaluation_transforms_are_the_published_ones(options, shape):
    kind, resized, size = shape
    image = photo()
    if kind == 'warp':
        expected = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        expected = TF.center_crop(image.resize((int(resized * 500 / 375), resized), Image.Resampling.BICUBIC),
                                  [size, size])
    torch.testing.assert_close(build_transform(False, parse(*options))(image), normalised(expected),
                               atol=1e-5, rtol=0)


def test_mean_and_std_can_be_a_half():
    transform = build_transform(False, parse('--imagenet_default_mean_and_std', 'false'))
    assert transform(Image.new('RGB', (256, 256), 'white')).unique().tolist() == [1.0]


@pytest.mark.parametrize('aa', ['rand-m9-mstd0.5-inc1', 'rand-m0', 'original', 'originalr', 'v0',
                                'augmix-m3-w3', 'none', ''])
def test_augmentation_survives_posterize_to_0_bits(aa):
    transform = build_transform(True, parse('--aa', aa, '--input_size', '64'))
    image = photo(80, 80)
    random.seed(0)
    for _ in range(100):
        assert transform(image).shape == (3, 64, 64)
    operations = [op for step in transform.transforms for op in getattr(step, 'ops', [])]
    operations += [op for step in transform.transforms for policy in getattr(step, 'policy', [])
                   for op in policy]
    assert bool(operations) == (aa not in ('none', ''))
    for operation in operations:
        if operation.name.startswith('Posterize'):
            assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
            assert operation.aug_fn(image, 4).getextrema() != ((0, 0),) * 3
            assert operation.aug_fn(image, 12).tobytes() == image.tobytes()  # as of rand-m30-mmax30


def test_an_augmentation_that_does_not_exist_is_named():
    with pytest.raises(utils.UserError, match="--aa 'sharpen'"):
        build_transform(True, parse('--aa', 'sharpen'))


def test_augmentation_depends_on_seed_epoch_and_index_alone(imagenet):
    def images(seed=0, epoch=0, workers=0, order=range(8)):
        args = parse('--data_path', imagenet, '--nb_classes', '2', '--input_size', '48', '--seed', seed)
        dataset, _ = build_dataset(True, args)
        loader = DataLoader(dataset, None, sampler=[(epoch, i) for i in order],
                            **distributed.worker_options(workers))
        loaded = {i: image for i, (image, _) in zip(order, loader, strict=True)}
        return torch.stack([loaded[i] for i in range(8)])
    first = images()
    assert torch.equal(first, images(workers=2, order=[3, 1, 0, 2, 7, 6, 5, 4]))
    assert not torch.equal(first, images(epoch=1))
    assert torch.equal(images(epoch=1), images(epoch=1, workers=2))
    assert not torch.equal(first, images(seed=1))


def test_workers_that_stay_know_the_epoch(imagenet):
    dataset, _ = build_dataset(True, parse('--data_path', imagenet, '--nb_classes', '2', '--input_size',
                                           '48'))
    sampler = ResumableSampler(dataset, 0)
    loader = DataLoader(dataset, None, sampler=sampler, **distributed.worker_options(1))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (image, _), key in zip(loader, sampler, strict=True):
            assert key[0] == epoch and torch.equal(image, dataset[key][0])
