"""DeepSpeed on one rank, in this process: every MoE family under `init_inference`, what a config may hold, what is
refused and how. DeepSpeed's own MoE layers are in test_deepspeed_moe.py, two ranks in tests/distributed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
from hf_models import FAMILIES, make, prompts
from transformers import DynamicCache, GenerationConfig

from pikv_megatron.config import ModelConfig
from pikv_megatron.config.io import ConfigError
from pikv_megatron.integrations import deepspeed as host
from pikv_megatron.integrations.deepspeed import support
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


def test_the_block_as_an_argument_and_sections_without_effect(caplog):
    ids, mask = prompts()
    engine = host.init_inference(make("Mixtral"), dtype="fp32", quant={"enabled": True}, pikv={"runtime": INT8})
    engine.generate(ids, attention_mask=mask, max_new_tokens=2)
    assert engine.pikv_cache.cache.runtime.codec.keys == "int8"
    assert [r.message.split(";")[0] for r in caplog.records if "no effect" in r.message] == ["quant: no effect"]
    host.init_inference(make("Mixtral"), {"dtype": "fp32", "zero": {"stage": 3}, "pikv": {}})
    assert "zero: no effect" in caplog.text


@pytest.mark.parametrize("where", ["cache_implementation", "generation_config", "model.generation_config"])
def test_a_cache_of_transformers_own_is_refused_by_who_asks_for_it(where):
    engine = host.init_inference(make("Mixtral"), {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    options = {"cache_implementation": "dynamic"}
    if where == "generation_config":
        options = {where: GenerationConfig(**options)}
    elif where != "cache_implementation":
        engine.module.generation_config.update(**options)
        options = {}
    with pytest.raises(ValueError, match=f"^{where}: expected no cache_implementation, .* got 'dynamic'"):
        engine.generate(*prompts(), max_new_tokens=2, **options)
    assert engine.pikv_cache is None


def test_biases_that_are_to_stay_in_float32_do():
    """DeepSpeed casts all of a model; transformers leaves the bias that GLM-4-MoE's routers choose by in float32."""
    model = make("Glm4Moe").bfloat16()
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    biases = [torch.rand(8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for gate, bias in zip(gates, biases, strict=True):
        gate.e_score_correction_bias.data = bias.clone()
    engine = host.init_inference(model, {"dtype": "bf16", "pikv": {"runtime": RUNTIME}})
    for gate, bias in zip(gates, biases, strict=True):
        assert gate.e_score_correction_bias.dtype == torch.float32 and gate.weight.dtype == torch.bfloat16
        assert torch.equal(gate.e_score_correction_bias, bias)
    generate(engine, *prompts(), max_new_tokens=2)


def test_a_generation_config_that_leaves_beams_to_the_model():
    ids, mask = prompts()
    engine = host.init_inference(make("Mixtral"), {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    expected, _ = generate(engine, ids, mask, max_new_tokens=4)
    given = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert torch.equal(engine.generate(ids, attention_mask=mask, generation_config=given), expected)
    assert torch.equal(engine.generate(ids, attention_mask=mask, generation_config=given, num_beams=1), expected)
    engine.module.generation_config.num_beams = 2
    with pytest.raises(NotImplementedError, match="num_beams"):
        engine.generate(ids, attention_mask=mask, generation_config=given)


def test_each_calls_cache_is_gone_before_the_next_takes_its_memory(monkeypatch):
    ids, mask = prompts()
    engine = host.init_inference(make("Mixtral"), {"dtype": "fp32", "pikv": {"runtime": RUNTIME}})
    engine.generate(ids, attention_mask=mask, max_new_tokens=2)
    before = weakref.ref(engine.pikv_cache.cache)

    def make_cache(*args):
        gc.collect()
        assert before() is None
        return PiKVHFCache(*args)

    monkeypatch.setattr(host, "PiKVHFCache", make_cache)
    engine.generate(ids, attention_mask=mask, max_new_tokens=2)
    assert engine.pikv_cache is not None


def test_ranks_that_are_done_wait_for_the_others_unless_told_not_to():
    calls = []
    for agreement in (None, object()):
        engine = types.SimpleNamespace()
        host._serve(engine, lambda **options: calls.append(options.get("synced_gpus")), None, agreement)
        engine.generate(use_cache=False)
        engine.generate(use_cache=False, synced_gpus=False)
    assert calls == [None, False, True, False]


REFUSED = {
    "no block": ({}, ConfigError, "pikv: expected this block"),
    "unknown key": ({"pikv": {"runtime": {"windo": 1}}}, ConfigError, "pikv.runtime.windo: unknown key"),
    "section above": ({"pikv": {"window": 1}}, ConfigError, "pikv.window: unknown key; did you mean 'runtime.window'"),
    "twice": ({"pikv": {}}, ConfigError, "pikv: expected once", {"pikv": {}}),
    "a list": ([], ConfigError, "config: expected a dict or the path of a JSON file, got list"),
    "nothing": (None, ConfigError, "pikv: expected this block in the DeepSpeed config, or as an argument"),
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
    config, error, message, *options = REFUSED[case]
    config = {"dtype": "fp32", **config} if isinstance(config, dict) else config
    model = make("Mixtral")
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        host.init_inference(model, config, **dict(*options))
    assert model.config._attn_implementation == before and not is_attached(model)
    assert not hasattr(model, "pikv_cache")


@pytest.mark.parametrize("model_type", [*host.NOT_BY_AUTOTP, "qwen3", "phi", None])
def test_what_autotp_gets_wrong_is_refused_and_what_was_not_tested_is_told(monkeypatch, caplog, model_type):
    """As if there were two ranks; a model's text may have a config of its own. None: too few KV heads."""
    model = make("Mixtral", num_key_value_heads=2 if model_type else 1)
    text = types.SimpleNamespace(model_type=model_type or "qwen3", num_key_value_heads=2 if model_type else 1)
    text.num_attention_heads = 8
    monkeypatch.setattr(host, "model_config", lambda model: None)
    monkeypatch.setattr(model.config, "get_text_config", lambda decoder: text)
    monkeypatch.setattr(host.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(host.deepspeed, "init_inference", lambda model, **options: types.SimpleNamespace(generate=None))
    config = {"dtype": "fp32", "tensor_parallel": {"tp_size": 2}, "pikv": {}}
    if model_type in host.NOT_BY_AUTOTP:
        with pytest.raises(NotImplementedError, match=f"tp_size: AutoTP of .* {host.NOT_BY_AUTOTP[model_type]} in"):
            host.init_inference(model, config)
    elif model_type is None:
        with pytest.raises(ValueError, match="expected a divisor of the 1 KV heads, got 2"):
            host.init_inference(model, config)
    else:
        host.init_inference(model, config)
        assert ("was not tested with phi" in caplog.text) == (model_type == "phi")


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


def test_initialize_takes_deepspeeds_arguments_and_checks_the_model_section():
    ids, mask = prompts()
    model = make("Mixtral")
    tokens, _ = generate(model, ids, mask, max_new_tokens=8)
    with pytest.raises(ConfigError, match=r"pikv\.model is for another model"):
        host.initialize(model, {**TRAINING, "pikv": {"model": {"num_layers": 5}}})
    with pytest.raises(ConfigError, match="expert_parallel: expected a mapping of keys, got True"):
        host.initialize(model, {**TRAINING, "expert_parallel": True, "pikv": {}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, wrapped, *_ = host.initialize(model, {**TRAINING, "pikv": {"runtime": RUNTIME}}, optimizer=optimizer)
    assert wrapped is not None and engine.optimizer is wrapped
    assert torch.equal(generate(engine, ids, mask, max_new_tokens=8)[0], tokens)  # without AutoEP


def test_autoep_limits_deepseek_v2_to_groups_that_its_config_does_not_mean():
    ids, mask = prompts()
    config = {**TRAINING, "expert_parallel": {"enabled": True, "autoep_size": 1}, "pikv": {"runtime": RUNTIME}}
    model = make("DeepseekV2", n_group=2)
    tokens, _ = generate(model, ids, mask, max_new_tokens=8)
    with pytest.raises(NotImplementedError, match=r"topk_method greedy .* expected n_group 1 .*, got 2"):
        host.initialize(model, config)
    model.config.n_group = 1  # what it says
    engine, *_ = host.initialize(model, config)
    assert torch.equal(generate(engine, ids, mask, max_new_tokens=8)[0], tokens)


@pytest.mark.parametrize("autoep", [False, True])
def test_zero_3_leaves_the_labels_as_they_are(autoep):
    """It takes the weights away between forwards: a router is found by the shape that its weight then has again."""
    ids, mask = prompts()
    stock = make("Mixtral")
    cache = PiKVHFCache(stock, RUNTIME)
    tokens, _ = generate(stock, ids, mask, max_new_tokens=8, past_key_values=cache)
    config = {**TRAINING, "zero_optimization": {"stage": 3}, "pikv": {"runtime": RUNTIME}}
    if autoep:
        config["expert_parallel"] = {"enabled": True, "autoep_size": 1}
    engine, *_ = host.initialize(make("Mixtral"), config)
    assert torch.equal(generate(engine, ids, mask, max_new_tokens=8)[0], tokens)
    both = engine.pikv_cache.cache, cache.cache
    ours, theirs = ([c.expert_shard(2, expert).requests() for expert in range(8)] for c in both)
    assert ours == theirs and sum(map(bool, ours)) > 1


def test_zero_3_and_latent_attention_are_refused_by_name():
    config = {**TRAINING, "zero_optimization": {"stage": 3}, "pikv": {}}
    with pytest.raises(NotImplementedError, match=r"optimization\.stage: deepseek_v3 attends to latents .* below 3"):
        host.initialize(make("DeepseekV3"), config)
    model = make("DeepseekV3")
    with support.local_rank():
        engine, *_ = host.deepspeed.initialize(model=model, config={**TRAINING, "zero_optimization": {"stage": 3}})
    with pytest.raises(NotImplementedError, match=r"DeepseekV3Attention: attends to latents .* ZeRO-3 partitions"):
        PiKVHFCache(engine, RUNTIME)


@pytest.mark.parametrize("family", ["GraniteMoe", "Phimoe", "GptOss", "Olmoe"])
def test_experts_that_autoep_does_not_know_are_an_error(family):
    config = {**TRAINING, "expert_parallel": {"enabled": True, "autoep_size": 1}, "pikv": {"runtime": RUNTIME}}
    error, message = RuntimeError, rf"AutoEP of DeepSpeed .* found no experts .* {family}ForCausalLM"
    if family == "Olmoe":  # DeepSpeed's own: it knows too many
        error, message = ValueError, "AutoEP detection is ambiguous"
    with pytest.raises(error, match=message):
        host.initialize(make(family), config)


def test_the_readmes_example_runs():
    root = Path(__file__).parents[3]
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    (script,) = (block for block in blocks if "deepspeed.init_inference" in block)
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    last = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # without DeepSpeed's log
    assert re.fullmatch(r"47\n\d+ bytes of KV", "\n".join(last))


# ---- versions that are not known


def other(*args):
    """A function with parameters that nobody expects."""


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


def test_deepspeed_comes_up_on_our_process_groups_without_its_all_reduce_and_once(monkeypatch):
    seen = []
    backend = importlib.import_module("deepspeed.comm.torch")
    built = backend.build_shm_op
    monkeypatch.setattr(support.comm, "is_initialized", lambda: bool(seen))
    monkeypatch.setattr(support, "init_process_group", lambda: seen.append("process groups"))
    monkeypatch.setattr(
        support.deepspeed, "init_distributed", lambda verbose: seen.append(backend.build_shm_op is not built)
    )
    support.init_distributed()
    support.init_distributed()
    assert seen == ["process groups", True]


def test_local_rank_is_set_where_no_launcher_did(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with support.local_rank():
        assert os.environ["LOCAL_RANK"] == "0"
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")
    with support.local_rank():
        assert os.environ["LOCAL_RANK"] == "3"
    assert os.environ["LOCAL_RANK"] == "3"


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
        registry[model.model] = recorded  # as transformers has it
        assert all(isinstance(key, str) for key in registry)
    assert type(registry) is kind and registry.get(model.model) == recorded
    for name in ("get", "__setitem__"):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, other)
            with pytest.raises(RuntimeError, match=f"{name} of DeepSpeed"), support.registry_by_name():
                pass
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", {})
    with support.registry_by_name():
        assert type(output_capturing._CAN_RECORD_REGISTRY) is dict
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", [])
    with pytest.raises(RuntimeError, match="_CAN_RECORD_REGISTRY is a list"), support.registry_by_name():
        pass
