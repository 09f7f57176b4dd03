"""DeepSpeed on PiKV: Hugging Face models under `init_inference` (one rank, or AutoTP with its share of the KV heads on
each) and under `initialize` with AutoEP (the experts spread over ranks, each rank with requests of its own).

    engine = init_inference(model, {"dtype": "fp32", "tensor_parallel": {"tp_size": 2}, "pikv": {"runtime": {...}}})
    engine.generate(ids, attention_mask=mask, max_new_tokens=64)  # makes its cache itself

Models of `deepspeed.moe.layer.MoE` are observed by `moe.hook_moe`; what is assumed of DeepSpeed, and patched
while its own initialisation runs, is in `support`. The cache is `huggingface.PiKVHFCache`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.inference.config import DeepSpeedInferenceConfig
from torch import nn

from pikv_megatron.config import ModelConfig, RuntimeConfig, check_same_model, load_deepspeed
from pikv_megatron.config.io import ConfigError
from pikv_megatron.integrations.deepspeed.agreement import Agreement
from pikv_megatron.integrations.deepspeed.moe import MoEHooks, MoEListener, hook_moe
from pikv_megatron.integrations.deepspeed.support import float32_kept, init_distributed, local_rank, registry_by_name
from pikv_megatron.integrations.huggingface import PiKVHFCache, model_config
from pikv_megatron.integrations.huggingface.mla import ZERO_3, caches_latents
from pikv_megatron.integrations.huggingface.model import attention_layers, find_model

__all__ = ["MoEHooks", "MoEListener", "hook_moe", "init_distributed", "init_inference", "initialize"]

Block = Mapping[str, Any] | str | Path
DeepSpeedConfig = Block | None

logger = logging.getLogger(__name__)

NORM = "cuts the heads but not the norm that goes over all of them"
ROUTER = "cuts the router's output"
NOT_BY_AUTOTP = {
    "flex_olmo": NORM,
    "gpt_oss": "cuts the heads but not their sinks",
    "hunyuan_v1_moe": ROUTER,
    "longcat_flash": ROUTER,
    "minimax_m2": NORM,
    "olmo2": NORM,
    "olmo3": NORM,
    "olmoe": NORM,
    "phi3": "cuts queries, keys and values, which are one matrix, as if they were of one size",
    "phimoe": ROUTER,
}
"""Model types that AutoTP of DeepSpeed 0.19 gets wrong with tp_size above 1, with or without PiKV."""
BY_AUTOTP = {
    "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone4", "gemma3_text", "glm4_moe",
    "glm4_moe_lite", "granitemoe", "llama", "mistral", "mistral4", "mixtral", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3",
}  # fmt: skip
"""Model types that the tests run under AutoTP."""
NO_EFFECT = {
    "quant": "reads it for its own kernels alone, which PiKV does not run (the cache's codec is pikv.runtime.codec)",
    "zero": "never reads it (ZeRO is zero_optimization, of initialize)",
}
"""Sections of an inference config that DeepSpeed takes and does nothing with here."""


def init_inference(
    model: nn.Module, config: DeepSpeedConfig = None, *, pikv: Block | None = None, **kwargs: Any
) -> Any:
    """`deepspeed.init_inference`, with generation on PiKV.

    Args:
        model: a transformers model on its usual attention.
        config: as `config.load_deepspeed`; what is DeepSpeed's goes there. tensor_parallel.tp_size is 1 or the number
            of ranks.
        pikv: the `"pikv"` block, where `config` has none.
        kwargs: further keys of DeepSpeed's config, as it takes them.

    Returns:
        DeepSpeed's InferenceEngine. `engine.generate` makes a cache for each call, unless it is given one as
        `past_key_values`, and keeps the newest as `engine.pikv_cache`. Under AutoTP every rank makes the same call.

    Raises:
        ConfigError: as `config.load_deepspeed`, or its section model is for another model.
        NotImplementedError: a model, or a choice of DeepSpeed's, that PiKV or AutoTP does not serve exactly, by name.
        ValueError: a tp_size that does not fit the ranks; what DeepSpeed refuses.
    """
    own, given, runtime = load_deepspeed(config, pikv)
    parsed = DeepSpeedInferenceConfig(**{**own, **kwargs})
    for key in ("replace_with_kernel_inject", "enable_cuda_graph"):
        if getattr(parsed, key):
            raise NotImplementedError(f"{key}: PiKV serves the model's own modules, expected false")
    for key, meant in NO_EFFECT.items():
        if own.get(key, kwargs.get(key)):
            logger.warning("%s: no effect; init_inference of DeepSpeed %s %s", key, deepspeed.__version__, meant)
    host = find_model(model)
    whole = model_config(host)
    _check_given(given, whole, str(parsed.dtype).removeprefix("torch."))
    init_distributed()
    ranks, tp_size = dist.get_world_size(), parsed.tensor_parallel.tp_size
    if tp_size not in (1, ranks):
        raise ValueError(f"tensor_parallel.tp_size: expected 1 or the number of ranks, {ranks}, got {tp_size}")
    if tp_size > 1:
        _check_autotp(_text_config(host), tp_size)
    with float32_kept(host):
        engine = deepspeed.init_inference(model, config=own, **kwargs)
    generate = engine.generate

    def generate_with_beams_said(*inputs: Any, **kwargs: Any) -> Any:
        given = kwargs.get("generation_config")
        if given is not None and given.num_beams is None:  # the model's own, which DeepSpeed does not look up
            kwargs.setdefault("num_beams", host.generation_config.num_beams or 1)
        return generate(*inputs, **kwargs)

    _serve(engine, generate_with_beams_said, runtime)
    return engine


def initialize(model: nn.Module, config: DeepSpeedConfig = None, *, pikv: Block | None = None, **kwargs: Any) -> Any:
    """`deepspeed.initialize` for a model that is to generate on PiKV, its experts spread over the ranks by AutoEP.

    Args:
        model: a transformers model on its usual attention.
        config: as `config.load_deepspeed`; what is DeepSpeed's, `expert_parallel` with it, goes there.
        pikv: the `"pikv"` block, where `config` has none.
        kwargs: further arguments of `deepspeed.initialize`.

    Returns:
        Its tuple: engine, optimizer, dataloader, scheduler. The engine is in eval mode; `engine.generate` is as
        `init_inference` has it, but each rank generates for requests of its own. All ranks must call it equally often:
        one that is done goes on until the last is (`synced_gpus`), so `max_tokens` has to hold the longest call.

    Raises:
        ConfigError: as `config.load_deepspeed`, its section model is for another model, or expert_parallel is no block.
        NotImplementedError: a model that PiKV or AutoEP does not serve exactly.
        RuntimeError: AutoEP is asked for but knows no layer of this model; or DeepSpeed or transformers have changed.
    """
    own, given, runtime = load_deepspeed(config, pikv)
    whole = model_config(model)
    _check_given(given, whole, whole.dtype)
    block = own.get("expert_parallel") or {}
    if not isinstance(block, Mapping):
        raise ConfigError(f"expert_parallel: expected a mapping of keys, got {block!r}")
    host, zero = find_model(model), own.get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("stage") == 3 and caches_latents(attention_layers(host)[0][1]):
        raise NotImplementedError(f"zero_optimization.stage: {_text_config(host).model_type} {ZERO_3}")
    autoep = block.get("enabled")
    if autoep:
        _check_autoep(_text_config(host))
    init_distributed()
    with local_rank(), registry_by_name():
        made = deepspeed.initialize(model=model, config=own, **kwargs)
    engine = made[0]
    if autoep and not autoep_layers(engine):
        raise RuntimeError(
            f"expert_parallel: AutoEP of DeepSpeed {deepspeed.__version__} found no experts that it knows in "
            f"{type(find_model(engine)).__name__}"
        )
    engine.eval()

    def generate(*inputs: Any, **kwargs: Any) -> Any:
        with local_rank():  # ZeRO-3 asks for it at every forward
            return engine.module.generate(*inputs, **kwargs)

    _serve(engine, generate, runtime, Agreement() if dist.get_world_size() > 1 else None)
    return made


def autoep_layers(engine: nn.Module) -> list[Any]:
    """AutoEP's layers in a model. Each has `ep_group`, `ep_rank`, `ep_size` and its `router`."""
    return [module for module in engine.modules() if getattr(module, "_is_autoep_layer", False)]


