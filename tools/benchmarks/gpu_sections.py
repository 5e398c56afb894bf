"""What the report of a GPU measures: its sections, in order of worth, each made of tasks of some rows."""
import argparse
import functools
import itertools
import math
import statistics
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import large_kernel_conv
import replknet_zoo
from tools.benchmarks import common, conv, model, published
from tools.benchmarks.common import LAYOUTS

MERGED, TRAINED = 'merged, folded', 'as trained'
# largest error allowed, of the largest value: float32 sums, and the rounding of the others
BOUNDS = {'float16': 1e-3, 'bfloat16': 8e-3, 'float32 ieee': 1e-5, 'float32 TF32': 2e-3}
HALF = ('float16', 'bfloat16')
HOST_IMAGES = 2  # so few that the GPU waits for its host
WITH_HOST = 'training', 'float16', 'NCHW'  # the eager cases whose host is timed
STEPS = 5  # of which the host's time is the median
Layer = tuple[int, int, int]  # channels, side of the map, side of the kernel
Task = tuple[dict, Callable[[], list[dict]]]  # what its rows are of, and what measures them
# a model and one way to run it; `dtype` is a key of BOUNDS, in training that of autocast
Case = namedtuple('Case', 'model form mode way dtype layout batch size')


class Plan(NamedTuple):
    """What is measured, at which sizes."""
    device: str
    threads: int
    compiler: bool  # whether torch.compile is asked
    model: str
    peer: str  # of timm, beside it
    mlp: str
    batches: tuple[int, ...]  # of inference; depthwise layers and training take the first
    stages: tuple[Layer, ...]
    table_1: tuple[Layer, ...]
    table_6: tuple[tuple[str, int], ...]  # models and pixels a side
    seconds: float  # measuring time of a row


def plan_of(args: argparse.Namespace) -> Plan:
    """The whole plan, or with args.small the same on toys."""
    cuda = args.device == 'cuda'
    if args.small:
        return Plan(args.device, args.threads, cuda, 'RepLKNet-31T', 'convnext_atto', 'RepMLPNet-T32', (2,),
                    ((4, 8, 13), (2, 5, 7)), ((4, 8, 7), (4, 8, 3)), (('RepLKNet-31T', 32),), 0.01)
    channels, kernels = published.TABLE_1_CHANNELS, reversed(published.TABLE_1_KERNELS)
    table_1 = tuple((channels, side, kernel) for kernel in kernels for side in published.TABLE_1)
    return Plan(args.device, args.threads, cuda, 'RepLKNet-31B', 'convnext_base', 'RepMLPNet-B256', (64, 1),
                conv.STAGES, table_1, tuple(published.TABLE_6), 0.3)


def arithmetic(dtype: str) -> AbstractContextManager:
    """Convolutions as `dtype`, a key of BOUNDS, has them: float32 as itself, or in TF32, torch's default."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=dtype != 'float32 ieee')


def torch_dtype(dtype: str) -> torch.dtype:
    """The data type of a key of BOUNDS."""
    return getattr(torch, dtype.split()[0])


# ---- Checks ------------------------------------------------------------------------------------------------


def check_tasks(plan: Plan) -> Iterator[Task]:
    """Output and gradients of the stages' layers, and of the first of Table 1, in each precision."""
    for layer in (*plan.stages, plan.table_1[0]):
        for dtype, precisions in itertools.groupby(BOUNDS, torch_dtype):
            label = {'layer': layer_name(layer), 'precision': str(dtype).removeprefix('torch.')}
            yield label, functools.partial(check_layer, plan, layer, dtype, tuple(precisions))


def layer_name(layer: Layer) -> str:
    """The layer in words."""
    channels, side, kernel = layer
    return f'{channels} x {side} x {side}, K {kernel}'


