"""`generate` on PiKV equals `generate` on transformers' DynamicCache, for every family that is served: tokens and
logits, over prompts and answers long enough that most tokens are read from sealed blocks.
"""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, make, prompts
from transformers import DynamicCache

from pikv_megatron.integrations.huggingface import PiKVHFCache

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 4096}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return make(family)


@pytest.fixture(scope="module")
def model(family):
    return make(family)


def answers(model, cache, ids, mask, **options):
    options = {"max_new_tokens": 64, "do_sample": False, "output_logits": True, **options}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


def test_greedy(stock, model):
    ids, mask = prompts()
    for given in (torch.ones_like(mask), mask):
        tokens, logits = answers(stock, DynamicCache(config=stock.config), ids, given)
        cache = PiKVHFCache(model, RUNTIME)
        ours, our_logits = answers(model, cache, ids, given)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)
        assert cache.cache.length(0, cache.request_ids[0]) == int(given[0].sum()) + 63  # pads are not stored
        assert cache.get_seq_length() == ids.shape[1] + 63
