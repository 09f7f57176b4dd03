"""The commands, run in this process on the small MoE: what they print, what they write, what they refuse."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch

import pikv_megatron
from pikv_megatron.cli import common, demo, generate, main
from pikv_megatron.config import load
from pikv_megatron.facts import Fact, documents, load_text

PROMPT = "And the LORD said unto Moses, #QX47 Go in unto Pharaoh. #AB12 And he went out from the king. #QX"


def test_generate_streams_the_answer(capsys):
    assert main(["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--quiet", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "47\n"
    assert captured.err == ""


def test_generate_prints_one_json_object(capsys, tmp_path):
    argv = ["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--threads", "1", "--json"]
    assert main([*argv, "--run-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(captured.out) == {"text": "47", **figures}
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


def test_generate_reports_the_largest_difference_of_all_steps(tmp_path):
    """Fed again here, token by token: with INT4 the worst step is neither the first nor the last."""
    overrides = ["codec.keys=int4", "codec.values=int4"]
    argv = ["generate", "--prompt", PROMPT * 3, "--max-new-tokens", "12", "--compare", "--quiet", "--threads", "1"]
    argv += [word for override in overrides for word in ("--set", override)]
    assert main([*argv, "--run-dir", str(tmp_path)]) == 0
    made = (tmp_path / "text.txt").read_bytes()
    ours, stock = _sessions(overrides, len(PROMPT) * 3 + 12)
    differences = []
    for piece in ((PROMPT * 3).encode(), *(bytes([byte]) for byte in made[:-1])):
        tokens = torch.tensor([list(piece)])
        differences.append(float((ours.feed(tokens) - stock.feed(tokens)).abs().max()))
    assert len(differences) == 12 and max(differences) > 2 * max(differences[0], differences[-1])
    reported = json.loads((tmp_path / "figures.json").read_text())["max_logit_difference"]
    assert reported == pytest.approx(max(differences), rel=1e-3)


def _sessions(overrides, tokens):
    """The small MoE on PiKV and on Megatron's own cache."""
    from pikv_megatron.integrations import megatron
    from pikv_megatron.integrations.megatron.session import Session

    model = common.megatron_model(common.SMALL_MOE, None, 1)
    runtime = common.read_config(common.SMALL_MOE_CONFIG, [f"max_tokens={tokens}", *overrides])[1]
    context = megatron.attach(model, runtime).static_context(1, tokens)
    return Session(model, context), Session.on_stock_cache(model, 1, tokens)


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


@pytest.mark.parametrize("temperature", ["1e-40", "1e-300", "5e-324"])
def test_the_lowest_temperature_is_greedy(temperature, capsys):
    argv = ["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--quiet", "--threads", "1"]
    assert main([*argv, "--temperature", temperature]) == 0
    assert capsys.readouterr().out == "47\n"


def test_a_tokenizer_that_is_none(capsys, tmp_path):
    shutil.copytree(common.SMALL_MOE, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert main(["generate", "--prompt", "x", "--model", str(tmp_path / "model")]) == 2
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err


def test_packages_that_are_missing_are_named_with_what_brings_them(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["generate", "--prompt", "x"]) == 2
    assert "tokenizers comes with the extra hf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["generate", "--prompt", "x", "--model", "some/moe"]) == 2
    assert "models of the Hugging Face Hub need the package huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"eos_token_id": ["4"]}', "eos_token_id: expected an int or a list of them, got ['4']"),
        (b'{"eos_token_id": {}}', "eos_token_id: expected an int or a list of them, got {}"),
        (b"[1]", "expected a JSON object, got list"),
        (b"\xff", "expected UTF-8 text"),
        (b"[" * 10**5, "nested too deeply"),
    ],
)
def test_an_end_token_that_is_none(content, said, capsys, tmp_path):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'generation_config.json'}: ") as error:
        generate._end_tokens(tmp_path)
    assert said in str(error.value)