def _check_given(given: ModelConfig | None, whole: ModelConfig, dtype: Any) -> None:
    """Checks a config's section `model`, where it has one, against the whole model in the dtype it is to run in."""
    if given is not None:
        check_same_model(given, dataclasses.replace(whole, dtype=dtype), "pikv.model")


def _text_config(host: Any) -> Any:
    return host.config.get_text_config(decoder=True)


def _check_autoep(config: Any) -> None:
    groups = getattr(config, "n_group", None) or 1
    if config.model_type == "deepseek_v2" and config.topk_method == "greedy" and groups > 1:
        raise NotImplementedError(
            f"expert_parallel: AutoEP of DeepSpeed {deepspeed.__version__} limits routes to groups of experts, which "
            f"topk_method greedy of deepseek_v2 does not: expected n_group 1 in the model's config, got {groups}"
        )


def _check_autotp(config: Any, tp_size: int) -> None:
    if config.model_type in NOT_BY_AUTOTP:
        raise NotImplementedError(
            f"tensor_parallel.tp_size: AutoTP of DeepSpeed {deepspeed.__version__} {NOT_BY_AUTOTP[config.model_type]} "
            f"in {config.model_type}; expected 1"
        )
    heads = config.num_key_value_heads or config.num_attention_heads
    if heads % tp_size:
        raise ValueError(f"tensor_parallel.tp_size: expected a divisor of the {heads} KV heads, got {tp_size}")
    if config.model_type not in BY_AUTOTP:
        logger.warning(
            "AutoTP of DeepSpeed %s cuts layers by name and was not tested with %s: compare its answers with those "
            "of one rank",
            deepspeed.__version__,
            config.model_type,
        )


