"""One decode query over a long KV cache: ours exact, quantised and selective, SDPA, Megatron-core's and transformers'.

Batch 1. `of bound`: the time of reading as many bytes once, in order, with the same threads (`sequential read`: the sum
of a tensor as large as the INT8 blocks), over the row's time; given for what reads everything. `x int8`: time of our
exact INT8 attention over the row's. `reader` is what the cache calls: the same top_k with its estimate and
certificate. Megatron's static context turns every cached key by RoPE at each step; its core attention alone is a row of
its own.

    python benchmarks/bench_attention.py [--context 32768] [--threads 1 2] [--rounds 9] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.nn.functional as F
from attention_hosts import megatron_calls, transformers_calls
from common import Mark, keep_memory, machine, medians, parse, parser, print_marks, print_table, quiet
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading import READERS
from pikv_megatron.reading.reader import Source, count_of

BLOCK, DIM = 32, 128
SHAPES = {"Mixtral-8x7B": (8, 4), "Qwen3-30B-A3B": (4, 8)}  # KV heads, query heads per KV head
CODECS = {"none": ((2, 0), 0), "int8": ((4, 4), 8), "int4": ((2, 2), 4)}  # planes of the keys, bits of the values
READ, PRUNE = 0.0625, 0.25
INT8 = "ours int8"
LOW_RANK = "ours int8, low rank 16"


class Work(NamedTuple):
    """Calls by name (None: not installed), and the bytes that those which read everything read."""

    calls: dict[str, Callable[[], object] | None]
    read: dict[str, int]


def main() -> None:
    made = parser(__doc__ or "", threads=(1, 2), rounds=9)
    made.add_argument("--context", type=int, default=32768)
    args = parse(made)
    quiet()
    keep_memory()
    print(f"{machine(args)}; {args.context:,} tokens; medians of {args.rounds} rounds")
    for name, (groups, heads) in SHAPES.items():
        torch.manual_seed(0)
        work = all_calls(groups, heads, args.context, args.device)
        print(f"\n{name}: {groups} KV heads of {DIM}, {heads} query heads each")
        columns = {threads: run(work, threads, args) for threads in args.threads}
        report(work, columns)
        if 1 in columns:
            print_marks(marks(columns[1], work))


def run(work: Work, threads: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every call with that many threads."""
    torch.set_num_threads(threads)
    calls = {name: call for name, call in work.calls.items() if call}
    with torch.inference_mode():
        for call in calls.values():
            call()
        return medians(calls, args, threads)


def report(work: Work, columns: dict[int, dict[str, float]]) -> None:
    rows: dict[str, list[str] | str] = dict.fromkeys(work.calls, "not installed")
    for name, call in work.calls.items():
        if call is None:
            continue
        rows[name] = []
        for seconds in columns.values():
            bound = f"{bound_of(name, seconds, work):.2f}" if name in work.read else ""
            rows[name] += [f"{seconds[name] * 1e3:.2f}", bound, f"{seconds[INT8] / seconds[name]:.2f}"]
    print_table([cell for n in columns for cell in (f"{n} thr, ms", "of bound", "x int8")], rows, group=3)


def bound_of(name: str, seconds: dict[str, float], work: Work) -> float:
    """Share of the read bound: the sequential read's time for this row's bytes over the row's time."""
    rate = work.read["sequential read"] / seconds["sequential read"]
    return work.read[name] / rate / seconds[name]


