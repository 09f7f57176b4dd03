"""Readers, of one request: what is read is what the method says, written down here a second time in float64 and with
loops; what is said about the rest is right. Several requests at once: `test_several_requests`.
"""

from __future__ import annotations

import math

import pytest
import torch
from dense import attend_retrieved, generator, model_config, random_kv, random_q, runtime_config, step
from one_request import OneRequest, read_one, source_of
from stored import Stored, dense_rows, random_store, rows_of, store

from pikv_megatron import PiKVCache, ops
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.reading.plane_error import plane_error
from pikv_megatron.reading.reader import Reading, Source, count_of

CODECS = ("none", "int8", "int4", "int2")
GROUPS, HEADS, DIM, SIZE, BLOCKS = 2, 3, 16, 8, 12
SCALE = DIM**-0.5
CONFIGS = {
    "top_k": AttentionConfig("top_k", read_fraction=0.25),
    "top_k pruned": AttentionConfig("top_k", read_fraction=0.1, prune_fraction=0.5),
    "quest": AttentionConfig("top_k", read_fraction=0.25, score="quest"),
    "mass": AttentionConfig("mass", epsilon=0.1),
    "mass certified": AttentionConfig("mass", epsilon=0.2, epsilon_by="certificate"),
}


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


def _source(held: Stored, block_ids: torch.Tensor | None = None, size: int = SIZE) -> Source:
    ids = torch.arange(len(held.k)) if block_ids is None else block_ids
    return source_of(held.keys, held.values, ids, size)


def _data(codec: str, seed: int = 0, strength: float = 3.0) -> tuple[Stored, torch.Tensor, torch.Tensor]:
    """Stored blocks, q [G, R, D] that looks at few tokens, and a raw lse [G, R] of the size of the rest."""
    held = random_store(BLOCKS, GROUPS, SIZE, DIM, DIM, codec, seed)
    rng = generator(seed + 100)
    q = strength * torch.randn(GROUPS, HEADS, DIM, generator=rng)
    return held, q, 2 * torch.randn(GROUPS, HEADS, generator=rng)


def _read(q, held, raw_lse, config) -> tuple[Reading, ops.Partial]:
    reading = read_one(q, [_source(held)], raw_lse, config, SCALE)
    return reading, ops.merge_partials(reading.partials)


def _logits(q, k) -> torch.Tensor:
    return torch.einsum("grd,gsd->grs", q.double(), k) * SCALE


def _scores(q, held) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[G, R, tokens] float64: coarse; the largest logits; the expected ones, nearer to the block's mean than coarse."""
    scores = OneRequest(ops).score_tokens(q, held.keys, torch.arange(len(held.k)), SCALE)
    coarse, radius, spread = (x.double() for x in scores)
    slope, variance = plane_error(held.keys.raw is not None, held.keys.hi_bits, held.keys.lo_bits, SIZE)
    mean = coarse.mean(-1, keepdim=True)
    expected = mean + slope * (coarse - mean) + variance * spread.unsqueeze(-1)
    largest = coarse + radius.unsqueeze(-1)
    return coarse.flatten(2), largest.flatten(2), torch.minimum(expected, largest).flatten(2)


def _ranked(coarse, raw_lse) -> torch.Tensor:
    """Tokens [G, tokens], best first: expected attention summed over the heads of the group."""
    everything = torch.logaddexp(torch.logsumexp(coarse, -1), raw_lse.double())
    share = (coarse - everything.unsqueeze(-1)).exp().sum(1)
    return share.argsort(dim=-1, descending=True, stable=True)


def _mask(order, counts) -> torch.Tensor:
    """[G, tokens] bool: the first counts[g] of order[g]."""
    read = torch.zeros(order.shape, dtype=torch.bool)
    for group, count in enumerate(counts):
        read[group, order[group, :count]] = True
    return read


def _assert_reads(partial, q, held, read, close=1e-5) -> None:
    """The partial is attention over exactly the tokens of read [G, tokens]."""
    k, v = rows_of(held, torch.arange(len(held.k)))
    out, lse = dense_rows(q, k, v, SCALE, read.unsqueeze(1).expand(-1, q.shape[1], -1))
    torch.testing.assert_close(partial.lse.double(), lse, rtol=close, atol=close)
    torch.testing.assert_close(partial.out.double(), out, rtol=close, atol=close)


