"""The cache under hosts that track gradients or that go in and out of inference mode: what it keeps is plain memory."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from dense import (
    attend_retrieved,
    generator,
    held_tensors,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    step,
)

from pikv_megatron import ExpertKVCache, PiKVCache

BUDGET = {"policy": "uniform", "first_layer_tokens": 20, "over_budget": "drop"}
DEMOTE = {"budget": {**BUDGET, "over_budget": "demote"}, "tiers": [{"kind": "device"}, {"kind": "host"}]}
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8 drop": {"codec": "int8", "budget": BUDGET},
    "top_k demote": {"attention": {"mode": "top_k"}, **DEMOTE},
    "mass": {"codec": "int4", "attention": {"mode": "mass"}},
}
OUTSIDE, INSIDE = contextlib.nullcontext, torch.inference_mode


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_tensors_that_require_grad_leave_no_graph_behind(kind):
    """A host that forgot no_grad: what is stored and what is returned hold on to nothing."""
    cache, rng = PiKVCache(model_config(), runtime_config(**kind)), generator()
    for tokens in (9, 30, 1, 1, 1, 1, 1, 9):
        k, v, q = (*random_kv(cache.model, tokens, rng), random_q(cache.model, tokens, rng))
        expert_ids, weights = random_routing(cache.model, tokens, rng)
        cache.append(0, k.requires_grad_(), v.requires_grad_())
        out, lse = cache.attend(0, q.requires_grad_())
        cache.observe_routing(0, expert_ids, weights.requires_grad_())
        assert not out.requires_grad
        assert not lse.requires_grad
    assert not any(t.requires_grad for t in (*held_tensors(cache).values(), *cache.retrieve(0)))
    assert cache.retrieve(0).k.grad_fn is None


@pytest.mark.parametrize("modes", [(INSIDE, OUTSIDE), (OUTSIDE, INSIDE), (INSIDE, INSIDE)])
def test_inference_mode_may_come_and_go(kind, modes):
    """Made in one mode, used in the other, and back."""
    first, second = modes
    rng = generator(1)
    with first():
        cache = PiKVCache(model_config(), runtime_config(**kind))
        step(cache, *random_kv(cache.model, 30, rng), rng)
    for mode in (second, first, second):
        with mode():
            for tokens in (1, 1, 1, 1, 7):
                step(cache, *random_kv(cache.model, tokens, rng), rng)
            q = random_q(cache.model, 2, rng)
            expected, _ = attend_retrieved(cache, 1, q)
            torch.testing.assert_close(cache.attend(1, q)[0].double(), expected, rtol=1e-5, atol=1e-5)
            cache.stats()
    assert not any(t.is_inference() for t in held_tensors(cache).values())
    with second():
        cache.release(0)


def test_a_shard_alone_outlives_inference_mode():
    shard, rng = ExpertKVCache(model_config(), runtime_config("int8")), generator(2)
    with torch.inference_mode():
        shard.put(0, 0, *random_kv(shard.model, 8, rng))
    k, v = random_kv(shard.model, 8, rng)
    shard.put(0, 8, k.requires_grad_(), v)
    partial = shard.attend(random_q(shard.model, 1, rng).requires_grad_())
    assert not partial.out.requires_grad
    assert shard.tokens(0) == 16
    assert not any(t.is_inference() or t.requires_grad for t in shard.pool.tensors.values())
