"""Random calls in any order to `PiKVCache` and to a cache of plain lists: both hold the same tokens, labels and
importance in the same places and answer alike, blocks have the owners that they count, what is refused changes
nothing.
"""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable

import pytest
import torch
from dense import (
    CODECS,
    assert_pools_free,
    float32_rounding,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
)
from plain import PlainRequest

from pikv_megatron import PiKVCache, Segment, Step
from pikv_megatron.tiers.blocks import PoolFullError

LAYERS, REQUESTS = 3, 4
WINDOWS = (None, None, None, [None, 5, None], [3, 3, 3], [1, None, 20])
MODES = ({"mode": "exact"}, {"mode": "top_k", "read_fraction": 0.25}, {"mode": "mass", "epsilon": 0.1})
SELECTIVE = ({"mode": "top_k", "score": "quest"}, {"mode": "top_k", "read_fraction": 0.2, "prune_fraction": 0.5})
OPERATIONS = ("calls", "part", "step", "crop", "look") * 2 + ("calls", "torn", "fork", "reorder", "release", "copy")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def _random_cache(chance: random.Random) -> PiKVCache:
    experts = chance.choice([0, 4, 4])
    windows = chance.choice(WINDOWS)
    model = {"num_layers": LAYERS, "num_experts": experts, "sliding_windows": windows}
    model["moe_layers"] = chance.choice([None, [0], [1, 2]]) if experts else None
    window, sinks, size = chance.choice([1, 3, 6]), chance.choice([0, 2, 5]), chance.choice([1, 4, 7])
    keys = chance.choice(CODECS)
    runtime = {"window": window, "sinks": sinks, "block_size": size, "max_requests": REQUESTS}
    runtime |= {
        "max_tokens": chance.choice([max(3, size), 100, 200, 400]),
        "attention": chance.choice(MODES + SELECTIVE),
    }
    policy = chance.choice(["none", "uniform", "pyramid"])
    if policy != "none" and windows != [3, 3, 3]:
        above = chance.choice([0, 8, 30])
        step = above // LAYERS if policy == "pyramid" else None
        runtime["budget"] = {"policy": policy, "first_layer_tokens": sinks + window + above, "step": step}
        runtime["budget"] |= {"over_budget": chance.choice(["drop", "demote"]), "observation_window": 4}
        runtime["attention"] = MODES[0]  # what selective reads add to the importance is expected, not measured
        if runtime["budget"]["over_budget"] == "demote":
            runtime["tiers"] = [{"kind": "device"}, {"kind": "host"}]
    codec = {"keys": keys, "values": chance.choice([keys, "none"])}
    return PiKVCache(model_config(**model), runtime_config(codec, **runtime))


