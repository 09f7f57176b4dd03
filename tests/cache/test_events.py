"""What listeners hear: every token and every sealed block, in order and once, and what becomes of them: enough to know
at any time which blocks the cache holds where, and what is in them.
"""

from __future__ import annotations

import contextlib
import random
from typing import NamedTuple

import pytest
import torch
from dense import forward, generator, model_config, random_kv, random_q, random_routing, runtime_config, step
from torch import Tensor

from pikv_megatron import CacheEvents, PiKVCache, Segment, Step
from pikv_megatron.cache.events import Blocks
from pikv_megatron.tiers.blocks import Place, PoolFullError


class Told(NamedTuple):
    """A block as a listener has heard of it."""

    place: Place
    block_id: int
    fields: dict[str, Tensor]
    label: int


def _each(blocks: Blocks) -> dict[tuple[int, int], Told]:
    """By (layer, position)."""
    assert len(blocks.ids) == len(blocks.start) == len(blocks.label) > 0
    rows = zip(blocks.start.tolist(), blocks.label.tolist(), strict=True)
    told = {}
    for i, (start, label) in enumerate(rows):
        fields = {name: tensor[i] for name, tensor in blocks.fields().items()}
        told[blocks.layer_id, start] = Told(blocks.place, blocks.ids[i], fields, label)
    assert len(told) == len(blocks.ids)
    return told


def _same(mine: Told, theirs: Told) -> bool:
    assert mine.fields.keys() == theirs.fields.keys()
    same = all(torch.equal(tensor, theirs.fields[name]) for name, tensor in mine.fields.items())
    return same and mine._replace(fields={}) == theirs._replace(fields={})


