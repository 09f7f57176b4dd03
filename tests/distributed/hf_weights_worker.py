"""One rank of test_hf_weights_ep: loads the small MoE, its experts over all ranks; rank 0 keeps the logits.

Usage: hf_weights_worker.py OUTPUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    from pikv_megatron.integrations import cpu_compat

    cpu_compat.install()

from pikv_megatron import launch
from pikv_megatron.facts import documents, load_text

ASSETS = Path(__file__).parents[2] / "assets"


def main(output: str) -> None:
    launch.init_process_group()
    ranks = dist.get_world_size()
    launch.init_megatron(expert_parallel=ranks)
    torch.set_num_threads(1)
    from pikv_megatron.integrations.hf_weights import load_mixtral

    text = load_text(ASSETS / "text/kjv_heldout.txt")
    (document,) = documents(text, count=1, length=256, num_facts=4, num_questions=1)
    tokens = torch.tensor([list(document.text)])
    logits = {}
    for dispatcher in ("allgather", "alltoall"):
        model = load_mixtral(
            ASSETS / "small_moe", expert_model_parallel_size=ranks, moe_token_dispatcher_type=dispatcher
        )
        assert len(model.decoder.layers[0].mlp.experts.local_experts) == 8 // ranks
        with torch.no_grad():
            logits[dispatcher] = model(tokens, torch.arange(256)[None], None)
    if dist.get_rank() == 0:
        torch.save(logits, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
