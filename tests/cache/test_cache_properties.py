"""Whatever is done to the cache, in whatever order: exact mode is dense attention over what it holds, it holds what it
should, the pools end empty, and in the selective modes the certificate is never exceeded.

Hypothesis draws the configs and the operations. The few examples of the usual run are always the same; more, and at
random, with `-m slow`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dense import (
    CODECS,
    assert_pools_free,
    attend_retrieved,
    dense_attention,
    float32_rounding,
    generator,
    random_kv,
    random_q,
    random_routing,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_megatron import ModelConfig, PiKVCache, RuntimeConfig
from pikv_megatron.tiers.blocks import PoolFullError

LAYERS = 3
OPERATIONS = ("append", "append", "append", "step", "step", "observe", "attend", "retrieve", "release", "update")
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@st.composite
def models(draw) -> ModelConfig:
    experts = draw(st.sampled_from([0, 3]))
    groups, per_group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (3, 2)]))
    return ModelConfig(
        num_layers=LAYERS,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([4, 8, 12])),
        v_head_dim=draw(st.sampled_from([None, 4, 16])),
        num_experts=experts,
        topk=draw(st.sampled_from([1, 2])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        moe_layers=draw(st.sampled_from([None, (0,), (1, 2)])) if experts else None,
    )


@st.composite
def runtimes(draw, codecs=CODECS) -> RuntimeConfig:
    window, sinks, size = draw(st.integers(1, 9)), draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 4, 7]))
    policy = draw(st.sampled_from(["none", "none", "uniform", "pyramid"]))
    budget: dict[str, Any] = {"policy": policy}
    tiers: list[dict[str, Any]] = [{"kind": "device"}]
    if policy != "none":
        above = draw(st.integers(0, 30))
        budget["over_budget"] = draw(st.sampled_from(["drop", "demote"]))
        step = above // LAYERS if policy == "pyramid" else None
        budget |= {"first_layer_tokens": sinks + window + above, "step": step, "observation_window": 4}
        if budget["over_budget"] == "demote":
            tiers.append({"kind": "host"})
    return RuntimeConfig.from_dict(
        {
            "device": "cpu",
            "max_tokens": draw(st.sampled_from([40, 400])),
            "max_requests": 3,
            "window": window,
            "sinks": sinks,
            "block_size": size,
            "budget": budget,
            "tiers": tiers,
            "codec": {"keys": draw(st.sampled_from(codecs)), "values": draw(st.sampled_from(codecs))},
        }
    )


operations = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS),
        st.integers(0, LAYERS - 1),
        st.integers(0, 3),  # request: one more than fit
        st.one_of(st.integers(1, 3), st.integers(1, 40)),  # tokens
    ),
    min_size=5,
    max_size=40,
)


@dataclass
class Driver:
    """Does operations to a cache and keeps every token that was appended beside it."""

    cache: PiKVCache
    rng: torch.Generator
    appended: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, runtime = self.cache.model, self.cache.runtime
        self.lossless = runtime.codec.keys == runtime.codec.values == "none"
        self.drops = runtime.budget.policy != "none" and runtime.budget.over_budget == "drop"
        self.close = CLOSE[model.dtype]

    def do(self, name: str, layer: int, request: int, tokens: int) -> None:
        if name in ("append", "update"):
            self.append(name, layer, request, tokens)
        elif name == "step":
            for each in range(LAYERS):
                if self.append("append", each, request, tokens):
                    self.attend(each, request, tokens)
                    self.observe(each, request, tokens)
        elif request in self.appended:
            if name == "release":
                self.cache.release(request)
                del self.appended[request]
            else:
                getattr(self, name)(layer, request, tokens)

    def tokens_with(self, layer: int, tokens: int) -> int:
        """The largest layer's tokens, all requests together, once `tokens` more are in `layer`."""
        live = self.cache.requests()
        held = [sum(self.cache.length(i, r) for r in live) for i in range(LAYERS)]
        held[layer] += tokens
        return max(held)

    def append(self, name: str, layer: int, request: int, tokens: int) -> bool:
        cache, length = self.cache, self.length(layer, request)
        k, v = random_kv(cache.model, tokens, self.rng)
        before = snapshot(cache)
        try:
            if name == "append":
                cache.append(layer, k, v, request, start=length)
            else:
                cache.update(layer, range(length, length + tokens), k, v, request)
        except PoolFullError:
            slots = request in self.appended or len(self.appended) < 3
            assert not slots or self.tokens_with(layer, tokens) > cache.capacity_tokens
            assert snapshot(cache) == before
            return False
        self.appended.setdefault(request, [[] for _ in range(LAYERS)])[layer].append((k, v))
        assert cache.length(layer, request) == length + tokens
        return True

    def length(self, layer: int, request: int) -> int:
        return sum(len(k) for k, _ in self.appended[request][layer]) if request in self.appended else 0

    def observe(self, layer: int, request: int, tokens: int) -> None:
        model, window = self.cache.model, self.cache._requests[request].layers[layer].window
        tokens = min(tokens, window.tokens)
        if model.label_source(layer) == layer and tokens:
            self.cache.observe_routing(layer, *random_routing(model, tokens, self.rng), request)

    def attend(self, layer: int, request: int, tokens: int) -> None:
        """Against dense attention over what the cache holds now."""
        tokens = min(tokens, self.length(layer, request))
        if not tokens:
            return
        q = random_q(self.cache.model, tokens, self.rng)
        self.retrieve(layer, request, tokens)
        expected_out, expected_lse = attend_retrieved(self.cache, layer, q, request)
        out, lse = self.cache.attend(layer, q, request)
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected_out, rtol=self.close, atol=self.close)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=self.close, atol=self.close)

    def retrieve(self, layer: int, request: int, tokens: int) -> None:
        """Every position once and in order; all of them, unless a budget drops; unchanged, unless a codec rounds."""
        runtime, length = self.cache.runtime, self.length(layer, request)
        held = self.cache.retrieve(layer, request)
        positions = held.positions.tolist()
        assert positions == sorted(set(positions))
        kept = {*range(min(runtime.sinks, length)), *range(max(0, length - runtime.window), length)}
        assert kept <= set(positions) <= set(range(length))
        if not self.drops:
            assert len(positions) == length
        if self.appended[request][layer]:
            k, v = (torch.cat(parts)[held.positions] for parts in zip(*self.appended[request][layer], strict=True))
            if self.lossless:
                assert torch.equal(held.k, k)
                assert torch.equal(held.v, v)
            else:  # int2 over the range of a standard normal
                assert (held.k - k).abs().amax() < 1.5
                assert (held.v - v).abs().amax() < 1.5

    def finish(self) -> None:
        for request in list(self.appended):
            for layer in range(LAYERS):
                self.attend(layer, request, 2)
            self.cache.release(request)
        assert_pools_free(self.cache)
        assert self.cache.stats()["bytes_held"] == 0
        assert self.cache.requests() == []


