"""Hooks on models of `deepspeed.moe.layer.MoE`, on one rank: what the listener learns, and that a DeepSpeed that is not
known, or a pass that fails, leaves nothing behind. Training on two ranks is in tests/distributed.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from deepspeed.moe import sharded_moe

from pikv_megatron import PiKVCache
from pikv_megatron.config import ModelConfig
from pikv_megatron.integrations import deepspeed as host
from pikv_megatron.integrations.deepspeed import support

RUNTIME = {"window": 8, "sinks": 2, "block_size": 8, "max_tokens": 1024}

HIDDEN, EXPERTS = 16, 4


def moe_layer(**options):
    from deepspeed.moe.layer import MoE

    support.init_distributed()
    torch.manual_seed(0)
    expert = torch.nn.Linear(HIDDEN, HIDDEN)
    options = {"use_rts": False, "min_capacity": 0, "top2_2nd_expert_sampling": False, **options}
    layer = MoE(HIDDEN, expert, num_experts=EXPERTS, **options)
    layer.set_deepspeed_parallelism()
    return layer.eval()


class Listener:
    def __init__(self):
        self.routes = []

    def routed(self, layer_id, expert_ids, weights):
        self.routes.append((layer_id, expert_ids, weights))

    def dispatch_launched(self, layer_id):
        raise AssertionError("nothing is dispatched on one rank")

    dispatch_finished = dispatch_launched


@pytest.mark.parametrize("k", [1, 2, 3])
def test_routes_are_those_of_the_gate(k):
    layer, listener = moe_layer(k=k, drop_tokens=False), Listener()
    x = torch.randn(2, 9, HIDDEN)
    expected = layer(x)[0]
    with host.hook_moe(layer, listener, layer_ids=[5]):
        assert torch.equal(layer(x)[0], expected)
    layer(x)
    ((layer_id, expert_ids, weights),) = listener.routes
    shares = (x.reshape(-1, HIDDEN) @ layer.deepspeed_moe.gate.wg.weight.T).softmax(-1)
    best, ids = shares.topk(k, -1)
    assert layer_id == 5 and expert_ids.dtype == torch.int64 and not weights.requires_grad
    order = expert_ids.argsort(-1)
    right = ids.argsort(-1)
    assert torch.equal(expert_ids.gather(1, order), ids.gather(1, right))
    best = best / best.sum(-1, keepdim=True) if k > 1 else best
    torch.testing.assert_close(weights.gather(1, order), best.gather(1, right))


def test_routes_label_a_cache():
    """What docs/deepspeed.md shows: the listener of a model whose attention is on a PiKVCache."""
    model = {"num_layers": 1, "num_attention_heads": 2, "num_query_groups": 1, "head_dim": 8, "num_experts": EXPERTS}
    cache = PiKVCache(ModelConfig(**model, topk=2), RUNTIME)
    layer = moe_layer(k=2, drop_tokens=False)

    class Labels(Listener):
        def routed(self, layer_id, expert_ids, weights):
            cache.observe_routing(layer_id, expert_ids, weights)

    x = torch.randn(1, 42, HIDDEN)
    with host.hook_moe(layer, Labels()):
        cache.append(0, *torch.randn(2, 42, 1, 8))
        layer(x)
    best, ids = (x[0] @ layer.deepspeed_moe.gate.wg.weight.T).softmax(-1).topk(2, -1)
    votes = torch.zeros(42, EXPERTS).scatter_(1, ids, best / best.sum(-1, keepdim=True))
    expected = votes[2:34].unflatten(0, (4, 8)).sum(1).argmax(-1).tolist()  # four blocks between sinks and window
    found = {
        int(start): expert
        for expert in range(EXPERTS)
        for shard in [cache.expert_shard(0, expert)]
        for request_id in shard.requests()
        for start in shard.retrieve(request_id)[2][::8]
    }
    assert [found[start] for start in sorted(found)] == expected and len(set(expected)) > 1


def test_dropped_routes_weigh_nothing():
    layer, listener = moe_layer(k=2, eval_capacity_factor=0.5), Listener()
    x = torch.randn(1, 16, HIDDEN)
    with host.hook_moe(layer, listener):
        layer(x)
    ((_, expert_ids, weights),) = listener.routes
    assert expert_ids.min() >= 0 and weights.shape == (16, 2)
    kept = 0.5 * 2 * 16  # capacity: factor * k * tokens / experts, of each expert
    assert 0 < int((weights > 0).sum()) <= kept < 32
    assert (expert_ids[weights == 0] == 0).all()


def test_two_listeners_come_and_go():
    layer, first, second = moe_layer(k=1), Listener(), Listener()
    x = torch.randn(1, 8, HIDDEN)
    one = host.hook_moe(layer, first)
    two = host.hook_moe(layer, second)
    layer(x)
    one.remove()
    one.remove()
    layer(x)
    two.remove()
    layer(x)
    assert (len(first.routes), len(second.routes)) == (1, 2)
    assert not layer._forward_hooks and not layer.deepspeed_moe.gate._forward_hooks
    with pytest.raises(ValueError, match="layer_ids: expected 1, one per MoE layer, got 2"):
        host.hook_moe(layer, first, layer_ids=[0, 1])
    with pytest.raises(ValueError, match="Linear has none"):
        host.hook_moe(torch.nn.Linear(2, 2), first)


# ---- several ranks, in one process


class Transport:
    """In place of `sharded_moe._AllToAll`: notes each all-to-all among the listener's events, and returns its input."""

    def __init__(self, events):
        self.events = events

    @staticmethod
    def forward(ctx, group, input):
        """Has the parameters of the true one."""

    def apply(self, group, x):
        self.events.append("all-to-all")
        return x


