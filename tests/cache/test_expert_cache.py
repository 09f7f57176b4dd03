"""ExpertKVCache alone, and as a view of a PiKVCache: an expert's blocks, no more and no fewer; the shards of all
experts and the window together are the cache.
"""

from __future__ import annotations

import pytest
import torch
from dense import (
    CODECS,
    dense_attention,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    step,
)

from pikv_megatron import ExpertKVCache, PiKVCache, ops
from pikv_megatron.cache.checks import UnknownRequestError
from pikv_megatron.tiers.blocks import PoolFullError


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


def _shard(codec="none", expert_id=2, **changes):
    return ExpertKVCache(model_config(v_head_dim=12), runtime_config(codec, **changes), layer_id=1, expert_id=expert_id)


def test_alone_it_gives_back_what_was_put(codec):
    shard, rng = _shard(codec), generator()
    k, v = random_kv(shard.model, 20, rng)
    shard.put(7, 40, k[8:], v[8:])
    shard.put(7, 4, k[:8], v[:8])
    shard.put(8, 0, v[:4, :, :8], v[:4])
    assert shard.requests() == [7, 8]
    assert (shard.tokens(7), shard.tokens(8)) == (20, 4)
    got_k, got_v, positions = shard.retrieve(7)
    assert positions.tolist() == [*range(4, 12), *range(40, 52)]
    if codec == "none":
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)
    else:
        bits = {"int8": 8, "int4": 4, "int2": 2}[codec]
        assert (got_k - k).abs().max() < 6 / (2**bits - 1)
        assert (got_v - v).abs().max() < 6 / (2**bits - 1)


