"""Configuration of a model's cache: `ModelConfig` (shapes, fixed by the model) and `RuntimeConfig` (choices, fixed by
whoever serves it).

Both are frozen dataclasses that validate themselves. They are read from dicts, YAML files, a Megatron
`TransformerConfig`, a Hugging Face config or the `"pikv"` block of a DeepSpeed JSON, strictly: an unknown key is an
error that names its nearest known neighbour. Nothing here touches a tensor beyond its dtype.
"""

from pikv_megatron.config.files import Source, check_same_model, dump, load, load_deepspeed, resolve
from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.model import DTYPES, ModelConfig
from pikv_megatron.config.runtime import RuntimeConfig

__all__ = [
    "DTYPES",
    "ConfigError",
    "ModelConfig",
    "RuntimeConfig",
    "Source",
    "check_same_model",
    "dump",
    "load",
    "load_deepspeed",
    "resolve",
]
