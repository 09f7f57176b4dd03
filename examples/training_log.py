"""The log of a training run, one JSON record per line, and the curves drawn from it. Knows of no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Log:
    """`log.jsonl`: one line per record, on rank 0 only."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        lines = read_log(path) if path.exists() else []
        kept = [json.dumps(record) + "\n" for record in lines if record["step"] <= resumed_at]
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, record: dict[str, float]) -> None:
        """Appends a record and prints it. It has a `step`, a `length` of sequence, `tokens` and `seconds` so far."""
        record = {name: round(value, 4) for name, value in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(" ".join(f"{name} {value}" for name, value in record.items()), flush=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def means(window: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean losses (nats per byte) and answer accuracy over some steps, each where there was anything to average."""
    total = {name: sum(sums[name] for sums in window) for name in window[0]}
    values = {
        f"{kind}_loss": total[f"{kind}_loss"] / total[f"{kind}_count"]
        for kind in ("text", "answer", "copy")
        if total[f"{kind}_count"]
    }
    if total["answer_count"]:
        values["answer_accuracy"] = total["right"] / total["answer_count"]
    return values


def draw_curve(log: Path, image: Path) -> None:
    """The losses and the accuracies of a log over tokens, as a PNG. Without matplotlib it says so and draws nothing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"{image} not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    records = read_log(log)

    def series(name: str) -> tuple[list[float], list[float]]:
        found = [(record["tokens"] / 1e6, record[name]) for record in records if name in record]
        return [x for x, _ in found], [y for _, y in found]

    figure, (losses, accuracy) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    losses.plot(*series("text_loss"), label="text")
    losses.plot(*series("answer_loss"), label="answers")
    losses.set_ylabel("training loss, nats per byte")
    losses.set_ylim(bottom=0)
    losses.legend()
    accuracy.plot(*series("answer_accuracy"), color="C1", label="digits right, training rows")
    x, right = series("heldout_right")
    shares = [value / asked for value, asked in zip(right, series("heldout_asked")[1], strict=True)]
    accuracy.plot(x, shares, "o-", color="C2", label="answers right, held-out documents of 1,024 tokens")
    accuracy.set_ylabel("share right")
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.set_xlabel("million tokens")
    accuracy.legend(loc="lower right")
    seen = None
    for record in records:
        if record["length"] != seen:
            for axes in (losses, accuracy):
                axes.axvline(record["tokens"] / 1e6, color="0.8", linewidth=0.8, zorder=0)
            losses.text(record["tokens"] / 1e6, 0.98, f" {record['length']}", transform=losses.get_xaxis_transform(),
                        va="top", fontsize=8, color="0.4")  # fmt: skip
            seen = record["length"]
    losses.set_title("small MoE, from scratch; grey: where sequences of this length begin", fontsize=10)
    figure.savefig(image, dpi=120)
    plt.close(figure)
