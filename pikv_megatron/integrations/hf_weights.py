"""Mixtral-shaped checkpoints of Hugging Face for Megatron-core: the model that one describes, loaded, and saved again.

Reads a directory with `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json` lists,
and writes one with a single file; which weight goes where is in `mixtral_names`. With expert parallelism each rank
reads its own experts only. Without CUDA, call `cpu_compat.install()` before importing this module.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pikv_megatron.config.io import brief
from pikv_megatron.config.parse import read_json
from pikv_megatron.integrations.checkpoint import check_finite, shards
from pikv_megatron.integrations.mixtral_names import (
    State,
    WeightsError,
    check_names,
    hf_to_megatron,
    local_experts,
    megatron_to_hf,
    other_experts_names,
    tensor_names,
)

__all__ = [
    "WeightsError",
    "build_model",
    "hf_to_megatron",
    "load_mixtral",
    "load_weights",
    "megatron_to_hf",
    "save_mixtral",
    "transformer_config",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

LayerSpec: TypeAlias = ModuleSpec | Callable[[TransformerConfig], ModuleSpec]

_WITHOUT_CUDA: dict[str, Any] = {
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
}


def transformer_config(hf_config: Mapping[str, Any], **overrides: Any) -> TransformerConfig:
    """The Megatron configuration of a Hugging Face Mixtral `config.json`.

    Args:
        hf_config: its mapping. Both the `rope_parameters` and the older `rope_theta` form are read.
        overrides: further `TransformerConfig` fields, or other values for the ones set here.

    Raises:
        WeightsError: a key is missing, or asks for what the Megatron side does not do (another model type,
            activation or kind of RoPE, sliding windows, tied embeddings).
    """
    _refuse(hf_config, "model_type", "mixtral")
    _refuse(hf_config, "hidden_act", "silu")
    _refuse(hf_config, "sliding_window", None)
    _refuse(hf_config, "tie_word_embeddings", False)
    _rope_theta(hf_config)
    hidden_size = _required(hf_config, "hidden_size")
    num_heads = _required(hf_config, "num_attention_heads")
    fields: dict[str, Any] = {
        "num_layers": _required(hf_config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": _required(hf_config, "num_key_value_heads"),
        "kv_channels": hidden_size // num_heads
        if hf_config.get("head_dim") is None
        else _required(hf_config, "head_dim"),
        "ffn_hidden_size": _required(hf_config, "intermediate_size"),
        "moe_ffn_hidden_size": _required(hf_config, "intermediate_size"),
        "num_moe_experts": _required(hf_config, "num_local_experts"),
        "moe_router_topk": _required(hf_config, "num_experts_per_tok"),
        "moe_router_pre_softmax": False,  # = softmax values of the chosen, renormalised
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": _required(hf_config, "rms_norm_eps", float),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": _required({"attention_dropout": 0.0, **hf_config}, "attention_dropout", float),
    }
    if not torch.cuda.is_available():
        fields |= _WITHOUT_CUDA
    return TransformerConfig(**(fields | overrides))


def build_model(hf_config: Mapping[str, Any], *, layer_spec: LayerSpec | None = None, **overrides: Any) -> GPTModel:
    """A Megatron `GPTModel` of this shape with fresh weights. Megatron's parallel state must be initialised.

    Args:
        hf_config: the mapping of a Mixtral `config.json`.
        layer_spec: a layer spec, or a function that makes one from the `TransformerConfig`; None: the stock
            local spec.
        overrides: see `transformer_config`.

    Raises:
        WeightsError: see `transformer_config`.
    """
    config = transformer_config(hf_config, **overrides)
    if layer_spec is None:
        layer_spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization=config.normalization
        )
    elif not isinstance(layer_spec, ModuleSpec):
        layer_spec = layer_spec(config)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        vocab_size=_required(hf_config, "vocab_size"),
        max_sequence_length=_required(hf_config, "max_position_embeddings"),
        position_embedding_type="rope",
        rotary_base=_rope_theta(hf_config),
        share_embeddings_and_output_weights=False,
    )


def load_mixtral(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    layer_spec: LayerSpec | None = None,
    **overrides: Any,
) -> GPTModel:
    """The Megatron model of a checkpoint directory, in eval mode. Megatron's parallel state must be
    initialised.

    Args:
        path: directory with `config.json` and `model.safetensors` or its shards and their index.
        dtype: dtype of the weights in memory, whatever they are stored in.
        layer_spec, overrides: see `build_model`.

    Raises:
        FileNotFoundError: one of the files is missing.
        WeightsError: a file cannot be read, or the configuration or a weight does not fit.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint's directory, found no {CONFIG_FILE}")
    hf_config, files = read_json(path / CONFIG_FILE, WeightsError), _weight_files(path)
    half_types = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    overrides = {"params_dtype": dtype, **half_types, **overrides}
    try:
        model = build_model(hf_config, layer_spec=layer_spec, **overrides).to(dtype)
    except WeightsError as error:  # which begins with the file's name
        raise WeightsError(f"{path}{os.sep}{error}") from error
    unneeded = other_experts_names(model.config, _my_experts(model.config))
    state: dict[str, torch.Tensor] = {}
    for weights in files:
        try:
            with safe_open(weights, framework="pt") as file:
                state |= {name: file.get_tensor(name) for name in set(file.keys()) - unneeded}
        except SafetensorError as error:
            raise WeightsError(f"{weights}: not a whole safetensors file: {error}") from error
    load_weights(model, state)
    return model.eval()


