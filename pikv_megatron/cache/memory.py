"""Whether there is memory for a cache: the bytes that it will take on each device, compared with what is free there.

Asked before any of it is taken: a process that touches more than there is gets killed, and says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from pikv_megatron.cache.window import window_fields
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.config.io import ConfigError
from pikv_megatron.machine import free_memory
from pikv_megatron.tiers.blocks import BOOKKEEPING_BYTES
from pikv_megatron.tiers.tiers import block_bytes, blocks_for, tier_blocks, tier_device

HOST = torch.device("cpu")


class Share(NamedTuple):
    """Memory that a cache takes on a device, and the key of the config that it is due to, with the key's value."""

    device: torch.device
    nbytes: int
    key: str
    value: int


def check_memory(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Checks that a cache's pools and windows fit what is free.

    Raises:
        ConfigError: they do not; it names the key that most of the bytes are due to. Also as `tier_blocks`.
    """
    _check(cache_memory(model, runtime))


def check_shard_memory(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Checks that the pool of an ExpertKVCache of its own fits what is free; raises ConfigError."""
    _check(_pool("runtime.max_tokens", runtime.max_tokens, "device", blocks_for(runtime), model, runtime))


def cache_memory(model: ModelConfig, runtime: RuntimeConfig) -> list[Share]:
    """What a PiKVCache of these configs takes when it is made."""
    shares = []
    counts = tier_blocks(model, runtime, Compressor(model, runtime))
    for index, (tier, blocks) in enumerate(zip(runtime.tiers, counts, strict=True)):
        if tier.bytes is None:
            key, value = "runtime.max_tokens", runtime.max_tokens
        else:
            key, value = f"runtime.tiers[{index}].bytes", tier.bytes
        shares += _pool(key, value, tier.kind, blocks, model, runtime)
    slot = sum(f.nbytes for i in range(model.num_layers) for f in window_fields(model, runtime, i).values())
    factors = {f"runtime.{name}": getattr(runtime, name) for name in ("max_requests", "window", "sinks", "block_size")}
    factors["model.sliding_windows"] = max(model.sliding_window(i) or 0 for i in range(model.num_layers))
    largest = max(factors, key=lambda key: factors[key])
    return [*shares, Share(runtime.torch_device, runtime.max_requests * slot, largest, factors[largest])]


def _pool(key: str, value: int, kind: str, blocks: int, model: ModelConfig, runtime: RuntimeConfig) -> list[Share]:
    return [
        Share(tier_device(kind, runtime), blocks * block_bytes(runtime, Compressor(model, runtime)), key, value),
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
