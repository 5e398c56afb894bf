"""The CPU implementation: the C++ kernels in cpu_kernels/, compiled for this machine on first use.

kernels.h says what they compute and fft_conv.cpp how. Importing this compiles nothing, nor does asking
`implementation`.
"""
import contextlib
import ctypes
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator

import torch

from large_kernel_conv.geometry import Geometry
from large_kernel_conv.tracing import assume_constant_result

SOURCES = pathlib.Path(__file__).parent / 'cpu_kernels'
NAME = 'large_kernel_conv_cpu'
# Lanes as wide as this CPU's. Floating-point exceptions need no order, products may be fused with sums (GCC's
# default). Zeros keep their signs: without them GCC turns a - (b - c) into a + (c - b), and computes
# differences twice.
FLAGS = ['-O3', '-mcpu=native' if platform.machine() in ('aarch64', 'arm64') else '-march=native',
         '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast']


def implementation(channels: int, height: int, width: int, geometry: Geometry) -> tuple[str, str]:
    """Return which kernel would convolve maps (N, channels, height, width), and why.

    'cpu fft' or 'cpu direct', which the kernels themselves choose: 'cpu' where they are not compiled yet,
    'pytorch' where they cannot be had.
    """
    if _loaded is None and not _is_complete(library_file()):
        return 'cpu', 'the CPU kernels, which choose between fft and direct, are compiled at first use'
    refusal = load()
    if refusal is not None:
        return 'pytorch', refusal
    columns, rows, tiles, _ = _plan(channels, height, width, geometry)
    taps = f'the taps of a {geometry} kernel on a {height} x {width} map'
    if not (rows or columns):
        return 'cpu direct', f'{taps} that meet pixels cost less than the Fourier transforms there are'
    if not (rows and columns):
        along = 'rows' if columns else 'columns'
        return 'cpu fft', f'transforms of {rows or columns} points along {along} cost less than {taps}'
    return 'cpu fft', f'{tiles} tile{"s" * (tiles > 1)} of {rows} x {columns} points cost less than {taps}'


def spectra_size(channels: int, height: int, width: int, geometry: Geometry) -> int:
    """The floats that the operator prepared_spectra returns. The kernels must be loaded, or can be."""
    return _plan(channels, height, width, geometry)[3]


def _plan(channels: int, height: int, width: int, geometry: Geometry) -> tuple[int, ...]:
    """(points of a row's transform, of a column's: 0 where there is none; tiles; floats of all spectra)."""
    given, result = (channels, height, width, *geometry[:8]), (ctypes.c_int64 * 4)()
    _load()[0].large_kernel_conv_plan((ctypes.c_int64 * len(given))(*given), result)
    return tuple(result)


_LOADING, _loaded = threading.Lock(), None


@assume_constant_result
def load() -> str | None:
    """Load the kernels, compiled the first time on this machine; return why they cannot be had, or None."""
    return (_loaded or _load())[1]  # looked at before the lock is taken: every convolution asks


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, loaded by the first call, or why there is none."""
    global _loaded
    with _LOADING:
        _loaded = _loaded or _try_to_load()
    return _loaded


def _try_to_load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        # it registers its operators with torch as it is loaded
        return ctypes.CDLL(str(_built_library())), None
    except Exception as error:  # no compiler, an old one, a read-only folder, ...: training goes on, slower
        lines = str(error).splitlines() or ['no message']
        line = next((line for line in lines if 'error:' in line or 'not found' in line), lines[0])
        reason = f'the CPU kernels could not be compiled ({type(error).__name__}: {line[:200]})'
        warnings.warn(f'large-kernel convolutions run as F.conv2d, which is many times slower: {reason}. '
                      'Needed are a C++20 compiler (g++ or clang) and a folder to write to '
                      '(TORCH_EXTENSIONS_DIR).', stacklevel=2)
        return None, reason


def library_file() -> pathlib.Path:
    """Where the library for these sources, this torch and this CPU is, or will be."""
    files = [*SOURCES.glob('*.cpp'), *SOURCES.glob('*.h')]  # not the page beside them
    key = [file.read_bytes() for file in sorted(files)]
    key += [' '.join(FLAGS).encode(), torch.__version__.encode(), _cpu().encode()]
    digest = hashlib.sha256(b'\0'.join(key)).hexdigest()[:16]
    root = os.environ.get('TORCH_EXTENSIONS_DIR') or pathlib.Path.home() / '.cache' / 'torch_extensions'
    name = f'{NAME}_{digest}'
    return pathlib.Path(root, name, f'{name}.so')


def _is_complete(library: pathlib.Path) -> bool:
    complete = library.with_name('complete')  # holds the library's size, and is written last
    return complete.is_file() and library.is_file() and complete.read_text() == str(library.stat().st_size)


def _built_library() -> pathlib.Path:
    """The library, compiled if it is not there yet."""
    library = library_file()
    folder = library.parent
    if _is_complete(library):
        return library
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix('.lock')):
        if _is_complete(library):  # another process was first
            return library
        print(f'Compiling the large-kernel convolution for this CPU, once, into {folder} (about 30 seconds)',
              file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left, torch's lock file among it
        folder.mkdir()
        _compile(sorted(SOURCES.glob('*.cpp')), folder)
        library.with_name('complete').write_text(str(library.stat().st_size))
    return library


def _compile(sources: list[pathlib.Path], folder: pathlib.Path) -> None:
    logger = logging.getLogger('torch.utils.cpp_extension')
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells machines without a GPU about CUDA
    try:
        from torch.utils import cpp_extension  # takes a while to import
        with _scripts_in_path():
            # a name of its own: of a second one of the same name in a process torch would change the file's
            cpp_extension.load(folder.name, list(map(str, sources)), extra_cflags=FLAGS,
                               build_directory=str(folder), is_python_module=False)
    finally:
        logger.setLevel(level)


def _cpu() -> str:
    """What tells CPUs with other instructions apart."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(('flags', 'Features')):
                return line
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    """Hold a lock that the system takes back when the process ends, however it ends."""
    import fcntl
    with file.open('w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scripts_in_path() -> Iterator[None]:
    """Let ninja be found where pip put it, in an environment that was not activated too."""
    before = os.environ.get('PATH')
    os.environ['PATH'] = os.pathsep.join(filter(None, [sysconfig.get_path('scripts'), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ['PATH']
        else:
            os.environ['PATH'] = before
