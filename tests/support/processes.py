"""Linux's processes, for tests that end some of them: whether one lives, and where it listens."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import time
from pathlib import Path


def alive(pid: int) -> bool:
    """A process that has ended, and was not yet collected by its parent, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pid: int, argument: object) -> None:
    """Kills a process, unless its id is by now that of another: one whose command has no such argument."""
    with contextlib.suppress(OSError):
        if str(argument).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds: float, log: Path | None = None) -> None:
    """Raises AssertionError, with the log's end, where `condition()` does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {log.read_text()[-4000:] if log else ''}"
        time.sleep(0.05)


def listens_at(pid: int) -> set[str]:
    """The addresses of a process's listening TCP sockets."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                words = bytes.fromhex(columns[1].partition(":")[0])  # 32 bits at a time in the machine's order
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(str(ipaddress.ip_address(address)))
    return found
