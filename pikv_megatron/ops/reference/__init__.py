"""Plain-torch truth of every op: what a kernel of the same name must compute. Written for clarity, then for CPU speed.

Shapes, used throughout (DESIGN 2): `blocks` stored blocks of `B` tokens; `G` KV heads (num_query_groups); `D` key and
`E` value channels; `R` query rows of one KV head: heads_per_group x query tokens, so that GQA's query heads are rows of
one matrix. A partial is (output normalised over the keys it saw, log-sum-exp of its logits), both float32.
"""

from pikv_megatron.ops.reference.attend import (
    CHUNK_BYTES,
    Partial,
    attend_at,
    attend_blocks,
    attend_logits,
    attend_masked,
    attend_ragged,
    attend_sliding,
    attend_tokens,
    attend_window,
    key_logits,
    merge_partials,
)
from pikv_megatron.ops.reference.quantize import (
    SMALLEST_SCALE,
    Keys,
    Values,
    append,
    decode_keys,
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
    score_blocks,
    score_tokens,
    token_importance,
    window_importance,
)
from pikv_megatron.ops.reference.select import attend_mass, rank_tokens, select_mass, select_topk, unread_mass

__all__ = [
    "CHUNK_BYTES",
    "SMALLEST_SCALE",
    "BlockScores",
    "Keys",
    "Partial",
    "TokenScores",
    "Values",
    "append",
    "attend_at",
    "attend_blocks",
    "attend_logits",
    "attend_masked",
    "attend_mass",
    "attend_ragged",
    "attend_sliding",
    "attend_tokens",
    "attend_window",
    "block_bounds",
    "decode_keys",
    "decode_values",
    "dequantize_block",
    "gather_tokens",
    "key_logits",
    "merge_partials",
    "pack",
    "prefetch",
    "quantize_block",
    "rank_tokens",
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
