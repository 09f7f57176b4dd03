"""The `pikv` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

USER_ERRORS = (ValueError, TypeError, OSError, KeyError, ImportError, RuntimeError)
"""What a user can mend, as our library, the hosts and torch say it. With --verbose they come with their traceback."""
COMMANDS = ("generate", "demo", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status. What a user can mend ends in one line on stderr and status 2."""
    try:
        modules = {name: importlib.import_module(f"pikv_megatron.cli.{name}") for name in COMMANDS}
    except USER_ERRORS as error:  # the ops do not load
        return _refuse("pikv", error)
    parser = argparse.ArgumentParser(prog="pikv", description="A KV cache for mixture-of-experts models.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the library does")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        summary = (module.__doc__ or "").split("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return int(modules[args.command].run(args))
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            raise
        return _refuse(f"pikv {args.command}", error)


def _refuse(command: str, error: Exception) -> int:
    print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
