"""Who is lost, as each rank sees it: watches of three ranks in one process, which are made to stand still, end or break
off, and the errors of torch behind which they are found.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from pikv_megatron import cli
from pikv_megatron.launch import PeerLostError, lost_peer, parent, peers
from pikv_megatron.launch.peers import Watch

TIMEOUT = 2.0
"""A beat is a tenth of it."""
GLOO = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete")


class Rank(Watch):
    """A watch that can stand still or be ended, as a process can."""

    frozen = gone = False

    def run(self):
        with contextlib.suppress(SystemExit):
            super().run()

    def _speak(self, now):
        if self.gone:
            for one in (*self._links, *([self._listener] if self._listener else ())):
                getattr(one, "socket", one).close()
            raise SystemExit
        while self.frozen:
            time.sleep(0.01)
        super()._speak(now)


@pytest.fixture
def ranks():
    """Three that have met."""
    listener = socket.create_server(("127.0.0.1", 0))
    made = [Rank(0, 3, TIMEOUT, listener, "token", lambda: None)]
    for rank in (1, 2):
        line = socket.create_connection(listener.getsockname())
        made.append(Rank(rank, 3, TIMEOUT, line, "token", lambda: None))
    for one in made:
        one.start()
    end = time.monotonic() + 20
    while len(made[0]._links) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    yield made
    for one in made:
        one.frozen, one.gone = False, True
    for one in made:
        one.join(20)


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_stands_still_is_named_by_all_others(ranks, which):
    assert not any(one.lost() for one in ranks)
    ranks[which].frozen = True
    for one in ranks:
        if one.rank != which:
            rank, seconds, reason = one.wait_for_lost()
            assert rank == which and 0.6 <= seconds <= 3 and "frozen" in reason
    ranks[which].frozen = False
    time.sleep(4 * ranks[0].beat)
    assert not any(one.lost() for one in ranks)  # it has come back, and blames nobody


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_whose_process_is_gone_is_named_by_all_others(ranks, which):
    ranks[which].gone = True
    for one in ranks:
        if one.rank != which:
            assert one.wait_for_lost()[::2] == (which, "its process was killed or has crashed")


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_ends_says_why(ranks, which):
    ranks[which].ending = "it ended with ValueError: prompt"
    ranks[which].close()
    for one in ranks:
        if one.rank != which:
            assert one.wait_for_lost()[::2] == (which, "it ended with ValueError: prompt")


@pytest.mark.parametrize("ender", [0, 2])
def test_who_ends_over_another_is_not_named(ranks, ender, caplog):
    """The other one says so though it waits for nothing: its launcher will end it before it does."""
    ranks[1].frozen = True
    ranks[ender].wait_for_lost()
    ranks[ender].lost_another = True
    ranks[ender].close()
    other = ranks[2 - ender]
    end = time.monotonic() + 5
    while not other.lost_another and time.monotonic() < end:
        time.sleep(0.01)
    assert other.lost()[0] == 1
    assert f"rank {other.rank}: rank 1 did not answer" in caplog.text


def test_silence_is_told_before_it_ends_anything(ranks, caplog):
    ranks[2].frozen = True
    time.sleep(0.75 * TIMEOUT)
    for rank in (0, 1):
        assert caplog.text.count(f"rank {rank}: no sign of life from rank 2 for 1.") == 1


def test_strangers_are_shown_the_door(ranks):
    address = ranks[0]._listener.getsockname()
    for said in (b'{"rank": 1, "token": "no"}\n', b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"7\n", b"\xff\n"):
        with socket.create_connection(address) as stranger:
            stranger.settimeout(5)
            stranger.sendall(said)
            assert stranger.recv(1) == b"" or said == b"7\n"
    assert set(ranks[0].peers) == {1, 2} and not ranks[0].lost()


class Stub:
    """In place of a watch."""

    lost_another, ending = False, None

    def __init__(self, found):
        self.found = found

    def wait_for_lost(self):
        return self.found


@pytest.fixture
def watch(monkeypatch):
    stub = Stub((1, 8.25, "it is frozen or cut off"))
    monkeypatch.setattr(peers, "_watch", stub)
    return stub


@pytest.mark.parametrize(
    "error", [GLOO, dist.DistBackendError("nccl"), RuntimeError("Application timeout caused pair closure")]
)
def test_errors_of_communication_are_behind_a_lost_rank(watch, error):
    found = lost_peer(error)
    assert (found.rank, found.seconds) == (1, 8.25) and watch.lost_another
    wrapped = ValueError("a host's")
    wrapped.__cause__ = error
    assert lost_peer(wrapped).rank == 1
    watch.found = None
    assert lost_peer(error) is None  # nobody is lost


def test_other_errors_are_not(watch):
    for error in (ValueError("gloo"), RuntimeError("size mismatch"), KeyboardInterrupt()):
        assert lost_peer(error) is None
    assert not watch.lost_another
    with pytest.raises(RuntimeError, match=r"^size$"), peers.answering("exchange"):
        raise RuntimeError("size")


def test_the_operation_is_that_of_the_traceback_or_the_one_that_is_given(watch):
    try:
        dist.all_reduce(None)
    except TypeError as error:
        failed = RuntimeError("gloo").with_traceback(error.__traceback__)
    assert lost_peer(failed).operation == "all_reduce"
    with pytest.raises(PeerLostError) as caught, peers.answering("exchange"):
        raise GLOO
    assert caught.value.operation == "exchange" and caught.value.__cause__ is GLOO
    text = "rank 1 did not answer in exchange for 8.2 s: it is frozen or cut off"
    assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value))) == text
    assert lost_peer(caught.value) is caught.value


def test_the_command_line_ends_in_one_line_and_tells_the_others(watch, monkeypatch, capsys):
    def run(args):
        raise GLOO

    monkeypatch.setattr("pikv_megatron.cli.doctor.run", run)
    assert cli.main(["doctor"]) == 2
    text = "rank 1 did not answer in Work.wait for 8.2 s: it is frozen or cut off"
    assert capsys.readouterr().err == f"pikv doctor: error: {text}\n"
    assert watch.ending == f"it ended with PeerLostError: {text}"


WAITING = """
import socket, time
import torch.distributed as dist
from pikv_megatron.launch import peers