def test_alone_it_attends_to_what_it_holds(codec):
    shard, rng = _shard(codec), generator(1)
    shard.put(0, 8, *random_kv(shard.model, 24, rng))
    for tokens in (1, 3):
        q = random_q(shard.model, tokens, rng)
        out, lse = dense_attention(q, *shard.retrieve(0)[:2], shard.model.scale)
        partial = shard.attend(q, 0)
        torch.testing.assert_close(partial.out.double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(partial.lse.double(), lse, rtol=1e-5, atol=1e-5)


def test_alone_it_counts_its_bytes_and_frees_them(codec):
    shard, rng = _shard(codec), generator(2)
    assert shard.nbytes == 0
    shard.put(0, 0, *random_kv(shard.model, 12, rng))
    shard.put(1, 0, *random_kv(shard.model, 4, rng))
    assert shard.nbytes == sum(t[:4].numel() * t.element_size() for t in shard.pool.tensors.values())
    shard.release(0)
    assert shard.requests() == [1]
    assert shard.pool.used_blocks == 1
    shard.release(1)
    assert shard.nbytes == 0
    assert shard.pool.free_blocks == shard.pool.num_blocks == 512 // 4  # one layer's share


def test_alone_it_refuses_what_does_not_fit():
    shard, rng = _shard(max_tokens=16), generator(3)
    k, v = random_kv(shard.model, 8, rng)
    shard.put(0, 8, k, v)

    def state():
        return shard.retrieve(0), shard.requests(), shard.pool.free_blocks

    before = state()
    for arguments, error, message in [
        ((0, 0, k[:5], v[:5]), ValueError, r"k: expected a multiple of block_size \(4\) tokens, got 5"),
        (
            (0, 8, k, v),
            ValueError,
            "start: expected positions 8 .. 15 to be new, request 0 already holds a block from 8",
        ),
        ((0, 5, k[:4], v[:4]), ValueError, "expected positions 5 .. 8 to be new, request 0 already holds a block from"),
        (
            (0, 13, k[:4], v[:4]),
            ValueError,
            "expected positions 13 .. 16 to be new, request 0 already holds a block from 12",
        ),
        ((0, -4, k, v), ValueError, "start: expected a position of at least 0, got -4"),
        ((0, 1.0, k, v), ValueError, "start: expected a position of at least 0, got 1.0"),
        (("a", 0, k, v), TypeError, "request_id: expected an int, got 'a'"),
        ((1, 0, k[..., :4], v), ValueError, r"k: expected shape \[tokens, 2, 8\]"),
        ((1, 0, k * float("nan"), v), ValueError, "k: expected finite values"),
        ((1, 0, k.repeat(2, 1, 1), v.repeat(2, 1, 1)), PoolFullError, "put: request 1: needs 4 blocks .* 2 of 4"),
    ]:
        with pytest.raises(error, match=message):
            shard.put(*arguments)
        assert shard.requests() == before[1]
        assert shard.pool.free_blocks == before[2]
        assert all(torch.equal(a, b) for a, b in zip(shard.retrieve(0), before[0], strict=True))
    with pytest.raises(UnknownRequestError, match=r"request 5 has no blocks of layer 1, expert 2"):
        shard.retrieve(5)
    with pytest.raises(UnknownRequestError, match="request 5"):
        shard.attend(random_q(shard.model, 1, rng), 5)
    with pytest.raises(ValueError, match="q: expected shape"):
        shard.attend(k, 0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"q: expected finite values .* got {value}"):
            shard.attend(random_q(shard.model, 1, rng).index_fill(2, torch.tensor(3), value), 0)
    shard.put(0, 0, k, v)


@pytest.mark.parametrize(("layer_id", "expert_id"), [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_there_is_no_shard_outside_the_model(layer_id, expert_id):
    with pytest.raises(IndexError, match=r"layer_id|expert_id"):
        ExpertKVCache(model_config(), runtime_config(), layer_id, expert_id)


def _filled(codec, **changes):
    model = model_config(v_head_dim=12)
    cache, rng = PiKVCache(model, runtime_config(codec, **changes)), generator(4)
    for tokens in (40, 1, 1, 25, *[1] * 9):
        for request_id in (3, 5):
            step(cache, *random_kv(model, tokens, rng), rng, request_id)
    return cache, rng


def test_the_shards_share_all_blocks_among_them(codec):
    cache, _ = _filled(codec)
    for layer_id in range(2):
        for request_id in (3, 5):
            sealed = set(range(2, cache._requests[request_id].layers[layer_id].sealed_end))
            seen: set[int] = set()
            for expert_id in range(4):
                shard = cache.expert_shard(layer_id, expert_id)
                if request_id not in shard.requests():
                    continue
                k, v, positions = shard.retrieve(request_id)
                mine = set(positions.tolist())
                assert mine <= sealed - seen
                seen |= mine
                whole = cache.retrieve(layer_id, request_id)
                assert torch.equal(k, whole.k[positions])
                assert torch.equal(v, whole.v[positions])
                assert shard.tokens(request_id) == len(positions)
            assert seen == sealed


@pytest.mark.parametrize("tiers", [1, 2])
def test_the_shards_and_the_window_merge_to_the_caches_attention(codec, tiers):
    changes = {}
    if tiers == 2:
        changes = {
            "budget": {"policy": "uniform", "first_layer_tokens": 20},
            "tiers": [{"kind": "device"}, {"kind": "host"}],
        }
    cache, rng = _filled(codec, **changes)
    model, q = cache.model, random_q(cache.model, 1, rng)
    for layer_id in range(2):
        held = cache.retrieve(layer_id, 5)
        raw = torch.cat([held.positions[:2], held.positions[cache._requests[5].layers[layer_id].sealed_end :]])
        out, lse = dense_attention(q, held.k[raw], held.v[raw], model.scale)
        partials = [ops.Partial(out.float(), lse.float())]
        shards = [cache.expert_shard(layer_id, expert_id) for expert_id in range(4)]
        partials += [shard.attend(q, 5) for shard in shards if 5 in shard.requests()]
        assert len(partials) > 2
        merged, expected = ops.merge_partials(partials), cache.attend(layer_id, q, 5)
        torch.testing.assert_close(merged.out, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.lse, expected[1], rtol=1e-5, atol=1e-5)


def test_a_view_that_is_out_of_date_says_so_in_every_method(codec):
    cache, rng = _filled(codec)
    views = [cache.expert_shard(0, expert) for expert in range(4)]
    before = [view.nbytes for view in views]
    q = random_q(cache.model, 1, rng)
    with pytest.raises(PoolFullError):
        cache.append(0, *random_kv(cache.model, 5000, rng), request_id=77)  # refused: nothing has changed
    assert [view.nbytes for view in views] == before
    cache.release(5)
    for view in views:
        for call in (view.requests, lambda v=view: v.nbytes, lambda v=view: v.tokens(0), lambda v=view: v.attend(q, 0)):
            with pytest.raises(RuntimeError, match="out of date"):
                call()


def test_a_view_counts_its_blocks_bytes(codec):
    cache, _ = _filled(codec)
    total = sum(cache.expert_shard(layer, expert).nbytes for layer in range(2) for expert in range(4))
    assert total == cache.stats()["tiers"]["device"]["bytes_held"] > 0


def test_blocks_that_requests_share_are_counted_once():
    cache, _ = _filled("none")
    before = cache.stats()["tiers"]["device"]
    cache.fork(5, 50)
    after = cache.stats()["tiers"]["device"]
    assert after["blocks_by_owner"] == before["blocks_by_owner"] == [before["blocks_used"]]
    total = sum(cache.expert_shard(layer, expert).nbytes for layer in range(2) for expert in range(4))
    assert total == after["bytes_held"] == before["bytes_held"]


DEMOTE = {"budget": {"policy": "uniform", "first_layer_tokens": 16}, "tiers": [{"kind": "device"}, {"kind": "host"}]}
CHANGES = {
    "seal": lambda c: [c.append(0, *random_kv(c.model, n, generator(n)), 5) for n in (4, 1)],
    "fork": lambda c: c.fork(5, 50),
    "reorder": lambda c: c.reorder([5, 2], [2, 5]),
    "crop": lambda c: c.crop(5, 12),
    "release": lambda c: c.release(2),
}


@pytest.mark.parametrize("changes", [{}, DEMOTE], ids=["shared", "copied"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_view_ends_with_every_change_of_what_is_held_and_by_whom(name, changes):
    cache, rng = PiKVCache(model_config(), runtime_config(**changes)), generator(5)
    for request, tokens in ((5, 30), (2, 21)):
        for layer in range(2):
            cache.append(layer, *random_kv(cache.model, tokens, rng), request)
            cache.observe_routing(layer, *random_routing(cache.model, tokens, rng), request)
    views = [cache.expert_shard(0, expert) for expert in range(4)]
    assert sorted({r for view in views for r in view.requests()}) == [2, 5]
    CHANGES[name](cache)
    for view in views:
        with pytest.raises(RuntimeError, match="out of date"):
            view.requests()


def test_a_view_is_read_only():
    cache, rng = _filled("none")
    shard = next(s for s in (cache.expert_shard(0, e) for e in range(4)) if s.requests())
    with pytest.raises(ValueError, match=r"put: this shard .* is a view"):
        shard.put(3, 400, *random_kv(cache.model, 4, rng))
    with pytest.raises(ValueError, match="release: this shard is a view"):
        shard.release(3)
    for layer_id, expert_id in ((2, 0), (0, 4)):
        with pytest.raises(IndexError):
            cache.expert_shard(layer_id, expert_id)


def test_a_view_ends_when_the_cache_moves_on():
    """A block that another request has taken must not be read under the old one's name."""
    cache = PiKVCache(model_config(num_layers=1, num_experts=1, topk=1), runtime_config())
    k, v = random_kv(cache.model, 40, generator(1))
    cache.append(0, k, v, 7)
    cache.observe_routing(0, torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1), 7)
    shard = cache.expert_shard(0, 0)
    assert shard.retrieve(7)[0].shape[0] > 0
    cache.release(7)
    cache.append(0, k + 1, v + 1, 8)
    with pytest.raises(RuntimeError, match=r"layer 0, expert 0 is out of date"):
        shard.retrieve(7)
    with pytest.raises(RuntimeError, match=r"out of date"):
        shard.attend(random_q(cache.model, 1, generator(2)), 7)
