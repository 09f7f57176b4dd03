"""Metrics of a cache, gathered in one place under plain names: bytes from storage, counts from tables, reads from
device counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pikv_megatron.cache.sealing import Sealer
from pikv_megatron.cache.state import Request
from pikv_megatron.cache.window import WindowBuffer
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading.reader import Reading, Source
from pikv_megatron.sharding.placement.owners import Owners
from pikv_megatron.tiers.blocks import BlockPool, ImportanceRows


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

    def add(self, layer_id: int, reading: Reading, sources: Sequence[Source], numbers: DeviceNumbers) -> None:
        """Adds the reads of a layer's decode tokens: means over a request's heads to the sums, the worst head to the
        maxima. Requests that have nothing sealed do not count.
        """
        size = sources[0].block_size
        sealed = [size * sum(counts) for counts in zip(*(s.counts for s in sources), strict=True)]
        some = [i for i, tokens in enumerate(sealed) if tokens]
        figures = [reading.estimate, reading.certificate, reading.tokens_read]
        if len(some) < len(sealed):
            figures = [x.index_select(0, numbers.of(tuple(some))) for x in figures]
        totals = numbers.of(tuple(sealed[i] for i in some)).unsqueeze(1)
        figures[2] = figures[2] / totals
        self._sum[layer_id] += torch.stack([x.flatten(1).mean(1, dtype=torch.float64).sum() for x in figures])
        worst = torch.stack([x.amax().double() for x in figures])
        torch.maximum(self._max[layer_id], worst, out=self._max[layer_id])
        self._calls[layer_id] += len(some)

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
    requests: Sequence[Request],
    owners: Owners,
    importance: ImportanceRows | None,
    sealer: Sealer,
    meter: ReadMeter,
) -> dict[str, Any]:
    """The dictionary that PiKVCache.stats returns.

    bytes_held: what live requests occupy (used blocks, their window slots, waiting prompt chunks, the routing kept
    for dense layers, importance); bytes_allocated: the pools' whole memory. Both are sums over storages.
    """
    states = [state for request in requests for state in request.layers]
    routing = [t for request in requests for _, *observed in request.routing.values() for t in observed]
    report: dict[str, Any] = {"requests": len(requests), "tiers": {}}
    for tier, pool in enumerate(tiers):
        held = {block_id for state in states for block_id in state.tables[tier].ids}  # one that is shared is one
        ids = torch.tensor(sorted(held), dtype=torch.int64, device=pool.device)
        ranks = torch.bincount(owners.owner(pool.label[ids], pool.start[ids]), minlength=owners.num_ranks)
        report["tiers"][pool.kind] = {
            "blocks_used": pool.used_blocks,
            "blocks_shared": pool.shared_blocks,
            "blocks_total": pool.num_blocks,
            "blocks_by_owner": ranks.tolist(),
            "bytes_held": pool.used_blocks * pool.block_bytes,
            "bytes_allocated": pool.allocated_bytes,
        }
    slots = [t for window in windows for t in window.tensors.values()]
    slot_bytes = sum(t[0].numel() * t.element_size() for t in slots)
    waiting = sum(state.waiting_bytes for state in states)
    waiting += sum(t.untyped_storage().nbytes() for t in routing)
    memories = {id(window.memory): window.memory for window in windows}.values()
    report["window"] = {
        "bytes_held": len(requests) * slot_bytes + waiting,
        "bytes_allocated": sum(memory.nbytes for memory in memories) + waiting,
    }
    rows = None if importance is None else importance.tensor
    report["importance"] = {
        "bytes_held": 0
        if rows is None or importance is None
        else importance.used * rows[0].numel() * rows.element_size(),
        "bytes_allocated": 0 if rows is None else rows.untyped_storage().nbytes(),
    }
    for key in ("bytes_held", "bytes_allocated"):
        parts = (report["window"], report["importance"], *report["tiers"].values())
        report[key] = sum(part[key] for part in parts)
    report["blocks_dropped"] = sealer.dropped
    report["blocks_demoted"] = sealer.demoted
    report["reads"] = meter.read()
    return report