def _odds(missed, read_lse):
    return torch.sigmoid(missed - read_lse)


@pytest.mark.parametrize("size", [8, 32, 128])
@pytest.mark.parametrize(("raw", "hi", "lo"), [(True, 2, 0), (False, 2, 0), (False, 2, 2), (False, 4, 4)])
def test_what_a_plane_tells_of_normal_and_of_uniform_channels(raw, hi, lo, size):
    """The figures that estimates count with, on other draws: slope and variance of the keys upon their plane."""
    slope, variance = plane_error(raw, hi, lo, size)
    rng = generator(5)
    for draw, close in ((torch.randn, 0.01), (torch.rand, 0.12)):
        x = draw(12800 // size, 2, size, 64, generator=rng)
        high, low, scale, zero = ops.quantize_block(x, hi, lo, True)
        plane = ops.dequantize_block(high, None, scale, zero, hi, lo, True)
        keys = x if raw else ops.dequantize_block(high, low, scale, zero, hi, lo, True)
        step = scale.double().unsqueeze(2)
        middle = zero.double().unsqueeze(2) + step * (2 ** (hi + lo) - 1) / 2
        off, plane_off = ((y - middle) / step for y in (keys, plane))
        measured = (off * plane_off).mean() / plane_off.square().mean()
        assert measured.item() == pytest.approx(slope, abs=close)
        if raw or lo:
            left = (off - measured * plane_off).square().mean() / ((1 if raw else 4**lo - 1) / 12)
            assert left.item() == pytest.approx(variance, abs=2 * close)


def test_counts():
    assert [count_of(f, 100) for f in (0.001, 0.01, 0.011, 0.125, 1.0)] == [1, 1, 2, 13, 100]
    assert [count_of(0.1, n) for n in (1, 10, 30, 70)] == [1, 1, 3, 7]  # not 8 for 0.1 * 70 = 7.000000000000001


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_top_k_reads_the_tokens_that_rank_highest(codec, fraction):
    held, q, raw_lse = _data(codec)
    config = AttentionConfig("top_k", read_fraction=fraction)
    reading, partial = _read(q, held, raw_lse, config)
    coarse, largest, expected = _scores(q, held)
    count = math.ceil(fraction * BLOCKS * SIZE)
    assert reading.tokens_read.tolist() == [count] * GROUPS
    read = _mask(_ranked(coarse, raw_lse), [count] * GROUPS)
    _assert_reads(partial, q, held, read)

    unread = ~read.unsqueeze(1).expand_as(coarse)
    read_lse = torch.logaddexp(partial.lse, raw_lse).double()
    for said, logits in ((reading.estimate, expected), (reading.certificate, largest)):
        rest = torch.logsumexp(logits.masked_fill(~unread, -torch.inf), -1)
        torch.testing.assert_close(said.double(), _odds(rest, read_lse), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.7])
def test_quest(fraction):
    """Quest by the book: per KV head, blocks by sum over its heads of sum_d max(q_d min_d, q_d max_d), of true keys.

    The keys are multiples of three steps of float16, so that codes of two bits hold their least and largest exactly.
    """
    rng = generator(1)
    k = 3 * torch.randint(-60, 61, (BLOCKS, GROUPS, SIZE, DIM), generator=rng).float() / 64
    v = torch.randn(BLOCKS, GROUPS, SIZE, DIM, generator=rng)
    held, q = store(k, v, "none"), torch.randn(GROUPS, HEADS, DIM, generator=rng)
    raw_lse = torch.zeros(GROUPS, HEADS)
    read = torch.zeros(GROUPS, BLOCKS * SIZE, dtype=torch.bool)
    count = math.ceil(fraction * BLOCKS)
    for group in range(GROUPS):
        scores = []
        for block in range(BLOCKS):
            keys, score = k[block, group], 0.0
            for head in range(HEADS):
                for d in range(DIM):
                    x = q[group, head, d].item()
                    score += max(x * keys[:, d].min().item(), x * keys[:, d].max().item())
            scores.append(score)
        for block in sorted(range(BLOCKS), key=lambda b: -scores[b])[:count]:
            read[group, block * SIZE : (block + 1) * SIZE] = True
    reading, partial = _read(q, held, raw_lse, AttentionConfig("top_k", read_fraction=fraction, score="quest"))
    _assert_reads(partial, q, held, read)
    assert reading.tokens_read.tolist() == [count * SIZE] * GROUPS


