"""Every header of csrc/ includes what it uses: each compiles alone."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tools import simulate

CSRC = simulate.ROOT / "csrc"
HEADERS = sorted(path for kind in ("h", "cuh", "inl") for path in CSRC.glob(f"**/*.{kind}"))
WIDE = platform.machine() == "x86_64"
# The CPU kernels as for AVX-512, where every part of them is in use; headers for CUDA as the simulator compiles them.
TARGET = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
DEFINED = ["PIKV_SIMULATED", "TORCH_TARGET_VERSION=0x020d000000000000", f"PIKV_WIDTH={16 if WIDE else 1}"]
DEFINED += ['PIKV_NAME="alone"', "PIKV_KERNELS=scalar_kernels"]


def _fault(header: Path) -> str | None:
    command = ["g++", "-std=gnu++20", "-fsyntax-only", "-x", "c++", "-w", *(f"-D{name}" for name in DEFINED)]
    command += [f"-m{feature}" for feature in TARGET.split(",") if WIDE]
    command += [f"-I{path}" for path in (CSRC, simulate.INCLUDE, *include_paths())]
    done = subprocess.run([*command, str(header)], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"{header.relative_to(CSRC)}: {done.stderr[:500]}"


def _needs_torch(header: Path) -> bool:
    """Whether it is of the ops and their bindings, not of the kernels."""
    plain = header.parent.name in ("cpu", "sim") or header.name in ("kernels.h", "cuda.h")
    return header.suffix == ".h" and not plain


@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_header_compiles_alone(torch):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    headers = [header for header in HEADERS if _needs_torch(header) == torch]
    assert len(headers) >= 5
    with ThreadPoolExecutor(simulate.COMPILERS) as pool:
        faults = list(filter(None, pool.map(_fault, headers)))
    assert not faults, "\n".join(faults)
