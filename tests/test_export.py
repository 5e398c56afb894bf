"""tools/export.py: what a file computes, what is in it, where it runs, and that no wrong one is left."""
import importlib.util
import json
import os
import re
from pathlib import Path
from unittest import mock

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import replknet
import replknet_zoo
import utils
from conftest import TINY, relative_error, run_script, with_random_weights
from golden.fill import fill, image
from large_kernel_conv import DECOMPOSITIONS
from tools import export


def run_export(*options) -> None:
    """tools/export.py in this process."""
    export.main(export.get_args_parser().parse_args([str(option) for option in options]))


def toy(name: str = 'RepLKNet-31T') -> nn.Module:
    """A toy with BatchNorms that do not fold to nothing, as they would if new."""
    torch.manual_seed(0)
    return with_random_weights(replknet_zoo.create_model(name, num_classes=7, use_sync_bn=False)).eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The toy as ONNX."""
    folder = tmp_path_factory.mktemp('onnx')
    torch.save({'model': toy().state_dict()}, folder / 'toy.pth')
    with mock.patch.dict(os.environ, LARGE_KERNEL_CONV_IMPL='nowhere'):  # its layers could not be exported
        run_export('--to', 'onnx', '--weights', folder / 'toy.pth', folder / 'toy.onnx', '--opset', '20')
    assert sorted(file.name for file in folder.iterdir()) == ['toy.onnx', 'toy.pth']
    return folder / 'toy.onnx'


def runtime_logits(path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


@pytest.mark.parametrize('shape', [(1, 3, 32, 32), (3, 3, 64, 96), (2, 3, 97, 33), (5, 3, 20, 1)])
def test_onnx_runtime_gives_the_models_logits_at_any_batch_and_size(shape, exported):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = toy()(x)
    assert relative_error(runtime_logits(exported, x), expected) < 1e-5


def test_the_file_holds_merged_convolutions_in_standard_operators(exported):
    proto = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [('', 20)]
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {''}
    operators = [node.op_type for node in proto.graph.node]
    # 4 of the stem, 5 large kernels, 4 pointwise for each of the 5 pairs of blocks, 2 for each of the 3
    # transitions; no small kernel
    assert operators.count('Conv') == 4 + 5 + 4 * 5 + 2 * 3
    assert 'BatchNormalization' not in operators


def test_the_file_says_its_pre_processing_and_nothing_of_this_machine(exported):
    texts = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert (texts.pop('model'), texts.pop('interpolation')) == ('RepLKNet-31T', 'bicubic')
    said = {key: json.loads(text) for key, text in texts.items()}
    assert said == {'num_classes': 7, 'input_size': 32, 'crop_pct': None, 'mean': [0.485, 0.456, 0.406],
                    'std': [0.229, 0.224, 0.225]}
    assert str(replknet.__file__).encode() not in exported.read_bytes()


def give_onnx(proto: onnx.ModelProto, monkeypatch) -> None:
    """A double of the exporter, which takes its time."""
    monkeypatch.setattr(export, 'program_of', lambda model: None)
    monkeypatch.setattr(export, 'decomposed', lambda program: None)
    monkeypatch.setattr(export, 'onnx_of', lambda program, opset: proto)


def test_what_was_checked_is_printed(exported, monkeypatch, capsys):
    give_onnx(onnx.load(exported), monkeypatch)
    run_export('--to', 'onnx', '--model', 'RepLKNet-31T', '--weights', exported.with_name('toy.pth'),
               exported.with_name('again.onnx'), '--opset', '20')
    *checks, last = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in checks] == [
        '1 random images of 32 x 32', '2 random images of 64 x 28', '3 random images of 16 x 63',
        '4 random images of 31 x 32']
    for line in checks:
        assert float(re.search(r'\((\S+) of the largest, ', line)[1]) < 1e-5
    assert 'again.onnx, 1.7 MiB: opset 20, image (batch, 3, height, width) normalised by mean (0.4' in last


def test_random_weights_are_told(capsys):
    args = export.get_args_parser().parse_args(['--to', 'onnx', '--model', 'RepLKNet-XL', 'out.onnx'])
    with torch.device('meta'):
        name, model, preprocessing = export.source_model(args)
    assert (name, model.head.out_features, preprocessing['mean']) == ('RepLKNet-XL', 1000, (0.5, 0.5, 0.5))
    assert capsys.readouterr().out.startswith('NOTE: without --weights they are random')


# --- torch.export and AOTInductor ---------------------------------------------------------------------------


SHAPES = {'RepLKNet-31T': [(1, 3, 32, 32), (3, 3, 64, 96), (2, 3, 97, 33), (5, 3, 20, 1)],
          'RepMLPNet-T32': [(1, 3, 32, 32), (3, 3, 64, 96), (2, 3, 32, 128)]}
LOAD = {'pt2': 'program = torch.export.load(file, extra_files=extra).module()\n'
               "said = json.loads(extra['metadata.json'])",
        'aoti': 'program = torch._inductor.aoti_load_package(file)\nsaid = program.get_metadata()\n'
                "said['mean'] = json.loads(said['mean'])"}


def runs_in_another_process(form: str, file: Path, model: nn.Module, name: str, first: str = '') -> str:
    """What a process prints that runs `first`, loads the file and compares its logits with the model's."""
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES[name]]
    with torch.no_grad():
        torch.save([(x, model(x)) for x in inputs], file.with_name('values.pt'))
    done = run_script('python', '-W', 'ignore', '-c', f"""
import json, sys, torch
{first}
file, extra = {str(file)!r}, {{'metadata.json': ''}}
{LOAD[form]}
print(said['model'], said['num_classes'], said['mean'])
for x, wanted in torch.load({str(file.with_name('values.pt'))!r}):
    print('differs by', ((program(x) - wanted).abs().max() / wanted.abs().max()).item())
print('imported', 'large_kernel_conv' in sys.modules, 'replknet' in sys.modules)
""", cwd=file.parent)
    return done.stdout