def marks(seconds: dict[str, float], work: Work) -> list[Mark]:
    int8 = seconds[INT8]
    best_sdpa = min(time for name, time in seconds.items() if name.startswith("SDPA fp32"))
    return [
        Mark("int8 attention, x the best SDPA fp32 form", ">=", 3, best_sdpa / int8),
        Mark("int8 attention, of the read bound", ">=", 0.6, bound_of(INT8, seconds, work)),
        Mark("int4 attention, x int8", ">=", 1.4, int8 / seconds["ours int4"]),
        *low_rank_marks(seconds),
        Mark("scoring and selecting blocks, of int8", "<=", 0.1, seconds["score and select blocks, int8"] / int8),
        Mark("high plane of all tokens, of int8", "<=", 0.25, seconds["score all tokens, int8"] / int8),
        Mark("top_k 6.25 %, x int8", ">=", 3, int8 / seconds["top_k 6.25 %, int8"]),
        Mark("top_k 6.25 % of pruned 25 %, x int8", ">=", 5, int8 / seconds["top_k 6.25 % of pruned 25 %, int8"]),
    ]


def low_rank_marks(seconds: dict[str, float]) -> list[Mark]:
    """None on a GPU, where it is not measured."""
    return [Mark(f"{n}, of int8", "<=", 1.2, seconds[n] / seconds[INT8]) for n in seconds if n == LOW_RANK]


