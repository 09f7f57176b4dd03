"""Rank bootstrap: a bare process is a group of one, torchrun's variables are all there or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from pikv_megatron import launch
from pikv_megatron.launch_environment import RANK_VARIABLES, VARIABLES

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
    with pytest.raises(RuntimeError, match=f"sets {', '.join(given)} but not {missing}"):
        launch.init_process_group()


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

    monkeypatch.setattr(cpu_compat, "_installed", False)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"cpu_compat\.install\(\)"):
        launch.init_megatron()
