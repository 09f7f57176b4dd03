"""Quantising and dequantising of KV blocks: ours, a plain copy, torch eager and compiled, quanto, hqq, torchao.

Blocks of 32 tokens, 8 KV heads of 128 channels. Keys are coded per channel of the block, in two bit-planes, values per
token. The peers code per token or per group of a token's channels, as the caches that are built on them do; eager and
inductor run the plain expression in both directions. GB/s are of uncoded bytes: what quantising reads, what
dequantising writes. `x copy` is that rate over the copy's (the faster of libc's memcpy, one thread always, and torch's
copy_).

    python benchmarks/bench_quant.py [--tokens 32768] [--threads 1 2] [--rounds 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial

import torch
from common import Mark, Work, keep_memory, machine, medians, parse, parser, print_marks, print_table, quiet
from torch import Tensor

from pikv_megatron import ops

GROUPS, BLOCK, DIM = 8, 32, 128
KEYS, VALUES = {8: (4, 4), 4: (2, 2)}, {8: (8, 0), 4: (4, 0)}  # bits of the high and the low plane, by codec
WHAT = ("keys", "values", "per token")
Calls = dict[str, Callable[[], object] | None]
"""Calls by name; None: its package is not installed."""
KINDS = [
    "read alone",
    "copy",
    *(f"{way} int{bits} {what}" for way in ("quantise", "dequantise") for bits in (8, 4) for what in WHAT),
]


def main() -> None:
    made = parser(__doc__ or "", threads=(1, 2), rounds=7)
    made.add_argument("--tokens", type=int, default=32768)
    args = parse(made)
    quiet()
    keep_memory()
    torch.manual_seed(0)
    x = torch.randn(args.tokens // BLOCK, GROUPS, BLOCK, DIM, device=args.device)
    narrow = x.bfloat16()
    calls: Calls = {**copies(x), **ours(x, ""), **ours(narrow, " bf16")}
    calls |= plain(x, "eager", lambda f: f) | plain(x, "inductor", lambda f: torch.compile(f, dynamic=False))
    calls |= quanto(x) | hqq(x) | torchao(x)
    calls = dict(sorted(calls.items(), key=lambda item: KINDS.index(item[0].split(", ")[0])))
    installed = {name: call for name, call in calls.items() if call}

    print(f"{machine(args)}; {args.tokens:,} tokens x {GROUPS} x {DIM}; medians of up to {args.rounds} rounds")
    size = {name: (narrow if "bf16" in name else x).nbytes for name in calls}
    columns = {threads: run(installed, threads, args) for threads in args.threads}
    rows: dict[str, list[str] | str] = dict.fromkeys(calls, "not installed")
    for name in installed:
        rows[name] = []
        for seconds in columns.values():
            rate = size[name] / seconds[name] / 1e9
            rows[name] += [f"{seconds[name] * 1e3:.1f}", f"{rate:.2f}", f"{rate / copy_rate(seconds, x):.2f}"]
    print_table([cell for n in columns for cell in (f"{n} thr, ms", "GB/s", "x copy")], rows, group=3)
    for threads, seconds in columns.items():
        if threads == 1:
            print_marks(marks(seconds, copy_rate(seconds, x), x.nbytes))


def run(work: Work, threads: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every call with that many threads; compiled code is made anew for them."""
    torch.set_num_threads(threads)
    for call in work.values():
        call()
    return medians(work, args, threads)


def copy_rate(seconds: dict[str, float], x: Tensor) -> float:
    return x.nbytes / min(time for name, time in seconds.items() if name.startswith("copy")) / 1e9


def marks(seconds: dict[str, float], copy: float, size: int) -> list[Mark]:
    found = []
    for bits, of_copy, of_inductor in ((8, 0.9, 3.0), (4, 0.75, 2.0)):
        for what in ("keys", "values"):
            mine, compiled = (
                seconds[f"quantise int{bits} {what}, ours"],
                seconds[f"quantise int{bits} {what}, inductor"],
            )
            found.append(Mark(f"quantise int{bits} {what}, x copy", ">=", of_copy, size / mine / 1e9 / copy))
            found.append(Mark(f"quantise int{bits} {what}, x inductor", ">=", of_inductor, compiled / mine))
            back = seconds[f"dequantise int{bits} {what}, ours"]
            found.append(Mark(f"dequantise int{bits} {what}, x copy", ">=", 2.0, size / back / 1e9 / copy))
    return found


def copies(x: Tensor) -> Calls:
    target = torch.empty_like(x)
    calls: Calls = {"read alone, torch sum": x.sum, "copy, torch copy_": lambda: target.copy_(x)}
    if x.device.type == "cpu":
        memcpy = ctypes.CDLL(None).memcpy
        memcpy.argtypes, memcpy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
        calls["copy, memcpy"] = lambda: memcpy(target.data_ptr(), x.data_ptr(), x.nbytes)
    return calls


