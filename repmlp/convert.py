"""RepMLPNet's published convert.py: locality injection of a file of weights, over tools/convert.py.

python convert.py RepMLPNet-D256-train-acc80.828.pth RepMLPNet-D256-deploy.pth -a RepMLPNet-D256

Reads whatever main.py reads, and writes a bare state dict. What it has written is read back and compared.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tools are not installed

import tools.convert  # by its full name: this file is called convert too
from utils import script


def get_args_parser() -> argparse.ArgumentParser:
    """The published options."""
    parser = argparse.ArgumentParser('convert.py', description='RepMLPNet: inject the convolutions')
    parser.add_argument('load', metavar='LOAD', help='weights as trained')
    parser.add_argument('save', metavar='SAVE', help='.pth to write')
    parser.add_argument('-a', '--arch', default='RepMLPNet-B224', help='default: RepMLPNet-B224')
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert. Raises UserError for what a user can mend: nothing is written then."""
    tools.convert.main(tools.convert.get_args_parser().parse_args(
        [args.load, args.save, '--model', args.arch, '--to', 'bare']))


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
