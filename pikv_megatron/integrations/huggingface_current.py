"""Which cache the forward of this thread is writing to: the one thing that `Cache.update`, the attention behind it and
the router behind that have to tell each other, since transformers hands the cache to the first of them only.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pikv_megatron.integrations.huggingface_cache import PiKVHFCache, Step


NAME = "pikv"
"""Of PiKV's functions in transformers' attention and mask interfaces."""


@dataclass
class Routed:
    """A layer whose tokens are stored and whose router has not run yet."""

    cache: PiKVHFCache
    layer_id: int
    step: Step


class _Current(threading.local):
    writing: PiKVHFCache | None = None
    """The cache whose `update` ran last, until its attention takes it."""
    routed: Routed | None = None
    """The layer whose attention ran last, until its router takes it."""


current = _Current()
