"""Being told of a model's layers as a forward goes through them, on any host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def after_each(layers: Sequence[nn.Module], callback: Callable[[], object]) -> Iterator[int]:
    """While it lasts, calls `callback` after each of these modules in a forward; yields how many there are."""

    def done(module: nn.Module, args: object, output: object) -> None:
        callback()

    handles = [layer.register_forward_hook(done) for layer in layers]
    try:
        yield len(layers)
    finally:
        for handle in handles:
            handle.remove()
