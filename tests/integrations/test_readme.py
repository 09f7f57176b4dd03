"""What README.md shows of Megatron-core and of Hugging Face runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PREPARE = """
class tokenizer:
    vocab_size, bos, eod, pad = 288, None, -1, 0
    tokenize = staticmethod(lambda text: list(text.encode()))
    detokenize = staticmethod(lambda ids, **options: bytes(i & 255 for i in ids).decode("latin-1"))
prompts = ["And #QX47 the LORD spake unto Moses. #QX", "#AB12 In the beginning. #AB"]
"""
CHECK = """
print([record.merge().generated_text[:2] for record in records], attached.runtime_cfg.codec.keys)
"""


def example(word: str) -> str:
    """The first Python block of README.md with this word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if word in block)


def run(script: str) -> list[str]:
    """Lines that a script prints."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_hugging_face_example_runs():
    pytest.importorskip("transformers", reason="transformers is not installed")
    answer, held = run(example("PiKVHFCache("))
    assert answer == "47"
    assert re.fullmatch(r"\d+ bytes of KV", held)


def test_the_megatron_examples_run():
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    lines = run("\n".join([example("cpu_compat"), PREPARE, example("DynamicInferenceEngine("), CHECK]))
    first, last = (line for line in lines if line.startswith(("47", "[")))
    assert re.fullmatch(r"47\d+ bytes of KV", first)
    assert last == "['47', '12'] int8"
