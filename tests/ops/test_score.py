"""block_bounds, score_blocks, score_tokens and the three ops of importance: what is called a bound is one, in float64
and whatever the scales; what is called an estimate is close.
"""

from __future__ import annotations

import pytest
import torch
from one_request import OneRequest
from stored import dense_rows, random_store, rows_of, store

from pikv_megatron.ops import reference

CODECS = ("none", "int8", "int4", "int2")
SCALE = 16**-0.5


def _hard_keys() -> dict[str, torch.Tensor]:
    """Keys [12, 2, 8, 16] whose logits are small, large, far from zero, or exactly at their bound."""
    rng = torch.Generator().manual_seed(3)
    normal = torch.randn(12, 2, 8, 16, generator=rng)
    offset = torch.randn(12, 2, 1, 16, generator=rng)
    corner = torch.randn(12, 2, 1, 16, generator=rng).sign() * torch.rand(12, 2, 8, 1, generator=rng)
    return {
        "normal": normal,
        "tiny": normal * 1e-6,
        "large": (normal * 2e4).clamp(-65504, 65504),
        "far": (0.01 * normal + 20000 * offset).clamp(-65504, 65504),
        "equal": offset.expand_as(normal).clone(),  # every token reaches the block's bound
        "far and equal": (2e4 * offset).clamp(-65504, 65504).half().float().expand_as(normal).clone(),
        "corner": corner,  # all channels are extreme in the same token
    }


KEYS = _hard_keys()
QUERIES = {"usual": 1.0, "huge": 1e4, "tiny": 1e-4}


@pytest.fixture(params=KEYS)
def keys(request):
    return KEYS[request.param]


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


@pytest.fixture(params=QUERIES)
def q(request):
    """[2, 3, 16]; the first row points at the corners of the boxes."""
    rng = torch.Generator().manual_seed(4)
    q = torch.randn(2, 3, 16, generator=rng)
    q[:, 0] = q[:, 0].sign()
    return q * QUERIES[request.param]


def _true_logits(q, k):
    """[G, R, blocks, B] float64."""
    return torch.einsum("grd,ngbd->grnb", q.double(), k) * SCALE


def test_bounds_contain_decoded_and_raw_keys(ops, keys, codec):
    held = store(keys, keys, codec)
    lower, upper = ops.block_bounds(held.keys.scale, held.keys.zero, held.keys.hi_bits + held.keys.lo_bits)
    assert lower.dtype == upper.dtype == torch.float32
    for k in (keys.double(), held.k):
        assert (k.amin(2) >= lower.double()).all()
        assert (k.amax(2) <= upper.double()).all()


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_bounds_contain_ranges_that_a_rounded_division_would_miss(ops, codec):
    """Ranges just above a whole number of steps, from a zero that makes float32 round their width down to it."""
    levels = {"none": 3, "int8": 255, "int4": 15}[codec]
    steps = 1 + torch.arange(1024) / 1024
    least = -(levels * steps).half().float()  # a float16 number, so it is the block's zero
    most = least.double() + levels * steps.double() + 2.0**-25 * levels
    ends = torch.stack([least, most.float()], 1).view(1024, 1, 2, 1)
    assert torch.equal(most.float().double(), most)
    keys = ends.expand(-1, -1, -1, 4).contiguous()
    held = store(keys, keys, codec)
    lower, upper = ops.block_bounds(held.keys.scale, held.keys.zero, held.keys.hi_bits + held.keys.lo_bits)
    assert (keys.amin(2) >= lower).all()
    assert (keys.amax(2) <= upper).all()


def test_bounds_are_as_tight_as_the_codes(ops, codec):
    rng = torch.Generator().manual_seed(5)
    keys = torch.randn(2000, 1, 8, 16, generator=rng)
    held = store(keys, keys, codec)
    lower, upper = ops.block_bounds(held.keys.scale, held.keys.zero, held.keys.hi_bits + held.keys.lo_bits)
    assert keys.abs().max() < 8
    assert (keys.amin(2) - lower).max() <= 2**-8  # float16's step below 8
    assert ((upper - keys.amax(2)) / (keys.amax(2) - lower)).max() <= 2**-10  # of the scale's own float16 step


def test_block_score_is_a_bound(ops, keys, codec, q):
    held = store(keys, keys, codec)
    bound, centre, _ = ops.score_blocks(q, held.keys, torch.arange(len(keys)), SCALE)
    true = _true_logits(q, held.k).amax(-1)
    assert (true <= bound.double()).all(), f"exceeded by {(true - bound).max()}"
    assert (centre <= bound).all()


def test_block_score_is_quests_formula(ops, codec):
    held = random_store(5, 2, 8, 16, 16, codec)
    q = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(6))
    lower, upper = ops.block_bounds(held.keys.scale, held.keys.zero, held.keys.hi_bits + held.keys.lo_bits)
    ids = [4, 0, 2, 1, 3]
    bound, centre, spread = ops.score_blocks(q, held.keys, torch.tensor(ids), 0.3)
    for group, row, place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        query, low, high = q[group, row], lower[ids[place], group], upper[ids[place], group]
        at_lower, at_upper = query * low, query * high
        reach, middle = torch.maximum(at_lower, at_upper).sum().item(), (at_lower + at_upper).sum().item() / 2
        assert bound[group, row, place].item() == pytest.approx(0.3 * reach, abs=1e-3)
        assert centre[group, row, place].item() == pytest.approx(0.3 * middle, abs=1e-5)
        variance = (0.3**2 * query**2 * (high - low) ** 2 / 12).sum().item()
        assert spread[group, row, place].item() == pytest.approx(variance / 2, rel=1e-4)


