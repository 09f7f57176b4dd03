"""Rank bootstrap: from a bare process or a torchrun rank to initialised process groups and a host's parallel state."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_process_group() -> None:
    """Initialises torch.distributed: gloo on CPU, nccl where CUDA is available. Done already: does nothing.

    A process started without rank variables is a group of one and opens no port. With torchrun's variables it joins its
    group; on CUDA the device is LOCAL_RANK.

    Raises:
        RuntimeError: only some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; the message names the others.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    given = [name for name in RANK_VARIABLES if name in os.environ]
    if not given:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}: set all of them (torchrun does), "
            "or none for a single process"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)


def init_megatron(tensor_parallel: int = 1, expert_parallel: int = 1, seed: int = 1234) -> None:
    """Process groups, Megatron-core's parallel state and its random states, in one call.

    Args:
        tensor_parallel: Ranks that share each layer's heads.
        expert_parallel: Ranks that share the experts.
        seed: For Megatron's model-parallel random states.

    Raises:
        ValueError: the world size is not a multiple of both.
        RuntimeError: the rank variables are incomplete, Megatron was initialised with other sizes, or there is no CUDA
            and `cpu_compat.install()` was not called.
    """
    from pikv_megatron.integrations import cpu_compat

    if not torch.cuda.is_available() and not cpu_compat.is_installed():
        raise RuntimeError(
            "Megatron-core needs CUDA, which is not available here; to run it on CPU, call "
            "pikv_megatron.integrations.cpu_compat.install() before anything imports megatron"
        )
    from pikv_megatron.integrations.megatron_setup import init_parallel_state

    init_process_group()
    init_parallel_state(tensor_parallel, expert_parallel, seed)
