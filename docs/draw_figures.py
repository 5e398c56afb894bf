"""Draw the READMEs' pictures and write their tables, from what was measured.

python docs/draw_figures.py

writes docs/block.png and docs/speed.png, and the tables that stand between `<!-- measured: NAME -->` and
`<!-- end -->`. The figures come from three files, each written by one command, on a machine that does nothing
else:

python tools/benchmark.py conv --stages --batch 16 --json docs/stages_cpu.json
python tools/benchmark.py conv --batch 1 --kernels 3 7 13 21 31 --json docs/table1_cpu.json
python tools/benchmark.py model --mode inference --batch 1 --peers --json docs/model_cpu.json

The last compares with ONNX Runtime and OpenVINO where they are installed. Needs matplotlib:
pip install '.[plot]'.
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ('README.md', 'large_kernel_conv/README.md', 'tools/README.md')
MARKED = re.compile(r'(<!-- measured: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
PASSES = {'forward': 'forward', 'forward+backward': 'forward + backward'}
LAYOUTS = ('NCHW', 'channels_last')
# how the contestants of tools/benchmark.py are called in the tables; ours are in bold
CONTESTANTS = {
    'published': 'as published', 'ours eager': '**ours, merged and folded**',
    'ours compiled': '**ours, compile_for_inference**', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO',
    'torch.compile': 'merged, compiled with freezing', 'timm eager': 'timm',
    'timm compiled': 'timm, compiled with freezing'}
GREY, BLUE, LIGHT = '#9a9a9a', '#1f6fb4', '#d5e6f5'


# ---- Tables ------------------------------------------------------------------------------------------------


def measured(name: str) -> dict:
    """What tools/benchmark.py wrote into docs/NAME_cpu.json."""
    return json.loads((ROOT / 'docs' / f'{name}_cpu.json').read_text())


def number(value: float) -> str:
    """Three digits."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def times(ratio: float) -> str:
    """How many times as fast: two digits, or all before the point."""
    return f'{ratio:.0f}' if ratio >= 10 else f'{ratio:.1f}'


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def where(content: dict) -> str:
    """Machine, threads, version and day of a measurement."""
    machine, version = content['machine'], content['versions']['torch'].split('+')[0]
    return (f'{machine["name"]}, {content["arguments"]["threads"]} threads, torch {version}, '
            f'{machine["date"].split()[0]}')


def milliseconds(rows: list[dict], contestant: str, layout: str | None = None) -> float:
    """A contestant's time, in one memory format or in the better one."""
    return min(row['ms'] for row in rows
               if row['contestant'] == contestant and layout in (None, row['layout']))


def groups_of(content: dict) -> dict[tuple, list[dict]]:
    """The results for each (channels, side, kernel, pass)."""
    groups = {}
    for row in content['results']:
        key = (row['channels'], row['resolution'], row['kernel'], row['pass'])
        groups.setdefault(key, []).append(row)
    return groups


def headline() -> str:
    """What the second picture shows, in a sentence."""
    content = measured('stages')
    (_, _, kernel, _), rows = list(groups_of(content).items())[1]  # stage 1, with backward
    gain = milliseconds(rows, 'nn.Conv2d') / milliseconds(rows, 'ours')
    return (f'Forward and backward, a {kernel}x{kernel} layer of stage 1 is **{times(gain)} times** as fast '
            f'as `nn.Conv2d` in its\nbetter memory format ({where(content)}).')


def stages() -> str:
    """RepLKNet-31B's layers: the better nn.Conv2d and the better one of ours."""
    content, rows = measured('stages'), {}
    for (channels, side, kernel, _), group in groups_of(content).items():  # forward, then with backward
        rows.setdefault(f'{channels} x {side} x {side}, K {kernel}', []).append(
            [milliseconds(group, contestant) for contestant in ('nn.Conv2d', 'ours')])
    lines = [[f'stage {i}: {layer}', *(number(pair[which]) for which in (0, 1) for pair in pairs),
              ', '.join(times(theirs / ours) for theirs, ours in pairs)]
             for i, (layer, pairs) in enumerate(rows.items(), 1)]
    head = ['', '`nn.Conv2d` forward', 'with backward', 'ours forward', 'with backward', 'times as fast']
    batch = content['arguments']['batch']
    return f'{where(content)}, float32, batch {batch}, milliseconds:\n\n{table(head, lines)}'


