"""Decode takes no memory and waits for no device: tensors and their places stay, a profile shows no copy of a number to
the host, and the same steps run on tensors without data, where any such copy is an error. And the bytes in stats are
those of storages, all of them.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from dense import (
    forward,
    generator,
    held_tensors,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    step,
)
from torch.profiler import ProfilerActivity, profile

from pikv_megatron import PiKVCache, Segment, Step, ops
from pikv_megatron.cache import sealing
from pikv_megatron.cache.state import OnHost

TOP_K = {"mode": "top_k", "read_fraction": 0.25}
PYRAMID = {"policy": "pyramid", "first_layer_tokens": 40, "step": 10}
DROP = {"budget": {**PYRAMID, "over_budget": "drop"}}
DEMOTE = {"budget": PYRAMID, "tiers": [{"kind": "device"}, {"kind": "host"}]}
KINDS: dict[str, dict[str, Any]] = {
    "exact none": {},
    "exact int8": {"codec": "int8"},
    "exact int4 demote": {"codec": "int4", **DEMOTE},
    "exact none drop": DROP,
    "top_k none": {"attention": TOP_K},
    "top_k int4": {"codec": "int4", "attention": TOP_K},
    "top_k int8 drop": {"codec": "int8", "attention": TOP_K, **DROP},
    "top_k int2 demote": {"codec": "int2", "attention": TOP_K, **DEMOTE},
    "top_k pruned": {"codec": "int8", "attention": {**TOP_K, "prune_fraction": 0.5}},
    "quest": {"codec": "int8", "attention": {**TOP_K, "score": "quest"}},
    "mass int8": {"codec": "int8", "attention": {"mode": "mass"}},
    "mass none demote": {"attention": {"mode": "mass", "epsilon_by": "certificate"}, **DEMOTE},
    "mass int4 drop": {"codec": "int4", "attention": {"mode": "mass"}, **DROP},
}
MODELS = {"sparse": {"num_layers": 2}, "dense layers too": {"num_layers": 3, "moe_layers": [0]}}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def _warm(kind, model="sparse", warm=20):
    """Two requests, a prompt each, and some steps; returns the cache and how to take one step of both: in turns by a
    `Step` of both, and by calls for one request and layer at a time.
    """
    cache = PiKVCache(model_config(**MODELS[model]), runtime_config(**{"max_tokens": 1024, "max_requests": 2, **kind}))
    rng = generator(1)
    for request_id, tokens in ((0, 37), (1, 22)):
        step(cache, *random_kv(cache.model, tokens, rng), rng, request_id)

    ways = itertools.cycle(["step", "calls"])

    def decode() -> None:
        if next(ways) == "step":
            forward(cache, {0: 1, 1: 1}, rng)
            return
        for request_id in (0, 1):
            step(cache, *random_kv(cache.model, 1, rng), rng, request_id)

    for _ in range(warm):
        decode()
    return cache, decode


def _live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def test_two_hundred_steps_leave_memory_as_it_was(kind):
    cache, decode = _warm(kind, warm=60)  # so that every tier has been read
    cache.numbers._made.clear()  # a bounded memo of what the host has told the device
    places = {name: t.data_ptr() for name, t in held_tensors(cache).items()}
    allocated, live = cache.stats()["bytes_allocated"], len(_live_tensors())
    sealed = cache._requests[0].layers[0].sealed_end
    for _ in range(200):
        decode()
    assert cache._requests[0].layers[0].sealed_end == sealed + 200
    assert len(cache.numbers._made) <= 512
    cache.numbers._made.clear()
    assert len(_live_tensors()) == live
    assert {name: t.data_ptr() for name, t in held_tensors(cache).items()} == places
    assert cache.stats()["bytes_allocated"] == allocated


WAITS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "allclose")
"""What copies a number to the host, or gives a tensor whose size only the device knows."""


@pytest.mark.parametrize("name", ["exact int8", "top_k int8 drop", "top_k pruned", "mass none demote"])
def test_a_profile_of_decode_shows_no_wait(name):
    """Five steps, so that a block is sealed in each layer of each request."""
    cache, decode = _warm(KINDS[name], "dense layers too")
    before = cache._requests[1].layers[1].sealed_end
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        for _ in range(5):
            decode()
    assert cache._requests[1].layers[1].sealed_end >= before + 4
    names = {event.name.removeprefix("aten::") for event in seen.events()}
    assert "index_copy_" in names  # sealing was seen
    assert not [name for name in names if name.startswith(WAITS)]


@pytest.mark.parametrize("way", ["calls", "steps"])
@pytest.mark.parametrize("name", [n for n in KINDS if "demote" not in n])
def test_nothing_in_a_step_needs_a_number_from_the_device(name, way, monkeypatch):
    """The same steps on tensors without data (`meta`), where any look at a value, and any copy to the host, raises.

    One look there is, and it is stood in for here: which block a budget drops is named on the host. That is chosen when
    a step begins, and read when it is committed, which is when the next begins. Demoting is left out: it is a copy to
    the host.
    """
    runtime = runtime_config(**{"max_tokens": 1024, **KINDS[name]})
    monkeypatch.setitem(vars(runtime), "torch_device", torch.device("meta"))
    cache = PiKVCache(model_config(**MODELS["dense layers too"]), runtime)
    number, waited = 0, list[int]()

    class Chosen(OnHost):
        def __init__(self, numbers):
            super().__init__(numbers)
            self.number = number

        def read(self):
            waited.append(number - self.number)
            return [0] * len(self._copy)

    monkeypatch.setattr(sealing, "OnHost", Chosen)
    several = way == "steps" and ops.backend["attend_decode"] == "kernel"  # plain torch asks where a request's run ends
    requests = (0, 1, 2) if several else (0,)
    k, v, q = (torch.empty(len(requests), heads, 8, device="meta") for heads in (2, 2, 4))
    expert_ids, weights = (torch.empty(len(requests), 2, dtype=t, device="meta") for t in (torch.int64, torch.float32))
    for number in range(32):
        if way == "calls":
            append, attend, observe = cache.append, lambda *layer: cache.attend(*layer)[0], cache.observe_routing
        else:
            active = cache.begin(Step(tuple(Segment(r, number, 1) for r in requests)))
            append, attend, observe = (
                active.append,
                lambda *layer, on=active: on.attend(*layer).out,
                active.observe_routing,
            )
        for layer_id in range(3):
            append(layer_id, k, v)
            out = attend(layer_id, q)
            if layer_id == 0:
                observe(layer_id, expert_ids, weights)
    assert out.is_meta
    assert bool(waited) == ("drop" in name)
    assert way == "calls" or set(waited) <= {1}
    assert cache.requests() == list(requests)
    assert all(request.layers[2].sealed_end > 20 for request in cache._requests.values())
    for wait in (out.sum().item, out.cpu, out.nonzero):  # the trap works
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("kind", [{}, DEMOTE, {"codec": "int8", "attention": TOP_K}, {"attention": TOP_K, **DEMOTE}])
def test_what_the_host_tells_the_device_does_not_grow_with_the_layers(kind, monkeypatch):
    """Where requests' tokens and blocks are is told once a step; on a GPU each telling is a copy."""
    kind = {**kind, "budget": {"policy": "uniform", "first_layer_tokens": 40}} if "budget" in kind else kind
    told = dict[int, int]()
    for layers in (2, 8):
        cache, rng = PiKVCache(model_config(num_layers=layers), runtime_config(**kind)), generator(2)
        forward(cache, {0: 60, 1: 27}, rng)
        for _ in range(3):  # tables are told of what was sealed
            forward(cache, {0: 1, 1: 1}, rng)
        tensor, told[layers] = torch.tensor, 0

        def count(*args, layers=layers, tensor=tensor, **kwargs):
            told[layers] += 1
            return tensor(*args, **kwargs)

        with monkeypatch.context() as watched:
            watched.setattr(torch, "tensor", count)
            forward(cache, {0: 1, 1: 1}, rng)
    assert 0 < told[2] == told[8] < 10


