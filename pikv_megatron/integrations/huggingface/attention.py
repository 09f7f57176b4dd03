"""PiKV's functions in transformers' interfaces: attention that stores a layer's new tokens and attends to all that it
holds, and a mask that is the 2D attention mask itself, since the cache knows by itself what is causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pikv_megatron.integrations.huggingface.current import NAME, Routed, Writing, current, eager
from pikv_megatron.integrations.huggingface.mla import expand_output, fold_query, join

REFUSED = ("softcap", "position_bias", "sinks", "indices", "block_indices", "output_attentions")
"""Arguments of attention functions that change what is computed, or ask for its weights."""


@eager
def pikv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stores the new tokens of a layer in the cache that `update` was called on, and attends.

    Args:
        query: [batch, heads, columns, head_dim]. key, value: the new columns', with KV heads.
        attention_mask: [batch, cached + new columns], 0 at pads; or None.
        s_aux: [heads], a logit per head that takes part in the softmax (gpt-oss).

    Returns:
        [batch, columns, heads, v_head_dim], zeros at pads; and None for the attention weights. Under autocast it is
        computed in the cache's dtype, and returned in autocast's, as by the model's own attention.

    Raises:
        RuntimeError: the model is not attached, or gradients are asked for.
        NotImplementedError: attention that PiKV does not do.
        ValueError: an attention mask that does not fit; PoolFullError: no memory left. Nothing has changed then.
    """
    cache, current.writing, current.routed = current.writing, None, None
    layer_id: int = module.layer_idx  # type: ignore[assignment]
    if cache is None and current.serving:
        raise NotImplementedError(
            f"layer {layer_id}: attends without having given keys to the cache just before; PiKV serves models with "
            "one attention per layer, of its own keys"
        )
    if cache is None:
        raise RuntimeError(
            f"attn_implementation: {NAME!r} is for forwards of an attached model (attach(model)) with a PiKVHFCache as "
            "past_key_values. Here the model is not attached, or a layer is called by itself, or another thread runs "
            "the model with a PiKVHFCache at the same time"
        )
    given = cache.start(layer_id)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError("past_key_values: no gradient flows through PiKV; run the model under torch.no_grad()")
    if dropout:
        raise NotImplementedError(f"dropout: layer {layer_id} has {dropout}; PiKV does not train, call model.eval()")
    for name in REFUSED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"{name}: layer {layer_id} asks for it; PiKV computes plain softmax attention")
    if scaling is not None and abs(scaling - cache.cache.model.scale) > 1e-6 * scaling:
        raise NotImplementedError(
            f"scaling: layer {layer_id} has {scaling}, the cache was made for {cache.cache.model.scale}"
        )
    device, dtype = query.device.type, cache.cache.model.torch_dtype
    if not torch.is_autocast_enabled(device):
        return _attend(cache, module, query, key, value, given, attention_mask, s_aux), None
    query, key, value = (x.to(dtype) for x in (query, key, value))
    given = given[0].to(dtype), given[1].to(dtype)
    with torch.autocast(device, enabled=False):
        out = _attend(cache, module, query, key, value, given, attention_mask, s_aux)
    return out.to(torch.get_autocast_dtype(device)), None


def _attend(
    cache: Writing,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: tuple[Tensor, Tensor],
    mask: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    """`pikv_attention` behind its checks. given: what `update` was given, which for MLA are latents."""
    layer_id: int = module.layer_idx
    if query.dtype != cache.cache.model.torch_dtype:
        raise TypeError(
            f"past_key_values: made for {cache.cache.model.torch_dtype}, the model now computes in {query.dtype}; make "
            "the cache once the model is in its dtype"
        )
    cache.plan(layer_id, query.shape[0], query.shape[2], mask)
    if cache.latents:
        key, value = join(*given)
        query = fold_query(module, query)
    cache.store(layer_id, key, value)
    out, lse = cache.attend(layer_id, query)
    if cache.latents:
        out = expand_output(module, out)
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux.float()).unsqueeze(-1).to(out.dtype)
    current.routed = Routed(cache, layer_id)
    return out.contiguous()  # AFMoE's code takes a view of it


def pikv_mask(
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Hands the 2D mask through.

    Raises:
        NotImplementedError: the model adds to the causal mask, or asks for another.
    """
    if allow_is_bidirectional_skip or not allow_is_causal_skip:
        raise NotImplementedError(
            "attention_mask: the model asks for more than a causal mask and padding; where generate makes a cache and "
            "masks of its own (cache_implementation), detach(model) first, or pass past_key_values=PiKVHFCache(model)"
        )
    return attention_mask


AttentionInterface.register(NAME, pikv_attention)
AttentionMaskInterface.register(NAME, pikv_mask)
