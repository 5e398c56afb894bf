"""The threads of a run, and the CPUs that they may use."""
import ast
import os

import pytest

from conftest import ROOT, run_script

# What main.py does to the threads of its process: the CPUs of each, and of a process that it started before.
THREADS = """
import os, subprocess, sys
import main, distributed, torch
child = subprocess.Popen([sys.executable, '-c', 'import os, torch; print(os.sched_getaffinity(0))'], stdout=-1, text=True)
child.wait()
before = set(os.listdir('/proc/self/task'))
distributed.bind_this_thread()
torch.ones(torch.get_num_threads() << 16).add(1)
threads = set(os.listdir('/proc/self/task')) - before
print([sorted(os.sched_getaffinity(int(thread))) for thread in (0, *threads)], '|', child.stdout.read().strip(), '|', end='')
"""
several_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='needs two CPUs')


def threads_of_a_run(**env: str) -> tuple[list[list[int]], set[int]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(('OMP_', 'GOMP_'))}
    run = run_script('env', '-i', *(f'{name}={value}' for name, value in {**kept, **env, 'PYTHONPATH': ROOT}.items()),
                     'python', '-c', THREADS)
    threads, child, _ = run.stdout.split('|')
    return ast.literal_eval(threads), ast.literal_eval(child)


@several_cpus
def test_threads_of_a_run_have_cores_of_their_own_and_its_processes_any():
    threads, child = threads_of_a_run()
    cpus = [cpu for thread in threads for cpu in thread]
    assert len(threads) > 1 and len(cpus) == len(set(cpus))
    assert child == os.sched_getaffinity(0)


@several_cpus
@pytest.mark.parametrize('variable', ['GOMP_SPINCOUNT', 'RANK', 'SLURM_PROCID', 'SUBMITIT_LOCAL_NTASKS'])
def test_threads_stay_free_beside_other_processes_and_where_the_user_has_decided(variable):
    threads, _ = threads_of_a_run(**{variable: '100000'})
    assert all(set(thread) == os.sched_getaffinity(0) for thread in threads)


@several_cpus
@pytest.mark.parametrize('nodes, processes', [(['HERE', 'HERE'], 2), (['HERE', 'elsewhere'], 1)])
def test_processes_of_a_node_share_its_cpus(nodes, processes):
    code = f"""
import os, distributed, torch
before = torch.get_num_threads()
distributed.share_out_threads(lambda node: [node if name == 'HERE' else name for name in {nodes}])
print(before // torch.get_num_threads())
"""
    run = run_script('env', '-u', 'OMP_NUM_THREADS', 'python', '-c', code, PYTHONPATH=str(ROOT))
    assert int(run.stdout) == processes
