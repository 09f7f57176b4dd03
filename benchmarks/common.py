"""What the benchmark scripts share: arguments, devices, timing, tables, marks and the line that names the machine.

All calls of a script are timed in one run, in rounds in which each has its turn, so that a slow minute of the machine
hits all alike; medians are reported, and ratios are what to read.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from pikv_megatron import ops

FEWEST_ROUNDS = 3
PATIENCE = 5.0
"""Seconds after which a call takes no further part in the rounds, once it has had FEWEST_ROUNDS."""

Work = Mapping[str, Callable[[], object]]


def parser(doc: str, *, threads: Sequence[int], rounds: int) -> argparse.ArgumentParser:
    """The arguments that every script has: --device, --threads, --rounds, --clock."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--device", type=_device, default=torch.device("cpu"), help="cpu or cuda")
    made.add_argument("--threads", type=int, nargs="+", default=list(threads), help="CPU threads, one column each")
    made.add_argument("--rounds", type=int, default=rounds, help="how often each call is timed")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use too")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; on a GPU the CPU's threads make no columns of their own."""
    args = made.parse_args()
    if args.device.type == "cuda":
        args.threads, args.clock = args.threads[:1], "wall"
    return args


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"torch {torch.__version__} finds no CUDA device here: run this on a machine with one, with a CUDA build"
        )
    return torch.device(name)


def machine(args: argparse.Namespace) -> str:
    """The processor or GPU, torch's version, what runs our ops, and the clock."""
    if args.device.type == "cuda":
        return f"{torch.cuda.get_device_name(args.device)}, torch {torch.__version__}"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, torch {torch.__version__}, on CPU, "
        f"our ops: {ops.kernel_set or 'plain torch'}, {args.clock} time"
    )


def quiet() -> None:
    """Silences what the peers and hosts say when they are imported."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def keep_memory() -> None:
    """Lets malloc keep what was freed (glibc): fresh memory costs more than most of what is timed, for all alike."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def medians(work: Work, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Median seconds of each call, by --clock; the CPU's seconds are those of all threads over their number.

    Every call must have run once before with these threads: nothing here is a warm-up.
    """
    synchronize = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    clock, share = (time.perf_counter, 1) if args.clock == "wall" else (time.process_time, threads)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, call in work.items():
            if len(times[name]) >= FEWEST_ROUNDS and sum(times[name]) > PATIENCE:
                continue
            synchronize()
            began = clock()
            call()
            synchronize()
            times[name].append((clock() - began) / share)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def print_table(head: Sequence[str], rows: Mapping[str, Sequence[str] | str], group: int = 0) -> None:
    """One line per row: its name, then its cells under `head` with a gap before each `group`, or a remark instead."""
    width = max(map(len, rows)) + 2

    def line(name: str, cells: Sequence[str]) -> str:
        gaps = ("   " if group and i % group == 0 else "" for i in range(len(cells)))
        return f"{name:{width}}" + "".join(gap + f"{cell:>10}" for gap, cell in zip(gaps, cells, strict=True))

    print(line("", head))
    for name, cells in rows.items():
        print(f"{name:{width}}   {cells}" if isinstance(cells, str) else line(name, cells).rstrip())


class Mark(NamedTuple):
    """A ratio that is to be reached. sign: `>=` or `<=`."""

    text: str
    sign: str
    wanted: float
    got: float


def print_marks(marks: Sequence[Mark]) -> None:
    """One line per mark, and whether it was missed."""
    for text, sign, wanted, got in marks:
        reached = got >= wanted if sign == ">=" else got <= wanted
        print(f"mark: {text}: wanted {sign} {wanted:g}, got {got:.2f}{'' if reached else ', missed'}")
