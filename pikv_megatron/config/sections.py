"""The sections of `RuntimeConfig`, one frozen dataclass each: what one stage of the cache may be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pikv_megatron.config.io import ConfigError, PolicyName, brief, check_fields
from pikv_megatron.config.table import check_section


def at_least(owner: str, name: str, value: float, low: float) -> None:
    """Checks that a field is a finite number from `low` on."""
    if not low <= value < float("inf"):
        raise ConfigError(f"{owner}{name}: expected at least {low}, got {value}")


def within(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Checks that a field is above `low` and at most `high`."""
    if not low < value <= high:
        raise ConfigError(f"{owner}{name}: expected a number in ({low}, {high}], got {value}")


@dataclass(frozen=True)
class AttentionConfig:
    """What a decode step reads. A call with several query tokens (prefill) always reads everything."""

    mode: PolicyName = "exact"
    """exact, top_k or mass: a row of reading.READERS."""
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
        check_fields(self, "runtime.attention")
        for name in ("read_fraction", "prune_fraction", "epsilon"):
            within("runtime.attention.", name, getattr(self, name), 0.0, 1.0)
        check_section(self.mode, "runtime.attention.mode", self)


@dataclass(frozen=True)
class CodecConfig:
    """How sealed blocks are stored."""

    keys: PolicyName = "none"
    """none, int8, int4 or int2: a row of codecs.CODECS."""
    values: PolicyName = "none"
    rank: int = 0
    """Rank of the low-rank part; 0 is off."""
    basis: Literal["expert", "layer"] = "expert"
    order: Literal["residual", "first"] = "residual"

    def __post_init__(self) -> None:
        check_fields(self, "runtime.codec")
        if self.rank != 0:
            raise ConfigError(
                f"runtime.codec.rank: the low-rank part is not in this version, expected 0, got {self.rank}"
            )


@dataclass(frozen=True)
class BudgetConfig:
    """How many tokens of one request each layer may hold on the device (PyramidKV, arXiv 2406.02069)."""

    policy: PolicyName = "none"
    """none, uniform or pyramid: a row of budgets.BUDGETS."""
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
        check_fields(self, "runtime.budget")
        at_least("runtime.budget.", "observation_window", self.observation_window, 1)
        if self.policy == "none":
            for name in ("first_layer_tokens", "step", "total_tokens"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"runtime.budget.{name}: is set but budget.policy is 'none'; expected 'uniform' or 'pyramid'"
                    )
            return
        if (self.first_layer_tokens is None) == (self.total_tokens is None):
            raise ConfigError(
                "runtime.budget.first_layer_tokens, budget.total_tokens: expected exactly one of the two, "
                f"got {self.first_layer_tokens} and {self.total_tokens}"
            )
        if self.step is not None:
            at_least("runtime.budget.", "step", self.step, 0)
        check_section(self.policy, "runtime.budget.policy", self)


@dataclass(frozen=True)
class RouterConfig:
    """Latency-aware routing. This version observes the host's router and leaves it as it is (lambda 0)."""

    lambda_: float = field(default=0.0, metadata={"key": "lambda"})
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "runtime.router")
        if self.lambda_ != 0.0:
            raise ConfigError(
                f"runtime.router.lambda: latency-aware routing is not in this version, expected 0.0, got {self.lambda_}"
            )
        at_least("runtime.router.", "margin", self.margin, 0.0)


@dataclass(frozen=True)
class ShardingConfig:
    """How blocks are spread over the expert-parallel group."""

    placement: PolicyName = "expert"
    """expert or position, a row of sharding.PLACEMENTS: which rank of the expert-parallel group owns a sealed block,
    its expert's, or round robin by position.
    """

    def __post_init__(self) -> None:
        check_fields(self, "runtime.sharding")


@dataclass(frozen=True)
class OverlapConfig:
    """What happens while an all-to-all is in flight (PRESERVE, arXiv 2501.08192)."""

    prefetch: Literal["auto", "off"] = "auto"
    """auto prefetches from slower tiers where there are any to read from."""

    def __post_init__(self) -> None:
        check_fields(self, "runtime.overlap")


@dataclass(frozen=True)
class TierConfig:
    """One kind of memory that blocks can be in."""

    kind: PolicyName = "device"
    """device or host: a row of tiers.TIERS."""
    bytes: int | None = None
    """Capacity; None means room for what max_tokens and the budget may place here."""

    def __post_init__(self) -> None:
        check_fields(self, "runtime.tiers")
        if self.bytes is not None:
            at_least("runtime.tiers.", "bytes", self.bytes, 1)


@dataclass(frozen=True)
class StreamerConfig:
    """Streaming of sealed blocks to disk."""

    path: str | None = None
    """Directory of the segment log; None is off."""
    commit_ms: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self, "runtime.streamer")
        at_least("runtime.streamer.", "commit_ms", self.commit_ms, 0.0)
        if self.path is not None:
            raise ConfigError(
                "runtime.streamer.path: streaming to disk is not in this version, expected null, "
                f"got {brief(self.path)}"
            )
