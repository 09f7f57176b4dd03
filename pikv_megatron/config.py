"""Configuration of a model's cache: `ModelConfig` (shapes, fixed by the model) and `RuntimeConfig` (choices, fixed by
whoever serves it).

Both are frozen dataclasses that validate themselves. They are read from dicts, YAML files, a Megatron
`TransformerConfig`, a Hugging Face config or the `"pikv"` block of a DeepSpeed JSON, strictly: an unknown key is an
error that names its nearest known neighbour. How a mapping becomes a dataclass lives in `config_io`; nothing here
touches a tensor beyond its dtype.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from pikv_megatron.config_hosts import huggingface_fields, megatron_fields
from pikv_megatron.config_io import ConfigError, check_fields, from_mapping, read_yaml, to_mapping, to_yaml
from pikv_megatron.config_sections import (
    AttentionConfig,
    BudgetConfig,
    CodecConfig,
    OverlapConfig,
    RouterConfig,
    ShardingConfig,
    StreamerConfig,
    TierConfig,
    at_least,
    within,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODE_BITS = {"none": 0, "int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the attention and MoE layers, as one rank sees them (heads and groups after tensor parallelism)."""

    num_layers: int = 4
    """Transformer layers; valid layer ids are 0 .. num_layers - 1."""
    hidden_size: int = 128
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """KV heads. Must divide num_attention_heads."""
    head_dim: int = 32
    """Channels of a query or key head. A multiple of 4, so that 2-bit codes fill whole bytes."""
    v_head_dim: int | None = None
    """Channels of a value head; None means head_dim. Differs for MLA's expanded form (192 and 128)."""
    num_experts: int = 8
    """Routed experts per MoE layer; 0 for a dense model."""
    topk: int = 2
    """Experts per token."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the K and V that the host hands over, and of the window."""
    moe_layers: tuple[int, ...] | None = None
    """Zero-based ids of the layers with experts; None means all of them (if num_experts > 0)."""
    softmax_scale: float | None = None
    """Factor on q.k; None means head_dim ** -0.5."""
    sliding_windows: tuple[int | None, ...] | None = None
    """Per layer W, where a query at position p sees the keys p - W + 1 .. p, or null for all up to p; None: all layers
    see everything. Such a layer keeps its newest tokens raw and forgets the others.
    """

    def __post_init__(self) -> None:
        check_fields(self, "model")
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim"):
            at_least("model.", name, getattr(self, name), 1)
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        for name in ("head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value < 4 or value % 4:
                raise ConfigError(f"model.{name}: expected a positive multiple of 4, got {value}")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_query_groups: expected a divisor of num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_query_groups}"
            )
        at_least("model.", "num_experts", self.num_experts, 0)
        if self.num_experts and not 1 <= self.topk <= self.num_experts:
            raise ConfigError(f"model.topk: expected 1 .. num_experts ({self.num_experts}), got {self.topk}")
        if self.softmax_scale is not None:
            within("model.", "softmax_scale", self.softmax_scale, 0.0, sys.float_info.max)
        self._check_sliding_windows()
        for layer_id in self.moe_layers or ():
            if not 0 <= layer_id < self.num_layers:
                raise ConfigError(f"model.moe_layers: expected ids in 0 .. {self.num_layers - 1}, got {layer_id}")
        if self.moe_layers is not None:
            if not self.num_experts:
                raise ConfigError(
                    f"model.moe_layers: expected null for a model without experts, got {list(self.moe_layers)}"
                )
            if list(self.moe_layers) != sorted(set(self.moe_layers)):
                raise ConfigError(f"model.moe_layers: expected ascending ids, each once, got {list(self.moe_layers)}")
            if len(self.moe_layers) == self.num_layers:
                object.__setattr__(self, "moe_layers", None)  # one way to say it: equal models compare equal

    def _check_sliding_windows(self) -> None:
        windows = self.sliding_windows
        if windows is None:
            return
        if len(windows) != self.num_layers:
            raise ConfigError(
                f"model.sliding_windows: expected an entry for each of {self.num_layers} layers, got {list(windows)}"
            )
        for layer_id, window in enumerate(windows):
            if window is not None:
                at_least("model.", f"sliding_windows[{layer_id}]", window, 1)
        if not any(windows):
            object.__setattr__(self, "sliding_windows", None)  # one way to say it

    def sliding_window(self, layer_id: int) -> int | None:
        """W of a sliding-window layer, else None."""
        return None if self.sliding_windows is None else self.sliding_windows[layer_id]

    @property
    def full_layers(self) -> list[int]:
        """Ids of the layers that see every token, and so have blocks."""
        return [i for i in range(self.num_layers) if self.sliding_window(i) is None]

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def value_dim(self) -> int:
        return self.v_head_dim if self.v_head_dim is not None else self.head_dim

    @property
    def scale(self) -> float:
        """Softmax scale, 1/sqrt(head_dim) unless the model says otherwise."""
        return self.softmax_scale if self.softmax_scale is not None else self.head_dim**-0.5

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def label_source(self, layer_id: int) -> int | None:
        """The layer whose router labels `layer_id`'s tokens: itself, else the last MoE layer before it, else None."""
        if not self.num_experts:
            return None
        if self.moe_layers is None:
            return layer_id
        return max((i for i in self.moe_layers if i <= layer_id), default=None)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        return from_mapping(cls, mapping, "model")

    @classmethod
    def from_megatron(cls, config: Any) -> ModelConfig:
        """From a Megatron-core `TransformerConfig` (read by attribute, Megatron is not imported).

        Heads and groups are divided by `tensor_model_parallel_size`, as Megatron shards them.
        """
        return cls(**megatron_fields(config))

    @classmethod
    def from_huggingface(cls, config: Any) -> ModelConfig:
        """From a `transformers` config object or its dict form (`config.json`), for GQA and MHA decoders.

        Raises:
            ConfigError: MLA, whose shapes its config does not say; other attention; a key that is missing.
        """
        return cls(**huggingface_fields(config))


