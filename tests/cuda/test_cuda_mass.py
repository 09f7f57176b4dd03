"""attend_mass by the CUDA kernels: ranks, logits of every key, and attention to those tokens that are needed."""

from __future__ import annotations

import pytest
import torch
from launchers import Launchers
from one_request import OneRequest
from stored import dense_rows, random_store, rows_of, with_parts

from pikv_megatron.ops import kernels, reference


class _OfSimulator:
    """attend_mass over the ops that it calls; on a simulator, which takes tensors of the CPU, for several pools."""

    attend_mass = staticmethod(kernels.attend_mass)


@pytest.fixture
def ops(every, monkeypatch):
    """attend_mass for several requests."""
    if not isinstance(every, Launchers):
        return every

    def of_simulator(name: str):
        def call(*arguments):
            return getattr(every, name)(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments))

        return call

    for name in ("rank_tokens", "key_logits", "select_mass", "attend_tokens"):
        monkeypatch.setattr(kernels, name, of_simulator(name))
    return _OfSimulator()


@pytest.mark.parametrize("ranks", [(0, 0), (16, 9)])
@pytest.mark.parametrize("slope", [None, 0.9])
@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
@pytest.mark.parametrize(("pools", "size", "strength"), [((9, 16), 16, 1.0), ((1, 3, 4), 32, 6.0)])
def test_until_little_enough_is_missed(ops, codec, slope, pools, size, strength, ranks):
    """As many tokens as the reference reads, whose order may differ where ranks are equal up to rounding; a low-rank
    part, of which the scores do not know, changes nothing of that.
    """
    bare = random_store(sum(pools), 2, size, 64, 32, codec, seed=1)
    held = with_parts(bare, *ranks, 3)
    rng = torch.Generator().manual_seed(2)
    q, raw_lse = strength * torch.randn(2, 3, 64, generator=rng), torch.randn(2, 3, generator=rng)
    ids = torch.randperm(sum(pools), generator=rng)
    stored = [(held.keys, held.values, some) for some in ids.split(pools)]
    one, plain = OneRequest(ops), OneRequest(reference)
    scores = [plain.score_tokens(q, bare.keys, some, 0.125) for _, _, some in stored]
    k, v = rows_of(held, ids)
    for epsilon in (0.3, 0.02):
        partials, read = one.attend_mass(q, stored, scores, slope, raw_lse, epsilon, 0.125)
        _, expected = plain.attend_mass(q, stored, scores, slope, raw_lse, epsilon, 0.125)
        assert torch.equal(read.sum(-1), expected.sum(-1))
        assert (read != expected).sum() <= 2
        merged = reference.merge_partials(partials)
        out, lse = dense_rows(q, k, v, 0.125, read.unsqueeze(1).expand(-1, 3, -1))
        assert (merged.out.double() - out).abs().max() <= 1e-5 * v.abs().max()
        torch.testing.assert_close(merged.lse.double(), lse, rtol=1e-5, atol=1e-5)
