"""Which cache the forward of this thread is writing to: the one thing that `Cache.update`, the attention behind it and
the router behind that have to tell each other, since transformers hands the cache to the first of them only. None of
it can be traced: these functions are `eager`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

NAME = "pikv"
"""Of PiKV's functions in transformers' attention and mask interfaces."""

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Keeps a function out of torch.compile's graphs, which break there."""
    return cast(Function, torch.compiler.disable(function))


class Writing(Protocol):
    """What attention and routers call on the cache that is written to. What a step is, is the cache's own affair."""

    cache: Any
    latents: bool

    def start(self, layer_id: int) -> tuple[Tensor, Tensor]: ...
    def plan(self, layer_id: int, batch: int, columns: int, mask: Tensor | None) -> None: ...
    def store(self, layer_id: int, key: Tensor, value: Tensor) -> None: ...
    def attend(self, layer_id: int, query: Tensor) -> tuple[Tensor, Tensor]: ...
    def observe(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None: ...
    def finish(self, failed: bool) -> None: ...


@dataclass
class Routed:
    """A layer whose tokens are stored and whose router has not run yet."""

    cache: Writing
    layer_id: int


class _Current(threading.local):
    serving: bool = False
    """Whether an attached model's forward with a cache of ours is under way."""
    cache: Writing | None = None
    """The cache of the forward that is under way."""
    writing: Writing | None = None
    """The cache whose `update` ran last, until its attention takes it."""
    routed: Routed | None = None
    """The layer whose attention ran last, until its router takes it."""


current = _Current()
