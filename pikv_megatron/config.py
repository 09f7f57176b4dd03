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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pikv_megatron.config_io import ConfigError, from_mapping, read_yaml, to_mapping, to_yaml

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODE_BITS = {"none": 0, "int8": 8, "int4": 4, "int2": 2}


def _at_least(owner: str, name: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"{owner}{name}: expected at least {low}, got {value}")


def _within(owner: str, name: str, value: float, low: float, high: float) -> None:
    if not low < value <= high:
        raise ConfigError(f"{owner}{name}: expected a number in ({low}, {high}], got {value}")


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

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim"):
            _at_least("model.", name, getattr(self, name), 1)
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
        _at_least("model.", "num_experts", self.num_experts, 0)
        if self.num_experts and not 1 <= self.topk <= self.num_experts:
            raise ConfigError(f"model.topk: expected 1 .. num_experts ({self.num_experts}), got {self.topk}")
        if self.softmax_scale is not None:
            _within("model.", "softmax_scale", self.softmax_scale, 0.0, float("inf"))
        for layer_id in self.moe_layers or ():
            if not 0 <= layer_id < self.num_layers:
                raise ConfigError(f"model.moe_layers: expected ids in 0 .. {self.num_layers - 1}, got {layer_id}")

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
        groups = config.num_query_groups or config.num_attention_heads
        return cls(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads // tensor_parallel,
            num_query_groups=max(1, groups // tensor_parallel),
            head_dim=config.kv_channels,
            num_experts=experts,
            topk=config.moe_router_topk if experts else 1,
            dtype=_dtype_name(config.params_dtype),
            moe_layers=moe_layers if experts and len(moe_layers) < config.num_layers else None,
            softmax_scale=getattr(config, "softmax_scale", None),
        )

    @classmethod
    def from_huggingface(cls, config: Any) -> ModelConfig:
        """From a `transformers` config object or its dict form (`config.json`), for GQA and MHA decoders."""
        read = config.get if isinstance(config, Mapping) else functools.partial(_attribute, config)
        get: Callable[[str], Any] = read
        if get("kv_lora_rank"):
            raise ConfigError(
                "model: kv_lora_rank is set (MLA); give the expanded shapes (head_dim, v_head_dim) by hand"
            )
        heads, hidden = get("num_attention_heads"), get("hidden_size")
        experts = get("num_local_experts") or get("num_experts") or get("n_routed_experts") or 0
        return cls(
            num_layers=get("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=get("num_key_value_heads") or heads,
            head_dim=get("head_dim") or hidden // heads,
            num_experts=experts,
            topk=get("num_experts_per_tok") or 1,
            dtype=_dtype_name(get("dtype") or get("torch_dtype") or "float32"),
        )


def _attribute(config: Any, key: str) -> Any:
    return getattr(config, key, None)


def _dtype_name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class AttentionConfig:
    """What a decode step reads. A call with several query tokens (prefill) always reads everything."""

    mode: Literal["exact", "top_k", "mass"] = "exact"
    read_fraction: float = 0.125
    """top_k: share of the sealed tokens that are attended to, beside sinks and window."""
    prune_fraction: float = 1.0
    """top_k with score planes: share of the blocks whose tokens are ranked; 1.0 ranks every token."""
    score: Literal["planes", "quest"] = "planes"
    """planes: tokens ranked by the high bit-plane of their keys. quest: whole blocks by Quest's bound (baseline)."""
    epsilon: float = 0.05
    """mass: tokens are read until the missed mass is at most this."""
    epsilon_by: Literal["estimate", "certificate"] = "estimate"

    def __post_init__(self) -> None:
        for name in ("read_fraction", "prune_fraction", "epsilon"):
            _within("attention.", name, getattr(self, name), 0.0, 1.0)
        if self.mode == "mass" and self.score == "quest":
            raise ConfigError("attention.score: mode mass ranks tokens, so it needs 'planes', got 'quest'")
        if self.mode == "mass" and self.prune_fraction != 1.0:
            raise ConfigError(
                f"attention.prune_fraction: mode mass ranks every token, expected 1.0, got {self.prune_fraction}"
            )


@dataclass(frozen=True)
class CodecConfig:
    """How sealed blocks are stored."""

    keys: Literal["none", "int8", "int4", "int2"] = "none"
    values: Literal["none", "int8", "int4", "int2"] = "none"
    rank: int = 0
    """Rank of the low-rank part; 0 is off."""
    basis: Literal["expert", "layer"] = "expert"
    order: Literal["residual", "first"] = "residual"

    def __post_init__(self) -> None:
        if self.rank != 0:
            raise ConfigError(f"codec.rank: the low-rank part is not in this version, expected 0, got {self.rank}")


@dataclass(frozen=True)
class BudgetConfig:
    """How many tokens each layer may hold on the device (PyramidKV, arXiv 2406.02069)."""

    policy: Literal["none", "uniform", "pyramid"] = "none"
    first_layer_tokens: int | None = None
    """C_1, the budget of the first layer."""
    step: int | None = None
    """d in C_i = C_1 - (i - 1) d."""
    total_tokens: int | None = None
    """Sum of C_i over the layers; instead of first_layer_tokens."""
    over_budget: Literal["drop", "demote"] = "demote"
    """What happens to the least important blocks: gone, or moved to the next tier."""
    observation_window: int = 32
    """Prefill queries whose attention seeds the importance of the prompt's tokens (SnapKV, arXiv 2404.14469)."""

    def __post_init__(self) -> None:
        _at_least("budget.", "observation_window", self.observation_window, 1)
        if self.policy == "none":
            for name in ("first_layer_tokens", "step", "total_tokens"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"budget.{name}: is set but budget.policy is 'none'; expected 'uniform' or 'pyramid'"
                    )
            return
        if (self.first_layer_tokens is None) == (self.total_tokens is None):
            raise ConfigError(
                "budget.first_layer_tokens, budget.total_tokens: expected exactly one of the two, "
                f"got {self.first_layer_tokens} and {self.total_tokens}"
            )
        if self.policy == "uniform" and self.step is not None:
            raise ConfigError(f"budget.step: policy uniform has no step, expected null, got {self.step}")
        if self.policy == "pyramid" and self.first_layer_tokens is not None and self.step is None:
            raise ConfigError("budget.step: a pyramid from first_layer_tokens needs a step, got null")
        if self.step is not None:
            _at_least("budget.", "step", self.step, 0)


@dataclass(frozen=True)
class RouterConfig:
    """Latency-aware routing. This version observes the host's router and leaves it as it is (lambda 0)."""

    lambda_: float = field(default=0.0, metadata={"key": "lambda"})
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.lambda_ != 0.0:
            raise ConfigError(
                f"router.lambda: latency-aware routing is not in this version, expected 0.0, got {self.lambda_}"
            )


@dataclass(frozen=True)
class ShardingConfig:
    """How blocks are spread over the expert-parallel group."""

    placement: Literal["expert", "position"] = "expert"
    """Which rank of the expert-parallel group owns a sealed block: its expert's, or round robin by position."""


@dataclass(frozen=True)
class OverlapConfig:
    """What happens while an all-to-all is in flight (PRESERVE, arXiv 2501.08192)."""

    prefetch: Literal["auto", "off"] = "auto"
    """auto prefetches from slower tiers where there are any to read from."""


@dataclass(frozen=True)
class TierConfig:
    """One kind of memory that blocks can be in."""

    kind: Literal["device", "host"] = "device"
    bytes: int | None = None
    """Capacity; None means room for max_tokens tokens of every layer."""

    def __post_init__(self) -> None:
        if self.bytes is not None:
            _at_least("tiers.", "bytes", self.bytes, 1)


@dataclass(frozen=True)
class StreamerConfig:
    """Streaming of sealed blocks to disk."""

    path: str | None = None
    """Directory of the segment log; None is off."""
    commit_ms: float = 10.0

    def __post_init__(self) -> None:
        if self.path is not None:
            raise ConfigError(
                f"streamer.path: streaming to disk is not in this version, expected null, got {self.path!r}"
            )


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
    attention: AttentionConfig = AttentionConfig()
    codec: CodecConfig = CodecConfig()
    budget: BudgetConfig = BudgetConfig()
    router: RouterConfig = RouterConfig()
    sharding: ShardingConfig = ShardingConfig()
    overlap: OverlapConfig = OverlapConfig()
    tiers: tuple[TierConfig, ...] = (TierConfig(),)
    streamer: StreamerConfig = StreamerConfig()

    def __post_init__(self) -> None:
        for name, low in (
            ("max_tokens", 1),
            ("max_requests", 1),
            ("window", 1),
            ("sinks", 0),
            ("block_size", 1),
        ):
            _at_least("", name, getattr(self, name), low)
        kinds = [tier.kind for tier in self.tiers]
        if kinds not in (["device"], ["device", "host"]):
            raise ConfigError(f"tiers: expected [device] or [device, host], fastest first, got {kinds}")
        if self.budget.policy != "none" and self.budget.over_budget == "demote" and len(kinds) == 1:
            raise ConfigError(
                "budget.over_budget: 'demote' needs a tier below the device, got tiers [device]; add {kind: host}"
            )
        try:
            self.torch_device  # noqa: B018 - a bad device string fails here, not at the first tensor
        except RuntimeError as error:
            raise ConfigError(f"device: expected 'auto' or a torch device, got {self.device!r}") from error

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def needs_planes(self) -> bool:
        """Whether blocks carry key codes with scales: a codec stores them anyway, selection needs at least an index."""
        return self.codec.keys != "none" or self.attention.mode != "exact"

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RuntimeConfig:
        return from_mapping(cls, mapping, "")

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path) -> RuntimeConfig:
        """From a DeepSpeed config (dict or JSON file): its `"pikv"` block, same keys as the YAML."""
        whole = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
        if "pikv" not in whole:
            raise ConfigError(f"pikv: expected this block in the DeepSpeed config, got the keys {sorted(whole)}")
        block = dict(whole["pikv"])
        block.pop("model", None)
        return cls.from_dict(block)


def load(source: Mapping[str, Any] | str | Path) -> tuple[ModelConfig | None, RuntimeConfig]:
    """Reads one mapping or YAML file that holds both: the section `model` and, beside it, the runtime keys.

    Returns:
        The model's config (None where the section is missing) and the runtime's.

    Raises:
        ConfigError: unknown key, wrong type or value out of range; the message names the key.
        FileNotFoundError: `source` names no file.
    """
    mapping = dict(read_yaml(source) if not isinstance(source, Mapping) else source)
    model = mapping.pop("model", None)
    return (None if model is None else ModelConfig.from_dict(model)), RuntimeConfig.from_dict(mapping)


def resolve(
    model: ModelConfig | Mapping[str, Any] | str | Path | None,
    runtime: RuntimeConfig | Mapping[str, Any] | str | Path | None,
) -> tuple[ModelConfig, RuntimeConfig]:
    """Both configs from what a user passes: dataclass, dict or YAML path each, or one source that holds both."""
    if isinstance(model, (str, Path)) or (isinstance(model, Mapping) and "model" in model):
        file_model, file_runtime = load(model)
        if file_model is None:
            raise ConfigError(f"model: section missing in {model}")
        model = file_model
        runtime = file_runtime if runtime is None else runtime
    if isinstance(model, Mapping):
        model = ModelConfig.from_dict(model)
    if not isinstance(model, ModelConfig):
        raise ConfigError(f"model: expected a ModelConfig, a dict or a YAML path, got {type(model).__name__}")
    if isinstance(runtime, (str, Path)):
        runtime = load(runtime)[1]
    if isinstance(runtime, Mapping):
        runtime = load(runtime)[1]
    if runtime is None:
        runtime = RuntimeConfig()
    if not isinstance(runtime, RuntimeConfig):
        raise ConfigError(f"runtime: expected a RuntimeConfig, a dict or a YAML path, got {type(runtime).__name__}")
    return model, runtime


def dump(model: ModelConfig, runtime: RuntimeConfig) -> str:
    """The resolved configuration as YAML, every default written out; `load` reads it back to equal objects."""
    return to_yaml({"model": to_mapping(model), **to_mapping(runtime)})
