"""What a PiKVCache returns from reading."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Retrieved(NamedTuple):
    """Decoded tokens in position order: k [tokens, num_query_groups, head_dim], v with v_head_dim, positions [tokens]
    int64.
    """

    k: Tensor
    v: Tensor
    positions: Tensor


class AttendResult(NamedTuple):
    """Attention of some query tokens.

    out: [tokens, num_attention_heads, v_head_dim] in q's dtype. lse: [tokens, num_attention_heads] float32, over what
    was read. missed_estimate, missed_certificate: [tokens, num_attention_heads] float32, the share of each head's
    softmax, over what the cache stores, that was not read: expected, and never exceeded; None where every token was
    read. The output is off by at most 2 * missed * max|v|.
    """

    out: Tensor
    lse: Tensor
    missed_estimate: Tensor | None
    missed_certificate: Tensor | None
