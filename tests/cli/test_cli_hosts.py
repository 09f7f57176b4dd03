"""`pikv generate` on each host: the same YAML, the same checkpoint, the same answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pikv_megatron.cli import main
from pikv_megatron.config import load

PACKAGES = {"megatron": "megatron", "hf": "transformers", "deepspeed": "deepspeed"}
HOSTS = [
    pytest.param(
        host,
        marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed"),
    )
    for host, package in PACKAGES.items()
]
PROMPT = "And the LORD said unto Moses, #QX47 Go in unto Pharaoh. #AB12 And he went out from the king. #QX"
TEXT = "47and the sons of Israel, and the sons o"
COMPRESSED = [
    "--set",
    "codec.keys=int8",
    "--set",
    "codec.values=int8",
    "--set",
    "window=16",
    "--set",
    "attention.mode=top_k",
]


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_gives_the_same_answer(host, capsys, tmp_path):
    argv = ["generate", "--host", host, "--prompt", PROMPT, "--max-new-tokens", "40", "--threads", "1"]
    assert main([*argv, "--compare", "--run-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == TEXT + "\n"
    assert "largest logit difference from stock" in captured.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["max_logit_difference"] <= 1e-4
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (96, 40)
    assert figures["pikv"]["kv_bytes"] == 345_600
    held = 4 * 2 * 2 * 32 * 4  # layers, K and V, groups, channels, fp32: Hugging Face's own cache holds what it was fed
    assert figures["stock"]["kv_bytes"] == held * (136 if host == "megatron" else 135)
    model, runtime = load(tmp_path / "config.yaml")
    assert model is not None and model.num_query_groups == 2 and runtime.window == 64


def test_all_hosts_read_alike_from_a_compressed_cache(capsys, tmp_path):
    argv = ["generate", "--prompt", PROMPT * 3, "--max-new-tokens", "8", "--threads", "1", "--quiet", *COMPRESSED]
    seen = {}
    for host in (host for host, package in PACKAGES.items() if importlib.util.find_spec(package)):
        assert main([*argv, "--host", host, "--run-dir", str(tmp_path / host)]) == 0
        seen[host] = json.loads((tmp_path / host / "figures.json").read_text())["reads"]
        assert seen[host]["selective_reads"] == 7 * 4 and seen[host]["missed_estimate_mean"] > 0.01
    assert capsys.readouterr().out == "47and th\n" * len(seen)
    first = next(iter(seen.values()))
    for reads in seen.values():
        assert reads == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("host", HOSTS)
def test_what_a_host_cannot_use_ends_in_one_line(host, capsys, tmp_path):
    argv = ["generate", "--host", host, "--prompt", PROMPT]
    assert main([*argv, "--set", "model.topk=3"]) == 2
    assert "topk: 3 here, 2 in the model" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text(
        (Path(__file__).parents[2] / "assets/small_moe/tokenizer.json").read_text()
    )
    assert main([*argv, "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["generate", "--host", "hf", "--prompt", PROMPT], ["demo"]])
def test_what_runs_on_one_rank_is_refused_on_several(argv, capsys, monkeypatch):
    """Each rank would do all of it, and write into the same lines and files."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "5"}.items():
        monkeypatch.setenv(name, value)
    assert main(argv) == 2
    seen = capsys.readouterr()
    assert not seen.out and "expected a single process, got environment: rank 1 of 2" in seen.err
    monkeypatch.delenv("WORLD_SIZE")
    assert main(argv) == 2
    seen = capsys.readouterr()
    assert not seen.out and "sets RANK=1, MASTER_ADDR=n0, MASTER_PORT=5 but not WORLD_SIZE" in seen.err


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_under_deepspeed_say_it_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    argv = ["generate", "--host", "deepspeed", "--prompt", PROMPT, "--max-new-tokens", "40", "--threads", "1"]
    run = subprocess.run(
        [*launcher, "pikv_megatron", *argv, "--run-dir", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == TEXT + "\n"
    held = json.loads((tmp_path / "figures.json").read_text())["pikv"]["kv_bytes"]
    assert 0.5 < held / 345_600 < 0.52  # half of K and V, and all of the labels
