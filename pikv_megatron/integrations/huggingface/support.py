"""Which Hugging Face models PiKV serves, and the reasons why it does not serve the others.

Every check raises NotImplementedError with the name of what stands in the way, before anything has changed.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

SERVED_LAYERS = ("full_attention", "sliding_attention")

REFUSED: dict[str, str] = {
    "is_encoder_decoder": "an encoder-decoder model; expected a decoder",
    "add_cross_attention": "a model with cross attention; expected self-attention only",
    "alibi": "biases by distance (ALiBi); expected positions by RoPE, in the keys",
    "attn_logit_softcapping": "attention logits with a soft cap; expected plain softmax attention",
    "attention_chunk_size": "attention in chunks; expected layers that see every token or a sliding window",
    "kv_sharing_modes": "layers that share their keys and values; expected keys and values of its own in every layer",
}
"""Keys of a model's config that, where set, mean attention PiKV cannot do, with what they mean."""

REFUSED_TYPES: dict[str, str] = {
    "diffllama": "attends twice in every layer (differential attention); expected one attention per layer",
}
"""Model types whose config looks like that of a model that is served."""


def check_config(config: Any) -> None:
    """Checks a decoder's config (the text part of a multimodal one).

    Raises:
        NotImplementedError: PiKV cannot serve this model exactly; the message names why.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if name in REFUSED_TYPES:
        raise NotImplementedError(f"{name}: {REFUSED_TYPES[name]}")
    for key, meaning in REFUSED.items():
        value = getattr(config, key, None)
        if any(value) if isinstance(value, (list, tuple)) else value:  # a list has an entry per layer
            raise NotImplementedError(f"{name}: {key} is {value!r}, {meaning}")
    if getattr(config, "position_embedding_type", None) == "alibi":
        raise NotImplementedError(f"{name}: position_embedding_type is 'alibi', {REFUSED['alibi']}")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError(f"{name}: is_causal is False; expected causal attention")
    unknown = sorted(set(get_layer_types_and_kwargs(config)[0]) - set(SERVED_LAYERS))
    if unknown:
        raise NotImplementedError(f"{name}: layers of {', '.join(unknown)}; expected {' or '.join(SERVED_LAYERS)}")


def check_model(model: PreTrainedModel) -> None:
    """Checks a model's class, and its config by `check_config`.

    Raises:
        NotImplementedError: as `check_config`; or the class computes attention by itself.
    """
    check_config(model.config)
    check_config(model.config.get_text_config(decoder=True))
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(
            f"{type(model).__name__}: computes attention by itself; expected a model whose attention goes through "
            "transformers' AttentionInterface (_supports_attention_backend)"
        )
