"""What transformers promises of its caches holds for PiKVHFCache: what a user may do between two forwards, and what is
left behind. docs/huggingface.md has the list.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hf_models import VOCAB, make, prompts
from torch.nn.functional import pad
from transformers import DynamicCache

from pikv_megatron import PoolFullError
from pikv_megatron.integrations.huggingface import PiKVHFCache

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 2048}


@pytest.fixture(scope="module")
def stock():
    return make("Qwen3Moe")


@pytest.fixture(scope="module")
def model():
    return make("Qwen3Moe")


@pytest.fixture
def caches(stock, model):
    """transformers' cache and ours, empty."""
    return DynamicCache(config=stock.config), PiKVHFCache(model, RUNTIME)


@torch.no_grad()
def both(stock, model, caches, ids, **options):
    """One forward on both caches; the logits where the mask is not 0, after they were found equal."""
    theirs, ours = (m(ids, past_key_values=c, **options).logits for m, c in zip((stock, model), caches, strict=True))
    mask = options.get("attention_mask", torch.ones_like(ids))[:, -ids.shape[1] :].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-4)
    return ours[mask]


def test_it_says_what_it_holds(stock, model, caches):
    ours = caches[1]
    assert len(ours) == 3
    assert (ours.get_seq_length(), ours.get_mask_sizes(5, 0), ours.batch_size) == (0, (5, 0), -1)
    assert not ours.is_initialized
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    for cache in caches:
        assert [cache.get_seq_length(layer) for layer in range(3)] == [40] * 3
        assert [cache.get_mask_sizes(2, layer) for layer in range(3)] == [(42, 0)] * 3
        assert cache.layers[1].get_seq_length() == 40
        assert (cache.is_sliding, cache.is_linear, cache.is_dummy) == ([False] * 3, [False] * 3, [False] * 3)
        assert not cache.is_compileable
        assert cache.is_initialized and cache.is_croppable
        assert cache.get_max_length() == -1
    assert ours.batch_size == 3
    assert [ours.cache.length(0, r) for r in ours.request_ids] == mask.sum(1).tolist()


def test_reset_makes_room_for_another_batch(stock, model, caches):
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    caches[1].reset()
    assert caches[1].cache.requests() == []
    assert caches[1].cache.stats()["bytes_held"] == 0
    both(stock, model, (DynamicCache(config=stock.config), caches[1]), ids[:1])


def test_a_conversation_goes_on_with_the_same_cache(stock, model, caches):
    ids, mask = prompts()
    options = {"max_new_tokens": 10, "do_sample": False}
    for _ in range(2):
        theirs = stock.generate(ids, attention_mask=mask, past_key_values=caches[0], **options)
        ours = model.generate(ids, attention_mask=mask, past_key_values=caches[1], **options)
        assert torch.equal(ours, theirs)
        said = torch.randint(1, VOCAB, (3, 15), generator=torch.Generator().manual_seed(2))
        ids = torch.cat([ours, said], 1)
        mask = torch.cat([mask, torch.ones(3, 25, dtype=mask.dtype)], 1)
    assert caches[1].get_seq_length() == 40 + 25 + 9


def test_a_prompt_in_chunks(stock, model):
    """The first chunks of a padded row have no token at all."""
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    tokens = [
        m.generate(ids, past_key_values=c, prefill_chunk_size=n, **options)
        for m, c, n in (
            (stock, DynamicCache(config=stock.config), None),
            (model, PiKVHFCache(model, RUNTIME), 7),
            (model, PiKVHFCache(model, RUNTIME), 16),
        )
    ]
    assert torch.equal(tokens[1], tokens[0])
    assert torch.equal(tokens[2], tokens[0])


def test_more_left_padding_changes_nothing(model):
    ids, mask = prompts()
    options = {"max_new_tokens": 20, "do_sample": False}
    tokens = model.generate(ids, attention_mask=mask, past_key_values=PiKVHFCache(model, RUNTIME), **options)
    pads = torch.zeros(3, 9, dtype=ids.dtype)
    more = model.generate(
        torch.cat([pads, ids], 1),
        attention_mask=torch.cat([pads, mask], 1),
        past_key_values=PiKVHFCache(model, RUNTIME),
        **options,
    )
    assert torch.equal(more[:, 9:], tokens)


