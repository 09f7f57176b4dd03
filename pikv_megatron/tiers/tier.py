"""What a tier is: a pool of blocks in some memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pikv_megatron.config.sections import TierConfig
from pikv_megatron.tiers.blocks import BlockPool, Field, Place


class Tier(BlockPool):
    """A tier's memory, allocated and touched once.

    Args:
        section: the tier's entry in runtime.tiers. num_blocks, block_size, fields, format: what it is to hold.
        device: where attention is computed.
    """

    def __init__(
        self,
        section: TierConfig,
        num_blocks: int,
        block_size: int,
        fields: Mapping[str, Field],
        format: str,
        device: torch.device,
    ) -> None:
        memory, pinned = self.memory(device)
        super().__init__(Place(0, section.kind, format), num_blocks, block_size, fields, memory, pinned)

    @staticmethod
    def memory(device: torch.device) -> tuple[torch.device, bool]:
        """Where its blocks are, and whether that memory is pinned, for attention on `device`."""
        raise NotImplementedError
