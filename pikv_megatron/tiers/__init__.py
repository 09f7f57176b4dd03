"""Tiers: the memory that blocks are in."""