def check_layer(plan: Plan, layer: Layer, dtype: torch.dtype, precisions: tuple[str, ...]) -> list[dict]:
    """The largest errors against F.conv2d in float64, of the largest value: in each precision and layout."""
    channels, side, kernel = layer
    options = {'device': plan.device, 'dtype': dtype}
    torch.manual_seed(0)
    x, grad = (torch.randn(plan.batches[0], channels, side, side, **options) for _ in range(2))
    weight = torch.randn(channels, 1, kernel, kernel, **options)
    exact = functools.partial(F.conv2d, weight=weight.double().requires_grad_(), padding=kernel // 2,
                              groups=channels)
    expected = results(exact, x.double(), grad.double())
    rows = []
    for precision, (layout, memory_format) in itertools.product(precisions, LAYOUTS.items()):
        laid_out = [tensor.detach().to(memory_format=memory_format) for tensor in (x, weight, grad)]
        with arithmetic(precision):
            name, _ = large_kernel_conv.implementation(*laid_out[:2])
            ours = functools.partial(large_kernel_conv.depthwise_conv2d, weight=laid_out[1].requires_grad_())
            found = results(ours, laid_out[0], laid_out[2])
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        passed = all(error <= BOUNDS[precision] for error in errors)  # not those that are NaN
        written = [error if math.isfinite(error) else str(error) for error in errors]  # JSON has no NaN
        rows.append({'precision': precision, 'layout': layout, 'implementation': name,
                     **dict(zip(('output', 'input_gradient', 'weight_gradient'), written, strict=True)),
                     'bound': BOUNDS[precision], 'passed': passed})
    return rows


