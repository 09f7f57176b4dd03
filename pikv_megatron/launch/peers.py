"""Which of the ranks are alive, and `PeerLostError`, which names one that is not.

torch says that an operation timed out, or that a connection was closed, and not because of whom. Here a thread of each
rank tells rank 0 once a beat that it lives, and rank 0 tells all who does not. Nothing waits for it: an operation of
torch fails first, by its group's timeout or because a connection is closed, and only then is asked who is lost.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

SILENT_BEATS = 3
"""Who misses that many beats is silent."""
LINE_BYTES = 1 << 20
"""A longer message comes from something else than a rank."""
TORCH = os.path.dirname(dist.__file__)


class PeerLostError(RuntimeError):
    """A rank did not answer.

    Attributes:
        rank: which.
        operation: what waited for it.
        seconds: since its last sign of life.
        reason: what is known of it.
    """

    def __init__(self, rank: int, operation: str, seconds: float, reason: str = "it is frozen or cut off") -> None:
        super().__init__(rank, operation, seconds, reason)
        self.rank, self.operation, self.seconds, self.reason = rank, operation, seconds, reason

    def __str__(self) -> str:
        return f"rank {self.rank} did not answer in {self.operation} for {self.seconds:.1f} s: {self.reason}"


@dataclass
class Peer:
    """Another rank, as far as this one knows.

    Attributes:
        heard: when it gave its last sign of life, by this rank's `time.monotonic()`.
        ended: how it ended; None where it has not said so and its connection stands.
        lost_another: it ended since another rank was lost.
    """

    heard: float
    ended: str | None = None
    lost_another: bool = False


class _Link:
    """One connection, with a message per line both ways."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        connection.setblocking(False)
        self.socket, self.rank, self._rest = connection, rank, b""

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # what does not go out is said again at the next beat
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """What has come; None where the connection is closed or what comes is not ours."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            return [json.loads(line) for line in lines] if data and len(self._rest) < LINE_BYTES else None
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None


class Watch(threading.Thread):
    """This rank's thread. It also ends the rank when its launcher is gone.

    Args:
        rank, world_size: this one, of so many.
        timeout: seconds that an operation waits for a silent rank.
        line: of rank 0 the socket where it listens, of another its connection to rank 0; None for a rank alone.
        token: what ranks know and others do not.
        launcher_gone: says how the launcher ended; None while it lives.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        line: socket.socket | None,
        token: str,
        launcher_gone: Callable[[], str | None],
    ) -> None:
        super().__init__(name="pikv-watch", daemon=True)
        self.rank, self.timeout, self.beat = rank, timeout, min(1.0, timeout / 10)
        now = time.monotonic()
        self.peers = {other: Peer(now) for other in (range(1, world_size) if rank == 0 else [0])}
        """Of rank 0 all others; of another rank 0 and those that rank 0 misses."""
        self.ending: str | None = None
        """How this rank ends, for the others; None: as it should."""
        self.lost_another = False
        self._token, self._launcher_gone = token, launcher_gone
        self._warned: set[int] = set()
        self._kill_at: float | None = None
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._links: list[_Link] = []
        self._listener = line if rank == 0 else None
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif line is not None:
            self._add(_Link(line, rank=0)).send({"rank": rank, "token": token})

    def lost(self) -> tuple[int, float, str] | None:
        """A rank that is lost, the seconds since its last sign of life, and what is known; None where all live."""
        now, found = time.monotonic(), []
        for rank, peer in dict(self.peers).items():
            age = now - peer.heard
            if not peer.lost_another and (peer.ended or age > SILENT_BEATS * self.beat):
                found.append((age, rank, peer.ended or "it is frozen or cut off"))
        age, rank, reason = max(found, default=(0.0, -1, ""))
        return None if rank < 0 else (rank, age, reason)

    def wait_for_lost(self) -> tuple[int, float, str] | None:
        """As `lost`, but a rank that has only just gone gets the time to be missed."""
        end = time.monotonic() + (SILENT_BEATS + 2) * self.beat
        while (found := self.lost()) is None and self.peers and time.monotonic() < end:
            time.sleep(self.beat / 20)
        return found

    def close(self) -> None:
        """Tells the others that this rank ends. One that ends over another first leaves the others time to see that
        for themselves: launchers end all ranks as soon as one has ended.
        """
        if self.lost_another:
            time.sleep(2 * self.beat)
        self._closed = True
        for link in list(self._links):
            link.send({"ended": self.ending or "it has ended", "lost_another": self.lost_another})

    def run(self) -> None:
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now - due > SILENT_BEATS * self.beat:  # this process stood still, so it did not listen either
                for peer in self.peers.values():
                    peer.heard += now - due
            if now >= due:
                self._speak(now)
                self._look(now)
                due = now + self.beat
            for key, _ in self._selector.select(max(due - time.monotonic(), 0)):
                self._hear(key.data)

    def _add(self, link: _Link) -> _Link:
        self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._links.append(link)
        return link

    def _speak(self, now: float) -> None:
        """Rank 0 lists who is not as it should be; of the others a message is enough."""
        absent = {
            rank: (now - peer.heard, peer.ended, peer.lost_another)
            for rank, peer in self.peers.items()
            if self.rank == 0 and (peer.ended or now - peer.heard > SILENT_BEATS * self.beat)
        }
        for link in self._links:
            if link.rank is not None and not self._closed:
                link.send({"absent": absent})

    def _hear(self, link: _Link | None) -> None:
        if link is None:
            assert self._listener is not None
            with contextlib.suppress(OSError):
                self._add(_Link(self._listener.accept()[0]))
            return
        messages = link.receive()
        for message in messages or ():
            if link.rank is None and not self._greet(link, message):
                messages = None
                break
            self._understand(link, message)
        if messages is None:
            self._selector.unregister(link.socket)
            self._links.remove(link)
            link.socket.close()
            peer = self.peers.get(-1 if link.rank is None else link.rank)
            if peer is not None and peer.ended is None:
                peer.ended = "its process was killed or has crashed"
                self._speak(time.monotonic())

    def _greet(self, link: _Link, message: Any) -> bool:
        """Whether the first message at rank 0's listener is that of a rank."""
        token, rank = (message.get(name) for name in ("token", "rank")) if isinstance(message, dict) else (None, None)
        if token != self._token or not isinstance(rank, int):
            return False
        link.rank = rank
        return True

    def _understand(self, link: _Link, message: dict[str, Any]) -> None:
        assert link.rank is not None
        now = time.monotonic()
        peer = Peer(now, message.get("ended"), message.get("lost_another", False))
        if link.rank:
            self.peers[link.rank] = peer
        elif peer.ended:
            self.peers[0] = peer  # beside those that were absent when it ended
        else:
            absent = {int(rank): Peer(now - age, *more) for rank, (age, *more) in message.get("absent", {}).items()}
            absent.pop(self.rank, None)
            self.peers = {0: peer} | absent

    def _look(self, now: float) -> None:
        """What this thread does of its own accord, where no operation of torch ends the rank."""
        if self._kill_at is None and (how := self._launcher_gone()):
            logger.error("rank %d: %s, so this rank ends too", self.rank, how)
            self._kill_at = now + 10
            os.kill(os.getpid(), signal.SIGTERM)
        if self._kill_at is not None and now > self._kill_at:
            os._exit(1)
        found = self.lost()
        if found is None or self.lost_another:
            return
        rank, age, reason = found
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        operation = None if frame is None else _operation(traceback.walk_stack(frame))
        error = PeerLostError(rank, operation or "another rank", age, reason)
        if any(peer.lost_another for peer in self.peers.values()):
            self.lost_another = True
            logger.error("rank %d: %s", self.rank, error)
        elif age > self.timeout + 5 * self.beat and operation and not self.peers[rank].ended:
            logger.error("rank %d: %s", self.rank, error)  # in a group with a longer timeout, or at the store
            self.lost_another = True
            self.close()
            sys.stderr.flush()
            os._exit(1)
        elif age > self.timeout / 2 and rank not in self._warned and not self.peers[rank].ended:
            self._warned.add(rank)
            logger.warning(
                "rank %d: no sign of life from rank %d for %.1f s; what waits for it ends after %.1f s",
                *(self.rank, rank, age, self.timeout),
            )