def _block_scores(q, held) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bound, centre, variance of a token's logit in its block's box: [G, R, blocks] float64."""
    bits = held.keys.hi_bits + held.keys.lo_bits
    lower = held.keys.zero.double()
    upper = lower + held.keys.scale.double() * (2**bits - 1)
    at_lower, at_upper = (q.double().unsqueeze(2) * x.transpose(0, 1).unsqueeze(1) for x in (lower, upper))
    bound = torch.maximum(at_lower, at_upper).sum(-1) * SCALE
    centre = (at_lower + at_upper).sum(-1) / 2 * SCALE
    variance = ((at_upper - at_lower) ** 2).sum(-1) / 12 * SCALE**2
    return bound, centre, variance


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_pruning_keeps_the_blocks_of_the_better_score(codec, fraction):
    """Half the bound plus half the centre's logit, softmax over blocks, summed over the group; then tokens by rank."""
    held, q, raw_lse = _data(codec, seed=2)
    config = AttentionConfig("top_k", read_fraction=0.06, prune_fraction=fraction)
    reading, partial = _read(q, held, raw_lse, config)
    bound, centre, variance = _block_scores(q, held)
    kept = math.ceil(fraction * BLOCKS)
    best = (0.5 * (bound + centre)).softmax(-1).sum(1).topk(kept, -1).indices
    pruned = torch.ones(GROUPS, BLOCKS, dtype=torch.bool).scatter_(1, best, False)

    coarse, largest, expected = _scores(q, held)
    in_kept = ~pruned.repeat_interleave(SIZE, 1)
    order = _ranked(coarse.masked_fill(~in_kept.unsqueeze(1), -torch.inf), raw_lse)
    count = min(math.ceil(0.06 * BLOCKS * SIZE), kept * SIZE)
    read = _mask(order, [count] * GROUPS)
    _assert_reads(partial, q, held, read)

    ranked = (in_kept & ~read).unsqueeze(1)
    read_lse = torch.logaddexp(partial.lse, raw_lse).double()
    for said, tokens, blocks in (
        (reading.estimate, expected, torch.minimum(centre + variance / 2, bound)),
        (reading.certificate, largest, bound),
    ):
        blocks = (blocks + math.log(SIZE)).masked_fill(~pruned.unsqueeze(1), -torch.inf)
        rest = torch.cat([tokens.masked_fill(~ranked, -torch.inf), blocks], -1).logsumexp(-1)
        torch.testing.assert_close(said.double(), _odds(rest, read_lse), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("by", ["estimate", "certificate"])
@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.01])
def test_mass_stops_where_epsilon_is_met(codec, epsilon, by):
    """Token after token in float64: reading stops when no head of the group misses more than epsilon, not later."""
    held, q, raw_lse = _data(codec, seed=3, strength=1.5)
    reading, partial = _read(q, held, raw_lse, AttentionConfig("mass", epsilon=epsilon, epsilon_by=by))
    coarse, largest, expected = _scores(q, held)
    upper = largest if by == "certificate" else expected
    true = _logits(q, rows_of(held, torch.arange(BLOCKS))[0])
    order, counts = _ranked(coarse, raw_lse), []
    for group in range(GROUPS):
        for count in range(BLOCKS * SIZE + 1):
            first, rest = order[group, :count], order[group, count:]
            read = torch.cat([true[group, :, first], raw_lse[group].double().unsqueeze(-1)], -1).logsumexp(-1)
            missed = _odds(upper[group, :, rest].logsumexp(-1), read) if len(rest) else torch.zeros(HEADS)
            if (missed <= epsilon).all():
                break
        counts.append(count)
    assert reading.tokens_read.tolist() == counts
    assert max(counts) > 0
    _assert_reads(partial, q, held, _mask(order, counts))
    said = reading.certificate if by == "certificate" else reading.estimate
    assert (said <= epsilon * (1 + 1e-4)).all()


