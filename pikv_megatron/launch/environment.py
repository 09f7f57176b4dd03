"""What a launcher's environment variables say about this process: torchrun, `deepspeed`, `mpirun`, `srun`, or none.

Pure reading: nothing is started, asked or changed here. Variables that contradict each other, or are only half there,
are refused by name. Who completes the address where the launcher gives none is `address`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCH = (*RANK_VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "CROSS_RANK", "CROSS_SIZE")
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
SLURM_STEP = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_TASKS_PER_NODE",
)
VARIABLES = (*TORCH, *OPEN_MPI, *MPICH, *SLURM, *SLURM_STEP)
"""Every variable that is read."""

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""From here on step ids are Slurm's own (a batch script, an interactive shell), which no rank runs in."""


class LaunchError(RuntimeError):
    """The launcher's variables are incomplete or contradict each other; the message names them."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started with it.

    Attributes:
        launcher: "none", "torchrun", "deepspeed", "mpirun", "srun", or "environment" where RANK and its kin are set but
            nothing says by whom.
        rank, world_size: among all ranks.
        local_rank, local_size: among the ranks of this node.
        node_rank: of this node. Under mpirun, which does not say it, ranks are taken to fill one node after another
            until MPI has been asked.
        master_addr, master_port: where rank 0 listens; None where it has still to be found (srun, mpirun), or where
            there is a single process.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None

    def __str__(self) -> str:
        if self.launcher == "none":
            return "none: a single process"
        address = f"{self.master_addr or 'address to be found'}:{self.master_port or 'port to be found'}"
        return (
            f"{self.launcher}: rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
            f"{self.local_size}, node {self.node_rank}, {address}"
        )


def read_launch(env: Mapping[str, str]) -> Launch:
    """The launch that `env` describes.

    RANK and its kin come first, then MPI's variables, then those of a Slurm step. What more than one of them says must
    agree, but for one case: a Slurm step with one task per node whose tasks are launchers themselves (torchrun,
    `deepspeed`, mpirun). A process in a Slurm allocation that srun did not start is a single process.

    Raises:
        LaunchError: variables are missing, are not the numbers that they should be, or contradict each other.
    """
    mpi, slurm = _mpi(env), _slurm(env)
    torch = _torch(env, mpi or slurm)
    found = [launch for launch in (torch, mpi, slurm) if launch is not None]
    if not found:
        return Launch("none")
    if torch is not None and mpi is not None:
        _check_agree(env, torch, mpi)
    by_launcher = mpi is not None or (torch is not None and torch.launcher != "environment")
    nodes = slurm and _number(env, "SLURM_STEP_NUM_NODES")
    if slurm is not None and not (by_launcher and nodes == slurm.world_size):
        _check_agree(env, found[0], slurm)
    for one in reversed(found):  # RANK and its kin last: they may have their local rank of another
        _check_fits(env, one)
    launch = found[0]
    if launch.launcher == "environment" and len(found) > 1:
        launch = replace(launch, launcher=found[1].launcher)
    return launch


def _torch(env: Mapping[str, str], other: Launch | None) -> Launch | None:
    """RANK and its kin. Where they lack the local rank and size, those of `other` are taken."""
    given = [name for name in RANK_VARIABLES if name in env]
    if not given or (other is not None and "RANK" not in env and "WORLD_SIZE" not in env):
        return None  # an address alone belongs to the other launcher
    _check_complete(env, RANK_VARIABLES, "set all of them, as torchrun does, or none for a single process")
    launcher = "torchrun" if "GROUP_RANK" in env else "deepspeed" if "CROSS_SIZE" in env else "environment"
    rank = _number(env, "RANK")
    local = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env]
    if len(local) == 2 and env[local[0]] != env[local[1]]:
        raise LaunchError(f"LOCAL_WORLD_SIZE is {env[local[0]]} but LOCAL_SIZE is {env[local[1]]}")
    local_size_name = local[0] if local else "LOCAL_SIZE" if launcher == "deepspeed" else "LOCAL_WORLD_SIZE"
    if other is None and ("LOCAL_RANK" in env or local):
        _check_complete(env, ("LOCAL_RANK", local_size_name), "set both, or neither for one rank per node")
    local_rank = _number(env, "LOCAL_RANK", other.local_rank if other else 0)
    local_size = _number(env, local_size_name, other.local_size if other else 1)
    node = "GROUP_RANK" if launcher == "torchrun" else "CROSS_RANK"
    filled = other.node_rank if other and launcher == "environment" else rank // max(local_size, 1)
    return Launch(
        launcher, rank, _number(env, "WORLD_SIZE", least=1), local_rank, local_size, _number(env, node, filled),
        *_address(env),
    )  # fmt: skip


def _mpi(env: Mapping[str, str]) -> Launch | None:
    """Open MPI's variables, else MPICH's (which srun sets in part, for programs that are MPI's)."""
    names = OPEN_MPI if OPEN_MPI[0] in env else MPICH
    if names[0] not in env or (names is MPICH and "SLURM_STEP_ID" in env and "MPI_LOCALRANKID" not in env):
        return None
    _check_complete(env, names, "mpirun sets all of them")
    rank, size, local_rank, local_size = (_number(env, name) for name in names)
    return Launch("mpirun", rank, size, local_rank, local_size, rank // max(local_size, 1), *_address(env))


def _slurm(env: Mapping[str, str]) -> Launch | None:
    """The variables of a task that srun has started."""
    step = env.get("SLURM_STEP_ID")
    if step is None or "SLURM_PROCID" not in env or _number(env, "SLURM_STEP_ID") >= FIRST_SPECIAL_STEP:
        return None
    _check_complete(env, (*SLURM, *SLURM_STEP), "srun sets all of them")
    _number(env, "SLURM_JOB_ID")
    rank, size, local_rank, node = (_number(env, name) for name in SLURM)
    per_node = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(per_node) or sum(per_node) != size:
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE is {env['SLURM_STEP_TASKS_PER_NODE']}, which does not fit SLURM_NTASKS {size} "
            f"and SLURM_NODEID {node}"
        )
    return Launch("srun", rank, size, local_rank, per_node[node], node, *_address(env))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed list of numbers: "2(x3),1" is [2, 2, 2, 1].

    Raises:
        LaunchError: `text` is of another form.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE: expected a list like 2(x3),1, got {text!r}")
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def _address(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    port = _number(env, "MASTER_PORT", least=1) if "MASTER_PORT" in env else None
    if port is not None and port > 65535:
        raise LaunchError(f"MASTER_PORT: expected a port up to 65535, got {port}")
    address = env.get("MASTER_ADDR")
    if address == "":
        raise LaunchError("MASTER_ADDR: expected the name or address of rank 0's machine, got ''")
    return address, port


def _names(env: Mapping[str, str], launch: Launch) -> tuple[str, str, str, str]:
    """What a launch's rank, world size, local rank and local size are called."""
    if launch.launcher == "mpirun":
        return OPEN_MPI if OPEN_MPI[0] in env else MPICH
    if launch.launcher == "srun":
        return *SLURM[:3], "its node's part of SLURM_STEP_TASKS_PER_NODE"
    return "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"


def _check_fits(env: Mapping[str, str], launch: Launch) -> None:
    rank, size, local_rank, local_size = _names(env, launch)
    for name, value, below, limit in (
        (rank, launch.rank, size, launch.world_size),
        (local_rank, launch.local_rank, local_size, launch.local_size),
    ):
        if value >= limit:
            raise LaunchError(f"{name} is {value}: expected less than {below}, {limit}")
    if launch.local_size > launch.world_size:
        raise LaunchError(f"{local_size} is {launch.local_size}: expected at most {size}, {launch.world_size}")


def _check_agree(env: Mapping[str, str], one: Launch, other: Launch) -> None:
    names, other_names = _names(env, one), _names(env, other)
    for i, field in enumerate(("rank", "world_size")):
        mine, theirs = getattr(one, field), getattr(other, field)
        if mine != theirs:
            raise LaunchError(
                f"{names[i]} is {mine} ({one.launcher}) but {other_names[i]} is {theirs} ({other.launcher}): two "
                "launchers contradict each other; unset the variables of the one that did not start this process"
            )


def _check_complete(env: Mapping[str, str], names: Sequence[str], expected: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        given = ", ".join(f"{name}={env[name]}" for name in names if name in env)
        raise LaunchError(f"the environment sets {given} but not {', '.join(missing)}: {expected}")


def _number(env: Mapping[str, str], name: str, default: int = 0, *, least: int = 0) -> int:
    """The number that a variable says; `default` where it is not set."""
    text = env.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise LaunchError(f"{name}: expected a whole number of at least {least}, got {text!r}")
    return int(text)