class Events(Listener):
    def __init__(self):
        self.events = []

    def routed(self, layer_id, expert_ids, weights):
        self.events.append(("routed", layer_id))

    def dispatch_launched(self, layer_id):
        self.events.append(("launched", layer_id))

    def dispatch_finished(self, layer_id):
        self.events.append(("finished", layer_id))


@pytest.fixture
def spread(monkeypatch):
    """A layer that takes its four experts for half of those of two ranks, its listener, and the all-to-all."""
    listener = Events()
    transport = Transport(listener.events)
    monkeypatch.setattr(sharded_moe, "_AllToAll", transport)
    layer = moe_layer(k=1)
    layer.ep_size = layer.deepspeed_moe.ep_size = 2
    layer.deepspeed_moe.num_local_experts = layer.deepspeed_moe.experts.num_local_experts = EXPERTS // 2
    del layer.deepspeed_moe.experts.deepspeed_experts[EXPERTS // 2 :]
    return layer, listener, transport


def test_the_dispatch_alone_is_told_before_and_behind_its_all_to_all(spread):
    layer, listener, transport = spread
    with host.hook_moe(layer, listener, layer_ids=[4]):
        layer(torch.randn(1, 8, HIDDEN))
        assert sharded_moe._AllToAll is not transport
        sharded_moe._AllToAll.apply(None, None)  # a backward pass
    there = [("routed", 4), ("launched", 4), "all-to-all", ("finished", 4)]
    assert listener.events == [*there, "all-to-all", "all-to-all"]
    assert sharded_moe._AllToAll is transport


def test_a_pass_that_fails_before_its_dispatch_leaves_nothing_to_tell(spread, monkeypatch):
    layer, listener, _ = spread

    def fail(*args):
        raise ArithmeticError

    with host.hook_moe(layer, listener):
        with monkeypatch.context() as patch:
            patch.setattr(sharded_moe, "_sparse_encode", fail)
            with pytest.raises(ArithmeticError):
                layer(torch.randn(1, 8, HIDDEN))
        sharded_moe._AllToAll.apply(None, None)
    assert listener.events == [("routed", 0), "all-to-all"]


def test_the_all_to_all_is_given_back_by_the_last_who_leaves(spread):
    layer, listener, transport = spread
    first, second = host.hook_moe(layer, listener), host.hook_moe(layer, Events())
    first.remove()
    first.remove()
    assert sharded_moe._AllToAll is not transport
    layer(torch.randn(1, 8, HIDDEN))
    assert listener.events == ["all-to-all", "all-to-all"]
    second.remove()
    assert sharded_moe._AllToAll is transport


# ---- versions that are not known


def other(*args):
    """A function with parameters that nobody expects."""


def test_an_unknown_gate_or_all_to_all_fails_by_name_and_hooks_nothing(monkeypatch):
    model, stock = moe_layer(), sharded_moe._AllToAll
    for owner in ("TopKGate", "_AllToAll"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(sharded_moe, owner), "forward", other)
            with pytest.raises(RuntimeError, match=rf"{owner}.forward of DeepSpeed .* takes \(args\), expected"):
                host.hook_moe(model, Listener())
        assert sharded_moe._AllToAll is stock
        assert not model.deepspeed_moe.gate._forward_hooks
    with monkeypatch.context() as patch, host.hook_moe(model, Listener()):
        patch.setattr(model.deepspeed_moe.gate, "forward", lambda *args: (1, 2, 3))
        with pytest.raises(RuntimeError, match="MoE layer 0 returned tuple of 3, expected a tuple of 7"):
            model(torch.randn(1, 4, HIDDEN))
    assert sharded_moe._AllToAll is stock