def test_a_smaller_epsilon_reads_more(codec):
    held, q, raw_lse = _data(codec, seed=4)
    counts = [
        _read(q, held, raw_lse, AttentionConfig("mass", epsilon=e))[0].tokens_read.sum().item()
        for e in (0.9, 0.3, 0.1, 0.03, 0.01, 0.001)
    ]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_heads_that_look_at_their_window_read_nothing():
    held, q, _ = _data("int8")
    everything = torch.full((GROUPS, HEADS), 1e4)
    reading, partial = _read(q, held, everything, AttentionConfig("mass", epsilon=0.01))
    assert reading.tokens_read.tolist() == [0] * GROUPS
    assert (partial.lse == -torch.inf).all()
    assert (reading.estimate == 0).all()
    assert (reading.certificate == 0).all()


def _unread(q, held, raw_lse, config) -> tuple[Reading, torch.Tensor]:
    """The reading, and who was not read [G, R, tokens]: each token's value is its own unit vector."""
    tokens = BLOCKS * SIZE
    unit = torch.eye(tokens).view(BLOCKS, 1, SIZE, tokens).expand(-1, GROUPS, -1, -1)
    source = source_of(held.keys, ops.Values(unit, None, None, None, 0), torch.arange(BLOCKS), SIZE)
    reading = read_one(q, [source], raw_lse, config, SCALE)
    return reading, reading.partials[0].out == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_true_missed_mass_is_never_above_the_certificate(codec, name):
    for seed in range(20):
        held, q, raw_lse = _data(codec, seed, strength=(seed % 5 + 1) * 1.5)
        reading, unread = _unread(q, held, raw_lse, CONFIGS[name])
        every = torch.cat([_logits(q, rows_of(held, torch.arange(BLOCKS))[0]), raw_lse.double().unsqueeze(-1)], -1)
        true = every.softmax(-1)[..., :-1].mul(unread).sum(-1)
        assert unread.any()
        assert (true <= reading.certificate * (1 + 1e-5)).all()
        assert (reading.estimate <= reading.certificate * (1 + 1e-5)).all()
        assert (reading.certificate <= 1).all()


def _needle(codec, seed):
    """One token per KV head at a random place whose key all of its query heads look for."""
    rng = generator(seed)
    k = torch.randn(BLOCKS, GROUPS, SIZE, DIM, generator=rng)
    v = torch.zeros(BLOCKS, GROUPS, SIZE, DIM)
    direction = torch.nn.functional.normalize(torch.randn(GROUPS, DIM, generator=rng), dim=-1)
    places = torch.randint(0, BLOCKS * SIZE, (GROUPS,), generator=rng)
    for group, place in enumerate(places.tolist()):
        k[place // SIZE, group, place % SIZE] = 6 * direction[group]
        v[place // SIZE, group, place % SIZE] = 1.0
    return store(k, v, codec), 8 * direction.unsqueeze(1).expand(-1, HEADS, -1).contiguous()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_planted_needle_is_read(codec, name):
    """The needle's value is one, all others zero: the output says whether it was read."""
    for seed in range(20):
        held, q = _needle(codec, seed)
        reading, partial = _read(q, held, torch.zeros(GROUPS, HEADS), CONFIGS[name])
        assert (partial.out > 0.9).all(), f"seed {seed}"
        assert (reading.tokens_read < BLOCKS * SIZE).all()


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("quest", "top_k pruned")])
def test_several_tiers_give_the_same_as_one(codec, name):
    """The same blocks in two pools, in another order. (Pruning is per tier, so it is left out.)"""
    held, q, raw_lse = _data(codec, seed=6)
    order = torch.randperm(BLOCKS, generator=generator(7))
    parts = [_source(held, order[:5]), _source(held, order[5:])]
    one, merged = _read(q, held, raw_lse, CONFIGS[name])
    two = read_one(q, parts, raw_lse, CONFIGS[name], SCALE)
    assert len(two.partials) == 2
    together = ops.merge_partials(two.partials)
    for mine, theirs in ((merged, together), (one[1:4], two[1:4])):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


