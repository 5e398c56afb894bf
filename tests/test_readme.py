"""The README's own commands, run: shortened where they need ImageNet, GPUs or published weights."""
import importlib
import re
import shlex

import pytest
import torch

import main
import replknet
from conftest import ROOT, run_main, run_script
from replknet_zoo import MODELS, create_model
from tools import benchmark, toeplitz_model

README = (ROOT / 'README.md').read_text()
BASH = '\n'.join(re.findall(r'```bash\n(.*?)```', README, re.DOTALL))
MAIN_COMMANDS = [line for line in BASH.splitlines() if ' main.py ' in line]
# a toy in the place of the model, few images and one process in the place of ImageNet on GPUs
SHORTER = ['--model', 'RepLKNet-31T', '--device', 'cpu', '--num_workers', '0', '--batch_size', '4', '--update_freq', '1',
           '--epochs', '1', '--warmup_epochs', '0', '--nb_classes', '2']


def test_there_are_commands_to_run():
    assert len(MAIN_COMMANDS) >= 10


@pytest.mark.parametrize('command', MAIN_COMMANDS)
def test_main_commands_run(command, imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    launcher, options = command.split(' main.py ')
    assert re.match(r'python|torchrun', launcher)
    options = shlex.split(options)
    args = main.get_args_parser().parse_args(options)
    assert args.model in MODELS
    for file in filter(None, (args.resume, args.finetune)):
        # evaluation takes the weights whole; finetuning must replace a head of other classes
        torch.save({'model': create_model('RepLKNet-31T', num_classes=2 if args.eval else 1000).state_dict()}, file)
    shorter = [*SHORTER, '--data_path', imagenet / 'train' if args.data_set == 'image_folder' else imagenet]
    if args.output_dir:
        shorter += ['--output_dir', tmp_path / 'run']
    if args.data_set == 'DIGITS':
        shorter += ['--batch_size', '256']
    run_main(*options, *shorter)
    printed = capsys.readouterr().out
    if args.eval:
        assert printed.splitlines()[-1].startswith('* Acc@1 ')
    else:
        assert (tmp_path / 'run' / 'latest.pth').exists()
        assert ('with a new head for 2 classes' in printed) == bool(args.finetune)


def test_replknet_shows_the_equivalence():
    assert '\npython replknet.py\n' in '\n' + BASH
    done = run_script('python', 'replknet.py')
    assert done.returncode == 0, done.stdout
    differences = [float(number) for number in re.findall(r'largest difference of the logits (\S+) of', done.stdout)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r'```python\n(.*?)```', README, re.DOTALL)[1].replace('RepLKNet-31B', 'RepLKNet-31T')
    torch.save(create_model('RepLKNet-31T').state_dict(), re.search(r"'(\S+\.pth)'", code)[1])
    names = {}
    exec(code, names)
    assert any('lkb_reparam' in key for key in names['model'].state_dict())


def test_the_other_python_examples_run(capsys):
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)[1:]
    names = {'x': torch.randn(1, 128, 40, 40), 'weight': torch.randn(128, 1, 31, 31), 'bias': torch.randn(128)}
    exec(blocks[0], names)
    assert names['layer'](names['x']).shape == names['y'].shape == names['x'].shape
    assert 'cpu fft' in capsys.readouterr().out
    names = {'replknet': replknet, 'model': create_model('RepLKNet-31T'), 'x': torch.randn(2, 3, 32, 32)}
    exec(blocks[1], names)
    assert names['logits'].dtype == torch.float32
    assert len(blocks) == 3 and 'efficientnet_lite0' in blocks[2]  # which needs a package that the tests do not install


def test_benchmark_commands_are_understood():
    commands = re.findall(r'^python tools/benchmark.py (.*)', BASH, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        benchmark.check_options(benchmark.get_args_parser().parse_args(shlex.split(command)))


@pytest.mark.parametrize('command', re.findall(r'^python ((?:erf|tools)/\w+\.py .*)', BASH, re.MULTILINE))
def test_commands_of_scripts_are_understood(command):
    script, *options = shlex.split(command)
    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    module.get_args_parser().parse_args(options)  # an unknown option would exit


def test_counted_figures_are_those_of_the_model():
    layer = (64, 384, 32, 32)
    counted = toeplitz_model.cost(layer, 31, torch.float16, 'forward')
    text = ' '.join(README.split())
    figures = re.search(r'\((\d+) x (\d+) x (\d+) x (\d+), K = 31\) takes (\d+) GFLOP forward, (\d+) of them useful: '
                        r"at the tensor cores' peak ([\d.]+) ms on an A100, ([\d.]+) on an H100", text)
    *shape, executed, useful, a100, h100 = map(float, figures.groups())
    assert tuple(shape) == layer and (executed, useful) == (round(counted.executed / 1e9), round(counted.useful / 1e9))
    for gpu, limit in (('A100', a100), ('H100', h100)):
        assert 1e3 * counted.limit(gpu, 'float16') == pytest.approx(limit, abs=0.005)


def test_symptoms_in_the_troubleshooting_table_are_messages_of_the_code():
    table = README.split('## Troubleshooting')[1].split('##')[0]
    code = ''.join(path.read_text() for path in [*ROOT.glob('*.py'), *ROOT.glob('large_kernel_conv/*.py')])
    code = re.sub(r"'\s*\n\s*f?'", '', code)  # messages that run over lines
    symptoms = re.findall(r'^\| `([^`]+)`', table, re.MULTILINE)
    assert len(symptoms) > 8
    for symptom in symptoms:
        for fragment in re.split(r' ?\.\.\. ?|\bN\b|1000', symptom):
            assert fragment.strip() in code, fragment


def test_links_and_files_exist():
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target
    defined = set(re.findall(r'^\[(w\d+)\]: https://', README, re.MULTILINE))
    used = set(re.findall(r'\]\[(w\d+)\]', README))
    assert used == defined != set()
    assert not re.search(r'@[A-Z]+@|TODO|XXX', README)
