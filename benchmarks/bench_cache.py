"""What the cache does around attention, each beside what it stands for: appending blocks, choosing tokens, batches.

8 KV heads of 128, 4 query heads each, INT8, blocks of 32 tokens. `append` encodes new blocks into the pool, its peer
encodes them first and scatters then. `select_topk` of 6.25 % of the tokens stands beside torch.topk. `attend_tokens`
over them stands beside itself behind a `prefetch` of their blocks: below 1 that would pay. A decode
step of several requests is one Step, in every mode; its peer is a Step for each of them.

    python benchmarks/bench_cache.py [--context 32768] [--step-context 4096] [--threads 1 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import Mark, keep_memory, machine, medians, parse, parser, print_marks, print_table, quiet
from torch import Tensor

from pikv_megatron import PiKVCache, Segment, Step, ops
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig, resolve
from pikv_megatron.reading.reader import count_of

GROUPS, HEADS, DIM, BLOCK, EXPERTS, TOPK = 8, 4, 128, 32, 8, 2
READ = 0.0625
APPENDED, BATCHES = (1, 32), (4, 16)
MODES = {"exact": {}, "top_k": {"mode": "top_k", "read_fraction": READ}, "mass": {"mode": "mass"}}
Pair = tuple[Callable[[], object], Callable[[], object]]
"""Ours, and what it is compared with."""


def main() -> None:
    made = parser(__doc__ or "", threads=(1, 2), rounds=15)
    made.add_argument("--context", type=int, default=32768)
    made.add_argument("--step-context", type=int, default=4096, help="tokens of each request in a decode step")
    args = parse(made)
    quiet()
    keep_memory()
    torch.manual_seed(0)
    print(f"{machine(args)}; {args.context:,} tokens, steps at {args.step_context:,}; medians of {args.rounds} rounds")
    seconds = {threads: run(threads, args) for threads in args.threads}
    first = next(iter(seconds.values()))
    rows: dict[str, list[str] | str] = {
        name: [
            cell
            for of in seconds.values()
            for cell in (f"{of[name][0] * 1e3:.3f}", f"{of[name][1] * 1e3:.3f}", f"{of[name][1] / of[name][0]:.2f}")
        ]
        for name in first
    }
    print_table([cell for n in seconds for cell in (f"{n} thr, ms", "peer, ms", "x peer")], rows, group=3)
    alone = [name for name in first if "requests" not in name and name != "attend_tokens"]
    marks = [Mark(f"{name}, x peer", ">=", 1, first[name][1] / first[name][0]) for name in alone]
    last = list(seconds.values())[-1]
    for mode in ("top_k", "mass"):
        ours, peer = last[f"{mode}, 16 requests"]
        marks.append(Mark(f"{mode}, 16 requests, x one by one", ">=", 1.5, peer / ours))
    print_marks(marks)


def run(threads: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of every pair with that many threads."""
    torch.set_num_threads(threads)
    found = timed({**appends(args.device), **reads(args.context, args.device)}, threads, args)
    for requests in BATCHES:  # one after another: they hold the most memory
        for mode in MODES:
            found |= timed({f"{mode}, {requests} requests": decode_steps(requests, mode, args)}, threads, args)
    return found


