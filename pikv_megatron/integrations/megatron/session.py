"""A forward loop over a Megatron-core model and an inference context, stock or PiKV's: a prompt, then token by token.

Engines batch and schedule; this is for one batch of equally long sequences where one wants the logits: the command
line, benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from pikv_megatron.integrations.layer_hooks import after_each
from pikv_megatron.integrations.megatron.contexts import PiKVInferenceContext


class Session:
    """Sequences that grow together in a context.

    Args:
        model: with `layer_spec(config)` or attached where the context is PiKV's.
        context: fresh or reset. Stock Megatron's takes the prompt in one piece; PiKV's in any.
    """

    def __init__(self, model: nn.Module, context: StaticInferenceContext) -> None:
        self.model, self.context = model, context

    @classmethod
    def on_stock_cache(cls, model: nn.Module, batch: int, tokens: int) -> Session:
        """On Megatron's own cache, for `batch` sequences of up to `tokens` tokens; a hooked model will do as well."""
        return cls(model, StaticInferenceContext(batch, tokens))

    @property
    def length(self) -> int:
        """Tokens per sequence so far."""
        return int(self.context.sequence_len_offset)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Appends tokens [batch, tokens]; returns the logits after the last one, [batch, vocabulary] float32, where the
        model is.
        """
        tokens = tokens.to(next(self.model.parameters()).device)
        batch, count = tokens.shape
        stock = not isinstance(self.context, PiKVInferenceContext)
        if stock and self.length and count > 1:
            raise ValueError(
                f"tokens: Megatron's static context takes one token at a time after the prompt, got {count}"
            )
        if self.length:
            self.context.enable_decode_mode()
        else:
            self.context.enable_prefill_mode()
        positions = torch.arange(self.length, self.length + count, device=tokens.device).expand(batch, -1)
        mask = None
        if stock and count > 1:
            mask = torch.ones(1, 1, count, count, dtype=torch.bool, device=tokens.device).triu(1)
        logits = self.model(tokens, positions, mask, inference_context=self.context)
        self.context.increment_sequence_len_offset(count)
        return logits[:, -1].float()

    @property
    def bytes_held(self) -> int:
        """Bytes of K and V that the context holds for its sequences, from their storage."""
        if isinstance(self.context, PiKVInferenceContext):
            return int(self.context.cache.stats()["bytes_held"])
        pairs = self.context.key_value_memory_dict.values()
        return sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)

    def on_layer_done(self, callback: Callable[[], object]) -> AbstractContextManager[int]:
        """Calls `callback` after each layer of a forward pass, for progress bars; yields how many there are."""
        layers = [module for module in self.model.modules() if isinstance(module, TransformerLayer)]
        return after_each(layers, callback)
