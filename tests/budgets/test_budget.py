"""Budgets: one suite of promises for every policy. The budget is respected at every moment, sinks and window stay,
demoted blocks lose nothing, dropped ones exactly what stats says, and the same input gives the same result.

What a layer holds on the device is at most its budget, plus block_size - 1 tokens that have left the window and do not
fill a block yet, plus the tokens of an append that have not been sealed: those of one step, which its own attention
reads raw.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from dense import (
    assert_pools_free,
    attend_retrieved,
    forward,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
    step,
)

from pikv_megatron import ConfigError, PiKVCache, Segment, Step
from pikv_megatron.budgets.budget import allowed_blocks, layer_budgets, least_important

TIERS = [{"kind": "device"}, {"kind": "host"}]
FLOOR = 2 + 6  # sinks + window of the runtime below
BUDGETS: dict[str, dict[str, Any]] = {
    "uniform": {"policy": "uniform", "first_layer_tokens": 22},
    "uniform total": {"policy": "uniform", "total_tokens": 50},
    "pyramid": {"policy": "pyramid", "first_layer_tokens": 25, "step": 7},
    "pyramid total": {"policy": "pyramid", "total_tokens": 60},
    "pyramid total step": {"policy": "pyramid", "total_tokens": 47, "step": 5},
    "no block at all": {"policy": "uniform", "first_layer_tokens": FLOOR + 3},
    "sinks and window alone": {"policy": "uniform", "first_layer_tokens": FLOOR},
}


@pytest.fixture(params=BUDGETS)
def budget(request):
    return BUDGETS[request.param]


@pytest.fixture(params=["drop", "demote"])
def over(request):
    return request.param


def _cache(budget, over, codec="none", **changes):
    changes = {"tiers": TIERS if over == "demote" else TIERS[:1], **changes}
    return PiKVCache(
        model_config(num_layers=3), runtime_config(codec, budget={**budget, "over_budget": over}, **changes)
    )


def _device_tokens(cache, layer_id, request_id=0):
    state = cache._requests[request_id].layers[layer_id]
    return state.window.tokens + len(state.tables[0]) * cache.runtime.block_size


def _importance(cache, table):
    """Of a table's blocks: [blocks, block_size]."""
    return cache.importance.tensor[table.row_tensor]


def _chunks(seed, total=150):
    """A prompt in chunks, then mostly single tokens."""
    chance, chunks = random.Random(seed), []
    while sum(chunks) < total:
        chunks.append(chance.choice([1, 1, 1, 1, 2, 4, 5, 40]))
    return chunks


def test_the_budget_holds_at_every_moment(budget, over):
    cache = _cache(budget, over)
    allowed, size = layer_budgets(cache.model, cache.runtime), cache.runtime.block_size
    rng, reached = generator(1), [0, 0, 0]
    for tokens in _chunks(1):
        k, v = random_kv(cache.model, tokens, rng)
        for layer_id in range(3):
            cache.append(layer_id, k, v)
            assert _device_tokens(cache, layer_id) <= allowed[layer_id] + size - 1 + tokens
            cache.attend(layer_id, random_q(cache.model, tokens, rng))
            cache.observe_routing(layer_id, *random_routing(cache.model, tokens, rng))
            held = _device_tokens(cache, layer_id)
            assert held <= allowed[layer_id] + size - 1
            reached[layer_id] = max(reached[layer_id], held)
    for layer_id in range(3):  # and it is used, up to a block
        assert reached[layer_id] > allowed[layer_id] - size
    cache.release(0)
    assert_pools_free(cache)


