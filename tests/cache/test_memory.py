"""A cache that does not fit the free memory is refused by the key that asks for it, before any memory is taken."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from dense import generator, model_config, random_kv, runtime_config

from pikv_megatron import ConfigError, ExpertKVCache, PiKVCache, machine
from pikv_megatron.cache.memory import cache_memory
from pikv_megatron.tiers.blocks import BOOKKEEPING_BYTES, ROW_BOOKKEEPING_BYTES

BUDGET = {"policy": "pyramid", "total_tokens": 120}
TIERS = [{"kind": "device"}, {"kind": "host"}]
CONFIGS = {
    "exact": ({}, {}),
    "codes": ({"v_head_dim": 16, "dtype": "bfloat16"}, {"codec": "int4", "attention": {"mode": "top_k"}}),
    "keys with an index": ({}, {"attention": {"mode": "mass"}}),
    "a host tier": ({}, {"budget": BUDGET, "tiers": TIERS}),
    "dropping": ({"num_experts": 0}, {"budget": {**BUDGET, "over_budget": "drop"}}),
    "bytes of a tier": ({}, {"tiers": [{"kind": "device", "bytes": 54321}]}),
    "sliding windows": ({"sliding_windows": [None, 40]}, {"budget": {**BUDGET, "over_budget": "drop"}}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sum_is_what_a_cache_takes(name):
    model, runtime = model_config(**CONFIGS[name][0]), runtime_config(**CONFIGS[name][1])
    cache = PiKVCache(model, runtime)
    foreseen = sum(share.nbytes for share in cache_memory(model, runtime))
    assert foreseen - lists_of(cache) == cache.stats()["bytes_allocated"]


def lists_of(cache):
    """Bytes of the lists that a new cache keeps of free blocks and rows."""
    rows = 0 if cache.importance is None else cache.importance.tensor.shape[0]
    return BOOKKEEPING_BYTES * sum(pool.num_blocks for pool in cache.tiers) + ROW_BOOKKEEPING_BYTES * rows


def test_each_device_gets_its_part_of_the_sum(monkeypatch):
    """Beside a GPU the host holds its tier, and lists; everything else is the GPU's."""
    model, runtime = model_config(), {"budget": BUDGET, "tiers": TIERS}
    cache = PiKVCache(model, runtime_config(**runtime))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    foreseen = Counter()
    for share in cache_memory(model, runtime_config(**runtime, device="cuda")):
        foreseen[share.device.type] += share.nbytes
    host = cache.tiers[1].allocated_bytes
    assert foreseen == {"cuda": cache.stats()["bytes_allocated"] - host, "cpu": host + lists_of(cache)}


@pytest.mark.parametrize(
    ("model", "runtime", "named"),
    [
        ({}, {"max_tokens": 10**13}, "runtime.max_tokens: 10000000000000 asks for 2,880,000,000,000,000 bytes"),
        ({}, {"max_tokens": 2**62}, "runtime.max_tokens: 4611686018427387904 asks for"),
        ({}, {"max_requests": 10**13}, "runtime.max_requests: 10000000000000 asks for"),
        ({}, {"window": 10**13}, "runtime.window: 10000000000000 asks for"),
        ({}, {"sinks": 10**13}, "runtime.sinks: 10000000000000 asks for"),
        ({}, {"tiers": [{"kind": "device", "bytes": 10**16}]}, "runtime.tiers[0].bytes: 10000000000000000 asks for"),
        ({}, {"budget": BUDGET, "tiers": TIERS, "max_tokens": 10**13}, "runtime.max_tokens: 10000000000000 asks for"),
        ({"sliding_windows": [None, 10**13]}, {}, "model.sliding_windows: 10000000000000 asks for"),
    ],
)
def test_more_than_the_machine_has_is_refused_by_name(model, runtime, named):
    with pytest.raises(ConfigError) as error:
        PiKVCache(model_config(**model), runtime_config(**runtime))
    assert str(error.value).startswith(named)
    assert " bytes on cpu, " in str(error.value) and str(error.value).endswith(" that are free")


def test_a_shard_of_its_own_is_refused_too():
    model = model_config()
    shard = ExpertKVCache(model, runtime_config(max_tokens=10**13))
    with pytest.raises(ConfigError, match=r"^runtime.max_tokens: 10000000000000 asks for 1,440,000,000,000,000 bytes"):
        shard.put(0, 0, *random_kv(model, 4, generator()))


STATISTICS = "anon 5\n{0}inactive_file 300\n{0}active_file 200\n"
CGROUPS = {
    "v2": ("0::/a/b", {"a/b": ("max", "900"), "a": ("2000", "1000")}, 1500),
    "v2, seen as the root": ("0::/a", {".": ("2000", "1000")}, 1500),
    "v2, unlimited": ("0::/a", {"a": ("max", "900")}, 10**6 * 1024),
    "v1": ("4:memory:/a\n3:cpu:/b\n0::/", {"memory/a": ("2000", "1000"), "cpu/b": ("9", "1")}, 1500),
    "v1, less available": ("4:memory:/a", {"memory/a": (str(2**63 - 4096), "1000")}, 10**6 * 1024),
    "no control groups": ("", {}, 10**6 * 1024),
}


def machine_of(monkeypatch, folder, own, groups):
    """A machine with 10**6 KiB available and these control groups: limit and usage by folder."""
    for path, (limit, usage) in groups.items():
        first = not own.startswith("0::")
        names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / "memory.stat").write_text(STATISTICS.format("total_" if first else ""))
        for name, value in zip(names, (limit, usage), strict=True):
            (folder / path / f"memory.{name}").write_text(value + "\n")
    (folder / "own").write_text(own)
    (folder / "meminfo").write_text("MemTotal: 2000000 kB\nMemFree: 1 kB\nMemAvailable: 1000000 kB\n")
    monkeypatch.setattr(machine, "CGROUPS", folder)
    monkeypatch.setattr(machine, "OWN_CGROUPS", folder / "own")
    monkeypatch.setattr(machine, "MEMINFO", folder / "meminfo")


@pytest.mark.parametrize("name", CGROUPS)
def test_what_is_free(monkeypatch, tmp_path, name):
    own, groups, expected = CGROUPS[name]
    machine_of(monkeypatch, tmp_path, own, groups)
    assert machine.free_memory(torch.device("cpu")) == expected


def test_on_another_system_nothing_is_known(monkeypatch, tmp_path):
    machine_of(monkeypatch, tmp_path, "", {})
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "nothing")
    assert machine.free_memory(torch.device("cpu")) == math.inf
    assert machine.free_memory(torch.device("mps")) == math.inf


def test_what_torch_keeps_on_cuda_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert machine.free_memory(torch.device("cuda", 1)) == 130


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    machine_of(monkeypatch, tmp_path, "0::/", {".": ("100000", "50500")})
    with pytest.raises(ConfigError, match=r"^runtime.max_tokens: .*; expected at most the 50,000 that are free$"):
        PiKVCache(model_config(), runtime_config())
    machine_of(monkeypatch, tmp_path, "0::/", {".": ("1000000", "50500")})
    assert PiKVCache(model_config(), runtime_config()).stats()["bytes_allocated"] > 50_000


@pytest.mark.gpu
def test_more_than_the_gpu_has_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^runtime.max_tokens: 10000000000000 asks for .* bytes on cuda"):
        PiKVCache(model_config(), runtime_config(max_tokens=10**13, device="cuda"))
