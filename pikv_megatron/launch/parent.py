"""Whether the launcher of this rank still lives. One that is killed cannot end its ranks, and they would stay.

Linux only, like everything that launches ranks here.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
PROGRAMS = {
    *("torchrun", "deepspeed", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orterun", "orted", "prterun"),
    *("prted", "prte", "slurmstepd:"),
}
MODULES = {
    *("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
}


class Parent:
    """The process that started this one, and above it those that are a launcher's too: `deepspeed` starts ranks by way
    of a second process. Where a launcher was started from, a shell say, is not watched.
    """

    def __init__(self) -> None:
        self._chain = [os.getppid()]
        while (above := _parent(self._chain[-1])) > 1 and is_launcher(_command(above)):
            self._chain.append(above)
        self._name = " ".join(_command(self._chain[-1])[:4])

    def gone(self) -> str | None:
        """How the launcher ended, or None while it lives."""
        alive = os.getppid() == self._chain[0] and all(
            _parent(child) == parent for child, parent in zip(self._chain, self._chain[1:], strict=False)
        )
        return None if alive else f"its launcher (process {self._chain[-1]}, {self._name}) has ended"


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is that of a program that starts ranks, by itself or by an interpreter."""
    return any(os.path.basename(word) in PROGRAMS or word in MODULES for word in command[:4])


def _parent(process: int) -> int:
    """Of a process; 0 where it is gone."""
    try:
        return int((PROC / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(process: int) -> list[str]:
    try:
        words = (PROC / str(process) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [word for word in words if word]
