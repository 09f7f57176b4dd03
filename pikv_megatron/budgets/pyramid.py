"""Policy pyramid: C_i = C_1 - (i - 1) d, less from layer to layer (PyramidKV, arXiv 2406.02069)."""

from __future__ import annotations

from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.sections import BudgetConfig

PYRAMID_BETA = 20
"""PyramidKV's steepness: with a total alone, the last layer gets 1/beta of an average layer's share above the floor."""


class Pyramid:
    """From first_layer_tokens and step, or from total_tokens, with a step or with PyramidKV's steepness."""

    def __init__(self, section: BudgetConfig) -> None:
        if section.first_layer_tokens is not None and section.step is None:
            raise ConfigError("runtime.budget.step: a pyramid from first_layer_tokens needs a step, got null")
        self._section = section

    def layer_tokens(self, layers: int, floor: int) -> tuple[float, float]:
        """C_1 and d. With total_tokens and no step, the share above `floor` falls as in PyramidKV's code."""
        first, step, total = self._section.first_layer_tokens, self._section.step, self._section.total_tokens
        if first is not None:
            return float(first), float(step or 0)
        assert total is not None
        average = total / layers
        if layers == 1:
            return average, 0.0
        if step is not None:
            return average + step * (layers - 1) / 2, float(step)
        above = average - floor
        last_share = above / PYRAMID_BETA
        return floor + 2 * above - last_share, 2 * (above - last_share) / (layers - 1)
