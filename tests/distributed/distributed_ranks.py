"""Functions that run in several processes at once, which find each other through the environment as users' do."""

import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from utils import distributed
from utils.distributed import RankInfo
from utils.seed import seed_everything


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_ranks(function: Callable[..., Any], world_size: int, *arguments: object) -> list[Any]:
    """Calls `function(process, *arguments)` in so many new processes; returns what each of them returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_repmlp"])
    port, started = free_port(), []
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(theirs, function, rank, world_size, port, arguments))
        process.start()
        theirs.close()
        started.append((process, mine))
    results = []
    try:
        for process, pipe in started:
            assert pipe.poll(240), "a process does not answer"
            ok, result = pickle.loads(pipe.recv_bytes())
            assert ok, result
            results.append(result)
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process, pipe in started:
            process.kill()
            process.join()
            process.close()
            pipe.close()
    return results


def _enter(
    pipe: Connection, function: Callable[..., Any], rank: int, world_size: int, port: int, arguments: tuple
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        process: RankInfo = distributed.init()
        seed_everything(0)
        answer = (True, function(process, *arguments))
    except Exception:
        answer = (False, f"rank {rank}: {traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(answer))
    distributed.shutdown()
