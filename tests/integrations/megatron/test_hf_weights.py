"""The small MoE in Megatron-core against transformers: equal logits, round trips, refused checkpoints, facts found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("megatron")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from pikv_megatron.facts import count_answered, documents, load_text
from pikv_megatron.integrations.hf_weights import (
    WeightsError,
    build_model,
    hf_to_megatron,
    load_mixtral,
    load_weights,
    megatron_to_hf,
    save_mixtral,
    transformer_config,
)
from pikv_megatron.integrations.mixtral_names import local_experts

ASSETS = Path(__file__).parents[3] / "assets"
SMALL_MOE = ASSETS / "small_moe"
HF_CONFIG = json.loads((SMALL_MOE / "config.json").read_text())
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return load_mixtral(SMALL_MOE)


@pytest.fixture
def stored():
    return load_file(SMALL_MOE / "model.safetensors")


@pytest.fixture(scope="module")
def prompts():
    text = load_text(ASSETS / "text/kjv_heldout.txt")
    made = documents(text, count=2, length=1024, num_facts=8, num_questions=1, seed=3)
    return torch.tensor([list(document.text) for document in made])


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def transformers_model(path):
    transformers = pytest.importorskip("transformers")
    return transformers.MixtralForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


def transformers_logits(path, tokens):
    with torch.no_grad():
        return transformers_model(path)(tokens).logits


def parameters(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_logits_equal_those_of_transformers(model, prompts):
    difference = logits(model, prompts) - transformers_logits(SMALL_MOE, prompts)
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_dispatchers_agree(model, prompts, dispatcher):
    other = load_mixtral(SMALL_MOE, moe_token_dispatcher_type=dispatcher)
    assert (logits(other, prompts[:1]) - logits(model, prompts[:1])).abs().max() <= 1e-4


def test_round_trips_are_bit_equal(model, stored):
    there = hf_to_megatron(stored, model.config)
    assert equal(megatron_to_hf(there, model.config), stored)
    ours = parameters(model)
    assert equal(hf_to_megatron(megatron_to_hf(ours, model.config), model.config), ours)


def test_fused_names_are_read(model, stored):
    fused = transformers_model(SMALL_MOE).state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    assert equal(hf_to_megatron(fused, model.config), parameters(model))


def test_a_saved_model_is_read_by_transformers(model, prompts, tmp_path):
    save_mixtral(model, tmp_path / "saved")
    expected = transformers_logits(SMALL_MOE, prompts)
    assert torch.equal(transformers_logits(tmp_path / "saved", prompts), expected)
    assert torch.equal(logits(load_mixtral(tmp_path / "saved"), prompts), logits(model, prompts))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}


def test_a_model_is_stored_in_the_dtype_asked_for(model, stored, tmp_path):
    save_mixtral(model, tmp_path, dtype=torch.float16)
    assert equal(load_file(tmp_path / "model.safetensors"), stored)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_dtype_asked_for(model, dtype):
    cast = load_mixtral(SMALL_MOE, dtype=dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    assert cast.config.params_dtype == dtype
    assert equal(parameters(cast), {name: tensor.to(dtype) for name, tensor in parameters(model).items()})


def test_a_layer_spec_or_a_function_that_makes_one(model, prompts):
    def make_spec(config):
        return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")

    for layer_spec in (make_spec, make_spec(model.config)):
        other = load_mixtral(SMALL_MOE, layer_spec=layer_spec)
        assert torch.equal(logits(other, prompts[:1, :50]), logits(model, prompts[:1, :50]))


def test_the_file_of_another_rope_base_gives_other_logits(model, prompts, tmp_path):
    shutil.copytree(SMALL_MOE, tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text(json.dumps(HF_CONFIG | {"rope_parameters": {"rope_theta": 500.0}}))
    ours = logits(load_mixtral(tmp_path / "copy"), prompts[:1, :200])
    assert (ours - logits(model, prompts[:1, :200])).abs().max() > 0.1
    assert (ours - transformers_logits(tmp_path / "copy", prompts[:1, :200])).abs().max() <= 1e-4


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_each_expert_parallel_rank_gets_its_own_experts(model, stored, ranks):
    config = transformer_config(HF_CONFIG, expert_model_parallel_size=ranks)
    everything = hf_to_megatron(stored, model.config)
    seen = []
    for rank in range(ranks):
        mine = local_experts(config, rank)
        weights = hf_to_megatron(stored, config, experts=mine)
        for index, expert in enumerate(mine):
            for part in ("linear_fc1", "linear_fc2"):
                name = "decoder.layers.2.mlp.experts.local_experts.{}.{}.weight"
                assert torch.equal(weights[name.format(index, part)], everything[name.format(expert, part)])
        assert f"decoder.layers.2.mlp.experts.local_experts.{len(mine)}.linear_fc1.weight" not in weights
        assert torch.equal(
            weights["decoder.layers.2.mlp.router.weight"], everything["decoder.layers.2.mlp.router.weight"]
        )
        seen += mine
    assert seen == list(range(8))
    with pytest.raises(WeightsError, match="expert_model_parallel_size is"):
        megatron_to_hf(everything, config)


BAD_WEIGHTS = {
    "missing": (lambda state: state.pop(Q_PROJ), rf"missing {Q_PROJ}; unexpected none"),
    "no embedding": (lambda state: state.pop("model.embed_tokens.weight"), r"missing model\.embed_tokens\.weight"),
    "unexpected": (
        lambda state: state.update({"model.layers.9.mlp.x": state[Q_PROJ].clone()}),
        r"missing none; unexpected model\.layers\.9\.mlp\.x",
    ),
    "another shape": (
        lambda state: state.update({Q_PROJ: torch.zeros(64, 128)}),
        rf"{Q_PROJ}: shape \(64, 128\), expected \(128, 128\)",
    ),
    "another vocabulary": (
        lambda state: state.update({"model.embed_tokens.weight": torch.zeros(300, 128)}),
        r"model\.embed_tokens\.weight: shape \(300, 128\), expected \(288, 128\)",
    ),
    "integers": (
        lambda state: state.update({Q_PROJ: torch.zeros(128, 128, dtype=torch.int8)}),
        rf"{Q_PROJ}: dtype torch\.int8, expected a floating-point one",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_named_and_change_nothing(stored, case):
    change, message = BAD_WEIGHTS[case]
    model = build_model(HF_CONFIG)
    before = parameters(model)
    change(stored)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, stored)
    assert equal(parameters(model), before)


def test_the_vocabulary_is_read_from_the_embedding(model, stored):
    del stored["model.embed_tokens.weight"]
    with pytest.raises(WeightsError, match=r"no model\.embed_tokens\.weight"):
        hf_to_megatron(stored, model.config)
    with pytest.raises(WeightsError, match=r"experts: 8 does not exist, expected indices in 0\.\.7"):
        hf_to_megatron(stored, model.config, experts=[7, 8])


def test_a_bad_file_is_named(stored, tmp_path):
    shutil.copy(SMALL_MOE / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or .*index\.json, found neither"):
        load_mixtral(tmp_path)
    stored.pop(Q_PROJ)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"missing {Q_PROJ}"):
        load_mixtral(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a whole safetensors file"):
        load_mixtral(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: not JSON"):
        load_mixtral(tmp_path)


def test_a_checkpoint_in_shards(model, stored, prompts, tmp_path):
    shutil.copy(SMALL_MOE / "config.json", tmp_path)
    names = sorted(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: stored[name] for name in mine}, tmp_path / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(logits(load_mixtral(tmp_path), prompts), logits(model, prompts), rtol=0, atol=0)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json lists b\.safetensors, which are not there"):
        load_mixtral(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"index\.json: expected a JSON object, got list"):
        load_mixtral(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"sliding_window": 128}, "sliding_window is 128, expected None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE of kind 'yarn', expected 'default'"),
        ({"rope_parameters": None}, "rope_theta is missing"),
    ],
)
def test_a_config_that_megatron_cannot_follow_is_refused(change, message):
    with pytest.raises(WeightsError, match=message):
        transformer_config(HF_CONFIG | change)


@pytest.mark.parametrize(
    "change", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}]
)
def test_a_layout_without_a_mapping_is_refused(stored, change):
    config = transformer_config(HF_CONFIG, **change)
    with pytest.raises(WeightsError, match=f"{next(iter(change))} is 2"):
        hf_to_megatron(stored, config)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = build_model(HF_CONFIG)
    save_mixtral(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.output_layer.weight[3, 3] = 1e6  # not a float16
    with pytest.raises(WeightsError, match=r"lm_head\.weight: .* not finite in torch\.float16"):
        save_mixtral(model, tmp_path, dtype=torch.float16)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    save_mixtral(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_mixtral(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_the_small_moe_finds_the_facts(model):
    """The first 16 of the 96 questions behind the model card's figure: 8 facts in 1,024 tokens, all answered right."""
    text = load_text(ASSETS / "text/kjv_heldout.txt")
    held_out = documents(text, count=4, length=1024, num_facts=8, num_questions=4, seed=1008)
    right, asked = count_answered(lambda tokens: logits(model, torch.from_numpy(tokens)).argmax(-1).numpy(), held_out)
    assert (right, asked) == (16, 16)