@pytest.mark.parametrize(('form', 'name'), [
    ('pt2', 'RepLKNet-31T'), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('pt2', 'RepMLPNet-T32'), ('aoti', 'RepLKNet-31T'), ('aoti', 'RepMLPNet-T32')))])
def test_a_file_runs_in_another_process_at_any_batch_and_size(form, name, tmp_path):
    model = toy(name)
    torch.save(model.state_dict(), tmp_path / 'toy.pth')
    run_export('--to', form, '--weights', tmp_path / 'toy.pth', tmp_path / 'toy.pt2')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['toy.pt2', 'toy.pth']
    needed = 'import large_kernel_conv' if form == 'aoti' else ''
    printed = runs_in_another_process(form, tmp_path / 'toy.pt2', model, name, needed)
    first, *errors, last = printed.splitlines()[-len(SHAPES[name]) - 2:]  # behind what torch may have to say
    assert first == f'{name} 7 [0.485, 0.456, 0.406]', printed
    assert all(float(error.removeprefix('differs by ')) < 1e-5 for error in errors)
    assert last == f'imported {form == "aoti"} False'
    if form == 'aoti' and name == 'RepLKNet-31T':  # the other has no large kernel once it is merged
        assert 'large_kernel_conv' in runs_in_another_process(form, tmp_path / 'toy.pt2', model, name)


def test_a_program_with_operators_of_others_is_refused(monkeypatch):
    program = torch.export.export(toy(), (torch.randn(2, 3, 64, 64),))
    monkeypatch.setattr(export, 'DECOMPOSITIONS', {})
    with pytest.raises(utils.UserError, match=r'torch does not have: large_kernel_conv\.depthwise'):
        export.decomposed(program)


# --- torch.onnx.export, called directly ---------------------------------------------------------------------


BACKBONE = {'num_classes': None, 'out_indices': (0, 2, 3), 'norm_intermediate_features': True}


def as_program(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning',
                            'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(('given', 'dynamo', 'options', 'merged'), [
    (None, True, BACKBONE, True), (None, False, {}, False), (as_program, True, {}, False),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (None, True, {}, False), (None, False, BACKBONE, True), (as_program, True, BACKBONE, True)))])
def test_models_are_exported_directly(options, merged, given, dynamo, tmp_path):
    model = fill(replknet.RepLKNet(**TINY, **options, use_checkpoint=True, use_sync_bn=False)).eval()
    if merged:
        model.structural_reparam()
    x = image('x', 2, 3, 64, 64)
    torch.onnx.export(given(model, x) if given else model, (x,), tmp_path / 'model.onnx', dynamo=dynamo,
                      verbose=False)
    proto = onnx.load(tmp_path / 'model.onnx')
    assert {node.domain for node in proto.graph.node} == {''} and not proto.functions
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x)
    for value, wanted in zip(found, expected if options else [expected], strict=True):
        assert relative_error(value, wanted.detach()) < 1e-5


# --- what must not be written -------------------------------------------------------------------------------


