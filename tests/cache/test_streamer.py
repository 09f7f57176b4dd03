"""What a streamer is told: every sealed block, in order and once, and what becomes of the requests: enough to know what
the cache holds.
"""

from __future__ import annotations

import random

import pytest
import torch
from dense import generator, model_config, random_kv, random_routing, runtime_config, step

from pikv_megatron import PiKVCache, Streamer
from pikv_megatron.tiers.blocks import PoolFullError


def test_it_hears_of_every_block_and_release(monkeypatch):
    heard: list[tuple[int, int, int, int]] = []
    released: list[int] = []
    stored: dict[int, list[dict[str, torch.Tensor]]] = {}

    def sealed(self, request_id, layer_id, start, encode, label):
        encoded = encode()
        blocks = {len(tensor) for tensor in encoded.values()} | {len(label)}
        heard.append((request_id, layer_id, start, *blocks))
        stored.setdefault(request_id, []).append(encoded)

    monkeypatch.setattr(Streamer, "sealed", sealed)
    monkeypatch.setattr(Streamer, "released", lambda self, request_id: released.append(request_id))
    model, runtime = model_config(num_layers=1), runtime_config("int8")
    cache, rng = PiKVCache(model, runtime), generator(5)
    for request_id, total in ((4, 50), (9, 31)):
        for tokens in (20, 1, 1, total - 22):
            k, v = random_kv(model, tokens, rng)
            cache.append(0, k, v, request_id)
            cache.observe_routing(0, *random_routing(model, tokens, rng), request_id)
    for request_id, total in ((4, 50), (9, 31)):
        mine = [entry for entry in heard if entry[0] == request_id]
        positions = [start + i * runtime.block_size for _, _, start, blocks in mine for i in range(blocks)]
        count = (total - runtime.sinks - runtime.window) // runtime.block_size
        assert positions == [runtime.sinks + i * runtime.block_size for i in range(count)]
        ids = cache._requests[request_id].layers[0].tables[0].tensor
        for name, field in cache.tiers[0].fields.items():
            assert torch.equal(torch.cat([encoded[name] for encoded in stored[request_id]]), field[ids])
    cache.release(9)
    assert released == [9]


class Log(Streamer):
    """Keeps what it is told of: (request, layer) -> {start: (fields, label)}."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.held: dict[int, dict[tuple[int, int], tuple[dict[str, torch.Tensor], int]]] = {}

    def sealed(self, request_id, layer_id, start, encode, label):
        encoded = {name: tensor.clone() for name, tensor in encode().items()}
        blocks = self.held.setdefault(request_id, {})
        for i in range(len(label)):
            assert (layer_id, start + i * self.size) not in blocks
            of_block = {name: tensor[i] for name, tensor in encoded.items()}
            blocks[layer_id, start + i * self.size] = of_block, int(label[i])

    def released(self, request_id):
        del self.held[request_id]

    def forked(self, source, target):
        assert target not in self.held
        self.held[target] = dict(self.held[source])

    def reordered(self, request_ids, sources):
        before = dict(self.held)
        self.held |= {r: dict(before[s]) for r, s in zip(request_ids, sources, strict=True)}

    def cropped(self, request_id, length):
        self.held[request_id] = {at: b for at, b in self.held[request_id].items() if at[1] + self.size <= length}


DROP = {"budget": {"policy": "uniform", "first_layer_tokens": 20, "over_budget": "drop"}}
DEMOTE = {"budget": {"policy": "uniform", "first_layer_tokens": 20}, "tiers": [{"kind": "device"}, {"kind": "host"}]}


@pytest.mark.parametrize("changes", [{}, {"codec": "int8"}, DROP, DEMOTE], ids=["none", "int8", "drop", "demote"])
@pytest.mark.parametrize("seed", range(3))
def test_what_it_was_told_is_what_is_held(changes, seed):
    """After forks, reorders, crops and releases in any order, and after such as were refused."""
    runtime = runtime_config(**{"max_tokens": 160, **changes})
    model, log, chance, rng = model_config(num_layers=2), Log(runtime.block_size), random.Random(seed), generator(seed)
    cache = PiKVCache(model, runtime, log)
    done = set()
    for _ in range(60):
        name, live, new = chance.choice(["step", "step", "fork", "reorder", "crop", "release"]), cache.requests(), 7
        request = chance.choice([*live, new])
        try:
            if request == new or name == "step":
                request = chance.choice([r for r in range(7) if r not in live]) if request == new else request
                count = chance.choice([1, 3, 20])
                cache.check_room({request: count})
                log.held.setdefault(request, {})
                step(cache, *random_kv(model, count, rng), rng, request)
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
        assert sorted(log.held) == cache.requests()
        for request, told in log.held.items():
            held = {}
            for layer, state in enumerate(cache._requests[request].layers):
                for table in state.tables:
                    held |= {(layer, int(table.pool.start[i])): (table.pool, i) for i in table.ids}
            assert held.keys() <= told.keys() if changes is DROP else held.keys() == told.keys()
            for at, (pool, i) in held.items():
                assert int(pool.label[i]) == told[at][1]
                assert all(torch.equal(pool.fields[name][i], tensor) for name, tensor in told[at][0].items())
    assert done == {"step", "fork", "reorder", "crop", "release", "refused"}
