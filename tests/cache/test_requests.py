"""Requests that fork, change places and are cut back, and layers with a sliding window. In any order: `test_plain`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from dense import (
    attend_retrieved,
    dense_attention,
    forward,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
)
from refusals import refuses

from pikv_megatron import ModelConfig, PiKVCache, RuntimeConfig, Segment, Step
from pikv_megatron.cache.checks import UnknownRequestError
from pikv_megatron.tiers.blocks import PoolFullError

CLOSE = 1e-5


def _model(windows=None) -> ModelConfig:
    return model_config(num_layers=3, sliding_windows=windows)


class Alone:
    """Requests as tensors: every token of every layer."""

    def __init__(self, cache: PiKVCache, seed: int) -> None:
        self.cache, self.rng = cache, generator(seed)
        self.tokens: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, request: int, count: int) -> None:
        """A forward over all layers."""
        cache, model = self.cache, self.cache.model
        held = self.tokens.setdefault(request, [tuple(x[:0] for x in random_kv(model, 1, self.rng))] * 3)
        for layer in range(3):
            k, v = random_kv(model, count, self.rng)
            cache.append(layer, k, v, request)
            held[layer] = tuple(torch.cat(pair) for pair in zip(held[layer], (k, v), strict=True))
            self.attend(layer, request, count)
            if model.label_source(layer) == layer:
                cache.observe_routing(layer, *random_routing(model, count, self.rng), request)
        assert cache.shortest_crop(request) <= max(1, cache.length(0, request) - cache.runtime.window)

    def attend(self, layer: int, request: int, count: int) -> None:
        """Equals dense attention over what was appended (lossless), or over what is held."""
        cache, (k, v), q = self.cache, self.tokens[request][layer], random_q(self.cache.model, count, self.rng)
        assert cache.length(layer, request) == len(k)
        positions, window = torch.arange(len(k)), cache.model.sliding_window(layer)
        lossless = cache.runtime.codec.keys == "none" and cache.runtime.budget.policy == "none"
        if lossless or window is not None:
            expected = dense_attention(q, k, v, cache.model.scale, positions, positions[len(k) - count :], window)
        else:
            expected = attend_retrieved(cache, layer, q, request)
        for got, wanted in zip(cache.attend(layer, q, request), expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=CLOSE, atol=CLOSE)


BUDGETS: list[dict[str, Any]] = [
    {},
    {"budget": {"policy": "uniform", "first_layer_tokens": 16, "over_budget": "drop"}},
    {
        "budget": {"policy": "uniform", "first_layer_tokens": 16, "over_budget": "demote"},
        "tiers": [{"kind": "device"}, {"kind": "host"}],
    },
]


def _filled(requests=(0,), tokens=40, windows=None, **changes) -> Alone:
    alone = Alone(PiKVCache(_model(windows), runtime_config(max_requests=4, **changes)), 3)
    for request in requests:
        alone.step(request, tokens)
    return alone


def test_a_fork_shares_blocks_and_its_bytes_are_counted_once():
    cache = _filled().cache
    before = cache.stats()["tiers"]["device"]
    cache.fork(0, 7)
    after = cache.stats()["tiers"]["device"]
    assert (before["blocks_shared"], after["blocks_shared"]) == (0, before["blocks_used"])
    assert after["bytes_held"] == before["bytes_held"] > 0
    cache.release(0)
    assert cache.stats()["tiers"]["device"] == before | {"blocks_by_owner": before["blocks_by_owner"]}
    assert cache.length(0, 7) == 40


@pytest.mark.parametrize("restore", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("changes", BUDGETS)
def test_a_cache_that_was_saved_goes_on_as_it_was(changes, restore):
    """With shared blocks, and a chunk that waits; what was restored and what was saved share no memory."""
    alone = _filled((0, 1), **changes)
    alone.cache.fork(0, 2)
    alone.cache.append(0, *random_kv(alone.cache.model, 20, generator(1)), 1)
    saved = snapshot(alone.cache)
    others = [restore(alone.cache), restore(alone.cache)]
    for cache in others:
        assert snapshot(cache) == saved
        cache.release(1)
        for seed in range(8):
            forward(cache, {0: 1, 2: 1}, generator(seed))
        assert snapshot(alone.cache) == saved
    assert snapshot(others[0]) == snapshot(others[1]) != saved
    newest, _ = random_kv(_model(), 2, generator(7))  # of layer 0 in the last step
    for row, request in enumerate((0, 2)):
        assert torch.equal(others[0].retrieve(0, request).k[-1], newest[row])
        for layer in range(3):
            q = random_q(_model(), 1, generator())
            expected = attend_retrieved(others[0], layer, q, request)
            for got, wanted in zip(others[0].attend(layer, q, request), expected, strict=True):
                torch.testing.assert_close(got.double(), wanted, rtol=CLOSE, atol=CLOSE)


def test_a_pickled_cache_has_no_memory_twice():
    cache = _filled((0, 1, 2)).cache
    assert len(pickle.dumps(cache)) < cache.stats()["bytes_allocated"] + 40_000


def test_reordering_to_the_same_moves_nothing():
    cache = _filled((0, 1, 2)).cache
    before = snapshot(cache)
    cache.reorder([0, 1, 2], [0, 1, 2])
    assert snapshot(cache) == before


def test_reordering_keeps_the_memory_of_who_goes_on():
    cache = _filled((0, 1, 2)).cache
    tables = {r: [s.tables[0].ids for s in cache._requests[r].layers] for r in (0, 1, 2)}
    cache.reorder([0, 1, 2], [1, 1, 0])
    ids = {r: [s.tables[0].ids for s in cache._requests[r].layers] for r in (0, 1, 2)}
    assert ids == {0: tables[1], 1: tables[1], 2: tables[0]}
    assert ids[2][0] is tables[0][0]  # moved
    mine = cache._requests[1]
    cache.reorder([0, 1, 2], [1, 1, 1])
    assert cache._requests[1] is mine  # who is its own source stays where it is
    assert cache.stats()["tiers"]["device"]["blocks_shared"] == sum(map(len, tables[1]))


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 20, 33, 34, 39, 40])
def test_a_cut_request_goes_on_as_if_it_had_never_been_longer(length):
    long, short = _filled(), _filled()
    for alone in (long, short):
        alone.cache.release(0)
        alone.tokens, alone.rng = {}, generator(5)
        alone.step(0, length)
    if length < 40:
        long.step(0, 40 - length)
    long.cache.crop(0, length)
    long.tokens[0] = [(k[:length], v[:length]) for k, v in long.tokens[0]]
    long.rng, short.rng = generator(6), generator(6)
    for count in (3, 1, 12, 1):
        long.step(0, count)
        short.step(0, count)
    for layer in range(3):
        for ours, theirs in zip(long.cache.retrieve(layer), short.cache.retrieve(layer), strict=True):
            assert torch.equal(ours, theirs)


def test_a_crop_that_takes_nothing_changes_nothing():
    """A chunk that waits for its routing goes on waiting."""
    cache = PiKVCache(_model(), runtime_config())
    for layer in range(3):
        cache.append(layer, *random_kv(cache.model, 40, generator()))
    before = snapshot(cache)
    cache.crop(0, 40)
    assert snapshot(cache) == before


def test_cutting_an_int8_block_keeps_what_it_decodes_to():
    cache = _filled(codec="int8").cache
    before = [cache.retrieve(layer) for layer in range(3)]
    cache.crop(0, 21)
    for layer in range(3):
        for ours, theirs in zip(cache.retrieve(layer), before[layer], strict=True):
            assert torch.equal(ours, theirs[:21])


@pytest.mark.parametrize("mode", ["top_k", "mass"])
def test_a_query_whose_token_is_sealed_reads_everything(mode):
    """Taken back to the end of a block, and asked once more: its own token is not left out."""
    cache = _filled(codec="int8", attention={"mode": mode, "read_fraction": 0.1, "epsilon": 0.9}).cache
    cache.crop(0, 22)
    q = random_q(cache.model, 1, generator())
    got = cache.attend_measured(0, q)
    assert not got.missed_certificate.any()
    torch.testing.assert_close(got.out.double(), attend_retrieved(cache, 0, q)[0], rtol=CLOSE, atol=CLOSE)


def test_labels_of_a_cut_block_stay():
    cache = _filled().cache
    (table,) = cache._requests[0].layers[1].tables
    label = int(table.pool.label[table.tensor[3]])  # positions 14 .. 17
    cache.crop(0, 16)
    raw = cache._requests[0].layers[1].window.read()
    assert raw.expert_ids[2:].tolist() == [[label, label]] * 2
    assert raw.weights[2:].tolist() == [[1.0, 0.0]] * 2


def test_a_sliding_layer_holds_its_window_only():
    cache = _filled(tokens=300, windows=[8, None, 8]).cache
    lengths = [len(cache.retrieve(layer).positions) for layer in range(3)]
    assert lengths[1] == 300
    assert max(lengths[0], lengths[2]) < 8 + 6 + 4  # its window, the runtime's, less than a block
    assert cache._windows[0].capacity == 8 + 6 + 4
    assert not cache._requests[0].layers[0].tables[0].ids


@pytest.mark.parametrize("mode", ["exact", "top_k", "mass"])
def test_each_of_several_requests_in_sliding_layers(mode):
    alone = _filled((0, 1, 2), 30, [8, None, 40], attention={"mode": mode})
    cache = alone.cache
    active = cache.begin(Step(tuple(Segment(request, 30, 1) for request in (0, 1, 2))))
    for layer in range(3):
        k, v = random_kv(cache.model, 3, alone.rng)
        active.append(layer, k, v)
        q = random_q(cache.model, 3, alone.rng)
        result = active.attend(layer, q)
        for request in (0, 1, 2) if layer != 1 else ():
            keys = torch.cat([alone.tokens[request][layer][0], k[request : request + 1]])
            values = torch.cat([alone.tokens[request][layer][1], v[request : request + 1]])
            window = cache.model.sliding_window(layer)
            positions = torch.arange(31)
            wanted = dense_attention(
                q[request : request + 1], keys, values, cache.model.scale, positions, positions[-1:], window
            )
            torch.testing.assert_close(result.out[request].double(), wanted[0][0], rtol=CLOSE, atol=CLOSE)
            torch.testing.assert_close(result.lse[request].double(), wanted[1][0], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("tokens", [16, 18, 40])
def test_a_step_after_calls_that_nobody_asked_or_told(tokens):
    """What has left the window waits for its routing, in the buffer or beside it; the step goes on behind it."""
    alone = Alone(PiKVCache(_model([4, None, 9]), runtime_config()), 3)
    keys = [random_kv(alone.cache.model, tokens, alone.rng) for _ in range(3)]
    for layer, (k, v) in enumerate(keys):
        alone.cache.append(layer, k, v)
    outs, rng = forward(alone.cache, {0: 1}, generator(4)), generator(4)
    for layer, (held, out) in enumerate(zip(keys, outs, strict=True)):
        kv = [torch.cat(pair) for pair in zip(held, random_kv(alone.cache.model, 1, rng), strict=True)]
        q, _ = random_q(alone.cache.model, 1, rng), random_routing(alone.cache.model, 1, rng)
        at = torch.arange(tokens + 1)
        window = alone.cache.model.sliding_window(layer)
        wanted, _ = dense_attention(q, *kv, alone.cache.model.scale, at, at[-1:], window)
        torch.testing.assert_close(out.double(), wanted, rtol=CLOSE, atol=CLOSE)


def test_a_query_beyond_a_sliding_layers_reach_is_refused():
    cache = _filled(tokens=40, windows=[4, 4, 4]).cache
    state, q = cache._requests[0].layers[0], random_q(cache.model, 20, generator())
    reach = state.length - state.sealed_end - 4 + 1  # of so many queries the first sees the oldest token that is held
    for wanted, got in zip(attend_retrieved(cache, 0, q[:reach]), cache.attend(0, q[:reach]), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=CLOSE, atol=CLOSE)
    for count in (reach + 1, 20):
        beyond, parts = copy.deepcopy(cache), ("q", "layer 0", f"{count} queries", "sliding window has forgotten")
        refuses(beyond, lambda c=beyond, n=count: c.attend(0, q[:n]), ValueError, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda c: c.fork(9, 1), UnknownRequestError, ("request 9",)),
        (lambda c: c.fork(0, 0), ValueError, ("target", "0 is live")),
        (lambda c: c.fork(0, "1"), TypeError, ("request_id", "'1'")),
        (lambda c: c.reorder([0, 0], [0, 0]), ValueError, ("request_ids", "[0, 0]")),
        (lambda c: c.reorder([0], [5]), ValueError, ("sources", "[0]", "[5]")),
        (lambda c: c.reorder([0], [0, 0]), ValueError, ("sources", "[0, 0]")),
        (lambda c: c.reorder([0], [False]), TypeError, ("request_id", "False")),
        (lambda c: c.reorder([0, 5], [0, 0]), UnknownRequestError, ("request 5",)),
        (lambda c: c.crop(0, 0), ValueError, ("length", "1 .. 40", "0")),
        (lambda c: c.crop(0, 41), ValueError, ("length", "1 .. 40", "41")),
        (lambda c: c.crop(0, 2.0), ValueError, ("length", "2.0")),
        (lambda c: c.crop(3, 1), UnknownRequestError, ("request 3",)),
        (lambda c: c.shortest_crop(3), UnknownRequestError, ("request 3",)),
    ],
)
def test_bad_calls(call, error, parts):
    cache = _filled().cache
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        call(cache)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert snapshot(cache) == before


def test_no_slot_for_a_fork():
    cache = _filled((0, 1, 2, 3), tokens=5).cache
    before = snapshot(cache)
    with pytest.raises(PoolFullError, match="max_requests: 4 of 4 requests are live, no room for request 9"):
        cache.fork(0, 9)
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("windows", "message"),
    [([4], "expected an entry for each of 3 layers"), ([4, 0, 4], r"sliding_windows\[1\]"), (4, "expected a list")],
)
def test_bad_sliding_windows(windows, message):
    with pytest.raises(ValueError, match=message):
        _model(windows)


def test_budgets_are_shared_by_the_layers_that_have_blocks():
    runtime = {"policy": "pyramid", "total_tokens": 200, "over_budget": "drop"}
    both = [
        PiKVCache(m, RuntimeConfig.from_dict({"window": 6, "sinks": 2, "block_size": 4, "budget": runtime}))
        for m in (model_config(num_layers=2), model_config(num_layers=3, sliding_windows=[None, 9, None]))
    ]
    few, more = (cache.sealer._allowed for cache in both)
    assert [more[0], more[2]] == few
    assert more[1] == 0
    assert both[0].tiers[0].num_blocks == both[1].tiers[0].num_blocks
    assert ["importance" in window.tensors for window in both[1]._windows] == [True, False, True]


def test_memory_is_taken_for_the_layers_that_have_blocks():
    both = [PiKVCache(_model(windows), runtime_config()) for windows in (None, [None, 9, None])]
    assert [cache.tiers[0].num_blocks for cache in both] == [3 * 512 // 4, 2 * 512 // 4]
    assert both[0].capacity_tokens == both[1].capacity_tokens == 512
