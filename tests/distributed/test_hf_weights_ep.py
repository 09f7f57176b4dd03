"""The small MoE with its experts over two ranks gives the logits it gives on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron")

WORKER = Path(__file__).with_name("hf_weights_worker.py")


def logits_of(ranks: int, output: Path) -> dict[str, torch.Tensor]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(WORKER), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.distributed
def test_two_ranks_with_half_the_experts_each_give_the_logits_of_one(tmp_path):
    one, two = logits_of(1, tmp_path / "one.pt"), logits_of(2, tmp_path / "two.pt")
    for dispatcher in ("allgather", "alltoall"):
        assert (two[dispatcher] - one[dispatcher]).abs().max() <= 1e-4
