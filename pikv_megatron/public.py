"""The objects behind the public names of `pikv_megatron`, nothing else."""

from pikv_megatron.cache.cache import PiKVCache as PiKVCache
from pikv_megatron.cache.checks import UnknownRequestError as UnknownRequestError
from pikv_megatron.cache.events import CacheEvents as CacheEvents
from pikv_megatron.cache.expert_cache import ExpertKVCache as ExpertKVCache
from pikv_megatron.cache.results import AttendResult as AttendResult
from pikv_megatron.cache.results import Retrieved as Retrieved
from pikv_megatron.cache.step import ActiveStep as ActiveStep
from pikv_megatron.cache.step import Segment as Segment
from pikv_megatron.cache.step import Step as Step
from pikv_megatron.codecs.compressor import Compressor as Compressor
from pikv_megatron.config import ModelConfig as ModelConfig
from pikv_megatron.config import RuntimeConfig as RuntimeConfig
from pikv_megatron.config.io import ConfigError as ConfigError
from pikv_megatron.streamer.streamer import Streamer as Streamer
from pikv_megatron.tiers.blocks import PoolFullError as PoolFullError
