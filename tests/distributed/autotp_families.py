"""One rank of test_autotp_families.py: every model type that AutoTP is said to cut rightly, beside transformers alone.

Usage: torchrun autotp_families.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]


def main(output: str) -> None:
    from deepspeed import comm
    from deepspeed_serving import RUNTIME, generate
    from hf_models import FAMILIES, MORE_FAMILIES, make, prompts
    from transformers import DynamicCache

    from pikv_megatron.integrations import deepspeed as host

    torch.set_num_threads(1)
    host.init_distributed()
    config = {"dtype": "fp32", "tensor_parallel": {"tp_size": comm.get_world_size()}, "pikv": {"runtime": RUNTIME}}
    ids, mask = prompts()
    worst = {}
    for family in FAMILIES | MORE_FAMILIES:
        stock = make(family)
        if stock.config.model_type not in host.BY_AUTOTP:
            continue
        cache = DynamicCache(config=stock.config)
        tokens, logits = generate(stock, ids, mask, max_new_tokens=12, past_key_values=cache)
        ours, our_logits = generate(host.init_inference(make(family), config), ids, mask, max_new_tokens=12)
        assert torch.equal(ours, tokens), family
        worst[stock.config.model_type] = (our_logits - logits).abs().max().item()
    Path(f"{output}.{comm.get_rank()}.json").write_text(json.dumps(worst))
    comm.barrier()
    comm.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
