"""What a streamer is told: every sealed block, in order and once, and every released request."""

from __future__ import annotations

import torch
from dense import generator, model_config, random_kv, random_routing, runtime_config

from pikv_megatron import PiKVCache, Streamer


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
