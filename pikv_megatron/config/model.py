"""`ModelConfig`: the shapes of a model's attention and MoE layers, which are fixed by the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pikv_megatron.config.hosts import huggingface_fields, megatron_fields
from pikv_megatron.config.io import ConfigError, check_fields, from_mapping
from pikv_megatron.config.sections import at_least, within

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
