"""RepMLPNet's published test.py: accuracy of weights as trained, injected, or checked to be the same.

python test.py IMAGENET train RepMLPNet-D256-train-acc80.828.pth -a RepMLPNet-D256 -r 256
python test.py IMAGENET deploy RepMLPNet-D256-deploy.pth -a RepMLPNet-D256 -r 256
python test.py IMAGENET check RepMLPNet-D256-train-acc80.828.pth -a RepMLPNet-D256 -r 256

IMAGENET holds val/ with a folder for each class. `check` injects, and prints by how much the logits differ
and how many predictions agree. The last line is that of main.py's evaluation.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the training scripts are not installed

import options
from datasets import build_dataset, evaluation_loader
from distributed import select_device
from engine import evaluate, merge_and_compare
from tools import common
from utils import UserError, script


def get_args_parser() -> argparse.ArgumentParser:
    """The published options."""
    parser = argparse.ArgumentParser('test.py', description='RepMLPNet: evaluate weights')
    parser.add_argument('data', metavar='DATA', help='a folder with val/')
    parser.add_argument('mode', choices=['train', 'deploy', 'check'],
                        help='form of the weights; check: inject those of the training form, and compare')
    parser.add_argument('weights', metavar='WEIGHTS')
    parser.add_argument('-a', '--arch', default='RepMLPNet-B224', help='default: RepMLPNet-B224')
    parser.add_argument('-b', '--batch-size', default=100, type=int)
    parser.add_argument('-r', '--resolution', default=224, type=int, help='pixels a side; default: 224')
    parser.add_argument('-j', '--workers', default=4, type=int)
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate. Raises UserError for what a user can mend; nothing is evaluated then."""
    _, model, _ = common.read_model(args.weights, args.arch, 'model|module')
    if model.is_merged and args.mode != 'deploy':
        raise UserError(f'{args.weights} is injected already and has no training form: use the mode '
                        'deploy')
    words = ['--eval', '--model', args.arch, '--data_path', args.data, '--input_size', args.resolution,
             '--batch_size', args.batch_size, '--num_workers', args.workers, '--nb_classes',
             model.head.out_features]
    evaluation = options.get_args_parser().parse_args(list(map(str, words)))
    options.check_options(evaluation)
    options.check_image_sizes(evaluation, model)
    device = select_device('auto')
    dataset, _ = build_dataset(False, evaluation)
    loader = evaluation_loader(evaluation, dataset, device)
    model.to(device)
    if args.mode == 'check':
        merge_and_compare(model, loader, device)
    elif args.mode == 'deploy' and not model.is_merged:
        print(f'{args.weights} is of the training form: injected, which is exact up to rounding')
        model.structural_reparam()
    evaluate(loader, model, device)


if __name__ == '__main__':
    with script():
        main(get_args_parser().parse_args())
