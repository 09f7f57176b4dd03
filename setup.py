"""Builds the compiled ops (csrc/) where it can; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs all the same and runs on plain torch; PIKV_REQUIRE_EXT=1 makes that an
error.

The CUDA kernels are a library of their own, `_ops_cuda`. They take minutes to compile, so PIKV_CUDA decides: unset,
they are built where nvcc is found and torch has CUDA; 1 demands them (they load under a torch without CUDA too), 0
leaves them out.
"""

import glob
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError, CompileError, LinkError

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
FLAGS = ["-O3", "-std=gnu++20", "-fvisibility=hidden", "-Wall"]
# torch's stable ABI as of 2.13: the library serves every later version; Python it does not touch at all.
MACROS = [("TORCH_TARGET_VERSION", "0x020d000000000000")]


def choice(name: str, *known: str) -> str:
    """An environment variable that is one of `known`; unset or empty, the first of them."""
    value = os.environ.get(name) or known[0]
    if value not in known:
        raise SystemExit(f"pikv_megatron: {name}: expected one of {', '.join(known)}, got {value!r}")
    return value


REQUIRED = choice("PIKV_REQUIRE_EXT", "0", "1") == "1"
CUDA_OPS = "pikv_megatron._ops_cuda"
CUDA_CHOICE = choice("PIKV_CUDA", "auto", "0", "1")
CUDA_ARCHITECTURES = ("80", "90a", "100a")  # those of them that nvcc knows

# How a compiler that is missing or fails shows: by what BuildExtension raises when it asks for its version, and by what
# setuptools raises when it runs it, whose errors have no class in common.
FAILURES = (OSError, RuntimeError, subprocess.CalledProcessError, BaseError, CompileError, LinkError)


def without_ops(reason: object) -> None:
    """Ends the build where the ops are required, else says loudly what follows."""
    if REQUIRED:
        raise SystemExit(f"pikv_megatron: the compiled ops cannot be built and PIKV_REQUIRE_EXT=1: {reason}")
    logging.warning("pikv_megatron: the compiled ops were NOT built, plain torch will be used: %s", reason)


def without_cuda(reason: object) -> None:
    """Ends the build where CUDA is demanded, else says what follows."""
    if CUDA_CHOICE == "1":
        raise SystemExit(f"pikv_megatron: the CUDA kernels cannot be built and PIKV_CUDA=1: {reason}")
    logging.warning("pikv_megatron: the CUDA kernels were not built, ops on a GPU will not run: %s", reason)


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, its usual place, or where the nvcc of PATH is."""
    found = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", found and Path(found).resolve().parents[1]]
    homes = [Path(place) for place in places if place]
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime_api.h").exists()), None)


def cuda_extension(torch_has_cuda: bool) -> list[Extension]:
    """The library of CUDA kernels, or nothing; `compile_kernels` adds the objects that nvcc makes."""
    if CUDA_CHOICE == "0" or (CUDA_CHOICE == "auto" and not torch_has_cuda):
        return []
    home = find_cuda()
    if home is None:
        without_cuda("no CUDA toolkit with nvcc and headers was found (CUDA_HOME says where)")
        return []
    from torch.utils.cpp_extension import include_paths, library_paths

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


def extension() -> dict[str, object]:
    """What `setup` needs to build the ops, or nothing where torch is not there to build against."""
    try:
        import torch.version
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        without_ops(error)
        return {}

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            for cuda_ops in [e for e in self.extensions if e.name == CUDA_OPS]:
                try:
                    cuda_ops.extra_objects = compile_kernels(self.build_temp)
                except (OSError, subprocess.CalledProcessError) as error:
                    without_cuda(error)
                    self.extensions.remove(cuda_ops)
            try:
                super().build_extensions()
            except FAILURES as error:
                without_ops(error)
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    ops = Extension(
        "pikv_megatron._ops",
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
    return {
        "ext_modules": [ops, *cuda_extension(torch.version.cuda is not None)],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
