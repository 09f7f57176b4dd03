"""Expert labels of sealed blocks: the expert with the largest gate weight summed over the block's tokens, however the
tokens and their routing arrived.
"""

from __future__ import annotations

import random
import weakref

import pytest
import torch
from dense import generator, model_config, random_kv, random_q, random_routing, runtime_config, snapshot

from pikv_megatron import PiKVCache, Segment, Step

SINKS, SIZE = 2, 4


def _labels(cache, layer_id, request_id=0):
    """Label of each sealed block, oldest first."""
    (table,) = cache._requests[request_id].layers[layer_id].tables
    order = table.pool.start[table.tensor].argsort()
    starts = table.pool.start[table.tensor][order].tolist()
    assert starts == list(range(SINKS, SINKS + SIZE * len(starts), SIZE))
    return table.pool.label[table.tensor][order].tolist()


def _expected(expert_ids, weights, blocks, experts=4):
    """Written out, tie to the smaller id."""
    labels = []
    for block in range(blocks):
        votes = [0.0] * experts
        for token in range(SINKS + block * SIZE, SINKS + (block + 1) * SIZE):
            for expert, weight in zip(expert_ids[token].tolist(), weights[token].tolist(), strict=True):
                votes[expert] += weight
        labels.append(votes.index(max(votes)))
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_depend_on_how_tokens_arrive(seed):
    """One prompt, chunks, single tokens; several requests in turn, each with routing of its own."""
    model, total = model_config(num_layers=2), 90
    rng, chance = generator(seed), random.Random(seed)
    cache = PiKVCache(model, runtime_config())
    k, v = random_kv(model, total, rng)
    routing = {(r, layer): random_routing(model, total, rng) for r in range(3) for layer in range(2)}
    cuts = {0: [total], 1: [1] * total, 2: []}
    while sum(cuts[2]) < total:
        cuts[2].append(min(chance.choice([1, 3, 4, 17]), total - sum(cuts[2])))
    done = dict.fromkeys(cuts, 0)
    while any(cuts.values()):
        request_id = chance.choice([r for r in cuts if cuts[r]])
        first = done[request_id]
        last = done[request_id] = first + cuts[request_id].pop(0)
        for layer in range(2):
            cache.append(layer, k[first:last], v[first:last], request_id)
            if chance.random() < 0.5:
                cache.attend(layer, random_q(model, last - first, rng), request_id)
            expert_ids, weights = routing[request_id, layer]
            cache.observe_routing(layer, expert_ids[first:last], weights[first:last], request_id)
    for (request_id, layer), (expert_ids, weights) in routing.items():
        blocks = (total - SINKS - 6) // SIZE
        assert _labels(cache, layer, request_id) == _expected(expert_ids, weights, blocks)
    assert len({tuple(_labels(cache, 0, r)) for r in range(3)}) == 3


def test_the_gate_weight_counts_not_the_number_of_tokens():
    model = model_config(num_layers=1)
    cache = PiKVCache(model, runtime_config())
    expert_ids = torch.tensor([[0, 1], [0, 1], [0, 1], [3, 2]]).repeat(4, 1)[:14]
    weights = torch.tensor([[0.2, 0.1], [0.2, 0.1], [0.2, 0.1], [0.7, 0.0]]).repeat(4, 1)[:14]
    cache.append(0, *random_kv(model, 14, generator()))
    cache.observe_routing(0, expert_ids, weights)
    assert _labels(cache, 0) == [3]


def test_late_routing_labels_the_newest_tokens():
    """Routing of the last tokens alone: the others count for nothing."""
    model = model_config(num_layers=1)
    cache = PiKVCache(model, runtime_config())
    cache.append(0, *random_kv(model, 22, generator()))
    cache.observe_routing(0, torch.tensor([[3, 1]]).repeat(13, 1), torch.tensor([[0.6, 0.4]]).repeat(13, 1))
    assert _labels(cache, 0) == [0, 3, 3]  # positions 2-5 unknown, 6-9 one token (9) known


def test_routing_told_twice_counts_once():
    model = model_config(num_layers=1)
    cache = PiKVCache(model, runtime_config())
    cache.append(0, *random_kv(model, 8, generator()))
    cache.observe_routing(0, torch.tensor([[3, 1]]).repeat(8, 1), torch.tensor([[0.9, 0.1]]).repeat(8, 1))
    cache.observe_routing(0, torch.tensor([[2, 1]]).repeat(8, 1), torch.tensor([[0.6, 0.4]]).repeat(8, 1))
    cache.append(0, *random_kv(model, 4, generator()))
    cache.observe_routing(0, torch.tensor([[0, 1]]).repeat(4, 1), torch.tensor([[0.6, 0.4]]).repeat(4, 1))
    assert _labels(cache, 0) == [2]


