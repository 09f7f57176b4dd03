"""One rank of test_deepspeed_ranks.py, under any launcher: does its checks and writes what it saw.

Usage: deepspeed_worker.py [--local_rank N] OUTPUT all|one    (how many variants of generation)
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent / "support"),
]  # the deepspeed launcher starts scripts without their folder


def main(output: str, whole: bool) -> None:
    import deepspeed_moe_training
    import deepspeed_serving
    from deepspeed import comm

    from pikv_megatron.integrations.deepspeed import support as deepspeed_support

    torch.set_num_threads(1)
    backend = importlib.import_module("deepspeed.comm.torch")
    built = backend.build_shm_op
    deepspeed_support.init_distributed()
    report = {
        "shared memory": {
            "used": comm.comm.cdb.shm_comm_op is not None,
            "patched still": backend.build_shm_op is not built,
        },
        "moe training": deepspeed_moe_training.check(comm.get_world_size()),
        "tensor parallel": deepspeed_serving.tensor_parallel(comm.get_world_size(), whole),
        "expert parallel": deepspeed_serving.expert_parallel(comm.get_world_size(), comm.get_rank(), whole),
    }
    Path(f"{output}.{comm.get_rank()}.json").write_text(json.dumps(report))
    comm.barrier()
    comm.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("output")
    parser.add_argument("variants", choices=("all", "one"))
    args = parser.parse_args()
    main(args.output, args.variants == "all")
