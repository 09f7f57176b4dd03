"""What the subcommands share: the files they take by default, overrides on the command line, a model on its host."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pikv_megatron import ops  # noqa: F401 - so that what keeps them from loading is said before anything is done
from pikv_megatron.cli.files import bundled
from pikv_megatron.config import ModelConfig, RuntimeConfig, check_same_model, load
from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.parse import parse_yaml, read_yaml
from pikv_megatron.launch.environment import read_launch

SMALL_MOE = bundled("assets/small_moe")
HELD_OUT_TEXT = bundled("assets/text/kjv_heldout.txt")
SMALL_MOE_CONFIG = bundled("launch/configs/small_moe.yaml")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[ModelConfig | None, RuntimeConfig]:
    """A YAML file with `key.path=value` overrides applied; values are YAML.

    Paths start at the section runtime, or name a section themselves (`model.topk`).

    Raises:
        ConfigError: an override without `=`, or whose path leads through a value, or what `load` refuses.
    """
    mapping = dict(read_yaml(path))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected key.path=value")
        *sections, key = name.split(".")
        if not sections or sections[0] not in ("model", "runtime"):
            sections.insert(0, "runtime")
        place: Any = mapping
        for section in sections:
            place[section] = dict(place.get(section) or {}) if isinstance(place.get(section), dict | None) else None
            place = place[section]
            if place is None:
                raise ConfigError(f"--set {override}: {section} is not a section")
        place[key] = parse_yaml(text, f"--set {override}")
    return load(mapping)


def check_single_rank(what: str) -> None:
    """Raises ValueError where a launcher has started this process with others: each would do all of the work."""
    launch = read_launch(os.environ)
    if launch.world_size > 1:
        raise ValueError(f"{what}: expected a single process, got {launch}")


def set_threads(threads: int | None) -> None:
    """torch's threads, as --threads says; None: as they are. Raises ValueError for more than can be started."""
    if threads is None:
        return
    most = max(64, os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise ValueError(f"--threads: expected 1 .. {most}, got {threads}")
    torch.set_num_threads(threads)


def check_seed(seed: int) -> None:
    """Checks --seed; raises ValueError for what a generator of random numbers does not take."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed: expected 0 .. 2**64 - 1, got {seed}")


def megatron_model(
    path: str | Path, model: ModelConfig | None, threads: int | None, expert_parallel: int = 1
) -> nn.Module:
    """Loads a Mixtral checkpoint into a stock Megatron-core model on this machine's device.

    Raises:
        ImportError: Megatron-core is not installed.
        ConfigError: `model` describes another model.
    """
    set_threads(threads)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # of names that Megatron-core calls
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from pikv_megatron.integrations import cpu_compat

        cpu_compat.install()
    from pikv_megatron.integrations import hf_weights, megatron
    from pikv_megatron.launch import init_megatron

    init_megatron(expert_parallel=expert_parallel)
    set_threads(threads)  # what is asked for goes before what binding to CPUs has chosen
    dtype = torch.float32 if model is None else model.torch_dtype
    built = hf_weights.load_mixtral(path, dtype=dtype, expert_model_parallel_size=expert_parallel)
    if model is not None:
        check_same_model(model, megatron.model_config(built))
    return built
