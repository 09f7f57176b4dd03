"""Streamer: a listener that will log what a cache holds, so that it can be recovered.

This version has the one that is off; `RuntimeConfig.streamer.path` refuses anything but null until a log exists.
"""

from __future__ import annotations

from pikv_megatron.cache.events import CacheEvents


class Streamer(CacheEvents):
    """A streamer that is off: it keeps nothing."""
