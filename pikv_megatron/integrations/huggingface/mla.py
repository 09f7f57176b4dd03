"""Multi-head latent attention (DeepSeek-V2 and -V3) on what transformers caches of it: one latent and one rotated key
per token, for all heads.

The projection that would expand a latent to a head's key is folded into that head's query, the one to its value is
applied to what attention returns; so latents are attended to as they are: one KV head, whose key is latent and
rotated key, and whose value is the latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ZERO_3 = (
    "attends to latents (MLA): their projection is folded into the query at every step, but ZeRO-3 partitions its "
    "weight; expected a zero_optimization.stage below 3"
)
"""Why such a model is not served."""


def caches_latents(module: Any) -> bool:
    """Whether an attention module hands its cache latents, and expands what it gets back."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_lora_rank")


def latent_shapes(module: Any) -> tuple[int, int, int, int, float]:
    """Query heads, KV heads, channels of a key and of a value, softmax scale, as the cache sees them.

    Raises:
        NotImplementedError: the projection cannot be folded.
    """
    if hasattr(module.kv_b_proj.weight, "ds_shape"):
        raise NotImplementedError(f"{type(module).__name__}: {ZERO_3}")
    weight, bias = module.kv_b_proj.weight, getattr(module.kv_b_proj, "bias", None)
    if not weight.is_floating_point() or weight.dim() != 2 or bias is not None:
        raise NotImplementedError("kv_b_proj: expected a plain weight without bias, which can be folded into the query")
    rank: int = module.kv_lora_rank
    heads = weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
    return heads, 1, rank + module.qk_rope_head_dim, rank, float(module.scaling)


def join(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of the one KV head, of what the module hands its cache: both [batch, 1, columns, channels]."""
    return torch.cat([latent, rotated], -1), latent


def fold_query(module: Any, query: Tensor) -> Tensor:
    """Queries that meet latents: [batch, heads, columns, qk_head_dim] to [..., kv_lora_rank + qk_rope_head_dim]."""
    plain, rotated = query.split([module.qk_nope_head_dim, query.shape[-1] - module.qk_nope_head_dim], -1)
    return torch.cat([plain @ _per_head(module)[:, : module.qk_nope_head_dim], rotated], -1)


def expand_output(module: Any, out: Tensor) -> Tensor:
    """What attention would have returned of values: [batch, columns, heads, kv_lora_rank] to [..., v_head_dim]."""
    to_value = _per_head(module)[:, module.qk_nope_head_dim :]
    return torch.einsum("bthr,hvr->bthv", out, to_value)


def _per_head(module: Any) -> Tensor:
    """kv_b_proj's weight as [heads, qk_nope_head_dim + v_head_dim, kv_lora_rank]."""
    return module.kv_b_proj.weight.unflatten(0, (-1, module.qk_nope_head_dim + module.v_head_dim))
