"""What each launcher's variables are read as, which contradictions are refused by name, and what goes before what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pikv_megatron.launch.environment import Launch, LaunchError, read_launch, tasks_per_node

ADDRESS = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
FOUND = {"master_addr": "n0", "master_port": 29500}


def torch_env(rank: int, size: int, local_size: int, **more: str) -> dict[str, str]:
    local = {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    return {"RANK": str(rank), "WORLD_SIZE": str(size), **local, **ADDRESS, **more}


def torchrun(rank: int, size: int, local_size: int) -> dict[str, str]:
    return torch_env(rank, size, local_size, GROUP_RANK=str(rank // local_size))


def deepspeed(rank: int, size: int, local_size: int) -> dict[str, str]:
    env = torch_env(rank, size, local_size, CROSS_RANK=str(rank // local_size), CROSS_SIZE=str(size // local_size))
    return env | {"LOCAL_SIZE": env.pop("LOCAL_WORLD_SIZE")}


def open_mpi(rank: int, size: int, local_size: int) -> dict[str, str]:
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % local_size, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


def mpich(rank: int, size: int, local_size: int) -> dict[str, str]:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return dict(zip(names, map(str, (rank, size, rank % local_size, local_size)), strict=True))


def srun(rank: int, size: int, local_size: int) -> dict[str, str]:
    nodes = size // local_size
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_LOCALID": str(rank % local_size),
        "SLURM_NODEID": str(rank // local_size),
        "SLURM_STEP_NODELIST": f"n[0-{nodes - 1}]",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{nodes})",
    }


def without_launcher(rank: int, size: int, local_size: int) -> dict[str, str]:
    return torch_env(rank, size, local_size)


LAUNCHERS = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "mpirun": open_mpi,
    "mpirun of MPICH": mpich,
    "srun": srun,
    "environment": without_launcher,
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_launcher_is_read(name):
    found = read_launch(LAUNCHERS[name](5, 8, 4) | ADDRESS)
    assert found == Launch(name.split()[0], 5, 8, 1, 4, 1, **FOUND)
    assert str(found).startswith(f"{name.split()[0]}: rank 5 of 8, local rank 1 of 4, node 1, n0:29500")


@pytest.mark.parametrize("name", ["mpirun", "mpirun of MPICH", "srun"])
def test_the_address_is_optional_where_it_can_be_found(name):
    found = read_launch(LAUNCHERS[name](5, 8, 4))
    assert (found.rank, found.master_addr, found.master_port) == (5, None, None)
    assert read_launch(LAUNCHERS[name](5, 8, 4) | {"MASTER_PORT": "1234"}).master_port == 1234


def test_no_launcher_is_a_single_process():
    assert read_launch({}) == read_launch({"PATH": "/bin", "LOCAL_RANK": "3"}) == Launch("none")
    assert str(Launch("none")) == "none: a single process"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_any_missing_variable_is_named(name):
    whole = LAUNCHERS[name](5, 8, 4)
    optional = {"GROUP_RANK", "CROSS_RANK", "CROSS_SIZE"}  # tell the launcher and the node, which can be worked out
    decisive = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "SLURM_STEP_ID"}  # without: not that launcher
    for missing in set(whole) - optional - decisive:
        with pytest.raises(LaunchError, match=missing):
            read_launch({key: value for key, value in whole.items() if key != missing})


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_ID"])
def test_what_srun_has_not_started_is_a_single_process(missing):
    assert read_launch({key: value for key, value in srun(1, 2, 1).items() if key != missing}) == Launch("none")
    assert read_launch(srun(1, 2, 1) | {"SLURM_STEP_ID": "4294967290"}) == Launch("none")  # an interactive shell


def test_torchruns_in_a_step_of_one_task_per_node_are_no_conflict():
    step = srun(1, 2, 1)
    found = read_launch(step | torchrun(6, 8, 4))
    assert found == Launch("torchrun", 6, 8, 2, 4, 1, **FOUND)
    assert read_launch(step | deepspeed(6, 8, 4)).launcher == "deepspeed"
    assert read_launch(step | open_mpi(6, 8, 4)).launcher == "mpirun"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (torchrun(1, 2, 2) | open_mpi(0, 2, 2), "RANK is 1 .torchrun. but OMPI_COMM_WORLD_RANK is 0 .mpirun."),
        (torchrun(1, 2, 2) | mpich(1, 4, 2), "WORLD_SIZE is 2 .torchrun. but PMI_SIZE is 4 .mpirun."),
        (torchrun(1, 16, 4) | srun(1, 4, 4), "WORLD_SIZE is 16 .torchrun. but SLURM_NTASKS is 4 .srun."),
        (without_launcher(1, 4, 2) | srun(1, 2, 1), "WORLD_SIZE is 4 .environment. but SLURM_NTASKS is 2 .srun."),
        (open_mpi(0, 4, 2) | srun(3, 4, 2), "OMPI_COMM_WORLD_RANK is 0 .mpirun. but SLURM_PROCID is 3 .srun."),
        (torchrun(1, 2, 2) | {"LOCAL_SIZE": "3"}, "LOCAL_WORLD_SIZE is 2 but LOCAL_SIZE is 3"),
        (torchrun(1, 2, 2) | {"RANK": "2"}, "RANK is 2: expected less than WORLD_SIZE, 2"),
        (torchrun(1, 2, 2) | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2: expected less than LOCAL_WORLD_SIZE, 2"),
        (deepspeed(1, 2, 2) | {"LOCAL_RANK": "3"}, "LOCAL_RANK is 3: expected less than LOCAL_SIZE, 2"),
        (torchrun(1, 2, 2) | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4: expected at most WORLD_SIZE, 2"),
        (
            open_mpi(7, 8, 2) | {"OMPI_COMM_WORLD_SIZE": "7"},
            "WORLD_RANK is 7: expected less than OMPI_COMM_WORLD_SIZE, 7",
        ),
        (mpich(1, 4, 2) | {"MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID is 2: expected less than MPI_LOCALNRANKS, 2"),
        (
            srun(1, 2, 1) | {"SLURM_LOCALID": "1"},
            "SLURM_LOCALID is 1: expected less than its node's part of SLURM_STEP_TA",
        ),
        (
            torchrun(0, 2, 1) | open_mpi(0, 2, 1) | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "OMPI_COMM_WORLD_LOCAL_RANK is 1",
        ),
        (
            torchrun(1, 2, 2) | {"MASTER_ADDR": ""},
            "MASTER_ADDR: expected the name or address of rank 0's machine, got ''",
        ),
        (srun(1, 2, 1) | {"MASTER_PORT": ""}, "MASTER_PORT: expected a whole number of at least 1, got ''"),
        (torchrun(1, 2, 2) | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: expected a whole number"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "sets RANK=1, WORLD_SIZE=2 but not MASTER_ADDR, MASTER_PORT: set all of them",
        ),
        (ADDRESS, "sets MASTER_ADDR=n0, MASTER_PORT=29500 but not RANK, WORLD_SIZE"),
        (
            {**ADDRESS, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "sets LOCAL_RANK=0 but not LOCAL_WORLD_SIZE: set both",
        ),
        (
            {**ADDRESS, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"},
            "sets LOCAL_SIZE=2 but not LOCAL_RANK: set both",
        ),
        (torchrun(1, 2, 2) | {"RANK": "one"}, "RANK: expected a whole number of at least 0, got 'one'"),
        (torchrun(1, 2, 2) | {"WORLD_SIZE": "-2"}, "WORLD_SIZE: expected a whole number of at least 1"),
        (torchrun(1, 2, 2) | {"MASTER_PORT": "70000"}, "MASTER_PORT: expected a port up to 65535"),
        (torchrun(1, 2, 2) | {"MASTER_PORT": "65536"}, "MASTER_PORT: expected a port up to 65535"),
        (torchrun(1, 2, 2) | {"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number of at least 1, got '0'"),
        (open_mpi(1, 2, 2) | {"WORLD_SIZE": "2"}, "sets WORLD_SIZE=2 but not RANK, MASTER_ADDR, MASTER_PORT"),
        (srun(1, 2, 1) | {"SLURM_STEP_TASKS_PER_NODE": "3"}, "SLURM_STEP_TASKS_PER_NODE is 3"),
        (
            srun(1, 2, 1) | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            "SLURM_STEP_TASKS_PER_NODE is 2.x2., which does not fit",
        ),
        (srun(1, 2, 1) | {"SLURM_JOB_ID": "7x"}, "SLURM_JOB_ID: expected a whole number of at least 0, got '7x'"),
        (srun(1, 2, 1) | {"SLURM_NODEID": "2"}, "does not fit SLURM_NTASKS 2 and SLURM_NODEID 2"),
        (srun(1, 2, 1) | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "expected a list like"),
    ],
)
def test_contradictions_are_refused_by_name(env, said):
    with pytest.raises(LaunchError, match=said):
        read_launch(env)


def test_ranks_without_local_ranks_are_taken_as_one_per_node():
    env = {"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}
    assert read_launch(env) == Launch("environment", 1, 2, 0, 1, 1, **FOUND)
    assert read_launch(env | srun(1, 2, 2)) == Launch("srun", 1, 2, 1, 2, 0, **FOUND)


def test_nodes_may_have_different_numbers_of_ranks():
    """Three ranks on the first node, one on the second: the launchers that name the node are believed."""
    step = srun(3, 4, 2) | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3,1"}
    expected = Launch("srun", 3, 4, 0, 1, 1, None, None)
    assert read_launch(step) == expected
    assert read_launch(step | torch_env(3, 4, 1)) == Launch(
        "srun", 3, 4, 0, 1, 1, **FOUND
    )  # as init_process_group sets
    assert read_launch(torch_env(3, 4, 1, GROUP_RANK="1")).node_rank == 1
    assert read_launch(torch_env(3, 4, 1, CROSS_RANK="1", CROSS_SIZE="2")).node_rank == 1


def test_the_highest_port():
    assert read_launch(torchrun(1, 2, 2) | {"MASTER_PORT": "65535"}).master_port == 65535


def test_what_srun_sets_for_mpi_programs_is_srun():
    assert read_launch(srun(1, 2, 1) | {"PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "srun"


def test_slurms_lists():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


places = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda n: st.tuples(st.integers(0, n[0] * n[1] - 1), st.just(n[0] * n[1]), st.just(n[1]))
)


@given(place=places, names=st.sets(st.sampled_from(sorted(LAUNCHERS)), min_size=1))
def test_launchers_that_agree_are_one_launch(place, names):
    env: dict[str, str] = {}
    for name in names:
        env |= LAUNCHERS[name](*place)
    rank, size, local_size = place
    found = read_launch(env)
    order = ("torchrun", "deepspeed", "mpirun", "mpirun of MPICH", "srun", "environment")
    assert found.launcher == next(name for name in order if name in names).split()[0]
    expected = (rank, size, rank % local_size, local_size, rank // local_size)
    assert (found.rank, found.world_size, found.local_rank, found.local_size, found.node_rank) == expected


@given(one=places, other=places, name=st.sampled_from(sorted(LAUNCHERS)), second=st.sampled_from(["mpirun", "srun"]))
def test_two_launchers_are_never_mixed(one, other, name, second):
    """Either they are refused, or the launch is that of one of them, whole."""
    refused = False
    try:
        found = read_launch(LAUNCHERS[second](*other) | LAUNCHERS[name](*one))
    except LaunchError:
        refused = True
    if refused:
        assert one != other
    else:
        seen = (found.rank, found.world_size, found.local_rank, found.local_size)
        assert seen in [(rank, size, rank % local, local) for rank, size, local in (one, other)]
