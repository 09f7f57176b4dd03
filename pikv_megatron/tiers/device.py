"""Tier device: the memory of the device that computes attention."""

from __future__ import annotations

import torch

from pikv_megatron.tiers.tier import Tier


class DeviceTier(Tier):
    """Blocks beside the attention that reads them."""

    @staticmethod
    def memory(device: torch.device) -> tuple[torch.device, bool]:
        return device, False
