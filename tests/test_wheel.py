"""A wheel, built and installed elsewhere, has all that the command needs: it runs from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PIKV_")}
BUILT = ROOT / "pikv_megatron" / "_ops.abi3.so"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--no-input", "-qq", *map(str, arguments)]
    done = subprocess.run(command, env=BARE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout. Where the compiled ops are built already, they are taken as they are."""
    tree = tmp_path_factory.mktemp("tree")
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("assets", "csrc", "launch", "pikv", "pikv_megatron"):
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    lib = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "pikv_megatron"
    lib.mkdir(parents=True)
    (lib / "_ops_cuda.abi3.so").write_bytes(b"of an earlier build")
    (lib / "moved.py").write_text("# a module of an earlier version")
    if BUILT.exists():
        shutil.copy(BUILT, lib)  # newer than its sources
    pip("wheel", tree, "--no-build-isolation", "--no-deps", "--wheel-dir", tree / "dist")
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_it_holds_the_package_and_its_data_and_nothing_else(wheel):
    assert "-cp311-abi3-" in wheel.name
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pikv_megatron").rglob("*.py")}
    expected |= {"pikv/__init__.py", "pikv/py.typed", "pikv_megatron/py.typed", "pikv_megatron/_ops.abi3.so"}
    data = [path for path in [*(ROOT / "assets").rglob("*"), *(ROOT / "launch").rglob("*")] if path.is_file()]
    expected |= {f"pikv_megatron/data/{path.relative_to(ROOT)}" for path in data if path.suffix != ".gz"}
    assert names == expected
    assert wheel.stat().st_size < 6e6


def test_the_command_runs_from_an_empty_folder(wheel, tmp_path):
    pytest.importorskip("megatron")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    # -S: no .pth file is read, so an editable install of the checkout is not found.
    paths = {"PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, "-S", str(site / "bin" / "pikv"), *words]
        done = subprocess.run(
            command, cwd=empty, env=BARE | paths, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    scripts = Path(run("launch-dir").rstrip("\n"))
    assert scripts == site / "pikv_megatron" / "data" / "launch"
    assert os.access(scripts / "torchrun.sh", os.X_OK) and (scripts / "configs" / "mixtral_8x7b.yaml").is_file()
    made = json.loads(run("generate", "--prompt", "hi", "--max-new-tokens", "3", "--json"))
    assert (made["prompt_tokens"], made["new_tokens"], len(made["text"])) == (2, 3, 3)
    table = run("demo", "--documents", "1", "--facts", "2", "--length", "240").splitlines()
    assert len([line for line in table if line.startswith(("stock", "PiKV")) and " 2 of 2 " in line]) == 6, table
    assert not list(empty.iterdir())