class Log(CacheEvents):
    """Keeps what it hears of: the blocks of each request, and those of a step that is not committed."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.held: dict[int, dict[tuple[int, int], Told]] = {}
        self.staged: dict[int, list[tuple[int, dict[tuple[int, int], Told]]]] = {}
        self.heard: list[str] = []

    def appended(self, step_id, layer_id, step, k, v):
        self.heard.append("appended")
        assert len(k) == len(v) == step.tokens

    def sealed(self, step_id, blocks):
        self.heard.append("sealed")
        if step_id is None:
            self._add(blocks.request_id, _each(blocks))
        else:
            self.staged.setdefault(step_id, []).append((blocks.request_id, _each(blocks)))

    def _add(self, request_id, told):
        mine = self.held.setdefault(request_id, {})
        assert mine.keys().isdisjoint(told)
        mine |= told

    def committed(self, step_id):
        self.heard.append("committed")
        for request_id, told in self.staged.pop(step_id, []):
            self._add(request_id, told)
        assert not self.staged

    def aborted(self, step_id):
        self.heard.append("aborted")
        self.staged.pop(step_id, None)
        assert not self.staged

    def moved(self, blocks, target):
        self.heard.append("moved")
        assert (target.request_id, target.layer_id) == (blocks.request_id, blocks.layer_id)
        before, after = _each(blocks), _each(target)
        assert list(before) == list(after)
        for at, told in before.items():
            assert _same(told, self.held[blocks.request_id][at])
            assert _same(after[at], told._replace(place=target.place, block_id=after[at].block_id))
            assert target.place != blocks.place
        self.held[blocks.request_id] |= after

    def evicted(self, blocks):
        self.heard.append("evicted")
        for at, told in _each(blocks).items():
            assert _same(told, self.held[blocks.request_id].pop(at))

    def released(self, request_id):
        self.heard.append("released")
        self.held.pop(request_id, None)

    def forked(self, source, target):
        self.heard.append("forked")
        assert not self.held.get(target)
        self.held[target] = dict(self.held.get(source, {}))

    def reordered(self, request_ids, sources):
        self.heard.append("reordered")
        before = dict(self.held)
        self.held |= {r: dict(before.get(s, {})) for r, s in zip(request_ids, sources, strict=True)}

    def cropped(self, request_id, length):
        self.heard.append("cropped")
        mine = self.held.get(request_id, {})
        self.held[request_id] = {at: told for at, told in mine.items() if at[1] + self.size <= length}

    def check(self, cache: PiKVCache) -> None:
        """What it was told is what is held, at this very moment."""
        told = {request_id: dict(mine) for request_id, mine in self.held.items()}
        for request_id, blocks in (staged for of_step in self.staged.values() for staged in of_step):
            told.setdefault(request_id, {}).update(blocks)
        for request_id, request in cache._requests.items():
            held: dict[tuple[int, int], Told] = {}
            tables = [(state, table) for state in request.layers for table in state.tables if len(table)]
            for state, table in tables:
                held |= _each(Blocks(request_id, state.layer_id, tuple(table.ids), table.pool))
            mine = told.pop(request_id, {})
            assert held.keys() == mine.keys()
            assert all(_same(mine[at], block) for at, block in held.items())
        assert not any(told.values())


DROP = {"budget": {"policy": "uniform", "first_layer_tokens": 16, "over_budget": "drop"}}
DEMOTE = {"budget": {"policy": "uniform", "first_layer_tokens": 16}, "tiers": [{"kind": "device"}, {"kind": "host"}]}
RUNTIMES = {"none": {}, "int8": {"codec": "int8"}, "drop": DROP, "demote": {"codec": "int4", **DEMOTE}}


def _logged(changes, **model) -> tuple[PiKVCache, Log]:
    runtime = runtime_config(**{"max_tokens": 160, **changes})
    log = Log(runtime.block_size)
    return PiKVCache(model_config(**{"num_layers": 2, **model}), runtime, [log]), log


@pytest.mark.parametrize("way", ["calls", "steps"])
def test_it_hears_of_every_block_in_order_and_once(way):
    """With the rows that were written; and of the release."""
    heard: list[tuple[int, int, int, Tensor]] = []
    released: list[int] = []

    class Heard(CacheEvents):
        def sealed(self, step_id, blocks):
            assert (step_id is None) == (way == "calls")
            assert blocks.place == Place(0, "device", "int8/int8")
            assert {len(tensor) for tensor in blocks.fields().values()} == {len(blocks.ids)}
            for i, start in enumerate(blocks.start.tolist()):
                heard.append((blocks.request_id, blocks.layer_id, start, {n: t[i] for n, t in blocks.fields().items()}))

        def released(self, request_id):
            released.append(request_id)

    model, runtime = model_config(num_layers=1), runtime_config("int8")
    cache, rng = PiKVCache(model, runtime, [Heard()]), generator(5)
    totals = {4: 50, 9: 31}
    for request_id, total in totals.items():
        for tokens in (20, 1, 1, total - 22):
            if way == "steps":
                forward(cache, {request_id: tokens}, rng)
                continue
            cache.append(0, *random_kv(model, tokens, rng), request_id)
            cache.observe_routing(0, *random_routing(model, tokens, rng), request_id)
    assert cache.requests() == [4, 9]
    for request_id, total in totals.items():
        mine = [entry for entry in heard if entry[:2] == (request_id, 0)]
        count = (total - runtime.sinks - runtime.window) // runtime.block_size
        assert [start for *_, start, _ in mine] == [runtime.sinks + i * runtime.block_size for i in range(count)]
        ids = cache._requests[request_id].layers[0].tables[0].tensor
        for name, field in cache.tiers[0].fields.items():
            assert torch.equal(torch.stack([fields[name] for *_, fields in mine]), field[ids])
    cache.release(9)
    assert released == [9]


@pytest.mark.parametrize("way", ["calls", "steps"])
def test_it_hears_of_every_token(way):
    """In the order of the step, without the host's padding; k and v as they will be sealed."""
    tokens: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {}

    class Heard(CacheEvents):
        def appended(self, step_id, layer_id, step, k, v):
            assert (step_id is None) == (way == "calls")
            first = 0
            for segment in step.segments:
                last = first + segment.tokens
                mine = tokens.setdefault((segment.request_id, layer_id), [])
                mine.append((segment.start, k[first:last].clone(), v[first:last].clone()))
                first = last
            assert first == len(k) == len(v)

    cache, rng = PiKVCache(model_config(), runtime_config(), [Heard()]), generator(5)
    lengths = {0: 0, 1: 0}
    for counts in ({0: 20}, {0: 1, 1: 30}, {0: 1, 1: 1}, {1: 7, 0: 1}):
        if way == "calls":
            for request_id, count in counts.items():
                step(cache, *random_kv(cache.model, count, rng), rng, request_id)
        else:
            total = sum(counts.values())
            segments = tuple(Segment(r, lengths[r], n, "decode" if n == 1 else "prompt") for r, n in counts.items())
            rows = torch.randperm(total + 3, generator=rng)[:total]
            with cache.begin(Step(segments, rows, total + 3)) as active:
                for layer_id in range(2):
                    active.append(layer_id, *random_kv(cache.model, total + 3, rng))
                    active.attend(layer_id, random_q(cache.model, total + 3, rng))
        for request_id, count in counts.items():
            lengths[request_id] += count
    for (request_id, layer_id), heard in tokens.items():
        starts, k, v = zip(*heard, strict=True)
        assert list(starts) == [sum(map(len, k[:i])) for i in range(len(k))]
        held = cache.retrieve(layer_id, request_id)
        assert torch.equal(torch.cat(k), held.k)
        assert torch.equal(torch.cat(v), held.v)
    assert len(tokens) == 4


