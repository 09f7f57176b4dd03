"""ExpertKVCache: one expert's shard of one layer: every sealed block with that expert's label, across requests.

Alone it owns its memory and takes blocks directly. `PiKVCache.expert_shard` gives the same class as a read-only view
of what the cache holds for an expert at that moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_megatron import config as configs
from pikv_megatron import ops
from pikv_megatron.cache.checks import (
    UnknownRequestError,
    check_expert,
    check_finite,
    check_kv,
    check_layer,
    check_request_id,
    check_tensor,
)
from pikv_megatron.cache.layout import gather_decoded, group_rows, ungroup
from pikv_megatron.cache.memory import blocks_for, build_tier, check_shard_memory
from pikv_megatron.codecs.compressor import LARGEST, Compressor
from pikv_megatron.tiers import Tier
from pikv_megatron.tiers.blocks import BlockPool, BlockTable
from pikv_megatron.torch_mode import keeps_tensors


class ExpertKVCache:
    """The sealed blocks of one (layer, expert), encoded, on the rank that owns the expert.

    Args:
        model, runtime: dataclass, dict or YAML path each. Alone, the shard holds up to `max_tokens` tokens.
        layer_id, expert_id: what this is the shard of.

    Raises:
        ConfigError: a config that cannot be used.
        IndexError: layer_id or expert_id outside the model.
    """

    def __init__(
        self,
        model: configs.ModelConfig | configs.Source,
        runtime: configs.RuntimeConfig | configs.Source | None = None,
        layer_id: int = 0,
        expert_id: int = 0,
    ) -> None:
        self.model, self.runtime = configs.resolve(model, runtime)
        check_layer(layer_id, self.model)
        check_expert(expert_id, self.model)
        self.layer_id, self.expert_id = layer_id, expert_id
        self.compressor = Compressor(self.model, self.runtime)
        self._pool: Tier | None = None
        self._tables: dict[int, list[BlockTable]] = {}
        self._view = False
        self._seen: dict[BlockPool, int] = {}

    @classmethod
    def view(
        cls,
        model: configs.ModelConfig,
        runtime: configs.RuntimeConfig,
        layer_id: int,
        expert_id: int,
        tables: dict[int, list[BlockTable]],
        pools: Sequence[BlockPool],
    ) -> ExpertKVCache:
        """A read-only shard over those of others' blocks that have this expert's label.

        Args:
            tables: all blocks of the layer, a list of tables per request; each table's pool is one of `pools`.
        """
        shard = cls(model, runtime, layer_id, expert_id)
        shard._view = True
        for request_id, theirs in tables.items():
            for table in theirs:
                labels = table.pool.label[table.tensor].tolist()
                mine = [block_id for block_id, label in zip(table.ids, labels, strict=True) if label == expert_id]
                if mine:
                    part = BlockTable(table.pool)
                    part.extend(mine)
                    shard._tables.setdefault(request_id, []).append(part)
        shard._seen = {pool: pool.generation for pool in pools}
        return shard

    @property
    @keeps_tensors
    def pool(self) -> Tier:
        """This shard's own memory, allocated and touched at first use. Raises ConfigError where there is too little."""
        if self._pool is None:
            check_shard_memory(self.model, self.runtime)
            self._pool = build_tier(self.runtime.tiers[0], blocks_for(self.runtime), self.runtime, self.compressor)
        return self._pool

    def requests(self) -> list[int]:
        """Requests with blocks here, ascending."""
        return sorted(self._current())

    def tokens(self, request_id: int) -> int:
        return sum(len(table) for table in self._request(request_id)) * self.runtime.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks here, from their storage; one that several requests share counts once."""
        blocks = {(t.pool, block_id) for tables in self._current().values() for t in tables for block_id in t.ids}
        return sum(count * pool.block_bytes for pool, count in Counter(pool for pool, _ in blocks).items())

    @keeps_tensors
    def put(self, request_id: int, start: int, k: Tensor, v: Tensor) -> None:
        """Encodes and stores whole blocks of tokens, contiguous from position `start`.

        Args:
            k: [tokens, num_query_groups, head_dim], v: the same with v_head_dim; tokens a multiple of block_size.

        Raises:
            ValueError, TypeError: what does not fit; PoolFullError: no memory. Nothing has changed then.
        """
        if self._view:
            raise ValueError(
                f"put: this shard of expert {self.expert_id} is a view of a PiKVCache, "
                "expected one that owns its memory"
            )
        check_request_id(request_id)
        tokens = check_kv(k, v, self.model, self.runtime, self.compressor.largest)
        size = self.runtime.block_size
        if tokens % size:
            raise ValueError(f"k: expected a multiple of block_size ({size}) tokens, got {tokens}")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start: expected a position of at least 0, got {start!r}")
        count = tokens // size
        self.pool.check_free(count, f"put: request {request_id}")
        starts = torch.arange(start, start + tokens, size, device=k.device)
        for table in self._tables.get(request_id, []):
            held = table.pool.start[table.tensor]
            clash = held[(held > start - size) & (held < start + tokens)]
            if len(clash):
                raise ValueError(
                    f"start: expected positions {start} .. {start + tokens - 1} to be new, request {request_id} "
                    f"already holds a block from {int(clash[0])} on"
                )
        table = self._tables.setdefault(request_id, [BlockTable(self.pool)])[0]
        first = len(table)
        table.extend(self.pool.allocate(count))
        ids = table.tensor[first:]
        self.compressor.write(self.pool.fields, ids, *(x.unflatten(0, (count, size)).transpose(1, 2) for x in (k, v)))
        self.pool.describe(ids, starts, torch.full_like(starts, self.expert_id))

    @torch.no_grad()
    def attend(self, q: Tensor, request_id: int = 0) -> ops.Partial:
        """Attention over this shard's blocks alone; merge with others by log-sum-exp.

        Args:
            q: [tokens, num_attention_heads, head_dim], post-RoPE, all newer than every block here.

        Returns: out [tokens, num_attention_heads, v_head_dim] and lse [tokens, num_attention_heads], float32.
        """
        tables = self._request(request_id)
        tokens = check_tensor(
            "q",
            q,
            (self.model.num_attention_heads, self.model.head_dim),
            self.model.torch_dtype,
            self.runtime.torch_device,
        )
        check_finite("q", q, self.runtime, min(torch.finfo(q.dtype).max, LARGEST))
        rows = group_rows(q, self.model.num_query_groups)
        partials = []
        for table in tables:
            fields, ids = table.pool.get(table.tensor, q.device).wait()
            keys, values = self.compressor.keys(fields), self.compressor.values(fields)
            partials.append(ops.attend_blocks(rows, keys, values, ids, self.model.scale))
        merged = ops.merge_partials(partials)
        return ops.Partial(ungroup(merged.out, tokens), ungroup(merged.lse, tokens))

    def retrieve(self, request_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded k, v [tokens, num_query_groups, channels] in the model's dtype and positions [tokens], in position
        order.
        """
        return gather_decoded(self._request(request_id), self.compressor, self.runtime.torch_device)

    def release(self, request_id: int) -> None:
        """Frees the request's blocks."""
        if self._view:
            raise ValueError("release: this shard is a view of a PiKVCache, release the request there")
        for table in self._request(request_id):
            table.pool.free(table.clear())
        del self._tables[request_id]

    def _current(self) -> dict[int, list[BlockTable]]:
        """The tables of each request. Raises RuntimeError where this is a view of what is gone."""
        if any(pool.generation != seen for pool, seen in self._seen.items()):
            raise RuntimeError(
                f"this view of layer {self.layer_id}, expert {self.expert_id} is out of date: its cache has sealed, "
                "shared or released blocks or reordered requests since; take a new one with expert_shard"
            )
        return self._tables

    def _request(self, request_id: int) -> list[BlockTable]:
        tables = self._current()
        if request_id not in tables:
            raise UnknownRequestError(
                f"request {request_id} has no blocks of layer {self.layer_id}, expert {self.expert_id}"
            )
        return tables[request_id]
