"""Plain-torch truth of every op: what a kernel of the same name must compute. Written for clarity, then for CPU speed.

Shapes, used throughout (DESIGN 2): `blocks` stored blocks of `B` tokens; `G` KV heads (num_query_groups); `D` key and
`E` value channels; `R` query rows of one KV head: heads_per_group x query tokens, so that GQA's query heads are rows of
one matrix. A partial is (output normalised over the keys it saw, log-sum-exp of its logits), both float32.

What a decode step needs is done for its `n` requests at once, one of them or many: q is [n, G, R, D], and lists of
blocks or tokens are packed, the requests' runs one after another. `first_blocks` or `first_tokens`, [n + 1] int64 on
the device of the list, say where each run begins, and where the last one ends. A run may be empty.
"""

from pikv_megatron.ops.reference.attend import (
    CHUNK_BYTES,
    Partial,
    attend_at,
    attend_blocks,
    attend_decode,
    attend_logits,
    attend_masked,
    attend_ragged,
    attend_sliding,
    attend_tokens,
    attend_window,
    attend_windows,
    key_logits,
    merge_partials,
)
from pikv_megatron.ops.reference.quantize import (
    SMALLEST_SCALE,
    Keys,
    LowRank,
    Values,
    append,
    decode_keys,
    decode_low_rank,
    decode_values,
    dequantize_block,
    gather_tokens,
    pack,
    prefetch,
    quantize_block,
    round_half_down,
    round_half_up,
    unpack,
)
from pikv_megatron.ops.reference.score import (
    BlockScores,
    TokenScores,
    block_bounds,
    prompt_importance,
    score_blocks,
    score_tokens,
    token_importance,
    window_importance,
)
from pikv_megatron.ops.reference.select import (
    attend_mass,
    in_rank_order,
    rank_tokens,
    request_major,
    select_mass,
    select_topk,
    unread_mass,
)

__all__ = [
    "CHUNK_BYTES",
    "SMALLEST_SCALE",
    "BlockScores",
    "Keys",
    "LowRank",
    "Partial",
    "TokenScores",
    "Values",
    "append",
    "attend_at",
    "attend_blocks",
    "attend_decode",
    "attend_logits",
    "attend_masked",
    "attend_mass",
    "attend_ragged",
    "attend_sliding",
    "attend_tokens",
    "attend_window",
    "attend_windows",
    "block_bounds",
    "decode_keys",
    "decode_low_rank",
    "decode_values",
    "dequantize_block",
    "gather_tokens",
    "in_rank_order",
    "key_logits",
    "merge_partials",
    "pack",
    "prefetch",
    "prompt_importance",
    "quantize_block",
    "rank_tokens",
    "request_major",
    "round_half_down",
    "round_half_up",
    "score_blocks",
    "score_tokens",
    "select_mass",
    "select_topk",
    "token_importance",
    "unpack",
    "unread_mass",
    "window_importance",
]
