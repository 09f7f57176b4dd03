"""Bad input raises one clear error that names it, before anything has changed, and the cache works on afterwards.

Every case runs against a cache in the middle of its work: two requests of different lengths, blocks sealed, one block
waiting for its routing. Before and after, everything the cache holds is compared, byte for byte.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from dense import (
    CODECS,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
    snapshot,
)
from refusals import refuses, working_cache

from pikv_megatron import PiKVCache
from pikv_megatron.cache.checks import UnknownRequestError

NAN, INF = float("nan"), float("inf")


class _Arguments(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor


def _good(tokens=3) -> _Arguments:
    model, rng = model_config(v_head_dim=12), generator(3)
    return _Arguments(*random_kv(model, tokens, rng), random_q(model, tokens, rng), *random_routing(model, tokens, rng))


K, V, Q, EXPERTS, WEIGHTS = _good()


def _with(x, value):
    x = x.clone()
    x[-1].flatten()[-1] = value
    return x


APPEND = {  # k, v, error, parts of its message
    "k of two dimensions": (K[0], V, ValueError, ("k:", "[tokens, 2, 8]", "[2, 8]")),
    "k of four dimensions": (K[None], V, ValueError, ("k:", "[1, 3, 2, 8]")),
    "no tokens": (K[:0], V[:0], ValueError, ("k:", "at least one token", "[0, 2, 8]")),
    "another model's heads": (K.repeat(1, 2, 1), V, ValueError, ("k:", "[tokens, 2, 8]", "[3, 4, 8]")),
    "another model's head_dim": (K.repeat(1, 1, 2), V, ValueError, ("k:", "[tokens, 2, 8]", "[3, 2, 16]")),
    "k for v": (K, K, ValueError, ("v:", "[tokens, 2, 12]", "[3, 2, 8]")),
    "fewer values": (K, V[:2], ValueError, ("v:", "as many tokens as k (3)", "2")),
    "k in double": (K.double(), V, TypeError, ("k:", "float32", "float64")),
    "v in half": (K, V.half(), TypeError, ("v:", "float32", "float16")),
    "integers": (K.int(), V, TypeError, ("k:", "float32", "int32")),
    "k on meta": (K.to("meta"), V, ValueError, ("k:", "cpu", "meta")),
    "v on meta": (K, V.to("meta"), ValueError, ("v:", "cpu", "meta")),
    "an array": (K.numpy(), V, TypeError, ("k:", "tensor", "ndarray")),
    "None": (K, None, TypeError, ("v:", "tensor", "NoneType")),
    "NaN in k": (_with(K, NAN), V, ValueError, ("k:", "finite", "nan")),
    "infinity in k": (_with(K, INF), V, ValueError, ("k:", "finite", "inf")),
    "minus infinity in v": (K, _with(V, -INF), ValueError, ("v:", "finite", "inf")),
    "NaN in v": (K, _with(V, NAN), ValueError, ("v:", "finite", "nan")),
}


@pytest.mark.parametrize("case", APPEND)
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_append_and_update(codec, case):
    k, v, error, parts = APPEND[case]
    cache = working_cache(codec)
    refuses(cache, lambda: cache.append(1, k, v), error, *parts)
    cache = working_cache(codec)
    refuses(cache, lambda: cache.append(0, k, v, request_id=77), error, *parts)  # nor does a request appear
    cache = working_cache(codec)
    if case != "k of two dimensions":
        refuses(cache, lambda: cache.update(1, range(44, 47), k, v), error, *parts)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["k", "v"])
def test_non_finite_in_every_codec(codec, value, which):
    cache = working_cache(codec)
    k, v = (_with(K, value), V) if which == "k" else (K, _with(V, value))
    refuses(cache, lambda: cache.append(0, k, v, request_id=4), ValueError, f"{which}:", "finite")


@pytest.mark.parametrize(
    ("codec", "changes"),
    [("int8", {}), ("int4", {}), ("int2", {}), ("none", {"attention": {"mode": "top_k"}})],
)
def test_what_float16_scales_cannot_hold(codec, changes):
    cache = working_cache(codec, **changes)
    refuses(cache, lambda: cache.append(0, _with(K, 65505.0), V), ValueError, "k:", "65504", "65505")
    cache = working_cache(codec, **changes)
    refuses(cache, lambda: cache.append(0, K, _with(V, -7e4)), ValueError, "v:", "65504", "70000")
    cache = working_cache(codec, **changes)
    cache.append(0, _with(K, 65504.0), _with(V, -65504.0))


def test_without_codes_large_numbers_are_fine():
    cache = working_cache("none")
    cache.append(0, _with(K, 1e18), _with(V, -1e18))
    assert cache.retrieve(0).k.amax() == 1e18
    for bad in (lambda c: c.append(0, _with(K, 2e18), V), lambda c: c.attend(0, _with(Q, 2e18))):
        cache = working_cache("none")
        refuses(cache, functools.partial(bad, cache), ValueError, "magnitude at most 1e+18", "2e+18")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_of_model(dtype):
    cache = working_cache(model={"dtype": dtype})
    refuses(cache, lambda: cache.append(0, K, V), TypeError, "k:", dtype, "float32")
    cache = working_cache(model={"dtype": dtype})
    refuses(cache, lambda: cache.attend(0, Q), TypeError, "q:", dtype, "float32")


@pytest.mark.parametrize(
    ("layer_id", "error"), [(2, IndexError), (-1, IndexError), (0.0, TypeError), (True, TypeError)]
)
@pytest.mark.parametrize(
    "name", ["append", "update", "attend", "observe_routing", "retrieve", "expert_shard", "length"]
)
def test_layers_that_do_not_exist(layer_id, error, name):
    cache = working_cache()
    call = {
        "append": lambda: cache.append(layer_id, K, V),
        "update": lambda: cache.update(layer_id, range(44, 47), K, V),
        "attend": lambda: cache.attend(layer_id, Q),
        "observe_routing": lambda: cache.observe_routing(layer_id, EXPERTS, WEIGHTS),
        "retrieve": lambda: cache.retrieve(layer_id),
        "expert_shard": lambda: cache.expert_shard(layer_id, 0),
        "length": lambda: cache.length(layer_id),
    }[name]
    expected = "0 .. 1" if error is IndexError else "an int"
    refuses(cache, call, error, "layer_id: expected " + expected, str(layer_id))


@pytest.mark.parametrize("name", ["attend", "observe_routing", "retrieve", "length", "release"])
def test_requests_that_do_not_exist(name):
    cache = working_cache()
    call = {
        "attend": lambda: cache.attend(0, Q, 1),
        "observe_routing": lambda: cache.observe_routing(0, EXPERTS, WEIGHTS, 1),
        "retrieve": lambda: cache.retrieve(0, 1),
        "length": lambda: cache.length(request_id=1),
        "release": lambda: cache.release(1),
    }[name]
    refuses(cache, call, UnknownRequestError, "request 1 does not exist; live requests: [0, 4]")


@pytest.mark.parametrize("request_id", ["0", 0.0, None, True, [0], torch.tensor(0)])
@pytest.mark.parametrize("name", ["append", "update", "attend", "observe_routing", "retrieve", "length", "release"])
def test_requests_that_are_no_int(request_id, name):
    cache = working_cache()
    call = {
        "append": lambda: cache.append(0, K, V, request_id),
        "update": lambda: cache.update(0, range(44, 47), K, V, request_id),
        "attend": lambda: cache.attend(0, Q, request_id),
        "observe_routing": lambda: cache.observe_routing(0, EXPERTS, WEIGHTS, request_id),
        "retrieve": lambda: cache.retrieve(0, request_id),
        "length": lambda: cache.length(request_id=request_id),
        "release": lambda: cache.release(request_id),
    }[name]
    refuses(cache, call, TypeError, "request_id: expected an int", repr(request_id))


@pytest.mark.parametrize(
    ("start", "error", "parts"),
    [
        (43, ValueError, ("position", "expected 44 next, got 43", "may not go back", "request 0", "layer 1")),
        (0, ValueError, ("expected 44 next, got 0", "go back")),
        (45, ValueError, ("expected 44 next, got 45", "may not skip")),
        (-1, ValueError, ("expected 44 next, got -1", "go back")),
        (44.0, TypeError, ("start: expected an int, got 44.0",)),
        (True, TypeError, ("start: expected an int, got True",)),
    ],
)
def test_positions_that_go_back_or_skip(start, error, parts):
    cache = working_cache()
    refuses(cache, lambda: cache.append(1, K, V, start=start), error, *parts)


def test_a_new_request_starts_at_zero():
    cache = working_cache()
    cache.release(4)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="request 5, layer 0: expected 0 next, got 3"):
        cache.append(0, K, V, request_id=5, start=3)
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("token_id", "error", "parts"),
    [
        ([44, 46, 45], ValueError, ("token_id", "consecutive", "got 46 after 44")),
        ([44, 44, 45], ValueError, ("token_id", "consecutive", "got 44 after 44")),
        ([44, 45], ValueError, ("token_id", "3 positions", "got 2")),
        (44, ValueError, ("token_id", "3 positions", "got 1")),
        ([], ValueError, ("token_id", "3 positions", "got 0")),
        ([44.0, 45.0, 46.0], TypeError, ("token_id", "ints")),
        ([True, 45, 46], TypeError, ("token_id", "ints")),
        ("44", TypeError, ("token_id", "'44'")),
        (None, TypeError, ("token_id", "None")),
        (torch.tensor([44.0, 45, 46]), TypeError, ("token_id", "ints")),
        (range(45, 48), ValueError, ("expected 44 next, got 45", "skip")),
        (torch.tensor([4, 5, 6]), ValueError, ("expected 44 next, got 4", "go back")),
    ],
)
def test_token_ids(token_id, error, parts):
    cache = working_cache()
    refuses(cache, lambda: cache.update(1, token_id, K, V), error, *parts)


@pytest.mark.parametrize(
    ("expert_ids", "error", "parts"),
    [
        (EXPERTS[:2], ValueError, ("expert_ids", "all 3 tokens", "2")),
        (EXPERTS[0], ValueError, ("expert_ids", "all 3 tokens", "1")),
        (EXPERTS[:, :1], ValueError, ("expert_ids", "[tokens, 2]", "[3, 1]")),
        (EXPERTS + 3, ValueError, ("expert_ids", "0 .. 3")),
        (EXPERTS - 4, ValueError, ("expert_ids", "0 .. 3")),
        (EXPERTS.float(), TypeError, ("expert_ids", "integers", "float32")),
        (EXPERTS.bool(), TypeError, ("expert_ids", "integers", "bool")),
        (2, ValueError, ("expert_ids", "[tokens, 2]")),
    ],
)
def test_update_with_experts_that_make_no_sense(expert_ids, error, parts):
    cache = working_cache()
    refuses(cache, lambda: cache.update(0, range(44, 47), K, V, expert_ids=expert_ids), error, *parts)


@pytest.mark.parametrize(
    ("expert_ids", "weights", "error", "parts"),
    [
        (EXPERTS[0], WEIGHTS[0], ValueError, ("expert_ids", "[tokens, 2]", "[2]")),
        (EXPERTS[:0], WEIGHTS[:0], ValueError, ("expert_ids", "[0, 2]")),
        (EXPERTS.repeat(1, 2), WEIGHTS, ValueError, ("expert_ids", "[tokens, 2]", "[3, 4]")),
        (EXPERTS, WEIGHTS[:2], ValueError, ("weights", "[3, 2]", "[2, 2]")),
        (EXPERTS.tolist(), WEIGHTS, ValueError, ("expert_ids", "tensor")),
        (EXPERTS, None, ValueError, ("weights", "tensor", "None")),
        (EXPERTS.float(), WEIGHTS, TypeError, ("expert_ids", "integers", "float32")),
        (EXPERTS, EXPERTS, TypeError, ("weights", "floats", "int64")),
        (_with(EXPERTS, 4), WEIGHTS, ValueError, ("expert_ids", "0 .. 3", "got 4")),
        (_with(EXPERTS, -1), WEIGHTS, ValueError, ("expert_ids", "0 .. 3", "got -1")),
        (EXPERTS, _with(WEIGHTS, NAN), ValueError, ("weights", "finite", "nan")),
        (EXPERTS, _with(WEIGHTS, INF), ValueError, ("weights", "finite", "inf")),
        (EXPERTS.to("meta"), WEIGHTS, ValueError, ("expert_ids", "cpu", "meta")),
        (EXPERTS, WEIGHTS.to("meta"), ValueError, ("weights", "cpu", "meta")),
        (EXPERTS.repeat(9, 1), WEIGHTS.repeat(9, 1), ValueError, ("expert_ids", "at most", "not sealed", "27")),
    ],
)
def test_bad_routing(expert_ids, weights, error, parts):
    cache = working_cache()
    refuses(cache, lambda: cache.observe_routing(0, expert_ids, weights), error, *parts)


def test_routing_of_a_model_without_experts():
    cache = working_cache(model={"num_experts": 0})
    refuses(cache, lambda: cache.observe_routing(0, EXPERTS, WEIGHTS), ValueError, "expert_ids", "num_experts 0")


@pytest.mark.parametrize(
    ("q", "error", "parts"),
    [
        (Q[0], ValueError, ("q:", "[tokens, 4, 8]", "[4, 8]")),
        (Q[:0], ValueError, ("q:", "at least one token")),
        (Q[:, :2], ValueError, ("q:", "[tokens, 4, 8]", "[3, 2, 8]")),
        (Q[..., :4], ValueError, ("q:", "[tokens, 4, 8]", "[3, 4, 4]")),
        (Q.double(), TypeError, ("q:", "float32", "float64")),
        (Q.to("meta"), ValueError, ("q:", "cpu", "meta")),
        (Q.tolist(), TypeError, ("q:", "tensor", "list")),
        (Q.repeat(20, 1, 1), ValueError, ("q:", "44 tokens", "60")),
        (_with(Q, NAN), ValueError, ("q:", "finite", "nan")),
        (_with(Q, INF), ValueError, ("q:", "finite", "inf")),
    ],
)
@pytest.mark.parametrize("budget", [False, True])
def test_bad_queries(q, error, parts, budget):
    """With a budget a query also counts towards importance: a NaN there would stay for ever."""
    changes = {"budget": {"policy": "uniform", "first_layer_tokens": 20, "over_budget": "drop"}} if budget else {}
    cache = working_cache(**changes)
    refuses(cache, lambda: cache.attend(0, q), error, *parts)


def test_queries_before_any_key():
    cache = PiKVCache(model_config(v_head_dim=12), runtime_config())
    cache.append(0, K, V)
    with pytest.raises(ValueError, match="q: request 0, layer 1 has 0 tokens, got queries of 1"):
        cache.attend(1, Q[:1])
    assert len(cache.retrieve(1).positions) == 0


def test_an_expert_that_is_none():
    for expert_id, error, message in ((1.5, TypeError, "an int, got 1.5"), (4, IndexError, "0 .. 3, got 4")):
        cache = working_cache()
        refuses(cache, lambda c=cache, e=expert_id: c.expert_shard(0, e), error, f"expert_id: expected {message}")


def test_a_released_request_is_gone_and_can_come_again():
    cache = working_cache("int8")
    cache.release(0)
    with pytest.raises(UnknownRequestError, match="request 0 does not exist"):
        cache.release(0)
    cache.append(0, K, V, request_id=0, start=0)
    assert cache.retrieve(0).positions.tolist() == [0, 1, 2]
    assert cache.length(1, 0) == 0


def test_check_finite_can_be_switched_off():
    cache = PiKVCache(model_config(v_head_dim=12), runtime_config(check_finite="never"))
    cache.append(0, _with(K, NAN), V)
    assert cache.retrieve(0).k.isnan().any()
