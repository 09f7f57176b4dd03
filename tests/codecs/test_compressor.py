"""Compressor: fields are what encode returns, in shape and bytes; decode is within half a step of what went in."""

from __future__ import annotations

import pytest
import torch
from dense import CODECS, generator, model_config, runtime_config

from pikv_megatron.codecs.compressor import FP16_MAX, Compressor

BITS = {"none": 32, "int8": 8, "int4": 4, "int2": 2}
TOP_K = {"attention": {"mode": "top_k"}}


def _blocks(model, count, rng, size=4):
    k = torch.randn(count, model.num_query_groups, size, model.head_dim, generator=rng)
    v = torch.randn(count, model.num_query_groups, size, model.value_dim, generator=rng)
    return k.to(model.torch_dtype), v.to(model.torch_dtype)


@pytest.fixture(params=CODECS)
def keys(request):
    return request.param


@pytest.fixture(params=CODECS)
def values(request):
    return request.param


@pytest.mark.parametrize("attention", [{}, TOP_K])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_encode_returns_the_fields(keys, values, attention, dtype):
    model = model_config(v_head_dim=12, dtype=dtype)
    runtime = runtime_config({"keys": keys, "values": values}, **attention)
    compressor = Compressor(model, runtime)
    encoded = compressor.encode(*_blocks(model, 5, generator()))
    fields = compressor.fields()
    assert set(encoded) == set(fields)
    for name, field in fields.items():
        assert encoded[name].shape == (5, *field.shape), name
        assert encoded[name].dtype == field.dtype, name
    assert ("k" in fields) == (keys == "none")
    assert ("k_high" in fields) == (keys != "none" or bool(attention))


def test_bytes_per_block(keys, values):
    """Codes, scales and zeros, counted from the tensors: what the configuration promises."""
    model = model_config(head_dim=32, v_head_dim=16)
    runtime = runtime_config({"keys": keys, "values": values}, block_size=8)
    encoded = Compressor(model, runtime).encode(*_blocks(model, 1, generator(), size=8))
    stored = sum(t.numel() * t.element_size() for t in encoded.values())
    groups, size = 2, 8
    expected = groups * size * (32 * BITS[keys] + 16 * BITS[values]) // 8
    expected += groups * 32 * 4 if keys != "none" else 0  # a float16 scale and zero per channel
    expected += groups * size * 4 if values != "none" else 0  # and per token
    assert stored == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_within_half_a_step(keys, values, dtype):
    model = model_config(v_head_dim=12, dtype=dtype)
    compressor = Compressor(model, runtime_config({"keys": keys, "values": values}))
    k, v = _blocks(model, 6, generator(1))
    encoded = compressor.encode(k, v)
    decoded_k, decoded_v = compressor.decode(encoded)
    assert decoded_k.dtype == decoded_v.dtype == model.torch_dtype
    narrow = torch.finfo(model.torch_dtype).eps  # rounding to the model's dtype
    for codec, x, decoded, scale in (
        (keys, k, decoded_k, encoded.get("k_scale", torch.empty(0)).unsqueeze(-2)),
        (values, v, decoded_v, encoded.get("v_scale", torch.empty(0)).unsqueeze(-1)),
    ):
        if codec == "none":
            assert torch.equal(x, decoded)
        else:
            off = (x.double() - decoded.double()).abs()
            assert (off <= scale.double() * 0.5001 + decoded.double().abs() * narrow + 1e-6).all()
            assert off.max() > 0


def test_an_index_beside_raw_keys_changes_nothing_in_them():
    model = model_config()
    compressor = Compressor(model, runtime_config(**TOP_K))
    k, v = _blocks(model, 3, generator(2))
    encoded = compressor.encode(k, v)
    assert torch.equal(encoded["k"], k)
    assert compressor.key_planes == (2, 0)
    held = compressor.keys(encoded)
    assert held.raw is encoded["k"]
    assert held.high is encoded["k_high"]
    assert held.low is None


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_float16_models_never_get_infinity_back(codec):
    """At the end of float16's range half a step leads beyond it."""
    model = model_config(dtype="float16")
    compressor = Compressor(model, runtime_config(codec))
    ends = torch.tensor([65504.0, -65504.0, 65000.0, 0.0])
    k = ends[torch.randint(0, 4, (50, 2, 4, 8), generator=generator(3))].half()
    for decoded in compressor.decode(compressor.encode(k, k)):
        assert decoded.isfinite().all()


def test_the_largest_number_that_can_be_stored():
    assert Compressor(model_config(), runtime_config("none")).largest == 1e18
    assert Compressor(model_config(dtype="bfloat16"), runtime_config()).largest == 1e18
    for runtime in (runtime_config("int8"), runtime_config(**TOP_K)):
        assert Compressor(model_config(), runtime).largest == FP16_MAX == 65504
    only_values = runtime_config({"values": "int8"})
    assert Compressor(model_config(), only_values).largest == FP16_MAX
