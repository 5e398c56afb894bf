"""The GPU implementation, as far as it can be proved without a GPU, and on one where there is one."""
import itertools
import os
import pathlib
import random
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

from conftest import ROOT
from large_kernel_conv import depthwise_conv2d, implementation, triton_conv
from large_kernel_conv.geometry import Geometry, make_geometry

triton = pytest.importorskip('triton', reason='Triton comes with the CUDA and ROCm wheels of torch for Linux')
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from large_kernel_conv import triton_kernels  # noqa: E402

# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('interpreted', [True, pytest.param(False, marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='a GPU is needed'))], ids=['interpreter', 'GPU'])
@pytest.mark.parametrize('marks', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_values(marks, interpreted):
    environment = {**os.environ, 'TRITON_INTERPRET': str(int(interpreted)), 'OPENBLAS_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'pytest', '-q', '-m', marks, 'tests/triton_values.py']
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r'\d\d passed', run.stdout)
    assert 'skipped' not in run.stdout or not interpreted, run.stdout


# --- compiled code ------------------------------------------------------------------------------------------

TARGETS = {'sm_80': GPUTarget('cuda', 80, 32), 'sm_90': GPUTarget('cuda', 90, 32),
           'gfx942': GPUTarget('hip', 'gfx942', 64)}
# the last as triton_conv has it for all of AMD's
CAPABILITIES = {'sm_80': (8, 0), 'sm_90': (9, 0), 'gfx942': (9, 0)}
# bytes a program may have; sm_80: as on sm_86 and sm_89
SHARED_MEMORY = {'sm_80': 101376, 'sm_90': 232448, 'gfx942': 65536}
CUOBJDUMP = pathlib.Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
POINTERS = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32'}
# N, C, H, W, K: of the paper's Table 1; stage 3 of RepLKNet-31B; others
LAYERS = [(64, 384, 32, 32, 31), (64, 512, 14, 14, 27), (64, 128, 56, 56, 31), (64, 1024, 7, 7, 13),
          (1, 128, 96, 96, 31), (2, 128, 127, 131, 51), (8, 64, 32, 32, 7),
          # UniRepLKNet, SLaK, a strip, a causal sequence
          (64, 320, 14, 14, make_geometry(7, 7, None, 2)), (64, 96, 56, 56, make_geometry(51, 5)),
          (64, 64, 64, 64, make_geometry(1, 21)), (64, 256, 1, 512, make_geometry(1, 31, ((0, 0), (30, 0))))]
KERNELS = ['convolve', 'weight gradient']


def compiled(kernel: str, layer: tuple[int, ...], dtype: torch.dtype, target: str, precision: str,
             bias: bool = False):
    """What Triton makes of a kernel, specialised as a launch would: with its tile sizes, numbers that are 1,
    multiples of 16."""
    *size, k = layer
    geometry = k if isinstance(k, Geometry) else make_geometry(k, k)
    out_size = *size[:2], *geometry.output_size(*size[2:])
    align, out_align = triton_conv.alignment(size[3]), triton_conv.alignment(out_size[3])
    numbers = {'images': size[0], 'channels': size[1], 'height': size[2], 'width_by_align': size[3] // align,
               'out_height': out_size[2], 'out_width_by_align': out_size[3] // out_align}
    pointer, warps = POINTERS[dtype], triton_conv.warps(CAPABILITIES[target])
    constants = {'ALIGN': align, 'OUT_ALIGN': out_align, 'PRECISION': precision, 'IN_FLOAT32': False}
    if kernel == 'weight gradient':
        function = triton_kernels.weight_gradient
        sizes = triton_conv.weight_gradient_tile(out_size, dtype, warps=warps)
        constants.update(triton_conv.weight_gradient_constants(geometry))
        pointers = {'x': pointer, 'grad': pointer, 'sums': '*fp32'}
        numbers['parts'] = triton_conv.weight_gradient_parts(size[0], size[1], geometry, sizes)
    else:
        function = triton_kernels.convolve
        sizes = triton_conv.convolve_tile(out_size, dtype, precision, warps=warps)
        margins = top, _, left, _ = triton_conv.taps_margins(geometry, size[3], sizes)
        _, taps_height, taps_width, _ = triton_conv.taps_shape(size[1], geometry, *margins, dtype)
        numbers.update(top=top, left=left, taps_height=taps_height, taps_width=taps_width)
        constants.update(triton_conv.convolve_constants(geometry), HAS_BIAS=bias)
        constants.update({} if bias else {'bias': None})
        taps = '*fp32' if dtype == torch.float32 else '*i64'
        pointers = {'x': pointer, 'taps': taps, 'bias': pointer, 'y': pointer}
    options = {name: sizes.pop(name) for name in ('num_warps', 'num_stages')}
    constants.update(sizes)
    names = function.arg_names
    constants.update({name: 1 for name in names if numbers.get(name) == 1})
    signature = {name: 'constexpr' if name in constants else pointers.get(name, 'i32') for name in names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names)
               if name not in constants and (name in pointers or numbers[name] % 16 == 0)}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options=options)


