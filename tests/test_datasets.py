"""Data sets and transforms."""
import pickle
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

import datasets
import main
import utils
from conftest import write_images
from datasets import ResumableSampler, build_dataset, build_transform


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
            f'--nb_classes is 1000, but {imagenet}/train has 2 class folders: pass --nb_classes 2 (with --finetune, to replace '
            'the head)')):
        build_dataset(True, parse('--data_path', imagenet))


def test_image_folder_takes_the_class_folders_parents(imagenet):
    args = parse('--data_set', 'image_folder', '--data_path', imagenet / 'train', '--eval_data_path', imagenet / 'val',
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
    args = parse('--data_set', 'image_folder', '--data_path', imagenet / 'train', '--eval_data_path', 'nowhere')
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
        next(iter(DataLoader(dataset, 2, **utils.worker_options(1))))


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
        expected = TF.center_crop(image.resize((int(resized * 500 / 375), resized), Image.Resampling.BICUBIC), [size, size])
    torch.testing.assert_close(build_transform(False, parse(*options))(image), normalised(expected), atol=1e-5, rtol=0)


def test_mean_and_std_can_be_a_half():
    transform = build_transform(False, parse('--imagenet_default_mean_and_std', 'false'))
    assert transform(Image.new('RGB', (256, 256), 'white')).unique().tolist() == [1.0]


@pytest.mark.parametrize('aa', ['rand-m9-mstd0.5-inc1', 'rand-m0', 'original', 'originalr', 'v0', 'augmix-m3-w3', 'none', ''])
def test_augmentation_survives_posterize_to_0_bits(aa):
    transform = build_transform(True, parse('--aa', aa, '--input_size', '64'))
    image = photo(80, 80)
    random.seed(0)
    for _ in range(100):
        assert transform(image).shape == (3, 64, 64)
    operations = [op for step in transform.transforms for op in getattr(step, 'ops', [])]
    operations += [op for step in transform.transforms for policy in getattr(step, 'policy', []) for op in policy]
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
        loader = DataLoader(dataset, None, sampler=[(epoch, i) for i in order], **utils.worker_options(workers))
        loaded = {i: image for i, (image, _) in zip(order, loader, strict=True)}
        return torch.stack([loaded[i] for i in range(8)])
    first = images()
    assert torch.equal(first, images(workers=2, order=[3, 1, 0, 2, 7, 6, 5, 4]))
    assert not torch.equal(first, images(epoch=1))
    assert torch.equal(images(epoch=1), images(epoch=1, workers=2))
    assert not torch.equal(first, images(seed=1))


def test_workers_that_stay_know_the_epoch(imagenet):
    dataset, _ = build_dataset(True, parse('--data_path', imagenet, '--nb_classes', '2', '--input_size', '48'))
    sampler = ResumableSampler(dataset, 0)
    loader = DataLoader(dataset, None, sampler=sampler, **utils.worker_options(1))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (image, _), key in zip(loader, sampler, strict=True):
            assert key[0] == epoch and torch.equal(image, dataset[key][0])
