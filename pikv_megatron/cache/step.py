"""A step: one forward of a host over tokens of several requests.

A host describes it once (`Step`), `PiKVCache.begin` checks it and takes all the memory that it needs, and then each
layer is served by three calls for all requests together. Nothing of a step is final before it is committed, which the
cache does when the next one begins; a step that has ended early is discarded then, as if it had not happened.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pikv_megatron.cache import checks
from pikv_megatron.cache.attention import Undo
from pikv_megatron.cache.layout import group_rows, ungroup
from pikv_megatron.cache.results import AttendResult
from pikv_megatron.cache.state import LayerState, Request
from pikv_megatron.cache.window import LayerWindow
from pikv_megatron.codecs.compressor import LARGEST
from pikv_megatron.torch_mode import keeps_tensors

if TYPE_CHECKING:
    from pikv_megatron.cache.steps import Steps

log = logging.getLogger(__name__)

SegmentKind = Literal["prompt", "last_prompt", "decode", "draft"]


@dataclass(frozen=True)
class Segment:
    """One request's tokens in a step.

    Args:
        start: position of the first of them; where the request goes on.
        tokens: how many, at consecutive positions.
        kind: what they are. A decode token reads what attention.mode says, if it is its request's only one in the step;
            the tokens of a prompt (or of its last chunk) and drafts that may be taken back read everything.
    """

    request_id: int
    start: int
    tokens: int
    kind: SegmentKind = "decode"

    def __post_init__(self) -> None:
        checks.check_request_id(self.request_id)
        for name, least in (("start", 0), ("tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}: request {self.request_id}: expected an int of at least {least}, got {value!r}"
                )
        if self.kind not in ("prompt", "last_prompt", "decode", "draft"):
            raise ValueError(
                f"kind: request {self.request_id}: expected prompt, last_prompt, decode or draft, got {self.kind!r}"
            )


@dataclass(frozen=True)
class Step:
    """The tokens of one forward.

    Args:
        segments: the requests' tokens in packed order, each request once; none on a rank that has nothing to do.
        rows: [tokens] int64, the host's row of each token; None: the host's rows are the packed tokens.
        host_rows: how many rows the host's tensors have, where `rows` is given; what it does not name is padding.
    """

    segments: tuple[Segment, ...]
    rows: Tensor | None = None
    host_rows: int | None = None

    def __post_init__(self) -> None:
        ids = [segment.request_id for segment in self.segments]
        if len(set(ids)) != len(ids):
            raise ValueError(f"segments: expected each request once, got {ids}")
        if self.rows is None:
            return
        if not isinstance(self.rows, Tensor) or self.rows.dtype != torch.int64 or self.rows.shape != (self.tokens,):
            given = (list(self.rows.shape), self.rows.dtype) if isinstance(self.rows, Tensor) else self.rows
            raise ValueError(f"rows: expected an int64 tensor [{self.tokens}], got {given}")
        if self.host_rows is None or self.host_rows < self.tokens:
            raise ValueError(f"host_rows: expected at least the {self.tokens} rows of the tokens, got {self.host_rows}")

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)


class ActiveStep:
    """A step that has begun: `append`, `attend` and `observe_routing`, layer by layer.

    As a context manager it ends with its block, or is aborted by the exception that leaves it.
    """

    def __init__(
        self, cache: Steps, step_id: int, step: Step, requests: Sequence[Request], created: Sequence[int]
    ) -> None:
        self.step, self.step_id = step, step_id
        self.created = tuple(created)
        """Requests that the step has brought, which are gone if it is discarded."""
        self.requests = list(requests)
        self.undo: Undo = []
        self._cache: Steps = weakref.proxy(cache)  # which holds the step: no circle keeps its memory
        self._appended: set[int] = set()
        self._attended: set[int] = set()
        self._observed: set[int] = set()
        self._routing: dict[int, tuple[Tensor, Tensor]] = {}  # the newest, where dense layers inherit it
        self._open: int | None = None
        self._ended: str | None = None
        self._rows = [0]
        for segment in step.segments:
            self._rows.append(self._rows[-1] + segment.tokens)
        # Decode tokens are served together; the others one request after another.
        self._single = [i for i, s in enumerate(step.segments) if s.tokens == 1 and s.kind == "decode"]
        self._longer = [i for i in range(len(step.segments)) if i not in set(self._single)]
        at = [self._rows[i] for i in self._single]
        self._all_single = len(self._single) == len(step.segments)
        self._single_rows = cache.numbers.of(tuple(at)) if at and not self._all_single else None

    # ---- its end

    @property
    def complete(self) -> bool:
        """Whether every layer has been attended to, or the host has said that it has ended."""
        return self._ended == "" or (self._ended is None and len(self._attended) == self._cache.model.num_layers)

    @property
    def running(self) -> bool:
        """Whether it has begun and neither ended, nor been aborted, nor reached its last layer."""
        return self._ended is None and not self.complete

    @property
    def layers(self) -> list[int]:
        """Layers that have been appended to, ascending."""
        return sorted(self._appended)

    def end(self) -> None:
        """Says that the forward is over: what it has brought is kept when the next step begins. Once is enough.

        Raises:
            RuntimeError: some layers have no tokens; the step is discarded then.
        """
        if self._ended is not None:
            return
        missing = sorted(set(range(self._cache.model.num_layers)).difference(self._appended))
        if missing and self.step.segments:
            self.abort("it ended early")
            raise RuntimeError(
                f"step: ended before layers {', '.join(map(str, missing))} had its tokens; it is discarded"
            )
        self._ended = ""

    def abort(self, reason: str) -> None:
        """Says that the forward has failed: what it has brought is forgotten when the next begins. Once is enough."""
        if not self._ended:
            log.debug("step %d: aborted: %s", self.step_id, reason)
            self._ended = reason or "aborted"

    def __enter__(self) -> ActiveStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            self.abort(f"{type(error).__name__}: {error}")

    # ---- its layers

    @keeps_tensors
    def append(self, layer_id: int, k: Tensor, v: Tensor) -> None:
        """Adds the step's tokens to a layer.

        Args:
            k: [rows, num_query_groups, head_dim], post-RoPE, in the model's dtype; rows as the step says. v: the same
                with v_head_dim.

        Raises:
            ValueError, TypeError, IndexError: an argument that does not fit, or the layer has them already.
            RuntimeError: the step is over. Nothing has changed then.
        """
        cache = self._cache
        self._check(layer_id)
        if layer_id in self._appended:
            raise ValueError(f"layer_id: layer {layer_id} has this step's tokens already")
        if not self.step.segments:
            self._appended.add(layer_id)
            return
        k, v = self._packed("k", k), self._packed("v", v)
        checks.check_kv(k, v, cache.model, cache.runtime, cache.compressor.largest, not self._all_single)
        self.close()
        self._appended.add(layer_id)
        self._open = layer_id
        states = self._states(layer_id)
        if self._single:
            self._append_single([states[i] for i in self._single], self._of_single(k), self._of_single(v))
        for i in self._longer:
            first, last = self._rows[i], self._rows[i + 1]
            states[i].window.append(k[first:last], v[first:last])
            states[i].staged = last - first
        source = cache.model.label_source(layer_id)
        if source is not None and source != layer_id and source in self._routing:
            self._label(states, *self._routing[source])
        for listener in cache.listeners:
            listener.appended(self.step_id, layer_id, self.step, k, v)

    @keeps_tensors
    def attend(self, layer_id: int, q: Tensor, out: Tensor | None = None) -> AttendResult:
        """Attention of the step's tokens, causal by position, to everything that their requests hold in a layer, or to
        what attention.mode chooses.

        Args:
            q: [rows, num_attention_heads, head_dim], post-RoPE.
            out: where the output goes, [rows, num_attention_heads, v_head_dim] in q's dtype; None: a new tensor.

        Returns: AttendResult, rows as the step says; padding has out 0 and lse 0. Its missed figures are None where no
            token was left out.

        Raises:
            ValueError, TypeError, IndexError: an argument that does not fit, or the layer does not have the step's
                tokens. RuntimeError: the step is over.
        """
        cache, model = self._cache, self._cache.model
        self._check(layer_id)
        if layer_id not in self._appended:
            raise ValueError(f"layer_id: layer {layer_id} does not have this step's tokens yet, append comes first")
        if layer_id != self._open and self.step.segments:
            raise ValueError(f"layer_id: layer {layer_id} was attended to already; the step is in layer {self._open}")
        if not self.step.segments:
            self._attended.add(layer_id)
            return self._nothing(q, out)
        q = self._packed("q", q)
        tail = (model.num_attention_heads, model.head_dim)
        checks.check_tensor("q", q, tail, model.torch_dtype, cache.runtime.torch_device)
        checks.check_finite("q", q, cache.runtime, min(torch.finfo(q.dtype).max, LARGEST), not self._all_single)
        states = self._states(layer_id)
        result = self._attend_single(states, q) if self._all_single else self._attend_mixed(states, q)
        self._attended.add(layer_id)
        if model.label_source(layer_id) != layer_id:
            self.close()  # a dense layer has its labels already
        return self._unpacked(result, out)

    @keeps_tensors
    def observe_routing(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None:
        """Tells which experts the step's tokens went to in a layer. What is said first stands.

        Args:
            expert_ids: [rows, topk] integers. weights: [rows, topk], the gate's.

        Dense layers after an MoE layer inherit its routing for the same tokens.

        Raises:
            ValueError, TypeError, IndexError: what does not fit. RuntimeError: the step is over.
        """
        cache = self._cache
        self._check(layer_id)
        checks.check_has_experts(layer_id, cache.model)
        if layer_id in self._observed or not self.step.segments:
            return
        if layer_id not in self._appended:
            raise ValueError(f"layer_id: layer {layer_id} does not have this step's tokens yet, append comes first")
        ids, weights = self._packed("expert_ids", expert_ids), self._packed("weights", weights)
        given = checks.check_routing(ids, weights, cache.model, cache.runtime.torch_device, self.step.tokens)
        if given != self.step.tokens:
            raise ValueError(f"expert_ids: expected one row for each of {self.step.tokens} tokens, got {given}")
        self._observed.add(layer_id)
        if cache.model.moe_layers is not None:
            self._routing = {layer_id: (ids, weights)}
        if layer_id == self._open:
            self._label(self._states(layer_id), ids, weights)
            if layer_id in self._attended:
                self.close()

    # ---- inside

    def _check(self, layer_id: int) -> None:
        checks.check_layer(layer_id, self._cache.model)
        if self._ended is not None or self._cache.active is not self:
            raise RuntimeError(f"step: it is over ({self._ended or 'ended'}); begin the next one")

    def _states(self, layer_id: int) -> list[LayerState]:
        return [request.layers[layer_id] for request in self.requests]

    def close(self) -> None:
        """Seals what a prompt has pushed out of the window of the layer that is open; until then it waits raw."""
        if self._open is None:
            return
        states, self._open = self._states(self._open), None
        for i in self._longer:
            if states[i].window.is_waiting:
                self._cache.sealer.prepare(states[i], self.step_id)

    def _packed(self, name: str, x: Tensor) -> Tensor:
        """The step's rows of a host's tensor, in packed order."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        rows = self.step.tokens if self.step.rows is None else self.step.host_rows
        if x.dim() < 2 or x.shape[0] != rows:
            raise ValueError(f"{name}: expected {rows} rows, as the step says, got shape {list(x.shape)}")
        return x if self.step.rows is None else x.index_select(0, self.step.rows.to(x.device))

    def _unpacked(self, packed: AttendResult, out: Tensor | None) -> AttendResult:
        rows = self.step.rows
        if rows is not None:
            rows = rows.to(packed.lse.device)
            assert self.step.host_rows is not None
            host = self.step.host_rows

            def spread(x: Tensor | None) -> Tensor | None:
                return None if x is None else x.new_zeros(host, *x.shape[1:]).index_copy_(0, rows, x)

            packed = AttendResult(*(spread(x) for x in packed))  # type: ignore[arg-type]
        if out is None:
            return packed
        return packed._replace(out=out.copy_(packed.out))

    def _nothing(self, q: Tensor, out: Tensor | None) -> AttendResult:
        """Of a step without tokens: zeros."""
        shape = (*q.shape[:2], self._cache.model.value_dim)
        out = q.new_zeros(shape) if out is None else out.zero_()
        return AttendResult(out, q.new_zeros(q.shape[:2], dtype=torch.float32), None, None)

    def _of_single(self, x: Tensor) -> Tensor:
        return x if self._single_rows is None else x.index_select(0, self._single_rows)

    def _append_single(self, states: list[LayerState], k: Tensor, v: Tensor) -> None:
        windows = [state.window for state in states]
        if len(windows) == 1:
            windows[0].append(k, v)
        else:
            windows[0].buffer.append_each(windows, k, v, *self._places(windows))
        for state in states:
            state.staged = 1

    def _places(self, windows: list[LayerWindow], before: int = 0) -> tuple[Tensor, Tensor]:
        """Slots of windows, and places in them, `before` the end of what they hold."""
        numbers = self._cache.numbers
        slots = tuple(window.index for window in windows)
        return numbers.of(slots), numbers.of(tuple(window.in_buffer - before for window in windows))

    def _attend_single(self, states: list[LayerState], q: Tensor) -> AttendResult:
        """Every request has one decode token."""
        model = self._cache.model
        rows = q.unflatten(1, (model.num_query_groups, model.heads_per_group))
        (out, lse), missed = self._cache.attention.attend_decode(states, rows, self.undo)
        of_heads = (None, None) if missed is None else (m.flatten(1, 2) for m in missed)
        return AttendResult(out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2), *of_heads)

    def _attend_mixed(self, states: list[LayerState], q: Tensor) -> AttendResult:
        model, attention = self._cache.model, self._cache.attention
        out = q.new_empty(*q.shape[:2], model.value_dim)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        estimate = certificate = None
        if self._single_rows is not None:
            at = self._single_rows
            one = self._attend_single([states[i] for i in self._single], self._of_single(q))
            out[at], lse[at] = one.out, one.lse
            if one.missed_estimate is not None and one.missed_certificate is not None:
                estimate, certificate = torch.zeros_like(lse), torch.zeros_like(lse)
                estimate[at], certificate[at] = one.missed_estimate, one.missed_certificate
        for i in self._longer:
            first, last = self._rows[i], self._rows[i + 1]
            rows = group_rows(q[first:last], model.num_query_groups)
            partial = attention.attend_prompt(states[i], rows, last - first, self.undo).partial
            out[first:last], lse[first:last] = ungroup(partial.out, last - first), ungroup(partial.lse, last - first)
        return AttendResult(out, lse, estimate, certificate)

    def _label(self, states: list[LayerState], expert_ids: Tensor, weights: Tensor) -> None:
        if self._single:
            windows = [states[i].window for i in self._single]
            if len(windows) == 1:
                windows[0].label_newest(self._of_single(expert_ids), self._of_single(weights))
            else:
                places = self._places(windows, before=1)
                windows[0].buffer.label_each(*places, self._of_single(expert_ids), self._of_single(weights))
        for i in self._longer:
            first, last = self._rows[i], self._rows[i + 1]
            states[i].window.label_newest(expert_ids[first:last], weights[first:last])
