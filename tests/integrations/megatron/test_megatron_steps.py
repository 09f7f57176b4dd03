"""Steps under Megatron: a forward that is torn has not happened, and no note of one reaches another."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron_tiny import (
    RUNTIME,
    ByteTokenizer,
    as_text,
    build,
    greedy_static,
    hybrid_model,
    inference_config,
    install_torch_flash_attention,
    prompts_of,
    tiny_config,
)

from pikv_megatron.integrations.megatron import PiKVDynamicInferenceContext, attach, layer_spec, model_config
from pikv_megatron.integrations.megatron.contexts import PiKVInferenceContext

INT8 = {"codec": {"keys": "int8", "values": "int8"}}
DEMOTE = {
    "budget": {"policy": "uniform", "first_layer_tokens": 34},
    "tiers": [{"kind": "device"}, {"kind": "host"}],
    "attention": {"mode": "top_k"},
}
PLACES = ("self_attention", "pre_mlp_layernorm", "mlp.experts")
"""Before a layer's keys are appended, between its attention and its router, and behind its router."""


def _serve(model, context, prompts, steps, tear=()):
    """Tokens by request from Megatron's engine; tear: forwards (layer, place) before which Ctrl-C comes, once each."""
    params = SamplingParams(num_tokens_to_generate=steps, top_k=1, termination_id=-1)
    engine = DynamicInferenceEngine(
        TextGenerationController(GPTInferenceWrapper(model, context), ByteTokenizer()), context
    )
    todo, torn, records = list(tear), 0, []

    def interrupt(module, args, layer, place):
        if todo and todo[0][1:] == (layer, place) and seen[0] >= todo[0][0]:
            todo.pop(0)
            raise KeyboardInterrupt

    seen = [0]
    watches = [
        model.decoder.layers[layer].get_submodule(place).register_forward_pre_hook(
            lambda module, args, layer=layer, place=place: interrupt(module, args, layer, place)
        )
        for layer in range(len(model.decoder.layers))
        for place in PLACES
    ]  # fmt: skip
    try:
        for request_id, prompt in enumerate(prompts):
            engine.add_request(request_id, as_text(prompt), params)
        while engine.has_unfinished_requests():
            try:
                records += engine.step_modern()["finished_request_records"]
                seen[0] += 1
            except KeyboardInterrupt:
                torn += 1
    finally:
        for watch in watches:
            watch.remove()
        InferenceMode.unset_active()
    assert not todo and torn == len(tear)
    return [r.merge().generated_tokens for r in sorted(records, key=lambda record: record.request_id)]


@pytest.mark.parametrize("runtime", [INT8, DEMOTE], ids=["int8", "demote"])
def test_ctrl_c_in_the_middle_of_a_forward_changes_no_token(monkeypatch, runtime):
    """In prefill and in decode, in every layer, before, within and behind what the cache is told of it."""
    install_torch_flash_attention(monkeypatch)
    config = tiny_config()
    model, prompts = build(config, layer_spec(config)), prompts_of(33, 50, 7)

    def context():
        return PiKVDynamicInferenceContext(config, inference_config(), {**RUNTIME, **runtime})

    expected = _serve(model, context(), prompts, 30)
    places = [(layer, place) for layer in range(3) for place in PLACES]
    tear = [(step, *place) for step, place in zip((0, 0, 1, 3, 8, 9, 10, 15, 20), places, strict=True)]
    torn = context()
    assert _serve(model, torn, prompts, 30, tear) == expected
    assert torn.cache.requests() == []


def test_a_moe_layer_before_attention_labels_no_other_forward(monkeypatch):
    """Two contexts of one model in turns: the first layer's router must reach neither the old context nor a layer that
    is not its own.
    """
    model, _ = hybrid_model(monkeypatch, "E*E**")
    handle = attach(model, RUNTIME)
    assert handle.model_cfg.num_layers == 3 and handle.model_cfg.moe_layers == (0,)
    prompts = torch.stack(prompts_of(40, 40))

    def labels(context):
        states = context.cache._requests[0].layers
        context.cache.stats()
        return [state.tables[0].pool.label[state.tables[0].tensor].tolist() for state in states]

    alone = handle.static_context(2, 128)
    expected = greedy_static(model, alone, prompts, 9)[0]
    first, second = handle.static_context(2, 128), handle.static_context(2, 128)
    for context in (first, second):
        greedy_static(model, context, prompts, 1)
    for _ in range(2):  # in turns, so that each forward comes behind the other's
        for context in (first, second):
            context.reset()
            assert torch.equal(greedy_static(model, context, prompts, 9)[0], expected)
    assert labels(first) == labels(second) == labels(alone)
    assert len({tuple(row) for row in labels(alone)}) == 1  # both dense layers have the first one's


def test_memory_goes_with_the_context_where_the_last_layer_is_dense():
    config = tiny_config(num_layers=2, moe_layer_freq=[1, 0])
    model = build(config, layer_spec(config))
    context = PiKVInferenceContext(model_config(config), RUNTIME, 2, 64)
    greedy_static(model, context, torch.stack(prompts_of(9)), 3)
    memory = weakref.ref(context.cache)
    gc.collect()
    gc.disable()
    try:
        del context, model
        assert memory() is None
    finally:
        gc.enable()


def test_two_models_in_two_threads():
    config = tiny_config()
    models = [build(config, layer_spec(config), seed=seed) for seed in (3, 4)]
    prompts = torch.stack(prompts_of(20, 20))

    def serve(i):
        context = PiKVInferenceContext(model_config(config), {**RUNTIME, **INT8}, 2, 128)
        got[i] = greedy_static(models[i], context, prompts, 40)[0]

    got: dict[int, torch.Tensor] = {}
    for i in range(2):
        serve(i)
    expected = dict(got)
    for _ in range(3):
        got.clear()
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [0, 1] and all(torch.equal(got[i], expected[i]) for i in range(2))
