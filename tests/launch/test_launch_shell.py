"""What the scripts of launch/ start, and what they refuse by name, with programs in place of the launchers that tell
how they were called. The true launchers are in tests/distributed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN, DEEPSPEED, MPIRUN, SBATCH, SBATCH_SRUN = (
    f"launch/{name}"
    for name in ("torchrun.sh", "deepspeed.sh", "mpirun.sh", "slurm/generate.sbatch", "slurm/generate_srun.sbatch")
)
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "OMP_NUM_THREADS=${OMP_NUM_THREADS-}" "SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK-}" \
"MASTER_ADDR=${MASTER_ADDR-}" "MASTER_PORT=${MASTER_PORT-}" "NNODES=${NNODES-}" "in $PWD" "${0##*/}" "$@"
if [[ ${0##*/} == srun && ${TASK-} && $* == *torchrun.sh* ]]; then  # as srun does, the command of one task
  while [[ $1 != bash ]]; do shift; done
  SLURM_NODEID=$TASK "$@"
fi
"""
COUNT = "expected a whole number of at least 1, got"
SCONTROL = """#!/usr/bin/env bash
case $2 in
  hostnames) printf 'n0.invalid\\nn1.invalid\\n' ;;
  node) echo "   NodeAddr=192.0.2.7 NodeHostName=$3 Version=22" ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[0-1].invalid",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


@pytest.fixture
def call(tmp_path):
    """Runs a script in an environment of nothing but what it is given: its status, how the launcher was called
    (variables, then the words of its command), and stderr.
    """
    for program in ("python3", "mpirun", "srun"):
        (tmp_path / program).write_text(RECORDER)
    (tmp_path / "scontrol").write_text(SCONTROL)
    for tool in (
        "bash",
        "cat",
        "dirname",
        "env",
        "getent",
        "mktemp",
        "nproc",
        "sed",
    ):  # what the scripts use: no numactl
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for program in ("python3", "mpirun", "srun", "scontrol"):
        (tmp_path / program).chmod(0o755)

    def run(script: str, *args: str, folder: Path = ROOT, **variables: str):
        done = subprocess.run(
            ["bash", str(ROOT / script), *args], cwd=folder, env={"PATH": str(tmp_path)} | variables,
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.split("\0")[:-1], done.stderr

    return run


def has(words: list[str], *part: str) -> bool:
    """Whether `part` stands in `words`, in one piece."""
    return any(tuple(words[i : i + len(part)]) == part for i in range(len(words)))


PROMPT = ["generate", "--prompt", "a 'b' \"c\" $HOME `d`\n*", ""]


@pytest.mark.parametrize("script", [TORCHRUN, DEEPSPEED, MPIRUN, SBATCH, SBATCH_SRUN])
def test_arguments_arrive_as_they_are(call, script):
    status, words, said = call(script, *PROMPT, **(JOB if "slurm" in script else {}))
    assert status == 0, said
    assert words[-4:] == PROMPT


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (TORCHRUN, {"NPROC_PER_NODE": "0"}, f"NPROC_PER_NODE: {COUNT} '0'"),
        (TORCHRUN, {"NPROC_PER_NODE": "auto"}, f"NPROC_PER_NODE: {COUNT} 'auto'"),
        (TORCHRUN, {"NPROC_PER_NODE": "08"}, f"NPROC_PER_NODE: {COUNT} '08'"),
        (TORCHRUN, {"NNODES": "two"}, f"NNODES: {COUNT} 'two'"),
        (
            TORCHRUN,
            {"NNODES": "2", "MASTER_ADDR": "n0"},
            "NODE_RANK: expected the rank of this node, since NNODES is 2",
        ),
        (TORCHRUN, {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR: expected the address of node 0, since NNODES is 2"),
        (
            TORCHRUN,
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "n0"},
            "NODE_RANK: expected a whole number below NNODES, 2, got '2'",
        ),
        (TORCHRUN, {"NODE_RANK": "first"}, "NODE_RANK: expected a whole number below NNODES, 1, got 'first'"),
        (DEEPSPEED, {"NPROC_PER_NODE": "-1"}, f"NPROC_PER_NODE: {COUNT} '-1'"),
        (DEEPSPEED, {"BIND_CORES": "yes"}, "BIND_CORES: expected 0 or 1, got 'yes'"),
        (DEEPSPEED, {"BIND_CORES": "1"}, "BIND_CORES: expected 0 where numactl is not installed, got 1"),
        (
            DEEPSPEED,
            {"HOSTFILE": "no hosts"},
            "HOSTFILE: expected DeepSpeed's list of hosts, there is no file 'no hosts'",
        ),
        (MPIRUN, {"NP": "2x"}, f"NP: {COUNT} '2x'"),
        *(
            (script, {"MASTER_PORT": port}, f"MASTER_PORT: expected a port from 1 to 65535, got '{port}'")
            for script in (TORCHRUN, DEEPSPEED, MPIRUN)
            for port in ("0", "65536", "99999999999999999999", "http", "08", "29500 1")
        ),
        (SBATCH, JOB | {"SLURM_JOB_ID": "7a"}, "SLURM_JOB_ID: expected the number of a job, got '7a'"),
        (SBATCH, {}, "SLURM_JOB_ID: not a job of Slurm: give this script to sbatch"),
        (SBATCH_SRUN, {}, "SLURM_JOB_ID: not a job of Slurm: give this script to sbatch"),
        (SBATCH, JOB | {"PIKV_ROOT": "/"}, "'/' has no launch/torchrun.sh, and 'python3' no pikv_megatron"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(call, script, variables, expected):
    status, words, said = call(script, "doctor", **variables)
    assert status != 0 and not words
    assert said.strip().endswith(expected)


def test_torchrun_on_one_node_and_on_one_of_several(call):
    _, words, _ = call(TORCHRUN, "doctor", NPROC_PER_NODE="3", OMP_NUM_THREADS="5")
    assert words[0] == "OMP_NUM_THREADS=5"
    assert has(words, "--nnodes=1", "--nproc-per-node=3", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file")
    assert has(words, "--local-addr=127.0.0.1", "-m", "pikv_megatron", "doctor")
    assert any(word.startswith("--rdzv-endpoint=/") for word in words)
    _, words, _ = call(TORCHRUN, NNODES="2", NODE_RANK="1", MASTER_ADDR="n0", MASTER_PORT="1234")
    assert has(words, "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=static")
    assert has(words, "--node-rank=1", "--master-addr=n0", "--master-port=1234", "-m", "pikv_megatron")


NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(("script", "variables"), [(TORCHRUN, NODES | {"NODE_RANK": "0"}), (DEEPSPEED, {})])
def test_a_port_that_is_taken_is_one_line(call, script, variables):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, words, said = call(script, **variables, MASTER_PORT=port)
        assert status == 2 and not words
        assert said == f"MASTER_PORT: expected a port that is free on this machine, something listens at {port}\n"
        assert call(TORCHRUN, **NODES, NODE_RANK="1", MASTER_PORT=port)[0] == 0  # where node 0 is another machine
    assert call(script, **variables, MASTER_PORT=port)[0] == 0


NUMBERS = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT", "NP", "BIND_CORES", "OMP_NUM_THREADS")
SLURMS = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK", "SLURM_NODEID", "TASK")


@pytest.mark.parametrize("script", [TORCHRUN, DEEPSPEED, MPIRUN, SBATCH, SBATCH_SRUN])
def test_no_variable_is_run_as_a_command(call, script, tmp_path):
    """bash evaluates what it reads as arithmetic, commands in an array's index too."""
    name = tmp_path / "ran"
    for variable in (*NUMBERS, *SLURMS):
        call(script, "doctor", **(JOB | NODES | {"NODE_RANK": "1"} | {variable: f"PATH[$(echo >{name})]"}))
        assert not name.exists(), variable


