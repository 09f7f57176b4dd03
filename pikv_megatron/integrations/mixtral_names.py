"""The weights of a Mixtral-shaped model under Hugging Face's names and under Megatron-core's: a mapping of
names and shapes, both ways, that reads no file and imports no host.

The Megatron side is the stock local layer spec with one MLP per expert (`SequentialMLP`), untied embeddings,
no tensor or pipeline parallelism. `hf_weights` reads and writes checkpoints with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

State = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]


class WeightsError(ValueError):
    """A checkpoint that does not fit: names the key, what was seen and expected. Nothing was changed."""


def hf_to_megatron(
    state: State,
    config: TransformerConfig,
    *,
    vocab_size: int | None = None,
    experts: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Megatron's state dict from Hugging Face's. No dtype is changed; tensors may share memory with `state`.

    Args:
        state: classic names (`block_sparse_moe.experts.N.w1.weight`) or fused ones
            (`mlp.experts.gate_up_proj`).
        vocab_size: rows of both embeddings; None: as many as the input embedding has.
        experts: global indices of the experts wanted, numbered from 0 in the result; None: all. `state` may
            hold others.

    Raises:
        WeightsError: a key is missing or unexpected, or a shape differs: by name, seen and expected.
    """
    _check_layout(config)
    everyone = range(_num_experts(config))
    experts = everyone if experts is None else experts
    for expert in experts:
        if expert not in everyone:
            raise WeightsError(f"experts: {expert} does not exist, expected indices in 0..{len(everyone) - 1}")
    state = _unfuse(state, config)
    vocab_size = vocab_size if vocab_size is not None else _rows(state, "model.embed_tokens.weight")
    wanted = _weights(config, vocab_size, experts)
    allowed = {name for weight in _weights(config, vocab_size, everyone) for name in weight.parts}
    needed = {name: shape for weight in wanted for name, shape in weight.parts.items()}
    check_names("Hugging Face weights", state, needed, allowed)
    _check_shapes(state, needed)
    return {weight.megatron: weight.join([state[name] for name in weight.parts]) for weight in wanted}


