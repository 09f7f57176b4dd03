"""Strict conversion between nested mappings (YAML, JSON) and frozen dataclasses, whatever the keys mean."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value seen and what was expected."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key that stands twice is an error: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises ConfigError, which names `where`, for what is not YAML or has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file holds anything else, or a key twice."""
    content = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    return content


def to_yaml(mapping: Mapping[str, Any]) -> str:
    """A nested mapping as YAML, keys in their order."""
    return yaml.safe_dump(dict(mapping), sort_keys=False)


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as a plain mapping under its YAML keys, tuples as lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_mapping(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {_key(field): plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from `mapping`; missing keys keep their defaults.

    Args:
        where: dotted name of this section, for error messages ("" at the top).

    Raises:
        ConfigError: unknown key (with the nearest known one, of a section below too), wrong type, or what `cls` itself
            refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or 'config'}: expected a mapping of keys, got {mapping!r}")
    fields = {_key(field): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = _nearest(str(key), fields, _keys_of_sections(hints, fields))
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{name}: unknown key; {hint}")
        values[fields[key].name] = _convert(value, hints[fields[key].name], name)
    return cls(**values)


def _nearest(key: str, fields: Mapping[str, Any], below: Mapping[str, str]) -> str | None:
    """The known key that is most like `key`: one of these fields, or of the sections below where it is much closer."""
    for known, cutoff in ((fields, 0.8), (below, 0.8), (fields, 0.5)):
        if near := difflib.get_close_matches(key, known, n=1, cutoff=cutoff):
            return below[near[0]] if known is below else near[0]
    return None


def _keys_of_sections(hints: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]) -> dict[str, str]:
    """Each key of the sections below, as it is written from here: {"codec": "runtime.codec"}."""
    below: dict[str, str] = {}
    for key, field in fields.items():
        hint = hints[field.name]
        for section in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(section) and typing.get_origin(hint) is not tuple:
                below |= {_key(inner): f"{key}.{_key(inner)}" for inner in dataclasses.fields(section)}
    return below


def check_fields(config: Any, where: str) -> None:
    """For a dataclass's __post_init__: holds fields given by hand to the types that `from_mapping` asks for.

    Args:
        where: dotted name of the section, for error messages.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _convert(getattr(config, field.name), hints[field.name], f"{where}.{_key(field)}")
        object.__setattr__(config, field.name, value)


def _key(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("key", field.name)


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [arg for arg in args if arg is not type(None)]
        return _convert(value, hint, name)
    if origin is Literal:
        if value is False and "off" in args:  # YAML 1.1 reads a bare `off` as False
            value = "off"
        if value is None and "none" in args:  # and people write null for none
            value = "none"
        if value not in args or isinstance(value, bool):
            raise ConfigError(f"{name}: expected one of {', '.join(args)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(item, args[0], f"{name}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_mapping(hint, value, name)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        hint_on_floats = "; YAML reads 1e-3 as text, write 1.0e-3" if hint is float and _is_number(value) else ""
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}{hint_on_floats}")
    return value


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
