"""The commands and examples of all READMEs: run where a toy and a few images do, else parsed."""
import importlib
import json
import re
import shlex
import shutil
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import main
import options
import replknet_zoo
import run_with_submitit
from conftest import ROOT, log_lines, relative_error, run_main, run_script
from docs import draw_figures
from image_data.eval_sets import NAMES, parse_eval_sets
from large_kernel_conv import toeplitz_model
from replknet_zoo.timm_models import ENTRYPOINTS, default_cfgs
from tools import benchmark

READMES = {name: (ROOT / name).read_text() for name in (
    'README.md', 'docs/training.md', 'docs/troubleshooting.md', 'large_kernel_conv/README.md',
    'tools/README.md', 'erf/README.md', 'segmentation/README.md', 'detection/README.md', 'repmlp/README.md',
    'replknet_zoo/README.md', 'study/README.md')}
ROOT_README, TRAINING = READMES['README.md'], READMES['docs/training.md']
EVERYTHING = '\n'.join(READMES.values())
# a toy in the place of the model, few images and one process in the place of ImageNet on GPUs
SHORTER = ['--model', 'RepLKNet-31T', '--device', 'cpu', '--num_workers', '0', '--update_freq', '1',
           '--epochs', '1', '--warmup_epochs', '0', '--nb_classes', '2', '--input_size', '32']


def commands_of(text: str) -> list[str]:
    """The commands of a text's bash blocks, each once and on one line, without comments."""
    lines = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.DOTALL)).replace('\\\n', ' ').splitlines()
    commands = [re.sub(r'(^|\s+)#.*', '', line).strip() for line in lines]
    return list(dict.fromkeys(filter(None, commands)))


