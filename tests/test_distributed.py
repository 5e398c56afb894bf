"""Processes: what their launchers say, their devices, and the CPUs that their threads may use."""
import argparse
import ast
import os

import pytest
import torch

import distributed
import utils
from conftest import ROOT, run_script

# What main.py does to the threads of its process: the CPUs of each, and of a process that it started before.
THREADS = """
import os, subprocess, sys
import main, distributed, torch
code = 'import os, torch; print(os.sched_getaffinity(0))'
child = subprocess.Popen([sys.executable, '-c', code], stdout=-1, text=True)
child.wait()
before = set(os.listdir('/proc/self/task'))
distributed.bind_this_thread()
torch.ones(torch.get_num_threads() << 16).add(1)
threads = set(os.listdir('/proc/self/task')) - before
print([sorted(os.sched_getaffinity(int(thread))) for thread in (0, *threads)], '|')
print(child.stdout.read().strip(), '|', end='')
"""
several_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='needs two CPUs')


def threads_of_a_run(**env: str) -> tuple[list[list[int]], set[int]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(('OMP_', 'GOMP_'))}
    run = run_script('env', '-i', *(f'{name}={value}' for name,
                                    value in {**kept, **env, 'PYTHONPATH': ROOT}.items()),
                     'python', '-c', THREADS)
    threads, child, _ = run.stdout.split('|')
    return ast.literal_eval(threads), ast.literal_eval(child.strip())


@several_cpus
def test_threads_of_a_run_have_cores_of_their_own_and_its_processes_any():
    threads, child = threads_of_a_run()
    cpus = [cpu for thread in threads for cpu in thread]
    assert len(threads) > 1 and len(cpus) == len(set(cpus))
    assert child == os.sched_getaffinity(0)


@several_cpus
@pytest.mark.parametrize('variable', ['RANK', *(pytest.param(name, marks=pytest.mark.slow) for name in (
    'GOMP_SPINCOUNT', 'SLURM_PROCID', 'SUBMITIT_LOCAL_NTASKS'))])
def test_threads_stay_free_beside_other_processes_and_where_the_user_has_decided(variable):
    threads, _ = threads_of_a_run(**{variable: '100000'})
    assert all(set(thread) == os.sched_getaffinity(0) for thread in threads)


@pytest.mark.parametrize('nodes, threads', [(['here', 'here'], 4), (['here', 'elsewhere'], None)])
def test_processes_of_a_node_share_its_cpus(nodes, threads, monkeypatch):
    given = []
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(distributed, 'CPUS', set(range(os.cpu_count())))
    monkeypatch.setattr(distributed, 'gather',
                        lambda node: [node if name == 'here' else name for name in nodes])
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    monkeypatch.setattr(torch, 'set_num_threads', given.append)
    distributed.share_out_threads()
    assert given == ([threads] if threads else [])


ADDRESS = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': 1}


def process(monkeypatch, *, device='cpu', local_rank=-1, dist_on_itp=False, **env) -> argparse.Namespace:
    """What init_distributed makes of a launcher's variables, in a process that then has no peers to wait
    for."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_STEP_NUM_TASKS',
                 'MASTER_ADDR',
                 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend,
                        **how: joined.append(backend))
    args = argparse.Namespace(device=device, local_rank=local_rank, dist_on_itp=dist_on_itp,
                              dist_url='env://', world_size=1)
    distributed.init_distributed(args)
    args.joined = joined
    return args


@pytest.mark.parametrize(('options', 'rank', 'world_size', 'local_rank'), [
    ({}, 0, 1, 0),
    ({'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0}, 0, 1, 0),
    ({'RANK': 5, 'WORLD_SIZE': 8, 'LOCAL_RANK': 1, 'local_rank': 0, **ADDRESS}, 5, 8, 1),  # the variable wins
    ({'RANK': 5, 'WORLD_SIZE': 8, 'local_rank': 1, **ADDRESS}, 5, 8, 1),
    ({'RANK': 5, 'WORLD_SIZE': 8, 'SLURM_LOCALID': 1, **ADDRESS}, 5, 8, 1),
    # nobody tells the local rank, and there are no GPUs to share out
    ({'RANK': 5, 'WORLD_SIZE': 8, **ADDRESS}, 5, 8, 0),
    ({'SLURM_PROCID': 0, 'SLURM_STEP_NUM_TASKS': 1, 'SLURM_LOCALID': 0}, 0, 1, 0),  # an interactive shell
    ({'SLURM_PROCID': 3, 'SLURM_STEP_NUM_TASKS': 4, 'SLURM_LOCALID': 1, **ADDRESS}, 3, 4, 1),
    ({'dist_on_itp': True, 'OMPI_COMM_WORLD_RANK': 3, 'OMPI_COMM_WORLD_SIZE': 4,
      'OMPI_COMM_WORLD_LOCAL_RANK': 1, **ADDRESS},
     3, 4, 1),
])
def test_launchers_are_recognised(options, rank, world_size, local_rank, monkeypatch):
    args = process(monkeypatch, **options)
    assert (args.rank, args.world_size, args.local_rank) == (rank, world_size, local_rank)
    assert args.joined == (['gloo'] if world_size > 1 else [])


def test_a_local_rank_that_nobody_tells_is_the_rank_within_the_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert process(monkeypatch, RANK=5, WORLD_SIZE=8, **ADDRESS).local_rank == 1


def test_processes_without_an_address_are_told_what_to_set(monkeypatch):
    with pytest.raises(utils.UserError, match='MASTER_ADDR'):
        process(monkeypatch, SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=4)


def test_cuda_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert distributed.select_device('auto') == torch.device('cpu')
    with pytest.raises(utils.UserError, match='--device cuda was asked for, but'):
        distributed.select_device('cuda')
    for unknown in ('gpu', 'meta'):
        with pytest.raises(utils.UserError, match=f'unknown --device {unknown}'):
            distributed.select_device(unknown)


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(utils.UserError, match='process 2 of this node: there is no GPU 2 among the 2'):
        distributed.select_device('auto', 2)
