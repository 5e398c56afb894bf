"""tools/check_images.py: every image that training would stop at is listed."""
import pytest
import torch
from PIL import Image

import utils
from test_tools import run_command
from tools import check_images


def run_check(*options) -> int:
    """tools/check_images.py in this process."""
    return check_images.main(check_images.get_args_parser().parse_args([str(option) for option in options]))


@pytest.mark.parametrize('workers', [0, 2])
def test_all_bad_images_are_listed_with_the_reason(workers, imagenet, capsys):
    train = imagenet / 'train'
    good = (train / 'class0' / '0.png').read_bytes()
    (train / 'class0' / '1.png').write_bytes(good[:200])
    (train / 'class1' / '.hidden.png').write_text('no image')
    (train / 'class1' / 'a.heic').write_text('passed over')
    (imagenet / 'val' / 'class0' / '2.png').write_bytes(b'')
    Image.new('F', (8, 8)).save(imagenet / 'val' / 'class1' / 'depth.tif')
    assert run_check(imagenet, '--num_workers', workers) == 3
    told, *bad, last = capsys.readouterr().out.splitlines()
    assert told == f'{imagenet}: passed over 1 file that Pillow cannot read: 1 .heic'
    assert [line.split(': ')[0] for line in bad] == [
        f'{imagenet}/{name}' for name in ('train/class0/1.png', 'val/class0/2.png', 'val/class1/depth.tif')]
    assert bad[1].endswith(': the file is empty') and 'floating-point numbers' in bad[2]
    assert last == '16 images checked, 3 cannot be read'
    assert run_check(imagenet / 'val' / 'class1', '--max_image_pixels', 1599, '--num_workers', 0) == 4
    assert 'pass a larger --max_image_pixels' in capsys.readouterr().out


def test_the_command_tells_by_its_exit_status(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, 'set_num_threads', lambda number: None)  # of this process
    command = [check_images.__file__, 'data', '--num_workers', '0']
    assert run_command(*command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '15 images checked, 0 cannot be read'
    (imagenet / 'val' / 'class0' / '0.png').write_text('no image')
    assert run_command(*command) == 1
    assert capsys.readouterr().out.splitlines()[-1] == '15 images checked, 1 cannot be read'


@pytest.mark.parametrize(('options', 'message'), [
    (['{}/nowhere'], 'there is no folder .*nowhere'),
    (['{}/empty'], 'empty holds no image'),
    (['{}/data', '--num_workers', '-1'], '--num_workers -1 must be at least 0'),
])
def test_bad_options_are_named(options, message, imagenet, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(utils.UserError, match=message):
        run_check(*(option.format(tmp_path) for option in options))