def _any_sequence(model: ModelConfig, runtime: RuntimeConfig, todo, seed: int) -> None:
    driver = Driver(PiKVCache(model, runtime), generator(seed))
    for operation in todo:
        driver.do(*operation)
    driver.finish()


ANY = {"model": models(), "runtime": runtimes(), "todo": operations, "seed": st.integers(0, 1000)}


@given(**ANY)
@settings(max_examples=80)
def test_any_sequence_is_dense_attention_over_what_is_held(model, runtime, todo, seed):
    _any_sequence(model, runtime, todo, seed)


@given(**{**ANY, "runtime": runtimes(codecs=("none",))})
@settings(max_examples=50)
def test_any_sequence_without_codec_loses_nothing(model, runtime, todo, seed):
    _any_sequence(model, runtime, todo, seed)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=2000, derandomize=False)
def test_any_sequence_at_length(model, runtime, todo, seed):
    _any_sequence(model, runtime, todo, seed)


# ---- the certificate

MODES: list[dict[str, Any]] = [
    *({"mode": "mass", "epsilon": e, "epsilon_by": b} for e in (0.5, 0.05, 1e-4) for b in ("estimate", "certificate")),
    *(
        {"mode": "top_k", "read_fraction": f, "prune_fraction": p}
        for f, p in ((0.02, 0.1), (0.02, 0.5), (0.25, 0.25), (0.25, 1.0))
    ),
    *({"mode": "top_k", "read_fraction": f, "score": "quest"} for f in (0.02, 0.5)),
]
CERTIFICATES = {
    "mode": st.sampled_from(MODES),
    "keys": st.sampled_from(CODECS),
    "values": st.sampled_from(["one-hot", "random", "int4"]),
    "dims": st.sampled_from([(4, 1, 1), (8, 2, 1), (16, 1, 4), (64, 2, 2)]),
    "size": st.sampled_from([1, 4, 8, 32]),
    "tokens": st.sampled_from([12, 40, 120, 200]),
    "spread": st.sampled_from([1e-5, 0.1, 1.0, 30.0]),
    "offset": st.sampled_from([0.0, 1.0, 100.0, 30000.0]),
    "strength": st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    "equal": st.booleans(),
    "tiers": st.sampled_from([1, 2]),
    "seed": st.integers(0, 10**6),
}


