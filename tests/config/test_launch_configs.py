"""launch/configs/*.yaml: each is a whole file that loads strictly, and holds its model's true shapes.

The shapes are written out here a second time, from the models' published configurations.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

from pikv_megatron.config import ModelConfig, RuntimeConfig, dump, load, load_deepspeed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch" / "configs"

TRUE_SHAPES = {
    "small_moe": ModelConfig.from_huggingface(
        {**json.loads((ROOT / "assets" / "small_moe" / "config.json").read_text()), "dtype": "float32"}
    ),
    "mixtral_8x7b": ModelConfig.from_huggingface(
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "torch_dtype": "bfloat16",
        }
    ),
    "qwen3_30b_a3b": ModelConfig.from_huggingface(
        {
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "torch_dtype": "bfloat16",
        }
    ),
    "deepseek_v3": ModelConfig(
        num_layers=61,
        hidden_size=7168,
        num_attention_heads=128,
        num_query_groups=128,
        head_dim=128 + 64,  # content and position
        v_head_dim=128,
        num_experts=256,
        topk=8,
        dtype="bfloat16",
        moe_layers=tuple(range(3, 61)),
        softmax_scale=192**-0.5 * (0.1 * 1.0 * math.log(40) + 1.0) ** 2,  # YaRN: factor 40, mscale_all_dim 1
    ),
}


def test_every_config_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(TRUE_SHAPES)


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_true_shapes(name):
    model, _ = load(CONFIGS / f"{name}.yaml")
    assert model == TRUE_SHAPES[name]


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_whole_file(name):
    """No key is left to a default that may change: the file says what its resolved form says."""
    path = CONFIGS / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    resolved = yaml.safe_load(dump(*load(path)))
    written["model"]["v_head_dim"] = resolved["model"]["v_head_dim"]  # null resolves to head_dim
    assert written == resolved


def test_deepspeed_samples(monkeypatch):
    """Each loads strictly; the ones that name a YAML file mean it."""
    monkeypatch.chdir(ROOT)
    found = {path.stem: load_deepspeed(path) for path in sorted((ROOT / "launch" / "ds").glob("*.json"))}
    assert list(found) == ["mixtral_8x7b_autotp", "qwen3_30b_a3b_autoep", "small_moe"]
    for name in ("mixtral_8x7b", "qwen3_30b_a3b"):
        (rest, *sections) = next(value for key, value in found.items() if key.startswith(name))
        assert tuple(sections) == load(CONFIGS / f"{name}.yaml")
        assert rest.get("tensor_parallel") or rest["expert_parallel"]["enabled"]
    assert found["small_moe"][1:] == (
        None,
        RuntimeConfig.from_dict({"max_tokens": 4096, "codec": {"keys": "int8", "values": "int8"}}),
    )
