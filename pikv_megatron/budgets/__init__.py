"""Budgets: how many tokens of a request a layer may hold on the device, and which blocks leave. One file a policy, one
row here; none means that there is no budget.
"""

from __future__ import annotations

from typing import Protocol

from pikv_megatron.budgets.pyramid import Pyramid
from pikv_megatron.budgets.uniform import Uniform
from pikv_megatron.config.sections import BudgetConfig
from pikv_megatron.config.table import Table


class BudgetPolicy(Protocol):
    """Divides tokens over layers. Made of its section, which it checks (ConfigError)."""

    def __init__(self, section: BudgetConfig) -> None: ...

    def layer_tokens(self, layers: int, floor: int) -> tuple[float, float]:
        """C_1 and d of C_i = C_1 - (i - 1) d, in tokens; `floor` is what every layer needs, sinks + window."""


BUDGETS: Table[type[BudgetPolicy] | None] = Table(
    ("runtime.budget.policy",), {"none": None, "uniform": Uniform, "pyramid": Pyramid}
)
