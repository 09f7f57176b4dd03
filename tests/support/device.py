"""The ops on a CUDA device, taking and giving tensors of the host, so that the same tests run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pikv_megatron.ops
from pikv_megatron.ops import kernels


class Device:
    """As Launchers, but through torch.ops. splits: chosen by the ops themselves."""

    splits = 0

    def set_seed(self, seed: int) -> None:
        """A device orders its threads as it likes."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(kernels, name, None)
        if op is None:
            pytest.skip(f"torch.ops has no {name} for CUDA yet")

        def on_device(*arguments: Any) -> Any:
            moved = [_to(x, "cuda") for x in arguments]
            result = op(*moved)
            for before, after in zip(arguments, moved, strict=True):
                _copy_back(before, after)
            return _to(result, "cpu")

        return on_device


def open_device() -> Device:
    """Skips where the CUDA library is not built."""
    if pikv_megatron.ops.kernel_set is None or not torch._C._dispatch_has_kernel_for_dispatch_key(
        "pikv::attend_blocks_out", "CUDA"
    ):
        pytest.skip("the CUDA ops are not built: PIKV_CUDA=1 demands them")
    return Device()


def _to(x: Any, device: str) -> Any:
    """Tensors, and tuples and named tuples of them, on a device; anything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        moved = [_to(part, device) for part in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return [_to(part, device) for part in x] if isinstance(x, list) else x


def _copy_back(before: Any, after: Any) -> None:
    """Ops may write into what they are given."""
    if isinstance(before, torch.Tensor):
        before.copy_(after)
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            _copy_back(one, other)