def test_the_budget_holds_where_nobody_asks_or_tells(budget, over):
    """Tokens are appended, never attended to or labelled: an append seals what the one before it left behind."""
    cache = _cache(budget, over)
    allowed, size = layer_budgets(cache.model, cache.runtime), cache.runtime.block_size
    rng, length = generator(12), 0
    for tokens in (4, 9, 9, 9, *_chunks(12)):
        cache.update(2, range(length, length + tokens), *random_kv(cache.model, tokens, rng))
        length += tokens
        assert _device_tokens(cache, 2) <= allowed[2] + size - 1 + tokens
        assert len(cache._requests[0].layers[2].tables[0]) <= allowed_blocks(cache.model, cache.runtime)[2]
    assert cache.length(2) == length
    cache.release(0)
    assert_pools_free(cache)


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_sinks_and_window_stay(budget, over, codec):
    cache = _cache(budget, over, codec)
    rng, length = generator(2), 0
    everything_k: list[torch.Tensor] = []
    for tokens in _chunks(2):
        k, v = random_kv(cache.model, tokens, rng)
        step(cache, k, v, rng)
        everything_k.append(k)
        length += tokens
        keys = torch.cat(everything_k)
        for layer_id in range(3):
            held = cache.retrieve(layer_id)
            positions = held.positions.tolist()
            kept = [*range(min(2, length)), *range(max(0, length - 6), length)]
            assert set(kept) <= set(positions)
            assert positions == sorted(set(positions))
            raw = [positions.index(p) for p in kept]
            assert torch.equal(held.k[raw], keys[kept])  # in full precision


def test_demoting_loses_nothing(budget):
    """Exact attention over both tiers equals dense attention over everything that was ever appended."""
    cache = _cache(budget, "demote")
    rng, ks, vs = generator(3), [], []
    for tokens in _chunks(3):
        k, v = random_kv(cache.model, tokens, rng)
        step(cache, k, v, rng)
        ks.append(k)
        vs.append(v)
    length = sum(len(k) for k in ks)
    for layer_id in range(3):
        held = cache.retrieve(layer_id)
        assert held.positions.tolist() == list(range(length))
        assert torch.equal(held.k, torch.cat(ks))
        assert torch.equal(held.v, torch.cat(vs))
    q = random_q(cache.model, 1, rng)
    for layer_id in range(3):
        out, lse = attend_retrieved(cache, layer_id, q)
        got = cache.attend(layer_id, q)
        torch.testing.assert_close(got[0].double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-5)
    stats = cache.stats()
    assert stats["blocks_dropped"] == 0
    assert stats["blocks_demoted"] == stats["tiers"]["host"]["blocks_used"] > 0


@pytest.mark.parametrize("budget", [{"policy": "uniform", "first_layer_tokens": FLOOR + 8}, BUDGETS["pyramid"]])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_blocks_that_are_sealed_together_do_not_get_mixed_up(order, budget):
    """In one step: a block that takes another's place, some that find room, some that have no place on the device."""
    cache = _cache(budget, "demote")
    rng, held = generator(3), dict[int, list[tuple[torch.Tensor, torch.Tensor]]]()
    for tokens in ({order[0]: 40}, {order[1]: 12}, {order[2]: 8}, *[dict.fromkeys(range(3), 1)] * 5):
        with cache.begin(
            Step(tuple(Segment(r, sum(len(k) for k, _ in held.get(r, ())), n) for r, n in tokens.items()))
        ) as active:
            k, v = random_kv(cache.model, sum(tokens.values()), rng)
            for layer_id in range(3):
                active.append(layer_id, k, v)
                active.attend(layer_id, random_q(cache.model, len(k), rng))
            for request, kv in zip(
                tokens, zip(*(x.split([*tokens.values()]) for x in (k, v)), strict=True), strict=True
            ):
                held.setdefault(request, []).append(kv)
    for request, layer_id in itertools.product(range(3), repeat=2):
        for got, appended in zip(cache.retrieve(layer_id, request), zip(*held[request], strict=True), strict=False):
            assert torch.equal(got, torch.cat(appended))


