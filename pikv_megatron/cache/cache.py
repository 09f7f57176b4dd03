"""PiKVCache: the one pipeline append -> attend -> observe_routing -> seal, and the only module that knows this order.

It holds requests, windows and tables, and calls the stages: `checks` at the door, `window` for raw tokens, `sealing`
when they leave it, `reading` and `ops` to attend. What a stage measures is gathered here and returned by `stats`.
A host serves its forwards by steps (`begin`); the calls for one request and layer at a time (`append`, `attend`,
`observe_routing`, `update`) do the same by hand, each of them final at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pikv_megatron import config as configs
from pikv_megatron.cache import checks, labels
from pikv_megatron.cache.attention import Attended, Attention
from pikv_megatron.cache.events import CacheEvents
from pikv_megatron.cache.expert_cache import ExpertKVCache
from pikv_megatron.cache.layout import gather_decoded, group_rows, ungroup
from pikv_megatron.cache.memory import build_tiers, capacity_tokens, check_memory
from pikv_megatron.cache.requests import Requests
from pikv_megatron.cache.results import AttendResult, Retrieved
from pikv_megatron.cache.sealing import Sealer
from pikv_megatron.cache.state import LayerState, Request
from pikv_megatron.cache.stats import ReadMeter, cache_stats
from pikv_megatron.cache.step import ActiveStep, Segment, Step
from pikv_megatron.cache.steps import Steps
from pikv_megatron.cache.window import raw_positions, window_buffers
from pikv_megatron.codecs.compressor import LARGEST, Compressor
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.ops import Partial
from pikv_megatron.sharding.placement.owners import Owners
from pikv_megatron.tiers.blocks import ImportanceRows
from pikv_megatron.torch_mode import keeps_tensors


class PiKVCache:
    """A sharded, compressed, selectively read KV cache for one rank's layers.

    Args:
        model: ModelConfig, dict of its keys, or YAML path; a file (or dict) has the sections `model` and `runtime`.
        runtime: RuntimeConfig, dict of its keys, or YAML path; None takes what came with `model`, else the defaults.
        listeners: told of what the cache does, see `CacheEvents`.

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
        listeners: Sequence[CacheEvents] = (),
    ) -> None:
        self.model, self.runtime = configs.resolve(model, runtime)
        self.compressor = Compressor(self.model, self.runtime)
        self.owners = Owners(self.model, self.runtime)
        self.listeners = tuple(listeners)
        check_memory(self.model, self.runtime)
        self.tiers = build_tiers(self.model, self.runtime, self.compressor)
        self.capacity_tokens = capacity_tokens(self.model, self.runtime, self.tiers)
        """Tokens per layer, all requests together, that fit however they are divided: max_tokens, or less where
        tiers[].bytes says so.
        """
        device, self.importance = self.runtime.torch_device, None
        if self.runtime.budget.policy != "none":
            rows = sum(tier.num_blocks for tier in self.tiers)
            self.importance = ImportanceRows(rows, self.runtime.block_size, device)
        self.numbers = DeviceNumbers(device)
        self._windows = window_buffers(self.model, self.runtime)
        parts = self.compressor, self.tiers, self._windows
        self.sealer = Sealer(self.model, self.runtime, *parts, self.importance, self.listeners)
        self._table = Requests(self.runtime, *parts, self.sealer, self.importance, self.listeners)
        self._requests = self._table.live
        self._meter = ReadMeter(self.model, self.runtime)
        self.attention = Attention(
            self.model, self.runtime, self.compressor, self.tiers, self.importance, self._meter, self.numbers
        )
        self._steps = Steps(
            self.model,
            self.runtime,
            self.compressor,
            self._table,
            self.sealer,
            self.attention,
            self.numbers,
            self.listeners,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle. Raises RuntimeError while a step runs."""
        self._settle()
        if self._steps.active is not None:
            raise RuntimeError("a step is running: end or abort it before the cache is copied")
        return vars(self)

    # ---- steps

    @keeps_tensors
    def begin(self, step: Step) -> ActiveStep:
        """Begins a step: checks it, and takes all the memory that it needs in every layer.

        The step before it is committed, if it has reached its end. If it has not, or if this one starts where that one
        did, which is a host that tries again, it is discarded as if it had not happened; a request that it brought is
        gone then.

        Returns: the step, a context manager; its calls serve one layer after another.

        Raises:
            ValueError: a segment does not start where its request goes on.
            PoolFullError: a tier has too few free blocks, or too many requests would be live. Nothing has changed but
                for the step before.
        """
        return self._steps.begin(step)

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
        self._settle(changes=True)
        checks.check_layer(layer_id, self.model)
        checks.check_request_id(request_id)
        tokens = checks.check_kv(k, v, self.model, self.runtime, self.compressor.largest)
        self._append(layer_id, k, v, tokens, request_id, start)

    def _append(self, layer_id: int, k: Tensor, v: Tensor, tokens: int, request_id: int, start: int | None) -> None:
        request = self._requests.get(request_id)
        checks.check_start(start, request.layers[layer_id].length if request else 0, request_id, layer_id)
        if request is None:
            needed = self.sealer.needed(layer_id, None, tokens)
            self.sealer.check_room([needed], f"request {request_id}, layer {layer_id}")
            request = self._table.create(request_id)
        state = request.layers[layer_id]
        self.sealer.make_room(state, tokens)
        state.window.append(k, v)
        state.window.commit()
        state.committed += tokens
        labels.inherit(self.model, request.routing, state, tokens)
        for listener in self.listeners:
            segment = Segment(request_id, state.committed - tokens, tokens, "prompt" if tokens > 1 else "decode")
            listener.appended(None, layer_id, Step((segment,)), k, v)

    def check_room(self, tokens: Mapping[int, int], layer_ids: Sequence[int] | None = None) -> None:
        """Checks that a step fits: that these numbers of tokens per request can be appended to every layer (or to
        `layer_ids`).

        A model's forward appends layer by layer; asked before the first one, a step that does not fit is refused whole.

        Raises:
            PoolFullError: a tier has too few free blocks, or too many requests would be live. Nothing has changed.
        """
        self._settle()
        for request_id, count in tokens.items():
            checks.check_request_id(request_id)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"tokens: request {request_id}: expected a count of at least 1, got {count!r}")
        layers = range(self.model.num_layers) if layer_ids is None else layer_ids
        where = "in every layer" if layer_ids is None else f"in layer {', '.join(map(str, layer_ids))}"
        self._steps.check_room(tokens, layers, where)

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
        self._settle(changes=True)
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
        self._settle(changes=True)
        request, state = self._state(layer_id, request_id)
        checks.check_has_experts(layer_id, self.model)
        checks.check_routing(expert_ids, weights, self.model, self.runtime.torch_device, state.window.tokens)
        labels.observe(self.model, request.routing, state, expert_ids, weights)
        self.sealer.seal(state)

    # ---- whole requests

    def release(self, request_id: int) -> None:
        """Ends a request and frees its memory. Raises UnknownRequestError where it is not live."""
        self._settle(changes=True)
        self._table.release(request_id)

    @keeps_tensors
    def fork(self, source: int, target: int) -> None:
        """Makes a request `target` that holds what `source` holds; from then on they go their own ways.

        Sealed blocks are shared, raw tokens and importance copied.

        Raises:
            UnknownRequestError: `source` is not live. ValueError: `target` is. PoolFullError: no room for it. Nothing
                has changed then.
        """
        self._settle(changes=True)
        self._table.fork(source, target)

    @keeps_tensors
    def reorder(self, request_ids: Sequence[int], sources: Sequence[int]) -> None:
        """Beam search: each of these requests goes on from what the request beside it in `sources` holds now.

        A request that no other continues from is released; one that goes on itself keeps its memory; one that several
        continue from is forked.

        Args:
            request_ids: different live requests. sources: as many of the same, in any number.

        Raises:
            UnknownRequestError, ValueError: what does not fit; PoolFullError: no room. Nothing has changed then.
        """
        self._settle(changes=True)
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
        self._settle(changes=True)
        self._table.crop(request_id, length)

    def shortest_crop(self, request_id: int) -> int:
        """The least length that `crop` can bring a request to: sliding-window layers have forgotten what a shorter one
        would see. It is never above the longest that the request was, less runtime.window.
        """
        self._settle()
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
        (partial, _), tokens = self._attend(layer_id, q, request_id)
        return ungroup(partial.out, tokens).to(q.dtype), ungroup(partial.lse, tokens)

    @keeps_tensors
    def attend_measured(self, layer_id: int, q: Tensor, request_id: int = 0) -> AttendResult:
        """`attend`, with the missed mass beside the output: zeros where everything was read. One query token follows
        attention.mode; several read everything.
        """
        (partial, missed), tokens = self._attend(layer_id, q, request_id)
        out, lse = ungroup(partial.out, tokens).to(q.dtype), ungroup(partial.lse, tokens)
        if missed is None:
            return AttendResult(out, lse, torch.zeros_like(lse), torch.zeros_like(lse))
        return AttendResult(out, lse, *(ungroup(m, tokens) for m in missed))

    def _attend(self, layer_id: int, q: Tensor, request_id: int) -> tuple[Attended, int]:
        self._settle()
        _, state = self._state(layer_id, request_id)
        model = self.model
        tokens = checks.check_tensor(
            "q", q, (model.num_attention_heads, model.head_dim), model.torch_dtype, self.runtime.torch_device
        )
        checks.check_queries(tokens, state.length, request_id, layer_id)
        checks.check_finite("q", q, self.runtime, min(torch.finfo(q.dtype).max, LARGEST))
        rows = group_rows(q, model.num_query_groups)
        if tokens == 1 and not state.newest_is_sealed():
            (out, lse), missed = self.attention.attend_decode([state], rows.unsqueeze(0))
            attended = Attended(Partial(out[0], lse[0]), missed and (missed[0][0], missed[1][0]))
        else:
            attended = self.attention.attend_prompt(state, rows, tokens)
        if model.label_source(layer_id) != layer_id:
            self.sealer.seal(state)  # a dense layer has its labels already
        return attended, tokens

    def retrieve(self, layer_id: int, request_id: int = 0) -> Retrieved:
        """Every token that a layer holds of a request, decoded, in position order."""
        self._settle()
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
        self._settle()
        checks.check_layer(layer_id, self.model)
        tables = {request_id: request.layers[layer_id].tables for request_id, request in self._requests.items()}
        return ExpertKVCache.view(self.model, self.runtime, layer_id, expert_id, tables, self.tiers)

    def requests(self) -> list[int]:
        """Ids of the live requests, ascending."""
        self._settle()
        return sorted(self._requests)

    def length(self, layer_id: int = 0, request_id: int = 0) -> int:
        """Positions appended to a layer of a request so far."""
        self._settle()
        return self._state(layer_id, request_id)[1].length

    def stats(self) -> dict[str, Any]:
        """What the cache holds and did; bytes are summed from the tensors' storage. Waits for the device."""
        self._settle()
        stats = cache_stats(
            self.tiers,
            self._windows,
            list(self._requests.values()),
            self.owners,
            self.importance,
            self.sealer,
            self._meter,
        )
        return stats | {"capacity_tokens": self.capacity_tokens}

    # ---- inside

    def _settle(self, changes: bool = False) -> None:
        self._steps.settle(changes)

    def _state(self, layer_id: int, request_id: int) -> tuple[Request, LayerState]:
        checks.check_layer(layer_id, self.model)
        request = self._table.get(request_id)
        return request, request.layers[layer_id]