def megatron_to_hf(state: State, config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Hugging Face's state dict (classic names) from Megatron's. The inverse of `hf_to_megatron` for all
    experts.

    Raises:
        WeightsError: a key is missing or unexpected, a shape differs, or the experts are spread over ranks.
    """
    _check_layout(config)
    if config.expert_model_parallel_size > 1:
        raise WeightsError(
            f"expert_model_parallel_size is {config.expert_model_parallel_size}: this rank has only its own experts, "
            "expected 1"
        )
    state = {name: state[name] for name in tensor_names(state)}
    vocab_size = _rows(state, "embedding.word_embeddings.weight")
    weights = _weights(config, vocab_size, range(_num_experts(config)))
    check_names("Megatron weights", state, [weight.megatron for weight in weights])
    _check_shapes(state, {weight.megatron: weight.shape for weight in weights})
    result: dict[str, torch.Tensor] = {}
    for weight in weights:
        result |= zip(weight.parts, weight.split(state[weight.megatron]), strict=True)
    return result


def local_experts(config: TransformerConfig, expert_rank: int) -> range:
    """Global indices of the experts of one rank of the expert-parallel group, as Megatron deals them out."""
    count = _num_experts(config) // config.expert_model_parallel_size
    return range(expert_rank * count, (expert_rank + 1) * count)


def other_experts_names(config: TransformerConfig, mine: range) -> set[str]:
    """Classic names of the weights of all experts but `mine`."""
    others = [expert for expert in range(_num_experts(config)) if expert not in mine]
    return {name for weight in _weights(config, 0, others) for name in weight.parts if ".experts." in name}


def tensor_names(state: Mapping[str, Any]) -> list[str]:
    """The keys of a Megatron state dict that are weights, without its `_extra_state` entries."""
    return [name for name in state if not name.endswith("_extra_state")]


def check_names(what: str, seen: Iterable[str], needed: Iterable[str], allowed: Iterable[str] | None = None) -> None:
    """Raises WeightsError where names are missing, or not among `allowed` (None: among those needed)."""
    seen, needed = set(seen), set(needed)
    missing, unexpected = needed - seen, seen - (needed if allowed is None else set(allowed))
    if missing or unexpected:
        raise WeightsError(f"{what}: missing {_some(missing)}; unexpected {_some(unexpected)}")


@dataclass(frozen=True)
class _Weight:
    """One Megatron weight and the Hugging Face ones it is made of, joined by rows in each of `groups` row groups."""

    megatron: str
    parts: Mapping[str, Shape]
    groups: int = 1

    @property
    def shape(self) -> Shape:
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1)]


def _weights(config: TransformerConfig, vocab_size: int, experts: Sequence[int]) -> list[_Weight]:
    hidden, ffn = _sizes(config)
    query_rows = config.num_attention_heads * config.kv_channels
    key_rows = config.num_query_groups * config.kv_channels
    found = [
        _Weight("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (vocab_size, hidden)}),
        _Weight("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}),
        _Weight("output_layer.weight", {"lm_head.weight": (vocab_size, hidden)}),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, moe = f"{theirs}.self_attn", f"{theirs}.block_sparse_moe"
        qkv = {
            f"{attention}.q_proj.weight": (query_rows, hidden),
            f"{attention}.k_proj.weight": (key_rows, hidden),
            f"{attention}.v_proj.weight": (key_rows, hidden),
        }
        output = {f"{attention}.o_proj.weight": (hidden, query_rows)}
        found += [
            _Weight(f"{ours}.input_layernorm.weight", {f"{theirs}.input_layernorm.weight": (hidden,)}),
            _Weight(f"{ours}.pre_mlp_layernorm.weight", {f"{theirs}.post_attention_layernorm.weight": (hidden,)}),
            # the rows of each query group stand together: its query heads, its key head, its value head
            _Weight(f"{ours}.self_attention.linear_qkv.weight", qkv, groups=config.num_query_groups),
            _Weight(f"{ours}.self_attention.linear_proj.weight", output),
            _Weight(f"{ours}.mlp.router.weight", {f"{moe}.gate.weight": (_num_experts(config), hidden)}),
        ]
        for index, expert in enumerate(experts):
            mlp, source = f"{ours}.mlp.experts.local_experts.{index}", f"{moe}.experts.{expert}"
            gate_up = {f"{source}.w1.weight": (ffn, hidden), f"{source}.w3.weight": (ffn, hidden)}
            found += [
                _Weight(f"{mlp}.linear_fc1.weight", gate_up),
                _Weight(f"{mlp}.linear_fc2.weight", {f"{source}.w2.weight": (hidden, ffn)}),
            ]
    return found


def _unfuse(state: State, config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Turns the names that transformers 5 uses in memory into those it stores; leaves others as they are."""
    experts = _num_experts(config)
    hidden, ffn = _sizes(config)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".mlp.")
        target = f"{prefix}.block_sparse_moe"
        if prefix and kind == "gate.weight":
            result[f"{target}.gate.weight"] = tensor
        elif prefix and kind == "experts.gate_up_proj":
            _check_shapes(state, {name: (experts, 2 * ffn, hidden)})
            for expert, (gate, up) in enumerate(tensor.unflatten(1, (2, ffn))):
                result[f"{target}.experts.{expert}.w1.weight"] = gate
                result[f"{target}.experts.{expert}.w3.weight"] = up
        elif prefix and kind == "experts.down_proj":
            _check_shapes(state, {name: (experts, hidden, ffn)})
            for expert, down in enumerate(tensor):
                result[f"{target}.experts.{expert}.w2.weight"] = down
        else:
            result[name] = tensor
    return result


def _num_experts(config: TransformerConfig) -> int:
    if config.num_moe_experts is None:
        raise WeightsError("num_moe_experts is None: expected a mixture of experts")
    return config.num_moe_experts


def _sizes(config: TransformerConfig) -> tuple[int, int]:
    return config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size


def _rows(state: State, name: str) -> int:
    if name not in state:
        raise WeightsError(f"weights have no {name}")
    return state[name].shape[0]


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return "none" if not names else first + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_shapes(state: State, expected: Mapping[str, Shape]) -> None:
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"{name}: shape {tuple(state[name].shape)}, expected {shape}")
        if not state[name].is_floating_point():
            raise WeightsError(f"{name}: dtype {state[name].dtype}, expected a floating-point one")


def _check_layout(config: TransformerConfig) -> None:
    for name, expected in (
        ("tensor_model_parallel_size", 1),
        ("pipeline_model_parallel_size", 1),
        ("moe_grouped_gemm", False),
    ):
        if getattr(config, name) != expected:
            seen = getattr(config, name)
            raise WeightsError(f"{name} is {seen}: Mixtral weights are mapped for {expected} only")
