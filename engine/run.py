"""One start of the program: its task and settings, its folder and its log."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from utils import distributed
from utils.distributed import RankInfo
from utils.files import clear_about_space
from utils.lock import first_missing, folder_lock, without_trace
from utils.log import create_logger

from . import backends
from .precision import dtype_of, precision_name
from .task import Task

ROOM = "make room and start again, the run resumes from its latest checkpoint"


@dataclass(frozen=True)
class Run:
    """One start of the program.

    Attributes:
        task: holds the configuration and the rank of this process.
        given: the keys set by a file or the command line.
        notices: warnings about the command line, for the log.
        changed_settings: lists `KEY before -> after` for the differences from a dumped configuration.
    """

    task: Task
    given: frozenset[str]
    notices: list[str]
    changed_settings: Callable[[str], list[str]]

    @property
    def cfg(self) -> CfgNode:
        """The configuration."""
        return self.task.cfg

    @property
    def rank_info(self) -> RankInfo:
        """Rank and device of this process."""
        return self.task.rank_info

    @property
    def amp(self) -> str:
        """The precision of the forward pass, a key of `PRECISIONS`."""
        return precision_name(self.cfg.AMP, self.rank_info.device)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None for no autocast."""
        return dtype_of(self.cfg.AMP, self.rank_info.device)

    def place(self, network: nn.Module) -> nn.Module:
        """Moves a network to the device, in the configured memory format."""
        network = network.to(self.rank_info.device)
        return network.to(memory_format=torch.channels_last) if self.cfg.CHANNELS_LAST else network


def run_folder(cfg: CfgNode, arch: str) -> Path:
    """Returns the output folder of a run."""
    return Path(cfg.OUTPUT, arch, cfg.TAG)


@contextmanager
def open_log(run: Run, arch: str, *, lock: bool = False) -> Iterator[logging.Logger]:
    """Opens the log in the folder of a run; `lock` keeps other runs out. A failed start leaves no new folder behind."""
    cfg, rank_info, folder = run.cfg, run.rank_info, run_folder(run.cfg, arch)
    with ExitStack() as stack:
        made = distributed.broadcast_from_rank0(lambda: first_missing(folder))
        if lock:  # before anything is written, so that a run in progress is not disturbed
            distributed.broadcast_from_rank0(lambda: stack.enter_context(folder_lock(folder)))
        stack.enter_context(without_trace(folder, made, locked=lock))
        stack.enter_context(clear_about_space(folder, ROOM))
        logger = create_logger(folder, rank_info.rank)
        for notice in run.notices:
            logger.warning(notice)
        logger.info(f"{rank_info.world_size} process(es) on {rank_info.device.type}, amp {run.amp}, output in {folder}")
        if rank_info.device.type == "cuda":
            logger.info(backends.describe(cfg))
        yield logger
