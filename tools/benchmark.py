"""Time depthwise layers, whole models and the data loader against what one would use otherwise.

python tools/benchmark.py conv     the paper's Table 1: nn.Conv2d and large_kernel_conv, both memory formats
python tools/benchmark.py model    parameters, GMACs, images/s in inference and of a training step, its memory
python tools/benchmark.py accelerated   models of others before and after large_kernel_conv.accelerate
python tools/benchmark.py fc       RepMLPNet's FCs over pixels, stage by stage, against nn.Conv2d
python tools/benchmark.py data     images/s of a worker of the data loader, step by step
python tools/benchmark.py gpu      a report of a GPU in minutes: checks, layers, models; JSON and Markdown
python tools/benchmark.py tables   the published parameters and FLOPs, computed

Each command is a file in benchmarks/. The contestants of a comparison take turns in one process, so that what
else the machine does falls on all of them; a time is the median over a contestant's turns. Compare within a
run, and on a machine with nothing else to do.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

from tools.benchmarks import accelerated, common, conv, data, fc, gpu, model, tables
from utils import script

COMMANDS = {'conv': conv, 'model': model, 'accelerated': accelerated, 'fc': fc, 'data': data, 'gpu': gpu,
            'tables': tables}


def get_args_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser('benchmark.py', description='Time layers, models and the data loader')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.HELP)
        common.add_options(of_command)
        command.add_options(of_command)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for values that make no sense; set what depends on the machine."""
    common.check_options(args)
    COMMANDS[args.command].check_options(args)


def main(args: argparse.Namespace) -> None:
    """Measure, print and write what the options ask for. Raises UserError for what a user can mend."""
    check_options(args)
    COMMANDS[args.command].run(args)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