def formats() -> str:
    """RepLKNet-31B's layers in both memory formats."""
    content, lines = measured('stages'), []
    for (channels, side, kernel, what), group in groups_of(content).items():
        theirs, ours = ([milliseconds(group, contestant, layout) for layout in LAYOUTS]
                        for contestant in ('nn.Conv2d', 'ours'))
        gains = [times(a / b) for a, b in zip(theirs, ours, strict=True)]
        pairs = (map(number, theirs), map(number, ours), gains)
        lines.append([f'{channels} x {side} x {side}, K {kernel}', PASSES[what], *map(' / '.join, pairs)])
    columns = ('`nn.Conv2d`', 'ours', 'times as fast')
    head = ['layer', 'pass', *(f'{column}, NCHW / channels_last' for column in columns)]
    batch = content['arguments']['batch']
    return f'{where(content)}, float32, batch {batch}, milliseconds:\n\n{table(head, lines)}'


def table1() -> str:
    """The paper's Table 1: how many times as fast as the better nn.Conv2d."""
    content, lines = measured('table1'), {}
    for row in content['results']:
        kernels = lines.setdefault(f'{row["resolution"]}, {PASSES[row["pass"]]}', {})
        kernels[row['kernel']] = times(row['best_ratio'])
    head = ['R, pass', *(f'K = {kernel}' for kernel in content['arguments']['kernels'])]
    rows = [[name, *kernels.values()] for name, kernels in lines.items()]
    return f'{where(content)}, float32, batch {content["arguments"]["batch"]}:\n\n{table(head, rows)}'


def results_of(content: dict) -> dict[tuple, list[dict]]:
    """Each contestant's results in inference, one for each batch."""
    found = {}
    for row in content['results']:
        if row['mode'] == 'inference':
            found.setdefault((row['model'], row['contestant'], row['layout'], row['dtype']), []).append(row)
    return found


def inference() -> str:
    """Whole models in inference."""
    content = measured('model')
    lines = [[model, CONTESTANTS[contestant], layout, dtype, *(number(row['images_per_s']) for row in rows)]
             for (model, contestant, layout, dtype), rows in results_of(content).items()]
    versions = [f', {CONTESTANTS[name]} {content["versions"][name]}' for name in ('onnxruntime', 'openvino')
                if name in content['versions']]
    batches = [f'batch {batch}' for batch in content['arguments']['batch']]
    head = ['model', '', 'memory format', 'dtype', *batches]
    return f'{where(content)}{"".join(versions)}; images/s:\n\n{table(head, lines)}'


TABLES = {function.__name__: function
          for function in (headline, stages, formats, table1, inference)}


def with_tables(text: str) -> str:
    """A README's text with its tables as they were measured."""
    return MARKED.sub(lambda found: f'{found[1]}{TABLES[found[2]]()}\n{found[3]}', text)


# ---- Pictures ----------------------------------------------------------------------------------------------


def box(axes, x: float, y: float, width: float, height: float, text: str, color: str = 'white') -> None:
    """A labelled rectangle around (x, y)."""
    from matplotlib.patches import Rectangle
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor='black', zorder=2))
    axes.text(x, y, text, ha='center', va='center', fontsize=9, zorder=3)


def line(axes, *points: tuple[float, float], arrow: bool = True) -> None:
    """A line through the points, with a head at its end."""
    axes.plot(*zip(*points, strict=True), color='black', linewidth=1, zorder=0)
    if arrow:
        style = {'arrowstyle': '->', 'shrinkA': 0, 'shrinkB': 0}
        axes.annotate('', points[-1], points[-2], zorder=0, arrowprops=style)