def cuobjdump(what: str, cubin: pathlib.Path) -> str:
    return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout


def matrix_loop(sass: str) -> list[str]:
    """The instructions of the shortest loop that holds a matrix product."""
    code = [(int(address, 16), text) for address, text in re.findall(r'/\*([0-9a-f]{4,})\*/\s+(.*?);', sass)]
    loops = []
    for address, text in code:
        jump = re.search(r'\bBRA\S*\s.*?(0x[0-9a-f]+)', text)
        if jump and int(jump[1], 16) <= address:
            loops.append([t for a, t in code if int(jump[1], 16) <= a <= address])
    return min((loop for loop in loops if any(re.search(r'\bH?G?MMA\b', text) for text in loop)), key=len)


# what is compiled each time, so that each way to multiply and to load the taps is; the rest is slow
CHOSEN = {('sm_80', torch.float16), ('sm_90', torch.bfloat16), ('sm_90', torch.float32),
          ('gfx942', torch.float16), ('gfx942', torch.float32)}


def layers_and_dtypes(*targets: str) -> pytest.MarkDecorator:
    """Each layer in each dtype for each target; slow, but for one of the first two layers where chosen."""
    cases = []
    for target, (number, layer), dtype in itertools.product(targets, enumerate(LAYERS), POINTERS):
        quick = (target, dtype) in CHOSEN and number == (dtype == torch.float32)
        cases.append(pytest.param(target, layer, dtype, marks=() if quick else pytest.mark.slow,
                                  id=f'{target}-{"x".join(map(str, layer))}-{dtype}'))
    return pytest.mark.parametrize('target, layer, dtype', cases)


@pytest.mark.parametrize('kernel', KERNELS)
@layers_and_dtypes('sm_80', 'sm_90')
def test_nvidia_code_multiplies_on_tensor_cores_and_spills_nothing_there(kernel, target, layer, dtype,
                                                                         tmp_path):
    precisions = ('tf32x3',) if kernel == 'weight gradient' else ('tf32', 'tf32x3')
    for precision in precisions if dtype == torch.float32 else ('tf32',):
        found = compiled(kernel, layer, dtype, target, precision)
        assert found.metadata.shared <= SHARED_MEMORY[target]
        cubin = tmp_path / 'kernel.cubin'
        cubin.write_bytes(found.asm['cubin'])
        loop = matrix_loop(cuobjdump('-sass', cubin))
        instruction = {'sm_80': r'\bHMMA\b', 'sm_90': r'\bHGMMA\b'}[target]
        products = [text for text in loop if re.search(instruction, text)]
        expected = {torch.float16: r'F32(?!.*BF16)', torch.bfloat16: 'BF16', torch.float32: 'TF32'}[dtype]
        assert products and all(re.search(expected, text) for text in products), loop
        # loads and stores of spilled registers
        assert not [text for text in loop if re.search(r'\b(LDL|STL)\b', text)]
        assert 'FFMA' not in ' '.join(loop) or precision == 'tf32x3'