def test_dropping_loses_exactly_what_stats_says(budget):
    cache = _cache(budget, "drop")
    rng, ks, vs = generator(4), [], []
    for tokens in _chunks(4):
        k, v = random_kv(cache.model, tokens, rng)
        step(cache, k, v, rng)
        ks.append(k)
        vs.append(v)
        keys, values = torch.cat(ks), torch.cat(vs)
        lost = 0
        for layer_id in range(3):
            held = cache.retrieve(layer_id)
            lost += len(keys) - len(held.positions)
            assert torch.equal(held.k, keys[held.positions])  # what is left is what it was
            assert torch.equal(held.v, values[held.positions])
        assert cache.stats()["blocks_dropped"] * cache.runtime.block_size == lost
    assert lost > 0


def test_queries_of_a_prompt_that_was_dropped_see_what_is_left(budget):
    """The host asks late, after routing and sealing: attention is over what is left, causal by position."""
    cache = _cache(budget, "drop")
    rng = generator(5)
    k, v = random_kv(cache.model, 60, rng)
    for layer_id in range(3):
        cache.append(layer_id, k, v)
        cache.observe_routing(layer_id, *random_routing(cache.model, 60, rng))
        q = random_q(cache.model, 60, rng)
        out, lse = attend_retrieved(cache, layer_id, q)
        got = cache.attend(layer_id, q)
        torch.testing.assert_close(got[0].double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=1e-5)


def test_the_same_input_gives_the_same_cache(budget, over):
    def run():
        cache, rng = _cache(budget, over, "int4"), generator(6)
        for tokens in _chunks(6):
            step(cache, *random_kv(cache.model, tokens, rng), rng)
        return snapshot(cache)

    assert run() == run()


def test_requests_have_a_budget_each(over):
    """What one request does leaves the other as it was, block for block."""
    budget = BUDGETS["pyramid"]
    alone, together = _cache(budget, over), _cache(budget, over)
    noise = generator(8)
    mine, again = generator(7), generator(7)
    for tokens in _chunks(7):
        step(alone, *random_kv(alone.model, tokens, mine), mine)
        step(together, *random_kv(alone.model, 3, noise), noise, request_id=1)
        step(together, *random_kv(alone.model, tokens, again), again)
    for layer_id in range(3):
        for a, b in zip(alone.retrieve(layer_id), together.retrieve(layer_id), strict=True):
            assert torch.equal(a, b)


def test_the_least_important_block_leaves():
    """One layer, room for 3 blocks; every query looks at the tokens of two blocks, which stay, whatever their age."""
    model = model_config(num_layers=1, num_attention_heads=1, num_query_groups=1, num_experts=0)
    budget = {"policy": "uniform", "first_layer_tokens": FLOOR + 12, "over_budget": "drop"}
    cache, rng = PiKVCache(model, runtime_config(budget=budget)), generator(9)
    wanted = [*range(10, 14), *range(42, 46)]  # blocks are positions 2-5, 6-9, 10-13, ...
    for position in range(80):
        k, v = random_kv(model, 1, rng)
        k = k * 0.01
        k[..., 0] = 3.0 if position in wanted else 0.0
        q = torch.zeros(1, 1, 8)
        q[..., 0] = 10.0
        cache.append(0, k, v)
        cache.attend(0, q)
    positions = set(cache.retrieve(0).positions.tolist())
    assert set(wanted) <= positions
    assert len(positions) <= FLOOR + 12 + 3


@pytest.mark.parametrize("chunk", [60, 20, 7])
def test_the_prompts_last_queries_say_what_stays(chunk):
    """Prefill: the needle is early in the prompt, and only the last queries look at it."""
    model = model_config(num_layers=1, num_attention_heads=2, num_query_groups=1, num_experts=0)
    budget = {"policy": "uniform", "first_layer_tokens": FLOOR + 8, "over_budget": "drop", "observation_window": 5}
    cache, rng = PiKVCache(model, runtime_config(budget=budget)), generator(10)
    k, v = random_kv(model, 60, rng)
    k *= 0.01
    k[20] = 0.0
    k[20, :, 0] = 5.0
    q = torch.zeros(60, 2, 8)
    q[[i for i in range(60) if i % chunk > chunk - 6 or i == 59], :, 0] = 10.0
    for first in range(0, 60, chunk):
        cache.append(0, k[first : first + chunk], v[first : first + chunk])
        cache.attend(0, q[first : first + chunk])
    assert {18, 19, 20, 21} <= set(cache.retrieve(0).positions.tolist())


