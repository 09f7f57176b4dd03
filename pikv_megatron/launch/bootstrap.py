"""Rank bootstrap: from a bare process or a rank of torchrun, `deepspeed`, `mpirun` or `srun` to initialised process
groups.

`environment` reads the variables, `address` finds where rank 0 listens, `rendezvous` is where the ranks meet, `peers`
says which of them is lost, `binding` on which CPUs a rank runs. docs/launching.md has the variables and the rules.
"""

from __future__ import annotations

import atexit
import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pikv_megatron.launch import address as launch_address
from pikv_megatron.launch import binding, peers, rendezvous
from pikv_megatron.launch.environment import Launch, LaunchError, read_launch
from pikv_megatron.launch.peers import PeerLostError

__all__ = ["Launch", "LaunchError", "init_process_group", "read_launch"]

DEFAULT_TIMEOUT, LONGEST_TIMEOUT = 600.0, 1e6
START_SECONDS = 120.0
"""How long a rank may take to come at least: processes that start together do not import alike fast."""


def init_process_group(timeout: float | None = None) -> Launch:
    """Initialises torch.distributed: gloo on CPU, nccl where CUDA is available. Done already: only reads the launch.

    A process that no launcher started is a group of one and opens no port. A rank joins its group, on CUDA with the
    device LOCAL_RANK, and is bound to its CPUs (PIKV_BIND=off: not). RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are set in the environment, for hosts that read them there, and
    GLOO_SOCKET_IFNAME where it is not set. From here on the ranks watch each other, and end when their launcher does.

    Args:
        timeout: Seconds that an operation waits for a rank that does not answer, in this group and in those that are
            made later without one of their own. None: PIKV_TIMEOUT, else 600.

    Raises:
        LaunchError: the launcher's variables are incomplete or contradict each other, the address of rank 0 cannot be
            found or used, or there are fewer CUDA devices than local ranks; the message names them.
        PeerLostError: a rank has not come.
        ValueError: `timeout` is not above 0.
    """
    launch = read_launch(os.environ)
    if dist.is_initialized():
        return launch
    seconds = timeout_seconds(timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.launcher == "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return launch
    binding.wanted()  # refuses what it does not know before the others are waited for
    launch = launch_address.complete(launch)
    _export(launch)
    if torch.cuda.is_available():
        torch.cuda.set_device(_device(launch))
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := launch_address.interface(launch)):
        os.environ["GLOO_SOCKET_IFNAME"] = name  # gloo would look the machine's name up, which may not resolve
    store = rendezvous.join(launch, max(seconds, START_SECONDS))
    atexit.register(_leave)  # runs behind the watch's farewell
    rendezvous.watch(launch, store, seconds)
    limit = timedelta(seconds=seconds)
    # What later groups take that are given no timeout, as DeepSpeed's are: a group does not inherit it.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    try:
        with peers.answering("init_process_group"):
            dist.init_process_group(backend, timeout=limit, store=store, rank=launch.rank, world_size=launch.world_size)
            binding.bind(launch)
    except (LaunchError, PeerLostError):
        raise
    except RuntimeError as error:
        if backend != "gloo":
            raise
        raise LaunchError(
            f"rank {launch.rank} of {launch.world_size} does not reach the others at the interface "
            f"{os.environ.get('GLOO_SOCKET_IFNAME')!r}; set GLOO_SOCKET_IFNAME to the one that leads to MASTER_ADDR "
            f"{launch.master_addr}: {error}"
        ) from error
    return launch


def _leave() -> None:
    """A process that ends while gloo's threads are at work may be aborted (SIGABRT)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def timeout_seconds(timeout: float | None = None) -> float:
    """How long an operation waits: `timeout`, else PIKV_TIMEOUT, else 600 s.

    Raises:
        LaunchError: PIKV_TIMEOUT is not a number of seconds above 0.
        ValueError: `timeout` is not.
    """
    text = os.environ.get("PIKV_TIMEOUT")
    if timeout is not None or text is None:
        seconds = DEFAULT_TIMEOUT if timeout is None else timeout
        if not 0 < seconds <= LONGEST_TIMEOUT:
            raise ValueError(f"timeout: expected seconds above 0 and up to {LONGEST_TIMEOUT:.0f}, got {seconds}")
        return float(seconds)
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and 0 < float(text) <= LONGEST_TIMEOUT:
        return float(text)
    raise LaunchError(f"PIKV_TIMEOUT: expected seconds above 0 and up to {LONGEST_TIMEOUT:.0f}, got {text!r}")


def _device(launch: Launch) -> int:
    devices = torch.cuda.device_count()
    if launch.local_rank >= devices:
        raise LaunchError(
            f"LOCAL_RANK is {launch.local_rank}: expected less than the CUDA devices that this process sees, {devices} "
            f"(CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )
    return launch.local_rank


def _export(launch: Launch) -> None:
    """What torch and DeepSpeed read. LOCAL_SIZE is DeepSpeed's name: its all-reduce through shared memory needs it."""
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_size),
        "LOCAL_SIZE": str(launch.local_size),
        "MASTER_ADDR": str(launch.master_addr),
        "MASTER_PORT": str(launch.master_port),
    }
