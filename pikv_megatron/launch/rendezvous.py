"""How the ranks meet: the store that all of them share, at the loopback where they are on one machine, and a connection
of each to rank 0 for `peers.Watch`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from pikv_megatron.launch import address as launch_address
from pikv_megatron.launch import peers
from pikv_megatron.launch.environment import Launch, LaunchError
from pikv_megatron.launch.parent import Parent
from pikv_megatron.launch.peers import PeerLostError

_met = 0
"""How often this process has met the others: one that destroys its process group may make another."""


def join(launch: Launch, timeout: float) -> dist.Store:
    """The store of a launch, once all ranks have come to it.

    Raises:
        LaunchError: rank 0's address or port cannot be used.
        PeerLostError: a rank has not come within `timeout` seconds.
    """
    global _met
    began = time.monotonic()
    try:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"pikv/{attempt}/{_met}", _store(launch, timeout))
        store.set(f"came/{launch.rank}", "")
        store.add("came", 1)
        while store.add("came", 0) < launch.world_size:
            if time.monotonic() - began > timeout:
                absent = [rank for rank in range(launch.world_size) if not store.check([f"came/{rank}"])]
                reason = f"it has not come; {len(absent)} of {launch.world_size} ranks have not: {absent[:8]}"
                raise PeerLostError(absent[0], "init_process_group", timeout, reason)
            time.sleep(0.05)
    except (dist.DistError, OSError) as error:
        raise LaunchError(
            f"rank {launch.rank} of {launch.world_size}: MASTER_ADDR {launch.master_addr} and MASTER_PORT "
            f"{launch.master_port} cannot be used, expected an address of rank 0's node and a port that is free there: "
            f"{error}"
        ) from error
    _met += 1
    return store


def watch(launch: Launch, store: dist.Store, timeout: float) -> None:
    """Starts this rank's watch over the others and its launcher, once in a process.

    Raises:
        LaunchError: rank 0 cannot be reached.
    """
    if peers.watching():
        return
    line, token = _line(launch, store, timeout) if launch.world_size > 1 else (None, "")
    gone = Parent().gone if launch.launcher != "environment" else lambda: None
    peers.begin(peers.Watch(launch.rank, launch.world_size, timeout, line, token, gone))


def _line(launch: Launch, store: dist.Store, timeout: float) -> tuple[socket.socket, str]:
    """Where rank 0 listens, or a connection to it; and the token that ranks show there."""
    host = _host(launch)
    if launch.rank == 0:
        listener = _listen(host if launch_address.is_local(launch) else "", 0)
        token = secrets.token_hex(16)
        store.set("watch", f"{listener.getsockname()[1]} {token}")
        return listener, token
    port, token = store.get("watch").decode().split()
    try:
        return _connect(host, int(port), timeout), token
    except OSError as error:
        raise LaunchError(f"rank {launch.rank} cannot reach rank 0 at {host}, port {port}: {error}") from error


def _store(launch: Launch, timeout: float) -> dist.Store:
    """torchrun's store, where that has one for its ranks, else one of rank 0's process."""
    host, port = _host(launch), int(launch.master_port or 0)
    limit = timedelta(seconds=timeout)
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if of_torchrun:
        host = str(launch.master_addr)
    if of_torchrun or launch.rank:
        _connect(host, port, timeout).close()  # torch's client writes a page for every time that it is refused
        return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    listener = _listen(host if launch_address.is_local(launch) else "", port)
    descriptor = listener.detach()
    return dist.TCPStore(host, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=descriptor)


def _host(launch: Launch) -> str:
    """Where the ranks find rank 0."""
    return launch_address.LOOPBACK if launch.local_size == launch.world_size else str(launch.master_addr)


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection to a port that may not be there yet. Raises OSError as the last try did."""
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.1))
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at one address, or at all of this machine's."""
    if not host and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0] if host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)
