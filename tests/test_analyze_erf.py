"""erf/analyze_erf.py: the squares that it prints, the files that it writes, and what it refuses."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run_script
from erf import analyze_erf


def run_analyze(*options) -> None:
    """erf/analyze_erf.py in this process."""
    analyze_erf.main(analyze_erf.get_args_parser().parse_args([str(option) for option in options]))


def test_squares_of_an_even_matrix_are_those_one_counts():
    matrix = analyze_erf.rescale(np.ones((8, 8), np.float32))
    # 9, 25 and 49 of 64 pixels; the first row and column lie in no centred square
    sides = [analyze_erf.smallest_square(matrix, threshold) for threshold in (0.2, 0.3, 0.5, 0.99)]
    assert sides == [5, 5, 7, None]


def test_a_share_must_exceed_the_threshold():
    matrix = np.zeros((10, 10))
    matrix[4:7, 4:7] = 9
    matrix[3, 3:8] = matrix[7, 3:7] = 9  # as much again around it
    assert analyze_erf.smallest_square(analyze_erf.rescale(matrix), 0.5) == 5
    matrix[3, 3] = 0
    assert analyze_erf.smallest_square(analyze_erf.rescale(matrix), 0.5) == 3


@pytest.mark.parametrize('side', [3, 31, 32])
def test_squares_of_any_matrix_are_those_of_a_plain_search(side):
    matrix = np.random.RandomState(side).gamma(0.3, 50, (side, side))
    matrix *= np.exp(-np.hypot(*np.indices((side, side)) - side / 2) / 4)
    logs = [[np.log10(value + 1) / np.log10(matrix.max() + 1) for value in row] for row in matrix.tolist()]
    for threshold in (0.2, 0.3, 0.5, 0.99):
        expected = None
        for i in reversed(range(1, side // 2)):
            rows = range(side // 2 - i, side // 2 + i + 1)
            if sum(logs[y][x] for y in rows for x in rows) > threshold * sum(map(sum, logs)):
                expected = 2 * i + 1
        assert analyze_erf.smallest_square(analyze_erf.rescale(matrix), threshold) == expected


def test_matrices_are_analysed_without_loading_torch():
    code = "import sys; from erf import analyze_erf; print('torch' in sys.modules)"
    done = run_script('python', '-c', code)
    assert done.stdout == 'False\n'


def test_several_matrices_share_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save('uniform.npy', np.ones((8, 8), np.float32))
    spread = np.zeros((16, 16), np.float32)
    spread[8, 8], spread[4, 8] = 9, 99  # logarithms 1 and 2
    np.save('spread.npy', spread)
    about = {'model': 'resnet18', 'weights': 'folder/best.pth', 'num_images': 6}
    Path('spread.json').write_text(json.dumps(about))
    run_analyze('--source', 'uniform.npy', 'spread.npy', '--json', 'table.json')
    table = json.loads(Path('table.json').read_text())
    assert [result['label'] for result in table] == ['uniform', 'resnet18, best.pth weights']
    assert table[1]['num_images'] == 6
    sides = [[square['side'] for square in result['squares']] for result in table]
    assert sides == [[5, 5, 7, None], [3, 3, 9, 9]]
    assert table[1]['squares'][0]['area_ratio'] == 9 / 256
    lines = capsys.readouterr().out.splitlines()
    assert ' '.join(lines[2].split()) == 'uniform ? 8 5 0.3906 5 0.3906 7 0.7656 not reached'
    assert ' '.join(lines[3].split()) == 'resnet18, best.pth weights 6 16 3 0.0352 3 0.0352 9 0.3164 9 0.3164'
    assert 'the matrices differ in size' in lines[4]
    with Image.open('heatmap.png') as one_row:
        assert one_row.width > 1.5 * one_row.height
    np.save('again.npy', spread)
    Path('again.json').write_text(json.dumps(about))
    run_analyze('--source', 'spread.npy', 'again.npy', '--json', 'table.json')
    assert [result['label'] for result in json.loads(Path('table.json').read_text())] == [
        'resnet18, best.pth weights, spread', 'resnet18, best.pth weights, again']
    run_analyze('--source', *['uniform.npy'] * 5)
    with Image.open('heatmap.png') as two_rows:
        assert two_rows.height > 1.5 * one_row.height


@pytest.mark.parametrize('content, message', [
    (None, 'no such file'),
    (b'text', 'cannot be read as a .npy file'),
    (np.ones((3, 8, 8)), r'shape \(3, 8, 8\)'),
    (np.ones((8, 9)), r'shape \(8, 9\)'),
    (np.full((8, 8), np.nan), '64 values that are NaN'),
    (-np.eye(8), 'values from -1.0'),
    (np.zeros((8, 8)), 'all be zero'),
    (np.array([['a', 'b'], ['c', 'd']]), 'no matrix of numbers'),
])
def test_bad_matrices_are_explained(content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / 'erf.npy').write_bytes(content)
    elif content is not None:
        np.save(tmp_path / 'erf.npy', content)
    with pytest.raises(ValueError, match=message):
        run_analyze('--source', tmp_path / 'erf.npy', '--heatmap_save', tmp_path / 'heatmap.png')


@pytest.mark.parametrize('options, message', [
    (['--heatmap_save', 'nowhere/heatmap.png'], 'there is no folder nowhere'),
    (['--heatmap_save', 'heatmap.xyz'], 'must end in .png'),
    (['--json', '.'], 'is a folder'),
    (['--json', 'erf.json'], 'erf.json is what visualize_erf.py wrote'),
])
def test_bad_outputs_are_explained(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save('erf.npy', np.ones((8, 8)))
    with pytest.raises(ValueError, match=message):
        run_analyze('--source', 'erf.npy', *options)
