"""Ranks whose forwards meet in collectives take each step together, or none of them does. A rank that refused a step
alone (no memory left, a mask that does not fit) would leave the others in an all-to-all that never ends, or that ends
in 'Connection closed by peer'.

What goes wrong later in a forward is not agreed upon: then the others still see the broken collective only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist


class Agreement(AbstractContextManager[None]):
    """Around what may refuse a step: leaves together on all ranks, with an error on all of them where there was one.

    It costs one all-reduce of a number, over gloo whatever the model runs on, so that no device is waited for. All
    ranks have to make one at the same time.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._met = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Exception):
            self._meet(error)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a whole generation: where it fails before its first step, the others wait for this rank there."""
        self._met = False
        try:
            yield
        except Exception as error:
            if not self._met:
                self._meet(error)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Agreement:
        """A cache's copy is used with the same ranks."""
        return self

    def _meet(self, error: Exception | None) -> None:
        """Tells the other ranks that this one goes on, or of its error.

        Raises:
            RuntimeError: another rank refuses; this one does not.
        """
        self._met = True
        refused = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(refused, dist.ReduceOp.MAX, self._group)
        if not refused.item():
            return
        reasons: list[Any] = [None] * dist.get_world_size(self._group)
        mine = None if error is None else f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        dist.all_gather_object(reasons, mine, self._group)
        if error is None:
            told = "; ".join(reason for reason in reasons if reason is not None)
            raise RuntimeError(f"no rank takes this step, since it was refused by {told}")
