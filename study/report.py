"""Tabulate and draw what run.py measured.

python study/report.py

writes every run to study/results.json, draws study/results.png, and prints the table of study/README.md:
top-1 after the last epoch, mean and standard deviation over seeds; and the area that holds 0.5 and 0.99 of
the ERF.
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


def summary(runs: list[dict], task: str, network: str) -> dict:
    """Mean and standard deviation over the seeds of one network; None where nothing was run."""
    own = [run for run in runs if (run['task'], run['network']) == (task, network)]
    accuracies = [run['acc1'] for run in own]
    areas = {key: [run['erf'][key] for run in own if run.get('erf', {}).get(key)] for key in ('0.5', '0.99')}
    return {'seeds': len(own), 'mean': statistics.mean(accuracies) if own else None,
            'deviation': statistics.stdev(accuracies) if len(own) > 1 else None,
            'erf': {key: statistics.mean(values) if values else None for key, values in areas.items()}}


def table(runs: list[dict]) -> str:
    """In Markdown: a row for each network."""
    titles = ' | '.join(TITLES[task] for task in TASKS)
    lines = [f'| network | {titles} | ERF, 0.5 | ERF, 0.99 | seeds |', '|---' * (len(TASKS) + 4) + '|']
    for network in NETWORKS:
        cells, found = [], None
        for task in TASKS:
            found = summary(runs, task, network)
            spread = '' if found['deviation'] is None else f' ± {found["deviation"]:.1f}'
            cells.append('' if found['mean'] is None else f'{found["mean"]:.1f}{spread}')
        areas = summary(runs, 'fashion', network)['erf']
        cells += ['' if area is None else f'{area:.3f}' for area in areas.values()]
        lines.append(f'| {network} | ' + ' | '.join(cells) + f' | {found["seeds"]} |')
    return '\n'.join(lines)


def draw(runs: list[dict], path: Path) -> None:
    """Top-1 of every seed, and their mean, for each data set."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * len(TASKS), 4), layout='constrained')
    for panel, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for i, network in enumerate(NETWORKS):
            own = [run['acc1'] for run in runs if (run['task'], run['network']) == (task, network)]
            panel.scatter([i] * len(own), own, s=18, color='C0', alpha=0.6)
            if own:
                panel.hlines(statistics.mean(own), i - 0.3, i + 0.3, color='C1')
        panel.set_xticks(range(len(NETWORKS)), NETWORKS, rotation=60, ha='right', fontsize='small')
        panel.set_ylabel('top-1, percent')
        panel.set_title(f'{TITLES[task]}: each seed, and the mean')
        panel.grid(axis='y', alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
