"""Hugging Face models that PiKV does not serve are refused by reason, and wrong use by what to do instead; before
anything has changed.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hf_models import SHARED, make, prompts
from transformers import DynamicCache

from pikv_megatron.integrations.huggingface import PiKVHFCache, attach, detach, is_attached, masks, model_config
from pikv_megatron.integrations.huggingface.attention import pikv_attention, pikv_mask

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 512}
SMALL = {**SHARED, "num_hidden_layers": 2}
UNSERVED = {
    "Gemma2": ({"head_dim": 16}, "attn_logit_softcapping is 50.0"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "computes attention by itself"),
    "Falcon": ({"alibi": True}, "ALiBi"),
    "Mamba": ({}, "layers of linear_attention"),
    "Jamba": ({"mamba_d_state": 4}, "layers of linear_attention"),
    "Qwen3Next": ({"num_experts": 4, "moe_intermediate_size": 32}, "layers of linear_attention"),
    "StableLm": ({}, "computes attention by itself"),
    "GPTNeoX": ({}, r"expected one self-attention module in each of 2 layers"),
    "DiffLlama": ({}, "diffllama: attends twice in every layer"),
    "Moshi": ({"num_key_value_heads": 8, "ffn_dim": 64}, "MoshiAttention: k_proj is a MoshiLinear without a weight"),
    "Gemma4Text": ({"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2}, "kv_sharing_modes is .*'reuse'"),
}


@pytest.fixture
def model():
    return make("Mixtral")


@pytest.mark.parametrize("family", UNSERVED)
def test_a_model_that_cannot_be_served_exactly(family):
    changes, reason = UNSERVED[family]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    before = model.config._attn_implementation
    for call in (attach, model_config, lambda m: PiKVHFCache(m, RUNTIME)):
        with pytest.raises(NotImplementedError, match=reason):
            call(model)
    assert model.config._attn_implementation == before
    assert not is_attached(model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.BertConfig(is_decoder=True, add_cross_attention=True), "cross attention"),
        (transformers.Llama4TextConfig(num_hidden_layers=4), "attention_chunk_size is 8192"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_config_that_cannot_be_served_exactly(config, reason):
    with pytest.raises(NotImplementedError, match=reason):
        model_config(config)


def test_attach_and_detach(model):
    ids, mask = prompts()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with pytest.raises(RuntimeError, match="not on PiKV, nothing to detach"):
            detach(model)
        attach(model)
        with pytest.raises(RuntimeError, match=r"on PiKV already; detach\(model\) first"):
            attach(model)
        assert list(model.state_dict()) == names
        model(ids, attention_mask=mask, past_key_values=PiKVHFCache(model, RUNTIME))
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        detach(model)
        assert not is_attached(model)
        assert hooks == 3 + 1 and not any(module._forward_hooks for module in model.modules())
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_a_model_whose_config_says_pikv_is_not_attached_over_it(model):
    """There would be no former attention to go back to, and the hooks of a copy would stand twice."""
    attach(model)
    for other in (copy.deepcopy(model), type(model)(model.config)):
        with pytest.raises(RuntimeError, match="without being attached, as the copy of an attached model"):
            attach(other)
        assert not is_attached(other)
    detach(model)
    attach(copy.deepcopy(model))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("Mixtral", {"num_hidden_layers": 2}, "num_layers"),
        ("Mixtral", {"num_local_experts": 4}, "num_experts"),
        ("Mixtral", {"sliding_window": 4}, "sliding_windows"),
    ],
)
def test_a_cache_of_another_model_is_refused(model, family, changes, name):
    """Its shapes may fit all the same: a window would be missed, or every block labelled 0, without a word."""
    cache, other = PiKVHFCache(model, RUNTIME), make(family, **changes)
    attach(other)
    ids, mask = prompts()
    with pytest.raises(ValueError, match=f"made for another model, its {name} is"):
        other(ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0
    model(ids, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("family", ["LongcatFlash", "Dbrx"])
def test_experts_without_a_router_are_said_once(caplog, family):
    """LongCat's router chooses among more than its experts (some do nothing), DBRX's names neither their number nor how
    many it chooses: none is found by its shape.
    """
    model = make(family)
    caches = [PiKVHFCache(model, RUNTIME) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if "pikv" in record.name] == [
        f"{family}ForCausalLM: no router found for its 8 experts, all blocks get the label 0"
    ]
    assert caches[0].cache.model.num_experts == 0


def test_a_failed_cache_leaves_the_model_as_it_was(model):
    with pytest.raises(ValueError, match=r"runtime\.window"):
        PiKVHFCache(model, {"window": 0})
    assert not is_attached(model)


def test_a_cache_from_a_config_serves_an_attached_model(model):
    ids, mask = prompts()
    attach(model)
    caches = [PiKVHFCache(source, RUNTIME) for source in (model.config, model)]
    assert caches[0].cache.model == caches[1].cache.model
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask, past_key_values=cache).logits for cache in caches)
    assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_another_attention_under_our_cache_is_found_before_a_wrong_answer(layers):
    model = make("Mixtral", num_hidden_layers=layers)
    ids, _ = prompts()
    cache = PiKVHFCache(model, RUNTIME)
    detach(model)
    with pytest.raises(RuntimeError, match=r"attn_implementation: this cache needs 'pikv', the model has 'sdpa'"):
        model(ids, past_key_values=cache)
    stranger = make("Mixtral", num_hidden_layers=layers)
    attach(model)
    with pytest.raises(RuntimeError, match=r"layer 0: its attention did not run through PiKV"):
        [stranger(ids, past_key_values=cache) for _ in range(2)]


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_an_attached_model_without_our_cache_is_as_before(family):
    """Also with another cache, with gradients, behind a forward with ours, and behind one that fails."""
    stock, ours = make(family), make(family)
    attach(ours)
    ids, mask = prompts()
    for options in ({}, {"use_cache": False}, {"past_key_values": DynamicCache}):
        made = [{k: v(config=stock.config) if callable(v) else v for k, v in options.items()} for _ in range(2)]
        theirs, mine = (m(ids, attention_mask=mask, **o) for m, o in zip((stock, ours), made, strict=True))
        assert torch.equal(mine.logits, theirs.logits)
    mine.logits.sum().backward()
    theirs.logits.sum().backward()
    assert torch.equal(ours.lm_head.weight.grad, stock.lm_head.weight.grad)
    with torch.no_grad():
        ours(ids, attention_mask=mask, past_key_values=PiKVHFCache(ours, RUNTIME))
    with pytest.raises(IndexError):
        ours(ids + 1000)
    assert ours.config._attn_implementation == "pikv"
    assert torch.equal(ours(ids, attention_mask=mask).logits, theirs.logits)


def test_our_attention_on_a_model_that_is_not_attached(model):
    model.set_attn_implementation("pikv")
    with pytest.raises(RuntimeError, match=r"attn_implementation: 'pikv' is for forwards of an attached model"):
        model(prompts()[0])


@torch.no_grad()
def test_an_attached_model_is_not_told_to_attach(model):
    """A layer that attends twice; a forward without a cache of ours while one with it goes on."""
    ids, mask = prompts()
    cache, module = PiKVHFCache(model, RUNTIME), model.model.layers[0].self_attn
    k = torch.zeros(3, 2, 1, 8)
    calls = {
        "layer 0: attends without having given keys": (lambda *_: pikv_attention(module, k, k, k, None), cache),
        "without a PiKVHFCache is under way, in another thread": (lambda *_: cache.update(k, k, 0), None),
    }
    for reason, (call, given) in calls.items():
        hook = model.model.layers[0].mlp.register_forward_hook(call)
        with pytest.raises(RuntimeError, match=reason):
            model(ids, attention_mask=mask, past_key_values=given)
        hook.remove()
        cache.reset()
    model(ids, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_cache_by_position_and_an_attention_that_was_set_since(model):
    ids, _ = prompts(1)
    expected = model.model(ids).last_hidden_state
    given = model.model(ids, None, None, PiKVHFCache(model, RUNTIME)).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    model.set_attn_implementation("eager")
    given = model.model(ids, past_key_values=PiKVHFCache(model, RUNTIME)).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_two_threads_make_the_first_caches_of_a_model(model, monkeypatch):
    module = importlib.import_module("pikv_megatron.integrations.huggingface.attach")
    slow = module.decoder_of
    monkeypatch.setattr(module, "decoder_of", lambda model: (time.sleep(0.2), slow(model))[1])
    with ThreadPoolExecutor(2) as threads:
        caches = list(threads.map(lambda _: PiKVHFCache(model, RUNTIME), range(2)))
    assert len(model.model._forward_hooks) == 1
    with torch.no_grad():
        a, b = (model(prompts()[0], past_key_values=cache).logits for cache in caches)
    assert torch.equal(a, b)


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy])
def test_a_cache_is_not_pickled(model, take):
    with pytest.raises(TypeError, match=r"PiKVHFCache: cannot be pickled, nor copied but by copy\.deepcopy"):
        take(PiKVHFCache(model, RUNTIME))


@torch.no_grad()
def test_padding_on_the_right_is_said_once(model, caplog):
    masks._say_once.cache_clear()
    ids, mask = prompts()
    left, right = (PiKVHFCache(model, RUNTIME) for _ in range(2))
    for chunk in (slice(0, 3), slice(3, 40)):  # a row's first chunk is nothing but pads
        model(ids[:, chunk], attention_mask=mask[:, : chunk.stop], past_key_values=left)
    assert "attention_mask" not in caplog.text
    for _ in range(2):
        model(ids, attention_mask=mask.flip(1), past_key_values=right)
        right.reset()
    assert caplog.text.count("attention_mask: rows end in pads") == 1


def test_gradients_and_training_are_refused(model):
    cache = PiKVHFCache(model, RUNTIME)
    with pytest.raises(RuntimeError, match="no gradient flows through PiKV"):
        model(prompts()[0], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scaling": 0.3}, r"scaling: layer 0 has 0\.3, the cache was made for"),
        ({"softcap": 30.0}, "softcap: layer 0 asks for it"),
        ({"position_bias": torch.zeros(1)}, "position_bias: layer 0 asks for it"),
        ({"dropout": 0.1}, r"dropout: layer 0 has 0\.1"),
    ],
)
def test_attention_of_another_kind(model, changes, reason):
    """As a model's code might ask for it, whatever its config says."""
    cache = PiKVHFCache(model, RUNTIME)
    module, q, k = model.model.layers[0].self_attn, torch.zeros(1, 8, 3, 8), torch.zeros(1, 2, 3, 8)
    cache.update(k, k, 0)
    with pytest.raises(NotImplementedError, match=reason):
        pikv_attention(module, q, k, k, None, **changes)
    assert cache.cache.requests() == []
    model(prompts()[0], past_key_values=cache)


