"""What does not fit is refused before anything has changed: blocks of each tier, requests, whole steps."""

from __future__ import annotations

import random

import pytest
from dense import (
    assert_pools_free,
    forward,
    generator,
    model_config,
    random_kv,
    random_routing,
    runtime_config,
    snapshot,
    step,
)
from refusals import refuses, working_cache

from pikv_megatron import ConfigError, PiKVCache
from pikv_megatron.tiers.blocks import PoolFullError


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_a_full_pool(codec, observed):
    """128 tokens a layer, two layers: 64 blocks, of which request 0 takes 22 and request 4 takes 2. Also while a block
    waits for its routing, which the refused call must not seal.
    """
    cache = working_cache(codec)
    if observed:
        for layer_id in range(2):
            cache.observe_routing(layer_id, *random_routing(cache.model, 4, generator()), request_id=0)
    free = cache.tiers[0].free_blocks
    k, v = random_kv(cache.model, 4 * free + 8, generator(4))
    before = snapshot(cache)
    for request_id in (0, 4, 0):
        with pytest.raises(PoolFullError, match=rf"request {request_id}, layer 1: needs .* {free} of 64 are"):
            cache.append(1, k, v, request_id)
        assert snapshot(cache) == before
    cache.release(4)
    before = snapshot(cache)
    with pytest.raises(PoolFullError, match="request 6, layer 0"):
        cache.append(0, *random_kv(cache.model, 300, generator(4)), request_id=6)
    assert snapshot(cache) == before
    assert cache.requests() == [0]
    step(cache, *random_kv(cache.model, 60, generator(5)), generator(6), request_id=6)


@pytest.mark.parametrize("observed", [True, False])
def test_a_full_host_tier(observed):
    """Demoting needs room below: its lack is found when tokens are appended, not when they are sealed."""
    block = PiKVCache(model_config(v_head_dim=12), _demoting()).tiers[1].block_bytes
    cache, rng = PiKVCache(model_config(v_head_dim=12), _demoting(3 * block)), generator(7)
    k, v = random_kv(cache.model, 27, rng)  # 8 raw, 2 blocks on the device, 2 on the host, 3 tokens over
    cache.append(0, k, v)
    if observed:
        cache.observe_routing(0, *random_routing(cache.model, 27, rng))
    before = snapshot(cache)
    with pytest.raises(PoolFullError, match=r"request 0, layer 0: needs 2 blocks of 4 tokens in the host tier, 1 of 3"):
        cache.append(0, k[:5], v[:5])
    assert snapshot(cache) == before
    cache.append(0, k[:4], v[:4])
    cache.observe_routing(0, *random_routing(cache.model, 4, rng))
    assert cache.tiers[1].free_blocks == 0
    assert cache.length() == len(cache.retrieve(0).positions) == 31
    cache.release(0)
    assert_pools_free(cache)


def _demoting(host_bytes=None, device_bytes=None):
    budget = {"policy": "uniform", "first_layer_tokens": 16}
    tiers = [{"kind": "device", "bytes": device_bytes}, {"kind": "host", "bytes": host_bytes}]
    return runtime_config(budget=budget, tiers=tiers)


def test_a_tier_that_holds_no_block():
    with pytest.raises(ConfigError, match=r"runtime\.tiers\[1\]\.bytes: expected at least .*, got 7"):
        PiKVCache(model_config(), _demoting(7))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ({0: 0}, ValueError, "request 0: expected a count of at least 1, got 0"),
        ({0: True}, ValueError, "got True"),
        ({"a": 1}, TypeError, "request_id: expected an int, got 'a'"),
        ({0: 1000}, PoolFullError, "1000 tokens of 1 requests in every layer: needs"),
        ({0: 1, 1: 1}, PoolFullError, "max_requests: 2 of 2 requests are live, no room for request 1"),
    ],
)
def test_room_for_what_cannot_be(tokens, error, message):
    cache = working_cache()
    refuses(cache, lambda: cache.check_room(tokens), error, message)


def test_too_many_requests():
    cache = working_cache()
    parts = "max_requests", "2 of 2", "request 1"
    refuses(
        cache, lambda: cache.append(0, *random_kv(cache.model, 3, generator(3)), request_id=1), PoolFullError, *parts
    )


@pytest.mark.parametrize(("live", "new"), [((0, 4), [1]), ((0,), [1, 7])])
def test_a_step_with_too_many_requests(live, new):
    """Asked before the first layer; blocks there are enough."""
    cache = working_cache()
    for request_id in {0, 4}.difference(live):
        cache.release(request_id)
    cache.check_room(dict.fromkeys([*live, *new][:2], 1))
    parts = "max_requests", f"{len(live)} of 2", f"no room for request {', '.join(map(str, new))}"
    refuses(cache, lambda: cache.check_room(dict.fromkeys([*live, *new], 1)), PoolFullError, *parts)


