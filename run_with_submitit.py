"""main.py as a SLURM job, through submitit.

A cluster:     python run_with_submitit.py --nodes 4 --ngpus 8 --model RepLKNet-31B ... --job_dir DIR
CPU nodes:     python run_with_submitit.py --nodes 4 --ngpus 0 --model RepLKNet-31T ... --job_dir DIR
This machine:  python run_with_submitit.py --local --ngpus 0 --model RepLKNet-31T ... --job_dir DIR

It takes main.py's options and those of the job. At its time limit, after a preemption or a lost node the job
is queued again and goes on from its newest checkpoint; so does the same command given once more, for the same
--job_dir is the same run.
"""
import argparse
import contextlib
import copy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import submitit

import options
import utils

CODE = str(Path(__file__).resolve().parent)
# Each time limit spends one, and so does each USR2 in a job's first minutes. A run ends when it is trained;
# the limit is for one that never comes to its next checkpoint, which would be queued for ever.
MAX_TIMEOUTS = 100


def parse_args() -> argparse.Namespace:
    """The job's options and main.py's, from sys.argv. --output_dir is --job_dir unless it is given."""
    parser = options.RecipeParser('run_with_submitit.py', description='Train and evaluate in a SLURM job',
                                  parents=[options.get_args_parser()])
    job = parser.add_argument_group('job; what is left empty is left to the cluster')
    job.add_argument('--nodes', default=2, type=int)
    job.add_argument('--ngpus', default=8, type=int,
                     help='GPUs and processes on each node; 0: one process on each, on its CPU')
    job.add_argument('--timeout', default=72, type=float, metavar='HOURS',
                     help='the time limit, after which the job is queued again and goes on')
    job.add_argument('--job_name', default='replknet')
    job.add_argument('--job_dir', default='',
                     help="the job's files, and --output_dir's unless it is given; the same folder is the "
                          'same run; %%j in it, in --output_dir and in --log_dir is the job id; '
                          'default: runs/DATE-TIME_%%j')
    job.add_argument('--partition', default='')
    job.add_argument('--constraint', default='', help='features that the nodes must have')
    job.add_argument('--use_volta32', type=options.str2bool, nargs='?', const=True, default=False,
                     metavar='BOOL', help='--constraint volta32gb')
    job.add_argument('--comment', default='')
    job.add_argument('--account', default='')
    job.add_argument('--qos', default='')
    job.add_argument('--exclude', default='', metavar='NODES', help='nodes not to run on')
    job.add_argument('--mem', default=None, type=float, metavar='GB',
                     help='memory of a node; default with --ngpus 0: 16')
    job.add_argument('--cpus_per_task', default=10, type=int, metavar='N',
                     help='CPUs of a process, with its loader processes')
    job.add_argument('--local', type=options.str2bool, nargs='?', const=True, default=False, metavar='BOOL',
                     help='run on this machine, without SLURM, as one node, and wait for the end')
    args = parser.parse_args()
    # the time too: the job id of a --local run is a process id, which comes again
    args.job_dir = args.job_dir or time.strftime('runs/%Y%m%d-%H%M%S_%%j')
    args.output_dir = args.output_dir or args.job_dir
    return args


class Trainer:
    """What submitit runs in every process of the job: main.main.

    `args` stay as they were given, for the job to be queued again.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def __call__(self) -> None:
        # Here rather than above: until submitit has unpickled this object, a USR2 ends the job instead of
        # queueing it again, and torch takes seconds to import. The job may have been submitted from another
        # folder.
        sys.path.insert(0, CODE)
        import main
        import utils
        signal.signal(signal.SIGINT, signal.default_int_handler)  # of a --local job, see submit()
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        args = copy.deepcopy(self.args)
        job = submitit.JobEnvironment()
        job_id = job.job_id
        args.output_dir = args.output_dir.replace('%j', job_id)
        args.log_dir = args.log_dir and args.log_dir.replace('%j', job_id)
        # A process of this job's last life that was killed while submitit wrote a file left a part of it,
        # which submitit takes amiss: a finished process would fail, and a job not be queued again.
        folder = Path(args.job_dir.replace('%j', job_id))
        partial = [folder / f'{job_id}_{job.global_rank}_result.pkl.save_tmp']
        if job.global_rank == 0:
            partial.append(folder / f'{job_id}_submitted.pkl.save_tmp')
        for file in partial:
            file.unlink(missing_ok=True)
        with utils.script():
            main.main(args)
        # the last life of a process on a lost node may have ended after this one began
        partial[0].unlink(missing_ok=True)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues after a USR2: the same again, which goes on from its newest checkpoint."""
        return submitit.helpers.DelayedSubmission(Trainer(self.args))


