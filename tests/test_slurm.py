"""Training on a real SLURM, two nodes of two processes, stopped in every way a cluster has.

It ends to the bit as if it had not been.
"""
import re
from pathlib import Path

import pytest
import torch

import slurm
from conftest import TOY, assert_same, log_lines, run_script

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())]

# 8 epochs of 22 steps, two seconds or more each, so that it does not end in a preemption's grace time; mixup,
# augmentation, drop path and the average are there to be resumed too
RUN = ['--nodes', '2', '--ngpus', '2', *TOY, '--num_workers', '1', '--data_set', 'DIGITS',
       '--batch_size', '16', '--epochs', '8', '--lr', '1e-3', '--warmup_epochs', '1', '--drop_path', '0.1',
       '--model_ema', '--save_ckpt_steps', '5']
LONGER = ['--epochs', '20']  # for what SLURM takes a minute to notice
ENDED = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'PREEMPTED', 'OUT_OF_MEMORY')


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp('slurm') / 'cluster') as cluster:
        yield cluster


class Job:
    """A run submitted with run_with_submitit.py."""

    def __init__(self, cluster: slurm.Cluster, folder: Path, *options):
        self.cluster, self.folder = cluster, folder
        done = run_script('python', 'run_with_submitit.py', *RUN, '--job_dir', folder, *options,
                          SLURM_CONF=cluster.env['SLURM_CONF'])
        assert done.returncode == 0, done.stdout
        self.id = re.search(r'Submitted job (\d+)', done.stdout)[1]

    def printed(self) -> str:
        """What the first process printed, in all its lives."""
        return ''.join(file.read_text() for file in sorted(self.folder.glob(f'{self.id}_0_log.*')))

    def state(self) -> str:
        return self.cluster.job(self.id)['JobState']

    def wait_until_it_printed(self, text: str) -> None:
        def printed() -> bool:
            assert self.state() not in ENDED, f'ended before {text}: {self.printed()}'
            return text in self.printed()
        slurm.wait_for(printed, 200, text)

    def wait_for_the_end(self) -> None:
        state = slurm.wait_for(lambda: self.state() in ENDED and self.state(), 300, 'the end of the job')
        assert state == 'COMPLETED', self.printed()


def assert_it_went_on(job: Job) -> None:
    """It was stopped, queued again, and did not begin again."""
    assert int(job.cluster.job(job.id)['Restarts']) >= 1
    assert 'Going on with epoch' in job.printed()
    assert job.printed().count('Epoch [0] [ 1/22]') == 1


def assert_the_same(job: Job, undisturbed: Job) -> None:
    """Bit for bit: weights, their average, optimizer; and the log."""
    found, expected = (torch.load(run.folder / 'latest.pth', weights_only=True) for run in (job, undisturbed))
    assert found['epoch'] == expected['epoch']
    for name in ('model', 'model_ema', 'optimizer'):
        assert_same(found[name], expected[name], name)
    assert log_lines(job.folder) == log_lines(undisturbed.folder)


@pytest.fixture(scope='module')
def undisturbed(cluster, tmp_path_factory):
    """A run that nothing happened to."""
    job = Job(cluster, tmp_path_factory.mktemp('undisturbed') / 'run')
    job.wait_for_the_end()
    return job


@pytest.fixture(scope='module')
def long_undisturbed(cluster, tmp_path_factory):
    job = Job(cluster, tmp_path_factory.mktemp('long_undisturbed') / 'run', *LONGER)
    job.wait_for_the_end()
    return job


def test_a_job_trains_on_all_its_nodes(cluster, undisturbed):
    fields = cluster.job(undisturbed.id)
    assert (fields['NumNodes'], fields['NumTasks'], fields['Restarts']) == ('2', '4', '0')
    assert '4 processes, gloo' in undisturbed.printed()
    assert [line['epoch'] for line in log_lines(undisturbed.folder)] == list(range(8))


def test_usr2_queues_the_job_again_and_it_ends_as_if_it_had_not_come(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / 'run')
    job.wait_until_it_printed('Epoch [1] [ 1/22]')
    cluster.run('scancel', '--signal=USR2', job.id)
    job.wait_for_the_end()
    assert 'Calling checkpoint method' in job.printed()
    assert_it_went_on(job)
    assert_the_same(job, undisturbed)


def test_a_requeued_job_ends_as_if_it_had_not_been(cluster, undisturbed, tmp_path):
    job = Job(cluster, tmp_path / 'run')
    job.wait_until_it_printed('Epoch [1] [ 1/22]')
    cluster.run('scontrol', 'requeue', job.id)
    job.wait_for_the_end()
    assert 'Calling checkpoint method' not in job.printed()
    assert_it_went_on(job)
    assert_the_same(job, undisturbed)


def test_a_preempted_job_ends_as_if_it_had_not_been(cluster, undisturbed, tmp_path):
    """Preempted by a job of a partition of a higher priority."""
    job = Job(cluster, tmp_path / 'run')
    job.wait_until_it_printed('Epoch [1] [ 1/22]')
    printed = cluster.run('sbatch', '--partition=urgent', '--nodes=2', '--exclusive', '--output=/dev/null',
                          '--wrap=sleep 5')
    urgent = re.search(r'job (\d+)', printed)[1]
    job.wait_for_the_end()
    assert cluster.job(urgent)['JobState'] == 'COMPLETED'
    assert 'Calling checkpoint method' not in job.printed()
    stop = r'SIGTERM in epoch \d, step \d+ of 22: saved in .*; going on until SLURM ends the job'
    assert re.search(stop, job.printed())
    assert_it_went_on(job)
    assert_the_same(job, undisturbed)


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_goes_on_as_if_it_had_not(cluster, long_undisturbed, tmp_path):
    """Three minutes, the shortest: SLURM looks every half a minute, and warns two minutes before the end."""
    job = Job(cluster, tmp_path / 'run', *LONGER, '--timeout', '0.05')
    job.wait_for_the_end()
    assert 'this job is timed-out' in job.printed()
    assert_it_went_on(job)
    assert_the_same(job, long_undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('node', [0, 1])
def test_a_job_whose_node_is_lost_ends_as_if_it_had_not_been(node, cluster, long_undisturbed, tmp_path):
    """slurmctld misses the killed slurmd after a while; until then the processes of its job work on."""
    job = Job(cluster, tmp_path / 'run', *LONGER)
    job.wait_until_it_printed('Epoch [1] [ 1/22]')
    cluster.kill_node(cluster.nodes[node])
    try:
        slurm.wait_for(lambda: cluster.job(job.id)['Restarts'] == '1', 60, 'the job queued again')
    finally:
        cluster.start_node(cluster.nodes[node])
    job.wait_for_the_end()
    assert_it_went_on(job)
    assert_the_same(job, long_undisturbed)
