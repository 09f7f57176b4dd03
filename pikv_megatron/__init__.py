"""PiKV for Megatron-core and DeepSpeed: a KV cache for mixture-of-experts models. The public names, nothing else.

They are loaded on first use, so that the command line can say in one line what keeps the ops from loading.
"""

# ruff: noqa: F405

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pikv_megatron.public import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "ActiveStep",
    "AttendResult",
    "CacheEvents",
    "Compressor",
    "ConfigError",
    "ExpertKVCache",
    "ModelConfig",
    "PiKVCache",
    "PoolFullError",
    "Retrieved",
    "RuntimeConfig",
    "Segment",
    "Step",
    "Streamer",
    "UnknownRequestError",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pikv_megatron.public"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
