"""How much memory a cache takes: blocks per tier, the tokens that fit them, and whether all of it is free.

That is asked before any of it is taken: a process that touches more than there is gets killed, and says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from pikv_megatron.budgets.budget import allowed_blocks
from pikv_megatron.cache.window import window_fields
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ConfigError, ModelConfig, RuntimeConfig
from pikv_megatron.config.sections import TierConfig
from pikv_megatron.machine import free_memory
from pikv_megatron.tiers import TIERS, Tier
from pikv_megatron.tiers.blocks import BOOKKEEPING_BYTES, ROW_BOOKKEEPING_BYTES, importance_row, whole_block

HOST = torch.device("cpu")


def blocks_needed(model: ModelConfig, runtime: RuntimeConfig, blocks: int) -> tuple[int, int]:
    """Blocks that the device must have, and the tiers below it together, so that requests of together `blocks` sealed
    blocks per layer always fit.

    Without a budget they are all on the device. With one a layer holds what its budget allows each request; demoting,
    the rest is below, at most when one request has it all.
    """
    allowed = allowed_blocks(model, runtime)
    if allowed is None:
        return len(model.full_layers) * blocks, 0
    allowed = [allowed[layer_id] for layer_id in model.full_layers]
    device = sum(min(blocks, runtime.max_requests * layer) for layer in allowed)
    below = sum(blocks - min(blocks, layer) for layer in allowed)
    return device, below if runtime.budget.over_budget == "demote" else 0


def blocks_for(runtime: RuntimeConfig) -> int:
    """Sealed blocks of one layer that max_tokens stands for."""
    return -(-runtime.max_tokens // runtime.block_size)


def tier_blocks(model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor) -> list[int]:
    """Blocks of each configured tier's pool. A tier below the device without `bytes` has room for all that the tiers
    above it in the list may not hold.

    Raises:
        ConfigError: a tier's bytes hold less than one block of every layer that needs some, or there is no such device.
    """
    if runtime.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device: no CUDA device is available here, got {runtime.device!r}")
    least, most = (blocks_needed(model, runtime, blocks) for blocks in (1, blocks_for(runtime)))
    one_block = block_bytes(compressor)
    counts: list[int] = []
    below = most[1]
    for index, section in enumerate(runtime.tiers):
        num_blocks, wanted = (most[0], least[0]) if index == 0 else (below, least[1])
        if section.bytes is not None:
            num_blocks, wanted = section.bytes // one_block, max(1, wanted)
            if num_blocks < wanted:
                raise ConfigError(
                    f"runtime.tiers[{index}].bytes: expected at least {wanted * one_block} (a block of {one_block} "
                    f"bytes for each layer that places any there), got {section.bytes}"
                )
        counts.append(max(1, num_blocks))
        below -= min(below, num_blocks) if index else 0
    return counts


def block_bytes(compressor: Compressor) -> int:
    """Bytes of one block of a pool."""
    return sum(field.nbytes for field in whole_block(compressor.fields()).values())


def build_tiers(model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor) -> list[Tier]:
    """Allocates one pool per configured tier, shared by all layers and requests. Raises as `tier_blocks`."""
    counts = tier_blocks(model, runtime, compressor)
    return [
        build_tier(section, count, runtime, compressor) for section, count in zip(runtime.tiers, counts, strict=True)
    ]


def build_tier(section: TierConfig, num_blocks: int, runtime: RuntimeConfig, compressor: Compressor) -> Tier:
    """One tier's memory for `num_blocks` blocks."""
    make = TIERS.pick(section.kind, "runtime.tiers.kind")
    fields, device = compressor.fields(), runtime.torch_device
    return make(section, num_blocks, runtime.block_size, fields, compressor.format, device)


def capacity_tokens(model: ModelConfig, runtime: RuntimeConfig, pools: list[Tier]) -> int:
    """Tokens per layer, all requests together, that fit these pools however they are divided among requests."""
    low, high = 0, blocks_for(runtime)  # the most blocks per layer that fit, by bisection
    room = pools[0].num_blocks, sum(pool.num_blocks for pool in pools[1:])
    while low < high:
        middle = (low + high + 1) // 2
        needed = blocks_needed(model, runtime, middle)
        fits = needed[0] <= room[0] and needed[1] <= room[1]
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(runtime.max_tokens, low * runtime.block_size)


# ---- whether it is free


class Share(NamedTuple):
    """Memory that a cache takes on a device, and the key of the config that it is due to, with the key's value."""

    device: torch.device
    nbytes: int
    key: str
    value: int


def check_memory(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Checks that a cache's pools, rows of importance and windows fit what is free.

    Raises:
        ConfigError: they do not; it names the key that most of the bytes are due to. Also as `tier_blocks`.
    """
    _check(cache_memory(model, runtime))


def check_shard_memory(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Checks that the pool of an ExpertKVCache of its own fits what is free; raises ConfigError."""
    kind, compressor = runtime.tiers[0].kind, Compressor(model, runtime)
    _check(_pool("runtime.max_tokens", runtime.max_tokens, kind, blocks_for(runtime), runtime, compressor))


def cache_memory(model: ModelConfig, runtime: RuntimeConfig) -> list[Share]:
    """What a PiKVCache of these configs takes when it is made."""
    shares, compressor = [], Compressor(model, runtime)
    row = importance_row(runtime.block_size).nbytes
    for index, (tier, blocks) in enumerate(zip(runtime.tiers, tier_blocks(model, runtime, compressor), strict=True)):
        if tier.bytes is None:
            key, value = "runtime.max_tokens", runtime.max_tokens
        else:
            key, value = f"runtime.tiers[{index}].bytes", tier.bytes
        shares += _pool(key, value, tier.kind, blocks, runtime, compressor)
        if runtime.budget.policy != "none":  # a row of importance for each block, on the device wherever the block is
            shares.append(Share(runtime.torch_device, blocks * row, key, value))
            shares.append(Share(HOST, blocks * ROW_BOOKKEEPING_BYTES, key, value))
    windows = [model.sliding_window(layer_id) for layer_id in range(model.num_layers)]
    slot = sum(field.nbytes for window in windows for field in window_fields(model, runtime, window).values())
    factors = {f"runtime.{name}": getattr(runtime, name) for name in ("max_requests", "window", "sinks", "block_size")}
    factors["model.sliding_windows"] = max(window or 0 for window in windows)
    largest = max(factors, key=lambda key: factors[key])
    return [*shares, Share(runtime.torch_device, runtime.max_requests * slot, largest, factors[largest])]


def _pool(key: str, value: int, kind: str, blocks: int, runtime: RuntimeConfig, compressor: Compressor) -> list[Share]:
    device, _ = TIERS.pick(kind, "runtime.tiers.kind").memory(runtime.torch_device)
    return [
        Share(device, blocks * block_bytes(compressor), key, value),
        Share(HOST, blocks * BOOKKEEPING_BYTES, key, value),
    ]


def _check(shares: Iterable[Share]) -> None:
    by_device: dict[torch.device, Counter[tuple[str, int]]] = {}
    for share in shares:
        by_device.setdefault(share.device, Counter())[share.key, share.value] += share.nbytes
    for device, due in by_device.items():
        wanted, free = due.total(), free_memory(device)
        if wanted > free:
            ((key, value), nbytes) = due.most_common(1)[0]
            raise ConfigError(
                f"{key}: {value} asks for {nbytes:,} bytes on {device}, {wanted:,} with the rest of the cache; "
                f"expected at most the {free:,} that are free"
            )
