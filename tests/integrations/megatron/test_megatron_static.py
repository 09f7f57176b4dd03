"""Static batching on PiKV: equal to stock Megatron-core by hand and through its engine, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.enums import AttnMaskType
from megatron_tiny import (
    RUNTIME,
    VOCABULARY,
    build,
    causal_mask,
    feed_static,
    forced_static,
    greedy_static,
    prompts_of,
    recompute,
    serve,
    stock_spec,
    tiny_config,
    twin,
)

from pikv_megatron import ActiveStep
from pikv_megatron.integrations.megatron import PiKVInferenceContext, attach, hook_spec, layer_spec, model_config
from pikv_megatron.tiers.blocks import PoolFullError

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models():
    config = tiny_config()
    stock = build(config)
    return config, stock, twin(stock, config, layer_spec(config))


def context_of(config, batch=4, **runtime):
    return PiKVInferenceContext(model_config(config), {**RUNTIME, **runtime}, batch, 512)


def test_stocks_name_of_the_models_config(models):
    assert PiKVInferenceContext(model_config=models[0]).model_cfg == model_config(models[0])
    for both in ({}, {"model_cfg": model_config(models[0]), "model_config": models[0]}):
        with pytest.raises(TypeError, match=r"expected one of model_cfg .* and model_config"):
            PiKVInferenceContext(**both)
    with pytest.raises(NotImplementedError, match="softmax_type"):
        PiKVInferenceContext(model_config=tiny_config(softmax_type="off-by-one"))


def assert_same(ours, stock, tolerance=TOLERANCE):
    assert torch.equal(ours[0], stock[0])
    assert (ours[1] - stock[1]).abs().max() <= tolerance


def test_256_greedy_tokens_are_stock_megatrons(models):
    config, stock, hooked = models
    prompts = torch.stack(prompts_of(37, 37))
    expected = greedy_static(stock, StaticInferenceContext(2, 512), prompts, 256)
    context = context_of(config)
    assert_same(greedy_static(hooked, context, prompts, 256), expected)
    assert len(expected[0].unique()) > 50  # a model that repeats itself would prove little
    assert context.cache.stats()["tiers"]["device"]["blocks_used"] > 100  # most of it was sealed
    assert not context.key_value_memory_dict


def test_static_engine_on_a_ragged_batch(models):
    config, stock, hooked = models
    prompts = prompts_of(5, 33, 17, 21)
    expected = serve(stock, StaticInferenceContext(4, 512), prompts, 256, static=True)
    context = context_of(config)
    ours = serve(hooked, context, prompts, 256, static=True)
    assert ours.tokens == expected.tokens
    assert len(ours.logits) == len(expected.logits) >= 256
    worst = max((a - b).abs().max().item() for a, b in zip(ours.logits, expected.logits, strict=True))
    assert worst <= TOLERANCE
    assert not context.key_value_memory_dict


@pytest.mark.parametrize(
    "changes",
    [
        {"num_query_groups": 4},
        {"num_moe_experts": None, "moe_ffn_hidden_size": None},
        {"moe_layer_freq": [0, 1, 0]},
        {"moe_layer_freq": 2},
        {"qk_layernorm": True},
        {"rotary_interleaved": True},
        {"no_rope_freq": [0, 1, 0]},
        {"attention_output_gate": True},
        {"softmax_scale": 0.4},
        {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
        {"moe_router_topk": 8},
        {"moe_shared_expert_intermediate_size": 32},
        {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_kinds_of_attention_and_experts(changes):
    config = tiny_config(**changes)
    stock = build(config)
    if isinstance(config.moe_layer_freq, list) or config.moe_layer_freq != 1:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        stock = build(config, get_gpt_decoder_block_spec(config, False, normalization=config.normalization))
    hooked = twin(stock, config, layer_spec(config))
    prompts = torch.stack(prompts_of(30, 30, 30))
    expected = greedy_static(stock, StaticInferenceContext(3, 64), prompts, 12)
    assert_same(greedy_static(hooked, context_of(config), prompts, 12), expected)


def test_learned_positions():
    config = tiny_config()
    stock = build(config, position_embedding_type="learned_absolute")
    torch.manual_seed(8)
    hooked = build(config, layer_spec(config), position_embedding_type="learned_absolute")
    hooked.load_state_dict(stock.state_dict())
    prompts = torch.stack(prompts_of(30, 30))
    expected = greedy_static(stock, StaticInferenceContext(2, 64), prompts, 12)
    assert_same(greedy_static(hooked, context_of(config), prompts, 12), expected)


@pytest.mark.parametrize(
    ("dtype", "flag", "tolerance"), [(torch.bfloat16, "bf16", 0.03), (torch.float16, "fp16", 0.004)], ids=str
)
def test_half_precision_stays_as_close_as_stock(dtype, flag, tolerance):
    """64 steps on the same tokens. Every expert is chosen, so that no rounding sends a token to another one."""
    changes = {flag: True, "params_dtype": dtype, "init_method_std": 0.05, "moe_router_topk": 8}
    config = tiny_config(**changes)
    stock = build(config)
    hooked = twin(stock, config, layer_spec(config))
    precise = build(tiny_config(init_method_std=0.05, moe_router_topk=8))
    precise.load_state_dict({name: t if t is None else t.float() for name, t in stock.state_dict().items()})
    prompts, fed = torch.stack(prompts_of(40, 40)), torch.stack(prompts_of(64, 64, seed=3))
    contexts = (StaticInferenceContext(2, 128), StaticInferenceContext(2, 128), context_of(config))
    truth, theirs, ours = (
        forced_static(model, context, prompts, fed).float()
        for model, context in zip((precise, stock, hooked), contexts, strict=True)
    )
    largest = truth.abs().max()
    assert (ours - theirs).abs().max() <= tolerance * largest
    assert (ours - truth).abs().mean() <= 1.1 * (theirs - truth).abs().mean()
    assert contexts[2].cache.retrieve(0, 0).k.dtype == dtype


def test_a_step_that_does_not_fit_is_refused_whole(models):
    """Not after some of its layers or rows have taken their tokens: the same step fits once there is room."""
    config, stock, hooked = models
    block = context_of(config).cache.tiers[0].block_bytes
    tiers = [{"kind": "device", "bytes": 13 * config.num_layers * block}]
    context = PiKVInferenceContext(model_config(config), {**RUNTIME, "tiers": tiers}, 4)
    prompts = torch.stack(prompts_of(60, 60))  # 5 blocks a row and layer, 13 there are
    greedy_static(hooked, context, prompts, 1)
    other = prompts_of(60)[0]
    context.cache.append(0, *(torch.zeros(50, 2, 16) for _ in "kv"), request_id=9)
    before = [context.cache.length(layer, row) for row in range(2) for layer in range(config.num_layers)]
    with pytest.raises(PoolFullError, match="20 tokens of 2 requests in every layer: needs 6 blocks"):
        feed_static(hooked, context, torch.stack([other[:10], other[10:20]]))
    assert [context.cache.length(layer, row) for row in range(2) for layer in range(config.num_layers)] == before
    context.cache.release(9)
    expected = forced_static(stock, StaticInferenceContext(2, 128), prompts, other[:20].view(2, 10))
    got = torch.stack([feed_static(hooked, context, other[:20].view(2, 10)[:, i : i + 1]) for i in range(10)])
    assert (got - expected[1:]).abs().max() <= TOLERANCE


def test_prefill_in_chunks(models):
    config, stock, hooked = models
    prompts = torch.stack(prompts_of(45, 45))
    expected = greedy_static(stock, StaticInferenceContext(2, 128), prompts, 8)
    assert_same(greedy_static(hooked, context_of(config), prompts, 8, chunk=13), expected)


def test_reset_starts_a_new_batch(models):
    config, stock, hooked = models
    context = context_of(config)
    greedy_static(hooked, context, torch.stack(prompts_of(30, 30, seed=1)), 5)
    assert context.cache.requests() == [0, 1]
    context.reset()
    assert context.cache.requests() == []
    assert context.cache.stats()["tiers"]["device"]["blocks_used"] == 0
    prompts = torch.stack(prompts_of(25, seed=2))
    expected = greedy_static(stock, StaticInferenceContext(1, 64), prompts, 8)
    assert_same(greedy_static(hooked, context, prompts, 8), expected)


def test_rows_are_counted_from_the_batch_offset(models):
    config, _, hooked = models
    context = context_of(config)
    tokens = torch.stack(prompts_of(9, 9, 9, 9))
    positions = torch.arange(9).expand_as(tokens)
    with torch.no_grad():
        whole = recompute(hooked, tokens)[:, -1]
        halves = []
        for first in (0, 2):
            context.batch_size_offset = first
            halves.append(hooked(tokens[first : first + 2], positions[:2], None, inference_context=context)[:, -1])
    assert context.cache.requests() == [0, 1, 2, 3]
    assert (torch.cat(halves) - whole).abs().max() <= TOLERANCE


def test_inference_mode_and_no_grad_can_take_turns(models):
    config, stock, hooked = models
    prompts = torch.stack(prompts_of(40, 40))
    expected = greedy_static(stock, StaticInferenceContext(2, 512), prompts, 40)
    context = context_of(config)
    with torch.inference_mode():
        tokens = prompts
        positions = torch.arange(40).expand_as(tokens)
        last = hooked(tokens, positions, None, inference_context=context)[:, -1]
        context.increment_sequence_len_offset(40)
    rest = greedy_static(hooked, context, last.argmax(-1, keepdim=True).clone(), 39)
    assert torch.equal(rest[0], expected[0][:, 1:])


@pytest.mark.parametrize("static_mask", [True, False], ids=["causal mask", "no mask"])
def test_causal_masks_are_served(models, static_mask):
    config, _, hooked = models
    tokens = torch.stack(prompts_of(20))
    positions = torch.arange(20).expand_as(tokens)
    with torch.no_grad():
        out = hooked(tokens, positions, causal_mask(20) if static_mask else None, inference_context=context_of(config))
        assert (out[:, -1] - recompute(hooked, tokens)[:, -1]).abs().max() <= TOLERANCE


class TestRefusals:
    """Each names what was wrong; the context then goes on working."""

    def run(self, model, context, tokens=None, mask=None, **options):
        tokens = torch.stack(prompts_of(6)) if tokens is None else tokens
        with torch.no_grad():
            return model(
                tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask, inference_context=context, **options
            )

    def test_training_mode(self, models):
        config, _, hooked = models
        context = context_of(config)
        hooked.train()
        try:
            with pytest.raises(RuntimeError, match=r"model\.eval"):
                self.run(hooked, context)
        finally:
            hooked.eval()
        assert context.cache.requests() == []
        self.run(hooked, context)

    def test_gradients(self, models):
        config, _, hooked = models
        tokens = torch.stack(prompts_of(6))
        with pytest.raises(RuntimeError, match="no_grad"):
            hooked(tokens, torch.arange(6)[None], None, inference_context=context_of(config))

    def test_a_mask_that_is_not_causal(self, models):
        config, _, hooked = models
        mask = causal_mask(6).clone()
        mask[..., :, 0] = True  # left padding
        context = context_of(config)
        with pytest.raises(NotImplementedError, match="attention_mask"):
            self.run(hooked, context, mask=mask)
        assert context.cache.requests() == []
        self.run(hooked, context)

    def test_more_tokens_or_rows_than_the_context_has(self, models):
        config, _, hooked = models
        context = PiKVInferenceContext(model_config(config), RUNTIME, 2, 10)
        with pytest.raises(ValueError, match="max_sequence_length"):
            self.run(hooked, context, torch.stack(prompts_of(11)))
        with pytest.raises(ValueError, match="batch: expected at most 2"):
            self.run(hooked, context, torch.stack(prompts_of(5, 5, 5)))
        assert context.cache.requests() == []

    def test_sizes_beyond_the_runtimes(self, models):
        config = models[0]
        with pytest.raises(ValueError, match="max_batch_size"):
            PiKVInferenceContext(model_config(config), RUNTIME, max_batch_size=9)
        with pytest.raises(ValueError, match="max_sequence_length"):
            PiKVInferenceContext(model_config(config), RUNTIME, max_sequence_length=8193)

    def test_a_model_without_hooks(self, models):
        config, stock, _ = models
        with pytest.raises(RuntimeError, match="not hooked"):
            self.run(stock, context_of(config))

    def test_a_cache_for_another_model(self, models):
        hooked = models[2]
        for changes, message in (
            ({"num_query_groups": 4}, "its cache is for another model .num_query_groups: 4 here, 2 in the model"),
            ({"num_layers": 2}, "num_layers: 2 here, 3"),
            ({"num_layers": 5}, "num_layers: 5 here, 3"),
            ({"num_moe_experts": 4}, "num_experts: 4 here, 8"),
            ({"moe_layer_freq": [1, 0, 0]}, "moe_layers: .0,. here, None"),
            ({"softmax_scale": 0.3}, "softmax_scale"),
        ):
            context = PiKVInferenceContext(model_config(tiny_config(**changes)), RUNTIME)
            with pytest.raises(ValueError, match=message):
                self.run(hooked, context)
            assert context.cache.requests() == []

    def test_attention_that_is_not_causal(self):
        config = tiny_config()
        spec = stock_spec(config)
        spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
        with pytest.raises(NotImplementedError, match="got attn_mask_type 'no_mask'"):
            attach(build(config, spec))
        with pytest.raises(NotImplementedError, match=r"attention layer 1: .* got attn_mask_type 'no_mask'"):
            self.run(build(config, hook_spec(spec)), context_of(config))

    def test_growing_too_long(self, models):
        config, stock, hooked = models
        prompts = torch.stack(prompts_of(30, 30))
        context = PiKVInferenceContext(model_config(config), RUNTIME, 2, 40)
        feed_static(hooked, context, prompts)
        more = torch.stack(prompts_of(11, 11, seed=5))
        with pytest.raises(ValueError, match=r"max_sequence_length \(40\) tokens, got 30 in the cache and 11 new"):
            feed_static(hooked, context, more)
        got = [feed_static(hooked, context, more[:, i : i + 1]) for i in range(10)]
        expected = forced_static(stock, StaticInferenceContext(2, 64), prompts, more[:, :10])
        assert (torch.stack(got) - expected[1:]).abs().max() <= TOLERANCE
        with pytest.raises(ValueError, match="got 40 in the cache and 1 new"):
            feed_static(hooked, context, more[:, :1])

    def test_beam_search(self, models):
        with pytest.raises(NotImplementedError, match="beam"):
            context_of(models[0]).swap_key_value_dict([1, 0])

    def test_an_offset_that_skips_positions(self, models):
        config, _, hooked = models
        context = context_of(config)
        self.run(hooked, context)
        context.increment_sequence_len_offset(7)  # of six tokens
        with pytest.raises(ValueError, match="expected 6 next, got 7; positions may not skip"):
            self.run(hooked, context)


def test_an_error_within_a_layer_leaves_the_model_usable(models, monkeypatch):
    config, _, hooked = models
    context = context_of(config)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise ArithmeticError("stop here")

    tokens = torch.stack(prompts_of(6))
    monkeypatch.setattr(ActiveStep, "attend", fail)
    with pytest.raises(ArithmeticError), torch.no_grad():
        hooked(tokens, torch.arange(6)[None], None, inference_context=context)
    assert len(calls) == 1 and not context.serving
    expected = recompute(hooked, tokens)  # no context: the host's own attention again
    stock = greedy_static(hooked, StaticInferenceContext(1, 64), tokens, 1)[1][0]
    assert (expected[:, -1] - stock).abs().max() <= TOLERANCE


def test_only_a_pass_with_the_context_is_observed(models, monkeypatch):
    config, _, hooked = models
    context = context_of(config)
    tokens, hidden = torch.stack(prompts_of(6)), torch.randn(6, 1, config.hidden_size)
    greedy_static(hooked, context, tokens, 2)
    seen = []
    monkeypatch.setattr(ActiveStep, "observe_routing", lambda *args: seen.append(args))
    with torch.no_grad():
        hooked.decoder.layers[0].mlp.router(hidden)  # layers called by themselves
        hooked.decoder.layers[0].mlp(hidden)

        def fail(module, args):
            raise ArithmeticError("stop here")

        context.reset()
        watch = hooked.decoder.layers[0].pre_mlp_layernorm.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):  # after attention, before its router
            hooked(tokens, torch.arange(6)[None], None, inference_context=context)
        watch.remove()
        recompute(hooked, tokens)
    assert seen == []


def test_the_cache_sees_what_the_router_chose(models, monkeypatch):
    config, _, hooked = models
    context = context_of(config)
    seen, chosen = [], []
    observe = ActiveStep.observe_routing

    def spy(step, layer_id, expert_ids, weights):
        for request_id, (ids, gates) in enumerate(
            zip(*(x.view(50, 2, -1).unbind(1) for x in (expert_ids, weights)), strict=True)
        ):
            seen.append((layer_id, request_id, ids.clone(), gates.clone()))
        observe(step, layer_id, expert_ids, weights)

    monkeypatch.setattr(ActiveStep, "observe_routing", spy)
    watches = [
        layer.mlp.router.register_forward_hook(lambda module, args, out: chosen.append(out))
        for layer in hooked.decoder.layers
    ]
    tokens = torch.stack(prompts_of(50, 50))
    with torch.no_grad():
        hooked(tokens, torch.arange(50).expand_as(tokens), None, inference_context=context)
    for watch in watches:
        watch.remove()
    assert [(layer, request) for layer, request, *_ in seen] == [(n, b) for n in range(3) for b in range(2)]
    for layer, request, expert_ids, weights in seen:
        probs, routing_map = (x.view(50, 2, -1)[:, request] for x in chosen[layer])
        assert torch.equal(expert_ids.sort(-1).values, routing_map.nonzero()[:, 1].view(50, 2))
        assert torch.equal(weights, probs.gather(1, expert_ids))
    context.cache.stats()  # the step is committed, and its blocks are sealed
    # The labels follow from that: a block's is the expert with the largest summed weight among its tokens.
    for layer, request, expert_ids, weights in seen:
        gates = torch.zeros(50, VOCABULARY).scatter(1, expert_ids, weights)
        table = context.cache._requests[request].layers[layer].tables[0]
        starts = table.pool.start[table.tensor].tolist()
        expected = [gates[s : s + RUNTIME["block_size"]].sum(0).argmax().item() for s in starts]
        assert len(starts) >= 4 and table.pool.label[table.tensor].tolist() == expected


def test_collective_listeners_hear_every_layer(models):
    config, _, hooked = models
    context = context_of(config)
    events = []

    class Listener:
        def started(self, layer_id, kind, nbytes):
            events.append(("started", kind, layer_id, nbytes))

        def finished(self, layer_id, kind):
            events.append(("finished", kind, layer_id))

    context.collective_listeners.append(Listener())
    greedy_static(hooked, context, torch.stack(prompts_of(8, 8)), 2)
    expected = [
        (what, kind, n) for n in range(3) for kind in ("dispatch", "combine") for what in ("started", "finished")
    ]
    assert [event[:3] for event in events] == expected * 2
    assert all(event[3] > 0 for event in events if event[0] == "started")
    events.clear()
    recompute(hooked, torch.stack(prompts_of(8)))
    assert events == []  # a forward pass without the context is nobody's business
