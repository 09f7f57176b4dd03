"""Print the folder of the launch scripts and of the models' configurations, in a checkout and in a wheel."""

from __future__ import annotations

import argparse

from pikv_megatron.cli.files import bundled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    """Runs `pikv launch-dir`."""
    print(bundled("launch"))
    return 0
