"""What a rank does in test_deepspeed_ranks.py with Hugging Face models: the same generation by transformers alone, on
this rank, and by DeepSpeed on PiKV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hf_models import make, prompts
from transformers import DynamicCache

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 1024}
INT8 = {**RUNTIME, "codec": {"keys": "int8", "values": "int8"}}
BY_AUTOTP = ("Mixtral", "Qwen3Moe", "DeepseekV2", "DeepseekV3", "GraniteMoe")
NOT_BY_AUTOTP = ("Olmoe", "Phimoe", "GptOss")
BY_AUTOEP = ("Mixtral", "Qwen3Moe", "DeepseekV3")
NEW = 64


VARIANTS: dict[str, dict[str, Any]] = {
    "left padding": {},
    "no padding": {"padded": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "assisted": {"rows": 1, "prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
    "beams": {"rows": 2, "num_beams": 4},
}

ALONE = ("left padding",)
"""The one variant where not all are asked for."""
BY_ENGINE = {
    "AutoTP": (*ALONE, "no padding", "sampling", "assisted"),  # DeepSpeed's inference engine refuses beams
    "AutoEP": (*ALONE, "no padding", "sampling", "beams"),
}


def generate(
    by: Any, ids: torch.Tensor, mask: torch.Tensor, padded: bool = True, rows: int = 3, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits of each step [new, rows, vocabulary]; sampling is seeded."""
    torch.manual_seed(11)
    ids, mask = ids[-rows:], mask[-rows:]
    mask = mask if padded else torch.ones_like(mask)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    out = by.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


def labels(cache: Any) -> list[tuple[int, int, int, int]]:
    """(layer, request, position of the block's first token, expert) of every sealed block."""
    found = []
    for layer_id in range(cache.model.num_layers):
        for expert in range(cache.model.num_experts):
            shard = cache.expert_shard(layer_id, expert)
            for request_id in shard.requests():
                starts = shard.retrieve(request_id)[2][:: cache.runtime.block_size]
                found += [(layer_id, request_id, int(start), expert) for start in starts]
    return sorted(found)


def compare(
    engine: Any, family: str, ids: torch.Tensor, mask: torch.Tensor, variants: Sequence[str], new: int = NEW
) -> dict[str, Any]:
    """An engine's answers beside those of transformers' own cache; its labels beside PiKV's without DeepSpeed."""
    from pikv_megatron.integrations.huggingface import PiKVHFCache

    stock, report = make(family), {}
    stocks = {
        variant: generate(
            stock, ids, mask, max_new_tokens=new, past_key_values=DynamicCache(config=stock.config), **options
        )
        for variant, options in VARIANTS.items()
        if variant in variants
    }
    for variant in reversed(variants):  # left padding last: its cache is looked at below
        tokens, logits = generate(engine, ids, mask, max_new_tokens=new, **VARIANTS[variant])
        same = torch.equal(tokens, stocks[variant][0])
        report[variant] = {"same": same, "worst": (logits - stocks[variant][1]).abs().max().item()}
    cache = engine.pikv_cache.cache
    made, model = labels(cache), cache.model
    alone, alone_int8 = (PiKVHFCache(stock, runtime) for runtime in (RUNTIME, INT8))  # the stock model is PiKV's now
    generate(stock, ids, mask, max_new_tokens=new, past_key_values=alone)
    int8 = [
        generate(by, ids, mask, max_new_tokens=16, past_key_values=given)[1]
        for by, given in ((stock, alone_int8), (engine, PiKVHFCache(engine, INT8)))
    ]
    return report | {
        "int8 beside PiKV alone": (int8[0] - int8[1]).abs().max().item(),
        "int8 beside exact": (int8[1] - stocks["left padding"][1][:16]).abs().max().item(),
        "groups": [model.num_query_groups, alone.cache.model.num_query_groups],
        "bytes": [c.stats()["tiers"]["device"]["bytes_held"] for c in (cache, alone.cache)],
        "same labels": set(made) >= set(labels(alone.cache)),  # more where a rank went on while others were not done
        "blocks": len(made),
        "experts": len({expert for *_, expert in made}),
        "tokens": tokens.tolist(),
    }


def tensor_parallel(ranks: int, whole: bool) -> dict[str, Any]:
    """AutoTP over all ranks: the same call on each. whole: all variants, or one."""
    from pikv_megatron.integrations import deepspeed as host

    base = {"dtype": "fp32", "tensor_parallel": {"tp_size": ranks}}
    ids, mask = prompts()
    report: dict[str, Any] = {}
    for family in BY_AUTOTP:
        engine = host.init_inference(make(family), {**base, "pikv": {"runtime": RUNTIME}})
        report[family] = compare(engine, family, ids, mask, BY_ENGINE["AutoTP"] if whole else ALONE)
    for family in NOT_BY_AUTOTP:
        model = make(family)
        try:
            host.init_inference(model, {**base, "pikv": {"runtime": RUNTIME}})
        except NotImplementedError as error:
            report[family] = str(error)
    try:
        host.init_inference(make("Mixtral", num_key_value_heads=1), {**base, "pikv": {}})
    except ValueError as error:
        report["one KV head"] = str(error)
    return report


def expert_parallel(ranks: int, rank: int, whole: bool) -> dict[str, Any]:
    """AutoEP over all ranks: each has prompts of its own, and they end at different steps. whole: as above."""
    from transformers.utils import output_capturing

    from pikv_megatron.integrations import deepspeed as host

    base = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": {"enabled": True, "autoep_size": ranks}}
    ids, mask = prompts(rows=3 - rank, columns=40 + 8 * rank)
    registry = output_capturing._CAN_RECORD_REGISTRY
    kind, entries = type(registry), dict(registry)
    report: dict[str, Any] = {}
    for family in BY_AUTOEP:
        engine, *_ = host.initialize(make(family), {**base, "pikv": {"runtime": RUNTIME}})
        report[family] = compare(engine, family, ids, mask, BY_ENGINE["AutoEP"] if whole else ALONE, NEW - 24 * rank)
        layers = host.autoep_layers(engine)
        report[family]["local experts"] = [layer.num_local_experts for layer in layers]
    report["refusals"] = refusals(engine, ids, mask, rank)
    report["registry restored"] = type(registry) is kind and entries.items() <= dict(registry).items()
    return report


def refusals(engine: Any, ids: torch.Tensor, mask: torch.Tensor, rank: int) -> dict[str, Any]:
    """What each rank is told where rank 1 alone refuses a call, its first step or a later one; and answers before and
    behind that.
    """
    from pikv_megatron.integrations.huggingface import PiKVHFCache

    def told(**options: Any) -> str:
        try:
            engine.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, **options)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def sized(tokens: int) -> PiKVHFCache:
        return PiKVHFCache(engine, {**RUNTIME, "max_tokens": tokens if rank == 1 else 1024})

    before = generate(engine, ids, mask, max_new_tokens=8)[0]
    caches = {"first step": sized(16), "later step": sized(100)}
    report: dict[str, Any] = {name: told(past_key_values=cache) for name, cache in caches.items()}
    report["call"] = told(**({"cache_implementation": "dynamic"} if rank == 1 else {}))
    report["held"] = [caches["first step"].get_seq_length(), caches["later step"].get_seq_length()]
    after = generate(engine, ids, mask, max_new_tokens=8)[0]
    report["goes on"] = torch.equal(before, after)
    return report
