"""Rank bootstrap: from a bare process or a rank of torchrun, `deepspeed`, `mpirun` or `srun` to initialised process
groups.

`environment` reads the variables, `address` finds where rank 0 listens, `binding` says on which CPUs
a rank runs. docs/launching.md has the variables and the rules.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist

from pikv_megatron.launch import address as launch_address
from pikv_megatron.launch import binding
from pikv_megatron.launch.environment import Launch, LaunchError, read_launch

__all__ = ["Launch", "LaunchError", "init_process_group", "read_launch"]


def init_process_group() -> Launch:
    """Initialises torch.distributed: gloo on CPU, nccl where CUDA is available. Done already: only reads the launch.

    A process that no launcher started is a group of one and opens no port. A rank joins its group, on CUDA with the
    device LOCAL_RANK, and is bound to its CPUs (PIKV_BIND=off: not). RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are set in the environment, for hosts that read them there.

    Raises:
        LaunchError: the launcher's variables are incomplete or contradict each other, the address of rank 0 cannot be
            found or used, or there are fewer CUDA devices than local ranks; the message names them.
    """
    launch = read_launch(os.environ)
    if dist.is_initialized():
        return launch
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.launcher == "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return launch
    binding.wanted()  # refuses what it does not know before the others are waited for
    launch = launch_address.complete(launch)
    _export(launch)
    if torch.cuda.is_available():
        torch.cuda.set_device(_device(launch))
    elif launch_address.is_local(launch) and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # gloo would look the machine's name up, which may not resolve
    try:
        dist.init_process_group(backend)
    except dist.DistNetworkError as error:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world_size}: MASTER_ADDR {launch.master_addr} and MASTER_PORT "
            f"{launch.master_port} cannot be used, expected an address of rank 0's node and a port that is free there: "
            f"{error}"
        ) from error
    binding.bind(launch)
    return launch


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
