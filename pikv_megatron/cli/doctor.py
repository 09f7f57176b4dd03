"""What this installation is and what keeps it from being fast or from working.

Facts in sections, problems last, each with its remedy. The status is 1 where something is broken and 0 where the
cache can be used, slowly perhaps. No host is imported: their versions come from their metadata. NVIDIA's apex alone is
imported where a package of that name is found, since nothing else tells it from PyPI's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from pikv_megatron import ops
from pikv_megatron.launch.environment import VARIABLES, LaunchError, read_launch
from pikv_megatron.ops import reference

PACKAGE = Path(__file__).resolve().parents[1]
TESTED = {"megatron-core": "0.19", "transformers": "5.23", "deepspeed": "0.19", "mpi4py": "4"}
"""Hosts and the versions that the tests run with, as the extras of pyproject.toml have them."""
HOSTS = {
    "megatron": (("megatron-core",), "static and dynamic contexts, both engines, experts over ranks"),
    "hf": (("transformers",), "generate() and forwards with a PiKVHFCache"),
    "deepspeed": (
        ("deepspeed", "transformers"),
        "init_inference on one rank or by AutoTP, initialize with AutoEP, hooks on deepspeed.moe",
    ),
}
"""What `pikv generate --host` takes: what it needs, and what PiKV does on it."""
REBUILD = "run `make -B install` in a checkout, or install again as README.md says under 'Install'"
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")

Facts = dict[str, str]


class Problem(NamedTuple):
    """What is wrong, how to mend it, and whether the cache cannot be used until then."""

    text: str
    remedy: str
    broken: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pikv doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs `pikv doctor`; 1 where something is broken."""
    problems: list[Problem] = []
    sections = {
        "versions": _versions(problems),
        "hosts": _hosts(),
        "processor": _processor(problems),
        "ops": _ops(problems),
        "CUDA": _cuda(problems),
        "launcher": _launcher(problems),
    }
    problems.sort(key=lambda problem: not problem.broken)
    if args.json:
        listed = [problem._asdict() for problem in problems]
        print(json.dumps({**sections, "problems": listed}, indent=1))
    else:
        _print(sections, problems)
    return int(any(problem.broken for problem in problems))


def _print(sections: dict[str, Facts], problems: list[Problem]) -> None:
    width = max(len(name) for facts in sections.values() for name in facts) + 2
    for title, facts in sections.items():
        print(title)
        for name, text in facts.items():
            print(f"  {name:{width}}{text}")
    print("problems" if problems else "no problems")
    for number, problem in enumerate(problems, start=1):
        print(f"  {number}. {'broken: ' if problem.broken else ''}{problem.text}\n     remedy: {problem.remedy}")


def _versions(problems: list[Problem]) -> Facts:
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    facts = {
        "pikv_megatron": importlib.import_module("pikv_megatron").__version__,
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": f"{torch.__version__}, {build}",
    }
    for host, tested in TESTED.items():
        version = _version(host)
        facts[host] = version or "not installed"
        if version and not f"{version}.".startswith(f"{tested}."):
            remedy = f"install {host} {tested}.x; CONTRIBUTING.md, 'Setting up', says how"
            problems.append(Problem(f"{host} {version} is not a version that the tests run with", remedy, False))
    facts["apex"] = _apex(problems)
    return facts


def _hosts() -> Facts:
    """What each host of `pikv generate --host` serves here, by what is installed."""
    facts = {}
    for host, (needs, serves) in HOSTS.items():
        missing = [name for name in needs if _version(name) is None]
        facts[f"--host {host}"] = f"needs {' and '.join(missing)}" if missing else serves
    if _version("deepspeed"):
        chosen = os.environ.get("DS_ACCELERATOR")
        facts["accelerator"] = (
            f"DS_ACCELERATOR={chosen}" if chosen else "DeepSpeed's choice; DS_ACCELERATOR overrides it"
        )
        facts["all-reduce"] = "by gloo or nccl: DeepSpeed's shared-memory op is left out (docs/deepspeed.md)"
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _apex(problems: list[Problem]) -> str:
    if importlib.util.find_spec("apex") is None:
        return "not installed; not needed"
    try:
        apex = importlib.import_module("apex")
    except (ImportError, AttributeError, SyntaxError) as error:
        found = f"cannot be imported ({type(error).__name__}: {error})"
    else:
        if hasattr(apex, "optimizers") and hasattr(apex.optimizers, "FusedAdam"):
            return "NVIDIA's"
        found = "another package of that name, not NVIDIA's"
    remedy = "pip uninstall apex; CONTRIBUTING.md says where NVIDIA's comes from, which is optional"
    problems.append(Problem(f"apex is {found}: Megatron-core takes it for NVIDIA's", remedy, True))
    return found