def test_values_are_looked_at_where_a_prompt_hides_the_wait(monkeypatch):
    """On a GPU, `meta` here: not those of decode tokens, however many requests have one."""
    runtime = runtime_config()
    monkeypatch.setitem(vars(runtime), "torch_device", torch.device("meta"))
    cache = PiKVCache(model_config(), runtime)
    k = torch.empty(3, 2, 8, device="meta")
    cache.begin(Step(tuple(Segment(request, 0, 1) for request in range(3)))).append(0, k, k)
    with pytest.raises(NotImplementedError):
        cache.begin(Step((Segment(0, 0, 2, "prompt"), Segment(1, 0, 1)))).append(0, k, k)


@pytest.mark.parametrize("window", [1, 6])
def test_positions_are_looked_at_only_where_queries_are_sealed(window, monkeypatch):
    """Prompts and steps of a host that asks in time need no mask by position, however short the window is; and a
    selective read stays one.
    """
    cache, rng = PiKVCache(model_config(), runtime_config(window=window, attention=TOP_K)), generator(1)
    monkeypatch.setattr(cache.attention, "_attend_by_position", None)
    for tokens in (1, 30, *[1] * 20):
        step(cache, *random_kv(cache.model, tokens, rng), rng)
    assert cache.stats()["reads"]["selective_reads"] == 2 * 20


# ---- bytes


def _rows_bytes(tensor: torch.Tensor, rows: list[int]) -> int:
    return sum(tensor[row].numel() * tensor.element_size() for row in rows)


