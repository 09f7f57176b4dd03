"""Continuous batching on PiKV: equal to stock Megatron-core by hand and through its engine, as requests come and go."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from megatron.core.inference.config import AsyncScheduleMode, KVCacheManagementMode
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import BlockOverflowError
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.sampling_params import SamplingParams
from megatron_tiny import (
    RUNTIME,
    build,
    greedy_dynamic,
    greedy_static,
    inference_config,
    install_torch_flash_attention,
    prompts_of,
    recompute,
    serve,
    tiny_config,
    twin,
)

from pikv_megatron import ActiveStep
from pikv_megatron.integrations.megatron import PiKVDynamicInferenceContext, layer_spec, model_config

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models():
    config = tiny_config()
    stock = build(config)
    return config, stock, twin(stock, config, layer_spec(config))


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    install_torch_flash_attention(monkeypatch)


def context_of(config, runtime=(), **changes):
    return PiKVDynamicInferenceContext(config, inference_config(**changes), {**RUNTIME, **dict(runtime)})


def worst(ours, stock):
    return max((a - b).abs().max().item() for a, b in zip(ours, stock, strict=True))


def test_requests_join_and_leave_by_hand(models):
    config, stock, hooked = models
    prompts, lengths = prompts_of(5, 33, 17, 21, 9, 40, 3), [256, 7, 30, 100, 64, 33, 1]
    expected = greedy_dynamic(stock, DynamicInferenceContext(config, inference_config()), prompts, lengths, 4)
    context = context_of(config)
    ours = greedy_dynamic(hooked, context, prompts, lengths, 4)
    for i, length in enumerate(lengths):
        assert len(ours[i][0]) == length and ours[i][0] == expected[i][0]
        assert (ours[i][1] - expected[i][1]).abs().max() <= TOLERANCE
    assert context.cache.requests() == []
    assert context.cache.stats()["tiers"]["device"]["blocks_used"] == 0


def test_greedy_by_hand_is_greedy_without_a_cache(models):
    """The helper of this file's tests, prompts of unequal length in one step."""
    config, stock, _ = models
    prompts = prompts_of(5, 33)
    answers = greedy_dynamic(stock, DynamicInferenceContext(config, inference_config()), prompts, [4, 4], 2)
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            logits = recompute(stock, torch.cat([prompt, torch.tensor(answers[i][0])])[None])[0, len(prompt) - 1 : -1]
            assert answers[i][0] == logits.argmax(-1).tolist() and (answers[i][1] - logits).abs().max() <= TOLERANCE


def test_engine_generates_256_tokens_for_more_prompts_than_requests(models):
    config, stock, hooked = models
    prompts = prompts_of(5, 33, 17, 21)
    baseline = DynamicInferenceContext(config, inference_config(max_requests=2))
    expected = serve(stock, baseline, prompts, 256, static=False)
    context = context_of(config, max_requests=2)
    ours = serve(hooked, context, prompts, 256, static=False, observe=lambda: len(context.cache.requests()))
    assert ours.tokens == expected.tokens and {len(t) for t in ours.tokens} == {256}
    assert worst(ours.logits, expected.logits) <= TOLERANCE
    assert ours.most_live == 2  # two at a time, and the first two were released when the others came
    assert context.cache.requests() == []


def test_engine_with_requests_of_different_lengths(models):
    config, stock, hooked = models
    prompts, steps = prompts_of(12, 33, 7, 21, 9, 40), [30, 5, 60, 17, 44, 9]
    baseline = DynamicInferenceContext(config, inference_config(max_requests=3))
    expected = serve(stock, baseline, prompts, steps, static=False)
    context = context_of(config, max_requests=3)
    ours = serve(hooked, context, prompts, steps, static=False)
    assert ours.tokens == expected.tokens and [len(t) for t in ours.tokens] == steps
    assert worst(ours.logits, expected.logits) <= TOLERANCE
    assert context.cache.requests() == []


