"""Small lists of numbers that the host knows and ops want on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 512


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers that the host knows as an int64 tensor on a device, which is not waited for."""
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)


class DeviceNumbers:
    """Lists of ints as int64 tensors. Layers of a step ask for the same ones, and so do steps: they are made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, ...], Tensor] = {}

    def of(self, numbers: tuple[int, ...]) -> Tensor:
        """The numbers; nobody may write to the tensor."""
        made = self._made.get(numbers)
        if made is None:
            if len(self._made) >= _MOST:
                self._made.clear()
            made = self._made[numbers] = on_device(numbers, self._device)
        return made

    def runs(self, counts: Sequence[int]) -> Tensor:
        """Where runs of these lengths begin in a packed list, and its length: [len(counts) + 1]."""
        return self.of((0, *itertools.accumulate(counts)))

    def __reduce__(self) -> tuple[type[DeviceNumbers], tuple[torch.device]]:
        return DeviceNumbers, (self._device,)