@pytest.mark.parametrize("ranks", [1, 2, 10_000])
def test_torchruns_ranks_share_the_cpus(call, ranks):
    _, words, _ = call(TORCHRUN, NPROC_PER_NODE=str(ranks))
    assert words[0] == f"OMP_NUM_THREADS={max(len(os.sched_getaffinity(0)) // ranks, 1)}"


def test_deepspeed_asks_for_the_address_where_there_are_several_hosts(call, tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("n0 slots=2\n")
    _, words, _ = call(DEEPSPEED, NPROC_PER_NODE="4")
    assert has(words, "--num_accelerators", "4", "--master_addr", "127.0.0.1", "--no_local_rank")
    assert not {"--bind_cores_to_rank", "--hostfile"} & set(words)
    _, words, _ = call(DEEPSPEED, HOSTFILE=str(hosts))
    assert has(words, "--hostfile", str(hosts), "--num_gpus", "2") and "--master_addr" not in words
    _, words, _ = call(DEEPSPEED, HOSTFILE=str(hosts), MASTER_ADDR="n0")
    assert has(words, "--master_addr", "n0")
    (tmp_path / "numactl").symlink_to(tmp_path / "mpirun")
    _, words, _ = call(DEEPSPEED, BIND_CORES="1")
    assert "--bind_cores_to_rank" in words


def test_further_options_may_go_over_several_lines(call):
    _, words, _ = call(MPIRUN, "doctor", NP="3", MPIRUN_ARGS="--a  b\n--c\td")
    assert has(words, "mpirun", "-n", "3", "--a", "b", "--c", "d", "python3", "-m", "pikv_megatron", "doctor")
    _, words, _ = call(MPIRUN, "doctor")
    assert has(words, "mpirun", "-n", "2", "python3")
    for script in (SBATCH, SBATCH_SRUN):
        _, words, _ = call(script, **JOB, SRUN_ARGS="--a b\n--c")
        assert has(words, "--kill-on-bad-exit=1", "--a", "b", "--c")


def test_slurm_runs_one_launcher_per_node_of_whatever_job(call, tmp_path):
    _, words, said = call(SBATCH, "doctor", folder=tmp_path, **JOB, SLURM_NTASKS="4")
    assert has(words, f"in {ROOT}", "srun", "--ntasks=2", "--ntasks-per-node=1"), said
    assert "MASTER_ADDR=192.0.2.7" in words and "NNODES=2" in words  # the name does not resolve
    _, words, _ = call(SBATCH, "doctor", **JOB, MASTER_ADDR="n5")
    assert "MASTER_ADDR=n5" in words


def test_slurm_finds_the_scripts_of_an_installed_package(call, tmp_path):
    asked = 'if [[ "$*" == "-m pikv_megatron launch-dir" ]]; then echo "$SCRIPTS"; exit; fi'
    (tmp_path / "python3").write_text(RECORDER.replace("\n", f"\n{asked}\n", 1))
    job = JOB | {"PIKV_ROOT": str(tmp_path), "SCRIPTS": f"{ROOT}/launch", "TASK": "1"}
    status, words, said = call(SBATCH, "doctor", **job)
    assert status == 0, said
    assert has(words, f"{ROOT}/launch", "doctor")  # srun's
    assert has(words, "--node-rank=1", "--master-addr=192.0.2.7") and words[-1] == "doctor"  # the task's


def test_slurms_tasks_are_torchruns_with_the_rank_of_their_node(call):
    job = JOB | {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "1000"}
    _, words, said = call(SBATCH, "doctor", "a b", **job, NPROC_PER_NODE="4", TASK="2")
    assert has(words, "python3", "-m", "torch.distributed.run", "--nnodes=3", "--nproc-per-node=4"), said
    assert has(words, "--node-rank=2", "--master-addr=192.0.2.7", "--master-port=30000", "-m", "pikv_megatron")
    assert words[-2:] == ["doctor", "a b"]


@pytest.mark.parametrize("script", [SBATCH, SBATCH_SRUN])
def test_steps_get_the_cpus_per_task_of_their_job(call, script):
    """srun has not read SLURM_CPUS_PER_TASK since Slurm 22.05: each task would be bound to one CPU."""
    _, words, _ = call(script, **JOB, SLURM_CPUS_PER_TASK="16")
    assert "SRUN_CPUS_PER_TASK=16" in words
    _, words, _ = call(script, **JOB, SLURM_CPUS_PER_TASK="16", SRUN_CPUS_PER_TASK="8")
    assert "SRUN_CPUS_PER_TASK=8" in words
    _, words, _ = call(script, **JOB)
    assert "SRUN_CPUS_PER_TASK=" in words


def test_srun_starts_the_ranks_in_any_folder(call, tmp_path):
    _, words, _ = call(SBATCH_SRUN, "doctor", **JOB | {"PIKV_ROOT": str(tmp_path)})
    assert has(words, f"in {tmp_path}", "srun", "--kill-on-bad-exit=1", "python3", "-m", "pikv_megatron", "doctor")