@pytest.mark.parametrize(("blocks", "paused_share"), [(8, None), (14, 0.5)], ids=["evicted", "paused and resumed"])
def test_engine_when_memory_is_short(models, blocks, paused_share):
    """Few blocks of 16 for four requests of up to 75 tokens: some wait in the cache, some are prefilled again."""
    config, stock, hooked = models
    prompts = prompts_of(15, 14, 13, 12)
    baseline = DynamicInferenceContext(config, inference_config())
    expected = serve(stock, baseline, prompts, 60, static=False)
    paused = None if paused_share is None else paused_share * inference_config().buffer_size_gb
    context = context_of(config, {"max_tokens": blocks * 16}, paused_buffer_size_gb=paused)
    evicted, most_paused = [], []
    evict = context.evict_overflow_paused_requests

    def spy(*args):
        most_paused.append(context.paused_request_count)
        ids = evict(*args)
        evicted.extend([] if ids is None else ids.tolist())
        return ids

    context.evict_overflow_paused_requests = spy
    ours = serve(hooked, context, prompts, 60, static=False)
    assert ours.tokens == expected.tokens
    assert max(most_paused) > 0
    assert bool(evicted) == (paused_share is None)  # where there is room for paused requests, they come back
    assert context.cache.requests() == []


def test_engine_prefills_in_chunks(models):
    config, stock, hooked = models
    prompts = prompts_of(150, 9, 100, 21)
    baseline = DynamicInferenceContext(config, inference_config())
    expected = serve(stock, baseline, prompts, 40, static=False)
    context = context_of(config, enable_chunked_prefill=True, max_tokens=64)
    ours = serve(hooked, context, prompts, 40, static=False)
    assert ours.tokens == expected.tokens
    assert ours.steps > expected.steps  # the prompts did not fit into one step
    assert context.cache.requests() == []


def test_the_engine_admits_what_the_tiers_hold(models):
    """tiers[0].bytes below max_tokens: Megatron's books count what fits, and requests wait for it."""
    config, stock, hooked = models
    block = context_of(config).cache.tiers[0].block_bytes
    tiers = [{"kind": "device", "bytes": config.num_layers * 24 * block}]  # of max_tokens' hundreds
    context = context_of(config, {"tiers": tiers}, max_requests=8)
    assert context.cache.capacity_tokens == 24 * context.cache.runtime.block_size < context.cache.runtime.max_tokens
    prompts = prompts_of(40, 33, 37, 21, 38, 40, 29, 30)
    expected = serve(stock, DynamicInferenceContext(config, inference_config()), prompts, 30, static=False)
    ours = serve(hooked, context, prompts, 30, static=False, observe=lambda: len(context.cache.requests()))
    assert ours.tokens == expected.tokens
    assert 2 <= ours.most_live < len(prompts)


def test_the_stock_buffer_is_never_allocated(models):
    config = models[0]
    sizes = inference_config(buffer_size_gb=0.05)
    stock = DynamicInferenceContext(config, sizes)
    buffer_bytes = stock.memory_buffer.untyped_storage().nbytes()
    per_block = stock.memory_buffer[:, :, 0].nbytes
    assert buffer_bytes > 50e6
    del stock
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    context = PiKVDynamicInferenceContext(config, sizes, RUNTIME)
    assert context.memory_buffer is None
    made = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in before]
    assert all(t.dim() < 6 for t in made)
    outside = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    total = sum(outside.values())
    cache_bytes = context.cache.stats()["bytes_allocated"]
    books = sum(t.nbytes for t in vars(context).values() if isinstance(t, torch.Tensor))
    assert cache_bytes < total < cache_bytes + 2 * books + 2**20
    # Megatron's books count PiKV's capacity, whatever buffer_size_gb says.
    blocks = RUNTIME["max_tokens"] // context.block_size_tokens
    assert context.kv_block_allocator.total_count == blocks + 1
    assert math.isclose(context.block_size_bytes, per_block)