def test_a_prompt_that_cannot_fit_is_not_read_whole(capsys, tmp_path, monkeypatch):
    """A token of the small MoE is a byte."""
    long, binary = tmp_path / "long.txt", tmp_path / "binary"
    long.write_text("x" * 65)
    binary.write_bytes(b"And the LORD \xff")
    for source, text, said in (
        (str(long), "", "expected at most 64 characters, got more (runtime.max_tokens is 64, a token has 1 at most)"),
        ("-", "x" * 10**6, "--prompt-file -: expected at most 64 characters"),
        ("-", "x" * 64, "64 tokens and 64 new ones exceed max_tokens 64"),
        (str(binary), "", f"{binary}: expected UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 13"),
        ("-", "a\udcff", "--prompt-file -: expected UTF-8 text: 'utf-8' codec can't encode character"),
        ("-", "", "--prompt-file -: expected some text, it is empty"),
    ):
        stdin = io.StringIO(text)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", "--prompt-file", source, "--set", "max_tokens=64"]) == 2
        assert said in capsys.readouterr().err
        assert stdin.tell() <= 65


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
        (
            ["--prompt", "x", "--model", "/does/not/exist"],
            "--model /does/not/exist: expected the folder",
        ),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: expected at least 0"),
        (["--prompt", "x", "--threads", "0"], "--threads: expected 1 .. "),
        (["--prompt", "x", "--threads", "1000000"], ", got 1000000"),
        (["--prompt", "x", "--seed", str(2**70)], f"--seed: expected 0 .. 2**64 - 1, got {2**70}"),
        (["--prompt", "x", "--seed", "-1"], "--seed: expected 0 .. 2**64 - 1, got -1"),
        (["--prompt", "x", "--model", "/none", "--set", "max_tokens=1e13"], "runtime.max_tokens: 10000000000000 asks"),
        (["--prompt", "x", "--set", "window=yes"], "runtime.window: expected int, got 'yes'"),
        (["--prompt", "x\udcff"], "--prompt: expected UTF-8 text"),
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


