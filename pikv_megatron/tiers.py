"""Tiers: where a block's bytes are, fastest first. A tier is a BlockPool in some memory; this module sizes and
allocates them.

Tiers here: device (where attention is computed) and host (pinned where there is a GPU).
"""

from __future__ import annotations

import torch

from pikv_megatron.blocks import BlockPool
from pikv_megatron.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.config_io import ConfigError


def build_tiers(model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor) -> list[BlockPool]:
    """Allocates one pool per configured tier, shared by all layers and requests.

    Raises:
        ConfigError: a tier's bytes hold no block, or there is no such device.
    """
    if runtime.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device: no CUDA device is available here, got {runtime.device!r}")
    fields = compressor.fields()
    keep_importance = runtime.budget.policy != "none"
    pools = []
    for index, tier in enumerate(runtime.tiers):
        device = runtime.torch_device if tier.kind == "device" else torch.device("cpu")
        if tier.bytes is None:
            num_blocks = model.num_layers * -(-runtime.max_tokens // runtime.block_size)
        else:
            one_block = BlockPool(tier.kind, 1, runtime.block_size, fields, device, keep_importance).block_bytes
            num_blocks = tier.bytes // one_block
            if not num_blocks:
                raise ConfigError(
                    f"runtime.tiers[{index}].bytes: expected at least one block's {one_block} bytes, got {tier.bytes}"
                )
        pools.append(BlockPool(tier.kind, num_blocks, runtime.block_size, fields, device, keep_importance))
    return pools


def resident(pool: BlockPool, ids: torch.Tensor, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The fields of blocks `ids` where `device` can read them, and their ids there.

    A pool in memory that the device reads directly is used in place; from any other, the blocks are copied.
    """
    if pool.device.type == device.type:
        return pool.fields, ids
    copied = {name: tensor.index_select(0, ids).to(device, non_blocking=True) for name, tensor in pool.fields.items()}
    return copied, torch.arange(len(ids), device=device)
