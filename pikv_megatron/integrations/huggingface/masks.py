"""What is said of a batch's attention mask, besides what the cache refuses."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

log = logging.getLogger(__name__)


def warn_of_right_padding(mask: Tensor) -> None:
    """Warns, once in a process, of rows that end in pads behind their tokens: mask [batch, columns so far], bool."""
    if bool((mask.any(1) & ~mask[:, -1]).any()):
        _say_once()


@functools.cache
def _say_once() -> None:
    log.warning(
        "attention_mask: rows end in pads (padding on the right). Outputs at pads are zeros, and generate goes on from "
        "the last column: pad on the left (tokenizer.padding_side = 'left'), or take the logits of a row's last token"
    )
