"""How the ranks meet: at the loopback where they are on one machine; who does not come is named."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from threading import Thread

import pytest

from pikv_megatron.launch import LaunchError, PeerLostError, rendezvous
from pikv_megatron.launch.environment import Launch


@pytest.fixture
def launch():
    """Rank 0 of two on this machine, whose MASTER_ADDR is an outward one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return Launch("environment", 0, 2, 0, 2, 0, "192.0.2.7", port)


def test_ranks_of_one_machine_meet_at_the_loopback(launch, monkeypatch):
    """In whatever order they come, and a second time on the same port."""
    for times_met in range(2):
        stores = {}

        def join(rank, times_met=times_met, stores=stores):
            monkeypatch.setattr(rendezvous, "_met", times_met)  # both ranks are in one process
            stores[rank] = rendezvous.join(replace(launch, rank=rank, local_rank=rank), 20)

        late = Thread(target=join, args=(1,))
        late.start()
        time.sleep(0.2)
        join(0)
        late.join(20)
        stores[0].set("a", "b")
        assert stores[1].get("a") == b"b"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", launch.master_port), timeout=1)


def test_ranks_of_several_machines_reach_rank_0_at_any_address(launch):
    with rendezvous._listen("", 0) as listener:
        for address in ("127.0.0.1", "127.0.0.2"):
            socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def test_a_rank_that_does_not_come_is_named(launch):
    text = "rank 1 did not answer in init_process_group for 0.3 s: it has not come; 2 of 3 ranks have not: [1, 2]"
    with pytest.raises(PeerLostError) as error:
        rendezvous.join(replace(launch, world_size=3, local_size=3), 0.3)
    assert str(error.value) == text and error.value.rank == 1


def test_a_port_that_cannot_be_used_is_named(launch):
    text = f"MASTER_ADDR 192.0.2.7 and MASTER_PORT {launch.master_port} cannot be used, expected an address of rank 0's"
    with pytest.raises(LaunchError, match=f"rank 1 of 2: {text}"):
        rendezvous.join(replace(launch, rank=1, local_rank=1), 0.3)
    taken = socket.create_server(("127.0.0.1", launch.master_port))
    with taken, pytest.raises(LaunchError, match=f"rank 0 of 2: {text}.*Address already in use"):
        rendezvous.join(launch, 0.3)