_watch: Watch | None = None


def watching() -> bool:
    """Whether this process has its watch."""
    return _watch is not None


def begin(watch: Watch) -> None:
    """Starts this process's watch."""
    global _watch
    _watch = watch
    watch.start()
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        shown = ending(error)
        if shown is not error:
            shown.__cause__ = error.with_traceback(trace)
            kind, trace = type(shown), None
        previous(kind, shown, trace)

    sys.excepthook = hook
    atexit.register(watch.close)


def ending(error: BaseException) -> BaseException:
    """What to report of an error that ends this rank: PeerLostError where that is behind it, else the error itself.
    The other ranks are told.
    """
    shown = lost_peer(error) or error
    if _watch is not None:
        text = " ".join(str(shown).split())
        _watch.ending = f"it ended with {type(shown).__name__}: {text[:300]}"
    return shown


@contextlib.contextmanager
def answering(operation: str) -> Iterator[None]:
    """Around an operation of torch.distributed: where it fails since a rank is lost, raises PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_peer(error, operation)
        if lost is None or lost is error:
            raise
        raise lost from error


def lost_peer(error: BaseException, operation: str | None = None) -> PeerLostError | None:
    """The PeerLostError behind an error of torch.distributed, whoever raised it.

    Args:
        error: as it was caught.
        operation: what failed; None: as the error's traceback says.

    Returns:
        None where the error is another one, or nobody is lost: a rank that lives but does not come is not named.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PeerLostError):
            return seen
        if _of_communication(seen):
            found = _watch.wait_for_lost() if _watch is not None else None
            if _watch is None or found is None:
                return None
            _watch.lost_another = True
            rank, seconds, reason = found
            frames = reversed(list(traceback.walk_tb(seen.__traceback__)))
            return PeerLostError(rank, operation or _operation(frames) or "Work.wait", seconds, reason)
        seen = seen.__cause__ or seen.__context__
    return None


def _of_communication(error: BaseException) -> bool:
    """torch's own kinds, and gloo's errors, which are plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "pair closure" in str(error))


def _operation(frames: Any) -> str | None:
    """The innermost public function of torch.distributed among a stack's frames, innermost first."""
    frame: FrameType
    for frame, _ in frames:
        code = frame.f_code
        if code.co_filename.startswith(TORCH) and not code.co_name.startswith(("_", "wrapper")):  # its logger's
            return code.co_name
    return None
