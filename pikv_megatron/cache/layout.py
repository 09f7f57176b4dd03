"""Between the host's order of tensors and the ops': query heads as rows of their KV heads, and blocks as tokens in
order of position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.tiers.blocks import BlockTable


def group_rows(q: Tensor, groups: int) -> Tensor:
    """q [tokens, heads, D] as rows of their KV heads: [groups, heads_per_group * tokens, D], tokens fastest."""
    tokens, heads, dim = q.shape
    if tokens == 1:
        return q.reshape(groups, heads // groups, dim)
    return q.view(tokens, groups, heads // groups, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def ungroup(rows: Tensor, tokens: int) -> Tensor:
    """Inverse of group_rows, for [groups, rows, E] as for [groups, rows]: [tokens, heads, E] or [tokens, heads]."""
    if tokens == 1:
        return rows.reshape(1, rows.shape[0] * rows.shape[1], *rows.shape[2:])
    split = rows.unflatten(1, (-1, tokens)).movedim(2, 0)  # [tokens, groups, heads_per_group, ...]
    return split.flatten(1, 2)


def gather_decoded(
    tables: list[BlockTable], compressor: Compressor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded tokens of blocks in position order: k, v [tokens, groups, channels], positions [tokens]."""
    parts = []
    for table in tables:
        stored = {name: tensor.index_select(0, table.tensor).to(device) for name, tensor in table.pool.fields.items()}
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in compressor.decode(stored))
        start = table.pool.start.index_select(0, table.tensor).to(device)
        offsets = torch.arange(table.pool.block_size, device=device)
        parts.append((k, v, (start.unsqueeze(1) + offsets).flatten()))
    k, v, positions = (torch.cat(part) for part in zip(*parts, strict=True))
    order = positions.argsort()
    return k[order], v[order], positions[order]
