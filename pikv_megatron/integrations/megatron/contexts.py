"""Megatron-core's two inference contexts on a `PiKVCache`: what the hooked layers talk to.

A context knows which requests a step's tokens belong to and owns the cache; the hooks (`hooks`) know the
layers. Neither context ever allocates Megatron's full-precision KV memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pikv_megatron.cache.cache import PiKVCache
from pikv_megatron.cache.events import CollectiveEvents
from pikv_megatron.cache.step import ActiveStep, Segment, SegmentKind, Step
from pikv_megatron.config import ModelConfig, RuntimeConfig, Source, resolve
from pikv_megatron.integrations.megatron.support import check_config, check_inference_config

ModelSource = ModelConfig | Source
RuntimeSource = RuntimeConfig | Source | None


class PiKVContext:
    """What both contexts share: the cache, and the step that a forward is to it."""

    cache: PiKVCache
    model_cfg: ModelConfig
    runtime_cfg: RuntimeConfig
    collective_listeners: list[CollectiveEvents]
    """Told when the tokens of a MoE layer leave for their experts, and come back."""
    _active: ActiveStep
    serving: bool = False
    """True while a hooked attention layer runs: how a model that is not hooked is told from one that is."""

    def _open(self, model_cfg: ModelSource | None, runtime_cfg: RuntimeSource) -> None:
        self.model_cfg, self.runtime_cfg = resolve(model_cfg, runtime_cfg)
        self.cache = PiKVCache(self.model_cfg, self.runtime_cfg)
        self.collective_listeners = []

    def step(self, sequence: int, batch: int) -> Step:
        """The step that a forward over tensors [sequence, batch, ...] is."""
        raise NotImplementedError

    def begin(self, sequence: int, batch: int) -> None:
        """A forward comes to its first layer. Raises PoolFullError where it does not fit; nothing has changed then."""
        self._active = self.cache.begin(self.step(sequence, batch))

    def abort(self, reason: str) -> None:
        """The forward has failed: nothing of it stays."""
        self._active.abort(reason)

    def attend(self, layer_id: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends a step's new keys and values and attends to everything its requests hold.

        Args:
            layer_id: Zero-based attention layer.
            query: [sequence, batch, num_attention_heads, head_dim], after RoPE.
            key: [sequence, batch, num_query_groups, head_dim], after RoPE.
            value: [sequence, batch, num_query_groups, v_head_dim].

        Returns:
            [sequence, batch, num_attention_heads, v_head_dim]; rows of padding are zero.

        Raises:
            RuntimeError: `query` asks for gradients. What the cache refuses is its own error.
        """
        if query.requires_grad:
            raise RuntimeError("gradients do not pass through a PiKV cache: run the model under torch.no_grad()")
        self._active.append(layer_id, key.flatten(0, 1), value.flatten(0, 1))
        out = self._active.attend(layer_id, query.flatten(0, 1)).out
        return out.unflatten(0, query.shape[:2])

    def observe(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None:
        """Hands the router's choice for the step's tokens to the cache.

        Args:
            layer_id: Zero-based attention layer whose tokens were routed.
            expert_ids: [sequence * batch, topk] int64, sequence-major as Megatron flattens its hidden states.
            weights: [sequence * batch, topk] gate weights.

        Raises:
            RuntimeError: the router saw another number of tokens than attention did.
        """
        step = self._active.step
        rows = step.tokens if step.rows is None else step.host_rows
        if step.segments and expert_ids.shape[0] != rows:
            raise RuntimeError(
                f"layer {layer_id}: the router saw {expert_ids.shape[0]} tokens, attention saw {rows}; "
                "PiKV needs the same tokens in both on every rank"
            )
        self._active.observe_routing(layer_id, expert_ids, weights)

    def release_all(self) -> None:
        """Forgets every request."""
        for request_id in self.cache.requests():
            self.cache.release(request_id)


class _NoStockMemory(dict[int, Any]):
    """Stands for `key_value_memory_dict`, which stays empty. Only attention without hooks asks what is in it, before it
    allocates (attention.py:601).
    """

    def __contains__(self, key: object) -> bool:
        raise RuntimeError(
            f"attention layer {key} is not hooked and asks for Megatron's own KV memory: build the model with "
            "layer_spec(config) or call attach(model) before it runs with a PiKV context"
        )


class PiKVInferenceContext(PiKVContext, StaticInferenceContext):
    """Static batching on PiKV: row b of the batch is request b (counted from `batch_size_offset`).

    Args:
        model_cfg: The model's shapes: `ModelConfig`, dict or YAML path; `model_config(...)` makes one from Megatron's.
        runtime_cfg: `RuntimeConfig`, dict or YAML path; None for the defaults.
        max_batch_size: Rows at most; None for `runtime_cfg.max_requests`.
        max_sequence_length: Tokens per row at most, prompt and answer; None for what the cache can hold
            (`capacity_tokens`: `max_tokens`, or what fits the tiers' bytes). Megatron computes rotary angles up to it.
        model_config: Megatron's `TransformerConfig`, in place of `model_cfg`.

    Raises:
        TypeError: both of `model_cfg` and `model_config`, or neither.
        ValueError: `max_batch_size` is not in 1 .. `max_requests`, `max_sequence_length` not in 1 .. `capacity_tokens`.
    """

    def __init__(
        self,
        model_cfg: ModelSource | None = None,
        runtime_cfg: RuntimeSource = None,
        max_batch_size: int | None = None,
        max_sequence_length: int | None = None,
        *,
        model_config: TransformerConfig | None = None,
    ) -> None:
        if (model_cfg is None) == (model_config is None):
            raise TypeError("expected one of model_cfg (PiKV's) and model_config (Megatron's TransformerConfig)")
        if model_config is not None:
            check_config(model_config)
            model_cfg = ModelConfig.from_megatron(model_config)
        self._open(model_cfg, runtime_cfg)
        requests, tokens = self.runtime_cfg.max_requests, self.cache.capacity_tokens
        max_batch_size = requests if max_batch_size is None else max_batch_size
        max_sequence_length = tokens if max_sequence_length is None else max_sequence_length
        for name, value, limit, limit_name in (
            ("max_batch_size", max_batch_size, requests, "runtime.max_requests"),
            ("max_sequence_length", max_sequence_length, tokens, "the cache's capacity_tokens"),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"{name}: expected 1 .. {limit_name} ({limit}), got {value}")
        StaticInferenceContext.__init__(self, max_batch_size, max_sequence_length)
        self.key_value_memory_dict = _NoStockMemory()
        self._checked_mask: Tensor | None = None

    def step(self, sequence: int, batch: int) -> Step:
        """Row b is request `batch_size_offset` + b. Raises ValueError where the step is larger than the context."""
        first = self.batch_size_offset
        if first + batch > self.max_batch_size:
            raise ValueError(f"batch: expected at most {self.max_batch_size} rows, got {first + batch}")
        start = self.sequence_len_offset
        if start + sequence > self.max_sequence_length:
            raise ValueError(
                f"sequence: expected at most max_sequence_length ({self.max_sequence_length}) tokens, "
                f"got {start} in the cache and {sequence} new ones"
            )
        kind: SegmentKind = "decode" if sequence == 1 and start else "prompt"
        segments = tuple(Segment(first + row, start, sequence, kind) for row in range(batch))
        if sequence == 1 or batch == 1:
            return Step(segments)
        rows = torch.arange(sequence * batch).view(sequence, batch).t().flatten()  # Megatron's tensors go by position
        return Step(segments, rows.to(self.runtime_cfg.torch_device), sequence * batch)

    def check_mask(self, mask: Tensor | None, sequence: int) -> None:
        """Attention here is causal by position; any other mask would be ignored, so it is refused.

        Args:
            mask: Megatron's boolean mask [.., sequence, sequence or all tokens], True where masked; None: causal.
            sequence: New tokens in this step. With one of them Megatron itself ignores the mask.
        """
        if mask is None or sequence == 1 or mask is self._checked_mask:
            return
        start = self.sequence_len_offset
        causal = torch.ones(sequence, start + sequence, dtype=torch.bool, device=mask.device).triu(start + 1)
        if mask.shape[-1] == sequence:
            causal = causal[:, start:]
        if mask.shape[-2:] != causal.shape or not torch.equal(mask.bool(), causal.expand_as(mask)):
            raise NotImplementedError(
                f"attention_mask: PiKV serves causal attention, got a mask of shape {list(mask.shape)} that is not "
                "causal; pad prompts on the right or use the dynamic context"
            )
        self._checked_mask = mask

    def swap_key_value_dict(self, batch_idx: Any) -> None:
        raise NotImplementedError("swap_key_value_dict: PiKV does not reorder the rows of a batch (beam search)")

    def reset(self) -> None:
        """Starts a new batch: releases every request."""
        StaticInferenceContext.reset(self)
        self._checked_mask = None
        self.release_all()

    def __str__(self) -> str:
        return (
            f"{type(self).__name__}(max_batch_size={self.max_batch_size}, "
            f"max_sequence_length={self.max_sequence_length}, sequence_len_offset={self.sequence_len_offset}, "
            f"requests={self.cache.requests()})"
        )


class PiKVDynamicInferenceContext(PiKVContext, DynamicInferenceContext):
    """Continuous batching on PiKV. The engine's request ids are the cache's.

    Megatron keeps its books (which request may start, pause, or must go) in blocks of `block_size_tokens`; here they
    count PiKV's capacity, `cache.capacity_tokens`, and `buffer_size_gb` is not used. A paused request keeps its cache;
    one that finishes or is evicted is released at once, and an evicted one that comes back is prefilled again.

    Args:
        transformer_config: The model's Megatron `TransformerConfig`. Stock's name for it, `model_config`, will do too.
        inference_config: Megatron's `InferenceConfig`; it is copied. `max_requests` defaults to the runtime's.
        runtime_cfg: `RuntimeConfig`, dict or YAML path; None for the defaults.
        model_cfg: For a model whose layers the `TransformerConfig` does not describe: `model_config(model)`.

    Raises:
        NotImplementedError: `inference_config` asks for what PiKV does not serve; the message names it.
        TypeError: no `TransformerConfig`, or no `InferenceConfig`.
        ValueError: `max_requests` or `max_tokens` do not fit together; the message names them.
    """

    def __init__(
        self,
        transformer_config: TransformerConfig | None = None,
        inference_config: InferenceConfig | None = None,
        runtime_cfg: RuntimeSource = None,
        model_cfg: ModelSource | None = None,
        *,
        model_config: TransformerConfig | None = None,
    ) -> None:
        if transformer_config is not None and model_config is not None:
            raise TypeError("transformer_config and model_config are two names of one argument, got both")
        transformer_config = model_config if transformer_config is None else transformer_config
        for name, value, kind in (
            ("model_config", transformer_config, TransformerConfig),
            ("inference_config", inference_config, InferenceConfig),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected Megatron's {kind.__name__}, got {type(value).__name__}")
        assert transformer_config is not None and inference_config is not None
        check_config(transformer_config)
        check_inference_config(inference_config)
        model = ModelConfig.from_megatron(transformer_config) if model_cfg is None else model_cfg
        self._segments: tuple[Segment, ...] = ()
        self._open(model, runtime_cfg)
        books = _books(transformer_config, inference_config, self.cache)
        DynamicInferenceContext.__init__(self, transformer_config, books)
        capacity = self.cache.capacity_tokens
        if self.kv_block_allocator.total_count != capacity // self.block_size_tokens + 1:
            raise RuntimeError(
                f"Megatron made {self.kv_block_allocator.total_count} blocks of PiKV's {capacity} tokens; "
                "this version of Megatron-core sizes its blocks in a way that PiKV does not know"
            )

    def _allocate_memory_buffer(self) -> None:
        self.memory_buffer = None  # stock: [2, layers, blocks, block_size, kv_heads, head_dim] in full precision

    def initialize_attention_state(self, **kwargs: Any) -> Any:
        done = DynamicInferenceContext.initialize_attention_state(self, **kwargs)
        self._segments = () if kwargs.get("is_expert_parallel_dummy_cuda_graph_step") else self._plan()
        return done

    def _plan(self) -> tuple[Segment, ...]:
        """This step's requests in the order of their packed tokens, from Megatron's books, which are in host memory."""
        active = slice(self.paused_request_count, self.total_request_count)
        columns = (self.request_ids, self.request_kv_length_offsets, self.request_query_lengths)
        rows = zip(*(column[active].tolist() for column in columns), strict=True)
        return tuple(
            Segment(request_id, start, tokens, "decode" if tokens == 1 and start else "prompt")
            for request_id, start, tokens in rows
        )

    def step(self, sequence: int, batch: int) -> Step:
        """The requests that Megatron has scheduled, packed, with padding behind them."""
        tokens = sum(segment.tokens for segment in self._segments)
        if tokens == sequence or not tokens:
            return Step(self._segments)
        return Step(self._segments, torch.arange(tokens, device=self.runtime_cfg.torch_device), sequence)

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Called by attention with the new keys after RoPE; they reach the cache with the queries, in `attend`."""
        if not self.serving:
            raise RuntimeError(
                f"attention layer {layer_number} is not hooked: build the model with layer_spec(config) or call "
                "attach(model) before it runs with a PiKV context"
            )
        self._new = key, value

    def key_value_cache(self, layer_number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The step's new keys and values, in place of pointers into the stock buffer, and no block table."""
        key, value = self._new
        del self._new
        return key, value, None

    def release_memory_blocks_from_request_indexes(self, request_indexes: Tensor) -> None:
        gone = set(self.request_ids[request_indexes].tolist())
        DynamicInferenceContext.release_memory_blocks_from_request_indexes(self, request_indexes)
        for request_id in gone.intersection(self.cache.requests()):
            self.cache.release(request_id)

    def reset_metadata(self, *args: Any, **kwargs: Any) -> None:
        DynamicInferenceContext.reset_metadata(self, *args, **kwargs)
        self._segments = ()
        self.release_all()


def _books(
    transformer_config: TransformerConfig, inference_config: InferenceConfig, cache: PiKVCache
) -> InferenceConfig:
    """A copy of `inference_config` under which Megatron counts exactly PiKV's capacity in its blocks."""
    model, runtime, capacity = cache.model, cache.runtime, cache.capacity_tokens
    books = copy.copy(inference_config)
    tensor_parallel = transformer_config.tensor_model_parallel_size
    # A prompt that is prefilled in chunks is not among Megatron's counted requests between two of its chunks.
    uncounted = 1 if books.enable_chunked_prefill else 0
    if books.max_requests is None:
        books.max_requests = max(1, (runtime.max_requests - uncounted) // tensor_parallel) * tensor_parallel
    live = books.max_requests + uncounted
    if live > runtime.max_requests:
        raise ValueError(
            f"inference_config.max_requests: {live} requests can be live at once (a prompt between two chunks counts), "
            f"expected at most runtime.max_requests ({runtime.max_requests})"
        )
    blocks = capacity // books.block_size_tokens
    if blocks < 1:
        raise ValueError(
            f"inference_config.block_size_tokens: expected at most the cache's capacity_tokens ({capacity}), "
            f"got {books.block_size_tokens}"
        )
    token_bytes = 2 * model.num_query_groups * model.head_dim * transformer_config.params_dtype.itemsize
    block_bytes = token_bytes * books.block_size_tokens * transformer_config.num_layers
    # One block more for Megatron's dummy, and half a one against rounding down.
    buffer_gb = (blocks + 1.5) * block_bytes / 1024**3
    if books.paused_buffer_size_gb is not None:  # a part of the buffer, so it shrinks or grows with it
        books.paused_buffer_size_gb *= buffer_gb / books.buffer_size_gb
    books.buffer_size_gb = buffer_gb
    return books