def _check_bytes(cache) -> None:
    stats = cache.stats()
    states = [s for request in cache._requests.values() for s in request.layers]
    for tier, pool in enumerate(cache.tiers):
        blocks = [i for s in states for i in s.tables[tier].ids]
        taken = [(s.reserved.device, s.reserved.below) for s in states if s.reserved]
        taken += [([], s.sealed.leaving.below) for s in states if s.sealed and s.sealed.leaving]
        for device, below in taken:
            blocks += [i for at, i in [*((0, i) for i in device), *below] if at == tier]
        assert len(blocks) == len(set(blocks))
        said = stats["tiers"][pool.kind]
        assert said["blocks_used"] == len(blocks)
        assert said["bytes_held"] == sum(_rows_bytes(t, blocks) for t in pool.tensors.values())
        assert said["bytes_allocated"] == sum(t.untyped_storage().nbytes() for t in pool.tensors.values())
    slots = [request.slot for request in cache._requests.values()]
    windows = [t for window in cache._windows for t in window.tensors.values()]
    waiting = sum(t.untyped_storage().nbytes() for n, t in held_tensors(cache).items() if n.startswith("waiting"))
    assert stats["window"]["bytes_held"] == sum(_rows_bytes(t, slots) for t in windows) + waiting
    rows = [row for s in states for table in s.tables for row in table.rows]
    assert len(rows) == len(set(rows))
    assert bool(rows) == (cache.importance is not None and any(map(len, (t for s in states for t in s.tables))))
    assert stats["importance"]["bytes_held"] == (_rows_bytes(cache.importance.tensor, rows) if rows else 0)
    for figure in ("bytes_held", "bytes_allocated"):
        parts = [stats[part][figure] for part in ("window", "importance")]
        parts += [tier[figure] for tier in stats["tiers"].values()]
        assert stats[figure] == sum(parts)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_tensors(cache).values()}
    assert stats["bytes_allocated"] == sum(storages.values())


def test_bytes_are_those_of_the_storages(kind):
    cache, decode = _warm(kind, warm=0)
    _check_bytes(cache)
    for layer_id in range(2):  # a chunk that waits for its routing
        cache.append(layer_id, *random_kv(cache.model, 50, generator(2)), request_id=1)
        assert f"waiting.1.{layer_id}.k" in held_tensors(cache)
        _check_bytes(cache)
        cache.attend(layer_id, random_q(cache.model, 50, generator(3)), request_id=1)
        cache.observe_routing(layer_id, *random_routing(cache.model, 50, generator(4)), request_id=1)
        _check_bytes(cache)
    for _ in range(5):
        decode()
        _check_bytes(cache)
    cache.release(0)
    _check_bytes(cache)
    cache.release(1)
    _check_bytes(cache)
    stats = cache.stats()
    assert stats["bytes_held"] == 0
    assert stats["bytes_allocated"] > 0


def test_bytes_while_a_step_runs(kind):
    """A prompt's blocks, and what its windows will be, wait beside the rest until the step is committed."""
    cache, _ = _warm(kind, warm=0)
    for layer_id in range(2):  # blocks that nobody has looked at: under a budget they will leave
        cache.append(layer_id, *random_kv(cache.model, 50, generator(2)), request_id=1)
        cache.observe_routing(layer_id, *random_routing(cache.model, 50, generator(4)), request_id=1)
    active = cache.begin(Step((Segment(0, 37, 1), Segment(1, 72, 60, "prompt"))))
    for layer_id in range(2):
        active.append(layer_id, *random_kv(cache.model, 61, generator(5)))
        _check_bytes(cache)
        active.attend(layer_id, random_q(cache.model, 61, generator(6)))
        _check_bytes(cache)
        assert cache._steps.active is (None if layer_id else active)  # it ends with the last layer
        if layer_id == 0:
            active.observe_routing(layer_id, *random_routing(cache.model, 61, generator(7)))
            waiting = {name.split(".")[3] for name in held_tensors(cache) if name.startswith("waiting.1.0")}
            assert waiting == {"after"} | ({"come"} if "budget" in kind else set())


def test_nothing_of_size_is_left_out_of_stats(kind):
    """Every tensor that the process has more after a cache was made and filled is in stats, but for block tables and
    counters.
    """
    before = {t.untyped_storage().data_ptr() for t in _live_tensors()}
    cache, _ = _warm(kind, warm=0)
    after = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _live_tensors()}
    new = sum(size for place, size in after.items() if place not in before)
    mirrors = [m._tensor for r in cache._requests.values() for s in r.layers for t in s.tables for m in t._tensors]
    counters = [cache._meter._sum, cache._meter._max]
    beside = sum(t.untyped_storage().nbytes() for t in (*mirrors, *counters, *cache.numbers._made.values()))
    slack = 8192  # the generator's state
    assert 0 <= new - beside - cache.stats()["bytes_allocated"] <= slack


def test_the_routing_kept_for_dense_layers_is_counted():
    cache, _ = _warm(KINDS["exact int8"], "dense layers too")
    assert "waiting.0.0.routing.weights" in held_tensors(cache)
    _check_bytes(cache)


def test_host_and_device_bytes_are_told_apart():
    cache, _ = _warm(KINDS["exact int4 demote"])
    tiers = cache.stats()["tiers"]
    assert set(tiers) == {"device", "host"}
    assert tiers["host"]["blocks_used"] == cache.stats()["blocks_demoted"] > 0
    allowed = sum((40 - 10 * layer - 8) // 4 for layer in range(2))
    assert tiers["device"]["blocks_used"] == 2 * allowed
