"""Tiers: the memory that blocks are in, fastest first. One file a kind, one row here."""

from pikv_megatron.config.table import Table
from pikv_megatron.tiers.device import DeviceTier
from pikv_megatron.tiers.host import HostTier
from pikv_megatron.tiers.tier import Tier

__all__ = ["TIERS", "Tier"]

TIERS: Table[type[Tier]] = Table(("runtime.tiers.kind",), {"device": DeviceTier, "host": HostTier})
