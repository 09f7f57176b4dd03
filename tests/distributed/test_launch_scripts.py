"""The scripts of launch/ start the small MoE on two ranks, half its experts each, from the same YAML: its answer is
that of one rank. Slurm is a real one, of two nodes on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import slurm_cluster
from processes import alive, end, wait_for

from pikv_megatron.launch.environment import VARIABLES

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]

ROOT = Path(__file__).parents[2]
PROMPT = "And #QX47 the LORD spake unto Moses, saying; #AB12 In the beginning. " * 4 + "#QX"
GENERATE = ["generate", "--config", "launch/configs/small_moe.yaml", "--prompt", PROMPT, "--max-new-tokens", "24"]
BARE = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {
    "OMP_NUM_THREADS": "1",
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: list[str], **variables: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=BARE | variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    """What one rank answers."""
    folder = tmp_path_factory.mktemp("alone")
    run([sys.executable, "-m", "pikv_megatron", *GENERATE, "--quiet", "--run-dir", str(folder)])
    return (folder / "text.txt").read_text()


def check(folder: Path, alone: str, launcher: str, nodes: int = 1) -> None:
    assert (folder / "text.txt").read_text() == alone
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["expert_parallel"] == 2
    launch = figures["launch"]
    assert (launch["launcher"], launch["rank"], launch["world_size"]) == (launcher, 0, 2)
    assert launch["local_size"] == 2 // nodes


def two_ranks(folder: Path) -> list[str]:
    return [*GENERATE, "--expert-parallel", "2", "--run-dir", str(folder)]


def test_torchrun(tmp_path, alone):
    run(["launch/torchrun.sh", *two_ranks(tmp_path)], MASTER_PORT=str(free_port()))
    check(tmp_path, alone, "torchrun")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed(tmp_path, alone):
    run(["launch/deepspeed.sh", *two_ranks(tmp_path)], MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
    check(tmp_path, alone, "deepspeed")


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (openmpi-bin)")
def test_mpirun(tmp_path, alone):
    options = "--oversubscribe --mca btl_tcp_if_include lo" + (" --allow-run-as-root" if os.geteuid() == 0 else "")
    run(["launch/mpirun.sh", *two_ranks(tmp_path)], MPIRUN_ARGS=options)
    check(tmp_path, alone, "mpirun")


@pytest.fixture(scope="module")
def slurm():
    absent = slurm_cluster.missing()
    if absent:
        pytest.skip(f"no Slurm here: {absent} not installed")
    with tempfile.TemporaryDirectory(prefix="pikv-") as folder, slurm_cluster.cluster(Path(folder)) as environment:
        yield environment


@pytest.mark.parametrize(("script", "launcher"), [("generate", "torchrun"), ("generate_srun", "srun")])
def test_slurm(tmp_path, alone, slurm, script, launcher):
    log = tmp_path / "job.txt"
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", f"--error={log}"]
    command = ["sbatch", *options, f"launch/slurm/{script}.sbatch", *two_ranks(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=BARE | slurm, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    state, end = "", time.monotonic() + 200
    while state not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
        assert time.monotonic() < end, f"the job is {state} still"
        time.sleep(0.3)  # sbatch --wait would look every ten seconds
        job = run(["scontrol", "show", "job", done.stdout.strip()], **slurm)
        state = job.partition("JobState=")[2].split()[0]
    assert state == "COMPLETED", log.read_text()[-4000:]
    check(tmp_path, alone, launcher, nodes=2)


def test_a_killed_slurmstepd_leaves_no_rank_behind(tmp_path, slurm):
    """Where srun is killed, Slurm ends the ranks itself."""
    worker = Path(__file__).with_name("lost_rank_worker.py")
    log = tmp_path / "log.txt"
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, str(worker), str(tmp_path)]
    with log.open("w") as file:
        srun = subprocess.Popen(command, env=BARE | slurm | {"PIKV_TIMEOUT": "20"}, stdout=file, stderr=file)
    try:
        wait_for(lambda: len(list(tmp_path.glob("[0-9].*"))) == 2, 90, log)
        pids = [int(path.suffix[1:]) for path in sorted(tmp_path.glob("[0-9].*"))]
        step = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        assert "slurmstepd" in Path(f"/proc/{step}/comm").read_text()
        os.kill(step, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, pids)), 15, log)  # the other one does not wait for the timeout
    finally:
        srun.kill()
        srun.wait()
        for path in tmp_path.glob("[0-9].*"):
            end(int(path.suffix[1:]), tmp_path)
    assert "rank 0 did not answer in all_reduce" in log.read_text()
