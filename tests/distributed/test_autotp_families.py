"""AutoTP on two ranks, with every model type of `deepspeed.BY_AUTOTP`: the tokens and logits of transformers alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pikv_megatron.launch.environment import VARIABLES

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

WORKER = Path(__file__).with_name("autotp_families.py")


def test_what_autotp_is_said_to_cut_rightly_answers_as_one_rank_does(tmp_path):
    from pikv_megatron.integrations.deepspeed import BY_AUTOTP

    root = str(WORKER.parents[2])
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": root}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(WORKER), str(tmp_path / "seen")],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    for rank in range(2):
        worst = json.loads((tmp_path / f"seen.{rank}.json").read_text())
        assert worst.keys() == BY_AUTOTP
        assert max(worst.values()) <= 1e-4, worst
