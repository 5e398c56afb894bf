"""--loader fast against the published pipeline, and what that pipeline's own speed may not change."""
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import image_data.fast
import main
import utils
from conftest import SHORT, assert_same, run_main, run_to_step
from datasets import build_dataset, build_transform, finish_batches
from image_data.decode import decode_image
from image_data.fast import decode_image_fast, is_usual
from image_data.jpeg import read_header
from image_data.normalise import ImageToTensor, Normalise

# torchvision's decoder is deprecated; a later one has none
pytestmark = pytest.mark.filterwarnings('ignore:The image decoding and encoding:DeprecationWarning')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse(*options):
    return main.get_args_parser().parse_args([str(option) for option in options])


def photo(width: int = 101, height: int = 75) -> Image.Image:
    """Smooth, with edges and some noise, as photographs are."""
    draw = np.random.RandomState(0)
    small = Image.fromarray(draw.randint(0, 256, (5, 6, 3)).astype(np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3:height // 2, width // 4:width // 2] = 255
    return Image.fromarray(np.clip(pixels + draw.randint(-4, 5, pixels.shape), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    file = BytesIO()
    (image or photo()).save(file, 'JPEG', **{'quality': 90, **options})
    return file.getvalue()


def with_exif() -> bytes:
    """Turned by its orientation, and with a thumbnail, which is a JPEG of its own."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes() + jpeg(photo(16, 12))
    return jpeg(exif=content)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def padded(data: bytes) -> bytes:
    """With bytes of padding before the frame's marker."""
    return patched(data, b'\xff\xc0\x00\x11', b'\xff\xff\xff\xc0\x00\x11')


ADOBE = b'Adobe\x00\x64\x00\x00\x00\x00'
USUAL = {
    'grey': jpeg(photo().convert('L')), '4:4:4': jpeg(subsampling=0), '4:2:2': jpeg(subsampling=1),
    '4:2:0': jpeg(subsampling=2), 'progressive': jpeg(progressive=True),
    'progressive grey': jpeg(photo().convert('L'), progressive=True), 'restarts': jpeg(restart_marker_rows=1),
    'exif': with_exif(), 'padded': padded(jpeg()), 'comment': jpeg(comment=b'\xff\xc0 no frame'),
    'of one pixel': jpeg(photo(1, 1)),
}
RARE = {
    'CMYK': jpeg(photo().convert('CMYK')), 'RGB': jpeg(keep_rgb=True),
    'YCCK': patched(jpeg(photo().convert('CMYK')), ADOBE + b'\0', ADOBE + b'\2'),
    # no encoder at hand writes these: their pixels are wrong, but both must say the same of them
    '4:4:0': patched(jpeg(subsampling=2), b'\x03\x01\x22\x00', b'\x03\x01\x12\x00'),
    '12 bits': patched(jpeg(), b'\xff\xc0\x00\x11\x08', b'\xff\xc1\x00\x11\x0c'),
    'lossless': patched(jpeg(), b'\xff\xc0\x00\x11', b'\xff\xc3\x00\x11'),
}


def outcome(decode, file: object, *limit: int) -> object:
    """The pixels, or the error's text."""
    try:
        found = decode(file, *limit)
    except ValueError as error:
        return str(error)
    found = found.permute(1, 2, 0).numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    return found.shape, found.tobytes()


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [*USUAL, *RARE])
def test_every_jpeg_has_the_pixels_of_pillow_and_the_usual_ones_by_torchvision(name, tmp_path, monkeypatch):
    data, by_torchvision = {**USUAL, **RARE}[name], []

    def decode_jpeg(*arguments):
        by_torchvision.append(name)
        return decode(*arguments)
    decode = image_data.fast.decode_jpeg
    monkeypatch.setattr(image_data.fast, 'decode_jpeg', decode_jpeg)
    (tmp_path / 'a.jpg').write_bytes(data)
    expected = outcome(decode_image, BytesIO(data))
    assert isinstance(expected, tuple) or name in ('12 bits', 'lossless')
    assert outcome(decode_image_fast, BytesIO(data)) == outcome(decode_image_fast, str(tmp_path / 'a.jpg'))
    assert outcome(decode_image_fast, BytesIO(data)) == expected
    assert bool(by_torchvision) == (name in USUAL)


def test_a_header_says_what_decides():
    header = read_header(USUAL['4:2:0'])
    assert header == (101, 75, 8, ((2, 2), (1, 1), (1, 1)), 0xC0, False)
    assert read_header(USUAL['exif'])[:2] == (101, 75)  # not the thumbnail's
    assert read_header(USUAL['progressive']).frame == 0xC2
    assert read_header(RARE['12 bits']).precision == 12
    assert read_header(RARE['RGB']).adobe and read_header(RARE['CMYK']).adobe
    scan = USUAL['grey'].index(b'\xff\xda')
    for end in range(scan):
        assert read_header(USUAL['grey'][:end]) is None
    assert is_usual(read_header(USUAL['grey'][:scan + 4]))
    assert read_header(USUAL['grey'].replace(b'\xff\xdb', b'\xff\x01')) is None  # no marker of a segment


def test_damaged_files_have_the_outcome_of_pillow(capfd):
    draw = random.Random(0)
    outcomes = set()
    for i in range(200):
        data = bytearray(draw.choice([USUAL['4:2:0'], USUAL['progressive'], USUAL['grey']]))
        at = draw.randrange(len(data))
        kind = i % 4
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = bytes([255, draw.randrange(256)])
        else:
            del data[at:at + draw.randrange(1, 20)]
        expected = outcome(decode_image, BytesIO(data))
        assert outcome(decode_image_fast, BytesIO(data)) == expected
        outcomes.add((kind, isinstance(expected, tuple)))
    assert len(outcomes) >= 7  # with errors and without
    capfd.readouterr()  # libjpeg prints warnings


def test_limits_and_errors_are_those_of_the_published_pipeline(tmp_path):
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'text.jpg').write_text('text')
    (tmp_path / 'cut.jpg').write_bytes(USUAL['4:2:0'][:1000])
    photo().save(tmp_path / 'a.png')
    (tmp_path / 'b.jpg').write_bytes(USUAL['4:2:0'])
    for name in ('empty.jpg', 'text.jpg', 'cut.jpg', 'lacking.jpg', 'a.png', 'b.jpg'):
        for limit in (101 * 75, 101 * 75 - 1):
            path = str(tmp_path / name)
            assert outcome(decode_image_fast, path, limit) == outcome(decode_image, path, limit)
    assert 'pass a larger --max_image_pixels' in outcome(decode_image_fast, str(tmp_path / 'b.jpg'), 100)
    assert 'truncated' in outcome(decode_image_fast, str(tmp_path / 'cut.jpg'))


def test_an_unreadable_image_is_named(imagenet):
    broken = imagenet / 'val' / 'class0' / '0.png'
    broken.write_bytes(USUAL['4:2:0'][:1000])
    dataset, _ = build_dataset(False, parse('--data_path', imagenet, '--nb_classes', 2, '--loader', 'fast'))
    with pytest.raises(utils.UserError, match=f'cannot read the image {broken} .*truncated.*check_images'):
        dataset[0]


# --- transforms ---------------------------------------------------------------------------------------------


def both(is_train: bool, *options) -> tuple:
    """The transforms of both loaders, without what changes colours or erases."""
    options = '--aa', 'none', '--color_jitter', 0, '--reprob', 0, *options
    return tuple(build_transform(is_train, parse(*options, '--loader', name)) for name in ('pillow', 'fast'))


@pytest.mark.parametrize(('is_train', 'options', 'bound'), [
    (True, [], 2), (True, ['--train_interpolation', 'bilinear'], 1),
    (True, ['--train_interpolation', 'random'], 2), (True, ['--train_interpolation', 'lanczos'], 0),
    (True, ['--train_interpolation', 'nearest'], 0), (True, ['--input_size', 32], 2),
    (False, [], 2), (False, ['--input_size', 384], 2), (False, ['--crop_pct', 1], 2),
    (False, ['--input_size', 32], 2)])
def test_a_sample_is_that_of_the_published_transform_within_two_grey_levels(is_train, options, bound):
    published, fast = both(is_train, *options)
    for index, size in enumerate([(101, 75), (75, 101), (300, 260), (400, 31), (20, 20)]):
        found = []
        for transform, image in ((published, photo(*size)), (fast, TF.pil_to_tensor(photo(*size)))):
            utils.seed_generators('sample', 0, 0, index)
            found.append(transform(image))
        expected = (found[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        assert found[1].dtype == torch.uint8 and found[1].is_contiguous()
        assert (found[1] - expected).abs().max() < bound + 0.01


@pytest.mark.parametrize('aa', ['rand-m9-mstd0.5-inc1', 'raug15', 'original', 'none'])
def test_a_sample_takes_the_random_numbers_that_it_takes_as_published(aa):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    states = []
    for name in ('pillow', 'fast'):
        transform = build_transform(True, parse('--aa', aa, '--reprob', 0, '--loader', name))
        utils.seed_generators('sample', 0, 0, 0)
        for _ in range(5):
            transform(photo())
        states.append(state())
    assert states[0] == states[1]


def test_augmentation_is_timms_on_the_image_that_the_crop_gives():
    """With a crop that both do alike, every operation included, samples are equal to the bit."""
    options = '--train_interpolation', 'nearest', '--reprob', 0, '--loader'
    transforms = [build_transform(True, parse(*options, name)) for name in ('pillow', 'fast')]
    normalise = Normalise(MEAN, STD)
    for index in range(30):
        found = []
        for transform in transforms:
            utils.seed_generators('sample', 0, 0, index)
            found.append(transform(photo()))
        assert torch.equal(found[0], normalise(found[1]))


@pytest.mark.parametrize('size', [(1, 1), (16, 16), (7, 5)])
def test_to_tensor_and_normalise_are_torchvisions_to_the_bit(size):
    values = np.arange(256).repeat(3).reshape(16, 16, 3) if size == (16, 16) else np.arange(
        3 * size[0] * size[1]).reshape(size[1], size[0], 3)
    image = Image.fromarray(values.astype(np.uint8))
    for mean, std in ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3)):
        expected = TF.normalize(TF.to_tensor(image), mean, std)
        found = ImageToTensor(mean, std)(image)
        assert torch.equal(found, expected) and found.is_contiguous()
        assert torch.equal(Normalise(mean, std)(TF.pil_to_tensor(image)[None])[0], expected)


# --- batches ------------------------------------------------------------------------------------------------


def finished(*options, images: int = 400, seed: int = 0) -> torch.Tensor:
    """Grey images of 16 x 16 pixels, normalised to one value, and erased."""
    finish = finish_batches(parse('--loader', 'fast', *options), None, torch.device('cpu'))
    utils.seed_generators('step', seed)
    return finish(torch.full((images, 3, 16, 16), 200, dtype=torch.uint8), torch.zeros(images))[0]


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_batches_are_erased_image_by_image_as_published(mode):
    batch = finished('--remode', mode)
    plain = finished('--reprob', 0)
    assert plain.flatten(2).std(2).max() == 0 and torch.equal(plain[0], plain[1])
    changed = batch != plain
    erased = changed.flatten(1).any(1)
    assert 0.15 < erased.float().mean() < 0.35  # of 400 images, at 0.25: more than four deviations
    places = {tuple(image.any(0).nonzero()[0].tolist()) for image in changed[erased]}
    assert len(places) > 20  # each has its own
    share = changed[erased].float().mean()
    assert 0.1 < share < 0.25  # of an image: from 0.02 to 1/3
    values = batch[changed]
    assert (values == 0).all() if mode == 'const' else abs(values.mean()) < 0.3 and 0.7 < values.std() < 1.3
    assert torch.equal(batch, finished('--remode', mode))
    assert not torch.equal(batch, finished('--remode', mode, seed=1))


def test_without_the_option_batches_are_mixed_alone():
    def mix(images, targets):
        return images, targets
    assert finish_batches(parse(), mix, torch.device('cpu')) is mix
    assert finish_batches(parse(), None, torch.device('cpu')) is None


# --- main.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def jpegs(imagenet):
    """The `imagenet` fixture, with JPEGs."""
    for path in imagenet.rglob('*.png'):
        Image.open(path).resize((60, 48)).save(path.with_suffix('.jpg'), quality=95)
        path.unlink()
    return imagenet


def test_a_run_stopped_in_an_epoch_ends_to_the_bit_like_one_that_was_not(jpegs, tmp_path):
    options = [*SHORT, '--data_path', jpegs, '--loader', 'fast', '--reprob', 0.9, '--save_ckpt_steps', 1,
               '--input_size', 48, '--output_dir']
    run_main(*options, tmp_path / 'whole')
    run_to_step(1, 1, *options, tmp_path / 'stopped')
    run_main(*options, tmp_path / 'stopped')
    one, other = (torch.load(tmp_path / name / 'latest.pth', weights_only=True)
                  for name in ('stopped', 'whole'))
    del one['args'], other['args']  # the folder is in there
    assert_same(one, other, 'latest.pth')
    assert (tmp_path / 'stopped' / 'log.txt').read_text() == (tmp_path / 'whole' / 'log.txt').read_text()


def test_evaluations_agree_with_the_published_ones(jpegs, tmp_path, capsys):
    run_main(*SHORT, '--data_path', jpegs, '--output_dir', tmp_path, '--epochs', 1)
    found = []
    for loader in ('pillow', 'fast'):
        capsys.readouterr()
        run_main(*SHORT, '--data_path', jpegs, '--eval', '--with_small_kernel_merged', '--resume',
                 tmp_path / 'latest.pth', '--loader', loader)
        printed = capsys.readouterr().out
        assert 'Kernels merged; on the first 6 images' in printed
        # Acc@1, Acc@5, loss
        found.append([float(number) for number in printed.splitlines()[-1].split()[2::2]])
    assert len(found[0]) == 3 and found[0] == pytest.approx(found[1], abs=0.01)


def test_a_torchvision_without_the_decoder_leaves_all_to_pillow(monkeypatch):
    expected = decode_image_fast(BytesIO(USUAL['4:2:0']))
    monkeypatch.setattr(image_data.fast, 'decode_jpeg', None)
    assert torch.equal(decode_image_fast(BytesIO(USUAL['4:2:0'])), expected)


def test_data_sets_without_files_give_the_published_samples():
    options = '--data_set', 'DIGITS', '--input_size', 32
    for is_train in (True, False):
        (published, _), (fast, _) = (
            build_dataset(is_train, parse(*options, '--reprob', 0, '--aa', 'none', '--loader', name))[0][0]
            for name in ('pillow', 'fast'))
        assert fast.dtype == torch.uint8
        torch.testing.assert_close(Normalise(MEAN, STD)(fast), published, atol=2.1 / 255 / min(STD), rtol=0)
