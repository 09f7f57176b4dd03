"""The CUDA kernels as the simulators run them: every test here takes `cuda`, the ops' launchers."""

from __future__ import annotations

from pathlib import Path

import pytest
from launchers import Launchers

from tools import simulate

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="session", params=["fibers", pytest.param("ptx", marks=pytest.mark.slow)])
def launchers(request):
    if request.param == "ptx" and simulate.nvcc() is None:
        pytest.skip("no nvcc here: simulator B runs its PTX")
    return Launchers(simulate.load(simulate.build(SOURCES, simulator=request.param)))


@pytest.fixture
def cuda(launchers):
    """The launchers, threads in order and three thread blocks per KV head."""
    launchers.library.pikv_sim_set_seed(0)
    launchers.splits = 3
    return launchers
