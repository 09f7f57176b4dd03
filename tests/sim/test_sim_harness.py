"""The project's CUDA kernels are clean: right, without races and within bounds, on every seed."""

from __future__ import annotations

import harnesses
import pytest
from harnesses import Run

LONG_TO_COMPILE = {"append", "attend_blocks", "attend_tokens", "quantize_block", "score_tokens", "key_logits"}


def cases():
    """Every op by every tool. By default by the sanitizers, which see a wrong result too; ASan where that is quick."""
    for op in harnesses.OPS:
        for tool in harnesses.TOOLS | harnesses.PTX_TOOLS:
            slow = tool != "thread" and (tool != "address" or op in LONG_TO_COMPILE)
            yield pytest.param((Run(op, tool),), marks=[pytest.mark.slow] if slow else [], id=f"{op}-{tool}")


def test_every_op_has_a_harness():
    assert set(harnesses.OPS) == {path.stem for path in harnesses.KERNELS.glob("*.cu")}


@pytest.mark.parametrize("runs", list(cases()))
def test_kernels_are_clean(runs, faults):
    (run,) = runs
    harnesses.skip_without_nvcc(run.tool)
    assert faults[run].result() is None
