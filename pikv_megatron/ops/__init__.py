"""The one seam between the cache and its ops: a compiled `torch.ops.pikv.*` where it is registered, else the
plain-torch reference.

`PIKV_OPS=reference` forces the reference. `backend` says what each op resolved to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import BlockScores, Keys, Partial, TokenScores, Values

backend: dict[str, str] = {}


def _resolve(name: str) -> Callable[..., Any]:
    choice = os.environ.get("PIKV_OPS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"PIKV_OPS: expected 'auto' or 'reference', got {choice!r}")
    kernel = getattr(torch.ops.pikv, name, None) if choice == "auto" else None
    backend[name] = "reference" if kernel is None else "kernel"
    return getattr(reference, name) if kernel is None else kernel


quantize_block = _resolve("quantize_block")
dequantize_block = _resolve("dequantize_block")
block_bounds = _resolve("block_bounds")
score_blocks = _resolve("score_blocks")
score_tokens = _resolve("score_tokens")
attend_blocks = _resolve("attend_blocks")
attend_tokens = _resolve("attend_tokens")
key_logits = _resolve("key_logits")
attend_masked = _resolve("attend_masked")
attend_window = _resolve("attend_window")
attend_at = _resolve("attend_at")
merge_partials = _resolve("merge_partials")
token_importance = _resolve("token_importance")
window_importance = _resolve("window_importance")

__all__ = [
    "BlockScores",
    "Keys",
    "Partial",
    "TokenScores",
    "Values",
    "attend_at",
    "attend_blocks",
    "attend_masked",
    "attend_tokens",
    "attend_window",
    "backend",
    "block_bounds",
    "dequantize_block",
    "key_logits",
    "merge_partials",
    "quantize_block",
    "score_blocks",
    "score_tokens",
    "token_importance",
    "window_importance",
]
