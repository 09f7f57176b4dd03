"""A cache as plain lists of tokens and blocks: what `PiKVCache` promises, written out without windows, pools or tables.

It seals, labels, evicts, forks and crops by itself. Only the codec's arithmetic is the package's, and where two blocks
are equally important it takes over which of them the cache let go.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from dense import dense_attention
from torch import Tensor

from pikv_megatron import ModelConfig, RuntimeConfig
from pikv_megatron.budgets.budget import allowed_blocks
from pikv_megatron.codecs.compressor import Compressor


@dataclass
class Token:
    """k, v: [num_query_groups, channels]. votes: [experts], the gate weights; None until they were observed."""

    k: Tensor
    v: Tensor
    votes: Tensor | None = None
    importance: float = 0.0


@dataclass
class Block:
    """k, v: [block_size, num_query_groups, channels]; importance: one per token. even: two experts had equal votes."""

    start: int
    k: Tensor
    v: Tensor
    label: int
    even: bool
    importance: list[float]
    tier: int = 0


@dataclass
class Layer:
    """`raw` has the sinks and what comes from `end` on."""

    sinks: int
    sliding: int | None
    end: int
    raw: list[Token] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    length: int = 0
    chosen: dict[int, float] = field(default_factory=dict)
    """Where a single new block will take another's place: start and importance of the blocks held when its last token
    was appended. The least important of those leaves.
    """

    def raw_positions(self) -> list[int]:
        return [i if i < self.sinks else i - self.sinks + self.end for i in range(len(self.raw))]

    def oldest(self) -> int:
        """Its position; where nothing is held, that of the next token."""
        return min([*self.raw_positions(), *(b.start for b in self.blocks)], default=self.length)

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [tokens, num_query_groups, channels] and positions [tokens], in their order."""
        rows = [(at, t.k, t.v) for at, t in zip(self.raw_positions(), self.raw, strict=True)]
        rows += [(b.start + i, b.k[i], b.v[i]) for b in self.blocks for i in range(len(b.k))]
        rows.sort(key=lambda row: row[0])
        at, k, v = zip(*rows, strict=True)
        return torch.stack(k), torch.stack(v), torch.tensor(at)


