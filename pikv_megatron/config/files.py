"""Configurations from what a user passes: dataclasses, dicts, YAML files, the `"pikv"` block of a DeepSpeed config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from pikv_megatron.config.io import ConfigError, brief, from_mapping, to_mapping
from pikv_megatron.config.model import ModelConfig
from pikv_megatron.config.parse import read_json, read_yaml, to_yaml
from pikv_megatron.config.runtime import RuntimeConfig


@dataclass(frozen=True)
class _File:
    """A whole configuration: what a YAML file, or a DeepSpeed config's `"pikv"` block, may hold."""

    model: ModelConfig | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def load(source: Mapping[str, Any] | str | Path) -> tuple[ModelConfig | None, RuntimeConfig]:
    """Reads a mapping or a YAML file with the sections `model` and `runtime`, both optional.

    Returns:
        The model's config (None where the section is missing) and the runtime's.

    Raises:
        ConfigError: unknown key, wrong type or value out of range; the message names the key.
        FileNotFoundError: `source` names no file.
    """
    file = from_mapping(_File, source if isinstance(source, Mapping) else read_yaml(source), "")
    return file.model, file.runtime


def load_deepspeed(
    config: Mapping[str, Any] | str | Path | None, pikv: Mapping[str, Any] | str | Path | None = None
) -> tuple[dict[str, Any], ModelConfig | None, RuntimeConfig]:
    """Reads a DeepSpeed config (dict or JSON file) whose `"pikv"` block has the sections of a YAML file, or names one.

    Args:
        config: None is an empty one.
        pikv: the block, where `config` has none.

    Returns:
        What is DeepSpeed's, the block taken out; the model's config (None where the section is missing); the runtime's.

    Raises:
        ConfigError: no such block, or two, a file that is not a JSON object, or as `load`.
    """
    if config is not None and not isinstance(config, (Mapping, str, Path)):
        raise ConfigError(f"config: expected a dict or the path of a JSON file, got {type(config).__name__}")
    rest = read_json(config) if isinstance(config, (str, Path)) else dict(config or {})
    if pikv is None and "pikv" not in rest:
        raise ConfigError(
            f"pikv: expected this block in the DeepSpeed config, or as an argument, got the keys {brief(list(rest))}"
        )
    if pikv is not None and "pikv" in rest:
        raise ConfigError("pikv: expected once, got a block in the DeepSpeed config and an argument")
    block = rest.pop("pikv", pikv)
    file = from_mapping(_File, read_yaml(block) if isinstance(block, (str, Path)) else block, "pikv")
    return rest, file.model, file.runtime


Source = Mapping[str, Any] | str | Path


def resolve(
    model: ModelConfig | Source | None, runtime: RuntimeConfig | Source | None = None
) -> tuple[ModelConfig, RuntimeConfig]:
    """Both configs from what a user passes.

    Args:
        model: dataclass, dict of its keys, or a YAML file (or dict) with the sections model and runtime.
        runtime: likewise; None takes what came with `model`, else the defaults. If it has a section `model`, that must
            be the same model.
    """
    if isinstance(model, (str, Path)) or _has_sections(model):
        with_model, with_runtime = load(model)
        if with_model is None:
            raise ConfigError(f"model: section missing in {brief(model)}")
        model, runtime = with_model, with_runtime if runtime is None else runtime
    elif isinstance(model, Mapping):
        model = ModelConfig.from_dict(model)
    given = None
    if isinstance(runtime, (str, Path)) or _has_sections(runtime):
        given, runtime = load(runtime)
    elif isinstance(runtime, Mapping):
        runtime = RuntimeConfig.from_dict(runtime)
    elif runtime is None:
        runtime = RuntimeConfig()
    if not isinstance(model, ModelConfig):
        raise ConfigError(f"model: expected a ModelConfig, a dict or a YAML path, got {type(model).__name__}")
    if not isinstance(runtime, RuntimeConfig):
        raise ConfigError(f"runtime: expected a RuntimeConfig, a dict or a YAML path, got {type(runtime).__name__}")
    if given is not None:
        check_same_model(given, model)
    return model, runtime


def check_same_model(given: ModelConfig, model: ModelConfig, what: str = "config: its section model") -> None:
    """Checks that `what` (a file's section `model`, a cache) is for the model that it is used with."""
    names = [f.name for f in fields(ModelConfig) if getattr(given, f.name) != getattr(model, f.name)]
    if names:
        differs = ", ".join(
            f"{n}: {brief(getattr(given, n))} here, {brief(getattr(model, n))} in the model" for n in names
        )
        raise ConfigError(f"{what} is for another model ({differs})")


def _has_sections(source: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(source, Mapping) and ("model" in source or "runtime" in source)


def dump(model: ModelConfig, runtime: RuntimeConfig) -> str:
    """The resolved configuration as YAML, every default written out; `load` reads it back to equal objects."""
    return to_yaml({"model": to_mapping(model), "runtime": to_mapping(runtime)})
