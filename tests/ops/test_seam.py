"""Which implementation of an op runs."""

from __future__ import annotations

import torch

from pikv_megatron import ops


def test_tensors_of_a_device_without_kernels_go_to_plain_torch():
    def one(*args, **kwargs):
        return "compiled"

    op = ops.by_device("meta", one, lambda *args, **kwargs: "plain")
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert op(here, 3, scale=1.0) == "compiled"
    assert op(3, there) == "plain"
    assert op([ops.Partial(here, there)]) == "plain"
    assert op([ops.Partial(here, here)], None) == "compiled"
    assert op.__name__ == "one"