@pytest.mark.parametrize('kernel', KERNELS)
@layers_and_dtypes('gfx942')
def test_amd_code_multiplies_on_matrix_cores_and_spills_nothing(kernel, target, layer, dtype):
    found = compiled(kernel, layer, dtype, target, 'ieee')
    assert found.metadata.shared <= SHARED_MEMORY[target]
    assembly = found.asm['amdgcn']
    assert re.search({torch.float16: r'v_mfma_f32_\w+_f16', torch.bfloat16: r'v_mfma_f32_\w+_bf16',
                      torch.float32: r'v_mfma_f32_\w+_f32'}[dtype], assembly)
    for nothing in (r'\.vgpr_spill_count: *0\b', r'\.private_segment_fixed_size: *0\b'):
        assert re.search(nothing, assembly)


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('layer', [(1, 1, 1, 16, 7), (1, 1, 5, 1, 31), (1, 16, 1, 64, 7)])
@pytest.mark.parametrize('target', ['sm_80', pytest.param('sm_90', marks=pytest.mark.slow)])
def test_numbers_that_are_1_compile(kernel, layer, target):
    """Triton makes constants of them, which not every expression takes."""
    assert compiled(kernel, layer, torch.float16, target, 'tf32').asm['cubin']


def test_a_bias_compiles():
    assert compiled('convolve', LAYERS[0], torch.float16, 'sm_80', 'tf32', bias=True).asm['cubin']


# --- the choice ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A double of a GPU: tensors on it have no values, torch says what it is, and Triton's driver is
    there."""
    triton_conv._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Double')
    monkeypatch.setattr(triton.runtime.driver, '_active', mock.Mock())
    with FakeTensorMode():
        yield
    triton_conv._problem.cache_clear()


def layer(kernel: int = 31, dtype: torch.dtype = torch.float16,
          channels: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.empty(2, channels, 16, 16, dtype=dtype, device='cuda'),
            torch.empty(channels, 1, kernel, kernel, dtype=dtype, device='cuda'))


def test_gpu_tensors_run_on_triton_from_compute_capability_8_on(gpu, monkeypatch):
    for dtype in POINTERS:
        assert implementation(*layer(dtype=dtype))[0] == 'triton'
    triton_conv._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    name, reason = implementation(*layer())
    assert name == 'pytorch' and reason.startswith('Double is older than compute capability 8.0')


@pytest.mark.parametrize('name, served', [
    ('gfx90a:sramecc+', True), ('gfx942:sramecc+:xnack-', True), ('gfx950', True), ('gfx906', False),
    ('gfx1100', False), ('gfx1201', False)])
def test_amd_gpus_with_matrix_cores_for_float32_run_on_triton(name, served, gpu, monkeypatch):
    monkeypatch.setattr(torch.version, 'hip', '7.0')
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: mock.Mock(gcnArchName=name))
    assert (implementation(*layer())[0] == 'triton') is served


def test_what_is_left_to_pytorch_on_a_gpu(gpu, monkeypatch):
    assert implementation(*layer(5))[0] == 'pytorch' and implementation(*layer(7))[0] == 'triton'
    assert implementation(*layer(dtype=torch.float64)) == ('pytorch', 'torch.float64 is left to F.conv2d')
    x, weight = layer(7)
    x = x.to(memory_format=torch.channels_last)
    reason = 'F.conv2d is left kernels smaller than 9 x 9 in channels_last'
    assert implementation(x, weight) == ('pytorch', reason)
    assert implementation(x, layer(9)[1])[0] == 'triton'
    assert implementation(*layer(channels=65536)) == ('pytorch', 'a GPU kernel takes at most 65535 channels')
    sliced = torch.empty_strided((2, 8, 16, 16), (4096, 512, 32, 2), dtype=torch.float16, device='cuda')
    assert implementation(sliced, layer(7)[1])[0] == 'triton'  # neither contiguous nor channels_last
    triton_conv._problem.cache_clear()
    monkeypatch.setattr(triton_conv.importlib.util, 'find_spec', lambda name: None)
    assert implementation(*layer()) == ('pytorch', 'Triton is not installed')


def test_a_triton_that_does_not_start_is_told_once_and_replaced(gpu, monkeypatch):
    class Driver:
        """A double of Triton's driver on a machine without a C compiler."""
        @property
        def utils(self):
            raise RuntimeError('Failed to find C compiler')
    monkeypatch.setattr(triton.runtime.driver, '_active', Driver())
    with pytest.warns(UserWarning, match='run as F.conv2d: Triton does not start .*C compiler') as warned:
        assert implementation(*layer())[0] == implementation(*layer())[0] == 'pytorch'
    assert len(warned) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_gpu_tensors_trace_to_the_operator_without_a_gpu():
    triton_conv._problem.cache_clear()
    with FakeTensorMode():
        check_trace()


