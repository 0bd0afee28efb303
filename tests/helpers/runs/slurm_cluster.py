"""A real Slurm of two nodes on this machine: its controller, two node daemons and munge, as this user."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from getpass import getuser
from pathlib import Path

from helpers.megatron_runs import free_port

PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")

# Nodes have more cores than the machine, and jobs share them, so that they need not wait for one another.
# A job that is queued again starts once its credential has expired, by default after two minutes.
_CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES State=UP OverSubscribe=FORCE:3
"""


def outside() -> dict[str, str]:
    """The environment without what a job that these tests run in has put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """The daemons; ``close`` ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        host = socket.gethostname()
        common = f"NodeAddr=127.0.0.1 NodeHostname={host} CPUs=8 State=UNKNOWN"
        nodes = "\n".join(f"NodeName={node} Port={free_port()} {common}" for node in NODES)
        config = folder / "slurm.conf"
        config.write_text(
            _CONFIG.format(host=host, port=free_port(), user=getuser(), folder=folder, nodes=nodes)
        )
        self.env = outside() | {"PATH": PATH, "SLURM_CONF": str(config)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        wait_for(lambda: (folder / "munge.socket").exists(), 60, "munged")
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%t").split() == ["idle"], 60, "idle nodes")

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """As if the machine had lost its power: its daemon and all that it has started are gone."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        tasks = [pid for pid, env in self.processes() if env.get("SLURMD_NODENAME") == node]
        keepers = {parent for parent in map(parent_of, tasks) if name_of(parent) == "slurmstepd"}
        for pid in [*keepers, *tasks]:
            kill(pid)

    def _start(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def call(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command of Slurm's prints; empty if it fails, which it may while a daemon starts."""
        result = subprocess.run(
            command,
            env=self.env | (env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if command[0] == "sbatch":
            assert result.returncode == 0, result.stderr
        return result.stdout

    def state(self, job: str) -> dict[str, str]:
        """What the controller says of a job, by its names: JobState, Restarts, Reason."""
        shown = self.call("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, seconds: float = 900) -> str:
        """The state in which a job ends."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.state(job).get("JobState") in ended, seconds, f"the end of job {job}")
        return self.state(job)["JobState"]

    def processes(self) -> list[tuple[int, dict[str, str]]]:
        """Process numbers and environments of what runs in jobs of this cluster, and of no other."""
        config = self.env["SLURM_CONF"]
        return [
            (pid, env)
            for pid, env in processes()
            if env.get("SLURM_CONF") == config and "SLURM_JOB_ID" in env
        ]

    def close(self) -> None:
        self.call("scancel", "--user", getuser())
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.call("squeue", "-h"), 30, "the end of all jobs")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.5)


def processes() -> list[tuple[int, dict[str, str]]]:
    """Process numbers and environments of this user's processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            found.append((int(folder.name), dict(p.split("=", 1) for p in pairs if "=" in p)))
    return found


def parent_of(pid: int) -> int:
    """Parent of a process, 0 if it is gone."""
    return int(_status(pid).get("PPid", "0"))


def name_of(pid: int) -> str:
    """Name of a process, empty if it is gone."""
    return _status(pid).get("Name", "")


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
