"""A build has the compiled ops, or ends with an error, or was told to leave them out; PIKV_OPS never falls back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PIKV_")}


@pytest.fixture
def tree(tmp_path):
    """A copy of what is built and imported, without what has been built."""
    for name in ("assets", "csrc", "launch", "pikv", "pikv_megatron"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(tree, *arguments, **variables):
    variables = {**BARE, "PYTHONPATH": str(tree), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=variables, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(params=["no such compiler", "fails at once", "fails to compile"])
def compiler(request, tmp_path):
    """The path of a compiler that is not there, of one that only fails, and of one that can tell its version."""
    if request.param == "no such compiler":
        return "/no/such/compiler"
    if request.param == "fails at once":
        return "/bin/false"
    version = shutil.which("g++")
    if version is None:
        pytest.skip("no g++ whose version could be told")
    path = tmp_path / "g++"
    path.write_text(f'#!/bin/sh\ncase "$*" in *-o*) exit 1;; *) exec {version} "$@";; esac\n')
    path.chmod(0o755)
    return str(path)


def assert_refused(done, tree, reason):
    assert done.returncode != 0
    assert f"pikv_megatron: the compiled ops cannot be built: {reason}" in done.stderr
    assert done.stderr.endswith("PIKV_BUILD_OPS=0 pip install .\n")
    assert "pip install --no-build-isolation ." in done.stderr
    assert not [*tree.rglob("*.whl"), *tree.rglob("*.so")]


def test_without_a_compiler_there_is_no_wheel_and_it_says_what_to_do(tree, compiler):
    assert_refused(run(tree, "setup.py", "-q", "bdist_wheel", CC=compiler, CXX=compiler), tree, "")


SETUP = """
import runpy, sys
sys.argv = ["setup.py", "-q", *sys.argv[1:]]
sys.modules["torch"] = None  # as pip's build isolation hides it
runpy.run_path("setup.py")
"""


def test_without_torch_there_is_no_wheel_and_it_says_what_to_do(tree):
    done = run(tree, "-c", SETUP, "bdist_wheel")
    assert_refused(done, tree, "import of torch halted; None in sys.modules. pip's build isolation hides")
    assert run(tree, "-c", SETUP, "sdist").returncode == 0


def test_a_wheel_without_ops_serves_every_machine(tree):
    (tree / "pikv_megatron" / "_ops.abi3.so").write_bytes(b"what an editable install has built")
    done = run(tree, "setup.py", "-q", "bdist_wheel", PIKV_BUILD_OPS="0", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.rglob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PIKV_BUILD_OPS": "no"}, "PIKV_BUILD_OPS: expected one of 1, 0, got 'no'"),
        ({"PIKV_CUDA": "on"}, "PIKV_CUDA: expected one of auto, 0, 1, got 'on'"),
        ({"PIKV_CUDA": "1", "PIKV_BUILD_OPS": "0"}, "PIKV_CUDA=1 needs the compiled ops, which PIKV_BUILD_OPS=0 "),
    ],
)
def test_a_choice_that_is_none_is_refused(tree, variables, message):
    done = run(tree, "setup.py", "--version", **variables)
    assert done.returncode == 1
    assert done.stderr.startswith(f"pikv_megatron: {message}")


EXTENSIONS = """
import os, runpy, sys
import torch
torch.version.cuda = "13.0"
sys.argv = ["setup.py", "-q", "check"]
for gpu, choice in ((False, "auto"), (True, "auto"), (True, "0"), (False, "1")):
    torch.cuda.is_available = lambda: gpu
    os.environ["PIKV_CUDA"] = choice
    print(*(extension.name.removeprefix("pikv_megatron.") for extension in runpy.run_path("setup.py")["extensions"]))
"""


def test_cuda_kernels_are_built_where_a_gpu_is_seen_or_they_are_asked_for(tree):
    """nvcc and a CUDA build of torch alone do not ask for them: they take minutes."""
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (tree / "cuda" / name).parent.mkdir(parents=True)
        (tree / "cuda" / name).touch()
    done = run(tree, "-c", EXTENSIONS, CUDA_HOME=str(tree / "cuda"))
    assert done.stdout.splitlines() == ["_ops", "_ops _ops_cuda", "_ops", "_ops _ops_cuda"], done.stderr


def test_kernels_that_are_asked_for_but_not_built_are_an_import_error(tree):
    done = run(tree, "-c", "from pikv_megatron import PiKVCache", PIKV_OPS="avx2")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: PIKV_OPS is 'avx2', but the compiled ops are not built: README.md")


@pytest.mark.skipif("CI" not in os.environ, reason="elsewhere the tests may run on plain torch")
def test_continuous_integration_runs_the_kernels():
    from pikv_megatron import ops

    assert ops.kernel_set is not None


RUNS_REFERENCE = """
import pikv_megatron, torch
from pikv_megatron import ops
from pikv_megatron.ops import reference
assert pikv_megatron.__file__.startswith({root!r})
assert ops.kernel_set is None and set(ops.backend.values()) == {{"reference"}}
assert all(getattr(ops, name) is getattr(reference, name) for name in ops.backend)
back = ops.dequantize_block(*ops.quantize_block(torch.eye(32), 4, 4, True), 4, 4, True)
assert (back - torch.eye(32)).abs().max() < 0.01
"""


def test_without_the_library_plain_torch_runs_and_is_named(tree):
    done = run(tree, "-c", RUNS_REFERENCE.format(root=str(tree)))
    assert done.returncode == 0, done.stderr
    assert "the compiled ops are not built: plain torch is used" in done.stderr


def test_plain_torch_can_be_asked_for(tree):
    """With a library that would load, were it touched: what is there is no library at all."""
    (tree / "pikv_megatron" / "_ops.abi3.so").write_bytes(b"")
    done = run(tree, "-c", RUNS_REFERENCE.format(root=str(tree)), PIKV_OPS="reference")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert run(tree, "-c", "import pikv_megatron.ops", PIKV_OPS="auto").returncode != 0


def test_an_unknown_choice_is_refused_by_name(tree):
    done = run(tree, "-c", "import pikv_megatron.ops", PIKV_OPS="fast")
    assert done.stderr.splitlines()[-1].startswith("ValueError: PIKV_OPS: expected one of auto, ")


def test_the_command_line_says_it_in_one_line(tree):
    done = run(tree, "-m", "pikv_megatron", "demo", PIKV_OPS="fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pikv: error: PIKV_OPS: expected one of auto, reference, scalar, avx2, avx512, got 'fast'\n"
    (tree / "pikv_megatron" / "_ops.abi3.so").write_bytes(b"not a library of this torch")
    done = run(tree, "-m", "pikv_megatron", "doctor", PIKV_OPS="auto")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"pikv: error: PIKV_OPS is 'auto', but \S+_ops.abi3.so does not load under torch .+: .+; build it again "
        r"\(README.md, 'Install'\), or do without: PIKV_OPS=reference\n",
        done.stderr,
    )
