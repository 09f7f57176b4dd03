"""Streamer: where sealed blocks and finished requests are announced, so that they can be logged and recovered.

This version has the one that is off. The cache calls it at the points where a log would write;
`RuntimeConfig.streamer.path` refuses anything but null until a log exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor


class Streamer:
    """A streamer that is off: it keeps nothing. One that keeps something must not raise: what it hears has happened."""

    def sealed(
        self, request_id: int, layer_id: int, start: int, encode: Callable[[], Mapping[str, Tensor]], label: Tensor
    ) -> None:
        """Blocks contiguous from position `start` were sealed, those too that a budget dropped at once.

        Args:
            encode: gives their fields (leading dimension: blocks); it encodes them anew, and only until this returns.
            label: [blocks].
        """

    def released(self, request_id: int) -> None:
        """The request is over."""

    def forked(self, source: int, target: int) -> None:
        """Request `target` has begun with all that `source` holds."""

    def reordered(self, request_ids: Sequence[int], sources: Sequence[int]) -> None:
        """Each of these requests goes on from what the request beside it in `sources` held."""

    def cropped(self, request_id: int, length: int) -> None:
        """The request's tokens from position `length` on are forgotten."""
