"""A cache in the middle of its work, and how a call is held to refusing bad input without changing anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import (
    assert_pools_free,
    attend_retrieved,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
    step,
)

from pikv_megatron import PiKVCache


def working_cache(codec="none", model=None, **changes):
    model = model_config(v_head_dim=12, **(model or {}))
    cache, rng = PiKVCache(model, runtime_config(codec, max_tokens=128, max_requests=2, **changes)), generator(1)
    step(cache, *random_kv(model, 40, rng), rng, request_id=0)
    step(cache, *random_kv(model, 15, rng), rng, request_id=4)
    for layer_id in range(2):  # 4 tokens beyond the window whose routing is still to come
        cache.append(layer_id, *random_kv(model, 4, rng), request_id=0)
        cache.attend(layer_id, random_q(model, 4, rng), request_id=0)
    return cache


def refuses(cache, call: Callable[[], Any], error: type[Exception], *parts: str) -> None:
    """The call raises that error; its message has the parts; nothing has changed; the cache still works."""
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert snapshot(cache) == before
    _still_works(cache)


def _still_works(cache) -> None:
    rng, model = generator(2), cache.model
    for layer_id in range(2):
        if model.num_experts:
            cache.observe_routing(layer_id, *random_routing(model, 4, rng), request_id=0)
    for request_id in cache.requests():
        length = cache.length(request_id=request_id)
        step(cache, *random_kv(model, 3, rng), rng, request_id)
        assert cache.length(request_id=request_id) == length + 3
        for layer_id in range(2):
            q = random_q(model, 3, rng)
            out, _ = attend_retrieved(cache, layer_id, q, request_id)
            got, _ = cache.attend(layer_id, q, request_id)
            close = 1e-4 if model.dtype == "float32" else 2e-2
            torch.testing.assert_close(got.double(), out, rtol=close, atol=close)
    for request_id in cache.requests():
        cache.release(request_id)
    assert_pools_free(cache)
    step(cache, *random_kv(model, 40, rng), rng, request_id=9)
