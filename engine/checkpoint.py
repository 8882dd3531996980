"""The checkpoint files of a run: which one the run resumes from, and which ones a state is written to."""

import errno
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from models import schema
from models.checkpoints import Checkpoint
from models.files import link_checkpoint, write_checkpoint
from utils.distributed import broadcast_from_rank0, gather_objects, rank
from utils.transfer import to_host

from .state import mean_statistics, read_state, training_state
from .trainer import Trainer

LATEST, BEST, BEST_EMA = "latest.pth", "best_ckpt.pth", "best_ema.pth"
# Metadata that may differ within a run, or are compared in another way (`classes.check_resumed_classes`).
INCIDENTAL = {"versions", "form", "weights", "class_names"}


def find_checkpoint(folder: Path, logger: logging.Logger) -> Checkpoint | None:
    """Deletes the leftovers of a killed run and returns the newest checkpoint; a collective operation.

    Rank 0 chooses the file for all processes, which must share the folder.
    """
    found: Checkpoint | None = None

    def find() -> Path | None:
        nonlocal found
        clear_leftovers(folder)
        found = newest(folder, logger)
        return None if found is None else found.path

    path = broadcast_from_rank0(find)
    return found if found is not None or path is None else read_state(path)


def clear_leftovers(folder: Path) -> None:
    """Deletes the temporary files of a run that was killed while it saved."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def newest(folder: Path, logger: logging.Logger) -> Checkpoint | None:
    """Reads the checkpoint with the most updates; None without checkpoints. Skips damaged files with a warning.

    Raises:
        ValueError: no checkpoint can be read.
    """
    names = [folder / LATEST, *reversed(numbered(folder)), folder / BEST, folder / BEST_EMA]
    found = [path for path in names if path.is_file()]
    for path in sorted(found, key=_updates, reverse=True):
        try:
            return read_state(path)
        except ValueError as error:
            logger.warning(f"passing over a checkpoint: {error}")
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be read: move them away to start from scratch, or "
            "give this run another TAG"
        )
    return None


def numbered(folder: Path) -> list[Path]:
    """Returns the numbered checkpoints, oldest first."""
    names = {path: re.fullmatch(r"ckpt_epoch_(\d+)\.pth", path.name) for path in folder.glob("*.pth")}
    return [path for _, path in sorted((int(name[1]), path) for path, name in names.items() if name)]


class CheckpointFolder:
    """The checkpoints in a run's folder.

    `latest.pth` is the newest, `ckpt_epoch_<n>.pth` are the numbered ones, `best_ckpt.pth` has the best figure,
    `best_ema.pth` the best figure of the averaged weights. Each is a whole state.

    Args:
        folder: of the run.
        cfg: the configuration; saved as text in every file.
        meta: saved in every file.
        metric: the figure that selects the best checkpoint; saved in every file.
    """

    def __init__(self, folder: Path, cfg: CfgNode, meta: dict[str, Any], metric: str) -> None:
        self.folder, self._keep, self._meta = folder, cfg.KEEP_CHECKPOINTS, meta
        self._extra = {"meta": meta, "metric": metric, "config": cfg.dump()}

    def save(self, trainer: Trainer, *, periodic: bool = False, best: bool = False, best_ema: bool = False) -> None:
        """Writes the state of a run to its files; a collective operation, rank 0 writes.

        Raises:
            OSError: a file could not be written; earlier checkpoints are intact.
        """
        kinds = {"numbered": periodic, "best": best, "best_ema": best_ema}
        trainer.check_skipped()
        trainer.unreadable = set().union(*gather_objects(trainer.unreadable))
        with mean_statistics(trainer) as of_ranks:
            payload = training_state(trainer) | {"rank_statistics": of_ranks, "saved_as": kinds} | self._extra
            if trainer.rank_info.is_main:
                self._write(to_host(payload))

    def complete(self, checkpoint: Checkpoint) -> None:
        """Writes the files of a state that are missing because the run was killed while it saved; rank 0 writes.

        The state must be restored, and so known to be sound.
        """
        payload = checkpoint.payload
        if "saved_as" in payload and rank() == 0:
            update = payload["progress"]["update"]
            self._write(payload, [path for path in self._paths(payload) if path.is_file() and _updates(path) == update])

    def _write(self, payload: dict[str, Any], done: Sequence[Path] = ()) -> None:
        """Writes a state to its files: once, with hard links where the file system has them.

        `best_ema.pth` is a file of its own: its metadata say that it was selected by the averaged weights.
        """
        first = next((path for path in done if path.name != BEST_EMA), None)
        for path in self._paths(payload):
            if path in done:
                continue
            averaged = path.name == BEST_EMA
            if averaged or first is None or not _link(first, path):
                meta = {k: v for k, v in payload["meta"].items() if k != "weights"}
                meta |= {"weights": "ema"} if averaged else {}
                write_checkpoint(path, payload | {"meta": meta})
            first = path if first is None and not averaged else first
        periodic = numbered(self.folder)
        for outdated in periodic[: max(0, len(periodic) - self._keep)]:
            outdated.unlink()

    def _paths(self, payload: dict[str, Any]) -> list[Path]:
        """Returns the files that a state is written to."""
        kinds, number = payload["saved_as"], f"ckpt_epoch_{payload['epoch']}.pth"
        names = [LATEST] + [BEST] * kinds["best"] + [BEST_EMA] * kinds["best_ema"] + [number] * kinds["numbered"]
        return [self.folder / name for name in names]

    def check_experiment(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError for a checkpoint of another architecture, data set, image size, structure or classes."""
        known = self._meta.keys() & checkpoint.meta.keys() - INCIDENTAL
        pairs = {key: (checkpoint.meta[key], self._meta[key]) for key in self._meta if key in known}
        forms = checkpoint.form, self._meta.get("form")
        if "deploy" in forms:  # otherwise older files may name one where there is none
            pairs["form"] = forms
        other = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if other:
            changes = ", ".join(f"{key} {theirs} instead of {own}" for key, (theirs, own) in other.items())
            raise ValueError(
                f"{checkpoint.path} is of another experiment, with {changes}: restore these settings, give this run "
                "another TAG, or start from the weights with MODEL.PRETRAINED"
            )


def _link(existing: Path, path: Path) -> bool:
    """Makes a hard link; returns False if the file system has none."""
    try:
        link_checkpoint(existing, path)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            return False
        raise
    return True


def _updates(path: Path) -> int:
    """Returns the number of updates of a checkpoint without reading its tensors.

    A damaged file, which may have been the newest, sorts first, so that the run tries it and warns.
    """
    try:
        update = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]["update"]
        schema.integer()("update", update)
    except Exception:  # torch.load raises nearly anything for a damaged file; reading it in full says what is wrong
        return 2**63
    return update
