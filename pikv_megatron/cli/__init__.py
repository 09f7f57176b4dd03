"""The `pikv` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from pikv_megatron import __version__

USER_ERRORS = (ValueError, TypeError, OSError, KeyError, ImportError, RuntimeError)
"""What a user can mend, as our library, the hosts and torch say it. With --verbose they come with their traceback."""
COMMANDS = {
    "generate": "continue a prompt with a model, and say what its cache held and read",
    "demo": "answer questions about documents through stock Megatron's cache and PiKV's, and print one table",
    "doctor": "say what this installation is, and what keeps it from being fast or from working",
    "launch-dir": "print the folder of the launch scripts and of the models' configurations",
}
"""Each with one line of help. Its module has the same name; it is imported when the command is run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status. What a user can mend ends in one line on stderr and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="pikv", description="A KV cache for mixture-of-experts models.")
    parser.add_argument("--version", action="version", version=f"pikv_megatron {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the library does")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=line, description=line) for name, line in COMMANDS.items()}
    name = next((word for word in words if not word.startswith("-")), None)
    if name in COMMANDS:
        try:
            module = importlib.import_module(f"pikv_megatron.cli.{name.replace('-', '_')}")
        except USER_ERRORS as error:  # the ops do not load
            return _refuse("pikv", error)
        module.add_arguments(parsers[name])
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return int(module.run(args))
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            raise
        from pikv_megatron.launch.peers import ending

        return _refuse(f"pikv {args.command}", ending(error))


def _refuse(command: str, error: BaseException) -> int:
    print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
