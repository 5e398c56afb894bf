"""The report of a GPU as Markdown: what was measured beside what is published."""
from collections.abc import Callable, Iterable

from tools.benchmarks import published
from tools.benchmarks.common import LAYOUTS

MODEL_COLUMNS = {'model': 'model', 'form': 'form', 'way': 'way', 'dtype': 'dtype', 'layout': 'memory format',
                 'batch': 'batch', 'size': 'px', 'implementation': 'depthwise', 'ms': 'ms',
                 'images_per_s': 'images/s', 'memory_mib': 'peak MiB', 'depthwise_share': 'depthwise share'}
STEP_COLUMNS = {**MODEL_COLUMNS, 'host_ms': 'host ms', 'host_share': "host's share"}
CHECK_COLUMNS = {'layer': 'layer', 'precision': 'precision', 'layout': 'memory format',
                 'implementation': 'implementation', 'output': 'output', 'input_gradient': 'input gradient',
                 'weight_gradient': 'weight gradient', 'bound': 'bound', 'passed': ''}


def report(content: dict) -> str:
    """The Markdown of a report's content, whole or as far as it has come."""
    parts = [f'# {content["machine"]["name"]}\n\n{summary(content)}']
    for name, section in content['sections'].items():
        title, explained, tables = SECTIONS[name]
        parts.append(f'## {title}\n\n{explained}\n\n{tables(section["rows"])}{left_out(section)}')
    return '\n\n'.join(parts) + '\n'


def summary(content: dict) -> str:
    """Where and when, of what versions, and whether the checks passed."""
    machine, gpu = content['machine'], content['gpu'] or {}
    facts = [f'{key} {number(value) if isinstance(value, float) else value}'
             for key, value in {**gpu, **content['versions']}.items()]
    checks, bad = content['sections']['checks']['rows'], failed_checks(content)
    verdict = f'**{len(bad)} of {len(checks)} checks FAILED.**' if bad else f'{len(checks)} checks passed.'
    toys = ' Toys on small batches: no figure tells of the models.' if content['arguments']['small'] else ''
    return (f'{machine["date"]}; {", ".join(facts)}. Random weights and images.{toys} Written in '
            f'{content["seconds"] / 60:.1f} of {content["arguments"]["minutes"]:g} minutes.\n\n{verdict}')


def failed_checks(content: dict) -> list[dict]:
    """The rows of the checks that did not pass, or failed."""
    return [row for row in content['sections']['checks']['rows'] if not row.get('passed')]


def left_out(section: dict) -> str:
    """A paragraph that names what there was no time for, or nothing."""
    if not section['left_out']:
        return ''
    names = [' '.join(map(str, label.values())) for label in section['left_out']]
    return f'\n\nLeft out for want of time: {"; ".join(names) if section["rows"] else "all of it"}.'


# ---- Tables ------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """With one decimal; below 10 three digits."""
    return f'{value:,.1f}' if value >= 10 else f'{value:.3g}'


def cell(value: object) -> str:
    """A value in a table, '-' for none."""
    if isinstance(value, bool):
        return 'pass' if value else '**FAIL**'
    if value is None:
        return '-'
    return number(value) if isinstance(value, float) else str(value).replace('|', '\\|')


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def of_columns(columns: dict[str, str]) -> Callable[[list[dict]], str]:
    """A function that shows rows in these columns, a failed one with its reason at the end."""
    def show(rows: list[dict]) -> str:
        return table([*columns.values(), 'note'],
                     [[cell(row.get(key)) for key in columns] + [cell(row.get('note', ''))] for row in rows])
    return show


