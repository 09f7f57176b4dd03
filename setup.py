"""Builds the compiled ops (csrc/) and says where a wheel's data come from; the rest is in pyproject.toml.

A build has the compiled ops, or it ends with an error. Two environment variables choose:

    PIKV_BUILD_OPS  1, the default: build them; 0: leave them out. The package then runs on plain torch, which is
                    slower, and its wheel serves every machine.
    PIKV_CUDA       auto, the default: build the CUDA kernels too where torch finds a GPU; 1: build them in any case
                    (they load under a torch without CUDA, too); 0: leave them out. They are a library of their own,
                    `_ops_cuda`, and take minutes to compile.
"""

import glob
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CompileError, LinkError

DATA = {"pikv_megatron.data.assets": "assets", "pikv_megatron.data.launch": "launch"}
"""Folders of the checkout, and what they are called in a wheel. `pikv_megatron/cli/files.py` finds them in both."""
SOURCES = [
    "csrc/bindings.cpp",
    "csrc/ops/attend.cpp",
    "csrc/ops/mass.cpp",
    "csrc/ops/quantize.cpp",
    "csrc/ops/score.cpp",
    "csrc/ops/window.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_scalar.cpp",
]
# gnu++20 rather than c++20: it lets the compiler contract a * b + c, which the kernels count on.
# Python's own flags ask for debug information, which would be nine tenths of the library.
FLAGS = ["-O3", "-g0", "-std=gnu++20", "-fvisibility=hidden", "-Wall"]
# torch's stable ABI as of 2.13: the library serves every later version; Python it does not touch at all.
MACROS = [("TORCH_TARGET_VERSION", "0x020d000000000000")]


def choice(name: str, *known: str) -> str:
    """An environment variable that is one of `known`; unset or empty, the first of them."""
    value = os.environ.get(name) or known[0]
    if value not in known:
        raise SystemExit(f"pikv_megatron: {name}: expected one of {', '.join(known)}, got {value!r}")
    return value


BUILD_OPS = choice("PIKV_BUILD_OPS", "1", "0") == "1"
OPS, CUDA_OPS = "pikv_megatron._ops", "pikv_megatron._ops_cuda"
CUDA_CHOICE = choice("PIKV_CUDA", "auto", "0", "1")
if CUDA_CHOICE == "1" and not BUILD_OPS:
    raise SystemExit("pikv_megatron: PIKV_CUDA=1 needs the compiled ops, which PIKV_BUILD_OPS=0 leaves out")
CUDA_ARCHITECTURES = ("80", "90a", "100a")  # those of them that nvcc knows

# How a compiler that is missing or fails shows: by what BuildExtension raises when it asks for its version, and by what
# setuptools raises when it runs it, whose errors have no class in common.
FAILURES = (OSError, RuntimeError, subprocess.CalledProcessError, BaseError, CompileError, LinkError)


def refuse_ops(reason: object) -> NoReturn:
    """Ends the build: says why the ops cannot be built, how they can, and how to do without them."""
    raise SystemExit(
        f"pikv_megatron: the compiled ops cannot be built: {reason}\n"
        "  They need g++, and torch 2.13 or newer that the build can see: pip install --no-build-isolation .\n"
        "  To install without them, on plain torch, which is slower: PIKV_BUILD_OPS=0 pip install ."
    )


