"""Where rank 0 listens, for launchers that do not say it: Slurm is asked by `scontrol`, MPI by mpi4py.

MASTER_ADDR and MASTER_PORT, where they are set, are taken as they are; a name has to resolve.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import platform
import re
import socket
import struct
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from pikv_megatron.launch.environment import Launch, LaunchError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 15_000, 16_000
"""Ports for Slurm jobs: below those that Linux hands out itself, above the well-known ones."""
OUTSIDE = "192.0.2.1"
"""Of a network for documentation: only the default route leads there."""
SIOCGIFCONF, IFREQ = 0x8912, 40
"""Linux's request for the IPv4 addresses of all interfaces, and the bytes of one in its answer."""
RESOLVE_SECONDS = 60.0
"""How long a name may take to resolve: that of a container's peer comes with the peer."""


def complete(launch: Launch) -> Launch:
    """`launch` with an address and a port. Under mpirun all ranks must call it, since rank 0 tells the others.

    Raises:
        LaunchError: the address cannot be found, or does not resolve; the message says what was tried.
    """
    if launch.launcher == "none":
        return launch
    if launch.master_addr is None or launch.master_port is None:
        if launch.launcher == "mpirun":
            launch = _ask_mpi(launch)
        else:
            step = int(os.environ["SLURM_STEP_ID"])
            launch = replace(
                launch,
                master_addr=launch.master_addr or _first_node(),
                master_port=launch.master_port or slurm_port(int(os.environ["SLURM_JOB_ID"]), step),
            )
    _wait_for_name(str(launch.master_addr))
    return launch


def _wait_for_name(address: str) -> None:
    """torch would look an unknown name up again and again, for half an hour."""
    began, said = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label that is too long or empty
            if time.monotonic() - began >= RESOLVE_SECONDS:
                raise LaunchError(
                    f"MASTER_ADDR: expected a name that resolves, or an address, got {address!r} ({error})"
                ) from error
        if not said:
            logger.warning("MASTER_ADDR %r does not resolve: trying for %.0f s", address, RESOLVE_SECONDS)
            said = True
        time.sleep(1)


def slurm_port(job: int, step: int) -> int:
    """A port that all ranks of a step derive alike, and that steps and jobs which follow each other do not share."""
    return FIRST_PORT + (31 * job + step) % PORTS


def is_local(launch: Launch) -> bool:
    """Whether all ranks are on this machine, or rank 0 listens on its loopback, which comes to the same."""
    address = launch.master_addr or LOOPBACK
    return launch.local_size == launch.world_size or address in ("localhost", "::1") or address.startswith("127.")


def _first_node() -> str:
    """The address of a Slurm step's first node: its name where that resolves, else what Slurm's configuration says."""
    if os.environ["SLURM_STEP_NUM_NODES"] == "1":
        return LOOPBACK
    nodes = _scontrol("hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
    if not nodes:
        raise LaunchError(f"scontrol knows no host of SLURM_STEP_NODELIST {os.environ['SLURM_STEP_NODELIST']!r}")
    try:
        socket.getaddrinfo(nodes[0], None)
        return nodes[0]
    except socket.gaierror:
        address = re.search(r"NodeAddr=(\S+)", _scontrol("node", nodes[0]))
        if address is None:
            raise LaunchError(f"{nodes[0]} does not resolve, and scontrol tells no NodeAddr: set MASTER_ADDR") from None
        return address[1]


def _scontrol(what: str, name: str) -> str:
    command = ["scontrol", "show", what, name]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()
        raise LaunchError(f"{' '.join(command)} failed, set MASTER_ADDR in its place: {error} {said}") from error


def _ask_mpi(launch: Launch) -> Launch:
    """Rank 0's address and a free port of its machine, told to all; the node's rank, from the machines' names."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package is there, no MPI library is
        raise LaunchError(
            f"under mpirun mpi4py tells the ranks where rank 0 listens; install it, or set MASTER_ADDR and MASTER_PORT "
            f"({error})"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.world_size):
        raise LaunchError(
            f"mpi4py sees rank {world.Get_rank()} of {world.Get_size()}, mpirun's variables say {launch.rank} of "
            f"{launch.world_size}: mpi4py was built for another MPI than this mpirun's"
        )
    names = world.allgather(platform.node())
    nodes = list(dict.fromkeys(names))
    mine = (launch.master_addr or _outward_address(len(nodes) == 1), launch.master_port or _free_port())
    address, port = world.bcast(mine, root=0)
    return replace(launch, node_rank=nodes.index(names[launch.rank]), master_addr=address, master_port=port)


def _outward_address(single_node: bool) -> str:
    """This machine's address as others see it: of the interface with the default route, else its name."""
    if single_node:
        return LOOPBACK
    return _source(OUTSIDE) or platform.node()


def interface(launch: Launch) -> str | None:
    """The network interface where this rank meets the others: the loopback where they are all on this machine, else
    the one that the route to rank 0 leads to. On rank 0's machine MASTER_ADDR may name the loopback, as Debian's
    /etc/hosts does: then that of the default route. None where there is no route.
    """
    names = _interfaces()
    if is_local(launch):
        return "lo" if any(name == "lo" for _, name in socket.if_nameindex()) else None
    found = (names.get(_source(target) or "") for target in (str(launch.master_addr), OUTSIDE))
    return next((name for name in found if name not in (None, "lo")), None)


def _source(target: str) -> str | None:
    """This machine's address on the route to another; None where there is no route."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket sends nothing here
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """This machine's addresses and the interfaces that have them, as Linux lists them."""
    found = {}
    entries = array.array("B", bytes(IFREQ * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("iP", len(entries), entries.buffer_info()[0])
        size, _ = struct.unpack("iP", fcntl.ioctl(probe, SIOCGIFCONF, asked))
    for start in range(0, size, IFREQ):
        entry = entries[start : start + IFREQ].tobytes()
        found[socket.inet_ntoa(entry[20:24])] = entry[:16].partition(b"\0")[0].decode()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, *_, name = line.split()
            found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))] = name
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
