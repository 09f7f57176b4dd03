"""`generate` on PiKV equals `generate` on transformers' DynamicCache, for every family that is served: tokens and
logits, over prompts and answers long enough that most tokens are read from sealed blocks.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hf_models import FAMILIES, MORE_FAMILIES, make, prompts
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from pikv_megatron import PiKVCache
from pikv_megatron.config.io import ConfigError
from pikv_megatron.integrations.huggingface import PiKVHFCache, detach, model_config
from pikv_megatron.integrations.huggingface.model import routers

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 4096}
NEW = 64
INT8_BOUND = 0.05
"""Of the logits' standard deviation: how far the largest INT8 logit may be off."""


class Models(NamedTuple):
    """Two models of a family with the same weights: one on transformers' attention, one on PiKV."""

    stock: PreTrainedModel
    ours: PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return Models(make(request.param), make(request.param))


def answers(model, cache, ids, mask, **options) -> tuple[Tensor, Tensor, int]:
    """Tokens and logits of `generate`, and how many columns its cache holds then; sampling is seeded."""
    torch.manual_seed(11)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits), out.past_key_values.get_seq_length()


def assert_equal_answers(models, ids, mask, **options) -> PiKVHFCache:
    """The same tokens, and logits within 1e-4; returns our cache behind them."""
    theirs, ours = DynamicCache(config=models.stock.config), PiKVHFCache(models.ours, RUNTIME)
    tokens, logits, length = answers(models.stock, theirs, ids, mask, **options)
    our_tokens, our_logits, _ = answers(models.ours, ours, ids, mask, **options)
    assert torch.equal(our_tokens, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)
    assert ours.get_seq_length() == length
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_greedy_of_other_families(family):
    ids, mask = prompts()
    assert_equal_answers(Models(make(family), make(family)), ids, mask)


@pytest.mark.parametrize("family", ["Afmoe", "Gemma3nText"])
def test_one_row_without_pads(family):
    """AFMoE takes a view of what attention returns; Gemma 3n has a sharing mode per layer, all of them None here."""
    ids, mask = prompts(rows=1)
    assert_equal_answers(Models(make(family), make(family)), ids, mask, max_new_tokens=8)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("family", ["Phi3", "Phimoe"])
def test_a_text_that_outgrows_the_original_length_stays_in_our_cache(family, columns, options, caplog):
    """Other RoPE factors apply then to all of it: transformers drops the cache, a fresh one too, and feeds it again."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    if family == "Phimoe":
        factors |= {"short_mscale": 1.0, "long_mscale": 1.1}
    changes = {"original_max_position_embeddings": 48}
    changes["rope_parameters"] = {**factors, **changes}
    models = Models(make(family, sliding_window=None, **changes), make(family, sliding_window=None, **changes))
    assert_equal_answers(models, *prompts(columns=columns), max_new_tokens=20, **options)
    told = [record for record in caplog.records if "outgrown original_max_position_embeddings (48)" in record.message]
    assert len(told) == (columns < 48)  # a cache that was empty is not emptied
    attached = copy.deepcopy(models.ours)
    detach(models.ours)
    for model in (models.ours, attached):  # as before, without a cache of ours
        tokens = [m.generate(prompts(1)[0], max_new_tokens=20, do_sample=False) for m in (model, models.stock)]
        assert torch.equal(*tokens)


def test_a_config_says_what_the_model_is(models):
    """Where it can: MLA's shapes are the model's to tell."""
    if "Deepseek" in type(models.stock).__name__:
        with pytest.raises(ConfigError, match="pass the model itself"):
            model_config(models.stock.config)
    else:
        assert model_config(models.stock.config) == model_config(models.stock)


@pytest.mark.parametrize("padded", [False, True])
def test_greedy(models, padded):
    ids, mask = prompts()
    mask = mask if padded else torch.ones_like(mask)
    cache = assert_equal_answers(models, ids, mask)
    for layer in range(len(cache)):  # pads are not stored
        held = [cache.cache.length(layer, request_id) for request_id in cache.request_ids]
        assert held == (mask.sum(1) + NEW - 1).tolist()
    if None in (cache.cache.model.sliding_windows or [None]):
        assert cache.cache.stats()["tiers"]["device"]["blocks_used"] > 3 * NEW // RUNTIME["block_size"]


def test_beams(models):
    ids, mask = prompts(rows=2)
    cache = assert_equal_answers(models, ids, mask, num_beams=4, num_return_sequences=2)
    assert cache.batch_size == 8


def test_sampling(models):
    ids, mask = prompts()
    assert_equal_answers(models, ids, mask, do_sample=True, top_k=20, temperature=1.5)


@pytest.mark.parametrize("by", ["another model", "prompt lookup"])
def test_assisted_decoding(models, by, monkeypatch):
    """Drafts are taken back by `crop`, some of them out of sealed blocks."""
    taken_back, crop = [], PiKVCache.crop

    def watched(self, request_id, length):
        taken_back.append(self.length(0, request_id) - length)
        crop(self, request_id, length)

    monkeypatch.setattr(PiKVCache, "crop", watched)
    ids, mask = prompts(rows=1)
    if by == "another model":
        options = {"assistant_model": make("Llama", num_hidden_layers=1)}
        options["assistant_model"].generation_config.num_assistant_tokens = 6
        options["assistant_model"].generation_config.num_assistant_tokens_schedule = "constant"
    else:
        options = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1}
    assert_equal_answers(models, ids, mask, **options)
    assert sum(taken_back) > 6


def gates(model) -> list[Any]:
    """The model's routers; DBRX's are not found by their shape."""
    return [r.gate for r in routers(model)] or [m for name, m in model.named_modules() if name.endswith(".router")]


def experts_of(out: Any, rows: int) -> Tensor:
    """The experts of each row's newest token, in ascending order, of what a router returned."""
    experts = out[-1] if isinstance(out, tuple) else out.topk(2).indices
    return experts.unflatten(0, (rows, -1))[:, -1].sort(-1).values