listener = socket.create_server(("127.0.0.1", 0))
peers.begin(peers.Watch(0, 2, 0.5, listener, "token", lambda: None))
line = socket.create_connection(listener.getsockname())
line.sendall(b'{"rank": 1, "token": "token"}\\n')
exec(compile("def new_group(): time.sleep(60)", dist.__file__, "exec"))
new_group()
"""


def test_what_torch_does_not_end_is_ended():
    """A rank that waits at a frozen rank's store, or in a group with a longer timeout."""
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=60, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("rank 0: rank 1 did not answer in new_group for 0.")


# ---- the launcher


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/usr/bin/python3 -m torch.distributed.run --nnodes=1 x.py", True),
        ("python -u -m deepspeed.launcher.runner --num_gpus 2", True),
        ("/venv/bin/python /venv/bin/torchrun x.py", True),
        ("mpirun -n 2 python x.py", True),
        ("slurmstepd: [1.0]", True),
        ("-bash", False),
        ("bash train_deepspeed.sh", False),
        ("sleep 3", False),
    ],
)
def test_launchers_are_known_by_their_command(command, launches):
    assert parent.is_launcher(command.split()) == launches


SCRIPT = """
import subprocess, sys, time
if sys.argv[3:] == ["rank"]:
    from pikv_megatron.launch.parent import Parent
    mine = Parent()
    print("up", flush=True)
    while (said := mine.gone()) is None: time.sleep(0.01)
    print(said, flush=True)
else:  # two processes of a launcher, as `deepspeed` has
    more = sys.argv[3:] or ["deepspeed.launcher.launch"]
    subprocess.run([sys.executable, __file__, "-m", "deepspeed.launcher.launch", *(["rank"] if sys.argv[3:] else more)])
"""


def test_a_launcher_of_two_processes_is_missed_when_the_first_is_killed(tmp_path):
    (tmp_path / "x.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "x.py"), "-m", "deepspeed.launcher.runner"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "up\n"
        first.kill()
        said = first.stdout.readline()
    assert said.startswith(f"its launcher (process {first.pid}, ") and said.endswith("has ended\n")
