"""The bindings of the CUDA kernels, without a device: built for the simulator, they take the place of the CPU's ops in
a process of their own, where the suite of the ops runs on them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import pikv_megatron.ops
from tools import simulate

FOLDER = simulate.ROOT / "csrc" / "cuda"
# The suite of the ops over one kernel set, which is then CUDA's. Shapes that the CUDA kernels do not take are skipped;
# ids are not looked at on a device.
SUITE = """
import sys
import pytest, torch
import pikv_megatron.ops
torch.ops.load_library(sys.argv[1])

class Shapes:
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        try:
            return (yield)
        except RuntimeError as error:
            if "multiples of 16" in str(error):
                pytest.skip("a shape that the CUDA kernels do not take")
            raise

names = "scalar and not ids_outside_the_pool"
options = ["tests/ops", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", names]
sys.exit(pytest.main(options, plugins=[Shapes()]))
"""


@pytest.fixture(scope="session")
def bindings(tmp_path_factory) -> Path:
    kernels = simulate.build(sorted(FOLDER.glob("*.cu")))
    library = tmp_path_factory.mktemp("bindings") / "bindings.so"
    command = ["g++", "-std=gnu++20", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-DPIKV_SIMULATED"]
    command += ["-DTORCH_TARGET_VERSION=0x020d000000000000", f"-I{simulate.INCLUDE}"]
    command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command += ["-o", str(library), *map(str, sorted(FOLDER.glob("*.cpp"))), str(kernels)]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch"], check=True)
    return library


def test_the_ops_suite_runs_on_the_cuda_kernels(bindings):
    if pikv_megatron.ops.kernel_set is None:
        pytest.skip("the compiled ops are not built: nothing says the ops' schemas")
    environment = {**os.environ, "PYTHONPATH": str(simulate.ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SUITE, str(bindings)], cwd=simulate.ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", run.stdout)}
    assert counts["passed"] > 1000
    assert counts["skipped"] < 20