def draw_row(axes, y: float, title: str, merged: bool) -> None:
    """One RepLKNet block from left to right, its depthwise kernels drawn to scale."""
    axes.text(0, y + 1.45, title, fontsize=11, weight='bold')
    axes.text(0.15, y, 'x', ha='center', va='center', fontsize=11)
    line(axes, (0.3, y), (11.9, y))
    line(axes, (0.55, y), (0.55, y - 1.45), (10.95, y - 1.45), (10.95, y - 0.17))
    axes.text(1.0, y - 1.38, 'shortcut', fontsize=8, va='bottom')
    box(axes, 1.25, y, 0.8, 0.6, 'BN')
    box(axes, 2.75, y, 1.3, 0.6, '1 x 1, BN\nReLU')
    if merged:
        box(axes, 5.6, y, 1.86, 1.86, '31 x 31\ndepthwise\n+ bias', LIGHT)
    else:
        axes.plot([4.1, 7.3], [y, y], color='white', linewidth=3, zorder=1)
        for side, dy, text in ((1.86, 0.3, '31 x 31\ndepthwise'), (0.3, -1.02, '')):
            line(axes, (4.05, y), (4.05, y + dy), (5.6 - side / 2, y + dy))
            line(axes, (5.6 + side / 2, y + dy), (6.3 + 0.4, y + dy))
            line(axes, (7.2, y + dy), (7.35, y + dy), (7.35, y), arrow=False)
            box(axes, 5.6, y + dy, side, side, text, LIGHT)
            box(axes, 6.95, y + dy, 0.5, 0.42, 'BN')
        axes.text(5.35, y - 1.02, '5 x 5 ', fontsize=9, ha='right', va='bottom')
        line(axes, (7.3, y), (7.7, y), arrow=False)
        box(axes, 7.5, y, 0.34, 0.34, '+')
    box(axes, 8.35, y, 0.8, 0.6, 'ReLU')
    box(axes, 9.85, y, 1.3, 0.6, '1 x 1, BN')
    box(axes, 10.95, y, 0.34, 0.34, '+')


def draw_block(path: Path) -> None:
    """The block as it is trained, and with its kernels merged."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 5.7), layout='constrained')
    axes = figure.subplots()
    draw_row(axes, 3.7, 'as trained', merged=False)
    draw_row(axes, 0, 'merged for inference: the same outputs', merged=True)
    axes.set(xlim=(-0.1, 12.1), ylim=(-1.7, 5.5), aspect='equal')
    axes.axis('off')
    figure.savefig(path, dpi=110)


def draw_layers(axes) -> None:
    """Milliseconds of a layer of each stage, forward and backward."""
    content = measured('stages')
    groups = {key[1:3]: rows for key, rows in groups_of(content).items() if key[3] != 'forward'}
    theirs, ours = ([milliseconds(rows, contestant) for rows in groups.values()]
                    for contestant in ('nn.Conv2d', 'ours'))
    positions = range(len(groups))
    axes.bar(positions, theirs, 0.4, color=GREY, label='nn.Conv2d')
    bars = axes.bar([x + 0.4 for x in positions], ours, 0.4, color=BLUE, label='this repository')
    gains = [f'{times(a / b)} x' for a, b in zip(theirs, ours, strict=True)]
    axes.bar_label(bars, gains, padding=2, fontsize=9)
    names = [f'{kernel}x{kernel}\n{side} px' for side, kernel in groups]
    axes.set_xticks([x + 0.2 for x in positions], names)
    batch = content['arguments']['batch']
    axes.set(yscale='log', ylabel='ms', title=f'One depthwise layer, forward + backward, batch {batch}')
    axes.set_xlabel(where(content), fontsize=8)
    axes.legend(frameon=False)


def draw_models(axes) -> None:
    """Images/s of RepLKNet-31B in inference, at the largest batch that was measured."""
    content = measured('model')
    batch = max(content['arguments']['batch'])
    rows = [row for row in content['results']
            if (row['model'], row['mode'], row['batch']) == ('RepLKNet-31B', 'inference', batch)]
    rows.sort(key=lambda row: row['images_per_s'])
    names = []
    for row in rows:
        name = CONTESTANTS[row['contestant']].strip('*')
        names.append(name + (f', {row["layout"]}' if row['contestant'] == 'published' else '')
                     + (', bfloat16' if row['dtype'] == 'bfloat16' else ''))
    colors = [BLUE if row['contestant'].startswith('ours') else GREY for row in rows]
    bars = axes.barh(names, [row['images_per_s'] for row in rows], color=colors)
    axes.bar_label(bars, fmt='%.1f', padding=2, fontsize=9)
    axes.set_title(f'RepLKNet-31B, inference, images/s, batch {batch}')
    axes.set_xlabel(where(content), fontsize=8)
    axes.margins(x=0.12)


def draw_speed(path: Path) -> None:
    """Layers and whole models against what one would use otherwise."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.8), layout='constrained')
    left, right = figure.subplots(1, 2)
    draw_layers(left)
    draw_models(right)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    draw_block(ROOT / 'docs' / 'block.png')
    draw_speed(ROOT / 'docs' / 'speed.png')
    for name in READMES:
        (ROOT / name).write_text(with_tables((ROOT / name).read_text()))
