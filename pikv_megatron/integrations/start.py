"""Starting a host's ranks: process groups and the host's parallel state in one call. Importing it imports no host."""

from __future__ import annotations

import torch

from pikv_megatron.integrations import cpu_compat
from pikv_megatron.launch import Launch, init_process_group
from pikv_megatron.launch.bootstrap import timeout_seconds
from pikv_megatron.launch.peers import answering


def init_megatron(
    tensor_parallel: int = 1, expert_parallel: int = 1, seed: int = 1234, timeout: float | None = None
) -> Launch:
    """Process groups, Megatron-core's parallel state and its random states, in one call.

    Args:
        tensor_parallel: Ranks that share each layer's heads.
        expert_parallel: Ranks that share the experts.
        seed: For Megatron's model-parallel random states.
        timeout: As of `init_process_group`; of Megatron's groups as well.

    Raises:
        ValueError: the world size is not a multiple of both; `timeout` is not above 0.
        RuntimeError: see `init_process_group`; or Megatron was initialised with other sizes, or there is no CUDA
            and `cpu_compat.install()` was not called.
    """
    if not torch.cuda.is_available() and not cpu_compat.is_installed():
        raise RuntimeError(
            "Megatron-core needs CUDA, which is not available here; to run it on CPU, call "
            "pikv_megatron.integrations.cpu_compat.install() before anything imports megatron"
        )
    from pikv_megatron.integrations.megatron.setup import init_parallel_state

    launch = init_process_group(timeout)
    with answering("init_megatron"):
        init_parallel_state(tensor_parallel, expert_parallel, seed, timeout_seconds(timeout))
    return launch
