"""Trains a small Mixtral-shaped byte model that finds facts in its context, on Megatron-core, with or
without a GPU.

    python examples/train_small_moe.py --out runs/small_moe
    torchrun --nproc-per-node 2 examples/train_small_moe.py --out runs/small_moe      # data-parallel

The sequences grow in stages: short ones teach the model to look back, long ones to look far. A stage ends
after its steps, or earlier when most answers are right. Muon trains the matrices of attention and experts,
AdamW the rest. `--out` holds the model as `transformers` loads it, `log.jsonl`, `loss_curve.png` and the
checkpoints from which `--resume` goes on, with equal results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training_log import Log, draw_curve, means

from pikv_megatron import launch
from pikv_megatron.facts import Mixture, Target, count_answered, documents, load_text, training_batch

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 288,  # 256 bytes and 32 spare rows
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
}
LOSS_WEIGHTS = {Target.TEXT: 1.0, Target.ANSWER: 1.0, Target.COPY: 0.5}
FIRST_MIXTURE = Mixture(copy=0.3, text=0.2, dense=0.3)  # the first stage learns to look back from repeats
MIXTURE = Mixture(copy=0.1, text=0.2, dense=0.2)
EVALUATION_LENGTH, EVALUATION_FACTS, EVALUATION_QUESTIONS, EVALUATION_SEED = 1024, 8, 4, 1008


@dataclass(frozen=True)
class Stage:
    """Rows of `length` tokens, `rows` of them on each rank, for at most `steps` steps."""

    length: int
    rows: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        try:
            shape, steps = text.split(":")
            length, rows = shape.split("x")
            stage = cls(int(length), int(rows), int(steps))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected LENGTHxROWS:STEPS, as in 96x32:400") from None
        if stage.length < 32 or stage.rows < 1 or stage.steps < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a length of 32 or more, rows and steps of 1 or more")
        return stage


@dataclass
class Progress:
    """Where a run stands; goes into its checkpoints."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    accuracy: float = 0.0  # of answers, moving average

    def record(self, stage: Stage) -> dict[str, float]:
        """What every line of the log begins with."""
        return {"step": self.step, "length": stage.length, "tokens": self.tokens, "seconds": self.seconds}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "assets/text/kjv_train.txt.gz")
    parser.add_argument("--heldout", type=Path, default=REPOSITORY / "assets/text/kjv_heldout.txt")
    stages = ["96x32:600", "192x16:200", "384x8:200", "768x4:200", "1024x3:400"]
    parser.add_argument("--stages", type=Stage.parse, nargs="+", default=[Stage.parse(stage) for stage in stages],
                        metavar="LENGTHxROWS:STEPS", help=f"default: {' '.join(stages)}")  # fmt: skip
    parser.add_argument("--advance-at", type=float, default=0.97, help="answer accuracy that ends a stage early")
    parser.add_argument("--decay-steps", type=int, default=300, help="learning rates fall over the last so many steps")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps; evaluates too")
    parser.add_argument("--evaluation-documents", type=int, default=8, help="held-out documents per evaluation")
    options = parser.parse_args(argv)
    for name in ("decay_steps", "threads", "log_every", "checkpoint_every", "evaluation_documents"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


class Trainer:
    """The model, its optimizers and one step of training, the same on every rank."""

    def __init__(self, options: argparse.Namespace, rank: int, world_size: int) -> None:
        from pikv_megatron.integrations.hf_weights import build_model

        self.options, self.rank, self.world_size = options, rank, world_size
        self.progress = Progress()
        self.text = load_text(options.text)
        init_std = 0.5 / MODEL["hidden_size"] ** 0.5
        self.model = build_model(
            MODEL,
            init_method_std=init_std,
            output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, 0.0, init_std),
            embedding_init_method_std=0.5,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01 / MODEL["num_hidden_layers"],
        )
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            inner = "self_attention" in name or "experts" in name
            (matrices if inner and parameter.ndim == 2 else others).append(parameter)
        self.others = others
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "matrix": torch.optim.Muon(matrices, lr=options.matrix_lr, weight_decay=0.02),
            "other": torch.optim.AdamW(others, lr=options.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        }

    @property
    def stage(self) -> Stage:
        return self.options.stages[self.progress.stage]

    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        names = ("advance_at", "decay_steps", "matrix_lr", "other_lr", "seed")
        stages = [asdict(stage) for stage in self.options.stages]
        return {name: getattr(self.options, name) for name in names} | {
            "stages": stages,
            "world_size": self.world_size,
            "text_bytes": len(self.text),
        }

    def step(self) -> dict[str, float]:
        """One step on all ranks; returns sums over the global batch: losses and counts of each kind, right answers."""
        progress, stage = self.progress, self.stage
        started = time.monotonic()
        # from the step's own seed: a resumed run sees the same rows without any stored generator
        rng = np.random.default_rng([self.options.seed, self.rank, progress.step])
        tokens, targets = training_batch(
            rng,
            self.text,
            rows=stage.rows,
            length=stage.length,
            mixture=FIRST_MIXTURE if progress.stage == 0 else MIXTURE,
        )
        logits = forward(self.model, torch.from_numpy(tokens[:, :-1]))
        labels = torch.from_numpy(tokens[:, 1:]).to(logits.device)
        kinds = torch.from_numpy(targets[:, 1:]).to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        masks = {kind: kinds == kind for kind in LOSS_WEIGHTS}
        terms = [weight * losses[masks[kind]].mean() for kind, weight in LOSS_WEIGHTS.items() if masks[kind].any()]
        torch.stack(terms).sum().backward()
        sums = {f"{kind.name.lower()}_loss": losses.detach()[mask].sum() for kind, mask in masks.items()}
        sums |= {f"{kind.name.lower()}_count": mask.sum() for kind, mask in masks.items()}
        sums["right"] = (logits.argmax(-1) == labels)[masks[Target.ANSWER]].sum()
        result = self._reduce(sums)
        if not all(map(math.isfinite, result.values())):
            raise FloatingPointError(f"step {progress.step}: the loss is not finite: {result}")
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self._set_learning_rates()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.stage_step += 1
        progress.tokens += tokens.size * self.world_size
        progress.seconds += time.monotonic() - started
        if result["answer_count"]:
            progress.accuracy += 0.05 * (result["right"] / result["answer_count"] - progress.accuracy)
        return result

    def advance(self) -> bool:
        """Goes to the next stage where this one is done; False where it was the last one."""
        progress, last = self.progress, self.progress.stage == len(self.options.stages) - 1
        early = progress.accuracy > self.options.advance_at and not last
        if early or progress.stage_step >= self.stage.steps:
            if last:
                return False
            progress.stage += 1
            progress.stage_step = 0
            progress.accuracy = 0.0
        return True

    def check_ranks_agree(self) -> None:
        """Waits for all ranks. Raises RuntimeError where their weights, which must be bit-equal, differ."""
        total = torch.stack([parameter.detach().double().sum() for parameter in self.model.parameters()]).sum()
        lowest, highest = total.clone(), total.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if lowest != highest:
            raise RuntimeError(f"step {self.progress.step}: the ranks' weights differ ({lowest} to {highest} in sum)")

    def _reduce(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Averages the gradients and adds up `sums` over the ranks, in one message."""
        parameters = list(self.model.parameters())
        for parameter in parameters:  # an expert that got no token here
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        totals = torch.stack(list(sums.values())).float()
        if self.world_size > 1:
            gradients = [parameter.grad for parameter in parameters]
            flat = torch.cat([gradient.flatten() / self.world_size for gradient in gradients] + [totals])
            dist.all_reduce(flat)
            *averaged, totals = torch.split(flat, [gradient.numel() for gradient in gradients] + [len(totals)])
            for gradient, average in zip(gradients, averaged, strict=True):
                gradient.copy_(average.view_as(gradient))
        return dict(zip(sums, totals.tolist(), strict=True))

    def _set_learning_rates(self) -> None:
        progress = self.progress
        factor = min(1.0, (progress.step + 1) / 30)
        if progress.stage == len(self.options.stages) - 1:
            factor *= min(1.0, max(0.05, (self.stage.steps - progress.stage_step) / self.options.decay_steps))
        rates = {"matrix": self.options.matrix_lr, "other": self.options.other_lr}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def evaluate(self) -> dict[str, float]:
        """Exact answers on held-out documents of 1,024 tokens with 8 facts, by full recompute."""
        held_out = documents(
            load_text(self.options.heldout),
            count=self.options.evaluation_documents,
            length=EVALUATION_LENGTH,
            num_facts=EVALUATION_FACTS,
            num_questions=EVALUATION_QUESTIONS,
            seed=EVALUATION_SEED,
        )
        self.model.eval()
        with torch.no_grad():
            right, asked = count_answered(
                lambda tokens: forward(self.model, torch.from_numpy(tokens)).argmax(-1).numpy(force=True),
                held_out,
                rows=4,
            )
        self.model.train()
        return {"heldout_right": right, "heldout_asked": asked}


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocabulary] of tokens [rows, length]; Megatron makes the causal mask itself."""
    tokens = tokens.to(next(model.parameters()).device)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None)


