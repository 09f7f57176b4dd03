"""Every compiled op under torch.library.opcheck: its schema says what it writes, its fake kernel agrees with it."""

from __future__ import annotations

import pytest
import torch
from stored import random_part, random_store

import pikv_megatron.ops
from pikv_megatron.ops import kernels

G, R, B, D, E, N = 2, 3, 16, 32, 16, 5


def _arguments() -> dict[str, tuple]:
    """Arguments of every op, outputs included."""
    one, q, ids = torch.randn(G, R, D), torch.randn(2, G, R, D), torch.tensor([4, 0, 2])
    first_blocks, first_tokens, first_chosen = (torch.tensor([0, 1, 3]) * x for x in (1, B, 2))
    coded, held = (random_store(N, G, B, D, E, codec) for codec in ("int8", "none"))
    k_part, v_part = (list(random_part(N, G, B, channels, 8, 2)) for channels in (D, E))
    out, lse = torch.empty(2, G, R, E), torch.empty(2, G, R)
    coarse, radius, spread = torch.randn(G, R, 3, B), torch.rand(G, R, 3), torch.rand(G, R, 3)
    high, low = torch.empty(N, G, B, D // 2, dtype=torch.uint8), torch.empty(N, G, B, D // 2, dtype=torch.uint8)
    scale, zero = torch.empty(N, G, D, dtype=torch.float16), torch.empty(N, G, D, dtype=torch.float16)
    tokens = torch.randint(0, N, (G, 3 * B))
    read = torch.empty(G, 3 * B, dtype=torch.bool)
    new_k, new_v = torch.randn(3, G, B, D), torch.randn(3, G, B, E)
    window_k, window_v = torch.randn(4, G, 20, D), torch.randn(4, G, 20, E)
    raw = (torch.tensor([3, 1]), torch.tensor([0, 4]), torch.tensor([17, 4]))
    places, queries = torch.arange(20), torch.tensor([17, 18, 19])
    stored, logits = (*coded.keys[:-1], *coded.values[:-1], k_part, v_part), torch.randn(G, R, 3 * B)
    return {
        "quantize_block_out": (held.keys.raw, 4, 4, True, high, low, scale, zero),
        "dequantize_block_out": (*coded.keys[1:5], 4, 4, True, torch.empty(N, G, B, D)),
        "append_out": (new_k, new_v, ids, *coded.keys[:-1], *coded.values[:-1]),
        "prefetch": (coded.keys.high, ids),
        "attend_blocks_out": (one, *stored, ids, 0.2, None, None, out[0], lse[0]),
        "attend_ragged_out": (q, *stored, ids, first_blocks, 0.2, out, lse),
        "attend_decode_out": (q, window_k, window_v, *raw, *stored, ids, first_blocks, 0.2, out, lse),
        "attend_windows_out": (q, window_k, window_v, *raw, 0.2, out, lse),
        "attend_tokens_out": (
            q,
            *held.keys[:-1],
            *held.values[:-1],
            k_part,
            [],
            tokens,
            tokens,
            first_tokens,
            0.2,
            None,
            out,
            lse,
        ),
        "attend_mass_out": (
            q,
            *stored[:-2],
            ids,
            first_blocks,
            coarse,
            0.9,
            radius,
            torch.zeros(2, G, R),
            0.1,
            0.2,
            out,
            lse,
            read,
        ),
        "attend_at_out": (one, window_k[0], window_v[0], places, queries, 0.2, out[0], lse[0]),
        "merge_partials_out": (torch.randn(4, G, R, E), torch.randn(4, G, R), out[0], lse[0]),
        "score_blocks_out": (
            q,
            *coded.keys[3:5],
            8,
            ids,
            first_blocks,
            0.2,
            *(torch.empty(G, R, 3) for _ in range(3)),
        ),
        "score_tokens_out": (
            q,
            None,
            coded.keys.high,
            *coded.keys[3:5],
            4,
            4,
            ids,
            first_blocks,
            0.2,
            coarse,
            radius,
            spread,
        ),
        "key_logits_out": (q, *coded.keys[:-1], k_part, ids, first_blocks, 0.2, torch.empty(G, R, 3 * B)),
        "token_importance_out": (q, lse, *coded.keys[:-1], [], ids, first_blocks, 0.2, torch.empty(3, B)),
        "window_importance_out": (q, torch.zeros(2, G, R), window_k, *raw, 0.2, torch.empty(2, 20)),
        "prompt_importance_out": (one, torch.zeros(G, R), window_k[0], 3, 0.2, torch.empty(20)),
        "rank_tokens_out": (logits, torch.randn(2, G, R), first_tokens, torch.empty(G, 3 * B)),
        "select_topk_out": (logits[:, 0].contiguous(), first_tokens, first_chosen, torch.empty(G, 6).long()),
        "select_mass_out": (
            torch.arange(3 * B).expand(G, -1).contiguous(),
            logits,
            logits.clone(),
            torch.zeros(2, G, R),
            first_tokens,
            0.2,
            read,
        ),
        "unread_mass_out": (
            coarse,
            0.9,
            spread,
            radius,
            torch.zeros(G, 3 * B, dtype=torch.bool),
            first_blocks,
            lse,
            lse.clone(),
        ),
    }


ARGUMENTS = _arguments()


def test_no_op_is_left_out():
    assert set(ARGUMENTS) == {f"{name}_out" for name in kernels.OUT_OPS} | {"prefetch"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    if pikv_megatron.ops.kernel_set is None:
        pytest.skip("the compiled ops are not built")
    arguments = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in ARGUMENTS[name])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.pikv, name), arguments, test_utils=checks)