@pytest.mark.parametrize("way", ["calls", "steps"])
@pytest.mark.parametrize("chunks", [[90], [30, 30, 30], [1] * 90, [50, *[1] * 40]])
def test_dense_layers_inherit(chunks, way):
    """Layers 0 dense, 1 MoE, 2 and 3 dense, 4 MoE: 2 and 3 take 1's labels, 0 has none."""
    model = model_config(num_layers=5, moe_layers=[1, 4])
    cache, rng = PiKVCache(model, runtime_config()), generator(1)
    k, v = random_kv(model, 90, rng)
    routing = {layer: random_routing(model, 90, rng) for layer in (1, 4)}
    first = 0
    for tokens in chunks:
        last = first + tokens
        one = cache if way == "calls" else cache.begin(Step((Segment(0, first, tokens),)))
        for layer in range(5):
            one.append(layer, k[first:last], v[first:last])
            one.attend(layer, random_q(model, tokens, rng))
            if layer in routing:
                one.observe_routing(layer, routing[layer][0][first:last], routing[layer][1][first:last])
        first = last
    assert cache.length() == 90  # which ends the last step
    blocks = (90 - SINKS - 6) // SIZE
    labels = {layer: _expected(*routing[layer], blocks) for layer in (1, 4)}
    assert labels[1] != labels[4]
    for layer, expected in ((0, [0] * blocks), (1, labels[1]), (2, labels[1]), (3, labels[1]), (4, labels[4])):
        assert _labels(cache, layer) == expected, f"layer {layer}"


@pytest.mark.parametrize(("moe_layers", "kept"), [(None, [False] * 3), ([0, 1], [False, True])])
def test_a_step_keeps_the_routing_that_layers_will_inherit(moe_layers, kept):
    """Of a long prompt it is much; the host lets go of it layer by layer."""
    model = model_config(num_layers=3, moe_layers=moe_layers)
    cache, rng = PiKVCache(model, runtime_config()), generator()
    active, seen = cache.begin(Step((Segment(0, 0, 40, "prompt"),))), []
    for layer in moe_layers or range(3):
        active.append(layer, *random_kv(model, 40, rng))
        expert_ids, weights = random_routing(model, 40, rng)
        seen.append(weakref.ref(expert_ids))
        active.observe_routing(layer, expert_ids, weights)
        del expert_ids
    assert [ref() is not None for ref in seen] == kept


def test_routing_of_other_positions_is_not_inherited():
    """The MoE layer is ahead of the dense one: the routing of its newest tokens is not that of these."""
    model = model_config(num_layers=2, moe_layers=[0])
    cache, rng = PiKVCache(model, runtime_config()), generator(7)
    k, v = random_kv(model, 40, rng)
    cache.append(0, k, v)
    expert_ids = torch.tensor([1] * 20 + [3] * 20).unsqueeze(1).expand(-1, 2)
    cache.observe_routing(0, expert_ids, torch.ones(40, 2))
    for first, last in ((0, 20), (20, 39)):
        cache.append(1, k[first:last], v[first:last])
        cache.attend(1, random_q(model, 1, rng))
    assert 3 not in _labels(cache, 1)[:4]  # positions 2 .. 17


def test_another_requests_routing_is_not_inherited():
    model = model_config(num_layers=2, moe_layers=[0])
    cache, rng = PiKVCache(model, runtime_config()), generator(2)
    for request_id, expert in ((0, 3), (1, 1)):
        cache.append(0, *random_kv(model, 20, rng), request_id)
        ids = torch.full((20, 2), expert)
        cache.observe_routing(0, ids, torch.ones(20, 2), request_id)
    for request_id in (0, 1):
        cache.append(1, *random_kv(model, 20, rng), request_id)
        cache.attend(1, random_q(model, 1, rng), request_id)
    assert set(_labels(cache, 1, 0)) == {3}
    assert set(_labels(cache, 1, 1)) == {1}


@pytest.mark.parametrize("reorder", [False, True])
def test_routing_goes_with_the_tokens(reorder):
    """In the midst of a forward: the MoE layer has been observed, the dense one is to come."""
    cache, rng = PiKVCache(model_config(num_layers=2, moe_layers=[0]), runtime_config()), generator(4)
    for request_id, expert in ((0, 3), (1, 2)):
        cache.append(0, *random_kv(cache.model, 20, rng), request_id)
        cache.observe_routing(0, torch.full((20, 2), expert), torch.ones(20, 2), request_id)
    if reorder:
        cache.reorder([0, 1], [1, 1])
    else:
        cache.fork(0, 7)
    for request_id in cache.requests():
        cache.append(1, *random_kv(cache.model, 20, rng), request_id)
        cache.attend(1, random_q(cache.model, 1, rng), request_id)
        assert set(_labels(cache, 1, request_id)) == {2 if reorder or request_id == 1 else 3}


