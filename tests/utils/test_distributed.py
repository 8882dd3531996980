"""Where a process learns who it is: torchrun's variables, the old launcher's flag, Slurm's steps, or nothing."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist

from utils import distributed
from utils.distributed import RankInfo

CPU = torch.device("cpu")
TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts on processes without a GPU")


@pytest.fixture(autouse=True)
def _clean_environment(launcher):
    """Every test starts outside of any launcher."""


def test_without_a_launcher_the_process_is_alone():
    process = distributed.init()
    assert process == RankInfo(rank=0, world_size=1, local_rank=0, device=CPU)
    assert process.is_main
    assert not dist.is_initialized()


def test_torchrun_with_one_process_needs_no_group(launcher):
    launcher(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert distributed.init() == RankInfo(0, 1, 0, CPU)
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
    assert distributed.init() == RankInfo(0, 1, 0, CPU)
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
        ("n[3-4,7]-ib,m1", "n3-ib"),
        ("n7,gpu[003-012]", "n7"),
    ],
)
def test_the_first_node_of_a_list(launcher, nodes, first):
    launcher(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_STEP_NODELIST=nodes)
    distributed.init()
    assert os.environ["MASTER_ADDR"] == first


@pytest.mark.parametrize("nodes", ["", ",n3", "[3-4]", "n[", "n[3-4", "n[]", "r[1-2]n[3-4]", " ", "n]3", "n\n3"])
def test_an_odd_list_of_nodes_is_a_readable_mistake(launcher, nodes):
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": nodes}
    launcher(**task)
    with pytest.raises(ValueError, match=r"SLURM_STEP_NODELIST is '.*, .* set MASTER_ADDR"):
        distributed.init()
    assert "RANK" not in os.environ
    launcher(**task, MASTER_ADDR="n3")
    assert distributed.init() == RankInfo(0, 1, 0, CPU)
    assert os.environ["MASTER_ADDR"] == "n3"


@pytest.mark.parametrize(
    ("name", "text"),
    [("SLURM_JOB_ID", "4711_3"), ("SLURM_PROCID", "first"), ("SLURM_STEP_NUM_TASKS", ""), ("SLURM_LOCALID", "-1")],
)
def test_an_odd_number_of_slurm_is_a_readable_mistake(launcher, name, text):
    launcher(**{"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", name: text})
    with pytest.raises(ValueError, match=r"the environment variable \w+ must be a whole number, not"):
        distributed.init()


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
    assert distributed.init() == RankInfo(0, 1, 0, CPU)
    assert "RANK" not in os.environ


def test_torchrun_within_a_slurm_job_wins(launcher):
    launcher(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="8")
    assert distributed.init() == RankInfo(0, 1, 0, CPU)


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
        ({**TWO, "MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({**TWO, "MASTER_PORT": "80x"}, "MASTER_PORT must be a whole number, not '80x'"),
        ({**TWO, "MASTER_PORT": "-1"}, "MASTER_PORT must be a whole number, not '-1'"),
        ({**TWO, "MASTER_PORT": "0"}, "MASTER_PORT must be a port from 1 to 65535, not 0"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT must be a port from 1 to 65535, not 65536"),
        ({**TWO, "MASTER_PORT": "1" * 30}, "MASTER_PORT must be a port from 1 to 65535, not 1111"),
        ({**TWO, "MASTER_ADDR": "no.such.node.invalid"}, r"can't meet at MASTER_ADDR=no.such.node.invalid, .*torchrun"),
        ({**TWO, "MASTER_ADDR": "x" * 300}, "can't meet at MASTER_ADDR=xxx"),
    ],
)
def test_an_incomplete_environment_is_a_readable_mistake(launcher, variables, complaint):
    launcher(**variables)
    with pytest.raises(ValueError, match=complaint):
        distributed.init()
    assert not dist.is_initialized()


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_port_in_use_is_a_readable_mistake(launcher, host):
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        launcher(**TWO | {"MASTER_PORT": str(port)})
        with pytest.raises(
            ValueError, match=rf"can't meet at .* MASTER_PORT={port} \(.*address already in use\): give"
        ):
            distributed.init()
    assert not dist.is_initialized()


def assert_helpers_know_one_process():
    tensor = torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.barrier() is None
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert [rows.tolist() for rows in distributed.gather_rows(tensor[:, None], CPU)] == [[[1.0], [2.0]]]
    assert distributed.broadcast_from_rank0(lambda: [1, 2]) == [1, 2]


def test_the_helpers_work_alone():
    assert_helpers_know_one_process()
    assert distributed.shutdown() is None


def refuse(error: Exception):
    def compute() -> None:
        raise error

    return compute


@pytest.mark.parametrize("error", [ValueError("wrong"), FileNotFoundError("gone"), KeyError("a defect")])
def test_alone_an_error_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        distributed.broadcast_from_rank0(refuse(error))
    assert caught.value is error


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    distributed.shutdown()


def test_the_helpers_work_in_a_group_of_one(group_of_one):
    assert_helpers_know_one_process()
    for error in (ValueError("wrong"), FileNotFoundError("wrong")):
        with pytest.raises(ValueError, match="^wrong$") as caught:
            distributed.broadcast_from_rank0(refuse(error))
        assert type(caught.value) is ValueError
    with pytest.raises(KeyError):
        distributed.broadcast_from_rank0(refuse(KeyError("a defect")))
    distributed.shutdown()
    assert not dist.is_initialized()
    assert distributed.world_size() == 1


IN_TWO = """
import json, os, time
import torch
from utils import distributed

process = distributed.init()
tensor = torch.tensor([1.0, 10.0]) * (process.rank + 1)
summed = distributed.all_reduce_sum(tensor)
calls = []
def compute():
    calls.append(process.rank)
    return {"from": process.rank}
def refuse():
    raise FileNotFoundError("gone")
def error():
    try:
        distributed.broadcast_from_rank0(refuse)
    except Exception as error:
        return [type(error).__name__, str(error)]
computed = distributed.broadcast_from_rank0(compute)
if process.rank == 1:
    time.sleep(0.5)
entered = time.time()
distributed.barrier()
left = time.time()
figures = {
    "process": [process.rank, process.world_size, process.is_main],
    "asked": [distributed.rank(), distributed.world_size()],
    "summed": [summed is tensor, tensor.tolist()],
    "computed": [computed, calls],
    "error": error(),
    "gathered": distributed.gather_objects(("rank", process.rank)),
    "entered": entered,
    "left": left,
}
distributed.shutdown()
print(json.dumps(figures | {"after": [distributed.rank(), distributed.world_size()]}))
"""


def test_the_helpers_work_in_a_group_of_two(start, tmp_path):
    (tmp_path / "ranks.py").write_text(IN_TWO)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(tmp_path / "ranks.py", environment=common | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(60) for process in ranks] == [0, 0], [process.err for process in ranks]
    found = [json.loads(process.out) for process in ranks]
    for rank, figures in enumerate(found):
        assert figures["process"] == [rank, 2, rank == 0]
        assert figures["asked"] == [rank, 2]
        assert figures["summed"] == [True, [3.0, 30.0]]
        assert figures["computed"] == [{"from": 0}, [0] if rank == 0 else []]
        assert figures["error"] == ["ValueError", "gone"]
        assert figures["gathered"] == [["rank", 0], ["rank", 1]]
        assert figures["after"] == [0, 1]
    assert min(figures["left"] for figures in found) >= max(figures["entered"] for figures in found)
