"""PiKVCache: the one pipeline append -> attend -> observe_routing -> seal, and the only module that knows this order.

It holds requests, windows and tables, and calls the stages: `checks` at the door, `window` for raw tokens, `sealing`
when they leave it, `selection` and `ops` to attend. What a stage measures is gathered here and returned by `stats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pikv_megatron import config as configs
from pikv_megatron.cache import checks, labels
from pikv_megatron.cache.attention import Attended, Attention
from pikv_megatron.cache.expert_cache import ExpertKVCache
from pikv_megatron.cache.layout import gather_decoded, group_rows, ungroup
from pikv_megatron.cache.memory import check_memory
from pikv_megatron.cache.requests import Request, Requests
from pikv_megatron.cache.results import AttendResult, Retrieved
from pikv_megatron.cache.sealing import LayerState, Sealer
from pikv_megatron.cache.stats import ReadMeter, cache_stats
from pikv_megatron.cache.window import WindowBuffer, raw_positions
from pikv_megatron.codecs.compressor import LARGEST, Compressor
from pikv_megatron.sharding.placement import Placement
from pikv_megatron.streamer.streamer import Streamer
from pikv_megatron.tiers.blocks import keeps_tensors
from pikv_megatron.tiers.tiers import build_tiers, capacity_tokens


class PiKVCache:
    """A sharded, compressed, selectively read KV cache for one rank's layers.

    Args:
        model: ModelConfig, dict of its keys, or YAML path; a file (or dict) has the sections `model` and `runtime`.
        runtime: RuntimeConfig, dict of its keys, or YAML path; None takes what came with `model`, else the defaults.
        streamer: told of every sealed block and every released request; None: one that is off.

    Raises:
        ConfigError: a config that cannot be used, or for which there is not enough free memory, naming the key.

    All methods are for one thread, and no gradient flows through them. Requests are ints of the caller's choosing; the
    first append creates one, `release` ends it.
    """

    @keeps_tensors
    def __init__(
        self,
        model: configs.ModelConfig | configs.Source,
        runtime: configs.RuntimeConfig | configs.Source | None = None,
        streamer: Streamer | None = None,
    ) -> None:
        self.model, self.runtime = configs.resolve(model, runtime)
        self.compressor = Compressor(self.model, self.runtime)
        self.placement = Placement(self.model, self.runtime)
        self.streamer = Streamer() if streamer is None else streamer
        check_memory(self.model, self.runtime)
        self.tiers = build_tiers(self.model, self.runtime, self.compressor)
        self.capacity_tokens = capacity_tokens(self.model, self.runtime, self.tiers)
        """Tokens per layer, all requests together, that fit however they are divided: max_tokens, or less where
        tiers[].bytes says so.
        """
        layers = range(self.model.num_layers)
        self._windows = [WindowBuffer(self.model, self.runtime, layer_id) for layer_id in layers]
        self._sealer = Sealer(self.model, self.runtime, self.compressor, self.tiers, self._windows, self.streamer)
        self._table = Requests(self.runtime, self.compressor, self.tiers, self._windows, self._sealer, self.streamer)
        self._requests = self._table.live
        self._meter = ReadMeter(self.model, self.runtime)
        self._attention = Attention(self.model, self.runtime, self.compressor, self._meter)

    # ---- writing

    @keeps_tensors
    def append(self, layer_id: int, k: Tensor, v: Tensor, request_id: int = 0, start: int | None = None) -> None:
        """Adds the next tokens of a request to a layer; the first append of a request creates it.

        Args:
            k: [tokens, num_query_groups, head_dim], post-RoPE, in the model's dtype. v: the same with v_head_dim.
            start: position of the first token, to be checked against the next one; None takes the next one.

        Raises:
            ValueError, TypeError, IndexError: an argument that does not fit; PoolFullError: no memory left. Nothing
                has changed then.
        """
        checks.check_layer(layer_id, self.model)
        checks.check_request_id(request_id)
        tokens = checks.check_kv(k, v, self.model, self.runtime, self.compressor.largest)
        self._append(layer_id, k, v, tokens, request_id, start)

    def _append(self, layer_id: int, k: Tensor, v: Tensor, tokens: int, request_id: int, start: int | None) -> None:
        request = self._requests.get(request_id)
        checks.check_start(start, request.layers[layer_id].length if request else 0, request_id, layer_id)
        if request is None:
            needed = self._sealer.needed(layer_id, None, tokens)
            self._sealer.check_room(needed, f"request {request_id}, layer {layer_id}")
            request = self._table.create(request_id)
        state = request.layers[layer_id]
        self._sealer.make_room(state, tokens)
        state.window.append(k, v)
        state.length += tokens
        labels.inherit(self.model, request.routing, state, tokens)

    @keeps_tensors
    def append_each(
        self, layer_id: int, k: Tensor, v: Tensor, request_ids: Sequence[int], starts: Sequence[int] | None = None
    ) -> None:
        """`append` of one token to each of several live requests: k [requests, num_query_groups, head_dim], v likewise.

        Raises: as `append`. Nothing has changed then.
        """
        checks.check_layer(layer_id, self.model)
        tokens = checks.check_kv(k, v, self.model, self.runtime, self.compressor.largest)
        requests = self._table.get_each(request_ids, tokens)
        states = [request.layers[layer_id] for request in requests]
        if starts is not None:
            for state, start in zip(states, starts, strict=True):
                checks.check_start(start, state.length, state.request_id, layer_id)
        self.check_room(dict.fromkeys(request_ids, 1), [layer_id])
        for state in states:
            self._sealer.make_room(state, 1)
        self._windows[layer_id].append_each([state.window for state in states], k, v)
        for request, state in zip(requests, states, strict=True):
            state.length += 1
            labels.inherit(self.model, request.routing, state, 1)

    def check_room(self, tokens: Mapping[int, int], layer_ids: Sequence[int] | None = None) -> None:
        """Checks that a step fits: that these numbers of tokens per request can be appended to every layer (or to
        `layer_ids`).

        A model's forward appends layer by layer; asked before the first one, a step that does not fit is refused whole.

        Raises:
            PoolFullError: a tier has too few free blocks, or too many requests would be live. Nothing has changed.
        """
        for request_id, count in tokens.items():
            checks.check_request_id(request_id)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"tokens: request {request_id}: expected a count of at least 1, got {count!r}")
        new = [request_id for request_id in tokens if request_id not in self._requests]
        self._table.check_slots(new)
        layers = range(self.model.num_layers) if layer_ids is None else layer_ids
        needed = [0] * len(self.tiers)
        for request_id, count in tokens.items():
            request = self._requests.get(request_id)
            for layer_id in layers:
                state = None if request is None else request.layers[layer_id]
                needed = [a + b for a, b in zip(needed, self._sealer.needed(layer_id, state, count), strict=True)]
        where = "in every layer" if layer_ids is None else f"in layer {', '.join(map(str, layer_ids))}"
        self._sealer.check_room(needed, f"{sum(tokens.values())} tokens of {len(tokens)} requests {where}")

    @keeps_tensors
    def update(
        self,
        layer_id: int,
        token_id: int | Sequence[int] | Tensor,
        k: Tensor,
        v: Tensor,
        request_id: int = 0,
        expert_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """`append` with explicit positions, and labels where the caller knows the experts.

        Args:
            token_id: position of the one token of k, v [num_query_groups, channels], or consecutive positions of k, v
                [tokens, ...].
            expert_ids: [topk] for one token or [tokens, topk]; all weigh the same. The tokens stay raw until the next
                append, so that an `attend` in between sees them as they came.
        """
        if isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 2 and v.dim() == 2:
            k, v = k.unsqueeze(0), v.unsqueeze(0)
        checks.check_layer(layer_id, self.model)
        checks.check_request_id(request_id)
        tokens = checks.check_kv(k, v, self.model, self.runtime, self.compressor.largest)
        start = checks.first_position(token_id, tokens)
        if expert_ids is None:
            self._append(layer_id, k, v, tokens, request_id, start)
            return
        checks.check_has_experts(layer_id, self.model)
        ids = torch.as_tensor(expert_ids, device=k.device)
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        weights = torch.full(ids.shape, 1.0 / self.model.topk, device=k.device)
        if checks.check_routing(ids, weights, self.model, self.runtime.torch_device, tokens) != tokens:
            raise ValueError(f"expert_ids: expected experts of all {tokens} tokens, got {ids.shape[0]}")
        self._append(layer_id, k, v, tokens, request_id, start)
        request = self._requests[request_id]
        labels.observe(self.model, request.routing, request.layers[layer_id], ids, weights)

    @keeps_tensors
    def observe_routing(self, layer_id: int, expert_ids: Tensor, weights: Tensor, request_id: int = 0) -> None:
        """Tells which experts the newest tokens of a layer went to; then seals what has left the window.

        Args:
            expert_ids: [tokens, topk] integers. weights: [tokens, topk], the gate's.

        Dense layers after an MoE layer inherit its routing for the same tokens.
        """
        request, state = self._state(layer_id, request_id)
        checks.check_has_experts(layer_id, self.model)
        checks.check_routing(expert_ids, weights, self.model, self.runtime.torch_device, state.window.tokens)
        labels.observe(self.model, request.routing, state, expert_ids, weights)
        self._sealer.seal(state)

    @keeps_tensors
    def observe_each(self, layer_id: int, expert_ids: Tensor, weights: Tensor, request_ids: Sequence[int]) -> None:
        """`observe_routing` of the newest token of each of several requests: expert_ids, weights [requests, topk].

        Raises: as `observe_routing`. Nothing has changed then.
        """
        checks.check_layer(layer_id, self.model)
        checks.check_has_experts(layer_id, self.model)
        requests = self._table.get_each(request_ids, len(request_ids))
        states = [request.layers[layer_id] for request in requests]
        unsealed = sum(state.window.tokens > 0 for state in states)
        tokens = checks.check_routing(expert_ids, weights, self.model, self.runtime.torch_device, unsealed)
        if tokens != len(states):
            raise ValueError(f"expert_ids: expected one row for each of {len(states)} requests, got {tokens}")
        for i, (request, state) in enumerate(zip(requests, states, strict=True)):
            labels.observe(self.model, request.routing, state, expert_ids[i : i + 1], weights[i : i + 1])
            self._sealer.seal(state)

    # ---- whole requests

    def release(self, request_id: int) -> None:
        """Ends a request and frees its memory. Raises UnknownRequestError where it is not live."""
        self._table.release(request_id)

    @keeps_tensors
    def fork(self, source: int, target: int) -> None:
        """Makes a request `target` that holds what `source` holds; from then on they go their own ways.

        Sealed blocks are shared, raw tokens copied. With a budget blocks are copied too, since it writes to them.

        Raises:
            UnknownRequestError: `source` is not live. ValueError: `target` is. PoolFullError: no room for it. Nothing
                has changed then.
        """
        self._table.fork(source, target)

    @keeps_tensors
    def reorder(self, request_ids: Sequence[int], sources: Sequence[int]) -> None:
        """Beam search: each of these requests goes on from what the request beside it in `sources` holds now.

        A request that is nobody's source is forgotten; one that is its own keeps its memory; one that is so several
        times over is forked.

        Args:
            request_ids: different live requests. sources: as many of the same, in any number.

        Raises:
            UnknownRequestError, ValueError: what does not fit; PoolFullError: no room. Nothing has changed then.
        """
        self._table.reorder(request_ids, sources)

    @keeps_tensors
    def crop(self, request_id: int, length: int) -> None:
        """Forgets a request's tokens from position `length` on, in every layer; `append` goes on there.

        The newest runtime.window tokens are raw and go without a trace, except that a budget keeps the importance that
        they gave to others. Further back a block may be cut: its tokens up to `length` are raw again, as decoded, and
        what a budget has dropped does not come back.

        Args:
            length: 1 or more (`release` forgets all), and at most what every layer has; at least `shortest_crop`.

        Raises:
            UnknownRequestError, ValueError: what does not fit. Nothing has changed then.
        """
        self._table.crop(request_id, length)

    def shortest_crop(self, request_id: int) -> int:
        """The least length that `crop` can bring a request to: sliding-window layers have forgotten what a shorter one
        would see. It is never above the longest that the request was, less runtime.window.
        """
        return self._table.shortest_crop(request_id)

    # ---- reading

    @keeps_tensors
    def attend(self, layer_id: int, q: Tensor, request_id: int = 0) -> tuple[Tensor, Tensor]:
        """Attention of the newest tokens of a request, causal by position.

        Args:
            q: [tokens, num_attention_heads, head_dim], post-RoPE, the queries of the newest `tokens` positions.

        Returns:
            out [tokens, num_attention_heads, v_head_dim] in q's dtype; lse [tokens, num_attention_heads] float32.
        """
        attended, tokens = self._attend(layer_id, q, request_id)
        return ungroup(attended.partial.out, tokens).to(q.dtype), ungroup(attended.partial.lse, tokens)

    @keeps_tensors
    def attend_measured(self, layer_id: int, q: Tensor, request_id: int = 0) -> AttendResult:
        """`attend`, with the missed mass beside the output. One query token follows attention.mode; several read
        everything.
        """
        (partial, missed), tokens = self._attend(layer_id, q, request_id)
        out, lse = ungroup(partial.out, tokens).to(q.dtype), ungroup(partial.lse, tokens)
        if missed is None:
            return AttendResult(out, lse, torch.zeros_like(lse), torch.zeros_like(lse))
        return AttendResult(out, lse, *(ungroup(m, tokens) for m in missed))

    def _attend(self, layer_id: int, q: Tensor, request_id: int) -> tuple[Attended, int]:
        _, state = self._state(layer_id, request_id)
        model = self.model
        tokens = checks.check_tensor(
            "q", q, (model.num_attention_heads, model.head_dim), model.torch_dtype, self.runtime.torch_device
        )
        checks.check_queries(tokens, state.length, request_id, layer_id)
        checks.check_finite("q", q, self.runtime, min(torch.finfo(q.dtype).max, LARGEST))
        attended = self._attention.attend(state, group_rows(q, model.num_query_groups), tokens)
        if model.label_source(layer_id) != layer_id:
            self._sealer.seal(state)  # a dense layer has its labels already
        return attended, tokens

    @keeps_tensors
    def attend_each(self, layer_id: int, q: Tensor, request_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`attend` of the newest token of each of several requests: q [requests, num_attention_heads, head_dim].

        Returns:
            out [requests, num_attention_heads, v_head_dim] in q's dtype; lse [requests, num_attention_heads] float32.
        """
        model, runtime = self.model, self.runtime
        checks.check_layer(layer_id, model)
        tail = (model.num_attention_heads, model.head_dim)
        tokens = checks.check_tensor("q", q, tail, model.torch_dtype, runtime.torch_device)
        states = [request.layers[layer_id] for request in self._table.get_each(request_ids, tokens)]
        for request_id, state in zip(request_ids, states, strict=True):
            checks.check_queries(1, state.length, request_id, layer_id)
        checks.check_finite("q", q, runtime, min(torch.finfo(q.dtype).max, LARGEST))
        whole = runtime.attention.mode == "exact" and runtime.budget.policy == "none"
        if len(states) == 1 or not whole or any(state.newest_is_sealed() for state in states):
            parts = [self.attend(layer_id, q[i : i + 1], request_id) for i, request_id in enumerate(request_ids)]
            out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
            return out, lse
        rows = q.unflatten(1, (model.num_query_groups, model.heads_per_group))
        merged = self._attention.attend_each(states, rows)
        if model.label_source(layer_id) != layer_id:
            for state in states:
                self._sealer.seal(state)
        return merged.out.flatten(1, 2).to(q.dtype), merged.lse.flatten(1, 2)

    def retrieve(self, layer_id: int, request_id: int = 0) -> Retrieved:
        """Every token that a layer holds of a request, decoded, in position order."""
        _, state = self._state(layer_id, request_id)
        raw = state.window.read()
        sinks = min(state.sinks, raw.tokens)
        positions = raw_positions(raw.tokens, state.sinks, state.sealed_end, raw.k.device)
        k, v = raw.k.transpose(0, 1), raw.v.transpose(0, 1)
        sealed = [table for table in state.tables if len(table)]
        if not sealed:
            return Retrieved(k.clone(), v.clone(), positions)
        middle = gather_decoded(sealed, self.compressor, k.device)
        parts = zip((k, v, positions), middle, strict=True)
        return Retrieved(*(torch.cat([ours[:sinks], stored, ours[sinks:]]) for ours, stored in parts))

    def expert_shard(self, layer_id: int, expert_id: int) -> ExpertKVCache:
        """What the cache holds now for one expert of a layer, over all requests, as a read-only ExpertKVCache.

        It is good until the cache next seals, shares or releases a block, or reorders requests; then its methods raise
        RuntimeError.
        """
        checks.check_layer(layer_id, self.model)
        tables = {request_id: request.layers[layer_id].tables for request_id, request in self._requests.items()}
        return ExpertKVCache.view(self.model, self.runtime, layer_id, expert_id, tables, self.tiers)

    def requests(self) -> list[int]:
        """Ids of the live requests, ascending."""
        return sorted(self._requests)

    def length(self, layer_id: int = 0, request_id: int = 0) -> int:
        """Positions appended to a layer of a request so far."""
        return self._state(layer_id, request_id)[1].length

    def stats(self) -> dict[str, Any]:
        """What the cache holds and did; bytes are summed from the tensors' storage. Waits for the device."""
        requests = self._requests.values()
        states = [state for request in requests for state in request.layers]
        routing = [t for request in requests for _, *observed in request.routing.values() for t in observed]
        stats = cache_stats(
            self.tiers, self._windows, routing, len(requests), states, self.placement, self._sealer, self._meter
        )
        return stats | {"capacity_tokens": self.capacity_tokens}

    # ---- inside

    def _state(self, layer_id: int, request_id: int) -> tuple[Request, LayerState]:
        checks.check_layer(layer_id, self.model)
        request = self._table.get(request_id)
        return request, request.layers[layer_id]
