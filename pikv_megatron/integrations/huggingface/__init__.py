"""Hugging Face transformers on PiKV: `generate` and forwards with a PiKVHFCache.

    cache = PiKVHFCache(model, "pikv.yaml")                       # attaches the model
    model.generate(ids, attention_mask=mask, past_key_values=cache)
    detach(model)

How a forward meets the cache is in `attention` and `cache`, what is read of a model in
`model`, what is refused in `support`.
"""

from __future__ import annotations

from pikv_megatron.integrations.huggingface.attach import attach, detach, is_attached
from pikv_megatron.integrations.huggingface.cache import PiKVHFCache
from pikv_megatron.integrations.huggingface.model import model_config

__all__ = ["PiKVHFCache", "attach", "detach", "is_attached", "model_config"]