@dataclass(frozen=True)
class RuntimeConfig:
    """Everything that whoever serves the model may choose."""

    max_tokens: int = 65536
    """Capacity in tokens per layer, all requests together. Allocated and touched once."""
    max_requests: int = 16
    """Requests that can be live at once (each has a window)."""
    window: int = 64
    """Newest tokens of a layer, kept in the model's dtype."""
    sinks: int = 4
    """First tokens of a request, kept in the model's dtype and never evicted (StreamingLLM, arXiv 2309.17453)."""
    block_size: int = 32
    """Tokens of a sealed block."""
    device: str = "auto"
    """Where the cache lives: a torch device, or auto (cuda where there is one, else cpu)."""
    check_finite: Literal["auto", "always", "never"] = "auto"
    """Refuse K/V that are not finite. auto: always on CPU; on a GPU only for prefill, where the check's sync is
    hidden.
    """
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    tiers: tuple[TierConfig, ...] = field(default_factory=lambda: (TierConfig(),))
    streamer: StreamerConfig = field(default_factory=StreamerConfig)

    def __post_init__(self) -> None:
        check_fields(self, "runtime")
        for name, low in (
            ("max_tokens", 1),
            ("max_requests", 1),
            ("window", 1),
            ("sinks", 0),
            ("block_size", 1),
        ):
            at_least("runtime.", name, getattr(self, name), low)
        kinds = [tier.kind for tier in self.tiers]
        if kinds not in (["device"], ["device", "host"]):
            raise ConfigError(f"runtime.tiers: expected [device] or [device, host], fastest first, got {kinds}")
        demotes = self.budget.policy != "none" and self.budget.over_budget == "demote"
        if demotes and len(kinds) == 1:
            raise ConfigError(
                "runtime.budget.over_budget: 'demote' needs a tier below the device, got tiers [device]; "
                "add {kind: host}"
            )
        if len(kinds) == 2 and not demotes:
            raise ConfigError(
                "runtime.tiers: nothing would be placed in the host tier, expected budget.policy and "
                f"budget.over_budget 'demote' with it, got {self.budget.policy!r} and {self.budget.over_budget!r}"
            )
        try:
            self.torch_device  # noqa: B018 - a bad device string fails here, not at the first tensor
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"runtime.device: expected 'auto' or a torch device, got {self.device!r}") from error
        if self.torch_device.type == "meta":
            raise ConfigError("runtime.device: expected a device that holds data, got 'meta'")

    @functools.cached_property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found out about this process: a pickle may be read where there are other devices."""
        return {name: value for name, value in vars(self).items() if name != "torch_device"}

    @property
    def needs_planes(self) -> bool:
        """Whether blocks carry key codes with scales: a codec stores them anyway, selection needs at least an index."""
        return self.codec.keys != "none" or self.attention.mode != "exact"

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RuntimeConfig:
        return from_mapping(cls, mapping, "runtime")

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path) -> RuntimeConfig:
        """From a DeepSpeed config (dict or JSON file): its `"pikv"` block, same sections as YAML."""
        return load_deepspeed(config)[2]


@dataclass(frozen=True)
class _File:
    """A whole configuration: what a YAML file, or a DeepSpeed config's `"pikv"` block, may hold."""

    model: ModelConfig | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def load(source: Mapping[str, Any] | str | Path) -> tuple[ModelConfig | None, RuntimeConfig]:
    """Reads a mapping or a YAML file with the sections `model` and `runtime`, both optional.

    Returns:
        The model's config (None where the section is missing) and the runtime's.

    Raises:
        ConfigError: unknown key, wrong type or value out of range; the message names the key.
        FileNotFoundError: `source` names no file.
    """
    file = from_mapping(_File, source if isinstance(source, Mapping) else read_yaml(source), "")
    return file.model, file.runtime


