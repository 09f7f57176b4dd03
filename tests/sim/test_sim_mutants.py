"""Bugs put into the CUDA kernels on purpose (mutants.toml) are caught, each by the tool that must catch it.

`pytest -m slow -k every_tool -rP` shows for each mutant what every tool says.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import harnesses
import pytest

MUTANTS = tomllib.loads((Path(__file__).resolve().parent / "mutants.toml").read_text())["mutant"]


def of_list(mutants, slow):
    marks = [[pytest.mark.slow] if slow or mutant.get("slow") else [] for mutant in mutants]
    pairs = zip(mutants, marks, strict=True)
    return [pytest.param(mutant, marks=mark, id=mutant["name"].replace(" ", "-")) for mutant, mark in pairs]


def mutated(mutant, folder):
    """A copy of the kernels with the mutant's bug."""
    shutil.copytree(harnesses.KERNELS, folder, dirs_exist_ok=True)
    found = [path for path in folder.glob("*.cu*") for _ in range(path.read_text().count(mutant["old"]))]
    assert len(found) == 1, f"the patch no longer applies, its text is in {found}: {mutant['old']!r}"
    found[0].write_text(found[0].read_text().replace(mutant["old"], mutant["new"]))
    return folder


def test_names_are_told_apart_and_there_are_enough():
    assert len({mutant["name"] for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert {mutant["tool"] for mutant in MUTANTS} == set(harnesses.TOOLS)


@pytest.mark.parametrize("mutant", of_list(MUTANTS, slow=False))
def test_mutants_are_caught(mutant, tmp_path):
    harnesses.skip_without_nvcc(mutant["tool"])
    program = harnesses.executable(mutant["op"], mutant["tool"], mutated(mutant, tmp_path))
    fault = harnesses.fault(program)
    assert fault is not None, "nobody noticed"
    assert re.search(mutant["shows"], fault), fault


@pytest.mark.parametrize("mutant", of_list(MUTANTS, slow=True))
def test_what_every_tool_says(mutant, tmp_path, record_property):
    harnesses.skip_without_nvcc("ptx")
    kernels = mutated(mutant, tmp_path)
    faults = {tool: harnesses.fault(harnesses.executable(mutant["op"], tool, kernels)) for tool in harnesses.TOOLS}
    for tool, fault in faults.items():
        record_property(tool, fault or "-")
        print(f"{tool:8} {fault or '-'}")
    assert faults[mutant["tool"]] is not None
