"""run_with_submitit.py without a cluster: options, what submitit is given, a run by its local executor."""
import argparse
import copy
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import submitit.core.submission
import torch

import main
import run_with_submitit
from conftest import ROOT, TOY, log_lines, run_script
from run_with_submitit import Trainer
from utils import UserError

# (command as published, its nodes)
PUBLISHED = [
    ('python run_with_submitit.py --nodes 4 --ngpus 8 --model RepLKNet-31B --drop_path 0.5 --batch_size 64 '
     '--lr 4e-3 --update_freq 1 --model_ema true --model_ema_eval true --data_path /path/to/imagenet-1k '
     '--warmup_epochs 10 --epochs 300 --job_dir your_training_dir', 4),
    ('python run_with_submitit.py --nodes 4 --ngpus 8 --model RepLKNet-31B --drop_path 0.8 --input_size 384 '
     '--batch_size 32 --lr 4e-4 --epochs 30 --weight_decay 1e-8 --update_freq 1 --cutmix 0 --mixup 0 '
     '--finetune RepLKNet-31B_ImageNet-1K_224.pth --model_ema true --model_ema_eval true --data_path '
     '/path/to/imagenet-1k --warmup_epochs 1 --job_dir your_training_dir --layer_decay 0.7', 4),
    ('python run_with_submitit.py --nodes 16 --ngpus 8 --model RepLKNet-31B --drop_path 0.1 --batch_size 32 '
     '--lr 4e-3 --update_freq 1 --warmup_epochs 5 --epochs 90 --data_set image_folder --nb_classes 21841 '
     '--disable_eval true --data_path /path/to/imagenet-22k --job_dir /path/to/save_results', 16),
    ('python run_with_submitit.py --nodes 2 --ngpus 8 --model RepLKNet-31B --drop_path 0.2 --input_size 224 '
     '--batch_size 32 --lr 4e-4 --epochs 30 --weight_decay 1e-8 --update_freq 1 --cutmix 0 --mixup 0 '
     '--finetune RepLKNet-31B_ImageNet-22K.pth --model_ema true --model_ema_eval true --data_path '
     '/path/to/imagenet-1k --warmup_epochs 1 --job_dir your_training_dir --layer_decay 0.7', 2),
    ('python run_with_submitit.py --nodes 4 --ngpus 8 --model RepLKNet-31B --drop_path 0.3 --input_size 384 '
     '--batch_size 16 --lr 4e-4 --epochs 30 --weight_decay 1e-8 --update_freq 1 --cutmix 0 --mixup 0 '
     '--finetune RepLKNet-31B_ImageNet-22K.pth --model_ema true --model_ema_eval true --data_path '
     '/path/to/imagenet-1k --warmup_epochs 1 --job_dir your_training_dir --layer_decay 0.7 --min_lr 3e-4', 4),
    ('python run_with_submitit.py --nodes 16 --ngpus 8 --model RepLKNet-31L --drop_path 0.1 --batch_size 32 '
     '--lr 4e-3 --update_freq 1 --warmup_epochs 5 --epochs 90 --data_set image_folder --nb_classes 21841 '
     '--disable_eval true --data_path /path/to/imagenet-22k --job_dir /path/to/save_results', 16),
    ('python run_with_submitit.py --nodes 4 --ngpus 8 --model RepLKNet-31L --drop_path 0.3 --input_size 384 '
     '--batch_size 16 --lr 4e-4 --epochs 30 --weight_decay 1e-8 --update_freq 1 --cutmix 0 --mixup 0 '
     '--finetune RepLKNet-31L_ImageNet-22K.pth --model_ema true --model_ema_eval true --data_path '
     '/path/to/imagenet-1k --warmup_epochs 1 --job_dir your_training_dir --layer_decay 0.7 --min_lr 3e-4', 4)]
# one epoch, without a GPU
DIGITS = [*TOY, '--data_set', 'DIGITS', '--batch_size', '64', '--epochs', '1', '--warmup_epochs', '0',
          '--lr', '1e-3', '--mixup', '0', '--cutmix', '0', '--aa', 'none', '--reprob', '0',
          '--disable_eval', 'true']
ONE_VALUE = ['--input_size', '32', '--batch_size', '1', '--mixup', '0', '--cutmix', '0']


def parse(monkeypatch, *options) -> argparse.Namespace:
    monkeypatch.setattr(sys, 'argv', ['run_with_submitit.py', *map(str, options)])
    return run_with_submitit.parse_args()