def load_deepspeed(
    config: Mapping[str, Any] | str | Path,
) -> tuple[dict[str, Any], ModelConfig | None, RuntimeConfig]:
    """Reads a DeepSpeed config (dict or JSON file) whose `"pikv"` block has the sections of a YAML file, or names one.

    Returns:
        What is DeepSpeed's, the block taken out; the model's config (None where the section is missing); the runtime's.

    Raises:
        ConfigError: no such block, a file that is not a JSON object, or as `load`.
    """
    rest = dict(config) if isinstance(config, Mapping) else _read_json(Path(config))
    if "pikv" not in rest:
        raise ConfigError(f"pikv: expected this block in the DeepSpeed config, got the keys {sorted(rest)}")
    block = rest.pop("pikv")
    file = from_mapping(_File, read_yaml(block) if isinstance(block, str) else block, "pikv")
    return rest, file.model, file.runtime


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, got text that is none: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object of keys, got {type(content).__name__}")
    return content


Source = Mapping[str, Any] | str | Path


def resolve(
    model: ModelConfig | Source | None, runtime: RuntimeConfig | Source | None = None
) -> tuple[ModelConfig, RuntimeConfig]:
    """Both configs from what a user passes.

    Args:
        model: dataclass, dict of its keys, or a YAML file (or dict) with the sections model and runtime.
        runtime: likewise; None takes what came with `model`, else the defaults. If it has a section `model`, that must
            be the same model.
    """
    if isinstance(model, (str, Path)) or _has_sections(model):
        with_model, with_runtime = load(model)
        if with_model is None:
            raise ConfigError(f"model: section missing in {model}")
        model, runtime = with_model, with_runtime if runtime is None else runtime
    elif isinstance(model, Mapping):
        model = ModelConfig.from_dict(model)
    given = None
    if isinstance(runtime, (str, Path)) or _has_sections(runtime):
        given, runtime = load(runtime)
    elif isinstance(runtime, Mapping):
        runtime = RuntimeConfig.from_dict(runtime)
    elif runtime is None:
        runtime = RuntimeConfig()
    if not isinstance(model, ModelConfig):
        raise ConfigError(f"model: expected a ModelConfig, a dict or a YAML path, got {type(model).__name__}")
    if not isinstance(runtime, RuntimeConfig):
        raise ConfigError(f"runtime: expected a RuntimeConfig, a dict or a YAML path, got {type(runtime).__name__}")
    if given is not None:
        check_same_model(given, model)
    return model, runtime


def check_same_model(given: ModelConfig, model: ModelConfig, what: str = "config: its section model") -> None:
    """Checks that `what` (a file's section `model`, a cache) is for the model that it is used with."""
    names = [f.name for f in fields(ModelConfig) if getattr(given, f.name) != getattr(model, f.name)]
    if names:
        differs = ", ".join(f"{n}: {getattr(given, n)!r} here, {getattr(model, n)!r} in the model" for n in names)
        raise ConfigError(f"{what} is for another model ({differs})")


def _has_sections(source: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(source, Mapping) and ("model" in source or "runtime" in source)


def dump(model: ModelConfig, runtime: RuntimeConfig) -> str:
    """The resolved configuration as YAML, every default written out; `load` reads it back to equal objects."""
    return to_yaml({"model": to_mapping(model), "runtime": to_mapping(runtime)})
