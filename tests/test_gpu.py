"""What only a GPU can show: the operator's manners there, the model's golden values, and main.py's runs."""
import json

import pytest
import torch
from torch import nn

import replknet_zoo
from conftest import TINY, TOY, launch, log_lines, relative_error, run_main
from golden.fill import fill, image
from large_kernel_conv import DepthwiseConv2d, depthwise_conv2d, implementation
from replknet import RepLKNet
from test_resume import finish, kill, options_of, printed, start_python, wait_for_save
from tools import benchmark
from tools.benchmarks import gpu_sections

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='a GPU is needed')
TRAIN = [*TOY, '--device', 'cuda', '--data_set', 'DIGITS', '--batch_size', '64', '--epochs', '2',
         '--warmup_epochs', '1',
         '--lr', '4e-3', '--use_amp', 'true']


def layer() -> list[torch.Tensor]:
    """x, weight, bias and the gradient of y."""
    half = {'device': 'cuda', 'dtype': torch.float16}
    x, grad = (torch.randn(8, 16, 28, 28, **half) for _ in range(2))
    weight, bias = torch.randn(16, 1, 29, 29, **half), torch.randn(16, **half)
    assert implementation(x, weight)[0] == 'triton'
    return [*(tensor.requires_grad_() for tensor in (x, weight, bias)), grad]


def step(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor,
                                                                                                 ...]:
    y = depthwise_conv2d(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)


def test_a_step_gives_the_same_each_time_and_waits_for_nothing():
    inputs = layer()
    expected = step(*inputs)
    torch.cuda.set_sync_debug_mode('error')
    try:
        found = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(map(torch.equal, found, expected))


def test_a_step_is_captured_in_a_graph_and_runs_on_any_stream():
    inputs, stream = layer(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    with torch.no_grad():
        for tensor in inputs:
            tensor.normal_()
    graph.replay()
    assert all(map(torch.equal, captured, step(*inputs)))


def test_a_compiled_layer_trains_in_autocast():
    layer = nn.Sequential(DepthwiseConv2d(16, 29, bias=False), nn.BatchNorm2d(16), nn.ReLU()).cuda()
    x = torch.randn(8, 16, 28, 28, device='cuda')

    def gradients(run: nn.Module) -> list[torch.Tensor]:
        with torch.autocast('cuda', torch.bfloat16):
            y = run(x)
        return torch.autograd.grad(y.float().square().sum(), layer.parameters())
    for found, expected in zip(gradients(torch.compile(layer, fullgraph=True)), gradients(layer),
                               strict=True):
        assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-2


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_model_gives_the_published_logits_and_gradients(memory_format, golden, float32_is_float32):
    recorded = golden('forward')
    model = fill(RepLKNet(**TINY, num_classes=10)).to('cuda', memory_format=memory_format)
    assert relative_error(model.eval()(image('tiny/eval', 2, 3, 64, 64).cuda()).detach().cpu(),
                          recorded['tiny/eval']) < 1e-5
    x = image('tiny/train', 4, 3, 64, 64).cuda().requires_grad_()
    logits = model.train()(x)
    (logits * image('tiny/train/cotangent', 4, 10).cuda()).sum().backward()
    assert relative_error(logits.detach().cpu(), recorded['tiny/train/logits']) < 1e-4
    assert relative_error(x.grad.cpu(), recorded['tiny/train/input_grad']) < 1e-3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_compiled_inference_gives_the_models_logits(dtype, float32_is_float32):
    model = fill(RepLKNet(**TINY, num_classes=10)).cuda().eval()
    x = image('tiny/eval', 2, 3, 64, 64).cuda()
    compiled = replknet_zoo.compile_for_inference(model, dtype)
    assert relative_error(compiled(x).cpu(), model(x).detach().cpu()) < (1e-4 if dtype == torch.float32
                                                                         else 5e-2)


@pytest.mark.parametrize('options', [('--channels_last', 'false'), ('--amp_dtype', 'bfloat16'),
                                     ('--compile', 'true')], ids=str)
def test_main_trains_and_evaluates_merged_kernels(options, tmp_path, capsys):
    run_main(*TRAIN, *options, '--output_dir', tmp_path)
    first, last = log_lines(tmp_path)
    assert last['train_loss'] < first['train_loss']
    run_main(*TRAIN, '--eval', 'true', '--resume', tmp_path / 'latest.pth', '--with_small_kernel_merged',
             'true')
    assert f'* Acc@1 {last["test_acc1"]:.3f}' in capsys.readouterr().out


def test_the_report_has_what_a_cpu_has_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', torch.backends.cudnn.benchmark)  # put back
    kept = [section for section in gpu_sections.SECTIONS if section.name in ('checks', 'training')]
    monkeypatch.setattr(gpu_sections, 'SECTIONS', [section._replace(share=0.5) for section in kept])
    benchmark.main(benchmark.get_args_parser().parse_args(
        ['gpu', '--small', '--json', str(tmp_path / 'report.json')]))
    content = json.loads((tmp_path / 'report.json').read_text())
    assert content['gpu']['driver'] and torch.cuda.get_device_name() in (tmp_path / 'report.md').read_text()
    checks, rows = (content['sections'][section.name]['rows'] for section in kept)
    assert checks and all(row['passed'] for row in checks)
    assert len(rows) == 6 and all(row['memory_mib'] > 0 and 0 < row['depthwise_share'] < 1 for row in rows)
    assert [row['host_share'] > 0 for row in rows if 'host_share' in row] == [True, True]


def test_main_trains_with_nccl(tmp_path):
    assert '1 processes, nccl' in launch(1, *TRAIN, '--output_dir',
                                         tmp_path) and len(log_lines(tmp_path)) == 2


def test_a_run_that_is_killed_goes_on(tmp_path):  # not to the bit: cuDNN may choose other algorithms
    folder, options = tmp_path / 'run', ('--device', 'cuda', '--use_amp', 'true')
    command = 'main.py', *options_of(folder), *options  # not in a fork, which CUDA does not like
    run = start_python(folder, *command)
    wait_for_save(run)
    kill(run.left())
    finish(run)
    assert finish(start_python(folder, *command)) == 0, printed(folder)
    assert 'Going on with epoch 0 of 2, step ' in printed(folder) and len(log_lines(folder)) == 2