def test_token_radius_is_never_exceeded(ops, keys, codec, q):
    held = store(keys, keys, codec)
    scores = ops.score_tokens(q, held.keys, torch.arange(len(keys)), SCALE)
    off = (_true_logits(q, held.k) - scores.coarse.double()).abs()
    radius = scores.radius.double().unsqueeze(-1)
    assert (off <= radius).all(), f"exceeded by {(off - radius).max()}"


def test_radius_and_spread_are_the_references(ops, keys, codec, q):
    """What they add for rounding is too little for any key to miss it; no spread exceeds its radius."""
    held = store(keys, keys, codec)
    ids = torch.arange(len(keys))
    mine, truth = (lib.score_tokens(q, held.keys, ids, SCALE) for lib in (ops, OneRequest(reference)))
    torch.testing.assert_close(mine.radius, truth.radius, rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.spread, truth.spread, rtol=1e-5, atol=0)
    assert (mine.spread <= mine.radius).all()


@pytest.mark.parametrize(("codec", "steps"), [("none", 0.5), ("int8", 7.5), ("int4", 1.5), ("int2", 0.0)])
def test_token_radius_is_no_larger_than_the_unread_bits(ops, codec, steps):
    held = random_store(6, 2, 32, 16, 16, codec)
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(7))
    scores = ops.score_tokens(q, held.keys, torch.arange(6), SCALE)
    reach = torch.einsum("grd,ngd->grn", q.double().abs(), held.keys.scale.double()) * steps * SCALE
    size = torch.einsum("grd,ngd->grn", q.double().abs(), held.k.abs().amax(2)) * SCALE
    assert (scores.radius <= reach * 1.0001 + size * 1e-4).all()


def test_coarse_is_the_logit_of_the_high_plane(ops, codec):
    held = random_store(6, 2, 16, 16, 16, codec)
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(8))
    hi, lo = held.keys.hi_bits, held.keys.lo_bits
    high_only = (held.keys.high, None, held.keys.scale, held.keys.zero, hi, lo)
    coarse_keys = ops.dequantize_block(*high_only, per_channel=True).double()
    scores = ops.score_tokens(q, held.keys, torch.arange(6), SCALE)
    torch.testing.assert_close(scores.coarse.double(), _true_logits(q, coarse_keys), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_spread_is_half_the_variance_of_the_error(ops, codec):
    """Over many tokens whose unread bits are uniform."""
    keys = torch.rand(1, 1, 8192, 16, generator=torch.Generator().manual_seed(9)) * 3 - 1
    held = store(keys, keys, codec)
    q = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(10)) * 2
    scores = ops.score_tokens(q, held.keys, torch.zeros(1, dtype=torch.int64), SCALE)
    error = (_true_logits(q, held.k) - scores.coarse.double())[:, :, 0]
    assert error.mean(-1).abs().max() < 0.05 * error.std()
    torch.testing.assert_close(scores.spread[..., 0].double(), error.var(-1) / 2, rtol=0.08, atol=0)


def test_spread_is_zero_where_the_plane_is_the_whole_key(ops):
    held = random_store(3, 2, 16, 16, 16, "int2")
    q = torch.randn(2, 4, 16)
    assert (ops.score_tokens(q, held.keys, torch.arange(3), SCALE).spread == 0).all()


def test_one_list_of_blocks_per_head(ops, codec):
    held = random_store(7, 2, 16, 16, 16, codec)
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(11))
    lists = torch.tensor([[4, 0, 6], [2, 2, 5]])
    together = ops.score_tokens(q, held.keys, lists, SCALE)
    for group in range(2):
        alone = ops.score_tokens(q, held.keys, lists[group], SCALE)
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[group], theirs[group], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_token_importance_is_the_attention_received(ops, codec, heads):
    held = random_store(9, 2, 16, 16, 16, codec)
    q = torch.randn(2, heads * 3, 16, generator=torch.Generator().manual_seed(12))
    block_ids = torch.tensor([8, 1, 4])
    k, v = rows_of(held, block_ids)
    _, lse = dense_rows(q, k, v, SCALE)
    weights = (torch.einsum("grd,gsd->grs", q.double(), k) * SCALE - lse.unsqueeze(-1)).exp()
    importance = ops.token_importance(q, lse.float(), held.keys, block_ids, SCALE)
    assert importance.shape == (3, 16)
    torch.testing.assert_close(importance.double(), weights.sum((0, 1)).view(3, 16), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "query_tokens"), [(20, 1), (20, 3), (20, 20), (150, 5), (150, 100)])
def test_prompt_importance_is_causal(ops, size, query_tokens):
    """Of few keys, and of more than are taken in at a time."""
    rng, heads = torch.Generator().manual_seed(13), 2
    q, k = torch.randn(2, heads * query_tokens, 16, generator=rng), torch.randn(2, size, 16, generator=rng)
    places = torch.arange(size)
    seen = (places <= places[size - query_tokens :, None]).repeat(heads, 1)
    _, lse = dense_rows(q, k, k, SCALE, seen)
    logits = torch.einsum("grd,gsd->grs", q.double(), k.double()) * SCALE
    weights = (logits - lse.unsqueeze(-1)).exp() * seen
    importance = ops.prompt_importance(q, lse.float(), k, query_tokens, SCALE)
    torch.testing.assert_close(importance.double(), weights.sum((0, 1)), rtol=1e-4, atol=1e-6)
    assert importance.sum().item() == pytest.approx(2 * heads * query_tokens, rel=1e-4)
    if query_tokens == 1:
        torch.testing.assert_close(ops.window_importance(q, lse.float(), k, SCALE), importance, rtol=1e-5, atol=1e-6)
