"""Bugs put into the CUDA kernels on purpose (mutants.toml) are caught, each by the tool that must catch it.

`pytest tests/sim -m slow -k every_tool -rP` shows what every tool says of every mutant.
"""

from __future__ import annotations

import re

import harnesses
import pytest
from harnesses import MUTANTS, Run


def runs_of(tools, slow):
    """The mutants with their runs by the tools that `tools` gives for each."""
    for name, mutant in MUTANTS.items():
        runs = tuple(Run(mutant["op"], tool, name) for tool in tools(mutant))
        marks = [pytest.mark.slow] if slow or mutant.get("slow") else []
        yield pytest.param(mutant, runs, marks=marks, id=name.replace(" ", "-"))


def test_there_are_enough_and_every_tool_has_some():
    assert len(MUTANTS) >= 12
    assert {mutant["tool"] for mutant in MUTANTS.values()} == set(harnesses.TOOLS)


@pytest.mark.parametrize(("mutant", "runs"), list(runs_of(lambda mutant: [mutant["tool"]], slow=False)))
def test_mutants_are_caught(mutant, runs, faults):
    (run,) = runs
    harnesses.skip_without_nvcc(run.tool)
    fault = faults[run].result()
    assert fault is not None, "nobody noticed"
    assert re.search(mutant["shows"], fault), fault


@pytest.mark.parametrize(("mutant", "runs"), list(runs_of(lambda _: harnesses.TOOLS, slow=True)))
def test_what_every_tool_says(mutant, runs, faults, record_property):
    harnesses.skip_without_nvcc("ptx")
    said = {run.tool: faults[run].result() for run in runs}
    for tool, fault in said.items():
        record_property(tool, fault or "-")
        print(f"{tool:8} {fault or '-'}")
    assert said[mutant["tool"]] is not None
