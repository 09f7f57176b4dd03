"""Placement: which rank of the expert-parallel group owns a sealed block. One file a policy, one row here."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pikv_megatron.config.table import Table
from pikv_megatron.sharding.placement.expert import by_expert
from pikv_megatron.sharding.placement.position import by_position


class Placement(Protocol):
    """Owners of blocks: label (expert) and number (position in blocks), both [blocks] int64, of num_experts experts
    over num_ranks ranks -> ranks [blocks] int64.
    """

    def __call__(self, label: Tensor, number: Tensor, num_experts: int, num_ranks: int) -> Tensor: ...


PLACEMENTS: Table[Placement] = Table(("runtime.sharding.placement",), {"expert": by_expert, "position": by_position})
