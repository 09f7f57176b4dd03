"""What a rank does in test_deepspeed_ranks.py with `deepspeed.moe.layer.MoE`: trains with hooks and without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STEPS, LAYERS, EXPERTS, HIDDEN, TOKENS, TOPK = 20, 2, 4, 16, 24, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.layers = nn.ModuleList(
            MoE(HIDDEN, Expert(), num_experts=EXPERTS, ep_size=ep_size, k=TOPK, drop_tokens=False, use_rts=False,
                min_capacity=0, top2_2nd_expert_sampling=False)
            for _ in range(LAYERS)
        )  # fmt: skip
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        balance = x.new_zeros(())
        for layer in self.layers:
            out, aux, _ = layer(x)
            x, balance = x + out, balance + aux
        return (self.head(x) - y).square().mean() + 0.01 * balance


class Listener:
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.routes: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def routed(self, layer_id: int, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.events.append(("routed", layer_id))
        self.routes.append((layer_id, expert_ids, weights))

    def dispatch_launched(self, layer_id: int) -> None:
        self.events.append(("launched", layer_id))

    def dispatch_finished(self, layer_id: int) -> None:
        self.events.append(("finished", layer_id))


def train(ranks: int, listener: Listener | None) -> list[float]:
    """Losses of 20 steps; the same weights and data on every call, other data on every rank."""
    import deepspeed
    from deepspeed import comm

    from pikv_megatron.integrations.deepspeed.moe import hook_moe

    torch.manual_seed(0)
    model = Model(ranks)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    hooks = None if listener is None else hook_moe(engine.module, listener, layer_ids=[3, 7])
    generator = torch.Generator().manual_seed(100 + comm.get_rank())
    losses = []
    for _ in range(STEPS):
        x = torch.randn(1, TOKENS, HIDDEN, generator=generator)
        loss = engine(x, x.sum(-1, keepdim=True))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if hooks is not None:
        hooks.remove()
        listener.before = len(listener.events)  # type: ignore[attr-defined]
        engine(x, x.sum(-1, keepdim=True))
    return losses


def check(ranks: int) -> dict[str, Any]:
    """The report of one rank."""
    from deepspeed.moe import sharded_moe

    stock_all_to_all = sharded_moe._AllToAll
    listener = Listener()
    plain, hooked = train(ranks, None), train(ranks, listener)
    per_step = [event for layer in (3, 7) for event in (("routed", layer), ("launched", layer), ("finished", layer))]
    ids = torch.stack([ids for _, ids, _ in listener.routes])
    weights = torch.stack([weights for _, _, weights in listener.routes])
    return {
        "equal": plain == hooked,
        "learns": plain[-1] < plain[0],
        "losses": [plain[0], plain[-1]],
        "events": listener.events == per_step * STEPS,
        "silent behind remove": listener.before == len(listener.events),  # type: ignore[attr-defined]
        "shape": list(ids.shape),
        "experts": sorted(ids.unique().tolist()),
        "distinct": bool((ids[..., 0] != ids[..., 1]).all()),
        "weights": (weights.sum(-1) - 1).abs().max().item(),
        "restored": sharded_moe._AllToAll is stock_all_to_all,
    }