@pytest.mark.parametrize("changes", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_what_it_was_told_is_what_is_held(changes, seed):
    """After steps, calls, torn steps, forks, reorders, crops and releases in any order, after such as were refused, and
    between the layers of a step.
    """
    cache, log = _logged(changes)
    chance, rng, done = random.Random(seed), generator(seed), set()
    for _ in range(90):
        name = chance.choice(["step", "step", "torn", "calls", "calls", "fork", "reorder", "crop", "release"])
        live, new = cache.requests(), 7
        request = chance.choice([*live, new])
        try:
            if name in ("step", "torn"):
                some = chance.sample([*live, *(r for r in range(7) if r not in live)], chance.randint(1, 3))
                _step(cache, log, {r: chance.choice([1, 1, 3, 20]) for r in some}, name == "torn", chance, rng)
            elif request == new or name == "calls":
                request = chance.choice([r for r in range(7) if r not in live]) if request == new else request
                count = chance.choice([1, 3, 20])
                cache.check_room({request: count})
                step(cache, *random_kv(cache.model, count, rng), rng, request)
            elif name == "fork":
                cache.fork(request, next(r for r in range(7) if r not in live))
            elif name == "reorder":
                cache.reorder(live, [chance.choice(live) for _ in live])
            elif name == "crop":
                cache.crop(request, max(1, cache.length(0, request) - chance.choice([2, 9, 30])))
            else:
                cache.release(request)
            done.add(name)
        except PoolFullError:
            done.add("refused")
        log.check(cache)
        assert cache.requests() == sorted(cache._requests)  # which ends the step
        log.check(cache)
        assert not log.staged
    assert done == {"step", "torn", "calls", "fork", "reorder", "crop", "release", "refused"}
    heard = {"appended", "sealed", "committed", "aborted", "released", "forked", "reordered", "cropped"}
    assert set(log.heard) == heard | ({"evicted"} if changes is DROP else set()) | (
        {"moved"} if "tiers" in changes else set()
    )


def _step(cache, log, counts, torn, chance, rng):
    lengths = {r: cache.length(0, r) if r in cache.requests() else 0 for r in counts}
    active = cache.begin(Step(tuple(Segment(r, lengths[r], n) for r, n in counts.items())))
    log.check(cache)
    total, last = sum(counts.values()), chance.randint(0, 2)
    with contextlib.suppress(KeyboardInterrupt), active:
        for layer_id in range(2):
            active.append(layer_id, *random_kv(cache.model, total, rng))
            log.check(cache)
            if torn and layer_id == last:
                raise KeyboardInterrupt
            active.attend(layer_id, random_q(cache.model, total, rng))
            active.observe_routing(layer_id, *random_routing(cache.model, total, rng))
            log.check(cache)
        if torn:
            raise KeyboardInterrupt
