"""What the compiled ops cannot read is refused by name before anything is written: other planes, dtypes and places."""

from __future__ import annotations

import pytest
import torch
from one_request import OneRequest
from stored import random_store

import pikv_megatron.ops
from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import Keys

pytestmark = pytest.mark.skipif(pikv_megatron.ops.kernel_set is None, reason="the compiled ops are not built")
OPS = torch.ops.pikv
ONE = OneRequest(pikv_megatron.ops)
G, R, B, D, N = 2, 3, 16, 32, 5


@pytest.fixture
def q():
    return torch.randn(G, R, D)


@pytest.fixture
def held():
    return random_store(N, G, B, D, D, "int8")


def _planes(hi: int, lo: int, dim: int = D) -> list:
    """What quantize_block writes for x [2, B, dim], per channel."""
    high = torch.zeros(2, B, dim * hi // 8, dtype=torch.uint8)
    low = torch.zeros(2, B, dim * lo // 8, dtype=torch.uint8) if lo else None
    return [high, low, torch.zeros(2, dim, dtype=torch.float16), torch.zeros(2, dim, dtype=torch.float16)]


@pytest.mark.parametrize(("hi", "lo"), [(1, 0), (3, 0), (4, 2), (2, 4), (8, 8), (16, 0), (0, 0)])
def test_planes_that_no_kernel_has(hi, lo):
    planes = _planes(hi, lo)
    with pytest.raises(RuntimeError, match=f"no kernel has planes of {hi} and {lo} bits"):
        OPS.quantize_block_out(torch.ones(2, B, D), hi, lo, True, *planes)
    with pytest.raises(RuntimeError, match=f"no kernel has planes of {hi} and {lo} bits"):
        OPS.dequantize_block_out(*planes, hi, lo, True, torch.zeros(2, B, D))
    assert not any(plane.any() for plane in planes if plane is not None)


def test_rows_of_codes_that_do_not_fill_bytes():
    with pytest.raises(RuntimeError, match="whose codes of 2 bits fill bytes, got 6"):
        OPS.quantize_block_out(torch.ones(2, B, 6), 2, 0, True, *_planes(2, 0, 6))


@pytest.mark.parametrize(("place", "dtype"), [(0, torch.int8), (1, torch.int32), (2, torch.float32), (3, torch.int16)])
def test_codes_and_scales_of_another_dtype(place, dtype):
    planes = _planes(4, 4)
    planes[place] = planes[place].to(dtype)
    with pytest.raises(RuntimeError, match=r"expected (uint8|float16)"):
        OPS.quantize_block_out(torch.ones(2, B, D), 4, 4, True, *planes)
    with pytest.raises(RuntimeError, match=r"expected (uint8|float16)"):
        OPS.dequantize_block_out(*planes, 4, 4, True, torch.zeros(2, B, D))
    assert not any(plane.any() for plane in planes)


def test_a_low_plane_that_is_missing_or_too_much():
    high, low, *scales = _planes(4, 4)
    for planes, lo in (((high, None), 4), ((high, low), 0)):
        with pytest.raises(RuntimeError, match="low: expected exactly where lo_bits is not 0"):
            OPS.quantize_block_out(torch.ones(2, B, D), 4, lo, True, *planes, *scales)


def test_keys_of_one_byte_have_no_high_plane_to_score_by(q, held):
    """quantize_block can make them; what reads keys cannot take them."""
    high, _, scale, zero = reference.quantize_block(torch.randn(N, G, B, D), 8, 0, per_channel=True)
    keys, ids = Keys(None, high, None, scale, zero, 8, 0), torch.arange(N)
    for call in (
        lambda: pikv_megatron.ops.attend_blocks(q, keys, held.values, ids, 0.2),
        lambda: ONE.key_logits(q, keys, ids, 0.2),
        lambda: ONE.score_tokens(q, keys, ids, 0.2),
    ):
        with pytest.raises(RuntimeError, match="keys: no kernel has planes of 8 and 0 bits"):
            call()
    with pytest.raises(RuntimeError, match="bits: expected 2, 4 or 8, got 3"):
        ONE.score_blocks(q, held.keys._replace(hi_bits=3, lo_bits=0), ids, 0.2)


@pytest.mark.parametrize("wrong", [-1, N])
def test_blocks_outside_the_pool(q, held, wrong):
    ops, ids = ONE, torch.tensor([0, wrong])
    lists, nothing = ids.expand(G, -1), torch.zeros(G, 2, dtype=torch.int64)
    runs = torch.tensor([0, 1, 2])
    scores = ops.score_tokens(q, held.keys, torch.arange(2), 0.2)
    for call in (
        lambda: ops.attend_blocks(q, held.keys, held.values, ids, 0.2),
        lambda: ops.attend_ragged(q.expand(2, -1, -1, -1), held.keys, held.values, ids, runs, 0.2),
        lambda: ops.attend_tokens(q, held.keys, held.values, lists, nothing, 0.2),
        lambda: ops.attend_mass(q, [(held.keys, held.values, ids)], [scores], None, torch.zeros(G, R), 0.1, 0.2),
        lambda: ops.score_tokens(q, held.keys, ids, 0.2),
        lambda: ops.score_tokens(q, held.keys, lists, 0.2),
        lambda: ops.score_blocks(q, held.keys, ids, 0.2),
        lambda: ops.key_logits(q, held.keys, ids, 0.2),
        lambda: ops.token_importance(q, torch.zeros(G, R), held.keys, ids, 0.2),
    ):
        with pytest.raises(RuntimeError, match=rf"block_ids: expected 0 \.\. {N - 1}, got {wrong}"):
            call()


@pytest.mark.parametrize("wrong", [-1, B])
def test_tokens_outside_their_block(q, held, wrong):
    ids, offsets = torch.zeros(G, 2, dtype=torch.int64), torch.tensor([[0, 0], [0, wrong]])
    with pytest.raises(RuntimeError, match=rf"offsets: expected 0 \.\. {B - 1}, got {wrong}"):
        ONE.attend_tokens(q, held.keys, held.values, ids, offsets, 0.2)


@pytest.mark.parametrize("first", [[1, 2, 3], [0, 4, 3], [0, 1, 2], [0, -1, 3], [0.0, 1.0, 3.0]])
def test_runs_that_do_not_cover_the_list(q, held, first):
    """Every op that takes several requests, two of them here."""
    ops, ids, run, logits = pikv_megatron.ops, torch.arange(3), torch.tensor(first), torch.zeros(G, R, 3)
    q, lse, lists, scores = q.expand(2, -1, -1, -1), torch.zeros(2, G, R), ids.expand(G, -1), torch.zeros(G, 3)
    buffer, at = torch.zeros(2, G, 4, D), (torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 4]))
    scored = ONE.score_tokens(q[0], held.keys, ids, 0.2)
    stored = (held.keys, held.values, ids, run)
    calls = {
        "first_blocks": (
            lambda: ops.attend_ragged(q, *stored, 0.2),
            lambda: ops.attend_decode(q, buffer, buffer, *at, *stored, 0.2),
            lambda: ops.attend_mass(q, [stored], [scored], None, lse, 0.1, 0.2),
            lambda: ops.score_blocks(q, held.keys, ids, run, 0.2),
            lambda: ops.score_tokens(q, held.keys, ids, run, 0.2),
            lambda: ops.key_logits(q, held.keys, ids, run, 0.2),
            lambda: ops.token_importance(q, lse, held.keys, ids, run, 0.2),
            lambda: ops.unread_mass(scored, 1.0, torch.zeros(G, 3 * B, dtype=torch.bool), run),
        ),
        "first_tokens": (
            lambda: ops.attend_tokens(q, held.keys, held.values, lists, lists, run, 0.2),
            lambda: ops.rank_tokens(logits, lse, run),
            lambda: ops.select_topk(scores, run, torch.tensor([0, 1, 2]), 2),
            lambda: ops.select_mass(lists, logits, logits, lse, run, 0.1),
        ),
        "first_chosen": (lambda: ops.select_topk(scores, torch.tensor([0, 0, 3]), run, 3),),
    }
    for name, of in calls.items():
        for call in of:
            with pytest.raises(RuntimeError, match=rf"{name}: (expected 0, ascending, to 3|unexpected dtype)"):
                call()


