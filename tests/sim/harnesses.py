"""The harnesses of tests/sim/harness: one executable per op, simulator and sanitizer, and what it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tools import simulate

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).resolve().parent / "harness"
KERNELS = ROOT / "csrc" / "cuda"
OPS = sorted(path.stem for path in HARNESS.glob("*.cpp") if path.stem != "harness")
# How a kernel is run: simulator, sanitizer.
TOOLS = {
    "fibers": ("fibers", None),
    "ptx": ("ptx", None),
    "thread": ("fibers", "thread"),
    "address": ("fibers", "address"),
}
SEEDS = ["0", "1", "2", "3"]
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "exitcode=67",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def skip_without_nvcc(tool: str) -> None:
    """Skips the test where `tool` needs nvcc and there is none."""
    if tool == "ptx" and simulate.nvcc() is None:
        pytest.skip("no nvcc here: it makes the PTX that this simulator runs")


def executable(op: str, tool: str, kernels: Path = KERNELS) -> Path:
    """The harness of one op over the kernels of a folder."""
    simulator, sanitizer = TOOLS[tool]
    used = [op, "merge_partials"] if op.startswith("attend") else [op]
    sources = [
        *(HARNESS / f"{name}.cpp" for name in ("harness", op)),
        ROOT / "csrc" / "cpu" / "kernels_scalar.cpp",
        *(kernels / f"{name}.cu" for name in used),
    ]
    return simulate.build(sources, simulator=simulator, sanitizer=sanitizer, executable=True)


def fault(program: Path) -> str | None:
    """What a harness has against its kernel, one line; None: nothing, with every seed."""
    try:
        result = subprocess.run(
            [program, *SEEDS], capture_output=True, text=True, check=False, timeout=120, env=os.environ | ENVIRONMENT
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if result.returncode == 0:
        return None
    said = re.search(
        r"ThreadSanitizer: .*|AddressSanitizer: .*|.*runtime error: .*|.*wrong result.*|launcher returned .*",
        result.stderr,
    )
    return said[0].strip() if said else f"crash: exit {result.returncode}, {result.stderr[-200:]}"
