"""Placement by expert: a block belongs to its label's rank, with contiguous runs of experts as in Megatron."""

from __future__ import annotations

from torch import Tensor

from pikv_megatron.sharding.placement.position import by_position


def by_expert(label: Tensor, number: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """See `Placement`. A model without experts has no labels: its blocks go by position."""
    if not num_experts:
        return by_position(label, number, num_experts, num_ranks)
    return label * num_ranks // num_experts
