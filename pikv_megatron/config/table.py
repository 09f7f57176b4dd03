"""Tables of policies: one row per name that a key of the configuration may have, kept by the package of the policy.

A table checks its keys: the sections of the configuration ask those tables that are loaded, and whoever takes a row
asks again. So the configuration knows no policy, and a new one is its file and its row.
"""

from __future__ import annotations

import difflib
from typing import Any, Generic, TypeVar

from pikv_megatron.config.io import POLICY_CHECKS, ConfigError, brief

Row = TypeVar("Row")

TABLES: dict[str, Table[object]] = {}
"""The tables that are loaded, by their keys."""


class Table(Generic[Row]):
    """Rows by name.

    Args:
        keys: the keys of the configuration whose values are names of rows, as in runtime.codec.keys.
        rows: name: row; a plug-in or a test may add some.
    """

    def __init__(self, keys: tuple[str, ...], rows: dict[str, Row]) -> None:
        self.keys, self.rows = keys, rows
        for key in keys:
            TABLES[key] = self  # type: ignore[assignment]
            POLICY_CHECKS[key] = self.check

    def check(self, name: str, key: str) -> None:
        """Raises ConfigError where there is no such row; the message names the key and those that there are."""
        if name not in self.rows:
            near = difflib.get_close_matches(str(name)[:80], self.rows, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key}: expected one of {', '.join(self.rows)}, got {brief(name)}{hint}")

    def pick(self, name: str, key: str | None = None) -> Row:
        """The row of a name. Raises as `check`."""
        self.check(name, key or self.keys[0])
        return self.rows[name]


def check_section(name: str, key: str, section: Any) -> None:
    """Checks that a policy can be made of its section, where the key's table, whose rows are made of one, is loaded."""
    row: Any = TABLES[key].pick(name, key) if key in TABLES else None
    if row is not None:
        row(section)
