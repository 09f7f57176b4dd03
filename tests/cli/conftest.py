"""The command line runs Megatron-core."""

from megatron_process import megatron_process

__all__ = ["megatron_process"]
