"""The packages are rooms with doors one way: who may import whom. And a policy is one file and one row: a tier, a codec
and a reader of the tests' own serve requests, each from a file that is written here.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from dense import (
    assert_pools_free,
    attend_retrieved,
    dense_attention,
    forward,
    generator,
    model_config,
    random_kv,
    random_q,
    random_routing,
    runtime_config,
)

from pikv_megatron import CacheEvents, ConfigError, PiKVCache
from pikv_megatron.codecs import CODECS
from pikv_megatron.reading import READERS
from pikv_megatron.tiers import TIERS

PACKAGE = Path(__file__).parents[1] / "pikv_megatron"

DOORS = {
    "config": set(),
    "ops": set(),
    "machine": set(),
    "torch_mode": set(),
    "device_numbers": set(),
    "facts": set(),
    "budgets": {"config"},
    "tiers": {"config", "device_numbers"},
    "sharding": {"config"},
    "codecs": {"config", "ops", "tiers"},
    "reading": {"config", "ops", "device_numbers", "torch_mode"},
    "cache": {
        *("config", "ops", "machine", "torch_mode", "device_numbers"),
        *("budgets", "codecs", "reading", "sharding", "tiers"),
    },
    "streamer": {"cache"},
    "public": {"cache", "codecs", "config", "streamer", "tiers"},
    "launch": {"machine"},
    "integrations": {"cache", "config", "launch", "tiers"},
    "cli": {"cache", "config", "facts", "integrations", "launch", "ops", ""},
    "__main__": {"cli"},
    "": set(),
}
"""What each package, and each module beside them, may import; "" is the package's own front, its names and version."""


def _imports(path: Path) -> Iterator[str]:
    """What a file imports, in functions too; not for type checkers alone, nor by name when it is asked for."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            yield child
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _graph(depth: int, within: str = "pikv_megatron") -> Mapping[str, set[str]]:
    """Which parts of a package import which: its sub-packages, and the modules beside them."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}

    def part(name: str) -> str | None:
        while name not in modules:  # a name in a module
            name = name.rpartition(".")[0]
            if not name:
                return None
        inside = f"{name}.".startswith(f"{within}.")
        return ".".join(name.split(".")[depth : depth + 1]) if inside else None

    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        source = part(name)
        if source is not None:
            graph[source] |= {target for x in _imports(path) if (target := part(x)) is not None} - {source}
    return graph


def _circle(graph: Mapping[str, set[str]]) -> set[str]:
    """Parts that are left when those that import none of the rest are taken away, again and again."""
    left = {name: set(of) for name, of in graph.items()}
    while free := {name for name, of in left.items() if not of & left.keys()}:
        left = {name: of for name, of in left.items() if name not in free}
    return set(left)


def test_packages_import_one_way():
    graph = _graph(1)
    assert len(graph) > 15 and sum(map(len, graph.values())) > 30
    assert not _circle(graph), {name: sorted(graph[name] & _circle(graph)) for name in _circle(graph)}
    wrong = {name: sorted(of - DOORS.get(name, set())) for name, of in graph.items() if of - DOORS.get(name, set())}
    assert not wrong, f"imports that DOORS does not allow: {wrong}"
    unused = {name: sorted(of - graph.get(name, set())) for name, of in DOORS.items() if of - graph.get(name, set())}
    assert not unused, f"DOORS allows what nobody needs: {unused}"


def test_hosts_import_one_way():
    graph = _graph(2, "pikv_megatron.integrations")
    assert {"huggingface", "megatron", "deepspeed"} <= graph.keys()
    assert not _circle(graph), {name: sorted(graph[name] & _circle(graph)) for name in _circle(graph)}
    assert "megatron" not in graph["huggingface"] | graph["deepspeed"]
    assert "huggingface" not in graph["megatron"]


def test_a_circle_is_seen():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"a", "b", "c", "d"}
    assert not _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


# ---- one file and one row