@pytest.mark.parametrize("asked", [{"allow_is_causal_skip": False}, {"allow_is_bidirectional_skip": True}])
def test_masks_of_another_kind(asked):
    with pytest.raises(NotImplementedError, match="more than a causal mask and padding"):
        pikv_mask(batch_size=1, q_length=2, kv_length=2, attention_mask=None, **asked)


@torch.no_grad()
def test_masks_that_do_not_fit(model):
    ids, mask = prompts()
    cache = PiKVHFCache(model, RUNTIME)

    def refuses(reason, error=ValueError, ids=ids[:, :1], **options):
        before = cache.cache.stats(), cache.get_seq_length()
        with pytest.raises(error, match=reason):
            model(ids, past_key_values=cache, **options)
        assert (cache.cache.stats(), cache.get_seq_length()) == before

    refuses(r"expected shape \[3, 40\]", ids=ids, attention_mask=mask[:, :30])
    refuses(
        r"expected shape \[3, 40\].*got \[3, 1, 40, 40\]",
        ids=ids,
        attention_mask=mask[:, None, None].repeat(1, 1, 40, 1),
    )
    model(ids, attention_mask=mask, past_key_values=cache)
    refuses("expected one, since this cache was filled with padded rows")
    refuses("its cached columns differ", attention_mask=torch.ones(3, 41))
    refuses(r"expected a batch of 3 rows", ids=ids[:2, :1], attention_mask=mask[:2])
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, past_key_values=PiKVHFCache(model, RUNTIME), output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_that_fails_has_not_happened(model, layer):
    """The first one, and one later: what comes next is what comes without it."""
    ids, mask = prompts()
    torn, calm = PiKVHFCache(model, RUNTIME), PiKVHFCache(model, RUNTIME)
    for columns in (ids, ids[:, :1], ids[:, :9]):
        mask = torch.ones(len(ids), torn.get_seq_length() + columns.shape[1], dtype=torch.int64)
        watch = model.model.layers[layer].mlp.register_forward_hook(lambda *_: {}["gone"])
        with pytest.raises(KeyError, match="gone"):
            model(columns, attention_mask=mask, past_key_values=torn)
        watch.remove()
        assert torn.get_seq_length() == calm.get_seq_length()
        mine, theirs = (model(columns, attention_mask=mask, past_key_values=c).logits for c in (torn, calm))
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_a_forward_that_leaves_layers_out_is_told(model):
    ids, _ = prompts()
    cache = PiKVHFCache(model, RUNTIME)
    layers, model.model.layers = model.model.layers, model.model.layers[:1]
    with pytest.raises(RuntimeError, match="layer 1: the forward ended before it"):
        model(ids, past_key_values=cache)
    model.model.layers = layers
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=cache)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="expected a transformers model or a wrapper of one, got Linear"):
        attach(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_reset_mends_a_cache_whose_attention_never_came(model):
    ids, mask = prompts()
    cache = PiKVHFCache(model, RUNTIME)
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(RuntimeError, match="layer 0: its attention did not run through PiKV"):
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    ours = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(ours, model(ids, attention_mask=mask, past_key_values=PiKVHFCache(model, RUNTIME)).logits)


@torch.no_grad()
def test_rows_stay_where_they_are_while_a_forward_is_half_done(model):
    ids, mask = prompts()
    cache = PiKVHFCache(model, RUNTIME)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
    rows = torch.tensor([0, 0, 1])
    for change, value in (
        (cache.reorder_cache, rows),
        (cache.batch_repeat_interleave, 2),
        (cache.batch_select_indices, rows),
        (cache.crop, -1),
    ):
        with pytest.raises(RuntimeError, match="a forward is under way"):
            change(value)


def test_a_cache_of_another_dtype_is_refused(model):
    cache = PiKVHFCache(model, RUNTIME)
    model.bfloat16()
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=r"made for torch\.float32, .* torch\.bfloat16"),
    ):
        model(prompts(1)[0], past_key_values=cache)
    assert cache.cache.requests() == []


def test_a_static_cache_on_an_attached_model_says_what_to_do(model):
    attach(model)
    with pytest.raises(NotImplementedError, match=r"detach\(model\) first"):
        model.generate(prompts(1)[0], max_new_tokens=2, cache_implementation="static")
    detach(model)
    assert model.generate(prompts(1)[0], max_new_tokens=2, cache_implementation="static").shape == (1, 42)
