"""Tiers: where a block's bytes are, fastest first. A tier is a BlockPool in some memory; this module sizes and
allocates them (`cache.memory` asks first whether they fit).

Tiers here: device (where attention is computed) and host (pinned where there is a GPU).
"""

from __future__ import annotations

import torch

from pikv_megatron.budgets.budget import allowed_blocks
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.config.io import ConfigError
from pikv_megatron.tiers.blocks import BlockPool, whole_block


def blocks_needed(model: ModelConfig, runtime: RuntimeConfig, blocks: int) -> list[int]:
    """Blocks that each tier must have, so that requests of together `blocks` sealed blocks per layer always fit.

    Without a budget they are all on the device. With one a layer holds what its budget allows each request; demoting,
    the rest is on the host, at most when one request has it all.
    """
    allowed = allowed_blocks(model, runtime)
    if allowed is None:
        return [len(model.full_layers) * blocks, 0][: len(runtime.tiers)]
    allowed = [allowed[layer_id] for layer_id in model.full_layers]
    device = sum(min(blocks, runtime.max_requests * layer) for layer in allowed)
    host = sum(blocks - min(blocks, layer) for layer in allowed)
    return [device, host if runtime.budget.over_budget == "demote" else 0][: len(runtime.tiers)]


def blocks_for(runtime: RuntimeConfig) -> int:
    """Sealed blocks of one layer that max_tokens stands for."""
    return -(-runtime.max_tokens // runtime.block_size)


def tier_blocks(model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor) -> list[int]:
    """Blocks of each configured tier's pool.

    Raises:
        ConfigError: a tier's bytes hold less than one block of every layer that needs some, or there is no such device.
    """
    if runtime.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device: no CUDA device is available here, got {runtime.device!r}")
    least, most = (blocks_needed(model, runtime, blocks) for blocks in (1, blocks_for(runtime)))
    one_block = block_bytes(runtime, compressor)
    counts = []
    for index, tier in enumerate(runtime.tiers):
        num_blocks = max(1, most[index])
        if tier.bytes is not None:
            num_blocks = tier.bytes // one_block
            wanted = max(1, least[index])
            if num_blocks < wanted:
                raise ConfigError(
                    f"runtime.tiers[{index}].bytes: expected at least {wanted * one_block} (a block of {one_block} "
                    f"bytes for each layer that places any there), got {tier.bytes}"
                )
        counts.append(num_blocks)
    return counts


def build_tiers(model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor) -> list[BlockPool]:
    """Allocates one pool per configured tier, shared by all layers and requests. Raises as `tier_blocks`."""
    counts = tier_blocks(model, runtime, compressor)
    return [
        build_pool(tier.kind, count, runtime, compressor) for tier, count in zip(runtime.tiers, counts, strict=True)
    ]


def tier_device(kind: str, runtime: RuntimeConfig) -> torch.device:
    """Whose memory a kind of tier is."""
    return runtime.torch_device if kind == "device" else torch.device("cpu")


def block_bytes(runtime: RuntimeConfig, compressor: Compressor) -> int:
    """Bytes of one block of a pool."""
    fields = whole_block(compressor.fields(), runtime.block_size, runtime.budget.policy != "none")
    return sum(field.nbytes for field in fields.values())


def build_pool(kind: str, num_blocks: int, runtime: RuntimeConfig, compressor: Compressor) -> BlockPool:
    """One tier's memory for `num_blocks` blocks."""
    fields, keeps_importance = compressor.fields(), runtime.budget.policy != "none"
    return BlockPool(kind, num_blocks, runtime.block_size, fields, tier_device(kind, runtime), keeps_importance)


def capacity_tokens(model: ModelConfig, runtime: RuntimeConfig, pools: list[BlockPool]) -> int:
    """Tokens per layer, all requests together, that fit these pools however they are divided among requests."""
    low, high = 0, blocks_for(runtime)  # the most blocks per layer that fit, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        needed = blocks_needed(model, runtime, middle)
        fits = all(n <= pool.num_blocks for n, pool in zip(needed, pools, strict=True))
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(runtime.max_tokens, low * runtime.block_size)


def resident(pool: BlockPool, ids: torch.Tensor, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The fields of blocks `ids` where `device` can read them, and their ids there.

    A pool in memory that the device reads directly is used in place; from any other, the blocks are copied.
    """
    if pool.device.type == device.type:
        return pool.fields, ids
    copied = {name: tensor.index_select(0, ids).to(device, non_blocking=True) for name, tensor in pool.fields.items()}
    return copied, torch.arange(len(ids), device=device)
