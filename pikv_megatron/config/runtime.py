"""`RuntimeConfig`: everything that whoever serves a model may choose, in sections."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pikv_megatron.config.io import ConfigError, brief, check_fields, from_mapping
from pikv_megatron.config.sections import (
    AttentionConfig,
    BudgetConfig,
    CodecConfig,
    OverlapConfig,
    RouterConfig,
    ShardingConfig,
    StreamerConfig,
    TierConfig,
    at_least,
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
        if self.block_size > self.max_tokens:
            raise ConfigError(
                f"runtime.block_size: expected at most max_tokens ({self.max_tokens}), got {self.block_size}"
            )
        self._check_tiers()
        try:
            self.torch_device  # noqa: B018 - a bad device string fails here, not at the first tensor
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"runtime.device: expected 'auto' or a torch device, got {brief(self.device)}") from error
        if self.torch_device.type == "meta":
            raise ConfigError("runtime.device: expected a device that holds data, got 'meta'")

    def _check_tiers(self) -> None:
        kinds = [tier.kind for tier in self.tiers]
        if kinds[:1] != ["device"] or len(set(kinds)) < len(kinds):
            raise ConfigError(
                f"runtime.tiers: expected device first and each kind once, fastest first, got {brief(kinds)}"
            )
        demotes = self.budget.policy != "none" and self.budget.over_budget == "demote"
        if demotes and len(kinds) == 1:
            raise ConfigError(
                "runtime.budget.over_budget: 'demote' needs a tier below the device, got tiers [device]; "
                "add {kind: host}"
            )
        if len(kinds) > 1 and not demotes:
            raise ConfigError(
                f"runtime.tiers: nothing would be placed in the tiers below the device, {brief(kinds[1:])}, expected "
                f"budget.policy and budget.over_budget 'demote' with them, got {self.budget.policy!r} and "
                f"{self.budget.over_budget!r}"
            )

    @functools.cached_property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found out about this process: a pickle may be read where there are other devices."""
        return {name: value for name, value in vars(self).items() if name != "torch_device"}

    @property
    def needs_index(self) -> bool:
        """Whether reading chooses tokens, for which raw keys need an index beside them."""
        return self.attention.mode != "exact"

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RuntimeConfig:
        return from_mapping(cls, mapping, "runtime")

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path) -> RuntimeConfig:
        """From a DeepSpeed config (dict or JSON file): its `"pikv"` block, same sections as YAML."""
        from pikv_megatron.config.files import load_deepspeed  # which reads files into this class

        return load_deepspeed(config)[2]
