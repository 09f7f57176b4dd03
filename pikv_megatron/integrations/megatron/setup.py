"""Megatron-core's parallel state and random states, as `pikv_megatron.launch.init_megatron` sets them up."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


def init_parallel_state(
    tensor_parallel: int = 1, expert_parallel: int = 1, seed: int = 1234, timeout: float = 600.0
) -> None:
    """Initialises Megatron's process groups in an initialised torch.distributed, and seeds its random states.

    With the same sizes it may be called again: then it only seeds. An operation of these groups waits `timeout` seconds
    for a rank that does not answer.

    Raises:
        ValueError: the world size is not a multiple of both sizes.
        RuntimeError: Megatron was initialised with other sizes.
    """
    world_size = dist.get_world_size()
    for name, size in (("tensor_parallel", tensor_parallel), ("expert_parallel", expert_parallel)):
        if size < 1 or world_size % size:
            raise ValueError(f"{name}: expected a divisor of the world size ({world_size}), got {size}")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel,
            expert_model_parallel_size=expert_parallel,
            distributed_timeout_minutes=timeout / 60,
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if sizes != (tensor_parallel, expert_parallel):
        raise RuntimeError(
            f"Megatron is initialised with tensor_parallel {sizes[0]} and expert_parallel {sizes[1]}, "
            f"asked for {tensor_parallel} and {expert_parallel}; parallel_state.destroy_model_parallel() first"
        )
    # The inference tracker keeps no state per device, so it serves CPU and GPU alike (tensor_parallel/random.py:374).
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
