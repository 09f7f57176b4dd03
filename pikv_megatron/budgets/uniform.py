"""Policy uniform: every layer gets the same."""

from __future__ import annotations

from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.sections import BudgetConfig


class Uniform:
    """first_layer_tokens, or an equal share of total_tokens."""

    def __init__(self, section: BudgetConfig) -> None:
        if section.step is not None:
            raise ConfigError(f"runtime.budget.step: policy uniform has no step, expected null, got {section.step}")
        self._section = section

    def layer_tokens(self, layers: int, floor: int) -> tuple[float, float]:
        """C_1 and the step from layer to layer, 0."""
        first, total = self._section.first_layer_tokens, self._section.total_tokens
        if first is not None:
            return float(first), 0.0
        assert total is not None
        return total / layers, 0.0