def _serve(
    engine: Any, generate: Callable[..., Any], runtime: RuntimeConfig, agreement: Agreement | None = None
) -> None:
    """Puts a `generate` that makes its own cache in front of an engine's; the first cache attaches the model.

    agreement: of ranks whose forwards meet in collectives.
    """

    def generate_on_pikv(*inputs: Any, **kwargs: Any) -> Any:
        given = kwargs.get("past_key_values")
        ours = kwargs.get("use_cache") is not False if given is None else isinstance(given, PiKVHFCache)
        if agreement is not None:
            kwargs.setdefault("synced_gpus", True)
        with agreement.call() if agreement is not None and ours else nullcontext():
            if ours and given is None:
                _check_no_cache_is_named(engine, kwargs)
                kwargs["use_cache"] = True  # a config without it would feed every token again at each step
                engine.pikv_cache = None  # its memory goes before the next one's is taken
                kwargs["past_key_values"] = engine.pikv_cache = PiKVHFCache(engine, runtime)
            if ours and agreement is not None:
                kwargs["past_key_values"].agreement = agreement
            return generate(*inputs, **kwargs)

    engine.pikv_cache = None
    engine.generate = generate_on_pikv


def _check_no_cache_is_named(engine: Any, kwargs: Mapping[str, Any]) -> None:
    """Checks that no cache of transformers' own is asked for, by whom ever."""
    for where, name in (
        ("cache_implementation", kwargs.get("cache_implementation")),
        ("generation_config", getattr(kwargs.get("generation_config"), "cache_implementation", None)),
        ("model.generation_config", getattr(find_model(engine).generation_config, "cache_implementation", None)),
    ):
        if name is not None:
            raise ValueError(
                f"{where}: expected no cache_implementation, since engine.generate makes a PiKVHFCache, got {name!r}; "
                "for a cache of transformers' own, huggingface.detach(engine) and call engine.module.generate"
            )
