"""The objects behind the public names of `pikv_megatron`, nothing else."""

from pikv_megatron.blocks import PoolFullError as PoolFullError
from pikv_megatron.cache import PiKVCache as PiKVCache
from pikv_megatron.checks import UnknownRequestError as UnknownRequestError
from pikv_megatron.compressor import Compressor as Compressor
from pikv_megatron.config import ModelConfig as ModelConfig
from pikv_megatron.config import RuntimeConfig as RuntimeConfig
from pikv_megatron.config_io import ConfigError as ConfigError
from pikv_megatron.expert_cache import ExpertKVCache as ExpertKVCache
from pikv_megatron.results import AttendResult as AttendResult
from pikv_megatron.results import Retrieved as Retrieved
from pikv_megatron.streamer import Streamer as Streamer
