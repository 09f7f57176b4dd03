"""One rank of two: experts split over them (each with prompts of its own), then heads; stock Megatron-core beside PiKV.

Writes what it saw as JSON to the path given as its argument, one file per rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch

if not torch.cuda.is_available():
    from pikv_megatron.integrations import cpu_compat

    cpu_compat.install()

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron_tiny import (
    RUNTIME,
    build,
    greedy_dynamic,
    greedy_static,
    inference_config,
    install_torch_flash_attention,
    prompts_of,
    tiny_config,
    twin,
)

from pikv_megatron.integrations.megatron import (
    PiKVDynamicInferenceContext,
    PiKVInferenceContext,
    attach,
    layer_spec,
    model_config,
)
from pikv_megatron.launch import init_megatron

STEPS = 24


def main():
    torch.set_num_threads(1)
    init_megatron(expert_parallel=2)
    rank = dist.get_rank()
    report = {}
    for dispatcher in ("allgather", "alltoall"):
        config = tiny_config(moe_token_dispatcher_type=dispatcher, expert_model_parallel_size=2)
        report[dispatcher] = compare(config, torch.stack(prompts_of(45, 45, seed=20 + rank)))
    report["dynamic"] = compare_dynamic(prompts_of(20 + rank, 45, 9 + rank, seed=30 + rank))
    parallel_state.destroy_model_parallel()
    init_megatron(tensor_parallel=2)
    config = tiny_config(tensor_model_parallel_size=2)
    report["tensor parallel"] = compare(config, torch.stack(prompts_of(45, 45, seed=20)))
    Path(sys.argv[1]).with_suffix(f".{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def compare(config, prompts):
    """Static contexts: the hooked spec and an attached model against stock."""
    stock = build(config, parallel_output=False)
    hooked = build(config, layer_spec(config), parallel_output=False, seed=8)
    hooked.load_state_dict(stock.state_dict(), strict=True)
    expected = greedy_static(stock, StaticInferenceContext(2, 128), prompts, STEPS)
    context = PiKVInferenceContext(model_config(config), RUNTIME, 2, 128)
    heard = []
    context.collective_listeners.append(Listener(heard))
    ours = greedy_static(hooked, context, prompts, STEPS)
    attached = greedy_static(stock, attach(stock, RUNTIME).static_context(2, 128), prompts, STEPS)
    return {
        "tokens": expected[0].tolist(),
        "same_tokens": torch.equal(ours[0], expected[0]) and torch.equal(attached[0], expected[0]),
        "worst": max((x[1] - expected[1]).abs().max().item() for x in (ours, attached)),
        "local_experts": hooked.decoder.layers[0].mlp.num_local_experts,
        "local_groups": context.model_cfg.num_query_groups,
        "heard": len(heard),
        "blocks": context.cache.stats()["tiers"]["device"]["blocks_used"],
    }


def compare_dynamic(prompts):
    """Dynamic contexts, as many steps on each rank: PiKV against stock with a torch paged attention."""
    config = tiny_config(expert_model_parallel_size=2, inference_moe_token_dispatcher_type="nccl")
    stock = build(config)
    hooked = twin(stock, config, layer_spec(config))
    lengths = [STEPS, STEPS // 2, STEPS // 2]
    with pytest.MonkeyPatch.context() as patch:
        install_torch_flash_attention(patch)
        baseline = DynamicInferenceContext(config, inference_config())
        expected = greedy_dynamic(stock, baseline, prompts, lengths, 2)
    context = PiKVDynamicInferenceContext(config, inference_config(), RUNTIME)
    ours = greedy_dynamic(hooked, context, prompts, lengths, 2)
    return {
        "same_tokens": all(ours[i][0] == expected[i][0] for i in range(3)),
        "worst": max((ours[i][1] - expected[i][1]).abs().max().item() for i in range(3)),
        "left": context.cache.requests(),
    }


class Listener:
    def __init__(self, heard):
        self.heard = heard

    def started(self, layer_id, kind, nbytes):
        self.heard.append((layer_id, kind, nbytes))

    def finished(self, layer_id, kind):
        self.heard.append((layer_id, kind))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
