"""Which process has failed: each that fails leaves word in the store, and those that lose contact call the roll."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from . import distributed
from .signals import Stopped

GRACE_S = 5.0  # in which every process that is alive notices the failure
POLL_S = 0.05
FAILED, LOST = "failed", "lost"  # what a process leaves word of: an error of its own, or contact lost with another
# What gloo says of a process that has ended or does not answer; that of NCCL and of the store is a DistError.
_GLOO = re.compile(r"gloo/transport|Application timeout caused pair closure")


class LostContact(OSError):
    """A collective operation has failed because of another process."""


@contextmanager
def clear_about_peers() -> Iterator[None]:
    """Turns the error of a collective operation that another process has let fail into one that names the process.

    All processes of the run must be in this context. It can't help where a library ends the process itself, as the
    watchdog of NCCL does after a timeout.

    Raises:
        LostContact: such an error; all others pass, and the other processes learn of them.
    """
    try:
        yield
    except Stopped:
        raise  # as all processes are
    except Exception as error:
        store, rank, world_size = distributed.store(), distributed.rank(), distributed.world_size()
        if store is None:
            raise
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _GLOO.search(str(error)))
        try:
            store.set(f"{LOST if lost else FAILED}/{rank}", " ".join(str(error).split()) or type(error).__name__)
            if not lost:
                raise
            distributed.shutdown()  # so that those who wait for this process lose contact, too
            cause = _call_the_roll(store, {*range(world_size)} - {rank})
        except dist.DistError:
            if not lost:
                raise error from None
            cause = "rank 0 has ended"  # with its store
        raise LostContact(f"rank {rank} lost contact: {cause}") from error


def _call_the_roll(store: dist.Store, others: set[int]) -> str:
    """Returns in words which of the other processes has failed or does not answer."""
    until, silent, failed = time.monotonic() + GRACE_S, set(others), list[int]()
    while silent and not failed and time.monotonic() < until:
        time.sleep(POLL_S)
        failed = [rank for rank in sorted(others) if store.check([f"{FAILED}/{rank}"])]
        silent = {rank for rank in silent if not store.check([f"{LOST}/{rank}"])}
    if failed:
        return f"rank {failed[0]} has failed: {store.get(f'{FAILED}/{failed[0]}').decode()}"
    if silent:
        ranks = ", ".join(map(str, sorted(silent)))
        minutes = distributed.timeout().total_seconds() / 60
        return (
            f"rank {ranks} does not answer, it hangs or was killed (processes wait {minutes:g} minutes for each other, "
            f"DIST.TIMEOUT); docs/distributed.md says how to find out where"
        )
    return "the network failed, or the other processes have waited too long for this one (DIST.TIMEOUT)"
