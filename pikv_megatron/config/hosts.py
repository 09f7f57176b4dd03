"""What other configurations say of a model: the keyword arguments of a `ModelConfig`, read from Megatron-core's and
Hugging Face's, neither of which is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from pikv_megatron.config.io import ConfigError


def megatron_fields(config: Any) -> dict[str, Any]:
    """See ModelConfig.from_megatron."""
    if getattr(config, "multi_latent_attention", False):
        raise ConfigError(
            "model: multi_latent_attention is set; give the expanded shapes (head_dim, v_head_dim) by hand"
        )
    tensor_parallel = config.tensor_model_parallel_size
    experts = config.num_moe_experts or 0
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        moe_layers = tuple(i for i in range(config.num_layers) if i % frequency == 0)
    else:
        moe_layers = tuple(i for i, is_moe in enumerate(frequency) if is_moe)
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    if heads % tensor_parallel or max(groups, tensor_parallel) % min(groups, tensor_parallel):
        raise ConfigError(
            f"model.num_query_groups: {heads} heads in {groups} groups cannot be divided over "
            f"tensor_model_parallel_size {tensor_parallel}"
        )
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads // tensor_parallel,
        "num_query_groups": max(1, groups // tensor_parallel),
        "head_dim": config.kv_channels,
        "num_experts": experts,
        "topk": config.moe_router_topk if experts else 1,
        "dtype": _dtype_name(config.params_dtype),
        "moe_layers": moe_layers if experts and len(moe_layers) < config.num_layers else None,
        "softmax_scale": getattr(config, "softmax_scale", None),
    }


def huggingface_fields(config: Any) -> dict[str, Any]:
    """See ModelConfig.from_huggingface."""
    read = config.get if isinstance(config, Mapping) else functools.partial(_attribute, config)
    get: Callable[[str], Any] = read
    if get("kv_lora_rank"):
        raise ConfigError("model: kv_lora_rank is set (MLA); give the expanded shapes (head_dim, v_head_dim) by hand")
    for key in ("attn_logit_softcapping", "attention_chunk_size", "attn_layer_period"):
        if get(key):
            raise ConfigError(f"model: {key} is {get(key)}; expected plain attention in every layer")
    kinds = set(get("layer_types") or ()) - {"full_attention", "attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"model: layer_types has {', '.join(sorted(kinds))}; expected full_attention or sliding_attention"
        )
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if get(key) is None:
            raise ConfigError(f"model: expected {key} in the Hugging Face config, it has none")
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    experts = get("num_local_experts") or get("num_experts") or get("n_routed_experts") or 0
    layers = get("num_hidden_layers")
    dense = set(get("mlp_only_layers") or ()) | set(range(get("first_k_dense_replace") or 0))
    step = get("decoder_sparse_step") or 1
    moe_layers = tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": get("num_key_value_heads") or heads,
        "head_dim": get("head_dim") or hidden // heads,
        "num_experts": experts,
        "topk": get("num_experts_per_tok") or 1,
        "dtype": _dtype_name(get("dtype") or get("torch_dtype") or "float32"),
        "moe_layers": moe_layers if experts and len(moe_layers) < layers else None,
        "softmax_scale": _huggingface_scale(get),
        "sliding_windows": _huggingface_windows(get, layers),
    }


def _huggingface_windows(get: Callable[[str], Any], layers: int) -> tuple[int | None, ...] | None:
    """ModelConfig.sliding_windows of a `transformers` config that is read by `get`."""
    window, kinds = get("sliding_window"), get("layer_types")
    if not window or get("use_sliding_window") is False:
        return None
    return tuple(window if kinds is None or kinds[i] == "sliding_attention" else None for i in range(layers))


def _huggingface_scale(get: Callable[[str], Any]) -> float | None:
    """The factor on q.k where a config names one: Granite's attention_multiplier, Gemma's query_pre_attn_scalar."""
    if get("attention_multiplier"):
        return float(get("attention_multiplier"))
    return float(get("query_pre_attn_scalar")) ** -0.5 if get("query_pre_attn_scalar") else None


def _attribute(config: Any, key: str) -> Any:
    return getattr(config, key, None)


def _dtype_name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.")
