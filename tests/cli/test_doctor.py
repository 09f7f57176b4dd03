"""`pikv doctor`: it says what is so, names what is wrong with its remedy, and imports no host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from test_house import HEAVY

from pikv_megatron import ops
from pikv_megatron.cli import doctor, main
from pikv_megatron.launch.environment import VARIABLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def report(capsys):
    def run() -> tuple[int, str]:
        status = main(["doctor"])
        return status, capsys.readouterr().out

    return run


def _line(text: str, name: str) -> str:
    (found,) = (line.strip() for line in text.splitlines() if line.strip().startswith(name + " "))
    return found.removeprefix(name).strip()


def test_it_says_what_runs(report):
    status, text = report()
    assert status == 0, text
    for name, backend in ops.backend.items():
        assert _line(text, name) == backend
    assert _line(text, "kernels").startswith(ops.kernel_set or "none, plain torch")
    assert _line(text, "torch").startswith(torch.__version__)
    assert f"{torch.get_num_threads()} (" in _line(text, "threads")
    assert "agrees with plain torch (7 ops)" in text
    assert "broken" not in text


def test_hosts_are_what_is_installed(report, monkeypatch):
    versions = {"deepspeed": "0.19.8", "transformers": "5.23.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _, text = report()
    hosts = text.split("hosts\n")[1].split("processor\n")[0]
    assert _line(hosts, "--host megatron") == "needs megatron-core"
    assert "AutoEP" in _line(hosts, "--host deepspeed") and "generate()" in _line(hosts, "--host hf")
    assert _line(hosts, "accelerator") == "DS_ACCELERATOR=cpu"
    del versions["transformers"]
    hosts = report()[1].split("hosts\n")[1].split("processor\n")[0]
    assert _line(hosts, "--host deepspeed") == "needs transformers" == _line(hosts, "--host hf")
    versions.clear()
    hosts = report()[1].split("hosts\n")[1].split("processor\n")[0]
    assert _line(hosts, "--host deepspeed") == "needs deepspeed and transformers" and "accelerator" not in hosts


def test_no_host_is_imported():
    script = (
        "import json, sys\nfrom pikv_megatron.cli import main\nstatus = main(['doctor'])\n"
        "print(json.dumps([status, list(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    status, loaded = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert not set(loaded) & HEAVY


def test_hosts_are_optional(report, monkeypatch):
    versions = {"megatron-core": "0.16.1", "transformers": "5.24.0", "mpi4py": "4.9"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    status, text = report()
    assert status == 0, text
    assert _line(text, "deepspeed") == "not installed"
    assert _line(text, "transformers") == "5.24.0"
    assert "megatron-core 0.16.1 is not a version that the tests run with" in text
    assert "remedy: install megatron-core 0.19.x" in text
    assert "transformers 5.24.0 is not a version that the tests run with" in text
    assert "mpi4py 4.9 is not" not in text


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("", 1, "another package of that name, not NVIDIA's"),
        ("class optimizers: pass\n", 1, "another package of that name, not NVIDIA's"),
        ("import no_such_module_of_apex\n", 1, "cannot be imported (ModuleNotFoundError"),
        ("class optimizers:\n    FusedAdam = 1\n", 0, "NVIDIA's"),
    ],
)
def test_apex_is_told_from_nvidias(report, monkeypatch, tmp_path, source, status, said):
    (tmp_path / "apex.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    found, text = report()
    sys.modules.pop("apex", None)
    assert found == status
    assert _line(text, "apex").startswith(said)
    assert ("remedy: pip uninstall apex" in text) == bool(status)


def test_half_a_launcher_is_broken(report, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_PROCID", "7")
    status, text = report()
    assert status == 1
    assert _line(text, "SLURM_PROCID") == "7"
    assert "broken: the environment sets RANK=0, WORLD_SIZE=2 but not MASTER_ADDR, MASTER_PORT" in text
    assert "remedy: unset what another launcher left" in text
    assert _line(text, "detected").startswith("incomplete")


def test_too_many_threads_are_named(report, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    status, text = report()
    assert status == 0, text
    assert f"remedy: export OMP_NUM_THREADS={len(os.sched_getaffinity(0))}" in text


def test_ops_that_are_not_built_are_slow_not_broken(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    monkeypatch.setattr(ops, "kernel_set", None)
    monkeypatch.setattr(ops, "choice", "auto")
    status, text = report()
    assert status == 0, text
    assert _line(text, "library") == "not built"
    assert "1. the compiled ops are not built" in text
    assert "make -B install" in text


def test_a_cuda_library_that_does_not_load_is_broken(report, monkeypatch, tmp_path):
    (tmp_path / "_ops_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    status, text = report()
    assert status == 1
    assert "does not load" in _line(text, "CUDA library")
    assert "broken: _ops_cuda.abi3.so does not load" in text


def test_an_op_that_computes_something_else_is_broken(report, monkeypatch):
    right = ops.attend_blocks
    monkeypatch.setattr(ops, "attend_blocks", lambda *args: ops.Partial(right(*args).out * 1.01, right(*args).lse))
    status, text = report()
    assert status == 1
    assert "on cpu these do not compute what plain torch does: attend_blocks\n" in text


def test_the_report_is_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith(torch.__version__) and found["ops"]["append"] == ops.backend["append"]
    (problem,) = (problem for problem in found["problems"] if "4096 threads" in problem["text"])
    assert problem["broken"] is False and "OMP_NUM_THREADS" in problem["remedy"]


def test_pikv_ops_is_shown():
    done = subprocess.run(
        [sys.executable, "-m", "pikv_megatron", "doctor"],
        cwd=ROOT,
        env={**os.environ, "PIKV_OPS": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert _line(done.stdout, "kernels") == "none, plain torch: PIKV_OPS=reference"
    assert all(_line(done.stdout, name) == "reference" for name in ops.backend)