def examples_of(text: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def sections_of(text: str) -> dict[str, str]:
    """Each heading's anchor, as GitHub makes it, with the text below it."""
    parts = re.split(r'^##+ (.*)$', text, flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-'): part
            for heading, part in zip(parts[1::2], parts[2::2], strict=True)}


COMMANDS = commands_of(EVERYTHING)
# run from a checkout of timm, which is not here
TIMMS_SCRIPTS = (r'python train\.py --device-modules replknet_zoo\.timm_models |'
                 r"python -c 'import runpy, replknet_zoo\.timm_models; ")
MAIN = [command for command in COMMANDS if ' main.py ' in command]
SUBMITTED = [command for command in COMMANDS if command.startswith('python run_with_submitit.py')]
SCRIPTS = [command for command in COMMANDS if re.match(r'python (erf|tools)/', command)]


def options_of(command: str) -> list[str]:
    """What stands behind main.py, or behind the script."""
    return shlex.split(command.split('main.py ')[-1] if ' main.py ' in command else command.split('.py ')[1])


def parse(command: str, monkeypatch: pytest.MonkeyPatch | None = None) -> Namespace:
    """The options of a command of main.py; with monkeypatch, of run_with_submitit.py too."""
    if ' main.py ' in command:
        return main.get_args_parser().parse_args(options_of(command))
    monkeypatch.setattr(sys, 'argv', ['run_with_submitit.py', *options_of(command)])
    return run_with_submitit.parse_args()


# ------------------------------------------------------------------------------------------------------------
# main.py's commands
# ------------------------------------------------------------------------------------------------------------


def test_every_command_is_of_a_kind_that_is_tested():
    downstream = re.compile(r'(PYTHONPATH=\. )?(python|python -m torch.distributed.run .*|srun .* python) '
                            r'\$(MMSEG|MMDET)/(train|test)\.py ')  # tests/test_downstream.py
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert set(re.findall(r'`make ([\w-]+)`', EVERYTHING)) <= targets
    for command in COMMANDS:
        if command in MAIN + SUBMITTED + SCRIPTS or downstream.match(command):
            continue
        if command.startswith('make '):
            assert command.removeprefix('make ') in targets, command
        elif found := re.match(r'(?:PYTHONPATH=\. )?python (\S+\.py)$', command):
            assert (ROOT / found[1]).is_file(), command
        else:
            assert re.match(r'pip install |export |source |MM\w+=\$\(python -c|' + TIMMS_SCRIPTS +
                            r'|python -m large_kernel_conv\.toeplitz_model$', command), command


def test_published_commands_stand_word_for_word():
    published = (ROOT / 'tests' / 'published_commands.txt').read_text().splitlines()
    assert len(published) >= 14
    assert set(published) <= set(COMMANDS)


def test_commands_of_main_go_together(monkeypatch):
    assert len(MAIN) >= 12 and len(SUBMITTED) >= 8
    for command in MAIN + SUBMITTED:
        args = parse(command, monkeypatch)
        options.check_options(args)
        assert args.output_dir or args.eval, command


def test_a_recipe_is_the_same_for_slurm_and_for_torchrun(monkeypatch):
    blocks = re.findall(r'```bash\n.*?```', TRAINING, re.DOTALL)
    pairs = [commands for commands in map(commands_of, blocks) if len(commands) == 2]
    assert len(pairs) == 7
    for submitted, launched in pairs:
        wanted = vars(parse(launched))
        found = vars(parse(submitted, monkeypatch))
        assert {name: found[name] for name in wanted} == wanted
        assert f'--nnodes={found["nodes"]} --nproc_per_node={found["ngpus"]} ' in launched


def test_the_table_of_recipes_is_that_of_the_commands(monkeypatch):
    rows = re.findall(r'^\| \[.*?\]\(docs/training\.md#(\S+)\) \| (.*) \|$', ROOT_README, re.MULTILINE)
    assert len(rows) == 7
    for anchor, cells in rows:
        args = parse(commands_of(sections_of(TRAINING)[anchor])[0], monkeypatch)
        assert cells.split(' | ') == [
            f'{args.batch_size} x {args.nodes * args.ngpus} x {args.update_freq}',
            f'{args.lr:.0e}'.replace('e-0', 'e-'), f'{args.epochs} ({args.warmup_epochs})',
            f'{args.drop_path:g}', f'{args.layer_decay:g}'], anchor


def kinds_of(commands: list[str]) -> list:
    """The commands as parameters of a test; those that differ in numbers only from one before are slow."""
    kinds, found = set(), {}
    for command in commands:
        args = parse(command)
        kind = (args.eval, bool(args.finetune), args.data_set)
        # `make demo` trains on the digits
        marks = [pytest.mark.slow] if kind in kinds or args.data_set == 'DIGITS' else []
        kinds.add(kind)
        recipe = tuple(sorted(options_of(command)))  # which may stand for two launchers
        found.setdefault(recipe, pytest.param(command, marks=marks))
    return list(found.values())


def pack_validation_images(imagenet: Path, labels: Path) -> None:
    """Put them side by side into a tar, and their classes, a wnid a line, into a file."""
    wnids = {'class0': 'n01440764', 'class1': 'n01443537'}
    for name, wnid in wnids.items():
        (imagenet / 'train' / name).rename(imagenet / 'train' / wnid)
    labels.parent.mkdir(parents=True)
    with tarfile.open(imagenet / 'ILSVRC2012_img_val.tar', 'w') as tar, labels.open('w') as file:
        for i, image in enumerate(sorted((imagenet / 'val').rglob('*.png'))):
            tar.add(image, f'ILSVRC2012_val_{i:08}.png')
            print(wnids[image.parent.name], file=file)
    shutil.rmtree(imagenet / 'val')


@pytest.mark.parametrize('command', kinds_of([command for command in MAIN if parse(command).eval
                                              and not parse(command).eval_set]))
def test_evaluations_score_the_weights_that_are_named(command, imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = replknet_zoo.create_model('RepLKNet-31T', num_classes=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 5.0])  # the second class, of which are 3 of the 7 images
    torch.save({'model': model.state_dict()}, parse(command).resume)
    if labels := parse(command).val_labels:
        pack_validation_images(imagenet, tmp_path / labels)
    run_main(*options_of(command), *SHORTER, '--data_path', imagenet)
    assert capsys.readouterr().out.splitlines()[-1] == '* Acc@1 42.857 Acc@5 100.000 loss 2.864'


@pytest.mark.parametrize('command', kinds_of([command for command in MAIN if not parse(command).eval]))
def test_recipes_train_as_they_say(command, imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = parse(command)
    batch, images = (256, 1437) if args.data_set == 'DIGITS' else (4, 8)
    pretrained = replknet_zoo.create_model('RepLKNet-31T', num_classes=1000).state_dict()
    if args.finetune:
        torch.save({'model': pretrained}, args.finetune)
    shorter = [*SHORTER, '--batch_size', str(batch), '--output_dir', str(tmp_path / 'run'), '--data_path',
               str(imagenet / 'train' if args.data_set == 'image_folder' else imagenet)]
    run_main(*options_of(command), *shorter)

    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    given = {word.removeprefix('--') for word in options_of(command) if word.startswith('--')}
    for name in given - {word.removeprefix('--') for word in shorter}:
        assert checkpoint['args'][name] == getattr(args, name), name
    (line,) = log_lines(tmp_path / 'run')
    shortened = main.get_args_parser().parse_args([*options_of(command), *shorter])
    rate = main.build_lr_schedule(shortened, images).mean()
    assert line['train_lr'] == pytest.approx(rate)
    assert line['train_min_lr'] == pytest.approx(rate * args.layer_decay ** 13)  # that of the stem
    assert line['train_weight_decay'] == args.weight_decay
    assert ('train_class_acc' in line) == (args.mixup == args.cutmix == 0)
    assert ('test_acc1' in line) == (not args.disable_eval)
    assert ('test_acc1_ema' in line) == bool(checkpoint.get('model_ema')) == args.model_ema
    assert ('with a new head for 2 classes' in capsys.readouterr().out) == bool(args.finetune)
    moved = (checkpoint['model']['stem.0.conv.weight'] - pretrained['stem.0.conv.weight']).abs().max()
    assert (moved < 4 * args.lr * args.layer_decay ** 13) == bool(args.finetune)  # two steps of AdamW


# ------------------------------------------------------------------------------------------------------------
# The other scripts, and the examples
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replknet_shows_the_equivalence():
    assert 'python replknet.py' in COMMANDS
    done = run_script('python', 'replknet.py')
    assert done.returncode == 0, done.stdout
    differences = re.findall(r'largest difference of the logits (\S+) of', done.stdout)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-5


def test_commands_of_scripts_are_understood():
    assert len(SCRIPTS) >= 15
    for command in SCRIPTS:
        module = importlib.import_module(shlex.split(command)[1].removesuffix('.py').replace('/', '.'))
        args = module.get_args_parser().parse_args(options_of(command))  # an unknown option would exit
        if module is benchmark:
            benchmark.check_options(args)


def test_the_root_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    use, fast, convolution = examples_of(ROOT_README)
    use = use.replace('RepLKNet-31B', 'RepLKNet-31T')
    trained = replknet_zoo.create_model('RepLKNet-31T')
    torch.save(trained.state_dict(), re.search(r"'(\S+\.pth)'", use)[1])
    names = {}
    with pytest.warns(UserWarning, match='head'):
        exec(use, names)
    x = names['x'] = torch.randn(2, 3, 64, 64)
    assert any('lkb_reparam' in key for key in names['model'].state_dict())
    assert torch.allclose(names['model'](x), trained.eval()(x), atol=1e-4)
    assert [level.shape[2] for level in names['backbone'].eval()(x)] == [16, 8, 4, 2]
    exec(fast, names)
    assert names['logits'].dtype == torch.float32
    assert relative_error(names['logits'], trained(x).detach()) < 0.05  # bfloat16
    names = {'x': torch.randn(1, 128, 40, 40), 'weight': torch.randn(128, 1, 31, 31),
             'bias': torch.randn(128)}
    exec(convolution, names)
    expected = torch.nn.functional.conv2d(names['x'], names['weight'], names['bias'], padding=15, groups=128)
    assert relative_error(names['y'], expected) < 1e-5
    assert names['layer'](names['x']).shape == expected.shape
    assert 'cpu fft' in capsys.readouterr().out


def test_the_int8_example_runs():
    model = replknet_zoo.create_model('RepLKNet-31T', use_sync_bn=False).eval()
    names = {'model': model, 'x': torch.randn(32, 3, 32, 32)}
    exec(examples_of(READMES['tools/README.md'])[1], names)
    with torch.inference_mode():
        assert relative_error(names['fast'](names['x']), model(names['x'])) < 0.05
    assert min(names['decibels'].values()) > 30 and replknet_zoo.is_quantized(names['quantized'].state_dict())


def test_the_sets_of_the_command_are_those_that_there_are():
    (command,) = (command for command in MAIN if parse(command).eval_set)
    assert list(parse_eval_sets(parse(command).eval_set)) == list(NAMES)
    rows = re.findall(r'^\| (`.*?`) \|', sections_of(TRAINING)['other-evaluation-sets'], re.MULTILINE)
    assert re.findall(r'\w+', ' '.join(rows)) == list(NAMES)


def test_the_examples_for_timm_run():
    """With toys, and without the network."""
    use, distill, hub, _ = examples_of(READMES['replknet_zoo/README.md'])
    names = {}
    for code in (use, distill.split('loss =')[0], hub.replace("'.'", repr(str(ROOT)))):
        code = re.sub(r", pretrained=True(, pretrained_cfg='\w+')?", '', code)
        exec(re.sub(r'replknet_(31b|3)\b(\.in1k)?', 'replknet_31t', code), names)
    x = torch.randn(2, 3, 32, 32)
    assert [y.shape[1] for y in names['backbone'](x[:, :1])] == [32, 128]
    assert names['merged'].is_merged and not names['student'].is_merged
    assert names['task'](x, torch.tensor([1, 2]))['loss'].requires_grad
    rows = re.findall(r'^\|(.*?)\|.*\|.*\|$', READMES['replknet_zoo/README.md'], re.MULTILINE)[2:]
    first = re.compile(r'(rep\w+?)(?=_\w+$)')
    listed, last = [], ''
    for name in re.findall(r'`(\w+)`', ' '.join(rows)):
        last = name if name.startswith('rep') else first.match(last)[1] + name
        listed.append(last)
    assert sorted(listed) == sorted(ENTRYPOINTS)
    tags = re.findall(r'`\.(\w+)`', READMES['replknet_zoo/README.md'])
    assert {*tags} == {tag for cfg in default_cfgs.values() for tag in cfg.cfgs if cfg.cfgs[tag].url}


def test_the_other_examples_are_the_same_or_compile():
    assert examples_of(READMES['large_kernel_conv/README.md']) == [examples_of(ROOT_README)[2]]
    fast, _, _ = examples_of(READMES['tools/README.md'])
    assert set(examples_of(ROOT_README)[1].splitlines()) <= set(fast.splitlines())
    # which need packages that these tests do not install
    for name in ('erf', 'segmentation', 'detection', 'tools', 'replknet_zoo'):
        for code in examples_of(READMES[f'{name}/README.md']):
            compile(code, name, 'exec')


# ------------------------------------------------------------------------------------------------------------
# Figures, links and messages
# ------------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_measured_files():
    for name in draw_figures.READMES:
        assert draw_figures.with_tables(READMES[name]) == READMES[name], 'run python docs/draw_figures.py'
    assert set(re.findall(r'<!-- measured: (\w+) -->', EVERYTHING)) == set(draw_figures.TABLES)


def test_the_commands_that_measure_are_understood():
    commands = re.findall(r'^python tools/benchmark\.py (.*)', draw_figures.__doc__, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        args = benchmark.get_args_parser().parse_args(shlex.split(command))
        assert args.json.parts[0] == 'docs' and (ROOT / args.json).is_file()


def test_pictures_can_be_drawn(tmp_path):
    draw_figures.draw_block(tmp_path / 'block.png')
    draw_figures.draw_speed(tmp_path / 'speed.png')
    for name in ('block.png', 'speed.png'):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f'](docs/{name})' in ROOT_README and (ROOT / 'docs' / name).is_file()


def test_the_gpu_figures_are_those_of_the_convolutions_readme():
    forward, backward = re.search(r'stage 1 is (\S+) times .* forward and (\S+) times', ROOT_README).groups()
    rows = re.findall(r'^\| stage 1: .* \| (\S+, \S+) \|$', READMES['large_kernel_conv/README.md'],
                      re.MULTILINE)
    assert f'{forward}, {backward}' in rows


def test_counted_figures_are_those_of_the_model():
    layer = (64, 384, 32, 32)
    counted = toeplitz_model.cost(layer, 31, torch.float16, 'forward')
    text = ' '.join(READMES['large_kernel_conv/README.md'].split())
    figures = re.search(r'\((\d+) x (\d+) x (\d+) x (\d+), K = 31\) takes (\d+) GFLOP forward, '
                        r"(\d+) of them useful: at the tensor cores' peak ([\d.]+) ms on an A100, "
                        r'([\d.]+) on an H100', text)
    *shape, executed, useful, a100, h100 = map(float, figures.groups())
    assert tuple(shape) == layer
    assert (executed, useful) == (round(counted.executed / 1e9), round(counted.useful / 1e9))
    for gpu, limit in (('A100', a100), ('H100', h100)):
        assert 1e3 * counted.limit(gpu, 'float16') == pytest.approx(limit, abs=0.005)


def test_symptoms_in_the_troubleshooting_tables_are_messages_of_the_code():
    folders = ('large_kernel_conv', 'replknet_zoo', 'image_data', 'erf', 'tools')
    files = [*ROOT.glob('*.py'), *(path for folder in folders for path in (ROOT / folder).glob('*.py'))]
    code = ''.join(path.read_text() for path in files)
    code = re.sub(r"""['"]\s*\n\s*f?['"]""", '', code)  # messages that run over lines
    cells = re.findall(r'^\| (.*?) \| ', READMES['docs/troubleshooting.md'], re.MULTILINE)
    symptoms = [symptom for cell in cells for symptom in re.findall(r'`([^`]+)`', cell)]
    assert len(symptoms) > 20
    for symptom in symptoms:
        for fragment in re.split(r' ?\.\.\. ?|\bN\b|1000', symptom):
            assert fragment.strip() in code, fragment


def test_published_links_stand_beside_their_figures():
    for row in json.loads((ROOT / 'tests' / 'published_links.json').read_text()):
        (line,) = (line for line in READMES[row['readme']].splitlines() if row['urls'][0] in line)
        for part in row['urls'] + row['figures']:
            assert part in line, (part, line)


@pytest.mark.parametrize('name', READMES)
def test_links_lead_somewhere(name):
    text = READMES[name]
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
        path, _, anchor = target.partition('#')
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in sections_of(file.read_text()), target
    assert not re.search(r'@[A-Z_]+@|TODO|XXX', text)


def test_the_readme_is_read_in_five_minutes():
    assert len(ROOT_README.splitlines()) <= 300
