"""Builds CUDA sources for a machine without a GPU: they run on the simulators of csrc/sim.

Two simulators run the same launchers. `fibers`: g++ compiles the .cu files onto the runtime. `ptx`: nvcc compiles the
kernels to PTX, ptx2cpp.py translates that, and the launchers start the translation instead (needs nvcc).
Sanitizers: `thread` finds races, `address` finds what is out of bounds or undefined; both want an executable.

    library = load(build(sorted(Path("csrc/cuda").glob("*.cu")), simulator="ptx"))
    library.pikv_sim_set_seed(3)
    check(library, library.pikv_cuda_append(...))

Objects are kept by the hash of all that went into them, in build/sim or where PIKV_SIM_CACHE says.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

Simulator = Literal["fibers", "ptx"]
Sanitizer = Literal["thread", "address"]

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "csrc" / "sim"
INCLUDE = ROOT / "csrc" / "include"
HEADERS = {".h", ".cuh", ".inl"}
COMPILERS = 2  # at once
CUDA_ARCHITECTURE = "compute_80"

# No inlining of equal functions into one and no names unique to the process: kernels are found by their own names.
FLAGS = [
    "-std=gnu++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-ipa-icf",
    "-fno-gnu-unique",
    "-Wall",
    "-Wno-unknown-pragmas",
]
SANITIZE = {
    None: [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
RUNTIME_MACROS = {None: [], "thread": ["-DPIKV_SIM_TSAN"], "address": ["-DPIKV_SIM_ASAN"]}


class BuildError(RuntimeError):
    """A compiler or the PTX translator refused; the message is its own."""


class SimulationError(RuntimeError):
    """A kernel broke a rule of CUDA, or a launcher refused its arguments."""


def nvcc() -> str | None:
    """The CUDA compiler, or None where there is none."""
    return shutil.which("nvcc") or next(
        (str(path) for path in [Path("/usr/local/cuda/bin/nvcc")] if path.exists()), None
    )


def build(
    sources: Iterable[Path],
    *,
    simulator: Simulator = "fibers",
    sanitizer: Sanitizer | None = None,
    executable: bool = False,
) -> Path:
    """A shared library or executable of .cu and .cpp sources and the simulator; BuildError if one does not compile."""
    units = [
        *((path, [*SANITIZE[sanitizer]]) for path in sources),
        *((path, [*RUNTIME_MACROS[sanitizer]]) for path in sorted(RUNTIME.glob("*.cpp"))),
    ]
    with ThreadPoolExecutor(COMPILERS) as pool:
        groups = pool.map(lambda unit: _objects(unit[0], unit[1], simulator), units)
        objects = [path for group in groups for path in group]
    kind = ["-rdynamic"] if executable else ["-shared"]
    command = ["g++", *kind, *SANITIZE[sanitizer], *map(str, objects)]
    return _cached(command, [], ".exe" if executable else ".so")


def load(path: Path) -> ctypes.CDLL:
    """The library, ready to be called; every launcher returns 0 or an error for `check`."""
    library = ctypes.CDLL(str(path))
    library.pikv_sim_set_seed.argtypes = [ctypes.c_uint64]
    library.pikv_sim_set_seed.restype = None
    library.pikv_sim_last_error.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, status: int) -> None:
    """SimulationError, with the simulator's message, unless `status` is 0."""
    launch_failure = 719
    if status == launch_failure:
        raise SimulationError(library.pikv_sim_last_error().decode())
    if status != 0:
        raise SimulationError(f"the launcher returned error {status}")


def _objects(source: Path, flags: Sequence[str], simulator: Simulator) -> list[Path]:
    """The object files of one source; a .cu for `ptx` gives its launchers and its translated kernels."""
    folders = {INCLUDE, RUNTIME, source.parent}
    headers = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in HEADERS)
    compile_cpp = ["g++", *FLAGS, *flags, f"-I{INCLUDE}", f"-I{RUNTIME}", "-x", "c++", "-c"]
    if source.suffix != ".cu" or simulator == "fibers":
        return [_cached([*compile_cpp, str(source)], headers, ".o")]
    raise BuildError("simulator B is not there yet")


def _cached(command: list[str], headers: Iterable[Path], suffix: str) -> Path:
    """What `command` makes with `-o`, made once for the same command and the same contents of what it reads."""
    digest = hashlib.sha256(repr(command).encode())
    for path in [*map(Path, command), *headers]:
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("PIKV_SIM_CACHE", ROOT / "build" / "sim"))
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / (digest.hexdigest()[:32] + suffix)
    if not target.exists():

        def make(path: Path) -> None:
            result = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise BuildError(f"{' '.join(command)}\n{result.stderr}")

        _publish(target, make)
    return target


def _publish(target: Path, make: Callable[[Path], None]) -> None:
    """Makes a file under a name of its own first, so that nobody reads half of it."""
    draft = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
    make(draft)
    os.replace(draft, target)
