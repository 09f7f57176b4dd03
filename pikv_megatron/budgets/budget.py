"""Budgets: how many tokens of one request each layer may hold on the device (PyramidKV, arXiv 2406.02069), and which
blocks leave when it holds more.

Whole blocks leave, never single tokens: a block is the unit of memory, of transfer and of recovery. Sinks and window
always stay; up to block_size - 1 tokens that have left the window but do not fill a block yet ride on top of the
budget, and so do the tokens of the newest append until they are sealed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_megatron.budgets import BUDGETS
from pikv_megatron.config import ConfigError, ModelConfig, RuntimeConfig


def layer_budgets(model: ModelConfig, runtime: RuntimeConfig) -> list[int] | None:
    """Tokens of one request that each of model.full_layers may hold, C_i = C_1 - (i - 1) d, or None where there is no
    budget.

    Raises:
        ConfigError: a layer's budget is below sinks + window, which every layer needs; nothing is raised to it.
    """
    section, layers = runtime.budget, len(model.full_layers)
    policy = BUDGETS.pick(section.policy)
    if policy is None:
        return None
    floor = runtime.sinks + runtime.window
    first, step = policy(section).layer_tokens(layers, floor)
    tokens = [int(first - i * step) for i in range(layers)]
    for layer_id, count in enumerate(tokens):
        if count < floor:
            given = {
                name: value
                for name in ("first_layer_tokens", "total_tokens", "step")
                if (value := getattr(section, name)) is not None
            }
            what = ", ".join(f"{name} {value}" for name, value in given.items())
            raise ConfigError(
                f"runtime.budget ({what}): layer {model.full_layers[layer_id]} would get {count} tokens, "
                f"expected at least sinks + window = {floor}"
            )
    return tokens


def allowed_blocks(model: ModelConfig, runtime: RuntimeConfig) -> list[int] | None:
    """Sealed blocks of one request that each layer's budget leaves on the device beside sinks and window (none of a
    sliding-window layer); None where there is no budget.
    """
    budgets = layer_budgets(model, runtime)
    if budgets is None:
        return None
    blocks = [0] * model.num_layers
    for layer_id, tokens in zip(model.full_layers, budgets, strict=True):
        blocks[layer_id] = (tokens - runtime.sinks - runtime.window) // runtime.block_size
    return blocks


def least_important(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` blocks whose tokens received the least attention; ties go to the older block.

    Args:
        importance: [blocks, block_size] accumulated I_t = sum_h softmax(Q_h K_t^T / sqrt(d)), oldest block first.
    """
    return torch.argsort(importance.sum(-1), stable=True)[:count]
