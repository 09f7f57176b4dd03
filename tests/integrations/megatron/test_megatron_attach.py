"""Specs, attach and detach: one mechanism, weights and keys untouched, training as before, models refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron_tiny import (
    RUNTIME,
    build,
    causal_mask,
    greedy_static,
    hybrid_model,
    inference_config,
    prompts_of,
    recompute,
    serve,
    stock_spec,
    tiny_config,
    twin,
)

from pikv_megatron.config import ModelConfig, RuntimeConfig, dump
from pikv_megatron.integrations.megatron import attach, detach, hook_spec, layer_spec, model_config
from pikv_megatron.integrations.megatron import hooks as megatron_hooks

PROMPTS = torch.stack(prompts_of(30, 30))


def stock_tokens(model, steps=20):
    return greedy_static(model, StaticInferenceContext(2, 128), PROMPTS, steps)


def classes_of(model):
    found = [type(m) for m in model.modules()]
    return found + [type(m.token_dispatcher) for m in model.modules() if isinstance(m, MoELayer)]


def test_attach_and_detach_round_trip():
    config = tiny_config()
    model = build(config)
    classes, modules = classes_of(model), [id(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    expected = stock_tokens(model)

    handle = attach(model, RUNTIME)
    layer = model.decoder.layers[0]
    for host, part in (
        (SelfAttention, layer.self_attention),
        (MoELayer, layer.mlp),
        (TopKRouter, layer.mlp.router),
        (MoEAllGatherTokenDispatcher, layer.mlp.token_dispatcher),
    ):
        assert type(part) is megatron_hooks.hooked(host) and isinstance(part, host)
    assert [id(m) for m in model.modules()] == modules
    assert [id(p) for p in model.parameters()] == parameters
    ours = greedy_static(model, handle.static_context(2, 128), PROMPTS, 20)
    assert torch.equal(ours[0], expected[0]) and (ours[1] - expected[1]).abs().max() <= 1e-4
    assert torch.equal(stock_tokens(model)[1], expected[1])  # still stock with a stock context

    handle.detach()
    assert classes_of(model) == classes
    assert "pikv_layer_id" not in vars(layer.self_attention)
    after = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    assert list(after) == list(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(stock_tokens(model)[1], expected[1])
    attach(model)  # and again
    detach(model)


def test_attached_twice_or_never():
    model = build(tiny_config())
    with pytest.raises(RuntimeError, match="nothing to detach"):
        detach(model)
    attach(model)
    with pytest.raises(RuntimeError, match="already on PiKV"):
        attach(model)
    detach(model)
    with pytest.raises(RuntimeError, match="already on PiKV"):
        attach(build(tiny_config(), layer_spec(tiny_config())))
    with pytest.raises(ValueError, match="attention layers"):
        attach(torch.nn.Linear(2, 2))


def test_a_list_of_one_chunk_is_its_model():
    """Megatron passes a model around as the list of its chunks."""
    model = build(tiny_config())
    handle = attach([model], RUNTIME)
    assert handle.model is model and model_config((model,)) == handle.model_cfg == model_config(model)
    detach([model])
    assert not any(megatron_hooks.is_hooked(m) for m in model.modules())


def test_what_is_no_model_is_named():
    model = build(tiny_config())
    layer = model.decoder.layers[0]
    expected = "model: expected a Megatron-core model, or a list of its one chunk, got"
    for call in (attach, detach, model_config):
        for given, found in ((None, "None"), ([], "an empty list"), ([None], "None"), ({}, "dict"), ("model", "str")):
            with pytest.raises(TypeError, match=f"{expected} {found}$"):
                call(given)
        with pytest.raises(NotImplementedError, match=r"does not serve pipelines .*, got 2 chunks"):
            call([model, model])
        for part in (layer, layer.self_attention, [layer]):
            with pytest.raises(ValueError, match=r"expected a whole Megatron-core model, got one layer of it \("):
                call(part)
    assert not any(megatron_hooks.is_hooked(m) for m in model.modules())


def test_specs_are_copied_never_changed():
    config = tiny_config()
    stock = stock_spec(config)
    attention, mlp = stock.submodules.self_attention, stock.submodules.mlp
    ours = hook_spec(stock)
    assert stock.submodules.self_attention is attention and attention.module is SelfAttention
    assert stock.submodules.mlp is mlp and mlp.func is MoELayer
    assert mlp.keywords["submodules"].router is TopKRouter
    assert ours.submodules.self_attention.module is megatron_hooks.hooked(SelfAttention)
    assert ours.submodules.mlp.keywords["submodules"].router is megatron_hooks.hooked(TopKRouter)
    block = get_gpt_decoder_block_spec(tiny_config(moe_layer_freq=[0, 1, 0]), False, normalization="RMSNorm")
    layers = list(block.layer_specs)
    hook_spec(block)
    assert block.layer_specs == layers and layers[1].submodules.self_attention.module is SelfAttention


def test_state_dict_keys_are_stock():
    config = tiny_config(qk_layernorm=True, moe_shared_expert_intermediate_size=32)
    stock = build(config)
    hooked = build(config, layer_spec(config), seed=8)
    assert list(stock.state_dict()) == list(hooked.state_dict())
    hooked.load_state_dict(stock.state_dict(), strict=True)
    assert torch.equal(recompute(stock, PROMPTS), recompute(hooked, PROMPTS))
    assert [n for n, _ in stock.named_modules()] == [n for n, _ in hooked.named_modules()]


@pytest.mark.parametrize("recompute_activations", [False, True], ids=["plain", "with recomputation"])
def test_training_is_stocks(recompute_activations):
    """Equal losses and gradients over steps, with inference through the cache between them."""
    changes = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
    if recompute_activations:
        changes |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
    config = tiny_config(**changes)
    stock = build(config)
    hooked = twin(stock, config, layer_spec(config))
    context = attach_free_context(config)
    tokens, labels = torch.stack(prompts_of(24, 24)), torch.stack(prompts_of(24, 24, seed=3))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (stock, hooked)]
    losses = []
    for _ in range(4):
        step_losses = []
        for model, optimizer in zip((stock, hooked), optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            loss = model(tokens, torch.arange(24).expand_as(tokens), causal_mask(24), labels=labels).mean()
            loss.backward()
            step_losses.append(loss.item())
        assert step_losses[0] == step_losses[1]
        for (name, ours), theirs in zip(hooked.named_parameters(), stock.parameters(), strict=True):
            assert ours.grad is not None and torch.equal(ours.grad, theirs.grad), name
        for optimizer in optimizers:
            optimizer.step()
        hooked.eval()
        context.reset()
        greedy_static(hooked, context, PROMPTS, 2)
        losses.append(step_losses[0])
    assert losses[-1] < losses[0]


def attach_free_context(config):
    from pikv_megatron.integrations.megatron import PiKVInferenceContext

    return PiKVInferenceContext(model_config(config), RUNTIME, 4, 128)


def test_hybrid_model(monkeypatch):
    """HybridModel counts attention, dense and MoE layers alike; the cache counts attention layers."""
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron_tiny import install_torch_flash_attention

    model, stack = hybrid_model(monkeypatch, "*E**E*E")
    stock, _ = hybrid_model(monkeypatch, "*E**E*E")
    config = model.config
    expected = stock_tokens(stock)
    with pytest.raises(NotImplementedError, match="attach"):
        hook_spec(stack)
    handle = attach(model, RUNTIME)
    assert handle.model_cfg.num_layers == 4
    assert handle.model_cfg.moe_layers == (0, 2, 3)
    context = handle.static_context(2, 128)
    ours = greedy_static(model, context, PROMPTS, 20)
    assert torch.equal(ours[0], expected[0]) and (ours[1] - expected[1]).abs().max() <= 1e-4
    assert [context.cache.length(layer) for layer in range(4)] == [49] * 4
    # A dense attention layer takes the labels of the MoE layer before it.
    tables = [context.cache._requests[0].layers[layer].tables[0] for layer in (0, 1)]
    labels = [table.pool.label[table.tensor].tolist() for table in tables]
    assert labels[0][:3] == labels[1][:3]

    install_torch_flash_attention(monkeypatch)
    prompts = prompts_of(12, 25, 7)
    theirs = serve(stock, DynamicInferenceContext(config, inference_config()), prompts, 30, static=False)
    context = handle.dynamic_context(inference_config())
    assert serve(model, context, prompts, 30, static=False).tokens == theirs.tokens
    assert context.cache.requests() == []
    handle.detach()
    assert torch.equal(stock_tokens(model)[1], expected[1])


def test_attach_reads_a_config(tmp_path):
    config = tiny_config()
    model = build(config)
    path = tmp_path / "pikv.yaml"
    path.write_text(dump(model_config(config), RuntimeConfig(window=24, max_tokens=512)))
    handle = attach(model, path)
    assert handle.runtime_cfg.window == 24 and handle.model_cfg == model_config(config)
    handle.detach()
    other = yaml.safe_load(path.read_text())
    other["model"]["num_query_groups"] = 4
    with pytest.raises(ValueError, match="num_query_groups: 4 here, 2 in the model"):
        attach(model, other)
    assert classes_of(model) == classes_of(build(config))
    assert attach(model).runtime_cfg == RuntimeConfig()


def test_model_config_of_a_config_and_of_its_model():
    for changes in ({}, {"moe_layer_freq": [0, 1, 0]}, {"num_moe_experts": None, "moe_ffn_hidden_size": None}):
        config = tiny_config(**changes)
        assert model_config(build(config, layer_spec(config))) == model_config(config)
    assert model_config(tiny_config()) == ModelConfig(
        num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=16, num_experts=8, topk=2
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_latent_attention": True},
        {"softmax_type": "learnable"},
        {"softmax_type": "off-by-one"},
        {"window_size": (8, 0)},
        {"window_size": (8, 0), "window_attn_skip_freq": 2},
        {"flash_decode": True},
        {"fused_single_qkv_rope": True},
        {"context_parallel_size": 2},
        {"sequence_parallel": True},
        {"mtp_num_layers": 1},
        {"cuda_graph_impl": "local"},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_models_that_are_not_served_are_named(changes):
    config = copy.copy(tiny_config())
    for name, value in changes.items():  # past Megatron's own checks: some need several ranks or a GPU
        setattr(config, name, value)
    for refuse in (layer_spec, model_config):
        with pytest.raises(NotImplementedError, match=next(iter(changes))):
            refuse(config)


def test_built_models_that_are_not_served_are_named():
    class OtherAttention(SelfAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    config = tiny_config()
    spec = stock_spec(config)
    spec.submodules.self_attention.module = OtherAttention
    model = build(config, spec)
    with pytest.raises(NotImplementedError, match=r"decoder\.layers\.0\.self_attention.*OtherAttention"):
        attach(model)
    assert not any(megatron_hooks.is_hooked(m) for m in model.modules())
    with pytest.raises(NotImplementedError, match="OtherAttention"):
        hook_spec(spec)


def test_a_custom_attention_class_keeps_its_own_code():
    """A subclass that changes something else than forward is hooked as well."""

    class Doubled(SelfAttention):
        def get_query_key_value_tensors(self, *args, **kwargs):
            query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
            return query, key, 2 * value

    config = tiny_config()
    spec = stock_spec(config)
    spec.submodules.self_attention.module = Doubled
    model = build(config, spec)
    expected = stock_tokens(model)
    assert not torch.equal(expected[1], stock_tokens(build(config))[1])
    ours = greedy_static(twin(model, config, hook_spec(spec)), attach_free_context(config), PROMPTS, 20)
    assert torch.equal(ours[0], expected[0])


def test_hooked_classes_are_made_once_and_only_for_known_hosts():
    assert megatron_hooks.hooked(SelfAttention) is megatron_hooks.hooked(SelfAttention)
    with pytest.raises(TypeError, match="Linear"):
        megatron_hooks.hooked(torch.nn.Linear)
    with pytest.raises(TypeError, match="PiKVSelfAttention"):
        megatron_hooks.hooked(megatron_hooks.hooked(SelfAttention))


def test_cross_attention_is_named():
    from megatron.core.transformer.attention import CrossAttention

    from pikv_megatron.integrations.megatron.support import check_attention

    with pytest.raises(NotImplementedError, match=r"decoder\.x: PiKV serves self attention, got CrossAttention"):
        check_attention("decoder.x", CrossAttention)
