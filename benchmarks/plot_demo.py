"""Draws docs/demo.png: answers and KV bytes of each cache of `pikv demo`, from one run of it.

python benchmarks/plot_demo.py [--output docs/demo.png] [--results FILE]    # FILE: of `pikv demo --json`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", default="docs/demo.png")
    made.add_argument("--results", help="results of a run that was made already")
    args = made.parse_args()
    command = [sys.executable, "-m", "pikv_megatron", "demo", "--json"]
    if args.results:
        results = Path(args.results).read_text(encoding="utf-8")
    else:
        results = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    draw(json.loads(results)["caches"], Path(args.output))


def draw(rows: list[dict], output: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    rows = rows[::-1]
    names = [row["cache"] for row in rows]
    held = [row["kv_bytes"]["device"] / 1e6 for row in rows]
    below = [row["kv_bytes"].get("host", 0) / 1e6 for row in rows]
    axes.barh(names, held, color="#3b6ea5", label="device")
    axes.barh(names, below, left=held, color="#b9cde3", label="host")
    for i, row in enumerate(rows):
        said = f"{row['answers_right']} of {row['questions']} right, {row['share_read']:.0%} read"
        axes.text(held[i] + below[i] + 0.02, i, said, va="center", fontsize=9)
    axes.set_xlabel("MB of keys and values held for one document")
    axes.set_xlim(0, 1.45 * max(a + b for a, b in zip(held, below, strict=True)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
