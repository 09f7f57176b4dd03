"""Answer questions about documents through stock Megatron's cache and PiKV's, and print one table.

Each document is a public-domain text with facts hidden in it. Every cache reads the document, then is asked about each
fact, one token per step, as in generation; the right answer is fed after the model has given its own, so that all
caches see the same tokens and their logits can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pikv_megatron.cli.common import (
    HELD_OUT_TEXT,
    SMALL_MOE,
    SMALL_MOE_CONFIG,
    check_seed,
    check_single_rank,
    megatron_model,
    read_config,
)
from pikv_megatron.cli.files import checkpoint_folder
from pikv_megatron.facts import Document, documents, load_text

if TYPE_CHECKING:
    from pikv_megatron.integrations.megatron.session import Session

BUDGETED = [
    "budget.policy=pyramid",
    "budget.total_tokens=1600",
    "tiers=[{kind: device}, {kind: host}]",
]
CACHES: dict[str, list[str] | None] = {
    "stock Megatron": None,
    "PiKV exact": [],
    "PiKV INT8": ["codec.keys=int8", "codec.values=int8"],
    "PiKV INT4": ["codec.keys=int4", "codec.values=int4"],
    "PiKV INT8, pyramid, top_k 25 %": [
        "codec.keys=int8",
        "codec.values=int8",
        "attention.mode=top_k",
        "attention.read_fraction=0.25",
        *BUDGETED,
    ],
    "PiKV INT8, mass 0.01": [
        "codec.keys=int8",
        "codec.values=int8",
        "attention.mode=mass",
        "attention.epsilon=0.01",
        "attention.epsilon_by=certificate",
    ],
}
"""The table's rows: overrides of the small MoE's config, None for Megatron's own cache."""


