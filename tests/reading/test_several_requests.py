"""Readers, of several requests at once: each gets what it gets alone, in one tier and in two, be there much, little or
nothing of it sealed.
"""

from __future__ import annotations

import pytest
import torch
from dense import CODECS, generator
from one_request import read_one, source_of
from stored import Stored, random_store

from pikv_megatron import ops
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading import READERS
from pikv_megatron.reading.reader import Source

GROUPS, HEADS, DIM, SIZE = 2, 3, 16, 8
SCALE = DIM**-0.5
CONFIGS = {
    "top_k": AttentionConfig("top_k", read_fraction=0.25),
    "top_k everything": AttentionConfig("top_k", read_fraction=1.0),
    "top_k pruned": AttentionConfig("top_k", read_fraction=0.1, prune_fraction=0.5),
    "top_k pruned hard": AttentionConfig("top_k", read_fraction=0.3, prune_fraction=0.3),
    "quest": AttentionConfig("top_k", read_fraction=0.25, score="quest"),
    "quest everything": AttentionConfig("top_k", read_fraction=1.0, score="quest"),
    "mass": AttentionConfig("mass", epsilon=0.1),
    "mass, little": AttentionConfig("mass", epsilon=0.001),
    "mass certified": AttentionConfig("mass", epsilon=0.2, epsilon_by="certificate"),
}
BLOCKS = ((0, 0), (5, 3), (0, 2), (14, 0), (0, 0), (1, 1), (7, 16), (0, 0))
"""Of each request in each of two tiers."""


def test_every_mode_is_here():
    assert {section.mode for section in CONFIGS.values()} == READERS.rows.keys() - {"exact"}


def _sources(held: Stored, ids: list[list[torch.Tensor]]) -> list[Source]:
    """ids: of each tier, the blocks of each request. A tier without any is no source, as in the cache."""
    sources = []
    for tier in ids:
        counts = tuple(map(len, tier))
        if any(counts):
            first = DeviceNumbers(torch.device("cpu")).runs(counts)
            sources.append(Source(held.keys, held.values, torch.cat(tier), first, counts, SIZE))
    return sources


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_gets_what_it_gets_alone(name, tiers, codec):
    section, rng = CONFIGS[name], generator(3)
    total = sum(map(sum, BLOCKS))
    held = random_store(total, GROUPS, SIZE, DIM, DIM, codec, 1)
    order = iter(torch.randperm(total, generator=rng).tolist())
    ids = [[torch.tensor([next(order) for _ in range(of[tier])]).long() for of in BLOCKS] for tier in range(tiers)]
    q = 2 * torch.randn(len(BLOCKS), GROUPS, HEADS, DIM, generator=rng)
    raw_lse = 2 * torch.randn(len(BLOCKS), GROUPS, HEADS, generator=rng)

    together = READERS.pick(section.mode)(section).read(q, _sources(held, ids), raw_lse, SCALE, DeviceNumbers(q.device))
    merged = ops.merge_partials(together.partials)
    runs = [DeviceNumbers(q.device).runs([len(of) for of in tier]).tolist() for tier in ids]
    for i in range(len(BLOCKS)):
        mine = [source_of(held.keys, held.values, tier[i], SIZE) for tier in ids if len(tier[i])]
        got = (together.estimate[i], together.certificate[i])
        if not mine:
            assert together.tokens_read[i].tolist() == [0] * GROUPS
            assert not torch.cat(got).any()
            assert (merged.lse[i] == -torch.inf).all()
            assert not merged.out[i].any()
            continue
        alone = read_one(q[i], mine, raw_lse[i], section, SCALE)
        assert together.tokens_read[i].tolist() == alone.tokens_read.tolist()
        for figure, wanted in zip(got, (alone.estimate, alone.certificate), strict=True):
            torch.testing.assert_close(figure, wanted, rtol=1e-5, atol=1e-6)
        for figure, wanted in zip(merged, ops.merge_partials(alone.partials), strict=True):
            torch.testing.assert_close(figure[i], wanted, rtol=1e-5, atol=1e-5)
        assert (together.scores is None) == (alone.scores is None)
        if alone.scores is not None and together.scores is not None:
            coarse = [s.coarse[..., run[i] : run[i + 1], :] for s, run in zip(together.scores, runs, strict=True)]
            wanted = torch.cat([s.coarse for s in alone.scores], 2)
            torch.testing.assert_close(torch.cat(coarse, 2), wanted, rtol=1e-5, atol=1e-5)
    assert together.tokens_read.sum() > 0
