"""A decode step of several requests in one call is what it is one request after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import generator, model_config, random_kv, random_q, random_routing, runtime_config, snapshot, step

from pikv_megatron import PiKVCache
from pikv_megatron.tiers.blocks import PoolFullError

BUDGET = {"policy": "uniform", "first_layer_tokens": 18}
RUNTIMES: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "top_k": {"codec": "int8", "attention": {"mode": "top_k"}},
    "demote": {"budget": BUDGET, "tiers": [{"kind": "device"}, {"kind": "host"}]},
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense layers too": {"num_layers": 3, "moe_layers": [0], "v_head_dim": 12},
    "no experts": {"num_experts": 0},
    "bfloat16": {"dtype": "bfloat16"},
}
REQUESTS = (7, 2, 5)


def _filled(model, runtime) -> PiKVCache:
    cache = PiKVCache(model_config(**MODELS[model]), runtime_config(**RUNTIMES[runtime]))
    for request_id, tokens in zip(REQUESTS, (37, 3, 20), strict=True):
        rng = generator(request_id)
        step(cache, *random_kv(cache.model, tokens, rng), rng, request_id)
    return cache


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_step_of_all_is_that_of_each(model, runtime):
    together, alone = _filled(model, runtime), _filled(model, runtime)
    rng, shape = generator(3), together.model
    for number in range(14):  # blocks are sealed on the way
        order = REQUESTS if number % 3 else REQUESTS[1:]
        for layer_id in range(shape.num_layers):
            k, v = random_kv(shape, len(order), rng)
            q, (ids, weights) = random_q(shape, len(order), rng), random_routing(model_config(), len(order), rng)
            routed = shape.label_source(layer_id) == layer_id
            starts = [together.length(layer_id, r) for r in order]
            together.append_each(layer_id, k, v, order, starts if number % 2 else None)
            out, lse = together.attend_each(layer_id, q, order)
            if routed:
                together.observe_each(layer_id, ids, weights, order)
            for i, request_id in enumerate(order):
                one = slice(i, i + 1)
                alone.append(layer_id, k[one], v[one], request_id)
                expected = alone.attend(layer_id, q[one], request_id)
                if routed:
                    alone.observe_routing(layer_id, ids[one], weights[one], request_id)
                torch.testing.assert_close(out[one], expected[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(lse[one], expected[1], rtol=1e-5, atol=1e-5)
    assert together._requests[7].layers[0].sealed_end == 38
    mine, theirs = snapshot(together), snapshot(alone)
    assert mine["requests"] == theirs["requests"]
    if "importance" not in "".join(mine["tensors"]):  # which is equal up to rounding
        assert mine["tensors"] == theirs["tensors"]


def _refuses(cache, call, error, message) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call()
    assert snapshot(cache) == before


def test_what_does_not_fit_changes_nothing():
    cache, rng = _filled("sparse", "none"), generator(1)
    (k, v), q = random_kv(cache.model, 3, rng), random_q(cache.model, 3, rng)
    _refuses(cache, lambda: cache.append_each(0, k, v, (7, 2)), ValueError, r"expected 3 different .* got \[7, 2\]")
    _refuses(cache, lambda: cache.append_each(0, k, v, (7, 2, 7)), ValueError, r"expected 3 different ones")
    _refuses(cache, lambda: cache.append_each(0, k, v, (7, 2, 9)), KeyError, "request 9 does not exist")
    _refuses(cache, lambda: cache.append_each(0, k, v, REQUESTS, (37, 4, 20)), ValueError, "request 2.* skip")
    _refuses(cache, lambda: cache.append_each(0, k[:, :1], v, REQUESTS), ValueError, "k: expected shape")
    _refuses(cache, lambda: cache.append_each(2, k, v, REQUESTS), IndexError, "layer_id")
    _refuses(cache, lambda: cache.attend_each(0, q * float("nan"), REQUESTS), ValueError, "q: expected finite")
    _refuses(cache, lambda: cache.attend_each(0, q[:2], REQUESTS), ValueError, "expected 2 different ones")
    cache.release(2)
    cache.append(0, k, v, request_id=1)
    _refuses(cache, lambda: cache.attend_each(1, q, (7, 5, 1)), ValueError, "request 1, layer 1 has 0 tokens")


@pytest.mark.parametrize(
    ("requests", "rows", "error", "message"),
    [
        ((7, 2, 9), 3, KeyError, "request 9 does not exist"),
        ((7, 2, 7), 3, ValueError, r"expected 3 different ones"),
        (REQUESTS, 2, ValueError, "expected one row for each of 3 requests, got 2"),
        (REQUESTS, 4, ValueError, "at most the 3 tokens that are not sealed yet, got 4"),
        ((7, 2, 1), 3, ValueError, "at most the 2 tokens that are not sealed yet, got 3"),
    ],
)
def test_routing_that_does_not_fit_labels_no_request(requests, rows, error, message):
    cache, rng = _filled("sparse", "none"), generator(2)
    k, v = random_kv(cache.model, 3, rng)
    cache.append_each(0, k, v, REQUESTS)
    cache.release(5)
    cache.append(0, k, v, 5)
    if 1 in requests:
        cache.release(5)
        cache.append(1, k, v, 1)  # has none in layer 0
    routing = random_routing(cache.model, rows, rng)
    _refuses(cache, lambda: cache.observe_each(0, *routing, requests), error, message)
    _refuses(cache, lambda: cache.observe_each(2, *routing, requests), IndexError, "layer_id")


def test_a_layer_without_experts_has_no_routing():
    cache, rng = _filled("dense layers too", "none"), generator(2)
    routing = random_routing(cache.model, 3, rng)
    _refuses(cache, lambda: cache.observe_each(1, *routing, REQUESTS), ValueError, "layer 1 has no experts")


def test_a_full_pool_gives_no_request_its_token():
    block = _filled("sparse", "none").tiers[0].block_bytes
    cache = PiKVCache(model_config(), runtime_config(tiers=[{"kind": "device", "bytes": 3 * block}]))
    rng = generator(1)
    for request_id, tokens in ((0, 15), (1, 11), (2, 11)):  # at the next token each needs a block; the first holds one
        cache.append(0, *random_kv(cache.model, tokens, rng), request_id)
        cache.attend(0, random_q(cache.model, 1, rng), request_id)
        cache.observe_routing(0, *random_routing(cache.model, 1, rng), request_id)
    k, v = random_kv(cache.model, 3, rng)
    _refuses(cache, lambda: cache.append_each(0, k, v, (0, 1, 2)), PoolFullError, "3 tokens of 3 requests in layer 0")
    cache.release(2)
    cache.append_each(0, k[:2], v[:2], (0, 1))
    assert [cache.length(request_id=r) for r in (0, 1)] == [16, 12]
