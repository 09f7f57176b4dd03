"""Ops of a decode step for several requests at once, each beside itself called for one request after another.

8 KV heads of 128, 4 query heads each, INT8, blocks of 32 tokens, a window of 160 raw tokens; the requests' lengths are
the context and half of it in turn. `of two threads` is the time with one thread over that with two.

    python benchmarks/bench_requests.py [--context 2048] [--requests 16] [--threads 1 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import Mark, keep_memory, machine, medians, parse, parser, print_marks, print_table, quiet
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.reading.reader import count_of

GROUPS, HEADS, DIM, BLOCK, WINDOW, READ = 8, 4, 128, 32, 160, 0.0625
SCALE = DIM**-0.5


def main() -> None:
    made = parser(__doc__ or "", threads=(1, 2), rounds=15)
    made.add_argument("--context", type=int, default=2048)
    made.add_argument("--requests", type=int, default=16)
    args = parse(made)
    quiet()
    keep_memory()
    torch.manual_seed(0)
    print(
        f"{machine(args)}; {args.requests} requests of {args.context:,} and {args.context // 2:,} tokens; medians of "
        f"{args.rounds} rounds"
    )
    pairs = calls(args)
    seconds = {threads: run(pairs, threads, args) for threads in args.threads}
    rows: dict[str, list[str] | str] = {
        name: [
            cell
            for of in seconds.values()
            for cell in (f"{of[name] * 1e3:.3f}", f"{of[f'{name}, apart'] * 1e3:.3f}", f"{ratio(of, name):.2f}")
        ]
        for name in pairs
    }
    print_table([cell for n in seconds for cell in (f"{n} thr, ms", "apart, ms", "x apart")], rows, group=3)
    marks = [
        Mark(f"{name}, {n} threads, x apart", ">=", 1, ratio(of, name)) for n, of in seconds.items() for name in pairs
    ]
    if {1, 2} <= set(seconds):
        marks += [Mark(f"{name}, 2 threads, x 1", ">=", 1.6, seconds[1][name] / seconds[2][name]) for name in pairs]
    print_marks(marks)


def ratio(seconds: dict[str, float], name: str) -> float:
    return seconds[f"{name}, apart"] / seconds[name]


def run(pairs: dict[str, list[Callable[[], object]]], threads: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every op, together and `, apart`, with that many threads."""
    torch.set_num_threads(threads)
    work: dict[str, Callable[[], object]] = {}
    for name, (together, *alone) in pairs.items():
        work[name], work[f"{name}, apart"] = together, lambda alone=alone: [call() for call in alone]
    with torch.inference_mode():
        for call in work.values():
            call()
        return medians(work, args, threads)


def calls(args: argparse.Namespace) -> dict[str, list[Callable[[], object]]]:
    """Every op for all requests, then for each of them."""
    n, device = args.requests, args.device
    counts = [args.context // BLOCK // (1 + i % 2) for i in range(n)]
    keys, values = pool(sum(counts), device)
    q, ids = torch.randn(n, GROUPS, HEADS, DIM, device=device), torch.randperm(sum(counts), device=device)
    buffers = [torch.randn(n, GROUPS, WINDOW + BLOCK, DIM, device=device) for _ in range(2)]
    whole = of_run(q, ids, starts(counts, device), keys, values, buffers, torch.arange(n, device=device))
    alone = []
    for i, run_ids in enumerate(ids.split(counts)):
        slot = torch.tensor([i], device=device)
        alone.append(of_run(q[i : i + 1], run_ids, starts([counts[i]], device), keys, values, buffers, slot))
    return {name: [whole[name], *(one[name] for one in alone)] for name in whole}


def starts(counts: list[int], device: torch.device) -> Tensor:
    """Where runs of these lengths begin, and the last one's end."""
    return torch.tensor([0, *counts], device=device).cumsum(0)


def pool(blocks: int, device: torch.device) -> tuple[ops.Keys, ops.Values]:
    k, v = (torch.randn(blocks, GROUPS, BLOCK, DIM, device=device) for _ in range(2))
    codes, _, scale, zero = ops.quantize_block(v, 8, 0, False)
    return ops.Keys(None, *ops.quantize_block(k, 4, 4, True), 4, 4), ops.Values(None, codes, scale, zero, 8)


def of_run(
    q: Tensor, ids: Tensor, first: Tensor, keys: ops.Keys, values: ops.Values, buffers: list[Tensor], slots: Tensor
) -> dict[str, Callable[[], object]]:
    """The ops over some requests' blocks and windows."""
    raw = (*buffers, slots, torch.zeros_like(slots), torch.full_like(slots, WINDOW))
    raw_lse = ops.attend_windows(q, *raw, SCALE).lse
    counts = [count_of(READ, blocks * BLOCK) for blocks in first.diff().tolist()]
    tokens, first_chosen, chosen = first * BLOCK, starts(counts, ids.device), sum(counts)
    scores = ops.score_tokens(q, keys, ids, first, SCALE)
    coarse = scores.coarse.flatten(2)
    rank = ops.rank_tokens(coarse, raw_lse, tokens)
    index = ops.select_topk(rank, tokens, first_chosen, chosen)
    read = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, index, True)
    lse = ops.attend_decode(q, *raw, keys, values, ids, first, SCALE).lse
    return {
        "attend_decode": partial(ops.attend_decode, q, *raw, keys, values, ids, first, SCALE),
        "attend_windows": partial(ops.attend_windows, q, *raw, SCALE),
        "score_blocks": partial(ops.score_blocks, q, keys, ids, first, SCALE),
        "score_tokens": partial(ops.score_tokens, q, keys, ids, first, SCALE),
        "rank_tokens": partial(ops.rank_tokens, coarse, raw_lse, tokens),
        "select_topk": partial(ops.select_topk, rank, tokens, first_chosen, chosen),
        "attend_tokens": partial(
            ops.attend_tokens, q, keys, values, ids[index // BLOCK], index % BLOCK, first_chosen, SCALE
        ),
        "unread_mass": partial(ops.unread_mass, scores, 0.95, read, first),
        "attend_mass": partial(ops.attend_mass, q, [(keys, values, ids, first)], [scores], 0.95, raw_lse, 0.05, SCALE),
        "key_logits": partial(ops.key_logits, q, keys, ids, first, SCALE),
        "token_importance": partial(ops.token_importance, q, lse, keys, ids, first, SCALE),
        "window_importance": partial(ops.window_importance, q, lse, buffers[0], *raw[2:], SCALE),
    }


if __name__ == "__main__":
    main()