def test_right_padding_and_the_holes_it_leaves(stock, model, caches):
    """By hand: the logits of the last real token are taken, then every row goes on behind its pads."""
    ids, mask = prompts()
    mask = mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(0)
    both(stock, model, caches, ids, attention_mask=mask, position_ids=positions)
    for step in range(3):
        new = torch.full((3, 1), 7 + step)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        both(stock, model, caches, new, attention_mask=mask, position_ids=positions)
    assert [caches[1].cache.length(0, r) for r in caches[1].request_ids] == mask.sum(1).tolist()


def test_a_copy_goes_its_own_way(stock, model, caches):
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    copies = copy.deepcopy(caches)
    more = torch.cat([mask, torch.ones(3, 30, dtype=mask.dtype)], 1)
    for cache, seed in ((copies, 3), (caches, 4)):
        new = torch.randint(1, VOCAB, (3, 30), generator=torch.Generator().manual_seed(seed))
        both(stock, model, cache, new, attention_mask=more)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["Mixtral", "Llama"])
def test_memory_goes_with_the_last_reference(family, fails):
    """Not with a garbage collection to come, nor with the next forward of a layer without a router."""
    model, (ids, mask) = make(family), prompts()
    cache = PiKVHFCache(model, RUNTIME)
    memory = weakref.ref(cache.cache)
    if fails:
        model.model.layers[1].mlp.register_forward_hook(lambda *_: {}["gone"])
        with pytest.raises(KeyError, match="gone"):
            model(ids, attention_mask=mask, past_key_values=cache)
    else:
        model(ids, attention_mask=mask, past_key_values=cache)
    gc.collect()  # what a forward or a caught error has left
    gc.disable()
    try:
        del cache
        assert memory() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_step_that_does_not_fit_is_refused_whole(stock, model):
    caches = DynamicCache(config=stock.config), PiKVHFCache(model, {**RUNTIME, "max_tokens": 64, "max_requests": 2})
    ids, _ = prompts(rows=2, columns=20)
    both(stock, model, caches, ids)
    before = caches[1].cache.stats()
    with pytest.raises(PoolFullError, match="tokens of 2 requests in every layer"):
        model(ids.repeat(1, 4), past_key_values=caches[1])
    assert caches[1].cache.stats() == before
    both(stock, model, caches, ids[:, :5])


def test_more_rows_than_requests_are_refused(model):
    cache = PiKVHFCache(model, {**RUNTIME, "max_requests": 2})
    message = r"runtime\.max_requests: expected at most 2 rows in the batch, got 3; generate has batch x num_beams"
    with pytest.raises(PoolFullError, match=message), torch.no_grad():
        model(prompts()[0], past_key_values=cache)
    assert cache.cache.requests() == [] and cache.batch_size == -1


@torch.no_grad()
def test_labels_are_the_routers_choice(stock, model, caches):
    """Blocks carry the expert with the largest summed weight; the dense layer has those of the MoE layer before it."""
    ids, mask = prompts()
    ids, mask = torch.cat([ids, ids], 1), pad(mask, (0, 40), value=1)
    for first, last in ((0, 20), *((i, i + 1) for i in range(20, 60)), (60, 80)):  # in pieces, and token by token
        model(ids[:, first:last], past_key_values=caches[1], attention_mask=mask[:, :last])
    logits = stock(ids, attention_mask=mask, output_router_logits=True).router_logits
    seen = set()
    for layer, source in ((0, 0), (1, 0), (2, 1)):
        weights, experts = logits[source].softmax(-1).topk(2)
        votes = torch.zeros_like(logits[source]).scatter_(1, experts, weights).unflatten(0, ids.shape)
        for row, request_id in enumerate(caches[1].request_ids):
            (table,) = caches[1].cache._requests[request_id].layers[layer].tables
            starts, labels = (field[table.tensor].tolist() for field in (table.pool.start, table.pool.label))
            of_row = votes[row][mask[row].bool()]
            assert len(starts) >= 5
            assert labels == [int(of_row[start : start + 8].sum(0).argmax()) for start in starts]
            seen.update(labels)
    assert len(seen) > 3


