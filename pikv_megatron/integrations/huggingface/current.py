"""Which cache the forward of this thread is writing to: the one thing that `Cache.update`, the attention behind it and
the router behind that have to tell each other, since transformers hands the cache to the first of them only. None of
it can be traced: these functions are `eager`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch

if TYPE_CHECKING:
    from pikv_megatron.integrations.huggingface.cache import PiKVHFCache, Step


NAME = "pikv"
"""Of PiKV's functions in transformers' attention and mask interfaces."""

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Keeps a function out of torch.compile's graphs, which break there."""
    return cast(Function, torch.compiler.disable(function))


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
