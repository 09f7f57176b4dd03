"""Where rank 0 listens: what is set is kept, Slurm and MPI are asked, and what does not resolve is refused by name."""

from __future__ import annotations

import socket
import subprocess
import sys
import types
from dataclasses import replace

import pytest

from pikv_megatron.launch import address as launch_address
from pikv_megatron.launch.environment import Launch, LaunchError

HERE = "127.0.0.1"
SRUN = Launch("srun", 1, 4, 1, 2, 0)
MPIRUN = Launch("mpirun", 2, 4, 0, 2, 1)


@pytest.fixture
def step(monkeypatch):
    """The variables of a Slurm step on two nodes whose names do not resolve; `said` is what scontrol answers."""
    said = {("hostnames", "n[0-1]"): "n0\nn1\n", ("node", "n0"): "NodeName=n0\n   NodeAddr=127.0.0.7 NodeHostName=x\n"}
    for name, value in (("JOB_ID", "40"), ("STEP_ID", "2"), ("STEP_NUM_NODES", "2"), ("STEP_NODELIST", "n[0-1]")):
        monkeypatch.setenv(f"SLURM_{name}", value)

    def run(command, **options):
        assert command[:2] == ["scontrol", "show"] and options["check"]
        return types.SimpleNamespace(stdout=said[tuple(command[2:])])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(socket, "getaddrinfo", resolve := Resolver())
    resolve.known = {HERE, "127.0.0.7"}
    return said, resolve


class Resolver:
    """In place of socket.getaddrinfo."""

    def __init__(self):
        self.known, self.asked = set(), []

    def __call__(self, host, port):
        self.asked.append(host)
        if host not in self.known:
            raise socket.gaierror(-2, "Name or service not known")


def test_a_single_process_and_an_address_that_is_set_stay_as_they_are(monkeypatch):
    assert launch_address.complete(Launch("none")) == Launch("none")
    for given in (Launch("torchrun", 1, 2, 1, 2, 0, HERE, 5), Launch("mpirun", 1, 2, 1, 2, 0, "localhost", 5)):
        assert launch_address.complete(given) == given


def test_slurms_first_node_by_name_or_by_address(step):
    said, resolve = step
    found = launch_address.complete(SRUN)
    assert (found.master_addr, found.master_port) == ("127.0.0.7", 15_000 + (31 * 40 + 2) % 16_000)
    resolve.known.add("n0")
    assert launch_address.complete(SRUN).master_addr == "n0"
    said["hostnames", "n[0-1]"] = "\n"
    with pytest.raises(LaunchError, match=r"no host of SLURM_STEP_NODELIST 'n\[0-1\]'"):
        launch_address.complete(SRUN)


def test_slurm_is_asked_only_for_what_is_missing(step, monkeypatch):
    assert launch_address.complete(Launch("srun", 1, 4, 1, 2, 0, None, 77)).master_port == 77
    step[0].clear()
    assert launch_address.complete(Launch("srun", 1, 4, 1, 2, 0, HERE)).master_addr == HERE
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert launch_address.complete(SRUN).master_addr == HERE


def test_scontrol_that_fails_or_knows_no_address_is_told(step, monkeypatch):
    said, _ = step
    said["node", "n0"] = "NodeName=n0"
    with pytest.raises(LaunchError, match="n0 does not resolve, and scontrol tells no NodeAddr: set MASTER_ADDR"):
        launch_address.complete(SRUN)

    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="slurm_load_node: no such node\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LaunchError, match=r"scontrol show hostnames n\[0-1\] failed, set MASTER_ADDR.*no such node"):
        launch_address.complete(SRUN)

    def absent(command, **options):
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(LaunchError, match="scontrol show hostnames"):
        launch_address.complete(SRUN)


def test_ports_of_jobs_and_steps_that_follow_each_other_differ():
    ports = [launch_address.slurm_port(job, step) for job in range(1000, 1400) for step in range(3)]
    assert len(set(ports)) == len(ports) and min(ports) >= 15_000 and max(ports) < 31_000


@pytest.mark.parametrize(
    ("launch", "local"),
    [
        (Launch("none"), True),
        (Launch("torchrun", 0, 2, 0, 2, 0, "n0", 1), True),
        (Launch("torchrun", 0, 2, 0, 1, 0, "n0", 1), False),
        (Launch("torchrun", 0, 2, 0, 1, 0, "127.0.3.1", 1), True),
        (Launch("torchrun", 0, 2, 0, 1, 0, "localhost", 1), True),
        (Launch("torchrun", 0, 2, 0, 1, 0, "::1", 1), True),
        (Launch("torchrun", 0, 2, 0, 1, 0, "fe80::1", 1), False),
    ],
)
def test_whether_all_ranks_are_on_this_machine(launch, local):
    assert launch_address.is_local(launch) == local


def test_a_name_that_does_not_resolve_is_refused(monkeypatch):
    monkeypatch.setattr(launch_address, "RESOLVE_SECONDS", 0)
    for name in ("nowhere.invalid", "[::1]", "a..b", "x" * 70):
        with pytest.raises(LaunchError) as error:
            launch_address.complete(Launch("environment", 0, 2, 0, 1, 0, name, 5))
        assert f"MASTER_ADDR: expected a name that resolves, or an address, got {name!r}" in str(error.value)


