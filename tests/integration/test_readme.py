"""What README.md shows of Megatron-core runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
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


def test_the_megatron_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    static, engine = (next(b for b in blocks if word in b) for word in ("cpu_compat", "DynamicInferenceEngine("))
    script = "\n".join([static, PREPARE, engine, CHECK])
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = (line for line in done.stdout.splitlines() if line.startswith(("47", "[")))
    assert re.fullmatch(r"47\d+ bytes of KV", first)
    assert last == "['47', '12'] int8"