def test_reset_and_late_errors_leave_no_request_behind(models):
    config, _, hooked = models
    context = context_of(config)
    greedy = SamplingParams(num_tokens_to_generate=5, top_k=1, termination_id=-1)
    for i, prompt in enumerate(prompts_of(20, 30)):
        context.add_request(DynamicInferenceRequest(request_id=i, prompt_tokens=prompt, sampling_params=greedy))
    context.initialize_attention_state()
    with torch.no_grad():
        hooked(*context.current_input_and_position_ids(), None, inference_context=context)
    assert context.cache.requests() == [0, 1]
    assert context.cache.length(request_id=1) == 30
    context.reset()
    assert context.cache.requests() == []
    q, k, v = (torch.ones(50, 1, heads, 16) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match="it is over"):  # these tokens are nobody's
        context.attend(0, q, k, v)
    assert context.cache.requests() == []
    expected = greedy_dynamic(hooked, context_of(config), prompts_of(9), [6], 1)
    assert greedy_dynamic(hooked, context, prompts_of(9), [6], 1)[0][0] == expected[0][0]


def test_a_step_of_padding_touches_no_request(models):
    """What an idle rank of an expert-parallel group runs, so that the others' collectives complete."""
    config, _, hooked = models
    context = context_of(config)
    context.initialize_attention_state(is_expert_parallel_dummy_cuda_graph_step=True)
    with torch.no_grad():
        out = hooked(*context.current_input_and_position_ids(), None, inference_context=context)
    assert torch.isfinite(out).all()
    assert context.cache.requests() == []


def test_routing_is_observed_per_request_and_padding_is_not(models, monkeypatch):
    config, _, hooked = models
    context = context_of(config)
    seen = []
    label = ActiveStep._label

    def spy(step, states, expert_ids, weights):
        assert len(expert_ids) == len(weights) == step.step.tokens  # without the padding
        seen.extend((states[0].layer_id, s.request_id, s.tokens) for s in step.step.segments)
        label(step, states, expert_ids, weights)

    monkeypatch.setattr(ActiveStep, "_label", spy)
    greedy_dynamic(hooked, context, prompts_of(5, 33), [2, 2], 2)
    per_step = [[(0, 5), (1, 33)], [(0, 1), (1, 1)]]
    expected = [(layer, *request) for step in per_step for layer in range(3) for request in step]
    assert seen == expected


def test_a_model_without_hooks_is_refused(models):
    config, stock, _ = models
    context = context_of(config)
    with pytest.raises(RuntimeError, match="not hooked"):
        greedy_dynamic(stock, context, prompts_of(5), [2], 1)


