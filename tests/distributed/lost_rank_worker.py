"""A rank of test_lost_ranks.py, under any launcher: says that it is there, then reduces until it is ended, or until a
file `stop` is in its folder.

Usage: lost_rank_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_megatron import launch


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = launch.init_process_group().rank
    group = dist.new_group(range(dist.get_world_size()))  # whose timeout nobody has set
    (folder / f"{rank}.{os.getpid()}").write_text(os.environ["GLOO_SOCKET_IFNAME"])
    end = time.monotonic() + 120
    while time.monotonic() < end:
        stop = torch.tensor(int((folder / "stop").exists()))
        dist.all_reduce(stop, group=group)
        if stop:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
