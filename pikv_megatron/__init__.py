"""PiKV for Megatron-core and DeepSpeed: a KV cache for mixture-of-experts models. The public names, nothing else."""

from pikv_megatron.blocks import PoolFullError
from pikv_megatron.cache import PiKVCache
from pikv_megatron.checks import UnknownRequestError
from pikv_megatron.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.config_io import ConfigError
from pikv_megatron.expert_cache import ExpertKVCache
from pikv_megatron.results import AttendResult, Retrieved
from pikv_megatron.streamer import Streamer

__version__ = "0.1.0"

__all__ = [
    "AttendResult",
    "Compressor",
    "ConfigError",
    "ExpertKVCache",
    "ModelConfig",
    "PiKVCache",
    "PoolFullError",
    "Retrieved",
    "RuntimeConfig",
    "Streamer",
    "UnknownRequestError",
]
