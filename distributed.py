"""How processes share the CPUs of a node with each other and with other programs.

main.py imports this before anything that loads torch: OpenMP reads its variables at that moment, and never again.
"""
import os
import socket
import sys
from collections.abc import Callable

# Two threads of a parallel region that come to share a CPU, because another program runs on the other one, wait for each other
# at the end of each region until a time slice is over: a step then takes ten to thirty times as long. Bound to a core each they
# share it with the other program alone.
BINDING = {'OMP_PROC_BIND': 'spread', 'OMP_PLACES': 'cores'}
OF_LAUNCHERS = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK', 'SUBMITIT_LOCAL_NTASKS')


def _import_torch_with_bound_threads() -> tuple[set[int], set[int]]:
    """Import torch; return the CPUs of this process, and those of the first thread of parallel regions, which is this one.

    The others are bound from now on, in a process that is alone on its node and whose user has set nothing of OpenMP's. This one
    is not yet: the processes that it starts would have to stay on its core.
    """
    if not hasattr(os, 'sched_setaffinity'):  # on other systems than Linux
        return set(), set()
    cpus = os.sched_getaffinity(0)
    if 'torch' in sys.modules or any(name.startswith(('OMP_', 'GOMP_', *OF_LAUNCHERS)) for name in os.environ):
        return cpus, cpus
    os.environ.update(BINDING)
    import torch  # noqa: F401
    for name in BINDING:
        del os.environ[name]  # the processes that this one starts have threads of their own
    first = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    return cpus, first


CPUS, FIRST = _import_torch_with_bound_threads()


def bind_this_thread() -> None:
    """Bind the calling thread, and what it starts, to the core that the other threads of its parallel regions leave to it."""
    if FIRST != CPUS:
        os.sched_setaffinity(0, FIRST)


def share_out_threads(gather: Callable[[object], list]) -> None:
    """Give each process of a node its part of the threads, unless OMP_NUM_THREADS or the launcher has given it CPUs.

    gather: utils.gather; every process must call this.
    """
    import torch
    node = socket.gethostname()
    processes = gather(node).count(node)
    if processes > 1 and 'OMP_NUM_THREADS' not in os.environ and len(CPUS) == os.cpu_count():
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