def refuse_cuda(reason: object) -> NoReturn:
    """Ends the build: says why the CUDA kernels cannot be built, and how to do without them."""
    raise SystemExit(
        f"pikv_megatron: the CUDA kernels cannot be built: {reason}\n"
        "  They need a CUDA toolkit with nvcc and headers; CUDA_HOME says where it is.\n"
        "  To install without them, with plain torch on the GPU, which is slower: PIKV_CUDA=0"
    )


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, its usual place, or where the nvcc of PATH is."""
    found = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found and Path(found).resolve().parents[1]]
    homes = [Path(place) for place in places if place]
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime_api.h").exists()), None)


def cuda_extension() -> list[Extension]:
    """The library of CUDA kernels, or nothing; `compile_kernels` adds the objects that nvcc makes."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    if CUDA_CHOICE == "0" or (CUDA_CHOICE == "auto" and not torch.cuda.is_available()):
        return []
    home = find_cuda()
    if home is None:
        if CUDA_CHOICE == "1":
            refuse_cuda("no CUDA toolkit was found")
        # Many who have a GPU have no toolkit. The package says at import that plain torch runs on the GPU.
        logging.warning("pikv_megatron: there is a GPU but no CUDA toolkit (CUDA_HOME): no CUDA kernels are built")
        return []
    ops = Extension(
        CUDA_OPS,
        sorted(map(str, Path("csrc/cuda").glob("*.cpp"))),
        include_dirs=["csrc/include", f"{home}/include", *include_paths()],
        library_dirs=[f"{home}/lib64", *library_paths()],
        libraries=["c10", "torch_cpu", "torch", "cudart_static", "rt", "dl", "pthread"],
        define_macros=MACROS,
        extra_compile_args={"cxx": FLAGS},  # type: ignore[arg-type] - BuildExtension's form
        extra_link_args=["-Wl,--no-undefined"],
        language="c++",
        py_limited_api=True,
        depends=[
            "csrc/include/pikv/arguments.h",
            "csrc/include/pikv/cuda.h",
            *map(str, Path("csrc/cuda").glob("*.cu*")),
        ],
    )
    return [ops]


def compile_kernels(folder: str) -> list[str]:
    """The objects of csrc/cuda/*.cu, machine code for every architecture; CalledProcessError with nvcc's words."""
    home = find_cuda()
    assert home is not None
    nvcc = str(home / "bin/nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    flags = ["-O3", "-std=c++17", "-Icsrc/include", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    for arch in CUDA_ARCHITECTURES:
        if f"sm_{arch}" in known:
            flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    Path(folder).mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = f"{folder}/{source.stem}.cuda.o"
        subprocess.run([nvcc, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sorted(Path("csrc/cuda").glob("*.cu"))))


class CleanBuild(build_py):
    """Forgets what an earlier build has left in `build/`: modules that have moved since, and kernels that are no longer
    asked for, would be in the wheel too.
    """

    def run(self) -> None:
        wanted = {ops.name.rpartition(".")[2] for ops in self.distribution.ext_modules or []}
        if not self.editable_mode:
            for file in Path(self.build_lib).rglob("*.*"):
                if file.is_file() and file.name.split(".")[0] not in wanted:
                    file.unlink()
        super().run()


def refusing(reason: str) -> type[build_ext]:
    """A build_ext that cannot build: all else, such as a source distribution, can still be made."""

    class RefuseBuild(build_ext):
        def run(self) -> None:
            refuse_ops(reason)

    return RefuseBuild


def compiled_ops() -> tuple[list[Extension], dict[str, type[build_ext]]]:
    """The extensions to build, and the command that builds them; neither where they are to be left out."""
    if not BUILD_OPS:
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        refuse = refusing(f"{error}. pip's build isolation hides a torch that is installed")
        return [Extension(OPS, SOURCES)], {"build_ext": refuse}
    if torch.__version__ < "2.13":
        return [Extension(OPS, SOURCES)], {"build_ext": refusing(f"torch {torch.__version__} is too old")}

    class BuildOps(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            for cuda_ops in [e for e in self.extensions if e.name == CUDA_OPS]:
                try:
                    cuda_ops.extra_objects = compile_kernels(self.build_temp)
                except (OSError, subprocess.CalledProcessError) as error:
                    refuse_cuda(error)
            try:
                super().build_extensions()
            except FAILURES as error:
                refuse_ops(error)

    ops = Extension(
        OPS,
        SOURCES,
        include_dirs=["csrc", "csrc/include", "csrc/cpu", *include_paths()],
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch"],
        define_macros=MACROS,
        extra_compile_args={"cxx": FLAGS},  # type: ignore[arg-type] - BuildExtension's form
        language="c++",
        py_limited_api=True,
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/cpu/*.inl")),
    )
    return [ops, *cuda_extension()], {"build_ext": BuildOps.with_options(use_ninja=False)}


extensions, commands = compiled_ops()
setup(
    packages=[*find_packages(include=["pikv", "pikv_megatron", "pikv_megatron.*"]), *DATA],
    package_dir=DATA,
    ext_modules=extensions,
    cmdclass={"build_py": CleanBuild, **commands},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # counts only where there are extensions
)