def _certificate_holds(mode, keys, values, dims, size, tokens, spread, offset, strength, equal, tiers, seed) -> None:
    """One decode query against a cache of `tokens` tokens, keys spread around an offset per channel.

    Where values are one-hot, the output is the softmax over the tokens read, and shows which were not. Then the true
    missed mass comes from float64 logits over what `retrieve` gives. Attention itself computes in float32: that much of
    the odds (`rounding`) stays open.
    """
    dim, groups, per_group = dims
    rng = generator(seed)
    model = ModelConfig(
        num_layers=1,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=dim,
        v_head_dim=tokens,
        num_experts=0,
    )
    runtime: dict[str, Any] = {"device": "cpu", "max_tokens": 256, "max_requests": 1, "window": 3, "sinks": 1}
    runtime |= {"block_size": size, "attention": mode}
    runtime["codec"] = {"keys": keys, "values": "int4" if values == "int4" else "none"}
    if tiers == 2:
        runtime["budget"] = {"policy": "uniform", "first_layer_tokens": 4 + tokens // 2}
        runtime["tiers"] = [{"kind": "device"}, {"kind": "host"}]
    cache = PiKVCache(model, runtime)
    k = spread * torch.randn(tokens, groups, dim, generator=rng)
    k = (k[:1].expand_as(k) if equal else k) + offset * torch.randn(1, groups, dim, generator=rng)
    k = k.clamp(-65504, 65504)
    v = torch.randn(tokens, groups, tokens, generator=rng)
    if values == "one-hot":
        v = torch.eye(tokens).unsqueeze(1).expand(-1, groups, -1).contiguous()
    cache.append(0, k, v)
    cache.attend(0, torch.zeros(1, groups * per_group, dim))  # seals

    q = strength * torch.randn(1, groups * per_group, dim, generator=rng)
    got = cache.attend_measured(0, q)
    held = cache.retrieve(0)
    out, lse = dense_attention(q, held.k, held.v, model.scale)
    rounding = float32_rounding(q, held.k, model.scale)
    certificate = got.missed_certificate.double()
    assert ((certificate >= 0) & (certificate <= 1)).all()
    assert (got.missed_estimate <= got.missed_certificate * (1 + 1e-5)).all()

    if values == "one-hot" and rounding.max() < 1:  # else a token that was read may show a weight of zero
        missed = out.masked_fill(got.out != 0, 0.0).sum(-1)
        assert (missed <= certificate * rounding.exp() + 1e-12).all(), (missed / certificate).max()
    missed = -torch.expm1(got.lse.double() - lse)
    assert (missed <= certificate + rounding).all()
    off, largest = (got.out.double() - out).abs().amax(-1), held.v.double().abs().amax()
    assert (off <= (2 * certificate + 2 * rounding) * largest).all()
    if mode["mode"] == "mass":
        said = got.missed_certificate if mode["epsilon_by"] == "certificate" else got.missed_estimate
        assert (said <= mode["epsilon"] * rounding.exp()).all()


@given(**CERTIFICATES)
@settings(max_examples=400)
def test_the_certificate_holds(**drawn):
    _certificate_holds(**drawn)


@pytest.mark.slow
@given(**CERTIFICATES)
@settings(max_examples=10000, derandomize=False)
def test_the_certificate_holds_at_length(**drawn):
    _certificate_holds(**drawn)


def test_the_certificate_is_not_vacuous():
    """With four high bits it is of the size of the truth on ordinary keys, not one."""
    ratios = []
    for seed in range(10):
        rng = generator(seed)
        model = ModelConfig(num_layers=1, head_dim=32, num_experts=0, num_attention_heads=4, num_query_groups=2)
        attention = {"mode": "top_k", "read_fraction": 0.25}
        runtime = {"device": "cpu", "max_tokens": 512, "max_requests": 1, "window": 8, "attention": attention}
        cache = PiKVCache(model, {**runtime, "codec": {"keys": "int8"}})
        k, v = random_kv(model, 400, rng)
        cache.append(0, k, v)
        cache.attend(0, torch.zeros(1, 4, 32))
        q = 2 * random_q(model, 1, rng)
        got, held = cache.attend_measured(0, q), cache.retrieve(0)
        lse = dense_attention(q, held.k, held.v, model.scale)[1]
        missed = -torch.expm1(got.lse.double() - lse)
        ratios.append(missed.mean().item() / got.missed_certificate.mean().item())
    assert math.fsum(ratios) / len(ratios) > 0.25
