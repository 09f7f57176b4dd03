"""Rank bootstrap: a bare process is a group of one, torchrun's variables are all there or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from pikv_megatron.launch import bootstrap as launch
from pikv_megatron.launch.environment import RANK_VARIABLES, VARIABLES

BARE = {name: value for name, value in os.environ.items() if name not in VARIABLES}


def run(script, **variables):
    return subprocess.run(
        [sys.executable, "-c", script], env={**BARE, **variables}, capture_output=True, text=True, timeout=120
    )


def test_a_bare_process_is_a_group_of_one():
    script = (
        "import torch.distributed as dist\n"
        "from pikv_megatron.launch import init_process_group\n"
        "init_process_group(); init_process_group()\n"
        "assert (dist.get_rank(), dist.get_world_size()) == (0, 1)\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}])
def test_half_an_environment_is_refused_by_name(monkeypatch, given):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    missing = ", ".join(name for name in RANK_VARIABLES if name not in given)
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    with pytest.raises(RuntimeError, match=f"sets {said} but not {missing}"):
        launch.init_process_group()


def test_a_port_that_is_taken_is_refused_by_name():
    script = (
        "import os, socket\n"
        "from pikv_megatron.launch import LaunchError, init_process_group\n"
        "taken = socket.create_server(('', 0))\n"
        "os.environ['MASTER_PORT'] = port = str(taken.getsockname()[1])\n"
        "try: init_process_group()\n"
        "except LaunchError as error: assert f'127.0.0.1 and MASTER_PORT {port} cannot be used' in str(error), error\n"
        "else: raise AssertionError\n"
        "taken.close(); init_process_group()\n"
    )
    done = run(script, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def started(monkeypatch):
    """init_process_group() up to torch's: what it was called with, and the environment and device then."""
    seen = {}
    for name in (*VARIABLES, "GLOO_SOCKET_IFNAME", "PIKV_BIND", "PIKV_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)

    def init(backend, **options):
        seen.update(backend=backend, environment=dict(os.environ), **options)

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(launch.rendezvous, "join", lambda given, seconds: seen.update(joined_within=seconds))
    monkeypatch.setattr(launch.rendezvous, "watch", lambda given, store, seconds: None)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(launch.distributed_c10d, name, None)
    monkeypatch.setattr(launch.binding, "bind", lambda given: seen.update(bound=given))
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)

    def start(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        seen["launch"] = launch.init_process_group()
        return seen

    return start


STEP = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n0", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3",
    "SLURM_NODEID": "0",
}  # fmt: skip


def test_what_hosts_read_is_set_and_says_the_same_again(started, monkeypatch):
    seen = started(**STEP)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "4"}
    expected |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15031", "GLOO_SOCKET_IFNAME": "lo"}
    assert seen["backend"] == "gloo" and expected.items() <= seen["environment"].items()
    assert seen["bound"] == seen["launch"] == launch.read_launch(os.environ)
    monkeypatch.setattr(launch.launch_address.socket, "if_nameindex", lambda: [(1, "eth0")])
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert "GLOO_SOCKET_IFNAME" not in started()["environment"]
    assert started(GLOO_SOCKET_IFNAME="eth7")["environment"]["GLOO_SOCKET_IFNAME"] == "eth7"


def test_ranks_of_several_machines_meet_where_the_route_to_rank_0_leads(started, monkeypatch):
    monkeypatch.setattr(launch.launch_address, "complete", lambda given: given)
    asked = []
    monkeypatch.setattr(launch.launch_address, "interface", lambda given: asked.append(given) or "eth3")
    seen = started(RANK="1", WORLD_SIZE="2", MASTER_ADDR="n0", MASTER_PORT="5")
    assert seen["environment"]["LOCAL_SIZE"] == seen["environment"]["LOCAL_WORLD_SIZE"] == "1"
    assert seen["environment"]["GLOO_SOCKET_IFNAME"] == "eth3" and asked[0].master_addr == "n0"


def test_a_gloo_that_does_not_reach_the_others_names_its_interface(started, monkeypatch):
    def fail(backend, **options):
        raise RuntimeError("[gloo/device.cc] Unable to find address for: eth7")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(launch.LaunchError, match=r"at the interface 'eth7'; set GLOO_SOCKET_IFNAME to the one that"):
        started(**STEP, GLOO_SOCKET_IFNAME="eth7")


def test_the_timeout_is_that_of_all_groups(started, monkeypatch):
    for variables, seconds in (({}, 600), ({"PIKV_TIMEOUT": "7.5"}, 7.5)):
        seen = started(**STEP, **variables)
        expected = timedelta(seconds=seconds)
        assert seen["timeout"] == launch.distributed_c10d.default_pg_timeout == expected
        assert launch.distributed_c10d._get_default_timeout("nccl") == expected
        assert seen["joined_within"] == max(seconds, launch.START_SECONDS)
    assert launch.timeout_seconds(2) == 2  # an argument goes before the variable
    for text in ("", "0", "-1", "nan", "1e3", "10 s", "9999999", "inf"):
        with pytest.raises(launch.LaunchError, match=f"PIKV_TIMEOUT: expected seconds above 0 .* got '{text}'"):
            started(**STEP, PIKV_TIMEOUT=text)
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout: expected seconds above 0"):
            launch.init_process_group(timeout=value)


def test_pikv_bind_is_checked_before_others_are_waited_for(started):
    with pytest.raises(launch.LaunchError, match="PIKV_BIND"):
        started(**STEP, PIKV_BIND="no")


def test_each_local_rank_needs_a_cuda_device_of_its_own(started, monkeypatch):
    chosen = []
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch.torch.cuda, "set_device", chosen.append)
    assert started(**STEP)["backend"] == "nccl" and chosen == [3]
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 3)
    with pytest.raises(
        launch.LaunchError, match=r"LOCAL_RANK is 3: expected less than .*, 3 .CUDA_VISIBLE_DEVICES: 0.$"
    ):
        started(CUDA_VISIBLE_DEVICES="0")


def test_megatron_sizes_must_fit_the_world():
    pytest.importorskip("einops")
    script = (
        "import torch\n"
        "if not torch.cuda.is_available():\n"
        "    from pikv_megatron.integrations import cpu_compat; cpu_compat.install()\n"
        "from pikv_megatron.launch import init_megatron\n"
        "try: init_megatron(expert_parallel=2)\n"
        "except ValueError as error: assert 'expert_parallel' in str(error) and '(1)' in str(error)\n"
        "else: raise AssertionError\n"
        "init_megatron(); init_megatron(seed=5)\n"
        "from megatron.core import parallel_state\n"
        "parallel_state.get_expert_model_parallel_world_size = lambda: 2\n"
        "try: init_megatron()\n"
        "except RuntimeError as error: assert 'expert_parallel 2' in str(error)\n"
        "else: raise AssertionError\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_megatron_without_cuda_needs_the_shim(monkeypatch):
    from pikv_megatron.integrations import cpu_compat
    from pikv_megatron.launch import init_megatron

    monkeypatch.setattr(cpu_compat, "_installed", False)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"cpu_compat\.install\(\)"):
        init_megatron()