def test_a_copys_labels_are_its_own():
    """Of a chunk that waits to be sealed, too."""
    cache, rng = PiKVCache(model_config(num_layers=1), runtime_config()), generator(4)
    cache.append(0, *random_kv(cache.model, 40, rng))
    cache.fork(0, 1)
    cache.observe_routing(0, *random_routing(cache.model, 40, rng), 0)
    assert not cache._requests[1].layers[0].window.read().weights.any()


def test_routing_of_tokens_that_were_taken_back_is_not_inherited():
    cache, rng = PiKVCache(model_config(num_layers=2, moe_layers=[0]), runtime_config()), generator(4)
    for layer in range(2):
        cache.append(layer, *random_kv(cache.model, 20, rng))
        if layer == 0:
            cache.observe_routing(0, torch.full((20, 2), 3), torch.ones(20, 2))
    cache.crop(0, 18)
    for layer in range(2):  # two others, whose routing nobody tells
        cache.append(layer, *random_kv(cache.model, 2, rng))
    weights = cache._requests[0].layers[1].window.read().weights
    assert not weights[-2:].any()
    assert weights[-4:-2].all()


@pytest.mark.parametrize("model", [{"num_experts": 0}, {}, {"moe_layers": [1]}])
@pytest.mark.parametrize("attend", [True, False])
def test_without_routing_the_label_is_zero(model, attend):
    """Dense models, and hosts that never tell; with and without attention, tokens are sealed."""
    model = model_config(num_layers=2, **model)
    cache, rng = PiKVCache(model, runtime_config()), generator(3)
    for tokens in (40, 1, 1, 30, 1):
        for layer in range(2):
            cache.append(layer, *random_kv(model, tokens, rng))
            if attend:
                cache.attend(layer, random_q(model, 1, rng))
    for layer in range(2):
        labels = _labels(cache, layer)
        assert set(labels) == {0}
        assert len(labels) >= (72 - SINKS - 6) // SIZE - 1


def test_update_labels_where_the_caller_knows():
    model = model_config(num_layers=1)
    by_update, by_append = (PiKVCache(model, runtime_config()) for _ in range(2))
    rng = generator(4)
    k, v = random_kv(model, 30, rng)
    expert_ids, _ = random_routing(model, 30, rng)
    by_update.update(0, range(20), k[:20], v[:20], expert_ids=expert_ids[:20])
    for i in range(20, 30):
        by_update.update(0, i, k[i], v[i], expert_ids=expert_ids[i].tolist())
    by_append.append(0, k, v)
    by_append.observe_routing(0, expert_ids, torch.full((30, 2), 0.5))
    assert _labels(by_update, 0) == _labels(by_append, 0)
    assert len(set(_labels(by_update, 0))) > 1


def test_labels_say_where_blocks_are_placed():
    model = model_config(num_layers=1)
    cache = PiKVCache(model, runtime_config())
    cache.append(0, *random_kv(model, 30, generator()))
    cache.observe_routing(0, *random_routing(model, 30, generator(5)))
    assert cache.stats()["tiers"]["device"]["blocks_by_owner"] == [5]


def test_reading_and_measuring_change_nothing():
    model = model_config()
    cache, rng = PiKVCache(model, runtime_config("int8", attention={"mode": "top_k"})), generator(6)
    for layer in range(2):
        cache.append(layer, *random_kv(model, 50, rng))
        cache.observe_routing(layer, *random_routing(model, 50, rng))
    before = snapshot(cache)
    cache.retrieve(0)
    cache.stats()
    cache.expert_shard(0, 1)
    cache.length()
    assert snapshot(cache) == before
    cache.attend(0, random_q(model, 1, rng))
    after = snapshot(cache)
    for state in (before, after):
        del state["stats"]["reads"]
    assert after == before


def test_update_labels_but_does_not_seal_yet():
    """An attend after update sees the raw tokens, and a budget the attention that they receive."""
    model = model_config(num_layers=1)
    cache = PiKVCache(model, runtime_config("int4"))
    k, v = random_kv(model, 40, generator(4))
    cache.update(0, range(40), k, v, expert_ids=torch.full((40, model.topk), 3))
    assert torch.equal(cache.retrieve(0).k, k)
    cache.update(0, 40, k[0], v[0])
    assert set(_labels(cache, 0)) == {3}
    assert not torch.equal(cache.retrieve(0).k[:40], k)
