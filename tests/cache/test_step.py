"""A step of several requests is what it is request by request, and one that is torn has not happened."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from dense import (
    assert_pools_free,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_megatron import ModelConfig, PiKVCache, Segment, Step

BUDGET = {"policy": "uniform", "first_layer_tokens": 18}
TIERS = [{"kind": "device"}, {"kind": "host"}]
RUNTIMES: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "top_k": {"codec": "int8", "attention": {"mode": "top_k"}},
    "pruned": {"codec": "int8", "attention": {"mode": "top_k", "read_fraction": 0.25, "prune_fraction": 0.5}},
    "quest": {"codec": "int8", "attention": {"mode": "top_k", "score": "quest"}},
    "mass": {"codec": "int8", "attention": {"mode": "mass"}},
    "certificate": {"attention": {"mode": "mass", "epsilon_by": "certificate"}},
    "demote": {"budget": BUDGET, "tiers": TIERS},
    "drop": {"codec": "int4", "budget": {**BUDGET, "over_budget": "drop"}},
    "top_k demote": {"codec": "int8", "attention": {"mode": "top_k"}, "budget": BUDGET, "tiers": TIERS},
    "mass demote": {"attention": {"mode": "mass"}, "budget": BUDGET, "tiers": TIERS},
    "quest drop": {
        "codec": "int8",
        "attention": {"mode": "top_k", "score": "quest"},
        "budget": {**BUDGET, "over_budget": "drop"},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense layers too": {"num_layers": 3, "moe_layers": [0], "v_head_dim": 12},
    "no experts": {"num_experts": 0},
    "bfloat16": {"dtype": "bfloat16"},
    "sliding": {"num_layers": 3, "sliding_windows": [None, 9, None]},
}
REQUESTS = 16


def _cache(model: str, runtime: str) -> PiKVCache:
    shapes = {"max_tokens": 4096, "max_requests": REQUESTS, **RUNTIMES[runtime]}
    return PiKVCache(model_config(**MODELS[model]), runtime_config(**shapes))


class Tokens:
    """K, V, q and routing of any token of any request in any layer, the same whenever it is asked for."""

    def __init__(self, model: ModelConfig, seed: int, most: int = 512) -> None:
        rng = generator(seed)
        self.of = [
            [(*random_kv(model, most, rng), random_q(model, most, rng), *random_routing(model_config(), most, rng))
             for _ in range(model.num_layers)]
            for _ in range(REQUESTS)
        ]  # fmt: skip

    def step(self, layer_id: int, segments: tuple[Segment, ...]) -> list[Tensor]:
        parts = [[x[s.start : s.start + s.tokens] for x in self.of[s.request_id][layer_id]] for s in segments]
        return [torch.cat(column) for column in zip(*parts, strict=True)]


def _forward(cache: PiKVCache, tokens: Tokens, step: Step, stop: int | None = None) -> list[Tensor]:
    """A step through every layer; stop: the call before which it is torn, counted through the layers."""
    calls, outs = 0, []

    def call() -> None:
        nonlocal calls
        if calls == stop:
            raise KeyboardInterrupt
        calls += 1

    with cache.begin(step) as active:
        for layer_id in range(cache.model.num_layers):
            k, v, q, ids, weights = tokens.step(layer_id, step.segments)
            call()
            active.append(layer_id, k, v)
            call()
            outs.append(active.attend(layer_id, q).out)
            if cache.model.label_source(layer_id) == layer_id:
                call()
                active.observe_routing(layer_id, ids, weights)
    return outs


def _segments(chance: random.Random, lengths: dict[int, int], most: int) -> tuple[Segment, ...]:
    """A random ragged step: decode tokens, chunks of prompts, new requests."""
    chosen = chance.sample(range(REQUESTS), chance.randint(1, most))
    segments = []
    for request_id in chosen:
        start = lengths.get(request_id, 0)
        tokens = 1 if start and chance.random() < 0.8 else chance.choice([1, 2, 3, 5, 11, 19, 30])
        kind = "decode" if tokens == 1 else chance.choice(["prompt", "last_prompt", "draft"])
        segments.append(Segment(request_id, start, tokens, kind))
        lengths[request_id] = start + tokens
    return tuple(segments)


PAIRS = [("sparse", runtime) for runtime in RUNTIMES]
PAIRS += [(model, runtime) for model in list(MODELS)[1:] for runtime in ("int8", "top_k demote", "mass", "drop")]


@pytest.mark.parametrize(("model", "runtime"), PAIRS)
def test_any_step_is_that_of_each_request(model, runtime):
    together, alone = _cache(model, runtime), _cache(model, runtime)
    tokens, chance = Tokens(together.model, 3), random.Random(4)
    lengths: dict[int, int] = {}
    for number in range(22):
        if number == 12:  # some requests end, others take their slots
            for request_id in sorted(lengths)[::2]:
                for cache in (together, alone):
                    cache.release(request_id)
                del lengths[request_id]
        segments = _segments(chance, lengths, REQUESTS if number % 3 else 4)
        mine = _forward(together, tokens, Step(segments))
        theirs = [_forward(alone, tokens, Step((segment,))) for segment in segments]
        for layer_id, out in enumerate(mine):
            expected = torch.cat([outs[layer_id] for outs in theirs])
            torch.testing.assert_close(out, expected, rtol=1e-5 if out.dtype == torch.float32 else 1e-2, atol=1e-5)
    assert together.stats()["reads"]["selective_reads"] == alone.stats()["reads"]["selective_reads"]
    assert together.requests() == sorted(lengths)
    assert {r: together.length(0, r) for r in lengths} == lengths
    for request_id in together.requests():
        together.release(request_id)
    assert_pools_free(together)


def _until(cache: PiKVCache, tokens: Tokens, steps: int, seed: int) -> dict[int, int]:
    """Random steps of up to four requests; returns their lengths."""
    chance, lengths = random.Random(seed), {}
    for _ in range(steps):
        _forward(cache, tokens, Step(_segments(chance, lengths, 4)))
    return lengths


TORN = ["none", "top_k demote", "drop", "mass demote"]


@pytest.mark.parametrize("runtime", TORN)
@pytest.mark.parametrize("model", ["sparse", "dense layers too", "sliding"])
def test_a_torn_step_has_not_happened(model, runtime):
    """It is repeated after an exception before every call: bit by bit what it is without one."""
    calm, torn = _cache(model, runtime), _cache(model, runtime)
    tokens = Tokens(calm.model, 5)
    lengths = _until(calm, tokens, 9, 6)
    assert _until(torn, tokens, 9, 6) == lengths
    chance = random.Random(7)
    for number in range(6):
        before = snapshot(torn)
        after = dict(lengths)
        step = Step(_segments(chance, after, 5))
        for stop in range(3 * calm.model.num_layers if model == "sparse" else 2 * calm.model.num_layers + 1):
            with pytest.raises(KeyboardInterrupt):
                _forward(torn, tokens, step, stop)
            if stop % 2:  # what changes the cache discards it at once, else the next step does
                with pytest.raises(KeyError):
                    torn.release(REQUESTS)
                assert _comparable(snapshot(torn)) == _comparable(before)
        mine, theirs = _forward(torn, tokens, step), _forward(calm, tokens, step)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        if number % 2:  # ended, and begun again: the host tries once more
            mine = _forward(torn, tokens, step)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert _held(torn) == _held(calm)
        lengths = after


def _held(cache: PiKVCache) -> dict[str, Any]:
    """All that is held; reads of a step that was torn were made all the same."""
    state = snapshot(cache)
    del state["stats"]["reads"]
    return state


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Without what a discarded step may leave: counts of reads, and numbers behind what windows and pools hold."""
    return {"requests": state["requests"], "free": state["free"], "held": state["stats"]["bytes_held"]}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ops_of_a_decode_step_do_not_grow_with_the_requests(runtime):
    counts = {}
    for requests in (2, 16):
        cache = _cache("sliding", runtime)
        tokens = Tokens(cache.model, 9)
        _forward(cache, tokens, Step(tuple(Segment(r, 0, 30 + r % 3, "prompt") for r in range(requests))))
        for number in range(12):  # no block is sealed in the last of them
            step = Step(tuple(Segment(r, 30 + r % 3 + number, 1) for r in range(requests)))
            if number < 11:
                _forward(cache, tokens, step)
        active = cache.begin(step)
        k, v, q, ids, weights = tokens.step(0, step.segments)
        with _Count() as count:
            for layer_id in range(cache.model.num_layers):
                active.append(layer_id, k, v)
                active.attend(layer_id, q)
                active.observe_routing(layer_id, ids, weights)
        counts[requests] = count.names
    assert len(counts[2]) == len(counts[16]), {
        name for name in set(counts[16]) if counts[16].count(name) != counts[2].count(name)
    }