def check_trace() -> None:
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward
    x, weight = layer(13, torch.float32)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    run = torch.compile(lambda x, weight: depthwise_conv2d(x, weight).relu(), backend=collect, fullgraph=True)
    y = run(x, weight)
    assert y.shape == x.shape and y.device.type == 'cuda'
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert [node.target for node in graphs[0].graph.nodes if node.op == 'call_function'] == [
        torch.ops.large_kernel_conv.depthwise_conv2d]


def test_float32_products_are_as_exact_as_torch_lets_cudnn_be(monkeypatch):
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        assert triton_conv.precision() == 'tf32x3'
        torch.backends.cudnn.allow_tf32 = True
        assert triton_conv.precision() == 'tf32'
        torch.backends.cudnn.conv.fp32_precision = 'ieee'  # the newer name of the same
        assert triton_conv.precision() == 'tf32x3'
    finally:
        torch.backends.cudnn.allow_tf32 = before
    monkeypatch.setattr(torch.version, 'hip', '7.0')
    assert triton_conv.precision() == 'ieee'


@pytest.mark.parametrize('dtype', POINTERS, ids=str)
@pytest.mark.parametrize('precision', ['tf32', 'tf32x3'])
def test_tiles_read_their_taps_where_they_are(dtype, precision):
    """Rows and columns of the laid out taps, by the formulas of triton_kernels.convolve, at the ends of each
    of its ranges."""
    draw = random.Random(0)
    for i in range(1000):
        shape = draw.choice([1, 3, 64]), 2, draw.randint(1, 150), draw.randint(1, 150)
        geometry = make_geometry(*[draw.randrange(3, 64, 2)] * 2)
        if i % 2:
            kernel, step = ([draw.randint(1, most) for _ in range(2)] for most in (50, 3))
            reach = [(k - 1) * d for k, d in zip(kernel, step, strict=True)]
            geometry = make_geometry(*kernel, [[draw.randint(0, r), draw.randint(0, r)] for r in reach], step)
        out_shape = *shape[:2], *geometry.output_size(*shape[2:])
        if min(out_shape) < 1:
            continue
        tiles = triton_conv.convolve_candidates(out_shape, dtype, precision) if draw.random() < 0.2 else [
            triton_conv.convolve_tile(out_shape, dtype, precision)]
        sides = zip(*(triton_conv.taps_margins(geometry, shape[3], tile) for tile in tiles), strict=True)
        top, bottom, left, right = map(max, sides)
        _, taps_height, taps_width, _ = triton_conv.taps_shape(2, geometry, top, bottom, left, right, dtype)
        for tile in tiles:
            rows, columns = tap_rows_and_columns(shape, geometry, tile)
            assert top + rows[0] >= 0 and top + rows[1] < taps_height, (shape, geometry, tile)
            assert left + columns[0] >= 0 and left + columns[1] < taps_width, (shape, geometry, tile)


