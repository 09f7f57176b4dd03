"""The benchmark scripts run, name every peer, say which marks they miss, and refuse a GPU that is not there."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name.startswith(("bench_", "decode_")))


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("benchmarks_common", BENCHMARKS / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there_is_refused(script):
    if script.startswith("decode_"):
        pytest.importorskip("megatron")
    if script in ("bench_hf.py", "bench_passkey.py"):
        pytest.importorskip("transformers")
    done = run(script, "--device", "cuda")
    assert done.returncode == 2
    assert "argument --device: torch" in done.stderr.splitlines()[-1]
    assert "finds no CUDA device here" in done.stderr
    assert done.stdout == ""


def test_attention_prints_every_row_and_mark():
    done = run("bench_attention.py", "--context", "256", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for row in ("sequential read", "SDPA fp32, enable_gqa", "SDPA bf16, group as query length", "transformers, eager"):
        assert done.stdout.count(f"\n{row} ") == 2  # one per shape
    for row in (
        "Megatron static context",
        "ours none",
        "ours int8",
        "ours int8, low rank 16",
        "top_k 6.25 % of pruned 25 %, int4",
        "reader 6.25 % of pruned 25 %, int8",
    ):
        assert done.stdout.count(f"\n{row} ") == 2
    missing = [line for line in done.stdout.splitlines() if "not installed" in line]
    assert len(missing) == 2 * sum(2 for host in ("megatron", "transformers") if not importlib.util.find_spec(host))
    assert len(re.findall(r"^mark: .+: wanted [<>]= [\d.]+, got \d+\.\d\d(, missed)?$", done.stdout, re.M)) == 2 * 8


def test_cache_prints_every_row_and_mark():
    done = run("bench_cache.py", "--context", "256", "--step-context", "128", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = (
        "append 1 block",
        "append 32 blocks",
        "select_topk",
        "attend_tokens",
        *(f"{mode}, {requests} requests" for mode in ("exact", "top_k", "mass") for requests in (4, 16)),
    )
    assert all(re.search(rf"^{row} +([\d.]+ +){{2}}[\d.]+$", done.stdout, re.M) for row in rows)
    assert len(re.findall(r"^mark: .+: wanted >= 1(\.5)?, got \d+\.\d\d(, missed)?$", done.stdout, re.M)) == 5


def test_requests_prints_every_op_and_mark():
    done = run("bench_requests.py", "--context", "64", "--requests", "3", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^([a-z_]+) +(?:[\d.]+ +){2}[\d.]+$", done.stdout, re.M)
    assert {"attend_decode", "select_topk", "attend_mass", "window_importance"} <= set(rows)
    marks = re.findall(r"^mark: ([a-z_]+), 1 threads, x apart: wanted >= 1, got \d+\.\d\d", done.stdout, re.M)
    assert marks == rows


@pytest.mark.slow
def test_quant_prints_every_peer_and_mark():
    done = run("bench_quant.py", "--tokens", "64", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for peer in ("ours", "eager", "inductor", "quanto", "hqq", "torchao"):
        assert len(re.findall(rf", {peer} ", done.stdout)) >= 4, peer
    assert len(re.findall(r"^mark: ", done.stdout, re.M)) == 12


@pytest.mark.slow
def test_hf_prints_every_cache_and_mark():
    pytest.importorskip("transformers")
    done = run("bench_hf.py", "--models", "small_moe", "--context", "64", "8192", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    for row in ("DynamicCache", "StaticCache", "PiKV exact", "PiKV INT8", "PiKV INT4", "PiKV INT8, top_k 12.5 %"):
        assert len(re.findall(rf"^{re.escape(row)}(?: +[\d.]+){{4}}$", done.stdout, re.M)) == 1, row
    for row in ("QuantizedCache, quanto 4 bits", "QuantizedCache, hqq 4 bits", "kvpress DecodingPress, 50 %"):
        assert len(re.findall(rf"^{row} .*(\d|not installed|does not run here.*)$", done.stdout, re.M)) == 1, row
    assert re.search(r"^mark: INT8 / DynamicCache: wanted >= 1, got \d+\.\d\d", done.stdout, re.M)


def test_marks_say_what_was_missed(common, capsys):
    common.print_marks(
        [
            common.Mark("fast", ">=", 3, 3.0),
            common.Mark("slow", ">=", 3, 2.99),
            common.Mark("small", "<=", 0.1, 0.1),
            common.Mark("large", "<=", 0.1, 0.11),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "mark: fast: wanted >= 3, got 3.00",
        "mark: slow: wanted >= 3, got 2.99, missed",
        "mark: small: wanted <= 0.1, got 0.10",
        "mark: large: wanted <= 0.1, got 0.11, missed",
    ]


def test_medians_take_turns_and_lose_patience(common, monkeypatch):
    clock, turns = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def call(name: str, lasts: list[float]):
        def work() -> None:
            turns.append(name)
            clock[0] += lasts[turns.count(name) - 1]

        return work

    args = argparse.Namespace(device=torch.device("cpu"), rounds=5, clock="wall")
    found = common.medians({"a": call("a", [1, 9, 2, 1, 1]), "b": call("b", [4, 3, 5])}, args, threads=2)
    assert found == {"a": 2, "b": 4}
    assert turns == list("ababab")  # both are past PATIENCE after three rounds
    turns.clear()
    assert common.medians({"a": call("a", [0.1] * 5)}, args, threads=2)["a"] == pytest.approx(0.1)
    assert turns == list("aaaaa")
    args.clock = "cpu"
    monkeypatch.setattr(common.time, "process_time", lambda: clock[0])
    turns.clear()
    assert common.medians({"a": call("a", [0.1] * 5)}, args, threads=2)["a"] == pytest.approx(0.05)
