"""Attention by the CUDA kernels where keys, values or both have a low-rank part, against float64: whole blocks,
requests with blocks of their own, single tokens.
"""

from __future__ import annotations

import pytest
import torch
from pairs import every_pair, name_of
from stored import dense_rows, random_store, rows_of, with_parts
from test_cuda_attend import check_blocks, check_tokens, close

from pikv_megatron.ops import reference

PARTS = {
    "codec": ("float32", "bfloat16", "float16", "int8", "int4", "int2"),
    "dim": (64, 80, 256),
    "value_dim": (48, 128, 256),
    "heads": (1, 4, 8, 9),
    "block_size": (16, 64),
    "rank_k": (0, 1, 16, 64),
    "rank_v": (0, 1, 33, 64, 200),
    "bases": (1, 3, 40),
    "splits": (1, 3),
}


def _cases(**others):
    """Pairs; those with a part."""
    return [case for case in every_pair({**PARTS, **others}) if case["rank_k"] or case["rank_v"]]


@pytest.mark.parametrize("case", _cases(blocks=(0, 1, 13), causal=(False, True)), ids=name_of)
def test_whole_blocks(cuda, case):
    check_blocks(cuda, **case)


@pytest.mark.parametrize("case", _cases(tokens=(0, 1, 33, 390), some=(False, True)), ids=name_of)
def test_single_tokens(cuda, case):
    check_tokens(cuda, **case)


@pytest.mark.parametrize(
    "case",
    every_pair({"codec": ("none", "int8", "int2"), "heads": (1, 3, 9), "ranks": ((16, 0), (0, 16), (64, 5))}),
    ids=name_of,
)
def test_requests_with_blocks_of_their_own(cuda, case):
    """Of many lengths, none among them, and blocks that several share."""
    lengths = (3, 0, 1, 11, 0)
    heads = case["heads"]
    held = with_parts(random_store(9, 2, 32, 80, 64, case["codec"]), *case["ranks"], 4)
    rng = torch.Generator().manual_seed(17)
    q = torch.randn(len(lengths), 2, heads, 80, generator=rng)
    ids = torch.randint(9, (sum(lengths),), generator=rng)
    first = torch.tensor([0, *lengths]).cumsum(0)
    partial = cuda.attend_ragged(q, held.keys, held.values, ids, first, 0.1)
    for i in range(len(lengths)):
        expected = dense_rows(q[i], *rows_of(held, ids[first[i] : first[i + 1]]), 0.1)
        close(reference.Partial(partial.out[i], partial.lse[i]), expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_every_block_has_another_basis_and_tokens_come_twice(cuda, splits):
    cuda.splits = splits
    held = with_parts(random_store(64, 2, 16, 64, 64, "int8"), 16, 16, 64)
    keys, values = (
        x._replace(low_rank=x.low_rank._replace(basis_of=torch.arange(63, -1, -1))) for x in (held.keys, held.values)
    )
    ids = torch.arange(64)
    rng = torch.Generator().manual_seed(18)
    q = torch.randn(2, 4, 64, generator=rng)
    k, v = (reference.decode_keys(keys, ids), reference.decode_values(values, ids))
    tokens, offsets = torch.randint(64, (2, 200), generator=rng), torch.randint(16, (2, 200), generator=rng)
    tokens[:, 100:150], offsets[:, 100:150] = tokens[:, :50], offsets[:, :50]
    heads = torch.arange(2).unsqueeze(1)
    close(
        cuda.attend_tokens(q, keys, values, tokens, offsets, 0.125),
        dense_rows(q, *(x[tokens, heads, offsets] for x in (k, v)), 0.125),
    )
    rows = (x.transpose(0, 1).flatten(1, 2) for x in (k, v))
    close(cuda.attend_blocks(q, keys, values, ids, 0.125), dense_rows(q, *rows, 0.125))


def test_nothing_of_what_is_not_read_is_looked_at(cuda):
    """Its ids may be those of no block; where nothing is read, the output is 0 and the log-sum-exp -inf."""
    held = with_parts(random_store(5, 2, 16, 64, 64, "int4"), 8, 8, 2)
    q = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(19))
    tokens = torch.full((2, 140), 1 << 40)
    nothing = torch.zeros(2, 140, dtype=torch.bool)
    partial = cuda.attend_tokens(q, held.keys, held.values, tokens, tokens, 0.125, nothing)
    assert (partial.out == 0).all() and (partial.lse == -torch.inf).all()


def test_large_logits(cuda):
    """In the thousands and of both signs, rising from chunk to chunk: nothing overflows."""
    held = with_parts(random_store(40, 2, 32, 64, 64, "none"), 16, 16, 3)
    q = 500 * torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(20))
    k, v = rows_of(held, torch.arange(40))
    order = torch.einsum("rd,sd->s", q[0].double(), k[0]).view(40, 32).amax(-1).argsort()
    k, v = rows_of(held, order)
    partial = cuda.attend_blocks(q, held.keys, held.values, order, 0.125)
    _, lse = dense_rows(q, k, v, 0.125)
    assert partial.out.isfinite().all()
    torch.testing.assert_close(partial.lse.double(), lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(cuda, seed):
    held = with_parts(random_store(9, 2, 32, 64, 96, "int4"), 16, 24, 3)
    rng = torch.Generator().manual_seed(21)
    q = torch.randn(2, 5, 64, generator=rng)
    ids, offsets = torch.randint(9, (2, 170), generator=rng), torch.randint(32, (2, 170), generator=rng)
    results = []
    for order in (0, seed):
        cuda.set_seed(order)
        results.append(cuda.attend_tokens(q, held.keys, held.values, ids, offsets, 0.125))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("blocks", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_long_context(cuda, blocks, codec):
    """8,192 and 131,072 tokens whose values average to little: what is lost to rounding must not show beside it."""
    held = with_parts(random_store(blocks, 2, 32, 64, 64, codec), 16, 16, 8)
    rng = torch.Generator().manual_seed(22)
    q, ids = 0.1 * torch.randn(2, 4, 64, generator=rng), torch.randperm(blocks, generator=rng)
    cuda.splits = 1
    close(cuda.attend_blocks(q, held.keys, held.values, ids, 0.125), dense_rows(q, *rows_of(held, ids), 0.125))
