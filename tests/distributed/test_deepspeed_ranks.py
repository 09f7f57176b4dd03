"""Two ranks by torchrun, which sets no LOCAL_SIZE, and by the deepspeed launcher, which does: every check of
`deepspeed_worker.py` under both, every variant of generation under the first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

WORKER = Path(__file__).with_name("deepspeed_worker.py")
RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_SIZE")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command(launcher: str) -> list[str]:
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", *address]


@pytest.fixture(scope="module", params=["torchrun", "deepspeed"])
def ranks(request, tmp_path_factory):
    """The reports of both ranks under one launcher."""
    output = tmp_path_factory.mktemp("seen") / "report"
    environment = {name: value for name, value in os.environ.items() if name not in RANKS}
    root = str(WORKER.parents[2])
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    run = subprocess.run(
        [*command(request.param), str(WORKER), str(output), "all" if request.param == "torchrun" else "one"],
        env=environment, cwd=root, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def variants(request):
    """The variants of generation that this launcher's ranks did, but the one of AutoTP or AutoEP alone."""
    launcher = request.node.callspec.params["ranks"]
    return ["left padding", "no padding", "sampling"] if launcher == "torchrun" else ["left padding"]


def test_there_is_no_shared_memory_all_reduce(ranks):
    for report in ranks:
        assert report["shared memory"] == {"used": False, "patched still": False}


def test_moe_trains_alike_with_hooks_and_without(ranks):
    for report in ranks:
        seen = report["moe training"]
        assert seen["equal"] and seen["learns"], seen["losses"]
        assert seen["events"] and seen["silent behind remove"] and seen["restored"]
        assert seen["shape"] == [20 * 2, 24, 2]
        assert seen["experts"] == [0, 1, 2, 3] and seen["distinct"] and seen["weights"] <= 1e-6
    assert ranks[0]["moe training"]["losses"] != ranks[1]["moe training"]["losses"]


def check_generation(seen, variants, more):
    for variant in [*variants, more] if len(variants) > 1 else variants:
        assert seen[variant]["same"] and seen[variant]["worst"] <= 1e-4, variant
    assert seen["same labels"] and seen["blocks"] > 50 and seen["experts"] > 4
    assert seen["int8 beside PiKV alone"] <= 0.05  # a code may round the other way
    assert seen["int8 beside exact"] > 1e-3


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV2", "DeepseekV3", "GraniteMoe"])
def test_autotp_generates_what_one_rank_does_with_half_the_cache_each(ranks, variants, family):
    for report in ranks:
        seen = report["tensor parallel"][family]
        check_generation(seen, variants, "assisted")
        mine, alone = seen["groups"]
        assert 2 * mine == alone or alone == 1  # one latent head is every rank's
        held, held_alone = seen["bytes"]
        assert held <= (0.51 if alone > 1 else 1) * held_alone
    both = [report["tensor parallel"] for report in ranks]
    assert both[0][family]["tokens"] == both[1][family]["tokens"]


def test_autotp_refuses_by_name_what_it_would_get_wrong(ranks):
    for report in ranks:
        seen = report["tensor parallel"]
        for family, model_type in (("Olmoe", "olmoe"), ("Phimoe", "phimoe"), ("GptOss", "gpt_oss")):
            assert seen[family].startswith("tensor_parallel.tp_size: AutoTP") and model_type in seen[family]
        assert seen["one KV head"] == "tensor_parallel.tp_size: expected a divisor of the 1 KV heads, got 2"


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_autoep_generates_what_one_rank_does_though_ranks_end_at_different_steps(ranks, variants, family):
    for report in ranks:
        seen = report["expert parallel"][family]
        check_generation(seen, variants, "beams")
        assert set(seen["local experts"]) == {4}
        assert report["expert parallel"]["registry restored"]
    rows = [len(report["expert parallel"][family]["tokens"]) for report in ranks]
    lengths = [len(report["expert parallel"][family]["tokens"][0]) for report in ranks]
    assert rows == [3, 2] and lengths == [40 + 64, 48 + 40]


def test_a_step_that_one_autoep_rank_refuses_is_taken_by_none_and_all_are_told(ranks):
    """Neither waits for the other; both go on with the next call."""
    told = [report["expert parallel"]["refusals"] for report in ranks]
    refused = "RuntimeError: no rank takes this step, since it was refused by rank 1: "
    for when, error in (("first step", "PoolFullError: "), ("later step", "PoolFullError: "), ("call", "ValueError: ")):
        assert told[1][when].startswith(error)
        assert told[0][when] == refused + told[1][when]
    assert told[0]["held"][0] == told[1]["held"][0] == 0
    steps = [seen["held"][1] - columns for seen, columns in zip(told, (40, 48), strict=True)]
    assert steps[0] == steps[1] > 0
    assert all(seen["goes on"] for seen in told)
