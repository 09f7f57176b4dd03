"""The project's CUDA kernels are clean: right, without races and within bounds, on every seed."""

from __future__ import annotations

import harnesses
import pytest

LONG_TO_COMPILE = {("attend_blocks", "address"), ("attend_tokens", "address"), ("score_tokens", "address")}


def cases():
    for op in harnesses.OPS:
        for tool in harnesses.TOOLS:
            slow = (op, tool) in LONG_TO_COMPILE or tool == "ptx"
            yield pytest.param(op, tool, marks=[pytest.mark.slow] if slow else [])


def test_every_op_has_a_harness():
    assert set(harnesses.OPS) == {path.stem for path in harnesses.KERNELS.glob("*.cu")}


@pytest.mark.parametrize(("op", "tool"), cases())
def test_kernels_are_clean(op, tool):
    harnesses.skip_without_nvcc(tool)
    assert harnesses.fault(harnesses.executable(op, tool)) is None