class Both:
    """The two caches, driven alike."""

    def __init__(self, seed: int) -> None:
        self.chance, self.rng = random.Random(seed), generator(seed)
        self.cache, self.plain = _random_cache(self.chance), dict[int, PlainRequest]()
        self.left: list[tuple[PiKVCache, dict]] = []
        self.done = collections.Counter[str]()

    def run(self, operations: int) -> None:
        for _ in range(operations):
            name, live = self.chance.choice(OPERATIONS), sorted(self.plain)
            request = self.chance.randrange(REQUESTS + 1)
            if name not in ("calls", "step", "torn", "copy") and request not in live:
                if not live:
                    continue
                request = self.chance.choice(live)
            getattr(self, name)(request)
            self.done[name] += 1
            self.check()
        for cache, before in self.left:
            assert snapshot(cache) == before
        for request in list(self.plain):
            self.release(request)
        assert_pools_free(self.cache)
        assert self.cache.stats()["bytes_held"] == 0

    # ---- what is done

    def fits(self, call: Callable[[], object], more: dict[int, list[int]]) -> bool:
        """Whether there was room for a call that adds these tokens per layer to requests."""
        before = snapshot(self.cache)
        try:
            call()
        except PoolFullError:
            assert snapshot(self.cache) == before
            tokens = [sum(p.layers[i].length for p in self.plain.values()) for i in range(LAYERS)]
            most = max(map(sum, zip(tokens, *more.values(), strict=True)))
            assert most > self.cache.capacity_tokens or len(self.plain.keys() | more) > REQUESTS
            self.done["refused"] += 1
            return False
        return True

    def count(self) -> int:
        return self.chance.choice([1, 1, 2, 5, 12, 40])

    def calls(self, request: int) -> None:
        """A forward of one request, one call for each layer and stage."""
        count = self.count()
        if self.fits(lambda: self.cache.check_room({request: count}), {request: [count] * LAYERS}):
            for layer in range(LAYERS):
                self.append(request, layer, count)
                self.attend(request, layer, count)
                self.observe(request, layer, count)

    def part(self, request: int) -> None:
        """Some layer alone, which nobody may attend to, or say the routing of."""
        layer, count = self.chance.randrange(LAYERS), self.count()
        if self.append(request, layer, count):
            if self.chance.random() < 0.3:
                self.attend(request, layer, self.chance.choice([1, count, count + 3]))
            if self.chance.random() < 0.3:
                self.observe(request, layer, self.chance.choice([1, count, count + 3]))

    def look(self, request: int) -> None:
        """Once more at some of the newest tokens, sealed or not."""
        layer = self.chance.randrange(LAYERS)
        if self.plain[request].layers[layer].length:
            self.attend(request, layer, self.chance.choice([1, 3, 12, 40, 99]))

    def append(self, request: int, layer: int, count: int) -> bool:
        k, v = random_kv(self.cache.model, count, self.rng)
        more = [count * (i == layer) for i in range(LAYERS)]
        if not self.fits(lambda: self.cache.append(layer, k, v, request), {request: more}):
            return False
        if request not in self.plain:
            self.plain[request] = PlainRequest(self.cache.model, self.cache.runtime)
        self.plain[request].append(layer, k, v, self.device(request, layer))
        return True

    def device(self, request: int, layer: int) -> list[int]:
        table = self.cache._requests[request].layers[layer].tables[0]
        return table.pool.start[table.tensor].tolist()

    def observe(self, request: int, layer: int, count: int) -> None:
        plain, model = self.plain[request], self.cache.model
        if model.num_experts and model.label_source(layer) == layer and 0 < count <= len(plain.layers[layer].raw):
            routing = random_routing(model, count, self.rng)
            self.cache.observe_routing(layer, *routing, request)
            plain.observe(layer, *routing)
            plain.seal(layer, self.device(request, layer))

    def attend(self, request: int, layer: int, count: int) -> None:
        """Or is refused, where a query would see what is no longer there."""
        plain = self.plain[request]
        state, q = plain.layers[layer], random_q(self.cache.model, min(count, plain.layers[layer].length), self.rng)
        first = state.length - len(q)
        if state.sliding is None:
            gone = state.oldest() > first
        else:
            gone = state.end > 0 and first - state.sliding + 1 < state.end
        if gone:
            before = snapshot(self.cache)
            with pytest.raises(ValueError, match=r"has forgotten|has dropped"):
                self.cache.attend(layer, q, request)
            assert snapshot(self.cache) == before
            self.done["gone"] += 1
            return
        got = self.cache.attend_measured(layer, q, request)
        self.compare(request, layer, q, got.out, got.lse, got.missed_certificate)

    def compare(self, request, layer, q, out, lse, missed) -> None:
        plain, model = self.plain[request], self.cache.model
        wanted_out, wanted_lse = plain.attend(layer, q)
        if missed.any():
            k, v, _ = plain.layers[layer].held()
            missed = missed.double() + float32_rounding(q, k, model.scale) + 1e-5
            assert (-torch.expm1(lse.double() - wanted_lse) <= missed).all()
            assert ((out.double() - wanted_out).abs().amax(-1) <= 2 * missed * v.abs().amax() + 1e-5).all()
        else:
            torch.testing.assert_close(out.double(), wanted_out, **CLOSE)
            torch.testing.assert_close(lse.double(), wanted_lse, **CLOSE)
        if model.label_source(layer) != layer:
            plain.seal(layer, self.device(request, layer))

    def step(self, _, torn: bool = False) -> None:
        """Decode tokens and chunks of several requests at once, old and new; torn: it ends somewhere on its way."""
        cache, model, chance = self.cache, self.cache.model, self.chance
        lengths = {r: {layer.length for layer in self.plain[r].layers} if r in self.plain else {0} for r in range(5)}
        able = [r for r, of in lengths.items() if len(of) == 1]
        some = chance.sample(able, chance.randint(1, len(able))) if able else []
        counts = {r: chance.choice([1, 1, 1, 2, 5, 12, 40]) for r in some}
        kinds = {r: chance.choice(["decode", "draft", "prompt"]) for r in some}
        step = Step(tuple(Segment(r, *lengths[r], n, kinds[r]) for r, n in counts.items()))
        if not some or not self.fits(lambda: cache.begin(step), {r: [n] * LAYERS for r, n in counts.items()}):
            return
        active = cache._steps.active
        for r, plain in self.plain.items():  # what was left over is sealed before
            for layer in range(LAYERS) if r in counts else ():
                plain.seal(layer, self.device(r, layer))
        done, left = [], chance.randint(1, 3 * LAYERS - 1) if torn else 3 * LAYERS
        for layer in range(LAYERS):
            routed = model.num_experts and model.label_source(layer) == layer and chance.random() < 0.8
            done.append(
                [
                    random_kv(model, step.tokens, self.rng),
                    random_q(model, step.tokens, self.rng),
                    random_routing(model, step.tokens, self.rng) if routed else None,
                ]
            )
            (k, v), q, routing = done[-1]
            if left > 0:
                active.append(layer, k, v)
            if left > 1:
                done[-1].append(active.attend(layer, q))
            if left > 2 and routing:
                active.observe_routing(layer, *routing)
            left -= 3
        if torn:
            active.abort("torn")
            return
        if chance.random() < 0.5:
            active.end()
        cache.requests()  # commits it
        self.done["committed"] += 1
        first = 0
        for r, n in counts.items():
            plain = self.plain.setdefault(r, PlainRequest(model, cache.runtime))
            rows = slice(first, first + n)
            first += n
            for layer, ((k, v), q, routing, result) in enumerate(done):
                plain.append(layer, k[rows], v[rows], None)
                missed = result.missed_certificate
                missed = torch.zeros(n) if missed is None else missed[rows]
                self.compare(r, layer, q[rows], result.out[rows], result.lse[rows], missed)
                if routing:
                    plain.observe(layer, *(x[rows] for x in routing))
                plain.seal(layer, self.device(r, layer))

    def torn(self, _) -> None:
        """A step that has not happened."""
        self.step(_, torn=True)

    def fork(self, request: int) -> None:
        target = next(r for r in range(REQUESTS + 1) if r not in self.plain)
        more = {target: [layer.length for layer in self.plain[request].layers]}
        if self.fits(lambda: self.cache.fork(request, target), more):
            self.plain[target] = self.plain[request].fork()

    def reorder(self, _) -> None:
        some = self.chance.sample(sorted(self.plain), self.chance.randint(1, len(self.plain)))
        sources = self.chance.choice([self.chance.choices(some, k=len(some)), self.chance.sample(some, len(some))])
        before = snapshot(self.cache)
        try:
            self.cache.reorder(some, sources)
        except PoolFullError:
            assert snapshot(self.cache) == before
            return
        self.plain |= {r: self.plain[s].fork() for r, s in zip(some, sources, strict=True)}

    def crop(self, request: int) -> None:
        plain = self.plain[request]
        if plain.allowed is not None:  # who leaves when a crop seals cannot be asked afterwards
            for layer in range(LAYERS):
                self.cache.sealer.seal(self.cache._requests[request].layers[layer])
                plain.seal(layer, self.device(request, layer))
        longest, least = min(layer.length for layer in plain.layers), plain.shortest_crop()
        assert self.cache.shortest_crop(request) == least
        anywhere, sinks = self.chance.randint(0, longest + 1), self.cache.runtime.sinks
        length = self.chance.choice([longest - self.count(), anywhere, anywhere, longest, least, sinks + 1])
        if not least <= length <= longest:
            before = snapshot(self.cache)
            with pytest.raises(ValueError, match=f"length: expected {least} .. {longest} for request {request}"):
                self.cache.crop(request, length)
            assert snapshot(self.cache) == before
            return
        blocks = sum(len(layer.blocks) for layer in plain.layers)
        self.cache.crop(request, length)
        plain.crop(length)
        self.done["blocks cut"] += blocks > sum(len(layer.blocks) for layer in plain.layers)

    def release(self, request: int) -> None:
        self.cache.release(request)
        del self.plain[request]

    def copy(self, _) -> None:
        """The copy goes on; what it was copied from stays as it is."""
        self.left = [*self.left[-1:], (self.cache, snapshot(self.cache))]
        self.cache = copy.deepcopy(self.cache)

    # ---- what holds

    def check(self) -> None:
        cache = self.cache
        assert cache.requests() == sorted(self.plain)
        owners, rows = [collections.Counter[int]() for _ in cache.tiers], collections.Counter[int]()
        for request, plain in self.plain.items():
            for layer, (state, expected) in enumerate(zip(cache._requests[request].layers, plain.layers, strict=True)):
                assert (state.request_id, state.layer_id, state.length) == (request, layer, expected.length)
                self.check_layer(request, layer, expected)
                for count, table in zip(owners, state.tables, strict=True):
                    count.update(table.ids)
                    rows.update(table.rows)
                if state.reserved:
                    owners[0].update(state.reserved.device)
                    for tier, block_id in state.reserved.below:
                        owners[tier][block_id] += 1
        for pool, count in zip(cache.tiers, owners, strict=True):
            assert pool._references == [count[i] for i in range(pool.num_blocks)]
            assert sorted(pool._free) == [i for i in range(pool.num_blocks) if not count[i]]
            assert pool.shared_blocks == sum(owners > 1 for owners in count.values())
            assert pool.more_owners == sum(owners - 1 for owners in count.values())
            assert min(pool.claims, pool.more_owners) <= pool.free_blocks
        states = [state for request in cache._requests.values() for state in request.layers]
        assert cache.tiers[0].claims == sum(state.reserved.claims for state in states if state.reserved)
        if cache.importance is not None:
            assert not rows or max(rows.values()) == 1
            assert sorted([*rows, *cache.importance._free]) == list(range(len(cache.importance.tensor)))

    def check_layer(self, request: int, layer: int, expected) -> None:
        cache, experts = self.cache, self.cache.model.num_experts
        state = cache._requests[request].layers[layer]
        if expected.raw or expected.blocks:
            for got, wanted in zip(cache.retrieve(layer, request), expected.held(), strict=True):
                assert torch.equal(got, wanted)
        raw = state.window.read()
        for i, token in enumerate(expected.raw):
            if experts:
                votes = torch.zeros(experts).index_add_(0, raw.expert_ids[i], raw.weights[i])
                assert torch.equal(votes, torch.zeros(experts) if token.votes is None else token.votes)
            if raw.importance is not None:
                assert raw.importance[i].item() == pytest.approx(token.importance, rel=1e-3, abs=1e-4)
        held = {}
        for tier, table in enumerate(state.tables):
            assert table.tensor.tolist() == table.ids
            assert table.row_tensor.tolist() == table.rows
            held |= {int(table.pool.start[i]): (tier, entry, table) for entry, i in enumerate(table.ids)}
        assert sorted(held) == sorted(b.start for b in expected.blocks)
        for b in expected.blocks:
            tier, entry, table = held[b.start]
            label = int(table.pool.label[table.ids[entry]])
            assert tier == b.tier
            assert b.even or label == b.label
            b.label, b.even = label, False
            if cache.importance is not None:
                received = cache.importance.tensor[table.rows[entry]]
                assert received.tolist() == pytest.approx(b.importance, rel=1e-3, abs=1e-4)


def test_any_calls_in_any_order():
    done = collections.Counter[str]()
    for seed in range(50):
        both = Both(seed)
        both.run(25)
        done += both.done
    assert done.keys() == {*OPERATIONS, "committed", "blocks cut", "refused", "gone"}
    assert min(done.values()) > 5, done


@pytest.mark.slow
def test_any_calls_in_any_order_at_length():
    for seed in range(1000, 1150):
        Both(seed).run(40)
