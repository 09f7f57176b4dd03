"""Continue a prompt with a model on Megatron-core, DeepSpeed or Hugging Face through PiKV, streaming the text.

The text goes to stdout; the progress bar and the closing figures go to stderr. With --json stdout gets one JSON object
with all of it at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from pikv_megatron.cache.memory import check_memory
from pikv_megatron.cli.common import SMALL_MOE, SMALL_MOE_CONFIG, check_seed, check_single_rank, read_config
from pikv_megatron.cli.files import checkpoint_folder
from pikv_megatron.cli.hosts import HOSTS, Request, Session
from pikv_megatron.config import dump
from pikv_megatron.config.io import brief
from pikv_megatron.config.parse import read_json
from pikv_megatron.launch.environment import read_launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pikv generate`."""
    parser.add_argument("--config", default=str(SMALL_MOE_CONFIG), help="YAML file; default: the small MoE's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key of the config"
    )
    parser.add_argument("--host", choices=HOSTS, default="megatron", help="what runs the model; default: megatron")
    parser.add_argument(
        "--model",
        default=str(SMALL_MOE),
        help="folder of a checkpoint, or the id of one in the Hub's local cache (for megatron: Mixtral's); default: "
        "the small MoE",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", help="file with the prompt, - for stdin")
    prompt.add_argument("--prompt", help="the prompt itself")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--stop", metavar="TEXT", help="end behind this text, should the model write it")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the checkpoint's end token")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens per forward pass")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    parser.add_argument("--threads", type=int, default=None, help="of torch, per rank; default: the rank's CPUs")
    parser.add_argument(
        "--expert-parallel", type=int, default=1, metavar="RANKS", help="ranks that share the experts (megatron)"
    )
    parser.add_argument("--compare", action="store_true", help="feed the same tokens to the host's own cache too")
    parser.add_argument("--run-dir", help="write the resolved config, the text and the figures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no figures")
    parser.add_argument("--json", action="store_true", help="print the text and the figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs `pikv generate`."""
    for name in ("max_new_tokens", "chunk"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected at least 0, got {args.temperature}")
    check_seed(args.seed)
    if args.expert_parallel != 1 and args.host != "megatron":
        raise ValueError(f"--expert-parallel: only --host megatron shares experts out, got --host {args.host}")
    if args.host == "hf":
        check_single_rank("--host hf")
    model_cfg, runtime = read_config(args.config, args.set)
    if model_cfg is not None:
        check_memory(model_cfg, runtime)
    folder = checkpoint_folder(args.model)
    tokenizer = _tokenizer(folder)
    prompt = _read_prompt(args, tokenizer, runtime.max_tokens)
    if args.run_dir:
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    tokens = tokenizer.encode(prompt).ids
    total = len(tokens) + args.max_new_tokens
    if total > runtime.max_tokens:
        raise ValueError(
            f"prompt: {len(tokens)} tokens and {args.max_new_tokens} new ones exceed max_tokens {runtime.max_tokens}"
        )
    request = Request(str(folder), model_cfg, runtime, total, args.threads, args.compare, args.expert_parallel)
    opened = HOSTS[args.host](request)
    speaks = not distributed.is_initialized() or distributed.get_rank() == 0  # all ranks make the same text
    if not speaks:
        args.quiet, args.json, args.run_dir = True, False, None
    cache = opened.cache
    ours = _Timed(opened.ours)
    stock = None if opened.stock is None else _Timed(opened.stock)

    ends = set() if args.ignore_eos else _end_tokens(folder)
    with contextlib.nullcontext() if speaks and not args.json else contextlib.redirect_stdout(None):
        text, made, worst = _stream(args, tokenizer, tokens, ends, ours, stock)
    figures: dict[str, Any] = {
        "prompt_tokens": len(tokens),
        "new_tokens": made,
        "launch": dataclasses.asdict(read_launch(os.environ)),
        "expert_parallel": args.expert_parallel,
        "pikv": ours.figures(),
        **cache.stats(),
    }
    if stock is not None:
        figures["stock"] = stock.figures()
        figures["max_logit_difference"] = worst
    if args.json:
        print(json.dumps({"text": text, **figures}, indent=1))
    elif not args.quiet:
        _report(figures)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.barrier()  # nobody leaves while another still reads
    if args.run_dir:
        run_dir = Path(args.run_dir)
        (run_dir / "config.yaml").write_text(dump(cache.model, runtime), encoding="utf-8")
        (run_dir / "text.txt").write_text(text, encoding="utf-8")
        (run_dir / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def _read_prompt(args: argparse.Namespace, tokenizer: Any, max_tokens: int) -> str:
    """The prompt. Of one that cannot fit no more is read than shows it, since to tokenise it might take hours."""
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    most = min(max_tokens * longest, sys.maxsize - 1)
    where = "--prompt" if args.prompt is not None else f"--prompt-file {args.prompt_file}"
    try:
        if args.prompt is not None:
            text = str(args.prompt)
        elif args.prompt_file == "-":
            text = sys.stdin.read(most + 1)
        else:
            with open(args.prompt_file, encoding="utf-8") as file:
                text = file.read(most + 1)
        text.encode("utf-8")  # what is not UTF-8 on the command line comes as characters that are none
    except UnicodeError as error:
        raise ValueError(f"{where}: expected UTF-8 text: {error}") from error
    if not text:
        raise ValueError(f"{where}: expected some text, it is empty")
    if len(text) > most:
        raise ValueError(
            f"{where}: expected at most {most} characters, got more (runtime.max_tokens is {max_tokens}, a token has "
            f"{longest} at most)"
        )
    return text


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{error}: tokenizers comes with the extra hf (README.md, 'Install')") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the checkpoint's tokenizer")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def _end_tokens(folder: Path) -> set[int]:
    """Tokens that end a text: `eos_token_id` of the checkpoint's generation_config.json, else of its config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name, ValueError).get("eos_token_id")
            if ids is None:
                continue
            listed = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token, int) for token in listed):
                raise ValueError(f"{folder / name}: eos_token_id: expected an int or a list of them, got {brief(ids)}")
            return set(listed)
    return set()


class _Timed:
    """A session and the time that its prompt and its steps took."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0

    def prefill(self, tokens: list[int], chunk: int, quiet: bool, title: str) -> Tensor:
        pieces = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
        began = time.perf_counter()
        with (
            tqdm(desc=title, unit="layer", disable=True if quiet else None, leave=False) as bar,
            self.session.on_layer_done(bar.update) as layers,
        ):
            bar.total = len(pieces) * layers
            for piece in pieces:
                logits = self.session.feed(torch.tensor([piece]))
        self.prefill_seconds = time.perf_counter() - began
        return logits[0]

    def step(self, token: int) -> Tensor:
        began = time.perf_counter()
        logits = self.session.feed(torch.tensor([[token]]))[0]
        self.decode_seconds += time.perf_counter() - began
        self.steps += 1
        return logits

    def figures(self) -> dict[str, Any]:
        return {
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.steps / self.decode_seconds if self.steps else None,
            "kv_bytes": self.session.bytes_held,
        }


def _stream(
    args: argparse.Namespace, tokenizer: Any, tokens: list[int], ends: set[int], ours: _Timed, stock: _Timed | None
) -> tuple[str, int, float]:
    """Generates and prints; returns the text, the number of tokens made, and the largest logit difference from stock
    (0.0 without it).
    """
    generator = torch.Generator().manual_seed(args.seed)
    logits = ours.prefill(tokens, args.chunk, args.quiet, "prompt, PiKV")
    theirs = stock.prefill(tokens, len(tokens), args.quiet, "prompt, stock") if stock else None
    worst, shown = 0.0, ""
    made: list[int] = []
    while True:
        if theirs is not None:
            worst = max(worst, float((logits - theirs).abs().max()))
        if args.temperature:
            distances = (logits - logits.max()).double()  # in which the lowest temperature is not 0
            shares = (distances / args.temperature).softmax(-1).float()
            token = int(torch.multinomial(shares.cpu(), 1, generator=generator))
        else:
            token = int(logits.argmax())
        token = _of_first_rank(token, logits.device)
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith("�"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
        if len(made) == args.max_new_tokens or token in ends or (args.stop and args.stop in text):
            break
        logits = ours.step(token)
        theirs = stock.step(token) if stock else None
    print(text[len(shown) :], flush=True)
    return text, len(made), worst


def _of_first_rank(token: int, device: torch.device) -> int:
    """Rank 0's choice: sums of a last digit's difference must not send the ranks different ways."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return token
    chosen = torch.tensor(token, device=device)
    distributed.broadcast(chosen, src=0)
    return int(chosen)


def _report(figures: dict[str, Any]) -> None:
    def lines() -> Iterator[str]:
        for name in ("pikv", "stock"):
            if name in figures:
                one = figures[name]
                yield (
                    f"{name}: prompt of {figures['prompt_tokens']} tokens in {one['prefill_seconds']:.2f} s, "
                    f"{_rate(one['tokens_per_second'])}, {one['kv_bytes']:,} bytes of KV held"
                )
        if "max_logit_difference" in figures:
            yield f"largest logit difference from stock: {figures['max_logit_difference']:.2e}"
        reads = figures["reads"]
        if reads["selective_reads"]:
            estimate, certificate = reads["missed_estimate_mean"], reads["missed_certificate_mean"]
            yield (
                f"sealed tokens read: {reads['share_read_mean']:.1%}; missed mass, mean over heads and steps: "
                f"estimate {estimate:.4f}, certificate {certificate:.4f}"
            )

    for line in lines():
        print(line, file=sys.stderr)


def _rate(tokens_per_second: float | None) -> str:
    return "no decode step" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s"
