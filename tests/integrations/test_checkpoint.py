"""Checkpoints that somebody else made, loaded for Megatron-core and for transformers: what they may not do or hold."""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pikv_megatron.integrations.checkpoint import check_finite
from pikv_megatron.integrations.mixtral_names import WeightsError

SMALL_MOE = Path(__file__).parents[2] / "assets" / "small_moe"
CONFIG = json.loads((SMALL_MOE / "config.json").read_text())
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load_for_megatron(path, dtype=torch.float32):
    from pikv_megatron.integrations.hf_weights import load_mixtral

    return load_mixtral(path, dtype=dtype)


def load_for_transformers(path, dtype=torch.float32):
    from pikv_megatron.integrations.huggingface.session import load_model

    return load_model(path, dtype)


LOADERS = [
    pytest.param(load, id=host, marks=pytest.mark.skipif(importlib.util.find_spec(host) is None, reason=f"no {host}"))
    for host, load in {"megatron": load_for_megatron, "transformers": load_for_transformers}.items()
]
with_both = pytest.mark.parametrize("load", LOADERS)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(SMALL_MOE, tmp_path / "model")
    return tmp_path / "model"


def with_index(folder, name="model-1.safetensors"):
    """Moves the one file of weights to where `name` says, and makes an index that lists it under this name."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    return folder


@with_both
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e6])
def test_one_weight_that_is_not_finite_is_named(load, folder, value):
    """1e6 is finite where it is stored and not in the float16 that is asked for."""
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    state[Q_PROJ][-1, -1] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"^{Q_PROJ}: holds values that are not finite in torch.float16"):
        load(folder, torch.float16)


@with_both
@pytest.mark.parametrize("name", ["../stolen.safetensors", "{folder}/a.safetensors", "sub/a.safetensors", "..", 5, ""])
def test_an_index_that_leaves_its_folder(load, folder, name):
    with_index(folder)
    name = name.format(folder=folder.parent) if isinstance(name, str) else name
    if isinstance(name, str) and name.endswith(".safetensors"):  # as if it could be read
        (folder / "sub").mkdir()
        shutil.copy(folder / "model-1.safetensors", folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {Q_PROJ: name}}))
    with pytest.raises(WeightsError, match=rf"{INDEX}: weight_map: expected names of files in the same folder, got "):
        load(folder)


@with_both
def test_a_link_that_leaves_the_folder(load, folder):
    with_index(folder)
    shard = folder / "model-1.safetensors"
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(WeightsError, match=r"model-1.safetensors: expected a file in this folder, got a link to /"):
        load(folder)


@with_both
def test_links_within_the_folder_and_into_the_hub_cache(load, folder):
    """As Hugging Face lays out its cache: snapshots of links to blobs."""
    with_index(folder)
    cache = folder.parent / "models--someone--small"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot).training is False
    shard = folder / "model-1.safetensors"
    for file in snapshot.iterdir():
        shutil.copy(file, folder)
    shard.rename(folder / "here")
    shard.symlink_to("here")
    (folder.parent / "link").symlink_to(folder)
    assert load(folder.parent / "link").training is False


BAD_FILES = {
    "config.json, not UTF-8": ("config.json", b'{"a": "\xff"}', "expected UTF-8 text"),
    "config.json, deep": ("config.json", b"[" * 10**6, "nested too deeply"),
    "config.json, a list": ("config.json", b"[1]", "expected a JSON object, got list"),
    "config.json, text for a number": (
        "config.json",
        json.dumps(CONFIG | {"hidden_size": "128"}).encode(),
        "hidden_size",
    ),
    "config.json, a list for a number": (
        "config.json",
        json.dumps(CONFIG | {"num_key_value_heads": [2]}).encode(),
        "num_key_value_heads",
    ),
    "config.json, a list for RoPE": (
        "config.json",
        json.dumps(CONFIG | {"rope_parameters": [1]}).encode(),
        "rope_parameters",
    ),
    "the index, a list": (INDEX, b"[1]", "expected a JSON object, got list"),
    "the index, a number": (INDEX, b'{"weight_map": 5}', "weight_map from names to files, got 5"),
    "the index, not UTF-8": (INDEX, b"\xff", "expected UTF-8 text"),
}


@with_both
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(load, folder, case):
    name, content, said = BAD_FILES[case]
    with_index(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"^{folder / name}: ") as error:
        load(folder)
    assert said in str(error.value)


@with_both
def test_code_in_a_checkpoint_is_not_run(load, folder, monkeypatch):
    """Whatever stdin says."""
    names = {"AutoConfig": "code.EvilConfig", "AutoModelForCausalLM": "code.EvilModel"}
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass EvilConfig: pass\n")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    for change in ({"model_type": "evil", "auto_map": names}, {"attn_implementation": "someone/kernels"}):
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        if load is load_for_transformers or "model_type" in change:  # of others Megatron-core reads nothing
            with pytest.raises(WeightsError, match=r"config.json: .*(never run|model_type is 'evil')"):
                load(folder)
        assert not asked and not (folder / "ran").exists()


def test_numbers_of_one_byte_and_empty_tensors_are_checked_too():
    nan = torch.full((2,), float("nan"))
    check_finite([("a", torch.zeros(2).to(torch.float8_e4m3fn)), ("b", torch.empty(0)), ("c", torch.ones(1).long())])
    with pytest.raises(WeightsError, match=r"^d: holds"):
        check_finite([("d", nan.to(torch.float8_e4m3fn))])