def test_a_tier_where_nothing_is_chosen():
    held, q = _needle("int8", 3)
    raw_lse = torch.zeros(GROUPS, HEADS)
    cold = random_store(4, GROUPS, SIZE, DIM, DIM, "int8", 9)
    cold = Stored(cold.keys._replace(zero=cold.keys.zero - 100 * q[:, 0].sign().half()), cold.values, cold.k, cold.v)
    config = AttentionConfig("top_k", read_fraction=0.02)
    reading = read_one(q, [_source(held), _source(cold)], raw_lse, config, SCALE)
    assert (reading.partials[1].lse == -torch.inf).all()
    assert (reading.partials[1].out == 0).all()
    assert (ops.merge_partials(reading.partials).out > 0.9).all()


# ---- in the cache


def _filled(codec, attention, tokens=70, seed=0, **changes):
    model = model_config(v_head_dim=12)
    cache, rng = PiKVCache(model, runtime_config(codec, attention=attention, **changes)), generator(seed)
    for count in (tokens - 10, *[1] * 10):
        step(cache, *random_kv(model, count, rng), rng)
    return cache, rng


@pytest.mark.parametrize(
    "attention",
    [
        {"mode": "top_k", "read_fraction": 1.0},
        {"mode": "top_k", "read_fraction": 1.0, "score": "quest"},
        {"mode": "mass", "epsilon": 1e-12, "epsilon_by": "certificate"},
    ],
)
@pytest.mark.parametrize("tiers", [1, 2])
def test_reading_everything_equals_exact_mode(codec, attention, tiers):
    changes = {}
    if tiers == 2:
        budget = {"policy": "uniform", "first_layer_tokens": 25}
        changes = {"budget": budget, "tiers": [{"kind": "device"}, {"kind": "host"}]}
    selective, rng = _filled(codec, attention, **changes)
    exact, _ = _filled(codec, {"mode": "exact"}, **changes)
    q = random_q(exact.model, 1, rng)
    for layer_id in range(2):
        got, expected = selective.attend_measured(layer_id, q), exact.attend_measured(layer_id, q)
        torch.testing.assert_close(got.out, expected.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse, expected.lse, rtol=1e-5, atol=1e-5)
        assert got.missed_certificate.max() < 1e-9
        assert (expected.missed_certificate == 0).all()


@pytest.mark.parametrize("attention", [{"mode": "top_k", "read_fraction": 0.05}, {"mode": "mass", "epsilon": 0.9}])
def test_several_queries_read_everything(codec, attention):
    cache, rng = _filled(codec, attention)
    k, v = random_kv(cache.model, 3, rng)
    cache.append(0, k, v)
    q = random_q(cache.model, 3, rng)
    out, lse = attend_retrieved(cache, 0, q)
    got = cache.attend_measured(0, q)
    torch.testing.assert_close(got.out.double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert (got.missed_estimate == 0).all()


def test_stats_gather_what_was_read_and_missed():
    cache, rng = _filled("int8", {"mode": "top_k", "read_fraction": 0.25})
    before = cache.stats()["reads"]
    assert before["selective_reads"] > 0
    fresh, _ = _filled("int8", {"mode": "top_k", "read_fraction": 0.25}, tokens=11)
    assert fresh.stats()["reads"]["selective_reads"] == 0
    assert fresh.stats()["reads"]["missed_estimate_mean"] is None
    results = []
    for _ in range(3):
        q = random_q(cache.model, 1, rng)
        results += [cache.attend_measured(layer_id, q) for layer_id in range(2)]
    after = cache.stats()["reads"]
    calls = before["selective_reads"] + 6
    assert after["selective_reads"] == calls
    for name in ("missed_estimate", "missed_certificate"):
        new = torch.stack([getattr(r, name) for r in results]).double()
        total = before[f"{name}_mean"] * before["selective_reads"] + new.mean((1, 2)).sum().item()
        assert after[f"{name}_mean"] == pytest.approx(total / calls, rel=1e-6)
        assert after[f"{name}_max"] == pytest.approx(max(before[f"{name}_max"], new.max().item()), rel=1e-6)
    sealed = [
        sum(len(table) for table in state.tables) * cache.runtime.block_size for state in cache._requests[0].layers
    ]
    share = sum(math.ceil(0.25 * n) / n for n in sealed) / len(sealed)
    total = before["share_read_mean"] * before["selective_reads"] + 6 * share
    assert after["share_read_mean"] == pytest.approx(total / calls, rel=1e-9)
