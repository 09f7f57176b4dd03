"""The build of the compiled ops is optional: without a compiler it says so loudly, and PIKV_OPS never falls back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PIKV_")}


@pytest.fixture
def tree(tmp_path):
    """A copy of what is built and imported, without what has been built."""
    for name in ("csrc", "pikv", "pikv_megatron"):
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


def build(tree, compiler, **variables):
    return run(tree, "setup.py", "build_ext", "--inplace", CC=compiler, CXX=compiler, **variables)


def test_without_a_compiler_it_builds_nothing_and_says_so(tree, compiler):
    done = build(tree, compiler)
    assert done.returncode == 0, done.stderr
    assert "the compiled ops were NOT built, plain torch will be used" in done.stderr
    assert not list(tree.rglob("*.so"))


def test_required_ops_that_cannot_be_built_are_an_error(tree):
    done = build(tree, "/bin/false", PIKV_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "the compiled ops cannot be built and PIKV_REQUIRE_EXT=1" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("PIKV_REQUIRE_EXT", "yes"), ("PIKV_CUDA", "on")])
def test_a_choice_that_is_none_is_refused(tree, name, value):
    """Else who demands the ops, and misspells it, gets plain torch."""
    done = run(tree, "setup.py", "--version", **{name: value})
    assert done.returncode == 1
    assert re.fullmatch(rf"pikv_megatron: {name}: expected one of .+, got '{value}'\n", done.stderr)


@pytest.mark.parametrize("variables", [{"PIKV_OPS": "avx2"}, {"PIKV_REQUIRE_EXT": "1"}])
def test_kernels_that_are_asked_for_but_not_built_are_an_import_error(tree, variables):
    done = run(tree, "-c", "from pikv_megatron import PiKVCache", **variables)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: PIKV_OPS is ")
    assert "the compiled ops are not built: install a C++ compiler" in error


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
        r"pikv: error: PIKV_OPS is 'auto', but \S+_ops.abi3.so does not load under torch .+: .+; `make install` builds "
        r"it anew, PIKV_OPS=reference does without\n",
        done.stderr,
    )
