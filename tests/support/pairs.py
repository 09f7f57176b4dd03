"""Choosing few cases out of many: every pair of values of any two parameters occurs in some case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def every_pair(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases that cover all pairs: a pair not yet covered, and of every other parameter the value that covers most."""
    names = list(parameters)
    missing = {
        frozenset([(a, x), (b, y)]) for a, b in combinations(names, 2) for x, y in product(parameters[a], parameters[b])
    }
    chosen = []
    while missing:
        case = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        for name in names:
            if name not in case:
                case[name] = max(parameters[name], key=lambda value: len(_pairs({**case, name: value}) & missing))
        case = {name: case[name] for name in names}
        chosen.append(case)
        missing -= _pairs(case)
    return chosen


def _pairs(case: Mapping[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


def every_case(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All of them."""
    return [dict(zip(parameters, values, strict=True)) for values in product(*parameters.values())]


def name_of(case: Mapping[str, Any]) -> str:
    """A test id: the values of a case."""
    return "-".join(str(value) for value in case.values())