def test_a_name_may_take_its_time(monkeypatch, caplog):
    resolve, waited = Resolver(), []
    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            resolve.known.add("n0")

    monkeypatch.setattr(launch_address.time, "sleep", sleep)
    given = Launch("environment", 0, 2, 0, 1, 0, "n0", 5)
    assert launch_address.complete(given) == given and len(waited) == 3
    assert caplog.text.count("MASTER_ADDR 'n0' does not resolve: trying for 60 s") == 1


# ---- where gloo meets


NODES = Launch("torchrun", 0, 2, 0, 1, 0, "n0", 5)
ROUTES = {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.1", "fd00::2": "fd00::1", "127.0.1.1": "127.0.1.1"}
ADDRESSES = {"127.0.0.1": "lo", "10.0.0.1": "ib0", "fd00::1": "eth2", "192.168.3.4": "eth0"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.2", "ib0"),
        ("10.0.0.1", "ib0"),  # rank 0's own
        ("fd00::2", "eth2"),
        ("127.0.1.1", "eth0"),  # rank 0's machine by its own name, on Debian: the default route's
        ("172.16.0.1", "eth0"),  # no route but the default one
    ],
)
def test_gloo_meets_at_the_interface_of_the_route_to_rank_0(monkeypatch, address, expected):
    monkeypatch.setattr(launch_address, "_source", lambda target: ROUTES.get(target, "192.168.3.4"))
    monkeypatch.setattr(launch_address, "_interfaces", lambda: ADDRESSES)
    monkeypatch.setattr(launch_address, "is_local", lambda launch: False)
    assert launch_address.interface(replace(NODES, master_addr=address)) == expected
    monkeypatch.setattr(launch_address, "_source", lambda target: None)
    assert launch_address.interface(replace(NODES, master_addr=address)) is None


def test_gloo_stays_on_the_loopback_where_all_ranks_are_on_one_machine(monkeypatch):
    assert launch_address.interface(replace(NODES, local_size=2)) == "lo"
    monkeypatch.setattr(launch_address.socket, "if_nameindex", lambda: [(1, "eth0")])
    assert launch_address.interface(replace(NODES, local_size=2)) is None


def test_this_machines_addresses_and_routes():
    assert launch_address._interfaces()["127.0.0.1"] == "lo"
    assert launch_address._source("127.0.0.1") == "127.0.0.1"
    assert launch_address._source("nowhere.invalid") is None


# ---- MPI


class World:
    """In place of MPI.COMM_WORLD: this process is rank 2 of four, on the second machine of two."""

    names = ("a", "a", "b", "b")

    def Get_rank(self):
        return 2

    def Get_size(self):
        return 4

    def allgather(self, name):
        assert name == "b"
        return list(self.names)

    def bcast(self, mine, root):
        assert root == 0
        self.mine = mine
        return ("127.0.0.9", 4321)


@pytest.fixture
def world(monkeypatch):
    made = World()
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=made)))
    monkeypatch.setattr(launch_address.platform, "node", lambda: "b")
    return made


def test_mpi_tells_rank_zeros_address_and_this_ranks_node(world):
    by_node = Launch("mpirun", 2, 4, 0, 2, 0)  # its node as it was guessed
    found = launch_address.complete(by_node)
    assert found == Launch("mpirun", 2, 4, 0, 2, 1, "127.0.0.9", 4321)
    address, port = world.mine
    assert not address.startswith("127.") and 0 < port < 65536  # others have to reach it
    launch_address.complete(Launch("mpirun", 2, 4, 0, 2, 0, "n0", None))
    assert world.mine[0] == "n0"
    launch_address.complete(Launch("mpirun", 2, 4, 0, 2, 0, None, 99))
    assert world.mine[1] == 99


def test_nodes_are_counted_in_the_order_of_their_ranks(world):
    world.names = ("z", "z", "b", "b")
    assert launch_address.complete(MPIRUN).node_rank == 1


def test_mpi_on_one_machine_stays_on_its_loopback(world):
    world.names = ("b",) * 4
    assert launch_address.complete(MPIRUN).node_rank == 0
    assert world.mine[0] == HERE


def test_another_mpi_than_mpiruns_is_told(world, monkeypatch):
    monkeypatch.setattr(world, "Get_size", lambda: 1, raising=False)
    with pytest.raises(LaunchError, match="mpi4py sees rank 2 of 1, mpirun's variables say 2 of 4"):
        launch_address.complete(MPIRUN)


class NoLibrary(types.ModuleType):
    """mpi4py where there is no MPI."""

    def __getattr__(self, name):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("package", [None, NoLibrary("mpi4py")])
def test_without_mpi4py_the_address_has_to_be_set(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    with pytest.raises(LaunchError, match=r"mpi4py tells the ranks .* install it, or set MASTER_ADDR and MASTER_PORT"):
        launch_address.complete(MPIRUN)


def test_without_a_default_route_a_machine_is_known_by_its_name(world, monkeypatch):
    class NoRoute(socket.socket):
        def connect(self, address):
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    launch_address.complete(MPIRUN)
    assert world.mine[0] == "b"