@pytest.mark.parametrize(
    ("slots", "first", "last", "said"),
    [
        ([0, 2], [0, 0], [4, 4], r"slots: expected 0 \.\. 1, got 2"),
        ([-1, 0], [0, 0], [4, 4], r"slots: expected 0 \.\. 1, got -1"),
        ([0, 1], [0, 0], [4, 5], r"raw_first, raw_last: expected 0 <= first <= last <= 4, got 0 and 5"),
        ([0, 1], [3, 0], [2, 4], r"raw_first, raw_last: expected 0 <= first <= last <= 4, got 3 and 2"),
        ([0, 1], [-1, 0], [2, 4], r"raw_first, raw_last: expected 0 <= first <= last <= 4, got -1 and 2"),
        ([0], [0, 0], [4, 4], "slots: expected size 2"),
        ([0, 1], [0], [4, 4], "raw_first: expected size 2"),
        ([0, 1], [0, 0], [4, 4, 4], "raw_last: expected size 2"),
        ([0.0, 1.0], [0, 0], [4, 4], "slots: unexpected dtype"),
    ],
)
def test_raw_tokens_outside_their_buffer(q, held, slots, first, last, said):
    ops, q, lse = pikv_megatron.ops, q.expand(2, -1, -1, -1), torch.zeros(2, G, R)
    buffer, at = torch.zeros(2, G, 4, D), [torch.tensor(x) for x in (slots, first, last)]
    stored = (held.keys, held.values, torch.arange(3), torch.tensor([0, 1, 3]))
    for call in (
        lambda: ops.attend_windows(q, buffer, buffer, *at, 0.2),
        lambda: ops.attend_decode(q, buffer, buffer, *at, *stored, 0.2),
        lambda: ops.window_importance(q, lse, buffer, *at, 0.2),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()


def test_buffers_that_differ(q):
    q, at = q.unsqueeze(0), [torch.tensor([x]) for x in (0, 0, 1)]
    buffer = torch.zeros(2, G, 4, D)
    for other, said in (
        (torch.zeros(3, G, 4, D), "raw_v: expected the 2 slots of 4 tokens of raw_k, got 3 of 4"),
        (torch.zeros(2, G, 5, D), "raw_v: expected the 2 slots of 4 tokens of raw_k, got 2 of 5"),
        (torch.zeros(2, G + 1, 4, D), rf"raw_v: expected \[slots, {G}, tokens, {D}\]"),
        (torch.zeros(2, G, 4, D, dtype=torch.float64), "raw_v: expected float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=said):
            pikv_megatron.ops.attend_windows(q, buffer, other, *at, 0.2)


@pytest.mark.parametrize("first", [[0, 3], [0, 1, 2, 3], [[0, 1, 3]]])
def test_as_many_runs_as_requests(q, held, first):
    q, ids, run = q.expand(2, -1, -1, -1), torch.arange(3), torch.tensor(first)
    with pytest.raises(RuntimeError, match=r"first_blocks: expected (size 3 in dimension 0|1 dimensions)"):
        pikv_megatron.ops.score_tokens(q, held.keys, ids, run, 0.2)
    with pytest.raises(RuntimeError, match=r"first_chosen: expected (size 3 in dimension 0|1 dimensions)"):
        pikv_megatron.ops.select_topk(torch.zeros(G, 3), torch.tensor([0, 1, 3]), run, 3)


def test_places_outside_the_list():
    logits, lse, order = torch.zeros(G, R, 3), torch.zeros(1, G, R), torch.tensor([[0, 1, 2], [0, 1, 3]])
    with pytest.raises(RuntimeError, match=r"order: expected 0 \.\. 2, got 3"):
        pikv_megatron.ops.select_mass(order, logits, logits, lse, torch.tensor([0, 3]), 0.1)


def test_more_chosen_than_there_are(q):
    with pytest.raises(RuntimeError, match="first_chosen: expected at most 1 for request 1, got 2"):
        pikv_megatron.ops.select_topk(torch.zeros(G, 3), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 3]), 3)


def test_new_blocks_of_another_dtype_than_the_pool():
    held = random_store(N, G, B, D, D, "none")
    before, new = held.keys.raw.clone(), torch.ones(1, G, B, D, dtype=torch.bfloat16)
    for new_k, new_v, named in ((new, new.float(), "k"), (new.float(), new, "v")):
        with pytest.raises(RuntimeError, match=f" {named}: expected the dtype of new_{named}"):
            pikv_megatron.ops.append(held.keys, held.values, torch.tensor([2]), new_k, new_v)
    assert torch.equal(held.keys.raw, before)


@pytest.mark.parametrize("kernels", ["scalar", "avx2", "avx512"])
def test_queries_that_are_no_numbers_do_no_harm(held, kernels):
    """The cache refuses them unless it is told not to look; the answer is then worth nothing, but that is all."""
    ops, running = ONE, pikv_megatron.ops.kernel_set
    try:
        ops.use_kernels(kernels)
    except RuntimeError:
        pytest.skip(f"this processor has no {kernels}")
    held = random_store(70, G, 10, D, D, "int8")
    ids = torch.arange(70)
    for value in (torch.nan, -torch.nan, torch.inf):
        q = torch.randn(G, R, D, generator=torch.Generator().manual_seed(1))
        whole = ops.score_tokens(q, held.keys, ids, 0.2)
        alone = ops.attend_mass(q, [(held.keys, held.values, ids)], [whole], None, torch.zeros(G, R), 0.05, 0.2)
        q[0, 1] = value
        scores = ops.score_tokens(q, held.keys, ids, 0.2)
        (partial,), read = ops.attend_mass(
            q, [(held.keys, held.values, ids)], [scores], None, torch.zeros(G, R), 0.05, 0.2
        )
        assert torch.equal(read[1], alone[1][1])
        assert torch.equal(partial.out[1], alone[0][0].out[1])
    ops.use_kernels(running)
