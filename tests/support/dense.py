"""What the core's tests compare with and build on: dense attention in float64, small configs, random K/V, and a deep
snapshot of everything a cache holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pikv_megatron import ModelConfig, PiKVCache, RuntimeConfig

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "num_experts": 4,
    "topk": 2,
}
RUNTIME = {"device": "cpu", "max_tokens": 512, "max_requests": 3, "window": 6, "sinks": 2, "block_size": 4}
CODECS = ("none", "int8", "int4", "int2")


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**MODEL, **changes})


def runtime_config(codec: str | dict[str, str] = "none", **changes: Any) -> RuntimeConfig:
    """codec: of keys and values alike, or the section."""
    section = {"keys": codec, "values": codec} if isinstance(codec, str) else codec
    return RuntimeConfig.from_dict({**RUNTIME, "codec": section, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_kv(model: ModelConfig, tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """k [tokens, num_query_groups, head_dim] and v with v_head_dim, standard normal, in the model's dtype."""
    k = torch.randn(tokens, model.num_query_groups, model.head_dim, generator=rng)
    v = torch.randn(tokens, model.num_query_groups, model.value_dim, generator=rng)
    return k.to(model.torch_dtype), v.to(model.torch_dtype)


def random_q(model: ModelConfig, tokens: int, rng: torch.Generator) -> Tensor:
    q = torch.randn(tokens, model.num_attention_heads, model.head_dim, generator=rng)
    return q.to(model.torch_dtype)


def random_routing(model: ModelConfig, tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """expert_ids and weights [tokens, topk]: distinct experts, weights of a softmax."""
    logits = torch.randn(tokens, model.num_experts, generator=rng)
    weights, expert_ids = logits.softmax(-1).topk(model.topk)
    return expert_ids, weights


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention written out in float64, causal where positions are given; a query that sees nothing gets 0 and -inf.

    Args:
        q: [tokens, heads, D]. k: [keys, groups, D]. v: [keys, groups, E]. key_positions: [keys]. query_positions:
            [tokens]. window: a query sees only this many positions, up to its own.

    Returns: out [tokens, heads, E], lse [tokens, heads], float64.
    """
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(heads_per_group, 1) for x in (k, v))
    logits = torch.einsum("thd,khd->thk", q.double(), k) * scale
    if key_positions is not None and query_positions is not None:
        behind = query_positions[:, None, None] - key_positions[None, None, :]
        logits.masked_fill_((behind < 0) | (behind >= (window or torch.inf)), -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("thk,khe->the", weights, v), lse


def float32_rounding(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """By how much float32 may get the logits of a query wrong, and sums of their exponentials: [tokens, heads].

    Some 1e-7 of the products that are summed. q: [tokens, heads, D], k: [keys, groups, D].
    """
    k = k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
    products = torch.einsum("thd,khd->thk", q.double().abs(), k).amax(-1) * scale
    return 4 * 2.0**-23 * (products + 20)


def attend_retrieved(cache: PiKVCache, layer_id: int, q: Tensor, request_id: int = 0) -> tuple[Tensor, Tensor]:
    """Dense attention over what the cache says that it holds now."""
    held = cache.retrieve(layer_id, request_id)
    length = cache.length(layer_id, request_id)
    queries = torch.arange(length - q.shape[0], length)
    window = cache.model.sliding_window(layer_id)
    return dense_attention(q, held.k, held.v, cache.model.scale, held.positions, queries, window)


def step(cache: PiKVCache, k: Tensor, v: Tensor, rng: torch.Generator, request_id: int = 0) -> None:
    """One forward pass over all layers, as a host drives it: the same k, v to each; attend; observe the routing."""
    model, tokens = cache.model, k.shape[0]
    for layer_id in range(model.num_layers):
        cache.append(layer_id, k, v, request_id)
        cache.attend(layer_id, random_q(model, tokens, rng), request_id)
        if model.label_source(layer_id) == layer_id:
            cache.observe_routing(layer_id, *random_routing(model, tokens, rng), request_id)


def held_tensors(cache: PiKVCache) -> dict[str, Tensor]:
    """Every tensor that K/V, labels or importance are stored in, by a name of its own."""
    named = {f"{pool.kind}.{name}": t for pool in cache.tiers for name, t in pool.tensors.items()}
    for layer_id, window in enumerate(cache._windows):
        named |= {f"window.{layer_id}.{name}": t for name, t in window.tensors.items()}
    for request_id, request in cache._requests.items():
        for layer_id, (_, expert_ids, weights) in request.routing.items():
            prefix = f"waiting.{request_id}.{layer_id}.routing"
            named |= {f"{prefix}.expert_ids": expert_ids, f"{prefix}.weights": weights}
        for state in request.layers:
            if state.window._waiting is not None:
                names = state.window._waiting._asdict().items()
                named |= {f"waiting.{request_id}.{state.layer_id}.{n}": t for n, t in names if t is not None}
    return named


def snapshot(cache: PiKVCache) -> dict[str, Any]:
    """A deep copy of the cache's state, to be compared with `==`: tensors as bytes, so that NaN equals itself."""
    tensors = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in held_tensors(cache).items()}
    requests = {
        request_id: [
            (s.length, s.sealed_end, s.reserved, s.window.tokens, [list(t.ids) for t in s.tables])
            for s in request.layers
        ]
        for request_id, request in cache._requests.items()
    }
    free = [pool.free_blocks for pool in cache.tiers]
    return {"tensors": tensors, "requests": requests, "free": free, "stats": cache.stats()}


def assert_pools_free(cache: PiKVCache) -> None:
    for pool in cache.tiers:
        assert pool.free_blocks == pool.num_blocks, f"{pool.kind}: {pool.used_blocks} blocks are still taken"
