"""Sharding over the expert-parallel group: who owns a block."""
