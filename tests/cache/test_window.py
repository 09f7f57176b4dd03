"""LayerWindow against a list: appended in any pieces, labelled late, taken off the front; sinks stay."""

from __future__ import annotations

import random

import pytest
import torch
from dense import generator, model_config, random_kv, random_routing, runtime_config

from pikv_megatron.cache.window import LayerWindow, window_buffers

BUDGET = {"budget": {"policy": "uniform", "first_layer_tokens": 100, "over_budget": "drop"}}


def _window(sinks=2, window=6, block_size=4, importance=False, **model):
    config = model_config(**model)
    budget = BUDGET if importance else {}
    runtime = runtime_config(sinks=sinks, window=window, block_size=block_size, **budget)
    buffer = window_buffers(config, runtime)[0]
    return config, buffer, LayerWindow(buffer, 1)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(("sinks", "window", "block_size"), [(2, 6, 4), (0, 1, 1), (5, 3, 8), (1, 10, 3)])
def test_any_sequence_against_a_list(sinks, window, block_size, importance):
    """Each token is a row (k, v, experts, weights, importance); the list is cut as the window is."""
    model, buffer, tokens = _window(sinks, window, block_size, importance, v_head_dim=12)
    rng, chance = generator(3), random.Random(4)
    rows: list[list[torch.Tensor]] = []

    def check(raw, expected):
        assert raw.tokens == len(expected)
        for mine, column in zip((raw.k.transpose(0, 1), raw.v.transpose(0, 1), *raw[2:4]), range(4), strict=True):
            theirs = torch.stack([row[column] for row in expected]) if expected else mine[:0]
            assert torch.equal(mine, theirs), f"column {column}"
        if importance:
            theirs = torch.stack([row[4] for row in expected]) if expected else raw.importance
            torch.testing.assert_close(raw.importance, theirs)
        else:
            assert raw.importance is None

    for _ in range(300):
        count = chance.choice([1, 1, 1, 2, 5, block_size, 40])
        k, v = random_kv(model, count, rng)
        tokens.append(k, v)
        nothing = torch.zeros(model.topk)
        rows += [[k[i], v[i], nothing.long(), nothing, torch.tensor(0.0)] for i in range(count)]
        assert tokens.tokens == len(rows)
        assert (tokens.waiting_bytes > 0) == (len(rows) > buffer.capacity)
        check(tokens.read(), rows)
        if importance:
            share = torch.rand(len(rows), generator=rng)
            tokens.add_importance(share)
            for row, part in zip(rows, share, strict=True):
                row[4] = row[4] + part
        labelled = chance.choice([0, 1, count, len(rows)])
        if labelled:
            experts, weights = random_routing(model, labelled, rng)
            tokens.label_newest(experts, weights)
            for row, expert, weight in zip(rows[-labelled:], experts, weights, strict=True):
                row[2], row[3] = expert, weight
        check(tokens.read(), rows)
        blocks = max(0, (len(rows) - sinks - window) // block_size)
        if blocks:
            last = sinks + blocks * block_size
            check(tokens.oldest(blocks * block_size), rows[sinks:last])
            tokens.drop(blocks * block_size)
            rows = rows[:sinks] + rows[last:]
            assert tokens.waiting_bytes == 0
        check(tokens.read(), rows)


@pytest.mark.parametrize("pieces", [[12], [40], [9, 40]])
def test_the_oldest_are_seen_where_they_are(pieces):
    """In the buffer and in a prompt's chunk; only where they lie in both are they joined by a copy."""
    model, buffer, tokens = _window()
    for count in pieces:
        tokens.append(*random_kv(model, count, generator()))
    seen, places = tokens.oldest(4), {t.data_ptr() for t in buffer.tensors.values()}
    storages = {t.untyped_storage().data_ptr() for t in seen if t is not None}
    assert (storages <= places) == (pieces != [40])
    waiting = tokens._waiting
    if pieces == [40]:
        assert storages == {t.untyped_storage().data_ptr() for t in waiting if t is not None}


def test_slots_do_not_touch_each_other():
    model, buffer, tokens = _window()
    other = LayerWindow(buffer, 0)
    other.append(*random_kv(model, 5, generator(5)))
    before = other.read().clone()
    for _ in range(20):
        tokens.append(*random_kv(model, 4, generator(6)))
        tokens.label_newest(*random_routing(model, 4, generator(7)))
        if tokens.tokens >= 12:
            tokens.drop(4)
    for mine, theirs in zip(other.read(), before, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_the_buffer_is_written_in_place():
    """Decode takes no memory: a token lands in the buffer, and nothing waits."""
    model, buffer, tokens = _window()
    places = {name: t.data_ptr() for name, t in buffer.tensors.items()}
    for i in range(50):
        tokens.append(*random_kv(model, 1, generator(i)))
        assert tokens.waiting_bytes == 0
        assert tokens.read().k.data_ptr() == buffer.k[1].data_ptr()
        if tokens.tokens == 12:
            tokens.drop(4)
    assert {name: t.data_ptr() for name, t in buffer.tensors.items()} == places


def test_tokens_that_require_grad_are_stored_without_their_graph():
    model, buffer, tokens = _window()
    k, v = random_kv(model, 3, generator())
    with torch.no_grad():  # as the cache calls it
        tokens.append(k.requires_grad_(), v)
    assert not any(t.requires_grad for t in buffer.tensors.values())
