"""The short name of `pikv_megatron`: the same public names, looked up there on first use, nothing else."""

from typing import TYPE_CHECKING, Any

import pikv_megatron

if TYPE_CHECKING:
    from pikv_megatron import *  # noqa: F403

__all__ = pikv_megatron.__all__


def __getattr__(name: str) -> Any:
    return getattr(pikv_megatron, name)


def __dir__() -> list[str]:
    return sorted(__all__)