@pytest.mark.parametrize("chunks", [(40, 1, 1, 20, *[1] * 18), (40, 2, *[5] * 8)], ids=["decode", "drafts"])
@pytest.mark.parametrize("tokens_held", [200, 24], ids=["all on the device", "most on the host"])
def test_importance_is_the_attention_received(tokens_held, chunks):
    """I_t summed over the queries of prefill's observation window and of decode, from float64."""
    model = model_config(num_layers=1, num_experts=0)
    budget = {"policy": "uniform", "first_layer_tokens": tokens_held, "observation_window": 5}
    cache, rng = PiKVCache(model, runtime_config(budget=budget, tiers=TIERS)), generator(11)
    expected = torch.zeros(sum(chunks), dtype=torch.float64)
    ks = torch.zeros(0, 2, 8)
    for tokens in chunks:
        k, v = random_kv(model, tokens, rng)
        ks = torch.cat([ks, k])
        q = random_q(model, tokens, rng)
        cache.append(0, k, v)
        cache.attend(0, q)
        seen = min(tokens, 5)
        keys = ks.double().repeat_interleave(2, 1)
        logits = torch.einsum("thd,khd->thk", q[-seen:].double(), keys) * model.scale
        newest = torch.arange(len(ks) - seen, len(ks))
        hidden = torch.arange(len(ks)) > newest.unsqueeze(1)
        expected[: len(ks)] += logits.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1).sum((0, 1))
    state = cache._requests[0].layers[0]
    window, size = state.window.read(), cache.runtime.block_size
    sealed = torch.zeros(state.sealed_end - 2)
    for table in state.tables:
        for start, mine in zip(table.pool.start[table.tensor], _importance(cache, table), strict=True):
            sealed[start - 2 : start - 2 + size] = mine
    assert len(sealed) > 60
    assert (len(state.tables[1]) > 10) == (tokens_held == 24)
    got = torch.cat([window.importance[:2], sealed, window.importance[2:]])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_importance_of_queries_that_come_after_their_tokens_were_sealed():
    """Routing first, attention then: the queries' own tokens are in blocks; what they look at counts all the same."""
    late, usual = (_cache({"policy": "uniform", "first_layer_tokens": 200}, "demote") for _ in "ab")
    rng = generator(4)
    (k, v), q = random_kv(late.model, 40, rng), random_q(late.model, 40, rng)
    routing = random_routing(late.model, 40, rng)
    for cache in (late, usual):
        cache.append(0, k, v)
    late.observe_routing(0, *routing)
    outs = [cache.attend(0, q)[0] for cache in (late, usual)]
    usual.observe_routing(0, *routing)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    sealed = [_importance(cache, cache._requests[0].layers[0].tables[0]) for cache in (late, usual)]
    assert sealed[0].sum() > 1
    torch.testing.assert_close(*sealed, rtol=1e-4, atol=1e-5)


def test_a_query_whose_tokens_were_all_dropped_is_refused():
    budget = {"policy": "uniform", "first_layer_tokens": 6}
    cache, rng = _cache(budget, "drop", sinks=0), generator(4)
    cache.append(0, *random_kv(cache.model, 40, rng))
    cache.observe_routing(0, *random_routing(cache.model, 40, rng))
    with pytest.raises(ValueError, match="dropped all that one of these 40 queries may see; attend before"):
        cache.attend(0, random_q(cache.model, 40, rng))
    assert cache.attend(0, random_q(cache.model, 3, rng))[1].isfinite().all()


