"""Placement by position: round robin, the baseline."""

from __future__ import annotations

from torch import Tensor


def by_position(label: Tensor, number: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """See `Placement`."""
    return number % num_ranks