COLUMNS = (
    "cache",
    "answers right",
    "KV bytes held",
    "on host",
    "allocated",
    "tokens/s",
    "max |logit diff|",
    "read",
    "missed mass <=",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pikv demo`."""
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--facts", type=int, default=8, help="facts per document; all are asked about")
    parser.add_argument(
        "--length", type=int, default=960, help="tokens (bytes) per document; the model knows up to 1,024"
    )
    parser.add_argument("--text", default=str(HELD_OUT_TEXT), help="the text that facts are hidden in")
    parser.add_argument(
        "--model",
        default=str(SMALL_MOE),
        help="folder of a Mixtral checkpoint, or the id of one in the Hub's local cache",
    )
    parser.add_argument("--config", default=str(SMALL_MOE_CONFIG))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object, without the table")


@dataclass
class Row:
    """One cache's figures over all documents."""

    name: str
    right: int = 0
    asked: int = 0
    kv_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes held at the end of the last document, by tier (the stock cache and the windows count as device)."""
    allocated: int = 0
    """Bytes of memory taken for K and V, all tiers together."""
    steps: int = 0
    seconds: float = 0.0
    difference: float = 0.0
    """Largest |logit - stock's logit|."""
    reads: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Runs `pikv demo`."""
    check_single_rank("demo")
    check_seed(args.seed)
    began = time.perf_counter()
    text = load_text(Path(args.text))
    papers = documents(
        text, count=args.documents, length=args.length, num_facts=args.facts, num_questions=args.facts, seed=args.seed
    )
    if not args.json:
        print(_excerpt(papers[0]), end="\n\n")
    rows = ask_all(papers, args)
    device = "GPU" if torch.cuda.is_available() else "CPU"
    seconds = time.perf_counter() - began
    if args.json:
        what = {name: getattr(args, name) for name in ("documents", "facts", "length", "seed", "threads")}
        print(json.dumps({**what, "device": device, "seconds": seconds, "caches": results(rows)}, indent=1))
        return 0
    print(table(rows))
    print(
        f"\n{len(papers)} documents of {args.length} tokens, {args.facts} facts each; {args.threads} threads on "
        f"{device}; {seconds:.0f} s in all"
    )
    return 0


def _excerpt(document: Document) -> str:
    """A document's first fact in its surroundings, and its question."""
    fact = document.facts[0]
    at = document.text.index(fact.text)
    around = document.text[max(0, at - 60) : at + 45].decode(errors="replace").replace("\n", " ")
    return f"a document:  ... {around} ...\nthe question: {fact.question.decode()}   the answer: {fact.value.decode()}"


def ask_all(papers: Sequence[Document], args: argparse.Namespace) -> list[Row]:
    """Every cache's row, the stock one first."""
    longest = max(len(paper.text) + sum(len(f.text) for f in paper.questions) for paper in papers)
    model_cfg, given = read_config(args.config)
    model = megatron_model(checkpoint_folder(args.model), model_cfg, args.threads)

    from pikv_megatron.integrations import megatron
    from pikv_megatron.integrations.megatron.session import Session

    reference: list[torch.Tensor] = []
    rows = []
    with tqdm(
        total=len(CACHES) * len(papers), unit="document", disable=True if args.quiet else None, leave=False
    ) as bar:
        for name, overrides in CACHES.items():
            bar.set_description(name)
            row, attached, context = Row(name), None, None
            if overrides is not None:
                sizes = [f"max_tokens={max(longest, given.block_size)}", "max_requests=1"]
                _, runtime = read_config(args.config, [*sizes, *overrides])
                attached = megatron.attach(model, runtime)
                context = attached.static_context(1, longest)
            for number, paper in enumerate(papers):
                if context is None:
                    session = Session.on_stock_cache(model, 1, longest)
                else:
                    context.reset()
                    session = Session(model, context)
                logits = _ask(session, paper, row)
                if overrides is None:
                    reference.append(logits)
                row.difference = max(row.difference, float((logits - reference[number]).abs().max()))
                row.kv_bytes, row.allocated = _bytes(session)
                bar.update()
            if attached is not None and context is not None:
                row.reads = context.cache.stats()["reads"]
                attached.detach()
            rows.append(row)
    return rows


def _ask(session: Session, paper: Document, row: Row) -> torch.Tensor:
    """Reads a document and asks its questions; returns the logits after each of their tokens, [tokens, vocabulary]."""
    session.feed(torch.tensor([list(paper.text)]))
    logits: list[torch.Tensor] = []
    for fact in paper.questions:
        answer = []
        for place, token in enumerate(fact.text):
            if place >= len(fact.question):
                answer.append(int(logits[-1].argmax()))
            began = time.perf_counter()
            logits.append(session.feed(torch.tensor([[token]]))[0].cpu())
            row.seconds += time.perf_counter() - began
            row.steps += 1
        row.right += bytes(b & 0xFF for b in answer) == fact.value
        row.asked += 1
    return torch.stack(logits)


def _bytes(session: Session) -> tuple[dict[str, int], int]:
    """Bytes held by tier, and allocated in all."""
    from pikv_megatron.integrations.megatron.contexts import PiKVInferenceContext

    if not isinstance(session.context, PiKVInferenceContext):
        return {"device": session.bytes_held}, session.bytes_held
    stats = session.context.cache.stats()
    held = {kind: tier["bytes_held"] for kind, tier in stats["tiers"].items()}
    held["device"] += stats["window"]["bytes_held"] + stats["importance"]["bytes_held"]
    return held, stats["bytes_allocated"]


def results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as --json gives them. Missed mass is the worst certificate of any head, layer and step."""
    figures = []
    for row in rows:
        selective = bool(row.reads.get("selective_reads"))
        figures.append(
            {
                "cache": row.name,
                "answers_right": row.right,
                "questions": row.asked,
                "kv_bytes": row.kv_bytes,
                "bytes_allocated": row.allocated,
                "tokens_per_second": row.steps / row.seconds,
                "max_logit_difference": None if row is rows[0] else row.difference,
                "share_read": row.reads["share_read_mean"] if selective else 1.0,
                "missed_certificate_max": row.reads["missed_certificate_max"] if selective else 0.0,
            }
        )
    return figures


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [COLUMNS]
    for row in results(rows):
        difference, missed = row["max_logit_difference"], row["missed_certificate_max"]
        cells = (
            row["cache"],
            f"{row['answers_right']} of {row['questions']}",
            f"{row['kv_bytes']['device']:,}",
            f"{row['kv_bytes'].get('host', 0):,}",
            f"{row['bytes_allocated']:,}",
            f"{row['tokens_per_second']:.0f}",
            "-" if difference is None else f"{difference:.1e}",
            f"{row['share_read']:.0%}",
            f"{missed:.4f}" if missed else "0",
        )
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in lines
    )
