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
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from tools import ptx2cpp

Simulator = Literal["fibers", "ptx"]
Sanitizer = Literal["thread", "address"]

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "csrc" / "sim"
INCLUDE = ROOT / "csrc" / "include"
INCLUDES = [f"-I{INCLUDE}", f"-I{RUNTIME}"]
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
# Translated PTX is long, its compilation would take longer than its run.
TRANSLATION_FLAGS = ["-O0", "-w"]
# Of the kernels; what calls them and the simulator itself are not looked at.
SANITIZE: dict[Sanitizer | None, list[str]] = {
    None: [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
RUNTIME_MACROS: dict[Sanitizer | None, list[str]] = {
    None: [],
    "thread": ["-DPIKV_SIM_TSAN"],
    "address": ["-DPIKV_SIM_ASAN"],
}


_compilers = threading.BoundedSemaphore(COMPILERS)
_locks: dict[Path, threading.Lock] = {}  # of files that are being made


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
        *((path, SANITIZE[sanitizer] if path.suffix == ".cu" else []) for path in sources),
        *((path, ["-O2", *RUNTIME_MACROS[sanitizer]]) for path in sorted(RUNTIME.glob("*.cpp"))),
    ]
    with ThreadPoolExecutor(COMPILERS) as pool:
        groups = pool.map(lambda unit: _objects(unit[0], unit[1], simulator), units)
        objects = [path for group in groups for path in group]
    kind = ["-rdynamic"] if executable else ["-shared"]
    command = ["g++", *kind, *SANITIZE[sanitizer]]
    return _linked(command, objects, ".exe" if executable else ".so")


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
    compile_cpp = ["g++", *FLAGS, *flags, *INCLUDES, "-x", "c++", "-c"]
    if source.suffix != ".cu" or simulator == "fibers":
        return [_made(compile_cpp, source, ".o")]
    compiler = nvcc()
    if compiler is None:
        raise BuildError("nvcc is not there: the PTX simulator needs it")
    ptx = _made([compiler, "-ptx", f"-arch={CUDA_ARCHITECTURE}", "-std=c++20", *INCLUDES], source, ".ptx")
    translated = _translated(ptx)
    return [
        _made([*compile_cpp, "-DPIKV_SIM_PTX"], source, ".o"),
        _made([*compile_cpp, *TRANSLATION_FLAGS], translated, ".o"),
    ]


def _translated(ptx: Path) -> Path:
    """The C++ of a PTX file."""
    digest = hashlib.sha256(ptx.read_bytes())
    for name in ("ptx2cpp.py", "ptx_instructions.py"):
        digest.update((ROOT / "tools" / name).read_bytes())
    return _published(digest, ".cpp", lambda path: path.write_text(ptx2cpp.translate(ptx.read_text())))


def _made(command: list[str], source: Path, suffix: str) -> Path:
    """What `command` makes of a source with `-o`, made once for the same command and contents."""
    digest = hashlib.sha256(repr([*command, source.name]).encode())
    for path in _read_by(source):
        digest.update(path.read_bytes())
    return _published(digest, suffix, lambda path: _run([*command, str(source), "-o", str(path)]))


def _linked(command: list[str], objects: list[Path], suffix: str) -> Path:
    names = list(map(str, objects))  # which tell the contents
    digest = hashlib.sha256(repr([*command, *names]).encode())
    return _published(digest, suffix, lambda path: _run([*command, *names, "-o", str(path)]))


def _read_by(source: Path) -> list[Path]:
    """A source and all that it includes with quotation marks, as far as it can be found."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            places = [(folder / name).resolve() for folder in (path.parent, INCLUDE, RUNTIME)]
            header = next((place for place in places if place.exists()), None)
            if header and header not in found:
                found.append(header)
    return found


def _run(command: list[str]) -> None:
    with _compilers:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")


def _published(digest: hashlib._Hash, suffix: str, make: Callable[[Path], object]) -> Path:
    """The cache's file of that digest; made, if it is not there, under another name, so that nobody reads half."""
    cache = Path(os.environ.get("PIKV_SIM_CACHE", ROOT / "build" / "sim"))
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / (digest.hexdigest()[:32] + suffix)
    with _locks.setdefault(target, threading.Lock()):
        if not target.exists():
            draft = target.with_name(f"{target.stem}.{os.getpid()}{suffix}")
            make(draft)
            os.replace(draft, target)
    return target
