"""A checkpoint's directory as somebody else made it: which files its index may name, and weights that are not finite.

Imports no host. Nothing in the directory is run, and what its index names outside of it is not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pikv_megatron.config.io import brief
from pikv_megatron.config.parse import read_json
from pikv_megatron.integrations.mixtral_names import WeightsError


def shards(index: Path) -> list[Path]:
    """The files that a checkpoint's index lists, all beside it.

    A file may be a link to another one in the folder, or to where Hugging Face's cache keeps its files (the folder
    `blobs` of `models--owner--name`).

    Raises:
        WeightsError: the index cannot be read, or names something else than files beside it.
        FileNotFoundError: a file is not there.
    """
    names = read_json(index, WeightsError).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{index}: expected an object weight_map from names to files, got {brief(names)}")
    for name in names.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
            raise WeightsError(f"{index}: weight_map: expected names of files in the same folder, got {brief(name)}")
    files = [index.parent / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent}: {index.name} lists {', '.join(missing)}, which are not there")
    folder = index.parent.resolve()
    for file in files:
        target = file.resolve()
        blobs = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if folder not in target.parents and not blobs:
            raise WeightsError(f"{file}: expected a file in this folder, got a link to {target}; copy it here")
    return files


def check_finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> None:
    """Checks that tensors hold finite values, in `dtype` as well where it is given. Raises WeightsError by name."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()  # float8 has no aminmax
        ends = torch.stack(torch.aminmax(values)).to(dtype or values.dtype)
        if not ends.isfinite().all():
            raise WeightsError(f"{name}: holds values that are not finite in {ends.dtype}, expected finite weights")
