"""Builds the compiled ops (csrc/) where it can; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs all the same and runs on plain torch; PIKV_REQUIRE_EXT=1 makes that an
error.
"""

import glob
import logging
import os
from subprocess import CalledProcessError

from setuptools import Extension, setup
from setuptools.errors import BaseError, CompileError, LinkError

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_scalar.cpp",
]
# gnu++20 rather than c++20: it lets the compiler contract a * b + c, which the kernels count on.
FLAGS = ["-O3", "-std=gnu++20", "-fvisibility=hidden", "-Wall"]
# torch's stable ABI as of 2.13: the library serves every later version; Python it does not touch at all.
MACROS = [("TORCH_TARGET_VERSION", "0x020d000000000000")]
REQUIRED = os.environ.get("PIKV_REQUIRE_EXT") == "1"

# How a compiler that is missing or fails shows: by what BuildExtension raises when it asks for its version, and by what
# setuptools raises when it runs it, whose errors have no class in common.
FAILURES = (OSError, RuntimeError, CalledProcessError, BaseError, CompileError, LinkError)


def without_ops(reason: object) -> None:
    """Ends the build where the ops are required, else says loudly what follows."""
    if REQUIRED:
        raise SystemExit(f"pikv_megatron: the compiled ops cannot be built and PIKV_REQUIRE_EXT=1: {reason}")
    logging.warning("pikv_megatron: the compiled ops were NOT built, plain torch will be used: %s", reason)


def extension() -> dict[str, object]:
    """What `setup` needs to build the ops, or nothing where torch is not there to build against."""
    try:
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        without_ops(error)
        return {}

    class OptionalBuild(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
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
        include_dirs=["csrc/include", "csrc/cpu", *include_paths()],
        library_dirs=library_paths(),
        libraries=["c10", "torch_cpu", "torch"],
        define_macros=MACROS,
        extra_compile_args={"cxx": FLAGS},  # type: ignore[arg-type] - BuildExtension's form
        language="c++",
        py_limited_api=True,
        depends=["csrc/include/pikv/kernels.h", *sorted(glob.glob("csrc/cpu/*.inl"))],
    )
    return {
        "ext_modules": [ops],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