def test_demo_refuses_a_seed_by_name(capsys):
    assert main(["demo", "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "pikv demo: error: --seed: expected 0 .. 2**64 - 1, got -1\n"


def test_demo_of_a_document_shorter_than_a_block(monkeypatch):
    papers = documents(load_text(common.HELD_OUT_TEXT), count=1, length=20, num_facts=1, num_questions=1, seed=3)
    args = argparse.Namespace(config=common.SMALL_MOE_CONFIG, model=common.SMALL_MOE, threads=1, quiet=True)
    monkeypatch.setattr(demo, "CACHES", {"stock": None, INT8: demo.CACHES[INT8]})
    assert [row.asked for row in demo.ask_all(papers, args)] == [1, 1]


def test_demo_table(capsys):
    assert main(["demo", "--documents", "1", "--facts", "3", "--length", "400", "--quiet", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("cache"))
    rows = lines[header + 1 : header + 1 + len(demo.CACHES)]
    assert [row[:20].strip() for row in rows] == [name[:20].strip() for name in demo.CACHES]
    for row in rows[:3]:
        assert "3 of 3" in row


def test_demo_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(demo, "CACHES", {"stock": None, "lossy": LOSSY})
    argv = ["demo", "--documents", "1", "--facts", "2", "--length", "200", "--threads", "1", "--json"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["documents"], found["facts"], found["device"]) == (1, 2, "CPU")
    stock, lossy = found["caches"]
    assert stock.keys() == lossy.keys() and (stock["cache"], lossy["cache"]) == ("stock", "lossy")
    assert (stock["questions"], stock["max_logit_difference"], stock["share_read"]) == (2, None, 1.0)
    assert lossy["max_logit_difference"] > 0 and 0 < lossy["share_read"] < 1 and lossy["kv_bytes"]["device"] > 0
    assert captured.err == ""


LOSSY = ["codec.keys=int2", "codec.values=int2", "attention.mode=mass", "attention.epsilon=0.2"]
INT8 = "PiKV INT8"


@pytest.fixture(scope="module")
def asked():
    """Three documents and the demo's rows for stock, INT8 and a lossy cache. In the third document half of the
    questions expect an answer that the text does not give.
    """
    *papers, third = documents(
        load_text(common.HELD_OUT_TEXT), count=3, length=320, num_facts=8, num_questions=8, seed=3
    )
    questions = [
        Fact(f.key, b"%02d" % ((int(f.value) + 55) % 100)) if i % 2 else f for i, f in enumerate(third.questions)
    ]
    papers.append(dataclasses.replace(third, questions=tuple(questions)))
    args = argparse.Namespace(config=common.SMALL_MOE_CONFIG, model=common.SMALL_MOE, threads=1, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CACHES", {"stock": None, INT8: demo.CACHES[INT8], "lossy": LOSSY})
        rows = demo.ask_all(papers, args)
    assert [row.name for row in rows] == ["stock", INT8, "lossy"]
    return papers, rows


def test_demo_int8_answers_what_stock_answers(asked):
    """All that the text answers: 8 and 8 and 4 of 8."""
    _, (stock, int8, _) = asked
    assert (stock.right, stock.asked) == (int8.right, int8.asked) == (20, 24)


def test_demo_figures_are_those_of_an_independent_loop(asked, monkeypatch):
    """Every question asked again here: answers, logits and certificates, over all documents and steps."""
    papers, rows = asked
    tokens = len(papers[0].text) + 8 * 5
    right, differences, certificates = [0, 0], [], []
    ours, _ = _sessions(LOSSY, tokens)
    attention = ours.context.cache.attention
    attend = attention.attend_decode

    def watch(states, rows, undo):
        attended = attend(states, rows, undo)
        certificates.append(attended.missed[1].flatten())
        return attended

    monkeypatch.setattr(attention, "attend_decode", watch)
    for paper in papers:
        ours.context.reset()
        stock = type(ours).on_stock_cache(ours.model, 1, tokens)
        for session in (stock, ours):
            session.feed(torch.tensor([list(paper.text)]))
        worst = 0.0
        for fact in paper.questions:
            chosen = []
            for byte in fact.text:
                logits = [session.feed(torch.tensor([[byte]]))[0] for session in (stock, ours)]
                chosen.append([int(x.argmax()) for x in logits])
                worst = max(worst, float((logits[0] - logits[1]).abs().max()))
            for i in range(2):  # what follows "#QX" and "#QX4"
                right[i] += [chosen[2][i], chosen[3][i]] == list(fact.value)
        differences.append(worst)
    assert [rows[0].right, rows[2].right] == right
    assert rows[2].asked == 24 and rows[2].steps == 24 * 5
    assert rows[0].difference == 0.0
    assert max(differences) > 1.001 * differences[-1]  # else the last document's would do
    assert rows[2].difference == pytest.approx(max(differences), rel=1e-3)
    missed = torch.stack(certificates)
    assert missed.max() > 1.5 * missed.mean()
    lossy = demo.table(rows).splitlines()[-1].split()
    assert lossy[1:4] == [str(right[1]), "of", "24"]
    assert float(lossy[-3]) == pytest.approx(max(differences), rel=0.05)  # one decimal
    assert float(lossy[-1]) == pytest.approx(float(missed.max()), abs=1e-4)


def test_demo_bytes_are_those_of_storages():
    """The stock row is the sum of Megatron's tensors; PiKV's is the live rows of pools, windows and importance."""
    from pikv_megatron.integrations import megatron
    from pikv_megatron.integrations.megatron.session import Session

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
    rows = cache.importance.tensor
    entries = sum(len(table) for state in cache._requests[0].layers for table in state.tables)
    expected["device"] += entries * rows[0].numel() * rows.element_size()
    held, allocated = demo._bytes(ours)
    assert held == expected
    storages = [t for pool in cache.tiers for t in pool.tensors.values()]
    storages += [rows, *(t for window in cache._windows for t in window.tensors.values())]
    by_place = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in storages}
    assert allocated == sum(by_place.values()) >= sum(held.values())


VERSION = """
import sys
from pikv_megatron.cli import main
try:
    main(["--version"])
finally:
    print("torch" in sys.modules)
"""


def test_version_needs_neither_torch_nor_ops():
    done = subprocess.run([sys.executable, "-c", VERSION], capture_output=True, text=True, check=True)
    assert done.stdout == f"pikv_megatron {pikv_megatron.__version__}\nFalse\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the Hub with the small MoE in it as `some/moe`, laid out as `hf download` does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", None)  # nothing asks the network
    repository = tmp_path / "models--some--moe"
    for folder in ("refs", "blobs", "snapshots/0123abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    for number, file in enumerate(common.SMALL_MOE.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (repository / "snapshots/0123abc" / file.name).symlink_to(f"../../blobs/{number}")
    return tmp_path


@pytest.mark.parametrize("host", ["megatron", "hf"])
def test_a_model_of_the_hub_is_taken_from_its_local_cache(hub, host, capsys):
    argv = ["generate", "--prompt", PROMPT, "--max-new-tokens", "2", "--quiet", "--threads", "1", "--host", host]
    assert main([*argv, "--model", "some/moe"]) == 0
    assert capsys.readouterr().out == "47\n"


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["demo"]])
def test_a_model_of_the_hub_that_is_not_there_says_what_to_do(hub, command, capsys):
    assert main([*command, "--model", "mistralai/Mixtral"]) == 2
    assert capsys.readouterr().err == (
        f"pikv {command[0]}: error: --model mistralai/Mixtral: there is no such folder, and no such model in the Hub's "
        f"local cache ({hub}): download it first (hf download mistralai/Mixtral), or name a folder\n"
    )


def test_threads_are_set():
    common.megatron_model(common.SMALL_MOE, None, 1)
    assert torch.get_num_threads() == 1