def _weight_files(path: Path) -> list[Path]:
    """The one file with the weights of a checkpoint, or the shards that its index names."""
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    if not (path / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{path}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither")
    return shards(path / INDEX_FILE)


def load_weights(model: GPTModel, state: State) -> None:
    """Copies Hugging Face weights into a Megatron model, cast to its dtype. Checks everything before it
    changes anything.

    Raises:
        WeightsError: a key is missing, unexpected or of another shape, or holds values that are not finite in the
            model's dtype; the model has parameters that are not Mixtral's.
    """
    weights = hf_to_megatron(state, model.config, vocab_size=model.vocab_size, experts=_my_experts(model.config))
    check_names(f"{type(model).__name__}.state_dict()", tensor_names(model.state_dict()), weights.keys())
    check_finite(state.items(), next(model.parameters()).dtype)
    model.load_state_dict(weights, strict=False)  # not strict: Megatron's empty `_extra_state` entries


def save_mixtral(model: GPTModel, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a Megatron model as a directory that `transformers` loads: `config.json` and
    `model.safetensors`.

    Each file is written under another name and renamed, so that a reader never sees half of one.

    Args:
        model: all its experts on this rank.
        path: directory; made where it does not exist.
        dtype: dtype of the stored weights; None: the model's.

    Raises:
        WeightsError: experts are on other ranks, or a weight is not finite (in `dtype`).
    """
    dtype = dtype or model.config.params_dtype
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in megatron_to_hf(model.state_dict(), model.config).items()
    }
    check_finite(state.items())
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    description = json.dumps(_hf_config(model, dtype), indent=2) + "\n"
    _replace(path / CONFIG_FILE, lambda file: file.write_text(description, encoding="utf-8"))
    _replace(path / WEIGHTS_FILE, lambda file: save_file(state, file, metadata={"format": "pt"}))


def _my_experts(config: TransformerConfig) -> range:
    distributed = config.expert_model_parallel_size > 1
    return local_experts(config, parallel_state.get_expert_model_parallel_rank() if distributed else 0)


def _hf_config(model: GPTModel, dtype: torch.dtype) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": model.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "num_local_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,  # where transformers 4 looks for it
        "max_position_embeddings": model.max_sequence_length,
        "attention_dropout": config.attention_dropout,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name and puts it in its place; on failure the old one stays and nothing else."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        unfinished.chmod(mode)  # safetensors makes its files private
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _required(hf_config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """The value of a key: an int of at least 1, or (kind float) a finite number of at least 0."""
    value = hf_config.get(key)
    if value is None:
        raise WeightsError(f"{CONFIG_FILE}: {key} is missing")
    known = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not known or not (1 if kind is int else 0) <= value < math.inf:
        expected = "an integer of at least 1" if kind is int else "a finite number of at least 0"
        raise WeightsError(f"{CONFIG_FILE}: {key} is {brief(value)}, expected {expected}")
    return value


def _refuse(hf_config: Mapping[str, Any], key: str, expected: Any) -> None:
    if hf_config.get(key, expected) != expected:
        raise WeightsError(f"{CONFIG_FILE}: {key} is {brief(hf_config[key])}, expected {expected!r}")


def _rope_theta(hf_config: Mapping[str, Any]) -> float:
    parameters = hf_config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise WeightsError(f"{CONFIG_FILE}: rope_parameters is {brief(parameters)}, expected an object")
    kind = parameters.get("rope_type", "default")
    if kind != "default" or hf_config.get("rope_scaling") is not None:
        seen = hf_config.get("rope_scaling") or kind
        raise WeightsError(f"{CONFIG_FILE}: RoPE of kind {brief(seen)}, expected 'default' without scaling")
    theta = parameters.get("rope_theta", hf_config.get("rope_theta"))
    if theta is None:
        raise WeightsError(f"{CONFIG_FILE}: rope_theta is missing (in rope_parameters or beside it)")
    return float(_required({"rope_theta": theta}, "rope_theta", float))