def layers(rows: list[dict]) -> str:
    """nn.Conv2d and ours in both memory formats, a line for a layer, data type and pass."""
    lines = []
    for (layer, dtype, what), group in grouped(rows, 'layer', 'dtype', 'pass').items():
        times = {(row['contestant'], row['layout']): row for row in group if 'ms' in row}
        pairs = [' / '.join(cell(times.get((contestant, layout), {}).get('ms')) for layout in LAYOUTS)
                 for contestant in ('nn.Conv2d', 'ours')]
        gain, names = (group[0].get('best_ratio'),
                       sorted({row['implementation'] for row in group if row.get('contestant') == 'ours'}))
        lines.append([layer, dtype, what, *pairs, ', '.join(names), cell(gain),
                      cell(group[0].get('note', ''))])
    return table(['layer', 'dtype', 'pass', '`nn.Conv2d` ms, NCHW / channels_last', 'ours', 'implementation',
                  'times as fast', 'note'], lines)


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows with the same values of these keys, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def table_1(rows: list[dict]) -> str:
    """The published rows and ours: milliseconds of 24 layers, by the map's and the kernel's side."""
    lines = {(side, f'{who}, {published.CARD} (published)'):
             dict(zip(published.TABLE_1_KERNELS, times, strict=True))
             for side, both in published.TABLE_1.items() for who, times in both.items()}
    for row in rows:
        if 'ms' in row:
            times = lines.setdefault((row['resolution'], f'{row["contestant"]}, here'), {})
            best = min(times.get(row['kernel'], float('inf')), published.TABLE_1_LAYERS * row['ms'])
            times[row['kernel']] = best  # of the two memory formats
    kernels = sorted({kernel for times in lines.values() for kernel in times})
    ordered = sorted(lines.items(), key=lambda line: line[0][0])  # the published ones stay before ours
    text = table(['R', '', *(f'K = {kernel}' for kernel in kernels)],
                 [[str(side), who, *(cell(times.get(kernel)) for kernel in kernels)]
                  for (side, who), times in ordered])
    return text + ''.join(f'\n\n{row["layer"]}: {row["note"]}' for row in rows if 'note' in row)


def table_6(rows: list[dict]) -> str:
    """The published images/s and ours, a line for a model and resolution."""
    groups = {key: [] for key in published.TABLE_6} | grouped(rows, 'model', 'size')
    lines = []
    for (name, size), group in groups.items():
        here = {row['dtype']: row for row in group}
        found = [here.get(dtype, {}) for dtype in ('float32 ieee', 'float32 TF32')]
        notes = '; '.join(row['note'] for row in found if 'note' in row)
        lines.append([name, str(size), cell(published.TABLE_6.get((name, size))),
                      *(cell(row.get('images_per_s')) for row in found),
                      *(cell(found[0].get(key)) for key in ('depthwise_share', 'memory_mib')), cell(notes)])
    return table(['model', 'px', f'{published.CARD} (published)', 'here', 'here, in TF32', 'depthwise share',
                  'peak MiB', 'note'], lines)


SHARES = ('The depthwise share is the part of the time that passes in depthwise convolutions, of any size, '
          'between events before and after each.')
# of each section: its title, what its numbers are, and what shows its rows
SECTIONS = {
    'checks': ('Checks',
               'Largest errors of the convolution against `F.conv2d` in float64, of the largest value.',
               of_columns(CHECK_COLUMNS)),
    'inference': ('Inference', f'Weights and images in the data type. {SHARES}', of_columns(MODEL_COLUMNS)),
    'training': ('A training step',
                 f'Autocast, cross-entropy, backward, fused AdamW; a loss scale in float16. {SHARES} The '
                 "host's time is that of a step on two images, which leave the GPU little to do, until it "
                 'returns; its share is of the step on the whole batch.', of_columns(STEP_COLUMNS)),
    'table 6': ("The paper's Table 6",
                f'Images/s in inference, float32, batch {published.TABLE_6_BATCH}, merged and folded, NCHW. '
                'The published card has no TF32.', table_6),
    'stages': ("The stages' layers",
               'Milliseconds of one layer. Times as fast: the better `nn.Conv2d` over the better of ours.',
               layers),
    'table 1': ("The paper's Table 1",
                f'Milliseconds of {published.TABLE_1_LAYERS} depthwise layers, forward, float32, '
                f'({published.TABLE_1_BATCH}, {published.TABLE_1_CHANNELS}, R, R), in the better memory '
                f'format; here {published.TABLE_1_LAYERS} times the time of one layer.', table_1),
    'RepMLPNet': ('RepMLPNet', 'In evaluation, as trained and with its locality injected.',
                  of_columns(MODEL_COLUMNS)),
    'compiled inference': ('Compiled inference',
                           '`replknet_zoo.compile_for_inference`, or `torch.compile` of the same merged and '
                           'folded model.', of_columns(MODEL_COLUMNS)),
    'compiled training': ('A compiled training step', 'The step above, the model by `torch.compile`.',
                          of_columns(STEP_COLUMNS)),
}
