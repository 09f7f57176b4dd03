"""A Slurm of two nodes on this machine, for tests: munged, slurmctld and two slurmd in a folder of their own, on ports
that are free, ended by their process ids.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge"}
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=pikv-a NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=pikv-b NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """The Debian packages without which there is no Slurm here, or None."""
    return ", ".join(sorted({package for name, package in PROGRAMS.items() if not _path(name)})) or None


def _path(name: str) -> str | None:
    return shutil.which(name, path=SBIN)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two idle nodes; yields the variable that Slurm's commands need. `folder` has a short path: it holds a socket."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    ports = _free_ports(3)
    conf.write_text(
        CONF.format(host=socket.gethostname().split(".")[0], ports=ports, user=getpass.getuser(), folder=folder)
    )
    environment = {"SLURM_CONF": str(conf)}
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "log-file", "seed-file", "pid-file")
    ]
    commands = [
        [_path("munged"), "--foreground", "--force", f"--key-file={key}", *munge],
        [_path("slurmctld"), "-D", "-f", str(conf)],
        *([_path("slurmd"), "-D", "-f", str(conf), "-N", node] for node in ("pikv-a", "pikv-b")),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with open(folder / f"daemon{number}.txt", "wb") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment))
            if not number:
                _wait(lambda: (folder / "munge.socket").exists(), folder, daemons)
        _wait(lambda: _idle_nodes(environment) == 2, folder, daemons)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return sum(int(line) for line in said.stdout.split() if line.isdigit())


def _wait(ready, folder: Path, daemons: list[subprocess.Popen[bytes]], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end or any(daemon.poll() is not None for daemon in daemons):
            logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(folder.glob("*.txt")))
            raise RuntimeError(f"Slurm does not start\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