def ours(x: Tensor, suffix: str) -> Calls:
    calls: Calls = {}
    for bits in (8, 4):
        for what, (hi, lo) in (("keys", KEYS[bits]), ("values", VALUES[bits])):
            per_channel = what == "keys"
            coded = ops.quantize_block(x, hi, lo, per_channel)
            check(f"ours, int{bits} {what}", x, ops.dequantize_block(*coded, hi, lo, per_channel), bits)
            calls[f"quantise int{bits} {what}, ours{suffix}"] = partial(ops.quantize_block, x, hi, lo, per_channel)
            if not suffix:  # what comes back is float32 always
                calls[f"dequantise int{bits} {what}, ours"] = partial(ops.dequantize_block, *coded, hi, lo, per_channel)
    return calls


def check(name: str, x: Tensor, back: Tensor, bits: int) -> None:
    """No number may be off by more than half a step of the widest range, and a little."""
    allowed = 0.51 * float(x.max() - x.min()) / (2**bits - 1) + 0.01
    error = float((back - x).abs().max())
    if not error <= allowed:
        raise RuntimeError(f"{name}: comes back off by {error}, expected at most {allowed}")


def quantize_plain(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes along dim, two 4-bit codes to a byte, float16 scale and zero."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    codes = ((x - low) / scale).round().to(torch.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return codes, scale.half(), low.half()


def dequantize_plain(codes: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return codes.float() * scale.float() + low.float()


def plain(x: Tensor, name: str, compiled: Callable[[Callable], Callable]) -> Calls:
    quantize, dequantize = compiled(quantize_plain), compiled(dequantize_plain)
    calls: Calls = {}
    for bits in (8, 4):
        for what, dim in (("keys", -2), ("values", -1)):
            coded = quantize_plain(x, bits, dim)
            check(f"{name}, int{bits} {what}", x, dequantize_plain(*coded, bits), bits)
            calls[f"quantise int{bits} {what}, {name}"] = partial(quantize, x, bits, dim)
            calls[f"dequantise int{bits} {what}, {name}"] = partial(dequantize, *coded, bits)
    return calls


def quanto(x: Tensor) -> Calls:
    """Per token in 8 bits, groups of 32 channels in 4, the latter as transformers' QuantoQuantizedCache does."""
    try:
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight
    except ImportError:
        return dict.fromkeys(_peer_rows("quanto"))
    rows = x.view(-1, DIM)

    def int8() -> Tensor:
        return quantize_weight(rows, qint8, 0, AbsmaxOptimizer()(rows, qint8, 0))

    def int4() -> Tensor:
        return quantize_weight(rows, qint4, 0, *MaxOptimizer()(rows, qint4, 0, 32), 32)

    return dict(zip(_peer_rows("quanto"), (int8, int8().dequantize, int4, int4().dequantize), strict=True))


def hqq(x: Tensor) -> Calls:
    """Groups of 64 channels of a token, without hqq's optimisation, which takes many times as long."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return dict.fromkeys(_peer_rows("hqq"))
    calls: list[Callable[[], object]] = []
    for bits in (8, 4):
        settings = {"nbits": bits, "group_size": 64, "axis": 1, "optimize": False}
        quantize = partial(Quantizer.quantize, x.view(-1, DIM), device=str(x.device), compute_dtype=x.dtype, **settings)
        calls += [quantize, partial(Quantizer.dequantize, *quantize())]
    return dict(zip(_peer_rows("hqq"), calls, strict=True))


def torchao(x: Tensor) -> Calls:
    """Per token in 8 bits, groups of 32 channels in 4, which torchao leaves one to a byte."""
    try:
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )
    except ImportError:
        return dict.fromkeys(_peer_rows("torchao"))
    rows = x.view(-1, DIM)

    def quantize(mapping: MappingType, block: tuple[int, int], *limits: object) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = choose_qparams_affine(rows, mapping, block, *limits, eps=1e-9)
        return quantize_affine(rows, block, scale, zero, *limits), scale, zero

    calls: list[Callable[[], object]] = []
    for mapping, group, *limits in (
        (MappingType.SYMMETRIC, DIM, torch.int8, -127, 127),
        (MappingType.ASYMMETRIC, 32, torch.uint8, 0, 15),
    ):
        coded, scale, zero = quantize(mapping, (1, group), *limits)
        calls.append(partial(quantize, mapping, (1, group), *limits))
        calls.append(partial(dequantize_affine, coded, (1, group), scale, zero, *limits))
    return dict(zip(_peer_rows("torchao"), calls, strict=True))


def _peer_rows(name: str) -> list[str]:
    return [f"{way} int{bits} per token, {name}" for bits in (8, 4) for way in ("quantise", "dequantise")]


if __name__ == "__main__":
    main()