# ----------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(trainer: Trainer, keep: int = 2) -> None:
    """Writes `checkpoints/step-N` whole or not at all, then drops all but the newest `keep`."""
    from pikv_megatron.integrations.hf_weights import save_mixtral

    folder = trainer.options.out / "checkpoints"
    target = folder / f"step-{trainer.progress.step:07d}"
    unfinished = folder / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_mixtral(trainer.model, unfinished)
    tensors = {
        f"{name}.{index}.{key}": value
        for name, optimizer in trainer.optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(tensors, unfinished / "optimizers.safetensors")
    content = {"progress": asdict(trainer.progress), "settings": trainer.settings()}
    (unfinished / "trainer.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)
    for old in checkpoints(trainer.options.out)[:-keep]:
        shutil.rmtree(old)


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    from pikv_megatron.integrations.hf_weights import WEIGHTS_FILE, load_weights

    content = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    for name, value in trainer.settings().items():
        if content["settings"].get(name) != value:
            seen = content["settings"].get(name)
            raise ValueError(f"{path}: was made with {name}={seen}, this run has {value}: they must be the same")
    load_weights(trainer.model, load_file(path / WEIGHTS_FILE))
    tensors = load_file(path / "optimizers.safetensors")
    for name, optimizer in trainer.optimizers.items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            owner, index, field = key.split(".")
            if owner == name:
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    trainer.progress = Progress(**content["progress"])


# ----------------------------------------------------------------------------------------------------------
# the run


def train(trainer: Trainer, log: Log | None) -> None:
    """Steps until the last stage ends. Rank 0 logs, evaluates and saves."""
    options, progress = trainer.options, trainer.progress
    window: list[dict[str, float]] = []
    going = True
    while going:
        stage = trainer.stage
        window.append(trainer.step())
        before = progress.stage
        going = trainer.advance()
        ended = not going or progress.stage != before
        if ended or progress.step % options.log_every == 0:
            if log:
                log.write(progress.record(stage) | means(window))
            window = []
        if not going or progress.step % options.checkpoint_every == 0:
            if log:
                log.write(progress.record(stage) | trainer.evaluate())
                save_checkpoint(trainer)
            trainer.check_ranks_agree()


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    found = checkpoints(options.out)
    if options.resume and not found:
        print(f"--resume: no checkpoint in {options.out}", file=sys.stderr)
        return 2
    if found and not options.resume:
        print(f"{options.out} holds a run: give --resume, or another --out", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        from pikv_megatron.integrations import cpu_compat

        cpu_compat.install()
    launch.init_megatron()
    from pikv_megatron.integrations.hf_weights import save_mixtral

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # the same on all ranks: the same weights
    trainer = Trainer(options, rank, world_size)
    if options.resume:
        load_checkpoint(trainer, found[-1])
    log = None
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        log = Log(options.out / "log.jsonl", trainer.progress.step)
    train(trainer, log)
    if rank == 0:
        save_mixtral(trainer.model, options.out)
        draw_curve(options.out / "log.jsonl", options.out / "loss_curve.png")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