TAPE = '''
"""Tier tape: the slowest memory, which attention reads from a copy."""

import torch

from pikv_megatron.tiers.blocks import Pending
from pikv_megatron.tiers.tier import Tier


class TapeTier(Tier):
    """Blocks on tape."""

    reads = 0

    @staticmethod
    def memory(device):
        return torch.device("cpu"), False

    def get(self, ids, device):
        self.reads += len(ids)
        return Pending({name: tensor[ids] for name, tensor in self.fields.items()}, torch.arange(len(ids)))
'''
NIBBLE = '''
"""Codec nibble: keys of one plane of four bits, values of four."""

from pikv_megatron.codecs.codec import Codec

NIBBLE = Codec(key_planes=(4, 0), value_bits=4)
'''
NEWEST = '''
"""Mode newest: the newest `read_fraction` of each request's blocks, whatever the query."""

import torch

from pikv_megatron import ops
from pikv_megatron.config.io import ConfigError
from pikv_megatron.reading.reader import Reading, count_of, missed


class Newest:
    """Reads by age alone; what it misses is bounded by the blocks' bounds."""

    def __init__(self, section):
        if section.score != "planes":
            raise ConfigError(f"runtime.attention.score: mode newest has none, got {section.score!r}")
        self._fraction = section.read_fraction

    def read(self, q, sources, raw_lse, softmax_scale, numbers):
        (source,) = sources
        kept = [count_of(self._fraction, count) for count in source.counts]
        ends = numbers.runs(source.counts)[1:].tolist()
        read = torch.zeros(len(source.block_ids), dtype=torch.bool)
        for end, count in zip(ends, kept, strict=True):
            read[end - count : end] = True
        args = q, source.keys, source.values, source.block_ids[read], numbers.runs(kept), softmax_scale
        partial = ops.attend_ragged(*args)
        scores = ops.score_tokens(q, source.keys, source.block_ids, source.first_blocks, softmax_scale)
        tokens = read.repeat_interleave(source.block_size).expand(q.shape[1], -1)
        rest = ops.unread_mass(scores, 1.0, tokens, source.first_blocks)
        estimate, certificate = missed([rest], [partial], raw_lse)
        counts = numbers.of(tuple(count * source.block_size for count in kept)).unsqueeze(1)
        return Reading([partial], estimate, certificate, counts.expand(-1, q.shape[1]), scores=[scores])
'''


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a policy's file and imports it; it is gone after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return write


