"""Two ranks by torchrun, experts or heads split over them: tokens and logits are stock Megatron-core's on each rank."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]

SCRIPT = Path(__file__).with_name("megatron_expert_parallel.py")


def test_two_ranks_equal_stock(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        environment.pop(name, None)
    run = subprocess.run(
        [*command, str(tmp_path / "seen")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"seen.{rank}.json").read_text()) for rank in range(2)]
    for dispatcher in ("allgather", "alltoall"):
        for report in ranks:
            seen = report[dispatcher]
            assert seen["same_tokens"] and seen["worst"] <= 1e-4
            assert seen["local_experts"] == 4
            assert seen["heard"] == 2 * 2 * 3 * 24  # started and finished, dispatch and combine, three layers, 24 steps
            assert seen["blocks"] > 20
        assert ranks[0][dispatcher]["tokens"] != ranks[1][dispatcher]["tokens"]
    for report in ranks:
        assert report["allgather"]["tokens"] == report["alltoall"]["tokens"]
        assert report["dynamic"]["same_tokens"] and report["dynamic"]["worst"] <= 1e-4
        assert report["dynamic"]["left"] == []
        heads = report["tensor parallel"]
        assert heads["same_tokens"] and heads["worst"] <= 1e-4
        assert heads["local_groups"] == 1 and heads["local_experts"] == 8
    assert ranks[0]["tensor parallel"]["tokens"] == ranks[1]["tensor parallel"]["tokens"]
