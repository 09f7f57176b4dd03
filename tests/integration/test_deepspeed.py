"""DeepSpeed on one rank, in this process: every MoE family under `init_inference`, what a config may hold, what is
refused and how, and the hooks on DeepSpeed's own MoE layers. Two ranks are in tests/distributed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
from hf_models import FAMILIES, make, prompts
from transformers import DynamicCache

from pikv_megatron import PiKVCache
from pikv_megatron.config import ModelConfig
from pikv_megatron.config_io import ConfigError
from pikv_megatron.integrations import deepspeed as host
from pikv_megatron.integrations import deepspeed_support as support
from pikv_megatron.integrations.huggingface import PiKVHFCache, is_attached

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 1024}
INT8 = {**RUNTIME, "codec": {"keys": "int8", "values": "int8"}}
MOE = [family for family, config in FAMILIES.items() if any("experts" in key for key in config)]
TRAINING = {"train_micro_batch_size_per_gpu": 1}


VARIANTS = {
    "left padding": {},
    "no padding": {"padded": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "assisted": {"rows": 1, "prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
}


def generate(by, ids, mask, padded=True, rows=3, **options):
    """Tokens, and the logits of each step [new, rows, vocabulary]; sampling is seeded."""
    torch.manual_seed(11)
    ids, mask = ids[-rows:], mask[-rows:]
    mask = mask if padded else torch.ones_like(mask)
    options = {"max_new_tokens": 64, "do_sample": False, "output_logits": True, **options}
    out = by.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", MOE)
def test_init_inference_generates_what_transformers_does(family):
    ids, mask = prompts()
    stock = make(family)
    engine = host.init_inference(make(family), {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    seen = []
    for options in VARIANTS.values():
        theirs = DynamicCache(config=stock.config)
        tokens, logits = generate(stock, ids, mask, past_key_values=theirs, **options)
        ours, our_logits = generate(engine, ids, mask, **options)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)
        seen.append(engine.pikv_cache)
        assert seen[-1].cache.stats()["tiers"]["device"]["blocks_used"] > 10
    assert len(set(map(id, seen))) == len(VARIANTS)  # one cache per call


def test_use_cache_false_makes_no_cache_and_a_config_that_says_so_gets_one():
    """generate feeds every token again without use_cache; a cache would hold them all several times."""
    ids, mask = prompts()
    model = make("Mixtral")
    expected, _ = generate(model, ids, mask, max_new_tokens=8)
    engine = host.init_inference(model, {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    tokens, _ = generate(engine, ids, mask, max_new_tokens=8, use_cache=False)
    assert torch.equal(tokens, expected) and engine.pikv_cache is None
    engine.module.generation_config.use_cache = False
    tokens, _ = generate(engine, ids, mask, max_new_tokens=8)
    assert torch.equal(tokens, expected) and engine.pikv_cache.get_seq_length() == ids.shape[1] + 7


def test_a_cache_of_the_users_own_is_taken():
    ids, mask = prompts()
    engine = host.init_inference(make("Mixtral"), {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    expected, _ = generate(engine, ids, mask, max_new_tokens=8)
    mine = PiKVHFCache(engine, INT8)
    made, _ = generate(engine, ids, mask, max_new_tokens=4, past_key_values=mine)
    assert mine.get_seq_length() == 40 + 3
    assert engine.pikv_cache is not mine
    assert torch.equal(made, expected[:, :44])


def test_a_json_file_with_a_model_section_and_further_arguments(tmp_path):
    model = make("Mixtral")
    section = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2, "head_dim": 8}
    section |= {"num_experts": 8, "topk": 2, "dtype": "bfloat16"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"pikv": {"model": section, "runtime": INT8}}))
    engine = host.init_inference(model, str(path), dtype="bf16")
    ids, mask = prompts()
    engine.generate(ids, attention_mask=mask, max_new_tokens=4)
    assert engine.pikv_cache.cache.model == ModelConfig(**section)
    assert engine.pikv_cache.cache.runtime.codec.keys == "int8"


REFUSED = {
    "no block": ({}, ConfigError, "pikv: expected this block"),
    "unknown key": ({"pikv": {"runtime": {"windo": 1}}}, ConfigError, "pikv.runtime.windo: unknown key"),
    "unknown section": ({"pikv": {"window": 1}}, ConfigError, "pikv.window: unknown key; known keys: model, runtime"),
    "another model": ({"pikv": {"model": {"num_layers": 5}}}, ConfigError, "pikv.model is for another model"),
    "kernels": ({"replace_with_kernel_inject": True, "pikv": {}}, NotImplementedError, "replace_with_kernel_inject"),
    "graphs": ({"enable_cuda_graph": True, "pikv": {}}, NotImplementedError, "enable_cuda_graph"),
    "ranks": (
        {"tensor_parallel": {"tp_size": 2}, "pikv": {}},
        ValueError,
        "tp_size: expected 1 or the number of ranks",
    ),
    "DeepSpeed's key": ({"replace_wiht": True, "pikv": {}}, ValueError, "replace_wiht"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_before_the_model_changes(case):
    config, error, message = REFUSED[case]
    model = make("Mixtral")
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        host.init_inference(model, {"dtype": "fp32", **config})
    assert model.config._attn_implementation == before and not is_attached(model)
    assert not hasattr(model, "pikv_cache")


def test_the_engines_own_limits_stand():
    ids, mask = prompts()
    engine = host.init_inference(make("Mixtral"), {"dtype": "fp32", "max_out_tokens": 30, "pikv": {"runtime": RUNTIME}})
    with pytest.raises(NotImplementedError, match="num_beams"):
        engine.generate(ids, attention_mask=mask, num_beams=2)
    with pytest.raises(RuntimeError, match="maximum length of 30"):
        engine.generate(input_ids=ids, attention_mask=mask)
    engine.generate(ids, attention_mask=mask, max_new_tokens=1)  # not checked by DeepSpeed where it comes by position


def test_initialize_with_autoep_on_one_rank():
    ids, mask = prompts()
    stock = make("Mixtral")
    tokens, _ = generate(stock, ids, mask)
    config = {**TRAINING, "expert_parallel": {"enabled": True, "autoep_size": 1}, "pikv": {"runtime": RUNTIME}}
    before = dict(os.environ)
    engine, *_ = host.initialize(make("Mixtral").train(), config)
    assert dict(os.environ) == before and not engine.module.training
    assert len(host.autoep_layers(engine)) == 3
    assert torch.equal(generate(engine, ids, mask)[0], tokens)


@pytest.mark.parametrize("family", ["GraniteMoe", "Phimoe", "GptOss", "Olmoe"])
def test_experts_that_autoep_does_not_know_are_an_error(family):
    config = {**TRAINING, "expert_parallel": {"enabled": True, "autoep_size": 1}, "pikv": {"runtime": RUNTIME}}
    error, message = RuntimeError, rf"AutoEP of DeepSpeed .* found no experts .* {family}ForCausalLM"
    if family == "Olmoe":  # DeepSpeed's own: it knows too many
        error, message = ValueError, "AutoEP detection is ambiguous"
    with pytest.raises(error, match=message):
        host.initialize(make(family), config)


def test_the_readmes_example_runs():
    root = Path(__file__).parents[2]
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    (script,) = (block for block in blocks if "deepspeed.init_inference" in block)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    last = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # without DeepSpeed's log
    assert re.fullmatch(r"47\n\d+ bytes of KV", "\n".join(last))


# ---- versions that are not known


def other(*args):
    """A function with parameters that nobody expects."""


def test_an_unknown_gate_or_all_to_all_fails_by_name_and_hooks_nothing(monkeypatch):
    from deepspeed.moe import sharded_moe

    model, stock = moe_layer(), sharded_moe._AllToAll
    for owner in ("TopKGate", "_AllToAll"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(sharded_moe, owner), "forward", other)
            with pytest.raises(RuntimeError, match=rf"{owner}.forward of DeepSpeed .* takes \(args\), expected"):
                host.hook_moe(model, Listener())
        assert sharded_moe._AllToAll is stock
        assert not model.deepspeed_moe.gate._forward_hooks
    with monkeypatch.context() as patch, host.hook_moe(model, Listener()):
        patch.setattr(model.deepspeed_moe.gate, "forward", lambda *args: (1, 2, 3))
        with pytest.raises(RuntimeError, match="MoE layer 0 returned tuple of 3, expected a tuple of 7"):
            model(torch.randn(1, 4, HIDDEN))
    assert sharded_moe._AllToAll is stock


def test_an_unknown_shared_memory_op_fails_by_name(monkeypatch):
    backend = importlib.import_module("deepspeed.comm.torch")
    built = backend.build_shm_op
    with support.without_shared_memory():
        assert backend.build_shm_op() is None
    assert backend.build_shm_op is built
    monkeypatch.setattr(backend, "build_shm_op", other)
    with pytest.raises(RuntimeError, match="build_shm_op of DeepSpeed"), support.without_shared_memory():
        pass
    monkeypatch.delattr(backend, "build_shm_op")
    with pytest.raises(RuntimeError, match="build_shm_op is not in DeepSpeed"), support.without_shared_memory():
        pass


def test_the_registry_takes_names_for_a_while(monkeypatch):
    from transformers.utils import output_capturing

    registry, model = output_capturing._CAN_RECORD_REGISTRY, make("Mixtral")
    kind = type(registry)
    recorded = registry.get(model.model)
    with support.registry_by_name():
        name = str(type(model.model))
        assert registry.get(name) == registry.get(model.model) == recorded != {}
        assert registry.get("nothing", 3) == 3
        registry["a name"] = {"a": 1}
        assert registry.pop("a name") == {"a": 1}
    assert type(registry) is kind and registry.get(model.model) == recorded
    monkeypatch.setattr(kind, "get", other)
    with pytest.raises(RuntimeError, match="get of DeepSpeed"), support.registry_by_name():
        pass
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", {})
    with support.registry_by_name():
        assert type(output_capturing._CAN_RECORD_REGISTRY) is dict
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", [])
    with pytest.raises(RuntimeError, match="_CAN_RECORD_REGISTRY is a list"), support.registry_by_name():
        pass


# ---- DeepSpeed's own MoE layers

HIDDEN, EXPERTS = 16, 4


def moe_layer(**options):
    from deepspeed.moe.layer import MoE

    support.init_distributed()
    torch.manual_seed(0)
    expert = torch.nn.Linear(HIDDEN, HIDDEN)
    options = {"use_rts": False, "min_capacity": 0, "top2_2nd_expert_sampling": False, **options}
    layer = MoE(HIDDEN, expert, num_experts=EXPERTS, **options)
    layer.set_deepspeed_parallelism()
    return layer.eval()


class Listener:
    def __init__(self):
        self.routes = []

    def routed(self, layer_id, expert_ids, weights):
        self.routes.append((layer_id, expert_ids, weights))

    def dispatch_launched(self, layer_id):
        raise AssertionError("nothing is dispatched on one rank")

    dispatch_finished = dispatch_launched


@pytest.mark.parametrize("k", [1, 2, 3])
def test_routes_are_those_of_the_gate(k):
    layer, listener = moe_layer(k=k, drop_tokens=False), Listener()
    x = torch.randn(2, 9, HIDDEN)
    expected = layer(x)[0]
    with host.hook_moe(layer, listener, layer_ids=[5]):
        assert torch.equal(layer(x)[0], expected)
    layer(x)
    ((layer_id, expert_ids, weights),) = listener.routes
    shares = (x.reshape(-1, HIDDEN) @ layer.deepspeed_moe.gate.wg.weight.T).softmax(-1)
    best, ids = shares.topk(k, -1)
    assert layer_id == 5 and expert_ids.dtype == torch.int64 and not weights.requires_grad
    order = expert_ids.argsort(-1)
    right = ids.argsort(-1)
    assert torch.equal(expert_ids.gather(1, order), ids.gather(1, right))
    best = best / best.sum(-1, keepdim=True) if k > 1 else best
    torch.testing.assert_close(weights.gather(1, order), best.gather(1, right))


def test_routes_label_a_cache():
    """What docs/deepspeed.md shows: the listener of a model whose attention is on a PiKVCache."""
    model = {"num_layers": 1, "num_attention_heads": 2, "num_query_groups": 1, "head_dim": 8, "num_experts": EXPERTS}
    cache = PiKVCache(ModelConfig(**model, topk=2), RUNTIME)
    layer = moe_layer(k=2, drop_tokens=False)

    class Labels(Listener):
        def routed(self, layer_id, expert_ids, weights):
            cache.observe_routing(layer_id, expert_ids, weights)

    x = torch.randn(1, 42, HIDDEN)
    with host.hook_moe(layer, Labels()):
        cache.append(0, *torch.randn(2, 42, 1, 8))
        layer(x)
    best, ids = (x[0] @ layer.deepspeed_moe.gate.wg.weight.T).softmax(-1).topk(2, -1)
    votes = torch.zeros(42, EXPERTS).scatter_(1, ids, best / best.sum(-1, keepdim=True))
    expected = votes[2:34].unflatten(0, (4, 8)).sum(1).argmax(-1).tolist()  # four blocks between sinks and window
    found = {
        int(start): expert
        for expert in range(EXPERTS)
        for shard in [cache.expert_shard(0, expert)]
        for request_id in shard.requests()
        for start in shard.retrieve(request_id)[2][::8]
    }
    assert [found[start] for start in sorted(found)] == expected and len(set(expected)) > 1


def test_dropped_routes_weigh_nothing():
    layer, listener = moe_layer(k=2, eval_capacity_factor=0.5), Listener()
    x = torch.randn(1, 16, HIDDEN)
    with host.hook_moe(layer, listener):
        layer(x)
    ((_, expert_ids, weights),) = listener.routes
    assert expert_ids.min() >= 0 and weights.shape == (16, 2)
    kept = 0.5 * 2 * 16  # capacity: factor * k * tokens / experts, of each expert
    assert 0 < int((weights > 0).sum()) <= kept < 32
    assert (expert_ids[weights == 0] == 0).all()


def test_two_listeners_come_and_go():
    layer, first, second = moe_layer(k=1), Listener(), Listener()
    x = torch.randn(1, 8, HIDDEN)
    one = host.hook_moe(layer, first)
    two = host.hook_moe(layer, second)
    layer(x)
    one.remove()
    one.remove()
    layer(x)
    two.remove()
    layer(x)
    assert (len(first.routes), len(second.routes)) == (1, 2)
    with pytest.raises(ValueError, match="layer_ids: expected 1, one per MoE layer, got 2"):
        host.hook_moe(layer, first, layer_ids=[0, 1])
    with pytest.raises(ValueError, match="Linear has none"):
        host.hook_moe(torch.nn.Linear(2, 2), first)