class Appended(CacheEvents):
    """K and V of every token, by (request, layer)."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def appended(self, step_id, layer_id, step, k, v):
        sizes = [segment.tokens for segment in step.segments]
        for segment, *kv in zip(step.segments, k.split(sizes), v.split(sizes), strict=True):
            self.tokens[segment.request_id, layer_id].append(tuple(x.clone() for x in kv))


def _served(runtime, *listeners) -> tuple[PiKVCache, torch.Generator]:
    """Three requests of several lengths, prompts and decode steps together."""
    cache, rng = PiKVCache(model_config(), runtime, listeners), generator(3)
    for tokens in ({0: 60, 1: 21}, {0: 1, 1: 30, 2: 9}, *[{0: 1, 1: 1, 2: 1}] * 12):
        forward(cache, tokens, rng)
    return cache, rng


def test_a_third_tier_is_a_file_and_a_row(written, monkeypatch):
    """Below the host: what the host has no room for goes there, nothing is lost, and attention stays exact."""
    toy = written("toy_tape", TAPE)
    budget = {"policy": "uniform", "first_layer_tokens": 20}
    tiers = [{"kind": "device"}, {"kind": "host", "bytes": 12_000}, {"kind": "tape"}]
    with pytest.raises(ConfigError, match=r"runtime\.tiers\[2\]\.kind: expected one of device, host, got 'tape'"):
        runtime_config(budget=budget, tiers=tiers)
    monkeypatch.setitem(TIERS.rows, "tape", toy.TapeTier)
    appended = Appended()
    cache, rng = _served(runtime_config(budget=budget, tiers=tiers, max_requests=4), appended)
    used = {kind: tier["blocks_used"] for kind, tier in cache.stats()["tiers"].items()}
    assert used["host"] == cache.tiers[1].num_blocks
    assert used["tape"] > 5
    cache.fork(0, 3)
    for request, source in ((0, 0), (1, 1), (2, 2), (3, 0)):
        for layer in range(2):
            k, v = (torch.cat(parts) for parts in zip(*appended.tokens[source, layer], strict=True))
            q = random_q(cache.model, 1, rng)
            wanted = dense_attention(q, k, v, cache.model.scale)
            for mine, theirs in zip(cache.attend(layer, q, request), wanted, strict=True):
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
            held = cache.retrieve(layer, request)
            assert torch.equal(held.k, k)
            assert torch.equal(held.v, v)
    assert cache.tiers[2].reads > used["tape"]
    for request in cache.requests():
        cache.release(request)
    assert_pools_free(cache)


def test_copies_go_to_whichever_tier_has_room(written, monkeypatch):
    """What waits to be sealed has its place below; its second copy finds the host full."""
    monkeypatch.setitem(TIERS.rows, "tape", written("toy_tape", TAPE).TapeTier)
    budget, model = {"policy": "uniform", "first_layer_tokens": 12}, model_config()
    block = PiKVCache(model, runtime_config()).tiers[0].block_bytes
    tiers = [{"kind": "device"}, {"kind": "host", "bytes": 2 * block}, {"kind": "tape"}]
    cache = PiKVCache(model, runtime_config(budget=budget, tiers=tiers))
    cache.append(0, *random_kv(model, 16, generator()))
    cache.fork(0, 1)
    cache.fork(0, 2)
    assert [pool.used_blocks for pool in cache.tiers] == [3, 2, 1]
    for request in (2, 0, 1):
        cache.observe_routing(0, *random_routing(model, 16, generator(request)), request)
        assert cache.retrieve(0, request).positions.tolist() == list(range(16))


@pytest.mark.parametrize("attention", [{}, {"mode": "top_k"}, {"mode": "mass", "epsilon_by": "certificate"}])
def test_a_codec_is_a_file_and_a_row(written, monkeypatch, attention):
    """Keys of a single plane, which selection reads in full."""
    codec = {"keys": "nibble", "values": "nibble"}
    with pytest.raises(
        ConfigError, match=r"runtime\.codec\.keys: expected one of none, int8, int4, int2, got 'nibble'"
    ):
        runtime_config(codec)
    monkeypatch.setitem(CODECS.rows, "nibble", written("toy_nibble", NIBBLE).NIBBLE)
    cache, rng = _served(runtime_config(codec, attention=attention))
    assert set(cache.tiers[0].fields) == {"k_high", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero"}
    assert cache.tiers[0].place.format == "nibble/nibble"
    for request, layer in ((0, 0), (1, 1), (2, 0)):
        q = random_q(cache.model, 1, rng)
        out, lse = attend_retrieved(cache, layer, q, request)
        got = cache.attend_measured(layer, q, request)
        slack = got.missed_certificate.double() + 1e-5
        assert (-torch.expm1(got.lse.double() - lse) <= slack).all()
        values = cache.retrieve(layer, request).v.abs().max()
        assert ((got.out.double() - out).abs().amax(-1) <= 2 * slack * values + 1e-5).all()
        assert bool(attention) or not got.missed_certificate.any()


def test_a_reader_is_a_file_and_a_row(written, monkeypatch):
    """It checks its own section; what it leaves unread is told by its certificate, and counted."""
    attention = {"mode": "newest", "read_fraction": 0.5}
    with pytest.raises(
        ConfigError, match=r"runtime\.attention\.mode: expected one of exact, top_k, mass, got 'newest'"
    ):
        runtime_config(attention=attention)
    monkeypatch.setitem(READERS.rows, "newest", written("toy_newest", NEWEST).Newest)
    with pytest.raises(ConfigError, match=r"runtime\.attention\.score: mode newest has none"):
        runtime_config(attention={**attention, "score": "quest"})
    cache, rng = _served(runtime_config("int8", attention=attention))
    reads = cache.stats()["reads"]
    assert 0.5 <= reads["share_read_mean"] < 0.6
    assert 0 < reads["missed_estimate_mean"] <= reads["missed_certificate_mean"] < 1
    q = random_q(cache.model, 1, rng)
    lse = attend_retrieved(cache, 0, q)[1]
    got = cache.attend_measured(0, q)
    missed = -torch.expm1(got.lse.double() - lse)
    assert (missed > 0.01).any()
    assert (missed <= got.missed_certificate + 1e-5).all()
