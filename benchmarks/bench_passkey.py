"""A pass key hidden in real text, asked of SmolLM2-135M through transformers' DynamicCache and through ours.

The text is Python's own documentation of the language (pydoc_data.topics). Each context is read once by DynamicCache
and copied into the other caches; then every cache decodes the answer by itself. A prompt that is read in one piece
attends to raw keys in PiKV too, so that what it would have stored itself is the same.

    python benchmarks/bench_passkey.py [--context 1024 2048 4096] [--depths 0.1 0.5 0.9]
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from common import machine, parse, parser, print_table, quiet
from hf_common import SMOLLM2, fill, installed, prefill, smollm2
from transformers import Cache, DynamicCache

from pikv_megatron.integrations.huggingface import PiKVHFCache, attach, detach

INT8 = {"codec": {"keys": "int8", "values": "int8"}}
OURS: dict[str, dict[str, Any]] = {
    "PiKV exact": {},
    "PiKV INT8": INT8,
    "PiKV INT4": {"codec": {"keys": "int4", "values": "int4"}},
    "PiKV INT8, top_k 12.5 %": {**INT8, "attention": {"mode": "top_k"}},
    "PiKV INT8, top_k 25 %": {**INT8, "attention": {"mode": "top_k", "read_fraction": 0.25}},
    "PiKV INT8, mass 0.05": {**INT8, "attention": {"mode": "mass"}},
    "PiKV INT8, mass 0.01": {**INT8, "attention": {"mode": "mass", "epsilon": 0.01}},
}
SPARE = 64
ANSWER = 6
"""Tokens that are decoded."""


def main() -> None:
    made = parser(__doc__ or "", threads=(1,), rounds=1)
    made.add_argument("--context", type=int, nargs="+", default=[1024, 2048, 4096])
    made.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    args = parse(made)
    quiet()
    if not installed(*SMOLLM2):
        print(f"SmolLM2: not installed ({', '.join(SMOLLM2)})")
        return
    torch.set_num_threads(args.threads[0])
    model, tokenizer = smollm2()
    right: dict[str, list[str]] = {"DynamicCache": [], **{name: [] for name in OURS}}
    for context in args.context:
        found: dict[str, list[tuple[bool, bool]]] = {name: [] for name in right}
        read: dict[str, list[float]] = {name: [] for name in right}
        for depth in args.depths:
            tokens, key = prompt(tokenizer, context, depth)
            source = DynamicCache(config=model.config)
            prefill(model, source, tokens[:-1])
            theirs = DynamicCache(config=model.config)
            fill(theirs, source)
            expected = decode(model, theirs, tokens[-1])
            found["DynamicCache"].append((key in tokenizer.decode(expected), True))
            attach(model)
            for name, runtime in OURS.items():
                cache = PiKVHFCache(model, {"max_tokens": context + SPARE, "max_requests": 1, **runtime})
                fill(cache, source)
                answer = decode(model, cache, tokens[-1])
                found[name].append((key in tokenizer.decode(answer), answer == expected))
                reads = cache.cache.stats()["reads"]
                if reads["selective_reads"]:
                    read[name].append(reads["share_read_mean"])
            detach(model)
        for name, results in found.items():
            share = f"{sum(read[name]) / len(read[name]):.0%}" if read[name] else "100%"
            right[name] += [f"{sum(r for r, _ in results)}", f"{sum(same for _, same in results)}", share]
    print(f"{machine(args)}; of {len(args.depths)} depths: keys found, answers equal to DynamicCache's, share read")
    print_table([head for c in args.context for head in (f"{c:,}", "equal", "read")], right, group=3)


def prompt(tokenizer: Any, context: int, depth: float) -> tuple[list[int], str]:
    """Tokens of a question about a key that stands at `depth` of the text before it, `context` in all; and the key."""
    text = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    key = str(71432 + int(1000 * depth) + context)
    hidden = tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")["input_ids"]
    question = tokenizer("\nWhat is the pass key? The pass key is")["input_ids"]
    around = context - len(hidden) - len(question)
    before = int(around * depth)
    return text[:before] + hidden + text[before:around] + question, key


@torch.no_grad()
def decode(model: Any, cache: Cache, token: int) -> list[int]:
    """The greedy answer after `token`, the first that the cache does not hold."""
    ids, answer = torch.tensor([[token]]), []
    for _ in range(ANSWER):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        answer.append(int(ids))
    return answer


if __name__ == "__main__":
    main()
