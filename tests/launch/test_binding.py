"""Which CPUs a rank runs on: shares of what nobody has bound, and what the launcher has bound as it is."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_megatron import machine
from pikv_megatron.launch import binding
from pikv_megatron.launch.environment import Launch, LaunchError


@given(cpus=st.sets(st.integers(0, 300), min_size=1, max_size=40), ranks=st.integers(1, 12))
def test_shares_are_disjoint_whole_and_even(cpus, ranks):
    shares = [binding.choose(rank, [cpus] * ranks, cpus) for rank in range(ranks)]
    if ranks > len(cpus):
        assert all(set(share) == cpus for share in shares)
    else:
        assert sorted(cpu for share in shares for cpu in share) == sorted(cpus)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_the_launcher_bound_stays():
    assert binding.choose(2, [{0, 1, 2, 3}, {0, 1, 2, 3}], {0, 1, 2, 3}) == (0, 1, 2, 3)  # a rank whose node is unclear
    assert binding.choose(1, [{0, 1, 2, 3}, {4, 5, 6, 7}], {4, 5, 6, 7}) == (4, 5, 6, 7)


def test_hardware_threads_of_a_core_stand_together(monkeypatch, tmp_path):
    """Two packages of two cores, numbered as Linux does: the second threads behind all first ones."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    monkeypatch.setattr(binding, "TOPOLOGY", tmp_path)
    shares = [binding.choose(rank, [range(8)] * 4, range(8)) for rank in range(4)]
    assert shares == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_cpus_of_unknown_topology_keep_their_order(monkeypatch, tmp_path):
    (tmp_path / "cpu2" / "topology").mkdir(parents=True)
    (tmp_path / "cpu2" / "topology" / "core_id").write_text("unknown\n")
    monkeypatch.setattr(binding, "TOPOLOGY", tmp_path)
    assert binding.by_core([2, 1, 0]) == [0, 1, 2]


CGROUPS = {
    "v2": (
        "0::/pods/one",
        {"pods/one/cpu.max": "max 100000", "pods/cpu.max": "350000 100000", "cpu.max": "900000 100000"},
    ),
    "v2, unlimited": ("0::/pods", {"pods/cpu.max": "max 100000"}),
    "v2, seen as the root": ("0::/", {"cpu.max": "350000 100000"}),
    "v1": ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "35000", "cpu/a/cpu.cfs_period_us": "10000"}),
    "v1, seen as the root": ("1:cpu:/docker/a", {"cpu/cpu.cfs_quota_us": "35000", "cpu/cpu.cfs_period_us": "10000"}),
    "v1, unlimited": ("1:cpu:/\n2:cpuset:/b:c", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "10000\n"}),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_a_containers_share_of_time(monkeypatch, tmp_path, case):
    own, files = CGROUPS[case]
    (tmp_path / "own").write_text(own + "\n")
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    assert binding.time_limit() == (math.inf if "unlimited" in case else 3.5)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "nothing")  # a kernel without control groups
    assert binding.time_limit() == math.inf


def test_this_machines_control_groups_can_be_read():
    assert binding.time_limit() > 0


@pytest.fixture
def neighbours(monkeypatch, tmp_path):
    """Four ranks on two nodes, none bound to less than CPUs 0 to 3; `unbound` are those with PIKV_BIND=off, and bound
    (threads and CPUs) and threads are what was asked for.
    """
    seen = {"unbound": set()}
    monkeypatch.setattr(binding, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(binding, "time_limit", lambda: math.inf)
    monkeypatch.delenv("PIKV_BIND", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "listdir", lambda path: {"/proc/self/task": ["11", "12"]}[path])
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, cpus: seen.setdefault("bound", []).append((pid, tuple(cpus)))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.update(threads=count))

    def gather(everyone, mine):
        assert mine[1:] == (1, frozenset(range(4)))
        everyone[:] = [(rank not in seen["unbound"], rank // 2, frozenset(range(4))) for rank in range(3)] + [mine]

    monkeypatch.setattr(binding.dist, "all_gather_object", gather)
    return seen


LAUNCH = Launch("torchrun", 3, 4, 1, 2, 1, "n0", 1)


@pytest.mark.parametrize(("limit", "threads"), [("", 2), ("1", 1), ("8", 2), ("1,4", 1), ("0", 2), ("\u00b2", 2)])
def test_ranks_of_a_node_share_its_cpus_and_threads_follow(neighbours, monkeypatch, limit, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert binding.bind(LAUNCH) == (2, 3)
    assert neighbours == {"bound": [(11, (2, 3)), (12, (2, 3))], "threads": threads, "unbound": set()}


@pytest.mark.parametrize(("limit", "threads"), [(0.5, 1), (3.5, 1), (4.0, 2), (9.0, 2)])
def test_threads_follow_the_share_of_a_containers_time(neighbours, monkeypatch, limit, threads):
    monkeypatch.setattr(binding, "time_limit", lambda: limit)
    assert binding.bind(LAUNCH) == (2, 3)
    assert neighbours["threads"] == threads


def test_as_many_ranks_as_cpus_have_one_each(neighbours, monkeypatch):
    def gather(everyone, mine):
        everyone[:] = [mine] * 4

    def ended(pid, cpus):
        raise ProcessLookupError

    monkeypatch.setattr(binding.dist, "all_gather_object", gather)
    monkeypatch.setattr(os, "sched_setaffinity", ended)  # a thread that has gone meanwhile
    assert binding.bind(Launch("torchrun", 2, 4, 2, 4, 1, "n0", 1)) == (2,)
    assert neighbours["threads"] == 1


def test_more_ranks_than_cpus_run_anywhere_with_one_thread_each(neighbours, monkeypatch):
    def gather(everyone, mine):
        everyone[:] = [mine] * 5

    monkeypatch.setattr(binding.dist, "all_gather_object", gather)
    assert binding.bind(Launch("torchrun", 4, 5, 4, 5, 1, "n0", 1)) == (0, 1, 2, 3)
    assert neighbours == {"threads": 1, "unbound": set()}


def test_it_can_be_switched_off_and_a_single_process_is_left_alone(neighbours, monkeypatch):
    assert binding.bind(Launch("none")) == (0, 1, 2, 3)
    monkeypatch.setenv("PIKV_BIND", "off")
    assert binding.bind(LAUNCH) == (0, 1, 2, 3)
    monkeypatch.delenv("PIKV_BIND")
    neighbours["unbound"] = {0}  # a rank of another node, whose environment has it
    assert binding.bind(LAUNCH) == (0, 1, 2, 3)
    assert neighbours == {"unbound": {0}}
    monkeypatch.setenv("PIKV_BIND", "maybe")
    with pytest.raises(LaunchError, match="PIKV_BIND: expected auto or off, got 'maybe'"):
        binding.bind(LAUNCH)
