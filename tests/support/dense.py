"""What the core's tests compare with and build on: dense attention in float64, small configs, random K/V, and a deep
snapshot of everything a cache holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pikv_megatron import ModelConfig, PiKVCache, RuntimeConfig, Segment, Step

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


def forward(cache: PiKVCache, tokens: dict[int, int], rng: torch.Generator) -> list[Tensor]:
    """One `Step` of so many tokens of each request over all layers, K, V, q and routing random; the layers' outputs."""
    model, total = cache.model, sum(tokens.values())
    live = cache.requests()
    starts = {request_id: cache.length(0, request_id) if request_id in live else 0 for request_id in tokens}
    segments = [Segment(r, starts[r], n, "decode" if n == 1 else "prompt") for r, n in tokens.items()]
    outs = []
    with cache.begin(Step(tuple(segments))) as active:
        for layer_id in range(model.num_layers):
            active.append(layer_id, *random_kv(model, total, rng))
            outs.append(active.attend(layer_id, random_q(model, total, rng)).out)
            if model.label_source(layer_id) == layer_id:
                active.observe_routing(layer_id, *random_routing(model, total, rng))
    return outs


def held_tensors(cache: PiKVCache) -> dict[str, Tensor]:
    """Every tensor that K/V, labels or importance are stored in, by a name of its own."""
    named = {f"{pool.kind}.{name}": t for pool in cache.tiers for name, t in pool.tensors.items()}
    if cache.importance is not None:
        named["importance"] = cache.importance.tensor
    for layer_id, window in enumerate(cache._windows):
        named |= {f"window.{layer_id}.{name}": t for name, t in window.tensors.items()}
    for request_id, request in cache._requests.items():
        for layer_id, (_, expert_ids, weights) in request.routing.items():
            prefix = f"waiting.{request_id}.{layer_id}.routing"
            named |= {f"{prefix}.expert_ids": expert_ids, f"{prefix}.weights": weights}
        for state in request.layers:
            prefix = f"waiting.{request_id}.{state.layer_id}"
            for part, raw in (("", state.window._waiting), ("after.", state.window._after)):
                names = raw._asdict().items() if raw else ()
                named |= {f"{prefix}.{part}{n}": t for n, t in names if t is not None}
            if state.sealed is not None and (come := state.sealed.leaving) is not None:
                fields = come.fields | {"start": come.start, "label": come.label, "importance": come.importance}
                named |= {f"{prefix}.come.{n}": t for n, t in fields.items()}
    return named


def _reserved(state: Any) -> Any:
    r = state.reserved
    return r and (list(r.device), r.claims, list(r.below), r.victim and r.victim.read())


def snapshot(cache: PiKVCache) -> dict[str, Any]:
    """A deep copy of the cache's state, to be compared with `==`: tensors as bytes, so that NaN equals itself. A step
    that has reached its end is committed by it.
    """
    stats = cache.stats()
    tensors = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in held_tensors(cache).items()}
    requests = {
        request_id: [
            (s.length, s.sealed_end, _reserved(s), s.window.tokens, [(list(t.ids), list(t.rows)) for t in s.tables])
            for s in request.layers
        ]
        for request_id, request in cache._requests.items()
    }
    free = [pool.free_blocks for pool in cache.tiers]
    return {"tensors": tensors, "requests": requests, "free": free, "stats": stats}


def assert_pools_free(cache: PiKVCache) -> None:
    for pool in cache.tiers:
        assert pool.free_blocks == pool.num_blocks, f"{pool.kind}: {pool.used_blocks} blocks are still taken"
        assert pool.claims == pool.more_owners == 0
