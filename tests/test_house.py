"""Promises of the package as a whole: light imports, names that resolve, short files.

What ruff can see (no print, no broad except, hosts only in integrations) is in pyproject.toml instead.
"""

import ast
import graphlib
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pikv
import pikv_megatron

ROOT = Path(__file__).parents[1]
HEAVY = {
    "apex",
    "deepspeed",
    "matplotlib",
    "megatron",
    "mooncake",
    "mpi4py",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
}


@pytest.mark.parametrize("module", ["pikv_megatron", "pikv"])
def test_import_is_light(module):
    """Every public name can be had without a host, a compiler or a plotting library being imported."""
    script = f"import json, sys\nfrom {module} import *\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stdout))
    assert {"torch", "pikv_megatron"} <= loaded
    assert not loaded & HEAVY


def test_public_names_resolve_to_the_same_objects_under_both_names():
    assert {"PiKVCache", "ExpertKVCache", "ModelConfig", "RuntimeConfig"} <= set(pikv_megatron.__all__)
    for name in pikv_megatron.__all__:
        assert getattr(pikv, name) is getattr(pikv_megatron, name)
    assert dir(pikv) == sorted(pikv_megatron.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pikv.no_such_name


def test_console_scripts_resolve():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"pikv"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_no_file_outgrows_its_one_job():
    sources = [*(ROOT / "pikv_megatron").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    lines = {path: len(path.read_text().splitlines()) for path in sources}
    assert len({path.suffix for path in lines}) > 4
    assert {str(path): count for path, count in lines.items() if count > 450} == {}


@pytest.mark.parametrize("package", ["integrations/huggingface", "integrations/deepspeed"])
def test_the_files_of_a_package_import_each_other_in_one_direction(package):
    """Imports inside functions and for type checkers included."""
    files = {path.stem: path for path in (ROOT / "pikv_megatron" / package).glob("*.py")}
    prefix = f"pikv_megatron.{package.replace('/', '.')}"
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        dotted = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        named = {d.removeprefix(f"{prefix}.").split(".")[0] for d in dotted if d.startswith(f"{prefix}.")}
        arrows[name] = {other for other in named if other in files}
    assert sum(map(len, arrows.values())) > 1
    list(graphlib.TopologicalSorter(arrows).static_order())  # CycleError names the circle
