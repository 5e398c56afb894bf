"""Measure and draw the matrices that erf/visualize_erf.py wrote.

python erf/analyze_erf.py --source resnet101_erf_matrix.npy --heatmap_save resnet101_heatmap.png
python erf/analyze_erf.py --source a.npy b.npy --heatmap_save a_and_b.png --json a_and_b.json

prints, for each share of the contributions, the side of the smallest centred square that holds more, and the
part of the image's area that it takes: the larger, the larger the effective receptive field. It starts at
once, for it imports nothing that would load torch: its errors are plain ValueErrors.
"""
import argparse
import importlib.util
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


def read_matrix(path: Path) -> np.ndarray:
    """The square matrix of contributions in a .npy file.

    Raises ValueError where there is none, or no ERF can be measured on it.
    """
    try:
        matrix = np.load(path)
    except FileNotFoundError as error:
        raise ValueError(f'--source {path}: there is no such file; erf/visualize_erf.py --save_path {path} '
                         'writes it') from error
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'--source {path} cannot be read as a .npy file: {reason}') from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in 'fiu':
        kind = getattr(matrix, 'dtype', type(matrix).__name__)
        raise ValueError(f'--source {path} holds no matrix of numbers, but {kind}')
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f'--source {path} has shape {matrix.shape}: a square matrix (H, H) is needed')
    if not np.isfinite(matrix).all():
        raise ValueError(f'--source {path} has {np.count_nonzero(~np.isfinite(matrix))} values that are NaN '
                         'or infinite: make it anew with erf/visualize_erf.py, which skips such images')
    if matrix.min() < 0 or not (matrix + 1).max() > 1:
        raise ValueError(f'--source {path} has values from {matrix.min()} to {matrix.max()}: no contribution '
                         'may be negative, nor may all be zero or too small for log10(1 + score)')
    return matrix


def rescale(matrix: np.ndarray) -> np.ndarray:
    """log10(x + 1), as the scores differ in magnitude, over its maximum, so that models can be compared."""
    logarithm = np.log10(matrix + 1)
    return logarithm / logarithm.max()


def smallest_square(matrix: np.ndarray, threshold: float) -> int | None:
    """The side of the smallest centred square with more than `threshold` of the sum; None if there is none.

    matrix (H, H); the centre is at H // 2, sides are 2i + 1 with 0 < i < H // 2.
    """
    centre, total = len(matrix) // 2, matrix.sum()
    for i in range(1, centre):
        inside = slice(centre - i, centre + i + 1)
        if matrix[inside, inside].sum() / total > threshold:
            return 2 * i + 1
    return None


def analyze(path: Path) -> tuple[np.ndarray, dict]:
    """The rescaled matrix in the file; its label, what visualize_erf.py wrote beside it, and its squares."""
    matrix = rescale(read_matrix(path))
    side = len(matrix)
    squares = []
    for threshold in THRESHOLDS:
        found = smallest_square(matrix, threshold)
        ratio = None if found is None else (found / side) ** 2
        squares.append({'threshold': threshold, 'side': found, 'area_ratio': ratio})
    about = read_about(path)
    # of a file of one's own its name, not its folders
    label = f'{Path(about["model"]).name}, {Path(about["weights"]).name} weights' if about else path.stem
    return matrix, {'source': str(path), 'label': label, 'pixels': side, **about, 'squares': squares}


def read_about(path: Path) -> dict:
    """What visualize_erf.py wrote beside the matrix; empty where there is nothing of the kind."""
    try:
        about = json.loads(path.with_suffix('.json').read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) and {'model', 'weights', 'num_images'} <= about.keys() else {}


def print_table(results: list[dict]) -> None:
    """A line for each matrix: side and area ratio of its squares."""
    width = max(len(result['label']) for result in results)
    print('side of the smallest centred square with more than this share of the contributions, and its part '
          'of the area')
    print(f'{"":{width}}  images  pixels' + ''.join(f'{threshold:>15}' for threshold in THRESHOLDS))
    for result in results:
        cells = ('not reached' if square['side'] is None else f'{square["side"]}  {square["area_ratio"]:.4f}'
                 for square in result['squares'])
        print(f'{result["label"]:{width}}  {result.get("num_images", "?"):>6}  {result["pixels"]:>6}'
              + ''.join(f'{cell:>15}' for cell in cells))
    if len({result['pixels'] for result in results}) > 1:
        print('WARNING: the matrices differ in size, and an ERF depends on it: compare at one --input_size')


def draw(matrices: list[np.ndarray], results: list[dict], path: Path) -> None:
    """The heat maps side by side, up to four in a row, under one colour scale."""
    from matplotlib.figure import Figure
    columns = min(len(matrices), 4)
    rows = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(3.6 * columns + 1.2, 4 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(matrices):]:
        panel.remove()
    for panel, matrix, result in zip(panels.flat, matrices, results, strict=False):
        image = panel.imshow(matrix, cmap='viridis', vmin=0, vmax=1)
        panel.set_title('\n'.join(textwrap.fill(part, 40) for part in result['label'].split(', ')),
                        fontsize='medium', parse_math=False)
        panel.tick_params(labelsize='small')
    figure.supxlabel('pixels', fontsize='medium')
    figure.colorbar(image, ax=figure.axes, label='log10(1 + score) / maximum')
    figure.savefig(path, dpi=120)


def get_args_parser() -> argparse.ArgumentParser:
    """The published options, and ours."""
    parser = argparse.ArgumentParser('analyze_erf.py',
                                     description='Measure and draw effective receptive fields')
    parser.add_argument('--source', nargs='+', default=[Path('temp.npy')], type=Path, metavar='FILE.npy')
    parser.add_argument('--heatmap_save', default='heatmap.png', type=Path, metavar='FILE.png')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the table there')
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for files that cannot be written."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ValueError("the heat map needs matplotlib, which is not installed: pip install -e '.[plot]'")
    for name in ('heatmap_save', 'json'):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f'--{name} {path}: there is no folder {path.parent}, make it first')
        if path is not None and path.is_dir():
            raise ValueError(f'--{name} {path} is a folder: name a file in it')
    if args.json and args.json.resolve() in {source.with_suffix('.json').resolve() for source in args.source}:
        raise ValueError(f'--json {args.json} is what visualize_erf.py wrote beside the matrix: name another '
                         'file')
    from matplotlib.backend_bases import FigureCanvasBase
    if args.heatmap_save.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f'--heatmap_save {args.heatmap_save}: its name must end in .png, or in .pdf, .svg, '
                         '.jpg')


def main(args: argparse.Namespace) -> None:
    """Print the table, write it, draw the heat maps. Raises ValueError for what a user can mend."""
    check_options(args)
    matrices, results = zip(*map(analyze, args.source), strict=True)
    labels = [result['label'] for result in results]
    for result, path in zip(results, args.source, strict=True):
        if labels.count(result['label']) > 1:  # two runs of one model
            result['label'] += f', {path.stem}'
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + '\n')
    draw(matrices, results, args.heatmap_save)
    print(f'Heat map: {args.heatmap_save}')


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # file names may hold what the terminal cannot show
    try:
        main(get_args_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f'ERROR: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
