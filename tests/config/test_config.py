"""Configs are strict: unknown keys, wrong types and values out of range fail by name, wherever they come from; what
resolves can be written out and read back.
"""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
import yaml

from pikv_megatron import Compressor, ConfigError, ModelConfig, PiKVCache, RuntimeConfig
from pikv_megatron.config import dump, load, load_deepspeed, resolve
from pikv_megatron.config.sections import (
    AttentionConfig,
    BudgetConfig,
    CodecConfig,
    OverlapConfig,
    RouterConfig,
    ShardingConfig,
    StreamerConfig,
    TierConfig,
)

SMALL = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8}
SMALL_RUNTIME = {"device": "cpu", "max_tokens": 64, "max_requests": 1, "window": 4, "sinks": 1, "block_size": 4}


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("model", "num_layer", "num_layers"),
        ("model", "xyz", None),
        ("runtime", "blocksize", "block_size"),
        ("runtime", "max_token", "max_tokens"),
        ("runtime", "num_layers", None),
        ("attention", "mod", "mode"),
        ("attention", "readfraction", "read_fraction"),
        ("codec", "key", "keys"),
        ("budget", "total_token", "total_tokens"),
        ("router", "lambda_", "lambda"),
        ("sharding", "place", "placement"),
        ("overlap", "prefetching", "prefetch"),
        ("streamer", "commitms", "commit_ms"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(section, key, nearest):
    whole = {section: {key: 1}} if section in ("model", "runtime") else {"runtime": {section: {key: 1}}}
    name = f"{section}.{key}" if section in ("model", "runtime") else f"runtime.{section}.{key}"
    with pytest.raises(ConfigError, match=rf"^{name}: unknown key") as error:
        load(whole)
    assert (f"did you mean '{nearest}'?" if nearest else "known keys: ") in str(error.value)


def test_unknown_sections_and_tier_keys_fail():
    with pytest.raises(ConfigError, match=r"^runtim: unknown key; did you mean 'runtime'"):
        load({"runtim": {}})
    for key, place in (("codec", "runtime.codec"), ("codecs", "runtime.codec"), ("num_layers", "model.num_layers")):
        with pytest.raises(ConfigError, match=rf"^{key}: unknown key; did you mean '{place}'"):
            load({key: {}})
    with pytest.raises(ConfigError, match=r"^runtime\.policy: unknown key; did you mean 'budget\.policy'"):
        load({"runtime": {"policy": "uniform"}})
    with pytest.raises(ConfigError, match=r"^runtime\.tiers\[1\]\.kin: unknown key; did you mean 'kind'"):
        load({"runtime": {"tiers": [{"kind": "device"}, {"kin": "host"}]}})


WRONG = [
    # model
    ("model", {"num_layers": "4"}, "model.num_layers", "'4'"),
    ("model", {"num_layers": 0}, "model.num_layers", "0"),
    ("model", {"num_layers": True}, "model.num_layers", "True"),
    ("model", {"num_layers": None}, "model.num_layers", "None"),
    ("model", {"hidden_size": 128.5}, "model.hidden_size", "128.5"),
    ("model", {"head_dim": 30}, "model.head_dim", "30"),
    ("model", {"v_head_dim": 2}, "model.v_head_dim", "2"),
    ("model", {"num_attention_heads": 6, "num_query_groups": 4}, "model.num_query_groups", "4"),
    ("model", {"num_experts": -1}, "model.num_experts", "-1"),
    ("model", {"topk": 9}, "model.topk", "9"),
    ("model", {"topk": 0}, "model.topk", "0"),
    ("model", {"dtype": "float64"}, "model.dtype", "'float64'"),
    ("model", {"dtype": ["float32"]}, "model.dtype", "float32"),
    ("model", {"moe_layers": [4]}, "model.moe_layers", "4"),
    ("model", {"moe_layers": [-1]}, "model.moe_layers", "-1"),
    ("model", {"moe_layers": 1}, "model.moe_layers", "1"),
    ("model", {"moe_layers": ["1"]}, "model.moe_layers[0]", "'1'"),
    ("model", {"softmax_scale": 0.0}, "model.softmax_scale", "0.0"),
    ("model", {"softmax_scale": float("nan")}, "model.softmax_scale", "nan"),
    ("model", {"softmax_scale": float("inf")}, "model.softmax_scale", "inf"),
    # runtime
    ("runtime", {"max_tokens": 0}, "runtime.max_tokens", "0"),
    ("runtime", {"max_requests": 0}, "runtime.max_requests", "0"),
    ("runtime", {"window": 0}, "runtime.window", "0"),
    ("runtime", {"window": 6.5}, "runtime.window", "6.5"),
    ("runtime", {"sinks": -1}, "runtime.sinks", "-1"),
    ("runtime", {"block_size": 0}, "runtime.block_size", "0"),
    ("runtime", {"device": "gpu"}, "runtime.device", "'gpu'"),
    ("runtime", {"device": "meta"}, "runtime.device", "'meta'"),
    ("runtime", {"device": 0}, "runtime.device", "0"),
    ("runtime", {"max_tokens": 64, "block_size": 65}, "runtime.block_size", "max_tokens (64), got 65"),
    ("runtime", {"max_tokens": "1e9"}, "runtime.max_tokens", "'1e9'; this is text, write 1000000000 without quotes"),
    ("runtime", {"max_tokens": 1e30}, "runtime.max_tokens", "1e+30; write all of its digits"),
    ("runtime", {"max_tokens": 2**63}, "runtime.max_tokens", "below 2**63, got 9223372036854775808"),
    ("runtime", {"max_tokens": 1 << 20_000}, "runtime.max_tokens", "got an integer of 20001 bits"),
    ("runtime", {"attention": {"epsilon": 10**400}}, "runtime.attention.epsilon", "expected float, got an integer"),
    ("runtime", {"window": "x" * 10**6}, "runtime.window", "'xxxx"),
    ("runtime", {"device": "x" * 10**6}, "runtime.device", "'xxxx"),
    ("runtime", {"codec": {"keys": "x" * 10**6}}, "runtime.codec.keys", "'xxxx"),
    ("runtime", {"check_finite": "sometimes"}, "runtime.check_finite", "'sometimes'"),
    ("runtime", {"attention": "exact"}, "runtime.attention", "'exact'"),
    ("runtime", {"attention": {"mode": "topk"}}, "runtime.attention.mode", "'topk'"),
    ("runtime", {"attention": {"read_fraction": 0}}, "runtime.attention.read_fraction", "0"),
    ("runtime", {"attention": {"read_fraction": 1.5}}, "runtime.attention.read_fraction", "1.5"),
    ("runtime", {"attention": {"prune_fraction": -0.5}}, "runtime.attention.prune_fraction", "-0.5"),
    ("runtime", {"attention": {"epsilon": float("nan")}}, "runtime.attention.epsilon", "nan"),
    ("runtime", {"attention": {"epsilon": "1e-3"}}, "runtime.attention.epsilon", "'1e-3'; this is text, write 0.001"),
    ("runtime", {"attention": {"mode": "mass", "score": "quest"}}, "runtime.attention.score", "'quest'"),
    (
        "runtime",
        {"attention": {"mode": "top_k", "read_fraction": 0.5, "prune_fraction": 0.1}},
        "runtime.attention.prune_fraction",
        "0.1",
    ),
    ("runtime", {"attention": {"mode": "mass", "prune_fraction": 0.5}}, "runtime.attention.prune_fraction", "0.5"),
    ("runtime", {"codec": {"keys": "int3"}}, "runtime.codec.keys", "'int3'"),
    ("runtime", {"codec": {"keys": 8}}, "runtime.codec.keys", "8"),
    ("runtime", {"codec": {"rank": 4}}, "runtime.codec.rank", "4"),
    ("runtime", {"budget": {"total_tokens": 100}}, "runtime.budget.total_tokens", "none"),
    ("runtime", {"budget": {"policy": "adaptive"}}, "runtime.budget.policy", "'adaptive'"),
    ("runtime", {"budget": {"observation_window": 0}}, "runtime.budget.observation_window", "0"),
    ("runtime", {"router": {"lambda": 0.1}}, "runtime.router.lambda", "0.1"),
    ("runtime", {"router": {"margin": -1}}, "runtime.router.margin", "-1"),
    ("runtime", {"sharding": {"placement": "random"}}, "runtime.sharding.placement", "'random'"),
    ("runtime", {"overlap": {"prefetch": "on"}}, "runtime.overlap.prefetch", "'on'"),
    ("runtime", {"tiers": []}, "runtime.tiers", "[]"),
    ("runtime", {"tiers": {"kind": "device"}}, "runtime.tiers", "kind"),
    ("runtime", {"tiers": [{"kind": "host"}]}, "runtime.tiers", "host"),
    ("runtime", {"tiers": [{"kind": "host"}, {"kind": "device"}]}, "runtime.tiers", "host"),
    ("runtime", {"tiers": [{"kind": "device"}, {"kind": "host"}]}, "runtime.tiers", "'none'"),
    ("runtime", {"tiers": [{"kind": "tape"}]}, "runtime.tiers[0].kind", "'tape'"),
    ("runtime", {"tiers": [{"bytes": 0}]}, "runtime.tiers.bytes", "0"),
    ("runtime", {"streamer": {"path": "/somewhere"}}, "runtime.streamer.path", "'/somewhere'"),
    ("runtime", {"streamer": {"commit_ms": -1.0}}, "runtime.streamer.commit_ms", "-1.0"),
]


@pytest.mark.parametrize(("section", "mapping", "name", "seen"), WRONG)
def test_wrong_values_name_the_key_and_what_was_seen(section, mapping, name, seen):
    with pytest.raises(ConfigError) as error:
        load({section: mapping})
    message = str(error.value)
    assert message.startswith((f"{name}:", f"{name},")), message
    assert seen in message
    assert len(message) < 400


DEMOTE = {"policy": "pyramid", "first_layer_tokens": 100, "step": 1}


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({"policy": "uniform"}, "runtime.budget.first_layer_tokens"),
        ({"policy": "uniform", "total_tokens": 9, "first_layer_tokens": 9}, "runtime.budget.first_layer_tokens"),
        ({"policy": "uniform", "total_tokens": 9, "step": 1}, "runtime.budget.step"),
        ({"policy": "pyramid", "first_layer_tokens": 9}, "runtime.budget.step"),
        ({"policy": "pyramid", "first_layer_tokens": 9, "step": -1}, "runtime.budget.step"),
        ({**DEMOTE, "over_budget": "demote"}, "runtime.budget.over_budget"),
    ],
)
def test_budgets_that_make_no_sense(budget, name):
    with pytest.raises(ConfigError, match=rf"^{name}"):
        RuntimeConfig.from_dict({"budget": budget})


