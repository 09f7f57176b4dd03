"""What Megatron-core's and Hugging Face's configurations say of a model, and which are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pikv_megatron import ConfigError, ModelConfig

HF = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}


def test_hugging_face_configs():
    model = ModelConfig.from_huggingface(HF)
    assert (model.num_layers, model.num_attention_heads, model.num_query_groups, model.head_dim) == (3, 6, 2, 16)
    assert (model.num_experts, model.topk, model.dtype) == (8, 2, "bfloat16")
    assert ModelConfig.from_huggingface(SimpleNamespace(**{**HF, "torch_dtype": torch.bfloat16})) == model
    assert ModelConfig.from_huggingface({**HF, "head_dim": 32}).head_dim == 32
    dense = {k: v for k, v in HF.items() if "experts" not in k and "key_value" not in k}
    model = ModelConfig.from_huggingface(dense)
    assert (model.num_query_groups, model.num_experts) == (6, 0)
    qwen = {**dense, "num_experts": 16, "num_experts_per_tok": 4}
    assert ModelConfig.from_huggingface(qwen).num_experts == 16
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        ModelConfig.from_huggingface({**HF, "kv_lora_rank": 512})
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        with pytest.raises(ConfigError, match=key):
            ModelConfig.from_huggingface({k: v for k, v in HF.items() if k != key})
    with pytest.raises(ConfigError, match=r"^model\.dtype"):
        ModelConfig.from_huggingface({**HF, "torch_dtype": "float64"})


def _megatron(**changes):
    values = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 16,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_layer_freq": 1,
        "params_dtype": torch.bfloat16,
        "tensor_model_parallel_size": 1,
        "multi_latent_attention": False,
        "softmax_scale": None,
    }
    return SimpleNamespace(**{**values, **changes})


def test_megatron_configs():
    model = ModelConfig.from_megatron(_megatron())
    assert (model.num_layers, model.num_attention_heads, model.num_query_groups, model.head_dim) == (4, 8, 4, 16)
    assert (model.num_experts, model.topk, model.dtype, model.moe_layers) == (8, 2, "bfloat16", None)
    halves = ModelConfig.from_megatron(_megatron(tensor_model_parallel_size=2))
    assert (halves.num_attention_heads, halves.num_query_groups) == (4, 2)
    shared = ModelConfig.from_megatron(_megatron(tensor_model_parallel_size=8))
    assert (shared.num_attention_heads, shared.num_query_groups) == (1, 1)
    assert ModelConfig.from_megatron(_megatron(num_query_groups=None)).num_query_groups == 8
    assert ModelConfig.from_megatron(_megatron(moe_layer_freq=2)).moe_layers == (0, 2)
    assert ModelConfig.from_megatron(_megatron(moe_layer_freq=[0, 1, 1, 0])).moe_layers == (1, 2)
    dense = ModelConfig.from_megatron(_megatron(num_moe_experts=None))
    assert (dense.num_experts, dense.moe_layers) == (0, None)
    assert ModelConfig.from_megatron(_megatron(softmax_scale=0.5)).scale == 0.5
    with pytest.raises(ConfigError, match=r"8 heads in 4 groups .* tensor_model_parallel_size 3"):
        ModelConfig.from_megatron(_megatron(tensor_model_parallel_size=3))
    with pytest.raises(ConfigError, match="multi_latent_attention"):
        ModelConfig.from_megatron(_megatron(multi_latent_attention=True))


def test_what_hugging_face_configs_say_of_attention():
    assert ModelConfig.from_huggingface({**HF, "query_pre_attn_scalar": 64}).scale == 0.125
    assert ModelConfig.from_huggingface({**HF, "attention_multiplier": 0.3}).scale == 0.3
    with pytest.raises(ConfigError, match="layer_types has linear_attention; expected full_attention or sliding_atten"):
        ModelConfig.from_huggingface({**HF, "layer_types": ["linear_attention", "full_attention"]})


def test_sliding_windows_of_hugging_face_configs():
    layers = HF["num_hidden_layers"]
    assert ModelConfig.from_huggingface({**HF, "sliding_window": 128}).sliding_windows == (128,) * layers
    assert ModelConfig.from_huggingface({**HF, "sliding_window": None}).sliding_windows is None
    off = {**HF, "sliding_window": 128, "use_sliding_window": False}
    assert ModelConfig.from_huggingface(off).sliding_windows is None
    kinds = ["full_attention", *["sliding_attention"] * (layers - 1)]
    mixed = ModelConfig.from_huggingface({**HF, "sliding_window": 128, "layer_types": kinds})
    assert mixed.sliding_windows == (None, *[128] * (layers - 1))


def test_dense_layers_of_hugging_face_configs():
    shape = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "num_experts": 8}
    assert ModelConfig.from_huggingface(shape).moe_layers is None
    assert ModelConfig.from_huggingface({**shape, "first_k_dense_replace": 2}).moe_layers == (2, 3, 4, 5)
    assert ModelConfig.from_huggingface({**shape, "mlp_only_layers": [0, 3]}).moe_layers == (1, 2, 4, 5)
    assert ModelConfig.from_huggingface({**shape, "decoder_sparse_step": 2}).moe_layers == (1, 3, 5)