@pytest.mark.parametrize('wrong', [1.001, float('nan')])
def test_a_file_with_other_logits_is_not_left(wrong, exported, tmp_path, monkeypatch):
    proto = onnx.load(exported)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == 'head.bias')
    values = onnx.numpy_helper.to_array(bias) * wrong + wrong - 1
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    give_onnx(proto, monkeypatch)
    (tmp_path / 'toy.onnx').write_text('an earlier file')
    message = r'random images of 32 x 32 (differ by .*nothing was written|are not finite)'
    with pytest.raises(utils.UserError, match=message):
        run_export('--to', 'onnx', '--model', 'RepLKNet-31T', '--weights', exported.with_name('toy.pth'),
                   tmp_path / 'toy.onnx', '--opset', '20')
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [('toy.onnx', 'an earlier file')]


def test_operators_outside_the_standard_are_refused():
    def proto(*nodes, opset=18):
        return helper.make_model(helper.make_graph(nodes, 'graph', [], []),
                                 opset_imports=[helper.make_opsetid('', opset)])

    relu = helper.make_node('Relu', ['x'], ['y'])
    export.check_operators(proto(relu), 18)
    custom = helper.make_node('DepthwiseConv2d', ['x'], ['y'], domain='large_kernel_conv')
    with pytest.raises(utils.UserError, match='ONNX does not define: large_kernel_conv::DepthwiseConv2d'):
        export.check_operators(proto(relu, custom), 18)
    with pytest.raises(utils.UserError, match='wrote opset 18, not 20'):
        export.check_operators(proto(relu), 20)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('options', 'message'), [
    (['--model', 'RepLKNet-32B', 'toy.onnx'], 'unknown --model RepLKNet-32B: choose one of RepLKNet-31B'),
    (['toy.onnx'], 'there are neither --weights nor --model: choose one of RepLKNet-31B'),
    (['--weights', 'nowhere.pth', 'toy.onnx'], 'there is no checkpoint nowhere.pth'),
    (['--weights', 'text.pth', 'toy.onnx'], 'text.pth cannot be read as a checkpoint'),
    (['--weights', 'toy.pth', '--model', 'RepLKNet-31B', 'toy.onnx'],
     'toy.pth holds weights of RepLKNet-31T, not of'),
    (['--weights', 'toy.pth', 'nowhere/toy.onnx'], 'there is no folder nowhere'),
    (['--weights', 'toy.pth', '.'], 'is a folder or a device: name a file'),
    (['--weights', 'toy.pth', 'toy.pth'], 'toy.pth does not end in .onnx, as a file of --to onnx does'),
    (['--weights', 'toy.pth', 'toy.onnx', '--to', 'pt2'], 'toy.onnx does not end in .pt2, as a file of'),
    (['--weights', 'weights.onnx', 'weights.onnx'], 'weights.onnx is the file to export: name another one'),
    (['--weights', 'toy.pth', 'toy.pt2', '--to', 'pt2', '--opset', '20'], '--opset 20 is for --to onnx, not'),
])
def test_bad_options_are_told_before_anything_is_exported(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.pth').write_text('no weights')
    for name in ('toy.pth', 'weights.onnx'):
        torch.save(toy().state_dict(), tmp_path / name)
    monkeypatch.setattr(export, 'program_of', lambda *_: pytest.fail('exported'))
    with pytest.raises(utils.UserError, match=message):
        run_export('--to', 'onnx', *options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['text.pth', 'toy.pth', 'weights.onnx']


def test_an_opset_that_torch_does_not_write_is_told(capsys):
    with pytest.raises(SystemExit):
        run_export('--to', 'onnx', '--opset', '17', 'toy.onnx')
    assert "argument --opset: invalid choice: 17 (choose from 18, 19, " in capsys.readouterr().err


def test_missing_packages_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    message = r"needs onnx, onnxruntime, onnxscript, .*: pip install -e '\.\[onnx\]'"
    with pytest.raises(utils.UserError, match=message):
        run_export('--to', 'onnx', '--model', 'RepLKNet-31T', tmp_path / 'toy.onnx')


@pytest.mark.slow
def test_31b_as_onnx_gives_the_published_logits(tmp_path, golden):
    torch.save(fill(replknet_zoo.create_model('RepLKNet-31B')).state_dict(), tmp_path / '31B.pth')
    run_export('--to', 'onnx', '--weights', tmp_path / '31B.pth', tmp_path / '31B.onnx')
    logits = runtime_logits(tmp_path / '31B.onnx', image('31B/eval', 1, 3, 224, 224))
    assert relative_error(logits, golden('forward')['31B/eval']) < 1e-5
