"""The CUDA kernels: the tests here take `cuda`, the ops as a simulator or a device runs them, those of decode steps for
one request; or `every`, the same for several.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from device import open_device
from launchers import Launchers
from one_request import OneRequest

from tools import simulate

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))
RUNNERS = ["fibers", pytest.param("ptx", marks=pytest.mark.slow), pytest.param("device", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session", params=RUNNERS)
def runner(request):
    if request.param == "device":
        return open_device()
    if request.param == "ptx" and simulate.nvcc() is None:
        pytest.skip("no nvcc here: simulator B runs its PTX")
    return Launchers(simulate.load(simulate.build(SOURCES, simulator=request.param)))


class _Alone(OneRequest):
    """splits: thread blocks per KV head in attention."""

    @property
    def splits(self) -> int:
        return self.ops.splits

    @splits.setter
    def splits(self, splits: int) -> None:
        self.ops.splits = splits


@pytest.fixture
def every(runner):
    """The ops, threads in order and three thread blocks per KV head."""
    runner.set_seed(0)
    runner.splits = 3
    return runner


@pytest.fixture
def cuda(every):
    """The same, for one request."""
    return _Alone(every)