def test_a_hooked_model_runs_with_a_stock_context(models):
    config, stock, hooked = models
    prompts, lengths = prompts_of(5, 33), [20, 20]
    contexts = [DynamicInferenceContext(config, inference_config()) for _ in range(2)]
    expected = greedy_dynamic(stock, contexts[0], prompts, lengths, 2)
    ours = greedy_dynamic(hooked, contexts[1], prompts, lengths, 2)
    assert all(torch.equal(ours[i][1], expected[i][1]) for i in range(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_prefix_caching": True},
        {"num_speculative_tokens": 2},
        {"num_cuda_graphs": 4},
        {"unified_memory_level": 1},
        {"kv_cache_management_mode": KVCacheManagementMode.OFFLOAD},
        {"kv_cache_management_mode": KVCacheManagementMode.RECOMPUTE},
        {"async_sched_mode": AsyncScheduleMode.ASYNC},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_features_that_are_not_served_are_named(models, changes):
    with pytest.raises(NotImplementedError, match=next(iter(changes))):
        context_of(models[0], **changes)


def test_sizes_that_do_not_fit_are_named(models):
    config = models[0]
    with pytest.raises(ValueError, match=r"max_requests: 9 requests .* runtime\.max_requests \(8\)"):
        context_of(config, max_requests=9)
    with pytest.raises(ValueError, match="between two chunks"):
        context_of(config, max_requests=8, enable_chunked_prefill=True)
    with pytest.raises(ValueError, match="block_size_tokens"):
        context_of(config, {"max_tokens": 8})
    assert context_of(config, max_requests=None).max_requests == RUNTIME["max_requests"]


def test_memory_that_stays_where_it_is_is_served(models):
    """static_kv_memory_pointers asks for nothing where the cache persists, which is the only mode that is served."""
    config, _, hooked = models
    prompts, lengths = prompts_of(5, 33), [20, 20]
    expected = greedy_dynamic(hooked, context_of(config), prompts, lengths, 2)
    context = context_of(config, static_kv_memory_pointers=True)
    for _ in range(2):
        ours = greedy_dynamic(hooked, context, prompts, lengths, 2)
        assert all(torch.equal(ours[i][1], expected[i][1]) for i in range(2))
        context.deallocate_inference_state_buffers()  # as DynamicInferenceEngine.suspend and resume do
        context.reinitialize_inference_state_buffers()


def test_stocks_name_of_the_models_config(models):
    config, _, hooked = models
    by_name = {"model_config": config, "inference_config": inference_config(), "runtime_cfg": RUNTIME}
    expected = greedy_dynamic(hooked, context_of(config), prompts_of(9), [6], 1)
    assert greedy_dynamic(hooked, PiKVDynamicInferenceContext(**by_name), prompts_of(9), [6], 1)[0][0] == expected[0][0]
    with pytest.raises(TypeError, match="transformer_config and model_config are two names of one argument"):
        PiKVDynamicInferenceContext(config, **by_name)
    with pytest.raises(TypeError, match=r"model_config: expected Megatron's TransformerConfig, got NoneType"):
        PiKVDynamicInferenceContext(inference_config=inference_config())
    with pytest.raises(TypeError, match=r"model_config: expected Megatron's TransformerConfig, got ModelConfig"):
        PiKVDynamicInferenceContext(model_config(config), inference_config())
    with pytest.raises(TypeError, match=r"inference_config: expected Megatron's InferenceConfig, got dict"):
        PiKVDynamicInferenceContext(config, {})


def test_softmax_scale_is_served_where_stock_ignores_it():
    """Stock's static context takes TransformerConfig.softmax_scale, its dynamic one does not; PiKV's both do."""
    config = tiny_config(softmax_scale=0.6)
    stock = build(config)
    prompts, lengths = prompts_of(33, 40), [12, 12]
    ours = greedy_dynamic(twin(stock, config, layer_spec(config)), context_of(config), prompts, lengths, 2)
    theirs = greedy_dynamic(stock, DynamicInferenceContext(config, inference_config()), prompts, lengths, 2)
    for i, prompt in enumerate(prompts):
        tokens, logits = greedy_static(stock, StaticInferenceContext(1, 128), prompt[None], 12)
        assert ours[i][0] == tokens[0].tolist() and (ours[i][1] - logits[:, 0]).abs().max() <= TOLERANCE
        assert (theirs[i][1][0] - logits[0, 0]).abs().max() > 100 * TOLERANCE


def test_the_callers_inference_config_stays_as_it_is(models):
    config = inference_config(max_requests=None)
    before = dict(vars(config))
    PiKVDynamicInferenceContext(models[0], config, RUNTIME)
    assert vars(config) == before


def test_a_request_that_can_never_fit_is_megatrons_error(models):
    context = context_of(models[0], {"max_tokens": 64})
    greedy = SamplingParams(num_tokens_to_generate=5, top_k=1, termination_id=-1)
    with pytest.raises(BlockOverflowError):
        context.add_request(
            DynamicInferenceRequest(request_id=0, prompt_tokens=prompts_of(80)[0], sampling_params=greedy)
        )
    assert context.cache.requests() == []