def _processor(problems: list[Problem]) -> Facts:
    described = _cpuinfo()
    flags = (described.get("flags") or described.get("Features", "")).split()
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}"
        problems.append(Problem(f"torch uses {threads} threads on {cores} usable cores, which is slow", remedy, False))
    set_by = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else "torch's choice"
    return {
        "name": described.get("model name", platform.machine()),
        "has": _listed(flag for flag in FEATURES if flag in flags),
        "lacks": _listed(flag for flag in FEATURES if flag not in flags),
        "cores": f"{cores} usable of {os.cpu_count()}",
        "threads": f"{threads} ({set_by})",
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _listed(names: Iterable[str]) -> str:
    return " ".join(names) or "none"


def _ops(problems: list[Problem]) -> Facts:
    library = _library("_ops.*so")
    if ops.kernel_set is not None:
        asked = "the widest that this processor has" if ops.choice == "auto" else f"PIKV_OPS={ops.choice}"
        kernels = f"{ops.kernel_set}: {asked}"
    elif ops.choice == "reference":
        kernels = "none, plain torch: PIKV_OPS=reference"
    else:
        kernels = "none, plain torch: the compiled ops are not built"
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        remedy = f"{REBUILD} (compiler: {compiler})" if compiler else f"install a C++ compiler, then {REBUILD}"
        problems.append(Problem("the compiled ops are not built: plain torch runs, which is slower", remedy, False))
    return {
        "PIKV_OPS": os.environ.get("PIKV_OPS", "not set: auto"),
        "library": str(library) if library else "not built",
        "kernels": kernels,
        **ops.backend,
        "self-check": _self_check(torch.device("cpu"), problems),
    }


def _library(pattern: str) -> Path | None:
    return next(iter(sorted(PACKAGE.glob(pattern))), None)


def _self_check(device: torch.device, problems: list[Problem]) -> str:
    """Whether the ops compute on small INT8 blocks what plain torch does."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(6, 2, 32, 64, generator=generator).to(device) for _ in range(2))
    q, block_ids = torch.randn(1, 2, 4, 64, generator=generator).to(device), torch.arange(6, device=device)
    run, window = (torch.tensor(x, device=device) for x in ([0, 6], [[2], [5], [30]]))
    planes = reference.quantize_block(k, 4, 4, True)
    codes, _, scale, zero = reference.quantize_block(v, 8, 0, False)
    keys, values = ops.Keys(None, *planes, 4, 4), ops.Values(None, codes, scale, zero, 8)
    places = block_ids.expand(2, -1)
    calls = {
        "quantize_block": (k, 4, 4, True),
        "dequantize_block": (*planes, 4, 4, True),
        "score_blocks": (q, keys, block_ids, run, 0.125),
        "score_tokens": (q, keys, block_ids, run, 0.125),
        "attend_blocks": (q[0], keys, values, block_ids, 0.125),
        "attend_decode": (q, k, v, *window, keys, values, block_ids, run, 0.125),
        "attend_tokens": (q, keys, values, places, places, run, 0.125),
    }

    def same(name: str) -> bool:
        found, expected = getattr(ops, name)(*calls[name]), getattr(reference, name)(*calls[name])
        pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
        return all(torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-4) for x, y in pairs)

    differing = ", ".join(name for name in calls if not same(name))
    if not differing:
        return f"agrees with plain torch ({len(calls)} ops)"
    remedy = f"{REBUILD}; PIKV_OPS=reference does without the ops"
    problems.append(Problem(f"on {device.type} these do not compute what plain torch does: {differing}", remedy, True))
    return f"differs: {differing}"


def _cuda(problems: list[Problem]) -> Facts:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if torch.version.cuda and not gpus:
        remedy = "nvidia-smi says whether the driver sees a GPU; without one use torch's CPU build"
        problems.append(Problem("torch is a CUDA build but finds no GPU", remedy, False))
    library = _library("_ops_cuda*.so")
    state = "not built" if library is None else f"{library}, loads"
    if library is None and gpus:
        remedy = f"with a CUDA toolkit (nvcc) {REBUILD}"
        problems.append(Problem("the CUDA ops are not built: plain torch runs on the GPU", remedy, False))
    if library is not None:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            state = f"{library}, does not load"
            problems.append(Problem(f"{library.name} does not load: {error}", REBUILD, True))
    return {
        "GPUs": "; ".join(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GiB" for gpu in gpus)
        or "none",
        "nvcc": _nvcc(),
        "CUDA library": state,
        "self-check": _self_check(torch.device("cuda"), problems) if gpus else "no GPU to run it on",
    }


def _nvcc() -> str:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    path = shutil.which("nvcc") or next(
        (p for home in homes if home and (p := shutil.which("nvcc", path=f"{home}/bin"))), None
    )
    if path is None:
        return "not found"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = next(
        (line.split("release ")[1].split(",")[0] for line in said.splitlines() if "release " in line), "unknown"
    )
    return f"{path}, release {release}"


def _launcher(problems: list[Problem]) -> Facts:
    try:
        detected = str(read_launch(os.environ))
    except LaunchError as error:
        remedy = "unset what another launcher left, or set what is missing; docs/launching.md has the variables"
        problems.append(Problem(str(error), remedy, True))
        detected = "incomplete or contradictory, see the problems"
    return {"detected": detected, **{name: os.environ[name] for name in VARIABLES if name in os.environ}}
