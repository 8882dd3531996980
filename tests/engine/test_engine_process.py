"""Where a process learns who it is: torchrun's variables, the old launcher's flag, Slurm's steps, or nothing."""

import os

import pytest
import torch
import torch.distributed as dist

from utils import distributed
from utils.distributed import Process

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on processes without a GPU")


@pytest.fixture(autouse=True)
def _clean_environment(launcher):
    """Every test starts outside of any launcher."""


def test_without_a_launcher_the_process_is_alone():
    process = distributed.init()
    assert process == Process(rank=0, world_size=1, local_rank=0, device=CPU)
    assert process.is_main
    assert not dist.is_initialized()


def test_torchrun_with_one_process_needs_no_group(launcher):
    launcher(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert distributed.init() == Process(0, 1, 0, CPU)
    assert not dist.is_initialized()


@pytest.mark.parametrize(("flag", "expected"), [(None, 0), (0, 0), (3, 3)])
def test_the_flag_of_the_old_launcher(flag, expected):
    assert distributed.init(flag).local_rank == expected


def test_the_environment_wins_over_the_flag(launcher):
    launcher(RANK="0", WORLD_SIZE="1", LOCAL_RANK="2")
    assert distributed.init(5).local_rank == 2


def test_a_task_of_slurm(launcher):
    launcher(
        SLURM_PROCID="0",
        SLURM_STEP_NUM_TASKS="1",
        SLURM_LOCALID="0",
        SLURM_JOB_ID="31234",
        SLURM_STEP_NODELIST="n[3-4]",
    )
    assert distributed.init() == Process(0, 1, 0, CPU)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n3", "16234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-012]", "gpu003"),
        ("gpu[003,007]", "gpu003"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_node_of_a_list(launcher, nodes, first):
    launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NODELIST=nodes)
    distributed.init()
    assert os.environ["MASTER_ADDR"] == first


def test_two_jobs_on_one_node_have_different_ports(launcher):
    ports = set()
    for job in ("4711", "4712"):
        launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_JOB_ID=job)
        distributed.init()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 2
    assert all(1024 < int(port) < 32768 for port in ports)


def test_an_address_of_the_user_stays(launcher):
    launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NODELIST="n1", MASTER_ADDR="n8", MASTER_PORT="29")
    distributed.init()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n8", "29")


def test_a_shell_within_a_slurm_job_is_no_task(launcher):
    launcher(SLURM_JOB_ID="4711", SLURM_NTASKS="8", SLURM_PROCID="0")
    assert distributed.init() == Process(0, 1, 0, CPU)
    assert "RANK" not in os.environ


def test_torchrun_within_a_slurm_job_wins(launcher):
    launcher(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8")
    assert distributed.init() == Process(0, 1, 0, CPU)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT is not set: start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "but MASTER_ADDR is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; a rank must lie below the size"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK must be a whole number, not 'first'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be a whole number, not '2.0'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK must be a whole number, not ''"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number, not '-1'"),
    ],
)
def test_an_incomplete_environment_is_a_readable_mistake(launcher, variables, complaint):
    launcher(**variables)
    with pytest.raises(ValueError, match=complaint):
        distributed.init()
    assert not dist.is_initialized()


def test_the_helpers_work_alone():
    tensor = torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    distributed.barrier()
    distributed.shutdown()