def test_a_query_of_which_nothing_is_left_is_refused():
    """Taken back to a token that the budget had dropped."""
    cache, rng = (
        _cache({"policy": "uniform", "first_layer_tokens": 1}, "drop", sinks=0, window=1, block_size=1),
        generator(4),
    )
    forward(cache, {0: 5}, rng)
    cache.crop(0, 3)
    with pytest.raises(ValueError, match="dropped all that one of these 1 queries may see"):
        cache.attend(0, random_q(cache.model, 1, rng))
    forward(cache, {0: 1}, rng)
    assert cache.retrieve(0).positions.tolist() == [3]


# ---- the formula


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
def test_arithmetic_pyramid(layers):
    model = model_config(num_layers=layers)
    runtime = runtime_config(budget={"policy": "pyramid", "first_layer_tokens": 500, "step": 9, "over_budget": "drop"})
    assert layer_budgets(model, runtime) == [500 - i * 9 for i in range(layers)]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("total_per_layer", [FLOOR, FLOOR + 1, 20, 1000, 12345])
@pytest.mark.parametrize("policy", ["uniform", "pyramid"])
def test_total_tokens_is_the_sum(layers, total_per_layer, policy):
    model, total = model_config(num_layers=layers), layers * total_per_layer
    runtime = runtime_config(budget={"policy": policy, "total_tokens": total, "over_budget": "drop"})
    tokens = layer_budgets(model, runtime)
    assert total - layers <= sum(tokens) <= total  # each layer's is cut to a whole number
    assert tokens == sorted(tokens, reverse=True)
    assert min(tokens) >= FLOOR
    if policy == "uniform":
        assert set(tokens) == {total_per_layer}
    elif layers > 1 and total_per_layer > 100:
        # PyramidKV: above the floor the last layer has 1/20 of the average, the first twice the average less that.
        average = total_per_layer - FLOOR
        assert tokens[-1] - FLOOR == pytest.approx(average / 20, abs=2)
        assert tokens[0] - FLOOR == pytest.approx(2 * average - average / 20, abs=2)
        steps = [a - b for a, b in itertools.pairwise(tokens)]
        assert max(steps) - min(steps) <= 1


def test_total_tokens_with_a_step():
    runtime = runtime_config(budget={"policy": "pyramid", "total_tokens": 300, "step": 10, "over_budget": "drop"})
    assert layer_budgets(model_config(num_layers=5), runtime) == [80, 70, 60, 50, 40]


def test_no_policy_no_budget():
    assert layer_budgets(model_config(), runtime_config()) is None


@pytest.mark.parametrize(
    ("budget", "layer"),
    [
        ({"policy": "uniform", "first_layer_tokens": FLOOR - 1}, 0),
        ({"policy": "uniform", "total_tokens": 3 * FLOOR - 1}, 0),
        ({"policy": "pyramid", "first_layer_tokens": FLOOR + 9, "step": 5}, 2),  # C_1 - (L - 1) d = floor - 1
        ({"policy": "pyramid", "total_tokens": 3 * FLOOR - 1}, 0),
        ({"policy": "pyramid", "total_tokens": 3 * FLOOR + 3, "step": 5}, 2),
    ],
)
def test_a_budget_below_sinks_and_window_is_refused(budget, layer):
    with pytest.raises(ConfigError, match=rf"budget \(.*\): layer {layer} would get -?\d+ tokens, .* {FLOOR}$"):
        _cache(budget, "drop")


def test_the_smallest_budgets_are_accepted():
    for budget in (
        {"policy": "pyramid", "first_layer_tokens": FLOOR + 10, "step": 5},
        {"policy": "pyramid", "total_tokens": 3 * FLOOR},
        {"policy": "uniform", "total_tokens": 3 * FLOOR + 2},
    ):
        assert min(layer_budgets(model_config(num_layers=3), _cache(budget, "drop").runtime)) == FLOOR


