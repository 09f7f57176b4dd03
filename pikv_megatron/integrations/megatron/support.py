"""What PiKV does not serve under Megatron-core, refused by name: in a model's config, a layer, an inference config.

Read from Megatron-core 0.19.2, transformer/attention.py. What passes these checks is served exactly (mode exact, codec
none).
"""

from __future__ import annotations

from typing import Any

from megatron.core.inference.config import AsyncScheduleMode, InferenceConfig, KVCacheManagementMode
from megatron.core.transformer.attention import Attention, CrossAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention


def check_config(config: TransformerConfig) -> None:
    """Refuses a model whose attention PiKV cannot reproduce.

    Raises:
        NotImplementedError: names every setting that stands in the way, with its value.
    """
    refused = {
        "multi_latent_attention": (config.multi_latent_attention, "MLA caches latents, not keys and values"),
        "experimental_attention_variant": (config.experimental_attention_variant, "not dot-product attention"),
        "softmax_type": (config.softmax_type != "vanilla" and config.softmax_type, "softmax offsets and sinks"),
        "window_size": (_windowed_layers(config), "sliding-window layers"),
        "fused_single_qkv_rope": (config.fused_single_qkv_rope, "keys are not seen before attention"),
        "flash_decode": (config.flash_decode, "the kernel reads Megatron's own KV memory"),
        "cuda_graph_impl": (config.cuda_graph_impl != "none" and config.cuda_graph_impl, "CUDA graphs of the layers"),
        "context_parallel_size": (config.context_parallel_size > 1 and config.context_parallel_size, "split sequences"),
        "sequence_parallel": (config.sequence_parallel, "the router sees other tokens than attention"),
        "pipeline_model_parallel_size": (
            config.pipeline_model_parallel_size > 1 and config.pipeline_model_parallel_size,
            "layers of other ranks",
        ),
        "mtp_num_layers": (config.mtp_num_layers, "multi-token prediction layers"),
    }
    found = [f"{name}={value!r} ({why})" for name, (value, why) in refused.items() if value]
    if found:
        raise NotImplementedError(f"PiKV does not serve this model: {'; '.join(found)}")


def _windowed_layers(config: TransformerConfig) -> str:
    layers = range(1, config.num_layers + 1)
    windowed = [
        str(n) for n in layers if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, n)
    ]
    return f"{config.window_size} in layers {', '.join(windowed)}" if windowed else ""


def check_attention(name: str, host: type[Attention]) -> None:
    """Refuses an attention class of a kind that PiKV does not know.

    Raises:
        NotImplementedError: cross attention, or a class with a forward of its own (MLA, linear attention).
    """
    if issubclass(host, CrossAttention):
        raise NotImplementedError(f"{name}: PiKV serves self attention, got {host.__name__}")
    if host.forward is not Attention.forward:
        raise NotImplementedError(
            f"{name}: PiKV follows Attention.forward, but {host.__name__} has a forward of its own"
        )


def check_mask_type(name: str, mask_type: AttnMaskType) -> None:
    """Refuses attention that is not causal.

    Raises:
        NotImplementedError: a mask of another kind.
    """
    if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise NotImplementedError(f"{name}: PiKV serves causal attention, got attn_mask_type {mask_type.name!r}")


def check_inference_config(config: InferenceConfig) -> None:
    """Refuses features of the dynamic engine that read or copy Megatron's own KV buffer.

    Raises:
        NotImplementedError: names every feature that was asked for and is not served.
    """
    refused: dict[str, Any] = {
        "enable_prefix_caching": config.enable_prefix_caching,
        "num_speculative_tokens": config.num_speculative_tokens,
        "num_cuda_graphs": config.num_cuda_graphs,
        "unified_memory_level": config.unified_memory_level,
        "mamba_inference_state_config": config.mamba_inference_state_config,
    }
    found = [f"{name}={value!r}" for name, value in refused.items() if value]
    if config.kv_cache_management_mode != KVCacheManagementMode.PERSIST:
        found.append(f"kv_cache_management_mode={config.kv_cache_management_mode.value!r} (expected 'persist')")
    if config.async_sched_mode != AsyncScheduleMode.LEGACY:
        found.append(f"async_sched_mode={config.async_sched_mode.value!r} (expected 'legacy')")
    if found:
        raise NotImplementedError(f"PiKV's dynamic context does not serve: {', '.join(found)}")
