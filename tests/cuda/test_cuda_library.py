"""The library of CUDA kernels as setup.py builds it: it loads, under a torch without CUDA too, and has the ops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import simulate

ROOT = Path(__file__).resolve().parents[2]
LOADED = """
import sys, torch
for library in sys.argv[1:3]:
    torch.ops.load_library(library)
missing = [op for op in sys.argv[3:] if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pikv::{op}", "CUDA")]
sys.exit(f"no CUDA kernel: {missing}" if missing else 0)
"""
OPS = re.findall(r'm.impl\("(\w+)"', (ROOT / "csrc" / "cuda" / "bindings.cpp").read_text())


@pytest.mark.slow
def test_it_is_built_and_loads(tmp_path):
    if simulate.nvcc() is None:
        pytest.skip("no nvcc here: the CUDA library cannot be built")
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    environment = {**os.environ, "PIKV_CUDA": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *folders], cwd=ROOT, env=environment, check=True)
    cpu, cuda = (tmp_path / "lib" / "pikv_megatron" / f"{name}.abi3.so" for name in ("_ops", "_ops_cuda"))

    assert len(OPS) >= 6
    subprocess.run([sys.executable, "-c", LOADED, str(cpu), str(cuda), *OPS], check=True)
