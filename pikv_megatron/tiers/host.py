"""Tier host: the machine's main memory, pinned where there is a GPU that copies from it."""

from __future__ import annotations

import torch

from pikv_megatron.tiers.tier import Tier


class HostTier(Tier):
    """Blocks in main memory."""

    @staticmethod
    def memory(device: torch.device) -> tuple[torch.device, bool]:
        return torch.device("cpu"), torch.cuda.is_available()
