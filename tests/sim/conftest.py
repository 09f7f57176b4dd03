"""What the simulators' tests share: small kernels built for each simulator, and the harnesses' faults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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


@pytest.fixture(scope="session")
def faults(request, tmp_path_factory):
    """faults[run].result(): what a harnesses.Run found. Those that the session's tests have as `runs` begin at once."""
    runs = [
        run
        for item in request.session.items
        if hasattr(item, "callspec")
        for run in item.callspec.params.get("runs", [])
    ]
    wanted = [run for run in runs if simulate.nvcc() or not harnesses.needs_nvcc(run.tool)]
    pool = ThreadPoolExecutor(simulate.COMPILERS)
    yield {run: pool.submit(run.fault, tmp_path_factory.mktemp("mutant")) for run in wanted}
    pool.shutdown(cancel_futures=True)
