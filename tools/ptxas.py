"""What ptxas makes of the CUDA kernels: registers, stack and spills of each, per architecture.

`python -m tools.ptxas` writes tests/cuda/limits.txt anew: one line a kernel, its registers on each architecture. No
kernel may need a stack or spill registers, so these have no column.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools import simulate

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
SOURCES = sorted((simulate.ROOT / "csrc" / "cuda").glob("*.cu"))
LIMITS = simulate.ROOT / "tests" / "cuda" / "limits.txt"

_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    """Of one kernel on one architecture: registers a thread, bytes of stack, bytes spilled (stored and loaded)."""

    registers: int
    stack: int
    spilled: int


def usage(architecture: str) -> dict[str, Usage]:
    """Every kernel of csrc/cuda by its name, `attend_kernel<8, 2, false>`; CalledProcessError if nvcc refuses one."""
    with ThreadPoolExecutor(simulate.COMPILERS) as pool:
        reports = list(pool.map(lambda source: _report(source, architecture), SOURCES))
    found = [match for report in reports for match in _KERNEL.finditer(report)]
    names = _demangle([match["symbol"] for match in found])
    return {
        name: Usage(int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"]))
        for name, match in zip(names, found, strict=True)
    }


def read_limits() -> dict[str, dict[str, int]]:
    """The registers allowed, by architecture and kernel."""
    limits: dict[str, dict[str, int]] = {architecture: {} for architecture in ARCHITECTURES}
    for line in LIMITS.read_text().splitlines():
        if not line.startswith("#"):
            *registers, name = line.split(maxsplit=len(ARCHITECTURES))
            for architecture, count in zip(ARCHITECTURES, registers, strict=True):
                limits[architecture][name] = int(count)
    return limits


def write_limits() -> None:
    """Makes what the kernels need now the limit."""
    used = {architecture: usage(architecture) for architecture in ARCHITECTURES}
    lines = ["# Registers a thread, at most; stack and spills: none. `python -m tools.ptxas` writes this file."]
    lines.append("#" + "".join(f"{architecture:>8}" for architecture in ARCHITECTURES)[1:] + "  kernel")
    for name in sorted(used[ARCHITECTURES[0]]):
        counts = "".join(f"{used[architecture][name].registers:>8}" for architecture in ARCHITECTURES)
        lines.append(f"{counts}  {name}")
    LIMITS.write_text("\n".join(lines) + "\n")


def _report(source: Path, architecture: str) -> str:
    nvcc = simulate.nvcc()
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", f"-I{simulate.INCLUDE}", f"-arch={architecture}", "-Xptxas=-v", "-cubin"]
        command += ["-o", f"{folder}/kernels.cubin", str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _demangle(symbols: list[str]) -> list[str]:
    """`_ZN4pikv4cuda13attend_kernelILi8ELi2ELb0EEEvNS0_10AttendWorkE` -> `attend_kernel<8, 2, false>`."""
    plain = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout.splitlines()
    pattern = re.compile(r"(?:void )?pikv::cuda::(\w+_kernel(?:<.*?>)?)\(")
    names = []
    for full in plain:
        match = pattern.match(full.replace("(pikv::Dtype)", "dtype "))
        if match is None:
            raise ValueError(f"not the name of a kernel: {full}")
        names.append(match[1])
    return names


if __name__ == "__main__":
    write_limits()
