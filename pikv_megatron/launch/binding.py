"""Which CPUs a rank runs on: those that its launcher bound it to, else its share of those that its node's ranks have.

Linux only, like everything that launches ranks here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_megatron.launch.environment import Launch, LaunchError
from pikv_megatron.machine import control_groups

logger = logging.getLogger(__name__)

TOPOLOGY = Path("/sys/devices/system/cpu")


def bind(launch: Launch) -> tuple[int, ...]:
    """Binds this rank and sets torch's threads; all ranks must call it behind init_process_group. Returns its CPUs.

    Ranks of a node that all may use the same CPUs were bound by nobody: they share them out. Where their sets differ
    the launcher has bound them, and they stay. torch uses as many threads as there are CPUs, or its share of the time
    that a container may use of them, or OMP_NUM_THREADS, whichever is least. PIKV_BIND=off on one rank leaves CPUs and
    threads as they are on all.

    Raises:
        LaunchError: PIKV_BIND is neither auto nor off.
    """
    allowed = os.sched_getaffinity(0)
    wants = wanted()
    if launch.world_size == 1:
        return tuple(sorted(allowed))
    everyone: list[tuple[bool, int, frozenset[int]]] = [(False, 0, frozenset())] * launch.world_size
    dist.all_gather_object(everyone, (wants, launch.node_rank, frozenset(allowed)))
    if not all(wants for wants, _, _ in everyone):
        return tuple(sorted(allowed))
    neighbours = [cpus for _, node, cpus in everyone if node == launch.node_rank]
    cpus = choose(launch.local_rank, neighbours, allowed)
    if set(cpus) != allowed:
        for thread in os.listdir("/proc/self/task"):  # those that exist already do not follow the main one
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)
    threads = len(cpus) if len(neighbours) <= len(allowed) else 1
    threads = int(max(min(threads, time_limit() / len(neighbours)), 1))
    limit = re.match(r"[1-9][0-9]*", os.environ.get("OMP_NUM_THREADS", ""))  # OpenMP's may be a list: the first counts
    torch.set_num_threads(min(threads, int(limit[0])) if limit else threads)
    logger.info("rank %d runs on CPUs %s with %d threads", launch.rank, cpus, torch.get_num_threads())
    return cpus


def wanted() -> bool:
    """PIKV_BIND: auto (also where it is not set) or off. Raises LaunchError for anything else."""
    choice = os.environ.get("PIKV_BIND", "auto")
    if choice not in ("auto", "off"):
        raise LaunchError(f"PIKV_BIND: expected auto or off, got {choice!r}")
    return choice == "auto"


def time_limit() -> float:
    """How many CPUs' time control groups leave this process (a container's --cpus); infinite where none limits it."""
    return min([math.inf, *(_time_limit(group) for group in control_groups("cpu"))])


def _time_limit(group: Path) -> float:
    try:
        text = [(group / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    except OSError:
        try:
            text = (group / "cpu.max").read_text().split()
        except OSError:
            return math.inf
    quota, period = text
    return int(quota) / int(period) if quota.strip() not in ("-1", "max") else math.inf


def choose(local_rank: int, neighbours: Sequence[Collection[int]], allowed: Collection[int]) -> tuple[int, ...]:
    """The CPUs of one rank.

    Args:
        local_rank: among `neighbours`.
        neighbours: for every rank of the node the CPUs that it may use.
        allowed: those of this one.

    Returns:
        All of `allowed` where the ranks' sets differ, or where there are fewer CPUs than ranks; else an equal share,
        cores whole as far as that goes.
    """
    ranks = len(neighbours)
    if any(set(cpus) != set(allowed) for cpus in neighbours) or ranks > len(allowed) or local_rank >= ranks:
        return tuple(sorted(allowed))
    ordered = by_core(allowed)
    first, last = (len(ordered) * i // ranks for i in (local_rank, local_rank + 1))
    return tuple(sorted(ordered[first:last]))


def by_core(cpus: Iterable[int]) -> list[int]:
    """CPUs in the order of their packages and cores, so that the hardware threads of a core stand together."""
    return sorted(cpus, key=lambda cpu: (_id(cpu, "physical_package_id"), _id(cpu, "core_id"), cpu))


def _id(cpu: int, name: str) -> int:
    try:
        return int((TOPOLOGY / f"cpu{cpu}" / "topology" / name).read_text())
    except (OSError, ValueError):
        return 0
