"""Placement: a block's owner in the expert-parallel group, by its expert or round robin by its position."""

from __future__ import annotations

import pytest
import torch
from dense import model_config, runtime_config

from pikv_megatron.sharding.placement.owners import Owners

START = torch.arange(2, 2 + 8 * 4, 4)  # eight blocks after two sinks
BY_POSITION = {"sharding": {"placement": "position"}}


@pytest.mark.parametrize(
    ("ranks", "owners"), [(1, [0] * 8), (2, [0, 0, 0, 0, 1, 1, 1, 1]), (4, [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_experts_lie_in_contiguous_runs(ranks, owners):
    """As Megatron places them."""
    placement = Owners(model_config(num_experts=8), runtime_config(), ranks)
    assert placement.owner(torch.arange(8), START).tolist() == owners


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("model", "runtime"), [({}, BY_POSITION), ({"num_experts": 0}, {})])
def test_positions_go_round(ranks, model, runtime):
    """Where asked for, and where there are no experts: neighbours lie on different ranks."""
    placement = Owners(model_config(**model), runtime_config(**runtime), ranks)
    owners = placement.owner(torch.zeros(8, dtype=torch.int64), START).tolist()
    assert owners == [i % ranks for i in range(8)]
