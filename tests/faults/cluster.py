"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, each node a PID namespace."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "unshare")
NODES = ("node1", "node2")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
MinJobAge=4
ReturnToService=2
SlurmdTimeout=3
MessageTimeout=2
TCPTimeout=1
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """What this machine lacks for a cluster."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root here, which this is not"
    lacking = [name for name in DAEMONS if not shutil.which(name)]
    if lacking:
        return f"{', '.join(lacking)} missing: apt-get install --no-install-recommends slurm-wlm munge"
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        return "no PID namespace can be made here"
    return None


class Cluster:
    """The cluster, with its files in `folder`. A node that is killed loses all its processes at once, and comes back
    with `start_node`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir(parents=True)
        with (folder / "munge.key").open("wb") as key:
            key.write(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)

    def __enter__(self) -> "Cluster":
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in names]
        self._start("munged", "munged", "--foreground", "--force", *options)  # in any folder
        _wait_for(lambda: (self.folder / "munge.socket").exists(), self.log)
        self._start("slurmctld", "slurmctld", "-D", "-c", "-i")
        for node in NODES:
            self.start_node(node)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._daemons.values():
            process.kill()
            process.wait()

    def start_node(self, node: str) -> None:
        """Starts a node, and waits until it takes jobs."""
        # As process 1 of its namespace, unshare's child takes all others with it.
        self._start(node, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "slurmd", "-D", "-N", node)
        _wait_for(lambda: self.run(f"sinfo -h -n {node} -p main -o %T") in ("idle", "mixed", "allocated"), self.log)

    def kill_node(self, node: str) -> None:
        """As if its power had failed."""
        process = self._daemons.pop(node)
        process.kill()
        process.wait()

    def is_up(self, node: str) -> bool:
        return node in self._daemons

    def run(self, command: str) -> str:
        done = subprocess.run(command.split(), env=os.environ | self.variables, capture_output=True, text=True)
        return done.stdout.strip()

    def jobs(self) -> list[str]:
        """The jobs that have not ended."""
        return self.run("squeue -h -o %i").split()

    def waits(self, job: str, restarts: int) -> bool:
        """Whether a job is in the queue after so many restarts."""
        told = self.run(f"scontrol show job {job}")
        return "JobState=PENDING" in told and f"Restarts={restarts} " in told

    def start_requeued_now(self) -> None:
        """Slurm has a requeued job wait for two minutes; a node takes it again in the second after it has ended it."""
        soon = (datetime.now() + timedelta(seconds=3)).isoformat()
        for job in self.run("squeue -h -t PENDING -o %i").split():
            begin = re.search(r"EligibleTime=(\d\S+)", self.run(f"scontrol show job {job}"))
            if begin and begin[1] > soon:
                self.run(f"scontrol update JobId={job} StartTime=now+2")

    def log(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _wait_for(condition: Callable[[], object], log: Callable[[], str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
