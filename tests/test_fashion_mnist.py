"""--data_set FMNIST, on files of a few images in the published format."""
import gzip

import numpy as np
import pytest
import torch

from conftest import TOY, log_lines, run_main
from image_data.fashion_mnist import FashionMNIST, read_idx, write_idx
from utils import UserError


@pytest.fixture
def files(tmp_path):
    """24 training and 12 test images; every class has its own brightness. One file is not gzipped."""
    random = np.random.RandomState(0)
    for part, count in (('train', 24), ('t10k', 12)):
        labels = np.arange(count) % 10
        images = random.randint(0, 20, (count, 28, 28)) + 23 * labels[:, None, None]
        write_idx(tmp_path / f'{part}-images-idx3-ubyte.gz', images)
        write_idx(tmp_path / f'{part}-labels-idx1-ubyte.gz', labels)
    packed = tmp_path / 't10k-labels-idx1-ubyte.gz'
    packed.with_suffix('').write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    return tmp_path


def test_images_and_labels_are_those_of_the_files(files):
    for train, count in ((True, 24), (False, 12)):
        dataset = FashionMNIST(train, folder=str(files))
        assert len(dataset) == count and dataset.targets == [i % 10 for i in range(count)]
        image, label = dataset[7]
        assert (image.mode, image.size, label) == ('RGB', (28, 28), 7) and np.asarray(image).min() >= 23 * 7


def test_the_format_is_the_published_one(files):
    content = gzip.decompress((files / 'train-images-idx3-ubyte.gz').read_bytes())
    assert content[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 24, 0, 0, 0, 28, 0, 0, 0, 28])
    assert read_idx(str(files), 'train-images-idx3-ubyte').shape == (24, 28, 28)


def test_main_trains_on_it(files, tmp_path):
    run_main(*TOY, '--data_set', 'FMNIST', '--data_path', files, '--batch_size', '8', '--epochs', '1',
             '--warmup_epochs', '0', '--lr', '1e-3', '--output_dir', tmp_path / 'run')
    (line,) = log_lines(tmp_path / 'run')
    assert 0 <= line['test_acc1'] <= 100
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    assert len(checkpoint['model']['head.bias']) == 10


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda file: file.unlink(), 'apt-get install dataset-fashion-mnist'),
    (lambda file: file.write_bytes(file.read_bytes()[:-40]), 'train-images-idx3-ubyte.gz cannot be read'),
    (lambda file: file.write_bytes(gzip.compress(b'\0\0\x0d\x03' + bytes(12))), 'no bytes in the IDX format'),
    (lambda file: file.write_bytes(gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 9, *[0, 0, 0, 28] * 2]))),
     'cannot be read: cannot reshape'),
    (lambda file: write_idx(file, np.zeros((3, 28, 28))), 'holds 3 images and 24 labels')])
def test_files_that_are_missing_or_not_whole_are_told(spoil, message, files):
    spoil(files / 'train-images-idx3-ubyte.gz')
    with pytest.raises(UserError, match=message):
        FashionMNIST(True, folder=str(files))