def test_rows_can_be_repeated_selected_and_reordered(stock, model, caches):
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)

    def change(method, argument):
        for cache in caches:
            getattr(cache, method)(argument)

    def go_on(seed, mask):
        new = torch.randint(1, VOCAB, (len(mask), 12), generator=torch.Generator().manual_seed(seed))
        mask = pad(mask, (0, 12), value=1)
        both(stock, model, caches, new, attention_mask=mask)
        return mask

    change("batch_repeat_interleave", 2)
    mask = go_on(1, mask.repeat_interleave(2, 0))
    change("reorder_cache", torch.tensor([5, 0, 0, 3, 2, 2]))
    mask = go_on(2, mask[[5, 0, 0, 3, 2, 2]])
    change("batch_select_indices", torch.tensor([4, 1, 4]))
    mask = go_on(3, mask[[4, 1, 4]])
    change("batch_select_indices", torch.tensor([True, False, True]))
    go_on(4, mask[[0, 2]])
    assert len(caches[1].cache.requests()) == 2


def test_forks_share_their_blocks(stock, model, caches):
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    both(stock, model, caches, ids[:, :1], attention_mask=pad(mask, (0, 1), value=1))
    blocks = caches[1].cache.stats()["tiers"]["device"]["blocks_used"]
    caches[1].batch_repeat_interleave(4)
    assert len(set(caches[1].request_ids)) == 12
    assert caches[1].cache.stats()["tiers"]["device"]["blocks_used"] == blocks > 0


def test_a_repeat_that_does_not_fit_changes_nothing(stock, model):
    caches = DynamicCache(config=stock.config), PiKVHFCache(model, {**RUNTIME, "max_requests": 4})
    ids, _ = prompts()
    both(stock, model, caches, ids)
    before = caches[1].cache.stats(), caches[1].request_ids
    with pytest.raises(PoolFullError, match=r"max_requests: expected at most 4 rows in the batch, got 6"):
        caches[1].batch_repeat_interleave(2)
    assert (caches[1].cache.stats(), caches[1].request_ids) == before
    both(stock, model, caches, ids[:, :3])


@pytest.mark.parametrize("back", [0, 3, 17, 39])
def test_crop_takes_columns_back(stock, model, caches, back):
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    for cache in caches:
        cache.crop(-back)
        assert cache.get_seq_length() == 40 - back
    new = torch.randint(1, VOCAB, (3, back + 20), generator=torch.Generator().manual_seed(5))
    both(stock, model, caches, new, attention_mask=pad(mask[:, : 40 - back], (0, back + 20), value=1))


def test_crop_to_nothing_and_the_wrong_way(stock, model, caches):
    ids, mask = prompts()
    caches[1].crop(-1)  # nothing is held yet
    both(stock, model, caches, ids, attention_mask=mask)
    for cache in caches:
        with pytest.raises(ValueError, match=r"positive value|minus a number of columns"):
            cache.crop(3)
        cache.crop(-40)
    assert caches[1].cache.requests() == []
    both(stock, model, caches, ids)


def test_sliding_windows(caches):
    """Their layers say so; what they have forgotten cannot be taken back; pads between tokens would count."""
    stock, model = make("GptOss"), make("GptOss")
    caches = DynamicCache(config=stock.config), PiKVHFCache(model, RUNTIME)
    ids, mask = prompts()
    both(stock, model, caches, ids, attention_mask=mask)
    assert caches[1].is_sliding == [True, False, True] == caches[0].is_sliding
    assert [caches[1].get_max_length(layer) for layer in range(3)] == [12, -1, 12]
    before = caches[1].cache.stats()
    with pytest.raises(ValueError, match=r"expected to keep \d+ or more"):
        caches[1].crop(-30)
    holes = pad(mask, (0, 2), value=1)
    holes[:, -2] = 0
    with pytest.raises(ValueError, match="pads between tokens"), torch.no_grad():
        model(ids[:, :2], attention_mask=holes, past_key_values=caches[1])
    assert caches[1].cache.stats() == before
    caches[1].crop(-RUNTIME["window"])
    again = DynamicCache(config=stock.config), caches[1]
    with torch.no_grad():
        stock(ids[:, :-8], attention_mask=mask[:, :-8], past_key_values=again[0])
    both(stock, model, again, ids[:, :20], attention_mask=pad(mask[:, :-8], (0, 20), value=1))
