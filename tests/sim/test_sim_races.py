"""TSan knows what orders the threads of a kernel and what does not: by fibers, and in translated PTX."""

from __future__ import annotations

from pathlib import Path

import harnesses
import pytest

from tools import simulate

HERE = Path(__file__).resolve().parent / "races"
KERNELS = ["between blocks", "after a shuffle", "after a wait", "between warps", "within part of a warp"]


@pytest.fixture(scope="module")
def program(simulator):
    sources = [HERE / "races.cu", HERE / "main.cpp"]
    return simulate.build(sources, simulator=simulator, sanitizer="thread", executable=True)


@pytest.mark.parametrize("racy", [True, False])
@pytest.mark.parametrize("which", range(len(KERNELS)), ids=[name.replace(" ", "-") for name in KERNELS])
def test_races_are_told_from_order(program, which, racy):
    result = harnesses.run(program, str(which), str(int(racy)), "1")
    assert ("ThreadSanitizer: data race" in result.stderr) == racy
    assert (result.returncode == 0) != racy