@torch.no_grad()
def beside_exact(models, cache, held: bool) -> tuple[Tensor, Tensor]:
    """Our model's logits on a cache for the stock one's own answer, with free routers or with their choices held to
    those made there.

    Returns:
        [steps, rows]: the worst logit's error in standard deviations; whether a free router chose otherwise for the
        token.
    """
    ids, mask = prompts()
    exact: list[Any] = []
    free: list[Any] = []
    hooks = [gate.register_forward_hook(lambda gate, args, out: exact.append(out)) for gate in gates(models.stock)]
    tokens, logits, _ = answers(models.stock, DynamicCache(config=models.stock.config), ids, mask)
    hooks += [gate.register_forward_hook(lambda gate, args, out: free.append(out)) for gate in gates(models.ours)]
    if held:
        replay = iter(exact)
        hooks += [gate.register_forward_hook(lambda gate, args, out: next(replay)) for gate in gates(models.ours)]
    mask, cuts = pad(mask, (0, NEW), value=1), [0, *range(ids.shape[1], tokens.shape[1])]
    found = [
        models.ours(tokens[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
        for a, b in pairwise(cuts)
    ]
    for hook in hooks:
        hook.remove()
    rows = len(ids)
    others = [(experts_of(a, rows) != experts_of(b, rows)).any(-1) for a, b in zip(exact, free, strict=True)]
    others = others or [torch.zeros(rows, dtype=torch.bool)] * NEW  # no routers
    errors = (torch.stack(found).float() - logits).abs().amax(-1) / logits.std()
    return errors, torch.stack(others).unflatten(0, (NEW, -1)).any(1)


def int8_cache(model) -> PiKVHFCache:
    return PiKVHFCache(model, {**RUNTIME, "codec": {"keys": "int8", "values": "int8"}})


def test_int8(models):
    """The routers' choices are held: near a tie, a small error makes another expert of it, and a bound on logits would
    be one on luck.
    """
    cache = int8_cache(models.ours)
    errors, _ = beside_exact(models, cache, held=True)
    assert errors.max() < INT8_BOUND
    assert (errors.max() > 1e-4) == (cache.cache.stats()["tiers"]["device"]["blocks_used"] > 0)  # sliding: all raw


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"), [("Dbrx", {}), ("Ernie4_5_Moe", {"moe_num_experts": 32, "moe_k": 4}), ("Dots1", {})]
)
def test_int8s_outliers_are_other_experts(family, changes):
    """With free routers single logits are off by most of a standard deviation: in steps whose token went to another
    expert than in the exact run, and in no others. With the choices held there is none.
    """
    models = Models(make(family, **changes), make(family, **changes))
    errors, others = beside_exact(models, int8_cache(models.ours), held=False)
    assert errors.max() > 2 * INT8_BOUND
    assert not ((errors > INT8_BOUND) & ~others).any()
    assert beside_exact(models, int8_cache(models.ours), held=True)[0].max() < INT8_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("cache_of", [lambda m: DynamicCache(config=m.config), lambda m: PiKVHFCache(m, RUNTIME)])
def test_bfloat16s_outliers_are_other_experts(cache_of):
    """As INT8's, on any cache, transformers' own included; GLM-4-MoE in bfloat16 beside itself in float32."""
    models = Models(make("Glm4Moe"), make("Glm4Moe").bfloat16())
    errors, others = beside_exact(models, cache_of(models.ours), held=False)
    assert errors.max() > 0.2
    assert not ((errors > 0.06) & ~others).any()
    assert beside_exact(models, cache_of(models.ours), held=True)[0].max() < 0.06


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("DeepseekV3", {"first_k_dense_replace": 3})])
def test_autocast(family, changes):
    """A model in float32 under bfloat16: PiKV keeps float32, and is no further from exact than the model itself."""
    models = Models(make(family, **changes), make(family, **changes))
    ids, mask = prompts()
    tokens, exact, _ = answers(models.stock, DynamicCache(config=models.stock.config), ids, mask)
    cuts, errors = [0, *range(ids.shape[1], tokens.shape[1])], []
    mask = pad(mask, (0, NEW), value=1)
    caches = DynamicCache(config=models.stock.config), PiKVHFCache(models.ours, RUNTIME)
    for model, cache in zip(models, caches, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = [
                model(tokens[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
                for a, b in pairwise(cuts)
            ]
        errors.append((torch.stack(found).float() - exact).square().mean().sqrt())
    assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_compiled_model(family):
    """torch.compile leaves the cache, its attention and the routers' hooks to eager; logits and labels as without."""
    stock, model = make(family), make(family)
    cache, expected = PiKVHFCache(model, RUNTIME), PiKVHFCache(stock, RUNTIME)
    compiled = torch.compile(model)
    ids, mask = prompts(2)
    with torch.no_grad():
        for columns in (40, 1, 1):
            found = compiled(ids[:, :columns], attention_mask=mask, past_key_values=cache).logits
            other = stock(ids[:, :columns], attention_mask=mask, past_key_values=expected).logits
            assert (found - other)[:, -1].abs().max() < 1e-4
            mask = pad(mask, (0, 1), value=1)
    layers = [c.cache._requests[c.request_ids[1]].layers[1] for c in (cache, expected)]
    labels, others = ([t.pool.label[t.tensor].tolist() for t in layer.tables] for layer in layers)
    assert labels == others
    assert len(set(labels[0])) > 1
