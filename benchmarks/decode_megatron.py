"""Time of one decode step of a Megatron-core MoE: stock static context, PiKV, and plain SDPA over the same K and V.

The model has Mixtral's attention shape (32 heads, 8 KV heads of 128), small experts, random weights and two layers. The
caches are filled directly, with the same keys and values: a prompt of 32,768 tokens through the stock context would
need its full attention matrix. `SDPA alone` is torch's fused attention over the same K and V of both layers,
query heads of a group as query rows: what attention costs if nothing else does. `model alone` is a step with an empty
cache.
All figures come from one run, rounds interleaved, medians; ratios are what to read.

    python benchmarks/decode_megatron.py [--contexts 1024 4096 16384 32768] [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.nn.functional as F
from common import Mark, machine, medians, parse, parser, print_marks

if not torch.cuda.is_available():
    from pikv_megatron.integrations import cpu_compat

    cpu_compat.install()

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_model import GPTModel

from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.integrations import hf_weights, megatron
from pikv_megatron.integrations.megatron.session import Session
from pikv_megatron.launch import init_megatron

LAYERS, GROUPS, DIM, HEADS = 2, 8, 128, 32
SHAPE = {
    "model_type": "mixtral",
    "hidden_size": HEADS * DIM,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 65536,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PIKV = {
    "PiKV exact": {},
    "PiKV exact, INT8": {"codec": {"keys": "int8", "values": "int8"}},
    "PiKV top_k 6.25 %": {"attention": {"mode": "top_k", "read_fraction": 0.0625, "prune_fraction": 0.25}},
    "PiKV top_k 6.25 %, INT8": {
        "codec": {"keys": "int8", "values": "int8"},
        "attention": {"mode": "top_k", "read_fraction": 0.0625, "prune_fraction": 0.25},
    },
}
MARKS = {"PiKV exact, INT8": 30, "PiKV top_k 6.25 %": 60, "PiKV top_k 6.25 %, INT8": 60}
CHUNK = 2048


def main() -> None:
    made = parser(__doc__ or "", threads=[torch.get_num_threads()], rounds=7)
    made.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    args = parse(made)
    if len(args.threads) != 1:
        made.error("--threads: expected one number here")
    if args.device.type == "cpu" and torch.cuda.is_available():
        made.error("--device: expected cuda, since Megatron-core uses the GPU wherever there is one")
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    init_megatron()
    print(f"{machine(args)}; {args.threads[0]} threads; medians of {args.rounds} steps, ms")
    columns: dict[str, dict[int, float]] = {}
    stock_model = hf_weights.build_model(SHAPE).to(args.device).eval()
    model = hf_weights.build_model(SHAPE).to(args.device).eval()
    model.load_state_dict(stock_model.state_dict())
    model_cfg = megatron.attach(model).model_cfg
    for context in args.contexts:
        for name, seconds in measure(stock_model, model, model_cfg, context, args).items():
            columns.setdefault(name, {})[context] = seconds
    _print(columns, args.contexts)
    stock = columns["stock static context"]
    print_marks(
        [
            Mark(f"{name} at 32,768, x stock", ">=", wanted, stock[32768] / columns[name][32768])
            for name, wanted in MARKS.items()
            if 32768 in args.contexts
        ]
    )


def measure(
    stock_model: GPTModel, model: GPTModel, model_cfg: ModelConfig, context: int, args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of a decode step at `context` tokens, by cache. `model` is attached, with the same weights."""
    device, room = args.device, context + args.rounds + 2
    shape = (context, 1, GROUPS, DIM)
    keys = [torch.randn(shape, device=device) for _ in range(LAYERS)]  # before RoPE, as the stock context keeps them
    values = [torch.randn(shape, device=device) for _ in range(LAYERS)]
    turned = [_rotate(stock_model, key) for key in keys]

    sessions = {"stock static context": Session(stock_model, _stock(keys, values, room))}
    for name, options in PIKV.items():
        runtime = RuntimeConfig.from_dict({"device": device.type, "max_tokens": room, "max_requests": 1, **options})
        filled = megatron.PiKVInferenceContext(model_cfg, runtime, 1, room)
        _fill(filled, turned, values)
        sessions[name] = Session(model, filled)
    small = RuntimeConfig(device=device.type, max_tokens=128, max_requests=1)
    empty = Session(model, megatron.PiKVInferenceContext(model_cfg, small, 1, 128))
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    work: dict[str, Callable[[], object]] = {
        name: (lambda session=session: session.feed(token)) for name, session in sessions.items()
    }
    work["model alone"] = lambda: empty.feed(token)
    work["SDPA alone"] = _sdpa(turned, values)

    first = {name: call() for name, call in work.items()}  # warm-up, and the check that all do the same work
    difference = (first["PiKV exact"] - first["stock static context"]).abs().max()  # type: ignore[operator]
    if not difference < 1e-3:
        raise RuntimeError(f"PiKV exact and stock differ by {difference} in their logits at {context} tokens")
    return medians(work, args, args.threads[0])


def _rotate(model: GPTModel, key: torch.Tensor) -> torch.Tensor:
    angles = model.rotary_pos_emb(key.shape[0])
    return apply_rotary_pos_emb(key, angles, config=model.config, cp_group=model.pg_collection.cp)


def _stock(keys: list[torch.Tensor], values: list[torch.Tensor], room: int) -> StaticInferenceContext:
    context = StaticInferenceContext(1, room)
    for layer, pair in enumerate(zip(keys, values, strict=True)):
        memory = tuple(x.new_zeros(room, *x.shape[1:]) for x in pair)
        for whole, part in zip(memory, pair, strict=True):
            whole[: len(part)] = part
        context.key_value_memory_dict[layer + 1] = memory
    context.increment_sequence_len_offset(len(keys[0]))
    return context


def _fill(context: megatron.PiKVInferenceContext, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for layer in range(LAYERS):
        for k, v in zip(keys[layer].split(CHUNK), values[layer].split(CHUNK), strict=True):
            context.cache.append(layer, k[:, 0], v[:, 0])
            routing = k.new_zeros(len(k), 2, dtype=torch.int64), k.new_full((len(k), 2), 0.5)
            context.cache.observe_routing(layer, *routing)
    context.increment_sequence_len_offset(len(keys[0]))


def _sdpa(keys: list[torch.Tensor], values: list[torch.Tensor]) -> Callable[[], None]:
    pairs = [tuple(x.permute(1, 2, 0, 3).contiguous() for x in pair) for pair in zip(keys, values, strict=True)]
    query = torch.randn(1, GROUPS, HEADS // GROUPS, DIM, device=keys[0].device)

    def run() -> None:
        for k, v in pairs:
            F.scaled_dot_product_attention(query, k, v)

    return run


def _print(columns: dict[str, dict[int, float]], contexts: list[int]) -> None:
    stock = columns["stock static context"]
    print(f"{'':26}" + "".join(f"{context:>10,}" for context in contexts) + "   stock / this")
    for name, times in columns.items():
        cells = "".join(f"{times[context] * 1e3:10.1f}" for context in contexts)
        ratios = "  ".join(f"{stock[context] / times[context]:.1f}" for context in contexts)
        print(f"{name:26}{cells}   {ratios}")


if __name__ == "__main__":
    main()
