"""YAML and JSON from files that anyone may have written: bounded in size and depth, and one line that names the file
and the place where something is wrong.

YAML is read by the core schema of YAML 1.2, in which 1e9 is a number, and yes, off, 1:30 and 2024-01-01 are text; as in
YAML 1.1, digits may be grouped by underscores, and `<<` merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pikv_megatron.config.io import ConfigError, brief

MAX_YAML_BYTES = 1 << 18
"""A configuration has a few thousand."""
MAX_DEPTH = 24
MAX_NODES = 50_000
"""Keys and values of a YAML text, those behind an alias counted each time that they are referred to."""
MAX_JSON_BYTES = 1 << 28
"""The index of a large checkpoint's shards has tens of millions."""

_SCALARS = {  # tag: what it looks like, and the characters that it may begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}


class _Extent(NamedTuple):
    """Nodes of a value with all that it holds, aliases written out, and how deeply they are nested."""

    nodes: int
    depth: int


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the bounds and the schema above; a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's name; the core schema's are added below

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extents: dict[yaml.Node, _Extent] = {}

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        if self._depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"expected at most {MAX_DEPTH} levels", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._extents:
            raise yaml.composer.ComposerError(None, None, "expected no alias within what it stands for", mark)
        if node is not None and not is_alias:
            self._extents[node] = extent = self._extent(node)
            for name, seen, most in (("keys and values", extent.nodes, MAX_NODES), ("levels", extent.depth, MAX_DEPTH)):
                if seen > most:
                    problem = f"expected at most {most} {name}, aliases written out"
                    raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def _extent(self, node: yaml.Node) -> _Extent:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        extents = [self._extents[child] for child in children]
        return _Extent(1 + sum(e.nodes for e in extents), 1 + max((e.depth for e in extents), default=0))

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in lines:
                problem = f"the key {brief(key.value)} stands twice, first in line {lines[key.tag, key.value]}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""), 0)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper; it quotes the text that the loader above or one of YAML 1.1 would read as something else."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises ConfigError, which names `where`, for what is not YAML or has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not YAML: {place}{said}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file holds anything else, or a key twice."""
    content = parse_yaml(read_text(path, MAX_YAML_BYTES), str(path))
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    return content


def to_yaml(mapping: Mapping[str, Any]) -> str:
    """A nested mapping as YAML, keys in their order."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False)


def read_json(path: str | Path, error: type[ValueError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` where the file holds anything else."""
    try:
        content = json.loads(read_text(path, MAX_JSON_BYTES, error))
    except RecursionError as seen:
        raise error(f"{path}: not JSON that can be read: nested too deeply") from seen
    except ValueError as seen:
        if isinstance(seen, error):
            raise
        raise error(f"{path}: not JSON: {seen}") from seen
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_text(path: str | Path, most: int, error: type[ValueError] = ConfigError) -> str:
    """The text of a UTF-8 file of at most `most` bytes; no more than that is read. Raises `error` for any other."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path}: expected a file of at most {most:,} bytes, got a larger one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as seen:
        raise error(f"{path}: expected UTF-8 text: {seen}") from seen