def tap_rows_and_columns(shape: tuple[int, ...], geometry: Geometry,
                         tile: dict[str, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and last row, from a kernel's first, and column, from that of an output's own pixel, that any
    program of a convolution reads."""
    (_, _, height, width), (down, across) = shape, geometry.reach
    out_height, out_width = geometry.output_size(height, width)
    depth, rows, columns = tile['DEPTH'], [], []
    tile_width, tile_height = tile['COLUMNS'] or out_width, tile['BANDS'] * tile['ROWS']
    for row in range(0, out_height, tile_height):
        shifts = range(max(0, geometry.top - (row + tile_height - tile['ROWS'])),
                       min(down + tile['ROWS'], height + geometry.top - row), tile['IN_ROWS'])
        rows += [shifts[0] - (tile['ROWS'] - 1), shifts[-1] + tile['IN_ROWS'] - 1] if shifts else []
    for column in range(0, out_width, tile_width):
        first = max(0, column - geometry.left) // depth * depth
        blocks = range(first, min(width, column + tile_width + across - geometry.left), depth)
        columns += [blocks[0] - (column + tile_width - 1), blocks[-1] + depth - 1 - column] if blocks else []
    return (min(rows), max(rows)), (min(columns), max(columns))


@pytest.mark.parametrize('target', TARGETS)
def test_the_kernel_that_lays_out_taps_compiles(target):
    names = triton_kernels.lay_out_taps.arg_names
    for pointer, turned in (('*fp16', False), ('*fp32', True)):
        constants = {**triton_conv.taps_constants(make_geometry(31, 31)), 'PACK': 4, 'TURNED': turned,
                     'BLOCK': 1024}
        types = {'weight': pointer, 'taps': '*fp16', **dict.fromkeys(constants, 'constexpr')}
        source = ASTSource(triton_kernels.lay_out_taps, {name: types.get(name, 'i32') for name in names},
                           {(names.index(name),): value for name, value in constants.items()})
        assert triton.compile(source, target=TARGETS[target]).asm['amdgcn' if target == 'gfx942' else 'cubin']


@pytest.mark.parametrize('precision', ['tf32', 'tf32x3'])
@pytest.mark.parametrize('dtype', POINTERS, ids=str)
def test_tile_sizes_are_what_the_kernels_can_take(dtype, precision):
    for images in (1, 2, 3, 16, 64, 257):
        for side in (1, 7, 14, 33, 56, 64, 224, 1024, 30000):
            for channels in (1, 1024):
                shape = images, channels, side, side
                tile = triton_conv.convolve_tile(shape, dtype, precision)
                other = triton_conv.weight_gradient_tile(shape, dtype)
                assert tile['IMAGES'] * tile['BANDS'] >= 16 <= tile['IN_ROWS'] * tile['DEPTH']
                assert tile['PIXELS'] >= 16
                assert tile['PIXELS'] >= tile['ROWS'] * (tile['COLUMNS'] or side)
                assert other['IMAGES'] * other['ROWS'] >= 16
                for tile_of in (triton_conv.convolve_tile, triton_conv.weight_gradient_tile):
                    options = {'precision': precision} if tile_of is triton_conv.convolve_tile else {}
                    # offsets in a larger x, of 32 bits
                    assert tile_of(shape, dtype, **options, values=2 ** 30)['IMAGES'] == 1
                for sizes in (tile, other):
                    powers_of_two = sizes.keys() - {'ROWS', 'num_stages'}
                    assert all(sizes[name] & (sizes[name] - 1) == 0 for name in powers_of_two)
                    assert sizes['IMAGES'] == 1 or sizes['IMAGES'] * channels * side * side < 2 ** 31