def test_blocks_that_fit():
    budget = {"policy": "pyramid", "first_layer_tokens": FLOOR + 8, "step": 2, "over_budget": "drop"}
    model = model_config(num_layers=5)
    assert allowed_blocks(model, runtime_config(budget=budget)) == [2, 1, 1, 0, 0]
    assert allowed_blocks(model, runtime_config()) is None


@pytest.mark.parametrize("over", ["drop", "demote"])
def test_memory_is_taken_for_the_budget_alone(over):
    """Pools have the blocks that layers may hold, not those of every token; the rest has its place on the host."""
    budget = {"policy": "pyramid", "first_layer_tokens": FLOOR + 8, "step": 3}
    cache, whole = _cache(budget, over, max_requests=2), PiKVCache(model_config(num_layers=3), runtime_config())
    per_layer = 512 // 4
    assert whole.tiers[0].num_blocks == 3 * per_layer
    assert cache.tiers[0].num_blocks == 2 * (2 + 1 + 0)
    assert cache.tiers[0].allocated_bytes < whole.tiers[0].allocated_bytes / 50
    if over == "demote":
        assert cache.tiers[1].num_blocks == 3 * per_layer - (2 + 1 + 0)
    rng, total = generator(2), cache.capacity_tokens
    assert total == 512
    for request_id, tokens in ((0, 400), (1, total - 400)):  # all of it fits, however it is divided
        for layer_id in range(3):
            cache.append(layer_id, *random_kv(cache.model, tokens, rng), request_id)
            cache.attend(layer_id, random_q(cache.model, tokens, rng), request_id)
            cache.observe_routing(layer_id, *random_routing(cache.model, tokens, rng), request_id)
    held = cache.stats()["tiers"]["device"]
    assert held["blocks_used"] == held["blocks_total"]


def test_capacity_is_what_the_smallest_tier_lets_in():
    budget = {"policy": "uniform", "first_layer_tokens": FLOOR + 8}  # two blocks of 4 tokens a layer
    block = _cache(budget, "demote").tiers[0].block_bytes

    def capacity(device, host, requests=3):
        tiers = [
            {"kind": "device", "bytes": device and device * block},
            {"kind": "host", "bytes": host and host * block},
        ]
        return _cache(budget, "demote", tiers=tiers, max_requests=requests).capacity_tokens

    assert capacity(None, None) == 512
    assert capacity(None, 3 * 10) == (10 + 2) * 4
    assert capacity(18, None) == 512  # three requests' two blocks in three layers
    assert capacity(17, None) == 5 * 4
    assert capacity(17, None, requests=2) == 512
    with pytest.raises(ConfigError, match=r"tiers\[0\].bytes: expected at least \d+ .*, got"):
        capacity(2, None)


def test_least_important_blocks():
    importance = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.5, 0.5], [2.0, 0.0], [0.0, 9.0], [1.2, 1.2]])
    assert least_important(importance, 3).tolist() == [2, 1, 3]  # the older of equals first
    assert least_important(importance, 5).tolist() == [2, 1, 3, 5, 0]  # what a block got in all, not its best token
    assert least_important(importance, 0).tolist() == []


def test_importance_after_selective_reads_is_near_the_exact_one():
    """It comes from the scores that selection has anyway; no further key is read for it."""
    kept = {}
    for mode in ("exact", "top_k"):
        cache = _cache({"policy": "uniform", "total_tokens": 400}, "demote", "int8", attention={"mode": mode})
        rng = generator(3)
        for _ in range(60):
            k, v = random_kv(cache.model, 1, rng)
            for layer_id in range(cache.model.num_layers):
                cache.append(layer_id, k, v)
                cache.attend(layer_id, random_q(cache.model, 1, rng))
                cache.observe_routing(layer_id, *random_routing(cache.model, 1, rng))
        kept[mode] = _importance(cache, cache._requests[0].layers[0].tables[0])
    assert len(kept["exact"]) > 2
    torch.testing.assert_close(kept["top_k"], kept["exact"], rtol=0.05, atol=0.01)