def _refused(cache, call, message) -> None:
    before = snapshot(cache)
    with pytest.raises(PoolFullError, match=message):
        call()
    assert snapshot(cache) == before


def test_copies_under_a_budget():
    """A fork shares its source's blocks. It needs what its own next seal and its source's will write, since neither may
    write over what both have. What a reorder frees may be used by what it copies, and no more.
    """
    block = PiKVCache(model_config(), _demoting()).tiers[1].block_bytes
    cache, rng = PiKVCache(model_config(), _demoting(5 * block, 5 * block)), generator(8)

    def append(tokens, request, observe):
        cache.append(0, *random_kv(cache.model, tokens, rng), request)
        if observe:
            cache.observe_routing(0, *random_routing(cache.model, tokens, rng), request)

    for request in (0, 1):  # 2 blocks each on the device, 2 on the host, 3 tokens that will be a block with one more
        append(27, request, True)
    assert [pool.free_blocks for pool in cache.tiers] == [1, 1]
    cache.fork(1, 2)
    assert [pool.free_blocks for pool in cache.tiers] == [1, 1]
    append(1, 0, False)  # which will take a block's place, and that one goes to the host
    assert [pool.free_blocks for pool in cache.tiers] == [1, 0]
    reorder = r"reorder of requests \[0, 1, 2\]: needs"
    _refused(cache, lambda: cache.reorder([0, 1, 2], [0, 0, 2]), rf"{reorder} 2 blocks .* device tier, 1 of 5")
    cache.release(2)
    _refused(cache, lambda: cache.fork(0, 2), "fork of request 0: needs 2 blocks .* device tier, 1 of 5 are free")
    cache.fork(1, 2)
    cache.reorder([0, 1, 2], [0, 0, 0])  # what 1 and 2 shared is free, and all three will write
    assert [pool.free_blocks for pool in cache.tiers] == [3, 0]
    assert cache.tiers[0].claims == 3
    for request in (0, 1, 2):
        cache.observe_routing(0, *random_routing(cache.model, 1, rng), request)
        assert cache.length(0, request) == len(cache.retrieve(0, request).positions) == 28
    assert [pool.free_blocks for pool in cache.tiers] == [1, 0]  # the last to leave a block may write over it
    append(3, 2, True)
    _refused(cache, lambda: append(1, 2, False), "request 2, layer 0: needs 1 blocks .* host tier, 0 of 5 are free")
    for request in (0, 1, 2):
        cache.release(request)
    assert_pools_free(cache)


@pytest.mark.parametrize("over", ["drop", "demote"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 9, 30])
def test_beams_under_a_budget_always_fit(over, blocks, tokens):
    """Memory for what requests may hold is enough, whatever they share: the last to leave a block writes over it."""
    budget = {"policy": "uniform", "first_layer_tokens": 8 + 4 * blocks, "over_budget": over}
    tiers = [{"kind": "device"}, {"kind": "host"}][: 1 + (over == "demote")]
    cache, rng, chance = (
        PiKVCache(model_config(), runtime_config(budget=budget, tiers=tiers)),
        generator(3),
        random.Random(3),
    )
    forward(cache, {0: 40}, rng)
    for beam in (1, 2):
        cache.fork(0, beam)
    for _ in range(120 // tokens):
        forward(cache, {0: tokens, 1: tokens, 2: tokens}, rng)
        cache.reorder([0, 1, 2], [chance.choice([0, 1, 2]) for _ in range(3)])
    for beam in (0, 1, 2):
        cache.release(beam)
    assert_pools_free(cache)


def test_copies_of_what_waits_to_be_sealed():
    """Without a budget sealed blocks are shared; what is not sealed yet has blocks reserved, and so has its copy."""
    block = PiKVCache(model_config(), runtime_config()).tiers[0].block_bytes
    cache, rng = PiKVCache(model_config(), runtime_config(tiers=[{"kind": "device", "bytes": 6 * block}])), generator(9)
    cache.append(0, *random_kv(cache.model, 20, rng))
    cache.fork(0, 1)
    _refused(cache, lambda: cache.fork(0, 2), "fork of request 0: needs 3 blocks .* 0 of 6 are free")
    cache.observe_routing(0, *random_routing(cache.model, 20, rng))
    cache.fork(0, 2)
    for sources in ([0, 1, 1], [1, 1, 1]):  # of 2 alone nothing is freed, of 0 and 2 together their three
        _refused(cache, lambda s=sources: cache.reorder([0, 1, 2], s), "needs 3 blocks .* 0 of 6 are free")
    for request in (0, 2, 1):
        cache.release(request)
    assert_pools_free(cache)
