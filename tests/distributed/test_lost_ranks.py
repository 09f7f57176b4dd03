"""What becomes of the ranks when one of them stands still, and when their launcher is killed; where they listen while
they run. One launch carries all checks that it can.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import alive, end, listens_at, wait_for

from pikv_megatron.launch.environment import VARIABLES

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TIMEOUT = 4
BARE = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "GLOO_SOCKET_IFNAME")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
    "PIKV_TIMEOUT": str(TIMEOUT),
    "DS_ACCELERATOR": "cpu",
    "MPIRUN_ARGS": "--oversubscribe --mca btl_tcp_if_include lo" + " --allow-run-as-root" * (os.geteuid() == 0),
}


@contextlib.contextmanager
def started(folder: Path, script: str, count: int, before: Sequence[str] = (), **variables: str):
    """A script of launch/ with the worker in pikv's place: the launcher and its log. It and the ranks are ended behind
    it.
    """
    python = folder / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "${{@/#pikv_megatron/lost_rank_worker}}"\n')
    python.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = BARE | {"PYTHON": str(python), "NPROC_PER_NODE": str(count), "NP": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables
    log = folder / "log.txt"
    with log.open("a") as file:
        command = [*before, "bash", f"launch/{script}", str(folder)]
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        yield launcher, log
    finally:
        launcher.kill()
        launcher.wait()
        for pid in pids_in(folder):
            end(pid, folder)


def pids_in(folder: Path) -> list[int]:
    """Of the ranks that have come, in their order."""
    return [int(path.suffix[1:]) for path in sorted(folder.glob("[0-9].*"))]


@contextlib.contextmanager
def ranks(folder: Path, script: str, count: int):
    """The ranks' process ids, besides what `started` gives. mpirun's do not ask MPI for the address."""
    with started(folder, script, count) as (launcher, log):
        wait_for(lambda: len(pids_in(folder)) == count or launcher.poll() is not None, 90, log)
        assert launcher.poll() is None, log.read_text()[-4000:]
        yield launcher, log, pids_in(folder)


LOOPBACK = {"127.0.0.1"}


@contextlib.contextmanager
def two_nodes():
    """Two network namespaces with a cable between them, and the first one's address."""
    names = [f"pikv{os.getpid()}{node}" for node in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
    for number, name in enumerate(names, start=1):
        commands += [f"-n {name} address add 198.51.100.{number}/24 dev cable"]
        commands += [f"-n {name} link set {device} up" for device in ("cable", "lo")]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {command}: {done.stderr}")
        yield [["ip", "netns", "exec", name] for name in names], "198.51.100.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.skipif(shutil.which("ip") is None, reason="ip is not installed (iproute2)")
def test_ranks_of_two_nodes_find_the_interface_between_them(tmp_path):
    with two_nodes() as (nodes, address), contextlib.ExitStack() as stack:
        variables = {"NNODES": "2", "MASTER_ADDR": address, "MASTER_PORT": "29500"}
        for number, node in enumerate(nodes):
            more = variables | {"NODE_RANK": str(number)}
            launcher, log = stack.enter_context(started(tmp_path, "torchrun.sh", 1, node, **more))
        wait_for(lambda: len(pids_in(tmp_path)) == 2, 90, log)
        assert [path.read_text() for path in tmp_path.glob("[0-9].*")] == ["cable", "cable"]
        (tmp_path / "stop").touch()
        assert launcher.wait(60) == 0
    assert "did not answer" not in log.read_text()


def test_a_frozen_rank_is_named_by_every_other(tmp_path):
    with ranks(tmp_path, "torchrun.sh", 3) as (launcher, log, pids):
        for pid in (launcher.pid, *pids):
            assert listens_at(pid) <= LOOPBACK
        assert listens_at(pids[0]) == LOOPBACK  # rank 0 has the store
        assert {path.read_text() for path in tmp_path.glob("[0-9].*")} == {"lo"}
        os.kill(pids[1], signal.SIGSTOP)
        wait_for(lambda: not alive(pids[0]) and not alive(pids[2]), TIMEOUT + 20, log)
        assert alive(pids[1])
    text = "PeerLostError: rank 1 did not answer in all_reduce"
    said = [line for line in log.read_text().splitlines() if text in line]
    assert len(said) == 2, log.read_text()
    for line in said:
        assert TIMEOUT - 1 <= float(line.partition(" for ")[2].split()[0]) <= TIMEOUT + 3, line


SLOW = [pytest.param(script, marks=pytest.mark.slow) for script in ("deepspeed.sh", "mpirun.sh")]


@pytest.mark.parametrize("script", ["torchrun.sh", *SLOW])
def test_a_killed_launcher_leaves_no_rank_behind(tmp_path, script):
    if script == "deepspeed.sh" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if script == "mpirun.sh" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (openmpi-bin)")
    with ranks(tmp_path, script, 2) as (launcher, log, pids):
        for pid in pids:
            assert listens_at(pid) <= LOOPBACK
        launcher.kill()
        launcher.wait()
        wait_for(lambda: not any(map(alive, pids)), 20, log)