def results(function: functools.partial, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and both gradients of a function that has its weight."""
    weight = function.keywords['weight']
    return conv.run_layer(function, x.requires_grad_(), weight, grad, backward=True)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest expected value."""
    return ((value.double() - expected).abs().max() / expected.abs().max()).item()


# ---- Layers ------------------------------------------------------------------------------------------------


def stage_tasks(plan: Plan) -> Iterator[Task]:
    """The stages' layers, forward and with backward."""
    for dtype, layer, backward in itertools.product(('float16', 'float32 ieee'), plan.stages, (False, True)):
        yield layer_task(plan, layer, dtype, backward)


def table_1_tasks(plan: Plan) -> Iterator[Task]:
    """Table 1's layers, forward, as on its card in float32; largest kernels first."""
    for layer in plan.table_1:
        yield layer_task(plan, layer, 'float32 ieee', False)


def layer_task(plan: Plan, layer: Layer, dtype: str, backward: bool) -> Task:
    """nn.Conv2d and ours, in both memory formats."""
    label = {'layer': layer_name(layer), 'dtype': dtype,
             'pass': 'forward+backward' if backward else 'forward'}
    return label, functools.partial(measure_layer, plan, layer, dtype, backward)


def measure_layer(plan: Plan, layer: Layer, dtype: str, backward: bool) -> list[dict]:
    """Four rows, of milliseconds for one layer."""
    options = argparse.Namespace(device=plan.device, dtype=dtype.split()[0], batch=plan.batches[0], layers=1,
                                 threads=plan.threads)
    with arithmetic(dtype):
        rows = conv.compare_layer(options, *layer, backward, plan.seconds)
    keys = ('batch', 'resolution', 'kernel', 'contestant', 'layout', 'implementation', 'ms', 'ratio',
            'best_ratio')
    return [{key: row[key] for key in keys} for row in rows]


# ---- Models ------------------------------------------------------------------------------------------------


def inference_tasks(plan: Plan) -> Iterator[Task]:
    """The model, and its peer in float16, as they come."""
    for batch, name in itertools.product(plan.batches, (plan.model, plan.peer)):
        dtypes = HALF if name == plan.model else HALF[:1]
        for dtype, layout in itertools.product(dtypes, LAYOUTS):
            yield case_task(plan, name, 'inference', 'eager', dtype, layout, batch)


def compiled_inference_tasks(plan: Plan) -> Iterator[Task]:
    """The model by compile_for_inference where that is offered, else by torch.compile; then its peer."""
    for batch in plan.batches:
        yield case_task(plan, plan.model, 'inference', 'compile_for_inference', 'bfloat16', 'channels_last',
                        batch)
        for dtype, layout in (('float16', 'NCHW'), ('float16', 'channels_last'), ('bfloat16', 'NCHW')):
            yield case_task(plan, plan.model, 'inference', 'torch.compile', dtype, layout, batch)
    yield case_task(plan, plan.peer, 'inference', 'torch.compile', 'float16', 'channels_last',
                    plan.batches[0])


def training_tasks(plan: Plan) -> Iterator[Task]:
    """Steps of the model, and in float16 of its peer."""
    for name, dtypes in ((plan.model, HALF), (plan.peer, HALF[:1])):
        for dtype, layout in itertools.product(dtypes, LAYOUTS):
            yield case_task(plan, name, 'training', 'eager', dtype, layout, plan.batches[0])


def compiled_training_tasks(plan: Plan) -> Iterator[Task]:
    """The same steps in float16, compiled."""
    for name, layout in itertools.product((plan.model, plan.peer), LAYOUTS):
        yield case_task(plan, name, 'training', 'torch.compile', 'float16', layout, plan.batches[0])


def table_6_tasks(plan: Plan) -> Iterator[Task]:
    """Table 6's models in float32: as itself, which is the published card's, then in TF32."""
    for dtype, (name, size) in itertools.product(('float32 ieee', 'float32 TF32'), plan.table_6):
        yield case_task(plan, name, 'inference', 'eager', dtype, 'NCHW', plan.batches[0], size)


def mlp_tasks(plan: Plan) -> Iterator[Task]:
    """RepMLPNet as it is trained and with its locality injected, in evaluation."""
    for batch, form, layout in itertools.product(plan.batches, (TRAINED, MERGED), LAYOUTS):
        yield case_task(plan, plan.mlp, 'inference', 'eager', 'float16', layout, batch, form=form)


def case_task(plan: Plan, name: str, mode: str, way: str, dtype: str, layout: str, batch: int,
              size: int | None = None, form: str | None = None) -> Task:
    """A model's case; in inference it is merged where it can be, unless `form` says otherwise."""
    known = name if name in replknet_zoo.MODELS else plan.model
    form = form or (MERGED if mode == 'inference' and name == known else TRAINED)
    case = Case(name, form, mode, way, dtype, layout, batch, size or replknet_zoo.MODELS[known].input_size)
    return case._asdict(), functools.partial(measure_case, plan, case)


def measure_case(plan: Plan, case: Case) -> list[dict]:
    """One row: time, peak memory (of the tensors on a GPU), and of eager models what shares() tells."""
    if case.way == 'torch.compile' and not plan.compiler:
        return [{'note': 'left to GPUs: for a CPU the compiler takes minutes'}]
    cuda = plan.device == 'cuda'
    if case.way != 'eager':
        torch._dynamo.reset()  # what earlier rows compiled counts against its limit, and holds memory
    built = build(plan, case)
    call = (inference_call if case.mode == 'inference' else training_call)(plan, case, built)
    if case.way != 'eager':
        del built  # compile_for_inference has a copy
    with arithmetic(case.dtype):
        call()  # compiles, picks algorithms
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = common.measure({case: call}, plan.seconds)[case]
        row = {'ms': 1e3 * seconds, 'images_per_s': case.batch / seconds,
               'memory_mib': torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else None}
        if case.way == 'eager':
            try:
                row |= shares(plan, case, built, call, seconds)
            except Exception as error:  # the time is had, at least
                row['note'] = reason(error)
    return [row]


def reason(error: Exception) -> str:
    """What is told of an error: its kind and its first line."""
    line, *_ = str(error).splitlines() or ['']
    return f'{type(error).__name__}: {line[:200]}'


def shares(plan: Plan, case: Case, built: nn.Module, call: Callable[[], None], seconds: float) -> dict:
    """The depthwise convolutions' implementation, and at the largest batch their share of the time.

    For one training step on a GPU the host's too: a CPU is its own host.
    """
    found = {'implementation': model.implementations(call)}
    if case.batch == plan.batches[0]:
        found['depthwise_share'] = depthwise_share(call, built, plan.device)
    if plan.device == 'cuda' and (case.mode, case.dtype, case.layout) == WITH_HOST:
        host = host_seconds(training_call(plan, case._replace(batch=HOST_IMAGES), built))
        found |= {'host_ms': 1e3 * host, 'host_share': host / seconds}
    return found


def build(plan: Plan, case: Case) -> nn.Module:
    """The model with random weights on the device, in its form and memory format."""
    torch.manual_seed(0)
    with torch.device(plan.device):
        if case.model in replknet_zoo.MODELS:
            built = replknet_zoo.create_model(case.model, use_sync_bn=False)
        else:
            built = timm.create_model(case.model)
    built.train(case.mode == 'training')
    if case.form == MERGED:
        built.structural_reparam()
        built.deep_fuse_BN()
    return built.to(memory_format=LAYOUTS[case.layout])


def images(plan: Plan, case: Case) -> Tensor:
    """Random ones, (batch, 3, size, size) in float32."""
    x = torch.randn(case.batch, 3, case.size, case.size, device=plan.device)
    return x.to(memory_format=LAYOUTS[case.layout])


def inference_call(plan: Plan, case: Case, built: nn.Module) -> Callable[[], None]:
    """A call that runs the model once, with weights and images in the case's data type."""
    x, dtype = images(plan, case), torch_dtype(case.dtype)
    if case.way == 'compile_for_inference':
        run = replknet_zoo.compile_for_inference(built, dtype)  # takes float32
    else:
        built, x = built.to(dtype), x.to(dtype)
        run = built if case.way == 'eager' else torch.compile(built, dynamic=False)

    def call() -> None:
        with torch.inference_mode():
            run(x)
    return call


def training_call(plan: Plan, case: Case, built: nn.Module) -> Callable[[], None]:
    """A call that takes one step: autocast, cross-entropy, fused AdamW, and in float16 a loss scale."""
    x, labels = images(plan, case), torch.zeros(case.batch, dtype=torch.long, device=plan.device)
    run = built if case.way == 'eager' else torch.compile(built, dynamic=False)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler(plan.device, enabled=case.dtype == 'float16')

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(plan.device, torch_dtype(case.dtype)):
            loss = F.cross_entropy(run(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


# ---- Shares of a model's time ------------------------------------------------------------------------------


def depthwise_share(call: Callable[[], None], built: nn.Module, device: str) -> float | None:
    """The part of a call's time that passes in depthwise convolutions of any size; None if it has none.

    Between moments that are noted before and after each of these layers, forward and backward: on a GPU by
    events in its stream.
    """
    notes, hooks = {}, []
    for layer in built.modules():
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels:
            notes[layer] = []
            note = functools.partial(lambda moments, *_: moments.append(moment(device)), notes[layer])
            hooks += [layer.register_forward_pre_hook(note), layer.register_forward_hook(note)]
            if built.training:
                hooks += [layer.register_full_backward_pre_hook(note),
                          layer.register_full_backward_hook(note)]
    if not notes:
        return None
    start = moment(device)
    call()
    end = moment(device)
    for hook in hooks:
        hook.remove()
    if device == 'cuda':
        torch.cuda.synchronize()
    in_layers = sum(seconds_between(*pair) for moments in notes.values()
                    for pair in zip(moments[::2], moments[1::2], strict=True))
    return in_layers / seconds_between(start, end)


def moment(device: str) -> torch.cuda.Event | float:
    """Now: on a GPU, when it comes to this point."""
    if device != 'cuda':
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Of two moments, the GPU having passed both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def host_seconds(call: Callable[[], None]) -> float:
    """Median seconds until a call returns, its work queued on a GPU that had nothing to do.

    For a call that leaves the GPU little: about 1,000 launches fill its queue, and then the host waits.
    """
    times = []
    for _ in range(1 + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times[1:])  # the first compiles


# ---- All of them -------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A part of the report, and its share of the time."""
    name: str
    share: float
    tasks: Callable[[Plan], Iterator[Task]]


SECTIONS = (
    Section('checks', 0.12, check_tasks),
    Section('inference', 0.12, inference_tasks),
    Section('training', 0.13, training_tasks),
    Section('table 6', 0.10, table_6_tasks),
    Section('stages', 0.07, stage_tasks),
    Section('table 1', 0.12, table_1_tasks),
    Section('RepMLPNet', 0.04, mlp_tasks),
    Section('compiled inference', 0.13, compiled_inference_tasks),
    Section('compiled training', 0.17, compiled_training_tasks),  # the compiler may take minutes
)
