"""What this machine leaves to this process: its control groups (a container's limits), and the memory that is free.

Linux and CUDA; of other systems nothing is known, and nothing is limited.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def control_groups(controller: str) -> list[Path]:
    """Folders of the control groups that limit this process by `controller` (cpu, memory): its own and those above."""
    found = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = CGROUPS / controller if controllers else CGROUPS  # the first and the second version of cgroups
            # A container that sees its group as the root has no folder of this path, so the root counts alone.
            found += [root / folder.relative_to("/") for folder in (Path(path), *Path(path).parents)]
    return found


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take on `device`; infinite where that is not known.

    On CPU: what the kernel calls available, or what a control group leaves, whichever is less. On CUDA: what the driver
    has, and what torch has reserved and does not use.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return math.inf
    return min([_available(), *(_left(group) for group in control_groups("memory"))])


def _available() -> float:
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else ():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024  # the file says kB and means KiB
    return math.inf


def _left(group: Path) -> float:
    """Bytes up to a control group's limit. Files that the kernel caches for it count as free: they make room."""
    for most, used, cached in (
        ("memory.max", "memory.current", ("active_file", "inactive_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        try:
            limit, usage, statistics = ((group / name).read_text() for name in (most, used, "memory.stat"))
        except OSError:
            continue
        if limit.strip() == "max":
            return math.inf
        counts = dict(line.split() for line in statistics.splitlines())
        return int(limit) - int(usage) + sum(int(counts.get(name, 0)) for name in cached)
    return math.inf