@pytest.mark.parametrize(
    ("cls", "values", "name"),
    [
        (ModelConfig, {"num_layers": "4"}, "model.num_layers"),
        (ModelConfig, {"dtype": "float64"}, "model.dtype"),
        (ModelConfig, {"dtype": torch.float32}, "model.dtype"),
        (RuntimeConfig, {"window": 6.5}, "runtime.window"),
        (RuntimeConfig, {"attention": "exact"}, "runtime.attention"),
        (AttentionConfig, {"mode": "exakt"}, "runtime.attention.mode"),
        (CodecConfig, {"values": "int16"}, "runtime.codec.values"),
        (BudgetConfig, {"observation_window": 1.5}, "runtime.budget.observation_window"),
        (RouterConfig, {"lambda_": "0"}, "runtime.router.lambda"),
        (ShardingConfig, {"placement": "hash"}, "runtime.sharding.placement"),
        (OverlapConfig, {"prefetch": "sometimes"}, "runtime.overlap.prefetch"),
        (TierConfig, {"kind": "tape"}, "runtime.tiers.kind"),
        (StreamerConfig, {"commit_ms": None}, "runtime.streamer.commit_ms"),
    ],
)
def test_dataclasses_made_by_hand_are_held_to_the_same(cls, values, name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected "):
        cls(**values)


def test_configs_are_frozen():
    for config in (ModelConfig(), RuntimeConfig(), AttentionConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.mode = "exact"


def test_yaml_habits():
    """YAML reads a bare `off` as false and `null` as None; whole numbers do for fractions; lists for tuples."""
    text = """
    model: {moe_layers: [1, 3], softmax_scale: 1}
    runtime:
      overlap: {prefetch: off}
      codec: {keys: null}
      attention: {epsilon: 1}
      budget: {policy: uniform, first_layer_tokens: 500}
      tiers: [{kind: device}, {kind: host, bytes: 4096}]
    """
    model, runtime = load(yaml.safe_load(text))
    assert model.moe_layers == (1, 3)
    assert model.softmax_scale == 1.0
    assert runtime.overlap.prefetch == "off"
    assert runtime.codec.keys == "none"
    assert runtime.attention.epsilon == 1.0
    assert isinstance(runtime.attention.epsilon, float)
    assert runtime.tiers == (TierConfig("device"), TierConfig("host", 4096))


def test_defaults():
    """Those of the documentation."""
    model, runtime = load({})
    assert model is None
    assert (runtime.max_tokens, runtime.window, runtime.sinks, runtime.block_size) == (65536, 64, 4, 32)
    assert runtime.attention == AttentionConfig("exact", 0.125, 1.0, "planes", 0.05, "estimate")
    assert runtime.codec == CodecConfig("none", "none", 0)
    assert runtime.budget.policy == "none"
    assert runtime.tiers == (TierConfig("device", None),)
    assert ModelConfig().v_head_dim == ModelConfig().head_dim == 32
    assert ModelConfig().scale == 32**-0.5


def test_dump_is_read_back_to_equal_configs(tmp_path):
    model = ModelConfig(num_layers=3, v_head_dim=16, moe_layers=(0, 2), softmax_scale=0.1, dtype="bfloat16")
    runtime = RuntimeConfig(
        max_tokens=4096,
        attention=AttentionConfig(mode="mass", epsilon=1e-6),
        codec=CodecConfig("int8", "int4"),
        budget=BudgetConfig(policy="pyramid", total_tokens=3000),
        tiers=(TierConfig(), TierConfig("host", 10**9)),
        overlap=OverlapConfig("off"),
    )
    text = dump(model, runtime)
    path = tmp_path / "resolved.yaml"
    path.write_text(text)
    assert load(path) == (model, runtime)
    assert dump(*load(path)) == text
    written = yaml.safe_load(text)
    assert written["runtime"]["router"] == {"lambda": 0.0, "margin": 0.0}
    assert set(written["runtime"]) == {f.name for f in dataclasses.fields(RuntimeConfig)}


def test_one_yaml_file_makes_a_cache(tmp_path):
    path = tmp_path / "pikv.yaml"
    path.write_text(yaml.safe_dump({"model": SMALL, "runtime": {**SMALL_RUNTIME, "codec": {"keys": "int8"}}}))
    for source in (path, str(path), yaml.safe_load(path.read_text())):
        cache = PiKVCache(source)
        assert cache.model.head_dim == 8
        assert cache.runtime.codec.keys == "int8"
    assert PiKVCache(path, {**SMALL_RUNTIME, "window": 5}).runtime.window == 5
    assert PiKVCache(SMALL, {"runtime": SMALL_RUNTIME}).runtime.window == 4


def test_dicts_dataclasses_and_files_resolve_alike(tmp_path):
    model, runtime = ModelConfig.from_dict(SMALL), RuntimeConfig.from_dict(SMALL_RUNTIME)
    path = tmp_path / "runtime.yaml"
    path.write_text(yaml.safe_dump({"runtime": SMALL_RUNTIME}))
    for pair in [(model, runtime), (SMALL, SMALL_RUNTIME), (model, SMALL_RUNTIME), (SMALL, path), (SMALL, str(path))]:
        assert resolve(*pair) == (model, runtime)
    assert resolve(model) == (model, RuntimeConfig())


def test_sources_that_cannot_be_read(tmp_path):
    path = tmp_path / "odd.yaml"
    with pytest.raises(FileNotFoundError, match="odd"):
        PiKVCache(path)
    for text, reason in [("- 1\n- 2\n", "expected a mapping"), ("a: [1", "not YAML"), ("", "expected a mapping")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load(path)
    path.write_text(yaml.safe_dump({"runtime": SMALL_RUNTIME}))
    with pytest.raises(ConfigError, match=r"^model: section missing"):
        PiKVCache(path)
    with pytest.raises(ConfigError, match=r"^model: expected a ModelConfig"):
        resolve(None, SMALL_RUNTIME)
    with pytest.raises(ConfigError, match=r"^runtime: expected a RuntimeConfig"):
        resolve(SMALL, 3)
    with pytest.raises(ConfigError, match=r"^runtime: expected a mapping"):
        load({"runtime": [1]})


def test_a_file_for_another_model_is_refused(tmp_path):
    path = tmp_path / "mixtral.yaml"
    path.write_text(yaml.safe_dump({"model": {**SMALL, "head_dim": 16}, "runtime": SMALL_RUNTIME}))
    with pytest.raises(ConfigError, match=r"another model \(head_dim: 16 here, 8 in the model"):
        PiKVCache(SMALL, path)
    path.write_text(yaml.safe_dump({"model": SMALL, "runtime": SMALL_RUNTIME}))
    assert PiKVCache(SMALL, path).model.head_dim == 8


def test_a_device_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    runtime = RuntimeConfig(device="cuda", max_tokens=64)  # a plan for another machine is no error
    with pytest.raises(ConfigError, match=r"^runtime\.device: .*'cuda'"):
        PiKVCache(SMALL, runtime)
    assert RuntimeConfig().torch_device == torch.device("cpu")


def test_a_pickled_config_finds_its_device_anew(monkeypatch):
    runtime = RuntimeConfig(max_tokens=64)
    assert runtime.torch_device.type in ("cpu", "cuda")
    bytes_ = pickle.dumps(runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: runtime.torch_device.type == "cpu")
    read = pickle.loads(bytes_)
    assert read == runtime
    assert read.torch_device.type != runtime.torch_device.type


def test_deepspeed_json_holds_the_same_sections(tmp_path):
    block = {"model": SMALL, "runtime": {**SMALL_RUNTIME, "attention": {"mode": "top_k"}}}
    whole = {"train_batch_size": 1, "pikv": block}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(whole))
    expected = load(block)[1]
    assert RuntimeConfig.from_deepspeed(whole) == RuntimeConfig.from_deepspeed(path) == expected
    yaml_path = tmp_path / "pikv.yaml"
    yaml_path.write_text(json.dumps(block))
    for given in (whole, path, {"train_batch_size": 1, "pikv": str(yaml_path)}):
        assert load_deepspeed(given) == ({"train_batch_size": 1}, *load(block))
    assert "pikv" in whole  # the caller's own is left as it is
    with pytest.raises(ConfigError, match=r"^pikv: expected this block .*train_batch_size"):
        RuntimeConfig.from_deepspeed({"train_batch_size": 1})
    with pytest.raises(ConfigError, match=r"^pikv\.runtime\.windo: unknown key; did you mean 'window'"):
        RuntimeConfig.from_deepspeed({"pikv": {"runtime": {"windo": 1}}})
    with pytest.raises(ConfigError, match=r"^pikv\.runtime\.codec\.keys: expected one of none, .*'int9'; did you mean"):
        RuntimeConfig.from_deepspeed({"pikv": {"runtime": {"codec": {"keys": "int9"}}}})
    for text, said in (
        ("{'a': 1}", "not JSON: Expecting property name"),
        ("[1]", "expected a JSON object, got list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{path}: {said}"):
            load_deepspeed(path)


def test_which_layer_labels_which():
    sparse = ModelConfig(num_layers=6, moe_layers=(1, 4))
    assert [sparse.label_source(i) for i in range(6)] == [None, 1, 1, 1, 4, 4]
    assert [ModelConfig(num_layers=3).label_source(i) for i in range(3)] == [0, 1, 2]
    assert [ModelConfig(num_layers=2, num_experts=0).label_source(i) for i in range(2)] == [None, None]


def test_planes_are_kept_where_they_are_needed():
    def planes(**changes):
        return "k_high" in Compressor(ModelConfig(), RuntimeConfig(**changes)).fields()

    assert not planes()
    assert planes(codec=CodecConfig(keys="int4"))
    assert not planes(codec=CodecConfig(values="int4"))
    assert planes(attention=AttentionConfig(mode="top_k"))


def test_a_dense_model_has_no_moe_layers():
    with pytest.raises(ConfigError, match=r"model.moe_layers: expected null .* got \[1\]"):
        ModelConfig(num_experts=0, moe_layers=(1,))


def test_all_layers_named_is_all_layers():
    assert ModelConfig(num_layers=3, moe_layers=(0, 1, 2)) == ModelConfig(num_layers=3)
    with pytest.raises(ConfigError, match=r"model.moe_layers: expected ascending ids, each once, got \[2, 1, 1\]"):
        ModelConfig(num_layers=3, moe_layers=(2, 1, 1))
