"""The mode of torch in which a cache's tensors are kept: no gradients, no inference tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def keeps_tensors(method: Callable[P, R]) -> Callable[P, R]:
    """For methods that keep tensors: no gradients, and no inference tensors, which could not be written to outside of
    inference mode. A host may be in it in one call and not in the next.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)  # already in the right mode
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call
