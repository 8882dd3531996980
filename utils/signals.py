"""Stopping on a signal: all processes stop after the same update."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from . import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGUSR1; a second signal has its default effect.

    Signals reach the processes at different times, or only one of them. After each update the processes therefore
    agree by a small asynchronous reduction on the CPU, whose result is read one update later, so that no process waits.
    """

    def __init__(self) -> None:
        self.number = 0  # the signal that all processes have agreed on
        self._received = 0
        # Ignored signals stay ignored, such as Ctrl-C in a background job of a shell.
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in caught}
        self._group = distributed.cpu_group()
        self._pending: tuple[torch.Tensor, Any] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for each, previous in self._previous.items():
            signal.signal(each, previous or signal.SIG_DFL)

    def agreed(self) -> int:
        """Returns the signal that all processes have agreed on, or 0; all must call this equally often."""
        if self._group is None:
            self.number = self._received
            return self.number
        if self._pending is not None:
            known, work = self._pending
            work.wait()
            self.number = int(known)
        mine = torch.tensor(self._received)
        self._pending = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, self._group, async_op=True)
        return self.number


class Stopped(Exception):
    """A run was stopped by a signal, with its state saved; the exit status is 128 + the signal, as in shells."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number