def executor_parameters(args: argparse.Namespace) -> dict:
    """submitit's parameters for the job; those that the cluster is to decide are left out."""
    features = [args.constraint, 'volta32gb' if args.use_volta32 else '']
    parameters = {
        'name': args.job_name,
        'nodes': 1 if args.local else args.nodes,
        'tasks_per_node': max(1, args.ngpus),
        'gpus_per_node': args.ngpus or None,
        'cpus_per_task': args.cpus_per_task,
        # without a word on memory a CPU job gets little on one cluster, and on another the whole node
        'mem_gb': 16 if args.mem is None and not args.ngpus else args.mem,
        'timeout_min': max(1, round(60 * args.timeout)),
        'slurm_partition': args.partition,
        'slurm_constraint': '&'.join(filter(None, features)),
        'slurm_comment': args.comment,
        'slurm_account': args.account,
        'slurm_qos': args.qos,
        'slurm_exclude': args.exclude,
        'slurm_signal_delay_s': 120,
        # newer sruns do not take sbatch's CPUs; and none must wait for a process that failed
        'slurm_srun_args': [f'--cpus-per-task={args.cpus_per_task}', '--kill-on-bad-exit=1'],
        'slurm_additional_parameters': {'requeue': True},  # not every cluster does by default
    }
    return {name: value for name, value in parameters.items() if value not in (None, '')}


def check_options(args: argparse.Namespace) -> None:
    """Raise utils.UserError for what would end the job, and for impossible values of its own options."""
    for name, least, most in (('nodes', 1, 10 ** 5), ('ngpus', 0, 1000), ('cpus_per_task', 1, 10 ** 4)):
        if not least <= getattr(args, name) <= most:
            raise utils.UserError(f'--{name} {getattr(args, name)} must be '
                                  f'at least {least} and at most {most}')
    for name, most in (('timeout', 10 ** 5), ('mem', 10 ** 6)):
        if getattr(args, name) is not None and not 0 < getattr(args, name) <= most:
            raise utils.UserError(f'--{name} {getattr(args, name):g} must be more than 0 and at most {most}')
    options.check_folder('job_dir', args.job_dir)
    options.check_options(args, sync_bn=(1 if args.local else args.nodes) * args.ngpus > 1)


def submit(args: argparse.Namespace) -> submitit.Job:
    """Submit the job and print where its files are; raise utils.UserError where that fails."""
    check_options(args)
    for name in ('job_dir', 'output_dir', 'log_dir'):
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).expanduser().absolute()))
    try:
        if '%j' not in args.output_dir:  # else only the job knows its name
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(args.job_dir, cluster='local' if args.local else 'slurm',
                                         slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**executor_parameters(args))
        # Ctrl-C reaches a --local job too; submitit's controller of it would kill all its processes a second
        # later, saved or not
        with ignored(signal.SIGINT):
            job = executor.submit(Trainer(args))
    except (RuntimeError, OSError, UnicodeError) as error:  # submitit's own are RuntimeErrors
        hint = '' if args.local else ' (--local runs the command on this machine, without SLURM)'
        raise utils.UserError(f'the job was not submitted: {error}{hint}') from error
    print(f'Submitted job {job.job_id}')
    print(f'Logs: {log_file(args, job.job_id, "out")} and .err, and those of the other processes beside them')
    print(f'Checkpoints and log.txt: {args.output_dir.replace("%j", job.job_id)}', flush=True)
    return job


@contextlib.contextmanager
def ignored(number: int) -> Iterator[None]:
    """Ignore a signal in this block, and in the processes that are started in it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def log_file(args: argparse.Namespace, job_id: str, suffix: str) -> Path:
    """Where submitit puts what the first process prints: `out` or `err`."""
    return Path(args.job_dir.replace('%j', job_id)) / f'{job_id}_0_log.{suffix}'


def wait(args: argparse.Namespace, job: submitit.Job) -> None:
    """Wait for a --local job, after Ctrl-C too; raise utils.UserError with its last line if it fails."""
    try:
        job.wait()
    except KeyboardInterrupt:
        print('Waiting for the job, which is asked to stop too', flush=True)
        while job.state == 'RUNNING':  # wait() would look for results for a minute
            time.sleep(0.2)
        print(last_line(log_file(args, job.job_id, 'out')))
        raise
    # a process that failed with a message alone leaves no result, and submitit would wait a while for it
    results = [job.task(i).paths.result_pickle for i in range(job.num_tasks)]
    if not all(result.exists() for result in results) or job.exception() is not None:
        errors = log_file(args, job.job_id, 'err')
        message = last_line(errors).removeprefix('ERROR: ')
        raise utils.UserError(f'job {job.job_id} failed: {message} ({errors})')
    print(f'Job {job.job_id} has ended')


def last_line(file: Path) -> str:
    return (file.read_text(errors='replace') if file.exists() else '').strip().rpartition('\n')[2]


def run(args: argparse.Namespace) -> None:
    """Submit the job, and wait for a --local one.

    No job outlives this: submitit's cannot be deleted while Python shuts down.
    """
    job = submit(args)
    if args.local:
        wait(args, job)


if __name__ == '__main__':
    with utils.script():
        run(parse_args())
