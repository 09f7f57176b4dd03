"""The harnesses of tests/sim/harness: the project's CUDA kernels or mutants of them, built and run by one tool each."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tools import simulate

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(__file__).resolve().parent / "harness"
KERNELS = ROOT / "csrc" / "cuda"
OPS = sorted(path.stem for path in HARNESS.glob("*.cpp") if path.stem != "harness")
MUTANTS = {
    mutant["name"]: mutant
    for mutant in tomllib.loads((Path(__file__).resolve().parent / "mutants.toml").read_text())["mutant"]
}
# How kernels are run: simulator, sanitizer.
TOOLS = {
    "fibers": ("fibers", None),
    "ptx": ("ptx", None),
    "thread": ("fibers", "thread"),
    "address": ("fibers", "address"),
}
# The sanitizers over translated PTX, for the kernels as they are.
PTX_TOOLS = {"ptx-thread": ("ptx", "thread"), "ptx-address": ("ptx", "address")}
SEEDS = ["0", "1", "2", "3"]
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "exitcode=67 detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Run(NamedTuple):
    """One op by one tool; mutant: a name of mutants.toml."""

    op: str
    tool: str
    mutant: str | None = None

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the kernel, in one line; None: nothing, with every seed. Mutants go to `folder`."""
        return fault(self._build(folder))

    def _build(self, folder: Path) -> Path:
        kernels = KERNELS if self.mutant is None else mutated(MUTANTS[self.mutant], folder / self.mutant)
        simulator, sanitizer = (TOOLS | PTX_TOOLS)[self.tool]
        used = [self.op, "merge_partials"] if self.op.startswith("attend") else [self.op]
        sources = [
            *(HARNESS / f"{name}.cpp" for name in ("harness", self.op)),
            ROOT / "csrc" / "cpu" / "kernels_scalar.cpp",
            *(kernels / f"{name}.cu" for name in used),
        ]
        return simulate.build(sources, simulator=simulator, sanitizer=sanitizer, executable=True)


def needs_nvcc(tool: str) -> bool:
    """Whether a tool runs PTX."""
    return tool.startswith("ptx")


def skip_without_nvcc(tool: str) -> None:
    """Skips the test where `tool` needs nvcc and there is none."""
    if needs_nvcc(tool) and simulate.nvcc() is None:
        pytest.skip("no nvcc here: it makes the PTX that this simulator runs")


def mutated(mutant: dict[str, str], folder: Path) -> Path:
    """A copy of the kernels with the mutant's bug."""
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
    found = [path for path in folder.glob("*.cu*") for _ in range(path.read_text().count(mutant["old"]))]
    if len(found) != 1:
        raise ValueError(f"the patch no longer applies, its text is in {found}: {mutant['old']!r}")
    found[0].write_text(found[0].read_text().replace(mutant["old"], mutant["new"]))
    return folder


@functools.cache
def fixed_addresses() -> list[str]:
    """What a command begins with so that memory lies at the same addresses each time, as older TSans need it."""
    prefix = ["setarch", "-R"]
    works = (
        shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    )
    return prefix if works else []


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that a sanitizer may watch; TimeoutExpired after two minutes."""
    command = [*fixed_addresses(), str(program), *arguments]
    environment = os.environ | ENVIRONMENT
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def fault(program: Path) -> str | None:
    """What a harness has against its kernel."""
    try:
        result = run(program, *SEEDS)
    except subprocess.TimeoutExpired:
        return "hangs"
    if result.returncode == 0:
        return None
    known = r"ThreadSanitizer: .*|AddressSanitizer: .*|.*runtime error: .*|.*wrong result.*|launcher returned .*"
    said = re.search(known, result.stderr)
    return said[0].strip() if said else f"crash: exit {result.returncode}, {result.stderr[-200:]}"