@pytest.fixture
def submitted(monkeypatch):
    """What a test double of submitit.AutoExecutor, which submits nothing, was given."""
    record = {}
    real = submitit.AutoExecutor

    class RecordingExecutor:
        def __init__(self, folder, cluster=None, **options):
            record.update(folder=folder, cluster=cluster, **options)

        def update_parameters(self, **parameters):
            # submitit's own check of names and values
            real(record['folder'], cluster='debug').update_parameters(**parameters)
            record['parameters'] = parameters

        def submit(self, function):
            record['function'] = function
            return types.SimpleNamespace(job_id='17')

    monkeypatch.setattr(submitit, 'AutoExecutor', RecordingExecutor)
    return record


@pytest.mark.parametrize(('command', 'nodes'), PUBLISHED)
def test_published_commands_are_submitted_as_they_are(command, nodes, monkeypatch, submitted, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = shlex.split(command.replace('/path/to/save_results', 'path/to/save_results'))[2:]
    run_with_submitit.submit(parse(monkeypatch, *options))
    parameters = submitted['parameters']
    assert (parameters['nodes'], parameters['tasks_per_node'], parameters['gpus_per_node']) == (nodes, 8, 8)
    assert (parameters['timeout_min'], parameters['cpus_per_task']) == (72 * 60, 10)
    assert parameters['name'] == 'replknet'
    # nothing of one company's cluster
    assert not {'slurm_partition', 'slurm_constraint', 'slurm_comment', 'mem_gb'} & parameters.keys()
    job_dir = tmp_path / options[options.index('--job_dir') + 1]
    assert submitted['cluster'] == 'slurm'
    assert submitted['folder'] == submitted['function'].args.output_dir == str(job_dir)
    assert job_dir.is_dir()


def test_published_job_options_have_their_defaults_but_for_one_companys(golden, monkeypatch):
    args = vars(parse(monkeypatch))
    published = {option['flag'].removeprefix('--'): option['default']
                 for option in golden('training')['submitit_arguments']}
    neutral = {'partition': '', 'use_volta32': False, 'job_dir': args['job_dir']}
    assert {name: args[name] for name in published} == {**published, **neutral}


@pytest.mark.parametrize(('options', 'constraint'), [
    ([], None), (['--use_volta32', 'false'], None), (['--use_volta32'], 'volta32gb'),
    (['--use_volta32', 'true'], 'volta32gb'), (['--constraint', 'ib'], 'ib'),
    (['--constraint', 'ib', '--use_volta32'], 'ib&volta32gb')])
def test_use_volta32_is_a_switch_like_the_others(options, constraint, monkeypatch, submitted, tmp_path):
    run_with_submitit.submit(parse(monkeypatch, *options, '--job_dir', tmp_path))
    assert submitted['parameters'].get('slurm_constraint') == constraint


def test_what_the_cluster_asks_for_is_passed_on(monkeypatch, submitted, tmp_path):
    run_with_submitit.submit(parse(
        monkeypatch, '--job_dir', tmp_path, '--partition', 'long', '--comment', 'for the paper',
        '--account', 'vision', '--qos', 'high', '--exclude', 'node[1-2]', '--mem', '320',
        '--cpus_per_task', '6', '--timeout', '0.5', '--job_name', 'mine'))
    expected = {'slurm_partition': 'long', 'slurm_comment': 'for the paper', 'slurm_account': 'vision',
                'slurm_qos': 'high', 'slurm_exclude': 'node[1-2]', 'mem_gb': 320, 'cpus_per_task': 6,
                'timeout_min': 30, 'name': 'mine'}
    parameters = submitted['parameters']
    assert {name: parameters[name] for name in expected} == expected
    assert '--cpus-per-task=6' in parameters['slurm_srun_args']


def test_without_gpus_a_node_runs_one_process_with_memory_of_its_own(monkeypatch, submitted, tmp_path):
    run_with_submitit.submit(parse(monkeypatch, '--ngpus', '0', '--job_dir', tmp_path))
    assert 'gpus_per_node' not in submitted['parameters']
    assert submitted['parameters']['tasks_per_node'] == 1
    assert submitted['parameters']['mem_gb'] > 0


def test_output_dir_may_be_another_than_job_dir(monkeypatch, submitted, tmp_path):
    job, out = tmp_path / 'job', tmp_path / 'out'
    run_with_submitit.submit(parse(monkeypatch, '--job_dir', job, '--output_dir', out))
    assert (submitted['folder'], submitted['function'].args.output_dir) == (str(job), str(out))


def test_jobs_without_a_folder_get_each_their_own(monkeypatch):
    args = parse(monkeypatch)
    assert '%j' in args.job_dir
    assert args.output_dir == args.job_dir


@pytest.fixture
def in_job_17(monkeypatch):
    """A test double of submitit's job: its local executor's variables, as of process 1 of 2."""
    monkeypatch.setenv('SUBMITIT_EXECUTOR', 'local')
    for name, value in {'JOB_ID': 17, 'NTASKS': 2, 'JOB_NUM_NODES': 1, 'NODEID': 0, 'GLOBALID': 1,
                        'LOCALID': 1}.items():
        monkeypatch.setenv(f'SUBMITIT_LOCAL_{name}', str(value))
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        # and put back by monkeypatch, as Trainer sets them
        monkeypatch.setenv(name, 'left by another launcher')
    monkeypatch.delenv('MASTER_PORT')
    monkeypatch.setenv('SUBMITIT_FOLDER', 'set by submitit')
    monkeypatch.setattr(sys, 'path', sys.path.copy())


def test_the_job_id_stands_for_its_sign_and_the_process_knows_its_place(in_job_17, monkeypatch):
    seen = {}

    def double_of_main(args):
        seen.update(vars(args), environ=dict(os.environ))

    monkeypatch.setattr(main, 'main', double_of_main)
    Trainer(parse(monkeypatch, '--job_dir', '/runs/%j', '--log_dir', '/tb/%j'))()
    assert (seen['output_dir'], seen['log_dir']) == ('/runs/17', '/tb/17')
    environ = seen['environ']
    assert (environ['RANK'], environ['WORLD_SIZE'], environ['LOCAL_RANK']) == ('1', '2', '1')
    assert environ['MASTER_ADDR'] != 'left by another launcher'
    assert environ['MASTER_PORT'].isdigit()


def test_a_requeued_job_gets_the_arguments_that_were_given(in_job_17, monkeypatch):
    """main.main sets some of them for itself, a test double of it here all that it can."""
    options = ['--job_dir', '/runs/%j', '--resume', 'weights.pth', '--opt_betas', '0.9', '0.95']
    given = parse(monkeypatch, *options)
    pristine = copy.deepcopy(given)

    def double_of_main(args):
        args.opt_betas.append('changed')
        for name in vars(args):
            setattr(args, name, 'changed')

    monkeypatch.setattr(main, 'main', double_of_main)
    trainer = pickle.loads(pickle.dumps(Trainer(given)))
    trainer()
    again = pickle.loads(pickle.dumps(trainer.checkpoint()))
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function.args == pristine
    again.function()  # which runs


def test_what_a_killed_process_left_half_written_does_not_fail_the_next(in_job_17, monkeypatch, tmp_path):
    monkeypatch.setenv('SUBMITIT_LOCAL_GLOBALID', '0')
    monkeypatch.setattr(main, 'main', lambda args: None)  # a test double that has nothing to do
    paths = submitit.core.utils.JobPaths(tmp_path, '17', 0)
    # a test double: submitit's handlers are not for pytest
    monkeypatch.setattr(signal, 'signal', lambda *handler: None)
    trainer = Trainer(parse(monkeypatch, '--job_dir', tmp_path))
    submitit.helpers.DelayedSubmission(trainer).dump(paths.submitted_pickle)
    partial = [path.with_name(path.name + '.save_tmp')
               for path in (paths.result_pickle, paths.submitted_pickle)]
    for path in partial:
        path.write_bytes(b'half')
    submitit.core.submission.process_job(tmp_path)
    assert submitit.core.utils.pickle_load(paths.result_pickle) == ('success', None)
    assert not any(path.exists() for path in partial)


def test_a_users_error_ends_the_job_with_one_line(in_job_17, monkeypatch):
    def double_of_main(args):
        raise UserError('the disk is full')

    monkeypatch.setattr(main, 'main', double_of_main)
    with pytest.raises(SystemExit, match=r'^ERROR: the disk is full$'):
        Trainer(parse(monkeypatch))()


@pytest.mark.parametrize(('options', 'message'), [
    (['--nodes', '0'], '--nodes 0 must be at least 1'), (['--ngpus', '-1'], '--ngpus -1 must be at least 0'),
    (['--timeout', '0'], '--timeout 0 must be more than 0'),
    (['--mem', '-4'], '--mem -4 must be more than 0'),
    (['--model', 'ResNet-50'], 'unknown --model ResNet-50'),
    (['--timeout', 'nan'], '--timeout nan must be more than 0'),
    (['--timeout', 'inf'], '--timeout inf must be'), (['--mem', 'nan'], '--mem nan must be more than 0'),
    (['--mem', '1e300'], '--mem 1e+300 must be'),
    (['--ngpus', '1000000'], '--ngpus 1000000 must be at least 0 and at most 1000'),
    (['--nodes', '-1'], '--nodes -1 must be'),
    (['--cpus_per_task', '0'], '--cpus_per_task 0 must be at least 1'),
    (['--clip_grad', '-1'], '--clip_grad -1.0 must be at least 0'),
    (['--model_ema_eval'], 'pass --model_ema true'), (['--ngpus', '0', *ONE_VALUE], 'one value a channel'),
    (['--local', '--ngpus', '1', *ONE_VALUE], 'one value a channel')])
def test_bad_options_are_told_before_the_job_is_queued(options, message, monkeypatch, submitted, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        run_with_submitit.submit(parse(monkeypatch, '--job_dir', tmp_path / 'run', *options))
    assert not submitted
    assert not (tmp_path / 'run').exists()


def test_a_file_in_the_place_of_job_dir_is_told(monkeypatch, submitted, tmp_path):
    (tmp_path / 'file').write_text('')
    message = f'--job_dir {tmp_path}/file/run cannot be a folder: {tmp_path}/file is a file'
    with pytest.raises(UserError, match=message):
        run_with_submitit.submit(parse(monkeypatch, '--job_dir', tmp_path / 'file' / 'run'))


def test_one_value_a_channel_is_taken_where_gpus_share_their_statistics(monkeypatch, submitted, tmp_path):
    run_with_submitit.submit(parse(monkeypatch, '--job_dir', tmp_path, '--nodes', '2', '--ngpus', '1',
                                   *ONE_VALUE))
    assert submitted['function'].args.batch_size == 1


def test_a_machine_without_slurm_is_told_in_one_line(tmp_path):
    done = run_script('python', 'run_with_submitit.py', '--job_dir', tmp_path / 'run', PATH=str(tmp_path))
    assert done.returncode == 1
    assert re.fullmatch(r'ERROR: the job was not submitted: .*srun.*--local.*\n', done.stdout), done.stdout


@pytest.mark.slow
def test_a_local_run_trains_in_two_processes_and_says_where(tmp_path):
    """Started from another folder than the code's."""
    done = run_script('python', ROOT / 'run_with_submitit.py', '--local', '--ngpus', '2', '--job_dir',
                      'run_%j', *DIGITS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    job_id = re.search(r'^Submitted job (\d+)$', done.stdout, re.MULTILINE)[1]
    folder = tmp_path / f'run_{job_id}'
    assert f'Logs: {folder}/{job_id}_0_log.out' in done.stdout
    assert f'Checkpoints and log.txt: {folder}\n' in done.stdout
    assert '2 processes, gloo' in (folder / f'{job_id}_0_log.out').read_text()
    assert [line['epoch'] for line in log_lines(folder)] == [0]
    assert torch.load(folder / 'latest.pth', weights_only=True)['epoch'] == 0
    assert not list((tmp_path / 'run_%j').iterdir())  # an empty folder that submitit leaves


@pytest.mark.slow
def test_ctrl_c_on_a_local_run_saves_waits_and_ends_with_130(tmp_path):
    """It reaches all processes in the terminal, submitit's controller too, which would kill the others."""
    command = [sys.executable, 'run_with_submitit.py', '--local', '--ngpus', '2', '--job_dir',
               tmp_path / 'run', *DIGITS]

    def prepare() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    long = ['--epochs', '50', '--batch_size', '8']  # signals are agreed on after 1, 11, 21 ... of 89 steps
    with subprocess.Popen([*map(str, command), *long], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, preexec_fn=prepare,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}) as run:
        end = time.monotonic() + 120
        while not any('Epoch [0]' in log.read_text() for log in (tmp_path / 'run').glob('*_0_log.out')):
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        printed = run.stdout.read()
    assert run.returncode == 130 and 'Traceback' not in printed, printed
    stop = re.search(r'^SIGINT in epoch (\d+), step (\d+) of 89: saved in .*run; leaving', printed, re.M)
    assert stop, printed
    checkpoint = torch.load(tmp_path / 'run' / 'latest.pth', weights_only=True)
    assert (checkpoint['epoch'] + 1, checkpoint['step']) == (int(stop[1]), int(stop[2]))


@pytest.mark.slow
def test_a_local_run_that_fails_says_why(tmp_path):
    done = run_script('python', 'run_with_submitit.py', '--local', '--ngpus', '0', '--job_dir',
                      tmp_path / 'run', *DIGITS, '--batch_size', '4000')
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert 'the 1437 training images do not fill one effective batch of 4000' in last
    assert str(tmp_path / 'run') in last
    assert 'Traceback' not in done.stdout
