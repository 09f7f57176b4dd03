"""Tests of a host run where it is installed."""

from megatron_process import HAS_MEGATRON, HAS_TRANSFORMERS, megatron_process

__all__ = ["megatron_process"]

collect_ignore_glob = ([] if HAS_TRANSFORMERS else ["huggingface/*"]) + ([] if HAS_MEGATRON else ["megatron/*"])
