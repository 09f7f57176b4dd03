"""The training script runs, lowers the loss, resumes to the same weights, and works over two ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("megatron")

SCRIPT = Path(__file__).parents[2] / "examples/train_small_moe.py"
SHORT = ["--stages", "48x8:2", "64x8:2", "--log-every", "1", "--checkpoint-every", "2", "--evaluation-documents", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(out, *options, launcher=(), fails=False):
    command = [sys.executable, *launcher, str(SCRIPT), "--out", str(out), *SHORT, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return records


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(out)
    return out


def test_a_run_leaves_a_model_a_log_and_checkpoints(finished):
    records = log_of(finished)
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 4]
    assert [record["length"] for record in records] == [48, 48, 48, 64, 64, 64]
    assert records[-1]["tokens"] == 8 * (2 * 48 + 2 * 64)
    losses = [record["text_loss"] for record in records if "text_loss" in record]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] <= 1.1 * math.log(288)  # an untrained model knows nothing
    assert records[-1]["heldout_asked"] == 4
    weights = load_file(finished / "model.safetensors")
    last = load_file(finished / "checkpoints/step-0000004/model.safetensors")
    first = load_file(finished / "checkpoints/step-0000002/model.safetensors")
    assert equal(weights, last)
    assert all(not torch.equal(weights[name], first[name]) for name in weights)  # every weight learns


def test_a_resumed_run_ends_with_the_same_weights(finished, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    shutil.rmtree(cut / "checkpoints/step-0000004")
    train(cut, "--resume")
    assert equal(load_file(cut / "model.safetensors"), load_file(finished / "model.safetensors"))
    assert log_of(cut) == log_of(finished)


def test_a_run_is_neither_overwritten_nor_resumed_under_other_settings(finished, tmp_path):
    assert "holds a run: give --resume" in train(finished, fails=True).stderr
    assert "no checkpoint in" in train(tmp_path / "none", "--resume", fails=True).stderr
    assert "was made with seed=0, this run has 1" in train(finished, "--resume", "--seed", "1", fails=True).stderr


@pytest.mark.distributed
def test_two_ranks_train_one_model(finished, tmp_path):
    train(tmp_path / "two", launcher=TORCHRUN)
    records = log_of(tmp_path / "two")
    assert records[-1]["tokens"] == 2 * log_of(finished)[-1]["tokens"]
    assert records[-1]["heldout_asked"] == 4
    losses = [record["text_loss"] for record in records if "text_loss" in record]
    assert losses[-1] < losses[0]