class PlainRequest:
    """One request in every layer."""

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig) -> None:
        self.model, self.runtime, self.compressor = model, runtime, Compressor(model, runtime)
        self.allowed = allowed_blocks(model, runtime)
        self.layers = []
        for layer_id in range(model.num_layers):
            sliding = model.sliding_window(layer_id)
            sinks = runtime.sinks if sliding is None else 0
            self.layers.append(Layer(sinks, sliding, sinks))
        self.observed: dict[int, tuple[int, list[Tensor]]] = {}

    def fork(self) -> PlainRequest:
        return copy.deepcopy(self)

    def waiting(self, layer_id: int) -> int:
        """Blocks that have left the window."""
        layer = self.layers[layer_id]
        left = len(layer.raw) - layer.sinks - self.runtime.window - (layer.sliding or 0)
        return max(0, left // self.runtime.block_size)

    def append(self, layer_id: int, k: Tensor, v: Tensor, device: Sequence[int] | None) -> None:
        """device: starts of the blocks that the cache holds there, for ties."""
        self.seal(layer_id, device)
        layer = self.layers[layer_id]
        layer.raw += [Token(*pair) for pair in zip(k, v, strict=True)]
        layer.length += len(k)
        old = [b for b in layer.blocks if b.tier == 0]
        full = self.allowed is not None and layer.sliding is None and len(old) >= self.allowed[layer_id]
        layer.chosen = {b.start: sum(b.importance) for b in old} if full and self.waiting(layer_id) == 1 else {}
        source = self.model.label_source(layer_id)
        if source != layer_id and source in self.observed and self.observed[source][0] == layer.length:
            self._vote(layer, self.observed[source][1][-len(k) :])

    def observe(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None:
        nothing = torch.zeros(self.model.num_experts)
        votes = [nothing.index_add(0, *token) for token in zip(expert_ids, weights, strict=True)]
        self._vote(self.layers[layer_id], votes)
        self.observed[layer_id] = (self.layers[layer_id].length, votes)

    def _vote(self, layer: Layer, votes: list[Tensor]) -> None:
        for token, vote in zip(layer.raw[-len(votes) :], votes, strict=True):
            token.votes = vote

    def attend(self, layer_id: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention in float64 of the newest tokens; with a budget, what they looked at gains importance."""
        layer, scale = self.layers[layer_id], self.model.scale
        k, v, at = layer.held()
        queries = torch.arange(layer.length - len(q), layer.length)
        out, lse = dense_attention(q, k, v, scale, at, queries, layer.sliding)
        if self.allowed is not None and layer.sliding is None:
            keys = k.double().repeat_interleave(self.model.heads_per_group, 1)
            shares = (torch.einsum("thd,khd->thk", q.double(), keys) * scale - lse.unsqueeze(-1)).exp()
            shares.masked_fill_(at > queries[:, None, None], 0.0)
            shares = shares[-self.runtime.budget.observation_window :].sum((0, 1))
            got = dict(zip(at.tolist(), shares.tolist(), strict=True))
            for position, token in zip(layer.raw_positions(), layer.raw, strict=True):
                token.importance += got[position]
            for b in layer.blocks:
                b.importance = [x + got[b.start + i] for i, x in enumerate(b.importance)]
        return out, lse

    def seal(self, layer_id: int, device: Sequence[int] | None) -> None:
        layer, count, size = self.layers[layer_id], self.waiting(layer_id), self.runtime.block_size
        leaving = layer.raw[layer.sinks : layer.sinks + count * size]
        del layer.raw[layer.sinks : layer.sinks + count * size]
        if layer.sliding is None:
            new = [self._encode(layer.end + i, leaving[i : i + size]) for i in range(0, len(leaving), size)]
            self._evict(layer_id, new, device)
        layer.end += count * size

    def _encode(self, start: int, tokens: list[Token]) -> Block:
        raw = (torch.stack([getattr(t, name) for t in tokens]).transpose(0, 1)[None] for name in ("k", "v"))
        k, v = (x[0].transpose(0, 1).clone() for x in self.compressor.decode(self.compressor.encode(*raw)))
        votes = sum((t.votes for t in tokens if t.votes is not None), torch.zeros(max(1, self.model.num_experts)))
        even = int((votes > votes.max() - 1e-5).sum()) > 1
        return Block(start, k, v, int(votes.argmax()), even and bool(votes.any()), [t.importance for t in tokens])

    def _evict(self, layer_id: int, new: list[Block], device: Sequence[int] | None) -> None:
        """Over budget, the least important blocks go down a tier or are gone; a single new one stays, if there are
        others.
        """
        layer = self.layers[layer_id]
        old = [b for b in layer.blocks if b.tier == 0]
        layer.blocks += new
        chosen, layer.chosen = layer.chosen, {}
        if self.allowed is None or not new:
            return
        over = max(0, len(old) + len(new) - self.allowed[layer_id])
        compete = {b.start: chosen.get(b.start, sum(b.importance)) for b in (old if chosen else old + new)}
        gone = sorted(compete, key=compete.__getitem__)[:over]
        if device is not None and over:
            really = [start for start in compete if start not in device]
            assert len(really) == over
            most, least = (max(compete[start] for start in starts) for starts in (really, gone))
            assert most <= least * 1.001 + 1e-5, f"layer {layer_id}: a more important block left"
            gone = really
        for b in layer.blocks:
            b.tier = 1 if b.start in gone else b.tier
        if self.runtime.budget.over_budget == "drop":
            layer.blocks = [b for b in layer.blocks if b.tier == 0]

    def shortest_crop(self) -> int:
        ends = [
            layer.end + self.waiting(layer_id) * self.runtime.block_size + layer.sliding
            for layer_id, layer in enumerate(self.layers)
            if layer.sliding is not None and layer.end + self.waiting(layer_id)
        ]
        return max([1, *ends])

    def crop(self, length: int) -> None:
        for layer_id, layer in enumerate(self.layers):
            if length >= layer.length:
                continue
            self.seal(layer_id, None)
            places = layer.raw_positions()
            layer.raw = [token for at, token in zip(places, layer.raw, strict=True) if at < length]
            if length < layer.end:
                layer.end = self._reopen(layer, max(length, layer.sinks))
            layer.length = length
        self.observed = {i: seen for i, seen in self.observed.items() if seen[0] < length}

    def _reopen(self, layer: Layer, end: int) -> int:
        """A block that is cut becomes raw tokens again, which vote for its label."""
        goes_on, size = end, self.runtime.block_size
        for b in [b for b in layer.blocks if b.start + size > end]:
            layer.blocks.remove(b)
            if b.start < end:
                goes_on = b.start
                vote = torch.nn.functional.one_hot(torch.tensor(b.label), max(1, self.model.num_experts)).float()
                rows = range(end - b.start)
                layer.raw += [Token(b.k[i], b.v[i], vote, b.importance[i]) for i in rows]
        return goes_on
