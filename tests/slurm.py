"""A throw-away SLURM on this machine, for tests: munged, slurmctld, and a slurmd for each make-believe node.

It needs root and Debian's slurmctld, slurmd, slurm-client and munge; no systemd, no change to the machine.
Everything it has, logs included, lies in one folder.
"""
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

GPUS = 8  # of each node: device files without a device, which jobs can ask for
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol')
# The settings that are not obvious:
# - cred_expire: by default a job that was queued again waits 120 s for its old credential to expire
# - config_overrides: the nodes have more CPUs and memory than this machine, for the published commands
# - no accounting: states are read from scontrol, for as long as MinJobAge
# - GraceTime: from the preemption, with its SIGTERM, to the kill; a job that ends by itself meanwhile counts
#   as timed out
# - SlurmdTimeout: a node whose slurmd is silent for so long is lost, and its jobs are queued again
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MessageTimeout=10
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=3600
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=2
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = ('NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=80 RealMemory=400000 '
        'Gres=gpu:{gpus} Feature=volta32gb State=UNKNOWN\n')


def why_not() -> str:
    """Why a SLURM cannot be started here; empty if it can."""
    if os.geteuid() != 0:
        return 'SLURM needs root'
    missing = [name for name in PROGRAMS if program(name) is None]
    if missing:
        return (f'{", ".join(missing)} not found: '
                'apt-get install --no-install-recommends slurmctld slurmd slurm-client munge')
    return ''


def program(name: str) -> str | None:
    return shutil.which(name, path=f'{os.environ.get("PATH", "")}:/usr/sbin:/usr/bin')


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """The first true value of condition(); AssertionError with `what` if it takes longer."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f'{what}: not within {seconds} s'
        time.sleep(0.1)


class Cluster:
    """A running SLURM with its files in `folder`, which must be fresh; job ids begin at 1.

    A context manager that starts and ends it.
    """

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder = folder
        # names that are addresses too: the job's MASTER_ADDR, its first node's name, resolves without a line
        # in /etc/hosts
        self.nodes = [f'127.0.0.{i + 1}' for i in range(nodes)]
        self.env = {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf')}

    def __enter__(self) -> 'Cluster':
        try:
            self.write_config()
            self.run('munged', '--force', f'--pid-file={self.folder}/munged.pid',
                     f'--log-file={self.folder}/munged.log', f'--key-file={self.folder}/munge/key',
                     f'--socket={self.folder}/munge/socket', f'--seed-file={self.folder}/munge/seed')
            self.run('slurmctld', '-c')
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: {*map(self.node_state, self.nodes)} == {'IDLE'}, 30, 'all nodes idle')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End the jobs, then the daemons, by the process ids they wrote."""
        with contextlib.suppress(Exception):
            for job in self.jobs():
                self.run('scancel', job)
            wait_for(lambda: not self.jobs(), 20, 'no job left')
        pids = [int(file.read_text()) for file in self.folder.glob('*.pid')]
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in pids), 10, 'daemons ended')
                return

    def write_config(self) -> None:
        for name in ('munge', 'dev', 'state', *(f'spool/{node}' for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / 'munge' / 'key'
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for i in range(GPUS):  # copies of /dev/null: slurmd takes nothing but device files
            os.mknod(self.folder / 'dev' / f'nvidia{i}', 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        host = socket.gethostname().split('.')[0]
        port, *ports = free_ports(1 + len(self.nodes))
        nodes = ''.join(NODE.format(name=name, host=host, port=node_port, gpus=GPUS)
                        for name, node_port in zip(self.nodes, ports, strict=True))
        # nodes must stand before the partitions that they are in
        head, partitions = CONFIG.split('PartitionName', 1)
        head = head.format(host=host, port=port, folder=self.folder)
        (self.folder / 'slurm.conf').write_text(f'{head}{nodes}PartitionName{partitions}')
        (self.folder / 'gres.conf').write_text(
            f'AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env\n')
        (self.folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')

    def run(self, name: str, *options: str, check: bool = True) -> str:
        """Run one of SLURM's programs; returns what it printed."""
        # a file, not a pipe: the daemons keep it open
        with (self.folder / 'commands.log').open('a+') as output:
            start = output.seek(0, os.SEEK_END)
            done = subprocess.run([program(name), *options], env=self.env, stdout=output,
                                  stderr=subprocess.STDOUT, timeout=60, check=False)
            output.seek(start)
            printed = output.read()
        assert not check or done.returncode == 0, f'{name} {" ".join(options)}: {printed}'
        return printed

    def start_node(self, node: str) -> None:
        self.run('slurmd', '-N', node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the node's slurmd.

        Its job's processes stay, until slurmctld misses the node and the job breaks up.
        """
        os.kill(int((self.folder / f'{node}.pid').read_text()), signal.SIGKILL)

    def node_state(self, node: str) -> str:
        return fields(self.run('scontrol', '-o', 'show', 'node', node, check=False)).get('State', '')

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, Reason, ..."""
        return fields(self.run('scontrol', '-o', 'show', 'job', job_id))

    def jobs(self) -> list[str]:
        """The ids of the jobs that have not ended."""
        return self.run('squeue', '--noheader', '--format=%A').split()


def fields(line: str) -> dict[str, str]:
    return dict(word.split('=', 1) for word in line.split() if '=' in word)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(('127.0.0.1', 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
