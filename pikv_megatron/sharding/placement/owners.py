"""The owners of a cache's blocks by its configuration. With one rank it owns them all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.sharding.placement import PLACEMENTS


@dataclass(frozen=True)
class Owners:
    """Which of num_ranks ranks owns a block."""

    model: ModelConfig
    runtime: RuntimeConfig
    num_ranks: int = 1

    def __post_init__(self) -> None:
        PLACEMENTS.check(self.runtime.sharding.placement, "runtime.sharding.placement")

    def owner(self, label: Tensor, start: Tensor) -> Tensor:
        """Ranks [blocks] int64 of blocks with these expert labels and start positions, both [blocks]."""
        place = PLACEMENTS.pick(self.runtime.sharding.placement)
        return place(label, start // self.runtime.block_size, self.model.num_experts, self.num_ranks)
