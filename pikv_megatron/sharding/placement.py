"""Placement: which rank of the expert-parallel group owns a sealed block. With one rank it owns them all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pikv_megatron.config import ModelConfig, RuntimeConfig


@dataclass(frozen=True)
class Placement:
    """Owner of a block by its expert (contiguous runs of experts per rank, as Megatron places them) or by its
    position.
    """

    model: ModelConfig
    runtime: RuntimeConfig
    num_ranks: int = 1

    def owner(self, label: Tensor, start: Tensor) -> Tensor:
        """Ranks [blocks] int64 of blocks with these expert labels and start positions, both [blocks]."""
        if self.runtime.sharding.placement == "position" or not self.model.num_experts:
            return (start // self.runtime.block_size) % self.num_ranks
        return label * self.num_ranks // self.model.num_experts
