"""launch/configs/*.yaml: each is a whole file that loads strictly, and holds its model's true shapes.

The shapes are written out here a second time, from the models' published configurations.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

from pikv_megatron.config import ModelConfig, dump, load

ROOT = Path(__file__).parents[1]
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
