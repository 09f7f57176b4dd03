"""The simulators' own kernels, built once: `simulator` is "fibers" and, where nvcc is, "ptx"."""

from __future__ import annotations

from pathlib import Path

import harnesses
import pytest

from tools import simulate

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session", params=["fibers", "ptx"])
def simulator(request):
    harnesses.skip_without_nvcc(request.param)
    return request.param


@pytest.fixture(scope="session")
def kernels(simulator):
    """kernels.cu and broken.cu, ready to be called by ctypes."""
    return simulate.load(simulate.build([HERE / "kernels.cu", HERE / "broken.cu"], simulator=simulator))


@pytest.fixture(params=range(4))
def seed(request, kernels):
    kernels.pikv_sim_set_seed(request.param)
    return request.param
