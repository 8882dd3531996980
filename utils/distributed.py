"""The process group: rank, world size and device. All helpers also work without a group."""

import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Covers the slowest evaluation or checkpoint of one rank while the others wait.
TIMEOUT = timedelta(minutes=30)
_store: dist.Store | None = None
_timeout = TIMEOUT


@dataclass(frozen=True)
class RankInfo:
    """The place of this process in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def init(local_rank_flag: int | None = None, timeout: timedelta = TIMEOUT) -> RankInfo:
    """Joins the process group of the launcher; without a launcher, the process is the only one.

    Understands the environment of torchrun and of `torch.distributed.launch` (with its `--local-rank` argument, which
    `local_rank_flag` passes on; the environment takes precedence), and that of Slurm's srun. Uses NCCL on GPUs, gloo on
    CPUs. A process waits for the others in a collective operation until `timeout`.

    Raises:
        ValueError: the environment is incomplete or invalid, the processes can't connect, or a node has more processes
            than visible GPUs.
    """
    if "RANK" not in os.environ:
        os.environ.update(_slurm_environment(os.environ))
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", local_rank_flag or 0)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the environment says RANK={rank} and WORLD_SIZE={world_size}; a rank must lie below the size"
        )
    device = _device(local_rank)
    if world_size > 1:
        _join(rank, world_size, device, timeout)
    return RankInfo(rank, world_size, local_rank, device)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Returns this process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def store() -> dist.Store | None:
    """Returns the key-value store of the process group; None without a group."""
    return _store


def timeout() -> timedelta:
    """Returns how long a process waits for the others."""
    return _timeout


def cpu_group() -> dist.ProcessGroup | None:
    """Makes a group of all processes that works on the CPU, beside one on GPUs; None without a group. Collective."""
    if not dist.is_initialized():
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_timeout))


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """Computes a value on rank 0 and returns it on all processes.

    Raises:
        ValueError: on all processes, for a ValueError or OSError of `compute`.
    """
    if not dist.is_initialized():
        return compute()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise ValueError(box[1])
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """Returns a small plain value of every process, by rank; a collective operation."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """Returns the tensor (n, ...) of every process, by rank, on the CPU.

    n may differ between processes, and where it is 0 so may the rest of the shape. `device` is that of the process.
    """
    if not dist.is_initialized():
        return [tensor.cpu()]
    shapes = gather_objects(tuple(tensor.shape))
    whole = next((shape for shape in shapes if shape[0]), shapes[0])
    padded = tensor.new_zeros(max(shape[0] for shape in shapes), *whole[1:], device=device)
    padded[: len(tensor)] = tensor.reshape(len(tensor), *whole[1:]).to(device)
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(gathered, padded)
    return [rows[: shape[0]].cpu() for rows, shape in zip(gathered, shapes, strict=True)]


def _join(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    global _store, _timeout
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {world_size} but {' and '.join(missing)} is not set: start with torchrun")
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise ValueError(f"the environment variable MASTER_PORT must be a port from 1 to 65535, not {port}")
    try:
        socket.getaddrinfo(address, port)  # torch itself would retry until its timeout
        _store, _timeout = _open_store(rank, world_size, timeout), timeout
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (OSError, UnicodeError, dist.DistError) as error:
        raise ValueError(
            f"the processes can't meet at MASTER_ADDR={address}, MASTER_PORT={port} ({str(error).splitlines()[0]}): "
            "give a name or address of the node of rank 0 and a port that is free there, or start with torchrun"
        ) from error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number, not {text!r}")
    return int(text)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A launcher may make a single GPU visible to each process, which then has index 0 everywhere.
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {visible} are visible; start at most {visible} processes"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Connects to the store by which the processes meet: that of torchrun, or else one that rank 0 holds.

    torchrun's store survives a restart and may return the addresses of dead processes (torch 2.15). The current
    processes therefore agree on a prefix of their own: rank 0 draws one and sends it to every other process together
    with the random number that this process has published, so that an answer to a dead process is not accepted.
    """
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    store = dist.TCPStore(address, port, timeout=timeout)
    name = _publish_prefix(store, world_size) if rank == 0 else _receive_prefix(store, rank)
    return dist.PrefixStore(name, store)


def _publish_prefix(store: dist.Store, world_size: int) -> str:
    name, waiting = uuid.uuid4().hex, set(range(1, world_size))
    while waiting:
        for rank in sorted(waiting):
            if _read(store, f"received/{rank}") == name:
                waiting.remove(rank)
            elif number := _read(store, f"number/{rank}"):
                store.set(f"name/{rank}", f"{number} {name}")
        time.sleep(0.02)
    return name


def _receive_prefix(store: dist.Store, rank: int) -> str:
    mine = uuid.uuid4().hex
    store.set(f"number/{rank}", mine)
    while not (answer := _read(store, f"name/{rank}")).startswith(mine):
        time.sleep(0.02)
    name = answer.split()[1]
    store.set(f"received/{rank}", name)
    return name


def _read(store: dist.Store, key: str) -> str:
    """Returns the value of a key in a store, or an empty string."""
    return store.get(key).decode() if store.check([key]) else ""


def _slurm_environment(slurm: os._Environ[str]) -> dict[str, str]:
    """Translates the variables of srun into those of torchrun; returns none if srun did not start this process."""
    if "SLURM_STEP_NUM_TASKS" not in slurm or "SLURM_PROCID" not in slurm:
        return {}
    # Below the ephemeral ports; jobs that share a node have different ids.
    port = 15000 + _number("SLURM_JOB_ID", 0) % 15000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _first_node(slurm.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(port),
    }


def _first_node(nodes: str) -> str:
    """Returns the first node of a list in Slurm's notation: `n3` of `n[3-4,7],m1`."""
    found = re.match(r"([^][,\s]+)(?:\[(\w+)[-,\w]*\]([^][,\s]*))?(?:,|$)", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}, whose first node is not clear: set MASTER_ADDR to it")
    return "".join(part or "" for part in found.groups())
