"""Strict conversion between nested mappings (YAML, JSON) and frozen dataclasses, whatever the keys mean."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

LARGEST_EXACT = 2**53
"""Floats up to here stand for one integer each."""


PolicyName = Annotated[str, "policy"]
"""The name of a policy; which there are, its package's table says (`config.table`)."""

POLICY_CHECKS: dict[str, Callable[[str, str], None]] = {}
"""For a key that names a policy: what checks a value (name, key as it is to be called). Tables enter themselves."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value seen and what was expected."""


def brief(value: object) -> str:
    """`repr` for messages, shortened where the value is large or nested."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxother = 80


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
        raise ConfigError(f"{where or 'config'}: expected a mapping of keys, got {brief(mapping)}")
    fields = {_key(field): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            seen = key if isinstance(key, str) and len(key) < 80 else brief(key)
            name = f"{where}.{seen}" if where else seen
            near = _nearest(seen, fields, _keys_of_sections(hints, fields))
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{name}: unknown key; {hint}")
        name = f"{where}.{key}" if where else key
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
    hints = typing.get_type_hints(type(config), include_extras=True)
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
    if hint is PolicyName:
        value = "none" if value is None else _convert(value, str, name)  # people write null for none
        check = POLICY_CHECKS.get("runtime." + re.sub(r"\[\d+\]", "", name).rpartition("runtime.")[2])
        if check is not None:
            check(value, name)
        return value
    if origin is Literal:
        if value is False and "off" in args:  # YAML 1.1 reads a bare `off` as False
            value = "off"
        if value not in args or isinstance(value, bool):
            raise ConfigError(f"{name}: expected one of {', '.join(args)}, got {brief(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {brief(value)}")
        return tuple(_convert(item, args[0], f"{name}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return from_mapping(hint, value, name)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 1024:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT:
        return int(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {brief(value)}{_as_number(value, hint)}")
    if hint is int and abs(value) >= 2**63:
        raise ConfigError(f"{name}: expected an int below 2**63, got {brief(value)}")
    return value


def _as_number(value: object, hint: type) -> str:
    """For an error: what to write instead of a number that is text, or that is not exact."""
    if hint in (int, float) and isinstance(value, str) and len(value) < 80:
        with contextlib.suppress(ValueError):
            number = float(value)
            if number.is_integer() or (hint is float and math.isfinite(number)):
                return f"; this is text, write {int(number) if number.is_integer() else number} without quotes"
    return "; write all of its digits" if hint is int and isinstance(value, float) and value.is_integer() else ""
