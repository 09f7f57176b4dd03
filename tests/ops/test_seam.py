"""Which implementation of an op runs."""

from __future__ import annotations

import pytest
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


def test_a_set_that_the_processor_lacks_is_named_with_its_variable(monkeypatch):
    if ops.kernel_set is None:
        pytest.skip("the compiled ops are not built")
    monkeypatch.setattr(ops, "choice", "avx1024")
    with pytest.raises(ValueError, match=r"PIKV_OPS: .*, got 'avx1024'.* expected auto, scalar, avx2 or avx512$"):
        ops._load()
