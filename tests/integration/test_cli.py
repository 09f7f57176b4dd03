"""The commands, run in this process on the small MoE: what they print, what they write, what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pikv_megatron.cli import common, demo, main
from pikv_megatron.config import load

PROMPT = "And the LORD said unto Moses, #QX47 Go in unto Pharaoh. #AB12 And he went out from the king. #QX"


def test_generate_streams_the_answer(capsys):
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--quiet", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "47\n"
    assert captured.err == ""


def test_generate_compares_with_stock_and_writes_its_run(capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT * 3)
    argv = ["generate", "--prompt-file", str(prompt), "--max-new-tokens", "12", "--compare", "--chunk", "100"]
    assert main([*argv, "--run-dir", str(tmp_path / "run"), "--threads", "1"]) == 0
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert figures["max_logit_difference"] <= 1e-4
    assert figures["prompt_tokens"] == len(PROMPT) * 3
    assert figures["new_tokens"] == 12
    total = len(PROMPT) * 3 + 12
    assert figures["stock"]["kv_bytes"] == 4 * 2 * total * 2 * 32 * 4  # layers, K and V, tokens, groups, channels, fp32
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "run" / "text.txt").read_text() + "\n"
    assert "largest logit difference from stock" in captured.err
    model, runtime = load(tmp_path / "run" / "config.yaml")
    assert (model, runtime) == common.read_config(common.SMALL_MOE_CONFIG)


def test_generate_ends_where_it_is_told_to(capsys, tmp_path):
    argv = ["generate", "--prompt", PROMPT, "--threads", "1", "--quiet", "--run-dir", str(tmp_path / "run")]

    def made() -> int:
        return json.loads((tmp_path / "run" / "figures.json").read_text())["new_tokens"]

    assert main([*argv, "--max-new-tokens", "20", "--stop", "7"]) == 0
    assert capsys.readouterr().out == "47\n"
    assert made() == 2
    model = tmp_path / "model"
    shutil.copytree(common.SMALL_MOE, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ord("4")]}))
    argv += ["--model", str(model), "--max-new-tokens", "5"]
    assert main(argv) == 0
    assert (capsys.readouterr().out, made()) == ("4\n", 1)
    assert main([*argv, "--ignore-eos"]) == 0
    assert (capsys.readouterr().out[:2], made()) == ("47", 5)


def test_a_reader_that_has_gone_is_no_error():
    command = [sys.executable, "-m", "pikv_megatron", "demo", "--documents", "1", "--length", "200", "--facts", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_the_lowest_temperature_is_greedy(capsys):
    argv = ["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--quiet", "--threads", "1"]
    assert main([*argv, "--temperature", "1e-40"]) == 0
    assert capsys.readouterr().out == "47\n"


def test_a_tokenizer_that_is_none(capsys, tmp_path):
    shutil.copytree(common.SMALL_MOE, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert main(["generate", "--prompt", "x", "--model", str(tmp_path / "model")]) == 2
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err


def test_sampling_follows_its_seed(capsys):
    def sample(seed: int) -> str:
        argv = ["generate", "--prompt", PROMPT, "--max-new-tokens", "16", "--quiet", "--temperature", "2"]
        assert main([*argv, "--seed", str(seed), "--threads", "1"]) == 0
        return capsys.readouterr().out

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "x", "--set", "attention.mod=exact"], "did you mean 'mode'?"),
        (["--prompt", "x", "--set", "attention"], "expected key.path=value"),
        (["--prompt", "x", "--set", "window.size=3"], "window is not a section"),
        (["--prompt", "x", "--set", "model.topk=1"], "is for another model (topk: 1 here, 2 in the model)"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1"),
        (["--prompt", "x" * 40, "--set", "max_tokens=64"], "exceed max_tokens 64"),
        (["--prompt", ""], "expected some text"),
        (["--prompt-file", "/does/not/exist"], "No such file"),
        (["--prompt", "x", "--model", "/does/not/exist"], "/does/not/exist"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: expected at least 0"),
        (["--prompt", "x", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--prompt", "x", "--set", "tiers=[{kind: device"], "--set tiers=[{kind: device: not YAML"),
        (["--prompt", "x", "--set", "codec={keys: int8, keys: int4}"], "the key 'keys' stands twice"),
        (["--prompt", "x", "--run-dir", "/dev/null"], "/dev/null"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: expected at least 0"),
        (["--prompt", "x " * 150, "--set", "tiers=[{kind: device, bytes: 100000}]"], "capacity_tokens (32), got 364"),
    ],
)
def test_generate_refuses(argv, message, capsys):
    assert main(["generate", *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_demo_table(capsys):
    assert main(["demo", "--documents", "1", "--facts", "3", "--length", "400", "--quiet", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("cache"))
    rows = lines[header + 1 : header + 1 + len(demo.CACHES)]
    assert [row[:20].strip() for row in rows] == [name[:20].strip() for name in demo.CACHES]
    for row in rows[:3]:
        assert "3 of 3" in row


def test_demo_bytes_are_those_of_storages():
    """The stock row is the sum of Megatron's tensors; PiKV's is the live rows of its pools and windows."""
    from pikv_megatron.facts import documents, load_text
    from pikv_megatron.integrations import megatron
    from pikv_megatron.integrations.megatron_session import Session

    (paper,) = documents(load_text(common.HELD_OUT_TEXT), count=1, length=400, num_facts=2, num_questions=2, seed=1)
    model = common.megatron_model(common.SMALL_MOE, None, 1)
    stock = Session.on_stock_cache(model, 1, 500)
    demo._ask(stock, paper, demo.Row("stock"))
    tensors = [t for pair in stock.context.key_value_memory_dict.values() for t in pair]
    assert demo._bytes(stock)[0] == {"device": sum(t.numel() * t.element_size() for t in tensors)}

    overrides = [f"max_tokens={500}", *(demo.CACHES["PiKV INT8, pyramid, top_k 25 %"] or []), "budget.total_tokens=800"]
    attached = megatron.attach(model, common.read_config(common.SMALL_MOE_CONFIG, overrides)[1])
    ours = Session(model, attached.static_context(1, 500))
    demo._ask(ours, paper, demo.Row("ours"))
    cache = ours.context.cache
    expected = {}
    for index, pool in enumerate(cache.tiers):
        ids = [b for state in cache._requests[0].layers for b in state.tables[index].ids]
        assert len(ids) == len(set(ids)) > 0
        expected[pool.kind] = sum(t[i].numel() * t.element_size() for t in pool.tensors.values() for i in ids)
    for window in cache._windows:
        expected["device"] += sum(t[0].numel() * t.element_size() for t in window.tensors.values())
    held, allocated = demo._bytes(ours)
    assert held == expected
    storages = [t for pool in cache.tiers for t in pool.tensors.values()]
    storages += [t for window in cache._windows for t in window.tensors.values()]
    assert allocated == sum(t.untyped_storage().nbytes() for t in storages) >= sum(held.values())


def test_bundled_files_are_missed_by_name():
    with pytest.raises(FileNotFoundError, match=r"/no/such/place: not found; it is part of a source checkout"):
        common.bundled(Path("/no/such/place"))


def test_threads_are_set():
    common.megatron_model(common.SMALL_MOE, None, 1)
    assert torch.get_num_threads() == 1