def timed(pairs: dict[str, Pair], threads: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    calls = {(name, i): call for name, pair in pairs.items() for i, call in enumerate(pair)}
    with torch.inference_mode():
        for call in calls.values():
            call()
        medians_of = medians({f"{name}/{i}": call for (name, i), call in calls.items()}, args, threads)
    return {name: (medians_of[f"{name}/0"], medians_of[f"{name}/1"]) for name in pairs}


def configs(
    max_tokens: int, requests: int, device: torch.device, mode: str = "exact"
) -> tuple[ModelConfig, RuntimeConfig]:
    model = {
        "num_layers": 1,
        "hidden_size": GROUPS * HEADS * DIM,
        "num_attention_heads": GROUPS * HEADS,
        "num_query_groups": GROUPS,
        "head_dim": DIM,
        "num_experts": EXPERTS,
        "topk": TOPK,
    }
    runtime = {
        "device": device.type,
        "max_tokens": max_tokens,
        "max_requests": requests,
        "block_size": BLOCK,
        "codec": {"keys": "int8", "values": "int8"},
        "attention": MODES[mode],
    }
    return resolve(model, runtime)


def pool_of(blocks: int, device: torch.device) -> tuple[Compressor, dict[str, Tensor]]:
    """A compressor, and the fields of a pool full of blocks."""
    compressor = Compressor(*configs(blocks * BLOCK, 1, device))
    k, v = (torch.randn(blocks, GROUPS, BLOCK, DIM, device=device) for _ in range(2))
    return compressor, compressor.encode(k, v)


def appends(device: torch.device) -> dict[str, Pair]:
    compressor, pool = pool_of(4 * max(APPENDED), device)

    def pair(count: int) -> Pair:
        k, v = (torch.randn(count, GROUPS, BLOCK, DIM, device=device) for _ in range(2))
        ids = torch.randperm(4 * max(APPENDED), device=device)[:count]

        def encode_then_scatter() -> None:
            high, low, scale, zero = ops.quantize_block(k, *compressor.key_planes, per_channel=True)
            codes, _, v_scale, v_zero = ops.quantize_block(v, compressor.value_bits, 0, per_channel=False)
            new = {"k_high": high, "k_low": low, "k_scale": scale, "k_zero": zero}
            for name, field in {**new, "v_codes": codes, "v_scale": v_scale, "v_zero": v_zero}.items():
                pool[name].index_copy_(0, ids, field)

        return partial(ops.append, compressor.keys(pool), compressor.values(pool), ids, k, v), encode_then_scatter

    return {f"append {count} block{'s' * (count > 1)}": pair(count) for count in APPENDED}


def reads(context: int, device: torch.device) -> dict[str, Pair]:
    compressor, pool = pool_of(context // BLOCK, device)
    keys, values = compressor.keys(pool), compressor.values(pool)
    q = torch.randn(1, GROUPS, HEADS, DIM, device=device)
    ids, count = torch.arange(context // BLOCK, device=device), count_of(READ, context)
    blocks, tokens, best = (torch.tensor([0, n], device=device) for n in (len(ids), context, count))
    coarse = ops.score_tokens(q, keys, ids, blocks, DIM**-0.5).coarse.flatten(2)
    rank = ops.rank_tokens(coarse, torch.zeros(q.shape[:3], device=device), tokens)
    choose = partial(ops.select_topk, rank, tokens, best, count)
    index = choose()
    attend = partial(ops.attend_tokens, q, keys, values, index // BLOCK, index % BLOCK, best, DIM**-0.5)
    chosen = (index // BLOCK).unique()

    def behind_prefetch() -> None:
        for name in ("k_high", "k_low", "v_codes"):
            ops.prefetch(pool[name], chosen)
        attend()

    return {
        "select_topk": (choose, partial(torch.topk, rank, count, sorted=False)),
        "attend_tokens": (attend, behind_prefetch),
    }


def decode_steps(requests: int, mode: str, args: argparse.Namespace) -> Pair:
    """A step of all requests at once, and of one after another, in two caches that hold the same."""
    room = args.step_context + 2 * args.rounds + 8 * BLOCK
    caches = [PiKVCache(*configs(requests * room, requests, args.device, mode)) for _ in range(2)]

    def kv(tokens: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.randn(tokens, GROUPS, DIM, device=args.device) for _ in range(2))
        return k, v

    def routing(tokens: int) -> tuple[Tensor, Tensor]:
        ids = torch.rand(tokens, EXPERTS, device=args.device).topk(TOPK).indices
        return ids, torch.full(ids.shape, 1 / TOPK, device=args.device)

    for request in range(requests):
        k, v = kv(args.step_context)
        ids, weights = routing(args.step_context)
        for cache in caches:
            cache.append(0, k, v, request)
            cache.observe_routing(0, ids, weights, request)
    k, v = kv(requests)
    ids, weights = routing(requests)
    q = torch.randn(requests, GROUPS * HEADS, DIM, device=args.device)
    lengths = [args.step_context] * 2

    def forward(cache: PiKVCache, of: range, at: int) -> None:
        rows = slice(of.start, of.stop)
        with cache.begin(Step(tuple(Segment(i, at, 1) for i in of))) as step:
            step.append(0, k[rows], v[rows])
            step.attend(0, q[rows])
            step.observe_routing(0, ids[rows], weights[rows])

    def together() -> None:
        forward(caches[0], range(requests), lengths[0])
        lengths[0] += 1

    def apart() -> None:
        for i in range(requests):
            forward(caches[1], range(i, i + 1), lengths[1])
        lengths[1] += 1

    return together, apart


if __name__ == "__main__":
    main()
