"""Tabulate and draw what run.py measured.

python study/report.py

writes every run to study/results.json, draws study/results.png, and prints the table of study/README.md:
top-1 after the last epoch, and the part of the area that holds 0.5 and 0.99 of the ERF, 1 where no centred
square does; mean and standard deviation over seeds.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

from study.networks import NETWORKS
from study.run import ROOT, TASKS
from utils import UserError, script

TITLES = {'fashion': 'Fashion-MNIST', 'digits': 'digits'}
THRESHOLDS = '0.5', '0.99'


def get_args_parser() -> argparse.ArgumentParser:
    """Where run.py put its results, and where the report goes."""
    parser = argparse.ArgumentParser('report.py', description='Tabulate and draw the study')
    parser.add_argument('--output', type=Path, default=ROOT / 'study_output', metavar='FOLDER')
    parser.add_argument('--json', type=Path, default=ROOT / 'study' / 'results.json', metavar='FILE')
    parser.add_argument('--plot', type=Path, default=ROOT / 'study' / 'results.png', metavar='FILE')
    return parser


def main(args: argparse.Namespace) -> None:
    """Read, write, draw, print. Raises UserError where there is no result."""
    runs = read_runs(args.output)
    args.json.write_text(json.dumps(runs, indent=1) + '\n')
    draw(runs, args.plot)
    print(table(runs))


def read_runs(output: Path) -> list[dict]:
    """Every result, in the order of the plan."""
    found = [json.loads(file.read_text()) for file in output.glob('*/*/*/result.json')]
    if not found:
        raise UserError(f'there is no result in {output}: python study/run.py')
    return sorted(found, key=lambda run: (list(TASKS).index(run['task']), NETWORKS.index(run['network']),
                                          run['seed']))


def measured(runs: list[dict], task: str, network: str) -> dict[str, list[float]]:
    """What the seeds of a network gave: top-1 in percent, and parts of the area by thresholds of the ERF."""
    own = [run for run in runs if (run['task'], run['network']) == (task, network)]
    found = {'top-1': [run['acc1'] for run in own]}
    for threshold in THRESHOLDS:
        found[threshold] = [run['erf'][threshold] or 1.0 for run in own if 'erf' in run]
    return found


def mean_and_spread(values: list[float], digits: int) -> str:
    """'mean ± standard deviation', without the latter of one value, or '' of none."""
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}' if values else ''


def table(runs: list[dict]) -> str:
    """In Markdown: a row for each network."""
    titles = ' | '.join([f'{TITLES[task]}, top-1' for task in TASKS] + [f'ERF, {t}' for t in THRESHOLDS])
    lines = [f'| network | {titles} | seeds |', '|---' * (len(TASKS) + len(THRESHOLDS) + 2) + '|']
    for network in NETWORKS:
        of_tasks = [measured(runs, task, network)['top-1'] for task in TASKS]
        areas = measured(runs, 'fashion', network)
        cells = [mean_and_spread(values, 1) for values in of_tasks]
        cells += [mean_and_spread(areas[threshold], 2) for threshold in THRESHOLDS]
        lines.append(f'| {network} | {" | ".join(cells)} | {max(map(len, of_tasks))} |')
    return '\n'.join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """Each seed and their mean: top-1 for each data set, and the area of half the ERF."""
    from matplotlib.figure import Figure
    panels = {f'{TITLES[task]}: top-1, percent': (task, 'top-1') for task in TASKS}
    panels[f'{TITLES["fashion"]}: part of the area with half the ERF'] = 'fashion', '0.5'
    figure = Figure(figsize=(4.5 * len(panels), 4), layout='constrained')
    for panel, (title, (task, what)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, network in enumerate(NETWORKS):
            values = measured(runs, task, network)[what]
            panel.scatter([i] * len(values), values, s=18, color='C0', alpha=0.6)
            if values:
                panel.hlines(statistics.mean(values), i - 0.3, i + 0.3, color='C1')
        panel.set_xticks(range(len(NETWORKS)), NETWORKS, rotation=60, ha='right', fontsize='small')
        panel.set_title(title, fontsize='medium')
        panel.grid(axis='y', alpha=0.3)
    figure.suptitle('dots: seeds; lines: their means')
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
