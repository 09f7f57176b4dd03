"""Metrics of a cache, gathered in one place under plain names: bytes from storage, counts from tables, reads from
device counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pikv_megatron.cache.sealing import LayerState, Sealer
from pikv_megatron.cache.window import WindowBuffer
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.reading.selection import Reading
from pikv_megatron.sharding.placement import Placement
from pikv_megatron.tiers.blocks import BlockPool


class ReadMeter:
    """Counters of selective reads, kept on the device per layer: nothing is copied to the host until they are asked
    for.
    """

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig) -> None:
        shape, device = (model.num_layers, 3), runtime.torch_device
        self._sum = torch.zeros(
            shape, dtype=torch.float64, device=device
        )  # estimate, certificate, share of sealed tokens read
        self._max = torch.zeros(shape, dtype=torch.float64, device=device)
        self._calls = [0] * model.num_layers

    def add(self, layer_id: int, reading: Reading, sealed_tokens: int) -> None:
        """Adds one decode token's read: means over its heads to the sums, the worst head to the maxima."""
        share = reading.tokens_read / sealed_tokens
        figures = (reading.estimate, reading.certificate, share)
        self._sum[layer_id] += torch.stack([x.mean(dtype=torch.float64) for x in figures])
        worst = torch.stack([x.amax().double() for x in figures])
        torch.maximum(self._max[layer_id], worst, out=self._max[layer_id])
        self._calls[layer_id] += 1

    def read(self) -> dict[str, Any]:
        """Means and maxima over all layers; None where no selective read has happened."""
        calls = sum(self._calls)
        names = ("missed_estimate", "missed_certificate", "share_read")
        means = (self._sum.sum(0) / calls).tolist() if calls else [None] * 3
        maxima = self._max.amax(0).tolist() if calls else [None] * 3
        report: dict[str, Any] = {"selective_reads": calls}
        for name, mean, worst in zip(names, means, maxima, strict=True):
            report[f"{name}_mean"], report[f"{name}_max"] = mean, worst
        return report


def cache_stats(
    tiers: Sequence[BlockPool],
    windows: Sequence[WindowBuffer],
    routing: Sequence[torch.Tensor],
    requests: int,
    states: Sequence[LayerState],
    placement: Placement,
    sealer: Sealer,
    meter: ReadMeter,
) -> dict[str, Any]:
    """The dictionary that PiKVCache.stats returns.

    bytes_held: what live requests occupy (used blocks, their window slots, waiting prompt chunks, the routing kept
    for dense layers); bytes_allocated: the pools' whole memory. Both are sums over storages.
    """
    report: dict[str, Any] = {"requests": requests, "tiers": {}}
    for tier, pool in enumerate(tiers):
        held = {block_id for state in states for block_id in state.tables[tier].ids}  # one that is shared is one
        ids = torch.tensor(sorted(held), dtype=torch.int64, device=pool.device)
        owners = torch.bincount(placement.owner(pool.label[ids], pool.start[ids]), minlength=placement.num_ranks)
        report["tiers"][pool.kind] = {
            "blocks_used": pool.used_blocks,
            "blocks_shared": pool.shared_blocks,
            "blocks_total": pool.num_blocks,
            "blocks_by_owner": owners.tolist(),
            "bytes_held": pool.used_blocks * pool.block_bytes,
            "bytes_allocated": pool.allocated_bytes,
        }
    slots = [t for window in windows for t in window.tensors.values()]
    slot_bytes = sum(t[0].numel() * t.element_size() for t in slots)
    waiting = sum(state.window.waiting_bytes for state in states)
    waiting += sum(t.untyped_storage().nbytes() for t in routing)
    report["window"] = {
        "bytes_held": requests * slot_bytes + waiting,
        "bytes_allocated": sum(t.untyped_storage().nbytes() for t in slots) + waiting,
    }
    for key in ("bytes_held", "bytes_allocated"):
        report[key] = report["window"][key] + sum(tier[key] for tier in report["tiers"].values())
    report["blocks_dropped"] = sealer.dropped
    report["blocks_demoted"] = sealer.demoted
    report["reads"] = meter.read()
    return report