def all_calls(groups: int, heads: int, context: int, device: torch.device) -> Work:
    """Everything over the same K and V; what should be equal is checked."""
    blocks = context // BLOCK
    k, v = (torch.randn(blocks, groups, BLOCK, DIM, device=device) for _ in range(2))
    q = torch.randn(groups, heads, DIM, device=device)
    dense_k, dense_v = (x.transpose(0, 1).reshape(1, groups, context, DIM) for x in (k, v))
    work = Work({}, {})
    sequential = torch.ones(source_bytes(store(k, v, "int8"), "int8") // 4, device=device)
    work.calls["sequential read"], work.read["sequential read"] = sequential.sum, sequential.nbytes

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for form, call in sdpa(q.to(dtype), dense_k.to(dtype), dense_v.to(dtype)).items():
            work.calls[f"SDPA {name}, {form}"] = call
            work.read[f"SDPA {name}, {form}"] = 2 * k.numel() * dtype.itemsize
    work.calls.update(transformers_calls(q, dense_k, dense_v))
    work.calls.update(megatron_calls(q, dense_k, dense_v))

    expected = F.scaled_dot_product_attention(q.unsqueeze(0), dense_k, dense_v).flatten()
    for codec in CODECS:
        source = store(k, v, codec)
        exact = partial(ops.attend_blocks, q, source.keys, source.values, source.block_ids, DIM**-0.5)
        work.calls[f"ours {codec}"] = exact
        work.read[f"ours {codec}"] = source_bytes(source, codec)
        if codec == "int8" and device.type == "cpu":
            name, parted = LOW_RANK, low_rank(source, 16)
            work.calls[name] = partial(ops.attend_blocks, q, parted.keys, parted.values, parted.block_ids, DIM**-0.5)
            work.read[name] = source_bytes(parted, codec)
        if codec != "none":
            work.calls.update({f"{name}, {codec}": call for name, call in selective(q, source).items()})
        error = float((exact().out.flatten() - expected).norm() / expected.norm())
        if not error <= {"none": 1e-4, "int8": 0.02, "int4": 0.25}[codec]:
            raise RuntimeError(f"{codec}: our attention is off by {error:.1e} of its length")
    for name, call in work.calls.items():
        if name.startswith(("SDPA fp32", "transformers", "Megatron core")) and call is not None:
            out = call()
            torch.testing.assert_close(out.flatten(), expected, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    return work


def store(k: Tensor, v: Tensor, codec: str) -> Source:
    """Pools [blocks, G, B, channels] as the cache would hold them, with an index beside raw keys."""
    planes, value_bits = CODECS[codec]
    keys = ops.Keys(k if codec == "none" else None, *ops.quantize_block(k, *planes, True), *planes)
    if value_bits:
        codes, _, scale, zero = ops.quantize_block(v, value_bits, 0, False)
        values = ops.Values(None, codes, scale, zero, value_bits)
    else:
        values = ops.Values(v, None, None, None, 0)
    ids, first = torch.arange(len(k), device=k.device), torch.tensor([0, len(k)], device=k.device)
    return Source(keys, values, ids, first, (len(k),), BLOCK)


def source_bytes(source: Source, codec: str) -> int:
    """Stored bytes that exact attention reads."""
    if codec == "none":
        return source.keys.raw.nbytes + source.values.raw.nbytes
    parts = [field for stored in (source.keys, source.values) for field in (*stored, *(stored.low_rank or ()))]
    return sum(field.nbytes for field in parts if isinstance(field, Tensor))


def low_rank(source: Source, rank: int) -> Source:
    """The same blocks with a low-rank part beside keys and values, whose bases are those of eight experts."""
    blocks, groups = len(source.block_ids), source.keys.high.shape[1]

    def part() -> ops.LowRank:
        codes, _, scale, zero = ops.quantize_block(0.1 * torch.randn(blocks, groups, BLOCK, rank), 8, 0, True)
        return ops.LowRank(codes, scale, zero, torch.randn(8, groups, rank, DIM), torch.randint(0, 8, (blocks,)))

    return source._replace(keys=source.keys._replace(low_rank=part()), values=source.values._replace(low_rank=part()))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """torch's fused attention with K and V [1, G, S, D] and the query heads of a group in two forms."""
    return {
        "enable_gqa": partial(F.scaled_dot_product_attention, q.view(1, -1, 1, DIM), k, v, enable_gqa=True),
        "group as query length": partial(F.scaled_dot_product_attention, q.unsqueeze(0), k, v),
    }


def selective(q: Tensor, source: Source) -> dict[str, Callable[[], object]]:
    """Scoring alone, and top_k with and without pruning of blocks, from the ops and as the cache calls it."""
    keys, values, ids = source.keys, source.values, source.block_ids
    scale = DIM**-0.5
    count = count_of(READ, len(ids) * BLOCK)
    raw_lse = torch.zeros(q.shape[:2], device=q.device)  # a window that has some say
    kept = count_of(PRUNE, len(ids))
    counts = (len(ids), kept, len(ids) * BLOCK, kept * BLOCK, count)
    rows, run_of = q.unsqueeze(0), {n: torch.tensor([0, n], device=q.device) for n in counts}

    def best_blocks() -> Tensor:
        bound, centre, _ = ops.score_blocks(rows, keys, ids, run_of[len(ids)], scale)
        return ids[(0.5 * (bound + centre)).softmax(-1).sum(1).topk(kept, dim=-1).indices]

    def best_tokens(block_ids: Tensor) -> ops.Partial:
        coarse = ops.score_tokens(rows, keys, block_ids, run_of[block_ids.shape[-1]], scale).coarse.flatten(2)
        tokens = run_of[coarse.shape[2]]
        index = ops.select_topk(ops.rank_tokens(coarse, raw_lse.unsqueeze(0), tokens), tokens, run_of[count], count)
        of_heads = block_ids if block_ids.dim() == 2 else block_ids.expand(len(q), -1)
        chosen = of_heads.gather(1, index // BLOCK)
        return ops.attend_tokens(rows, keys, values, chosen, index % BLOCK, run_of[count], scale)

    def as_cache(prune: float) -> Callable[[], object]:
        config = AttentionConfig(mode="top_k", read_fraction=READ, prune_fraction=prune)
        reader = READERS.pick(config.mode)(config)
        return partial(reader.read, rows, [source], raw_lse.unsqueeze(0), scale, DeviceNumbers(q.device))

    return {
        "score and select blocks": best_blocks,
        "score all tokens": partial(ops.score_tokens, rows, keys, ids, run_of[len(ids)], scale),
        "top_k 6.25 %": lambda: best_tokens(ids),
        "top_k 6.25 % of pruned 25 %": lambda: best_tokens(best_blocks()),
        "reader 6.25 %": as_cache(1.0),
        "reader 6.25 % of pruned 25 %": as_cache(PRUNE),
    }


if __name__ == "__main__":
    main()
