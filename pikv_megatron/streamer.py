"""Streamer: where sealed blocks and finished requests are announced, so that they can be logged and recovered.

This version has the one that is off. The cache calls it at the points where a log would write;
`RuntimeConfig.streamer.path` refuses anything but null until a log exists.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Streamer:
    """A streamer that is off: it keeps nothing."""

    def sealed(self, request_id: int, layer_id: int, start: int, encoded: Mapping[str, Tensor], label: Tensor) -> None:
        """Blocks of `encoded` (leading dimension: blocks), contiguous from position `start`, were sealed."""

    def released(self, request_id: int) -> None:
        """The request is over."""
