"""The checkpoints of a run: which files there are, in which of them a state goes, and which one a run resumes from."""

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

from .state import mean_statistics, read_state, training_state
from .trainer import Trainer

LATEST, BEST, BEST_EMA = "latest.pth", "best_ckpt.pth", "best_ema.pth"
# Metadata that do not make another experiment of a run.
INCIDENTAL = {"versions", "form", "weights"}


class CheckpointFolder:
    """The checkpoints in a run's folder.

    `latest.pth` is the newest, `ckpt_epoch_<n>.pth` those that are kept by number, `best_ckpt.pth` the one with the
    best figure, `best_ema.pth` that with the best figure of the averaged weights. Each is a whole state.

    Args:
        folder: of the run.
        cfg: the configuration; goes into every file as text, and says how many numbered ones stay.
        meta: goes into every file.
        metric: the name of the figure that the best one is chosen by; goes into every file.
    """

    def __init__(self, folder: Path, cfg: CfgNode, meta: dict[str, Any], metric: str) -> None:
        self.folder, self._keep, self._meta = folder, cfg.KEEP_CHECKPOINTS, meta
        self._extra = {"meta": meta, "metric": metric, "config": cfg.dump()}

    def save(self, trainer: Trainer, *, periodic: bool = False, best: bool = False, best_ema: bool = False) -> None:
        """Writes the state of a run under every name that it deserves; all processes take part, rank 0 writes.

        Raises:
            OSError: it could not be written; what had been written before is intact.
        """
        kinds = {"numbered": periodic, "best": best, "best_ema": best_ema}
        trainer.check_skipped()
        trainer.unreadable = set().union(*gather_objects(trainer.unreadable))
        with mean_statistics(trainer) as of_ranks:
            payload = training_state(trainer) | {"rank_statistics": of_ranks, "saved_as": kinds} | self._extra
            if trainer.rank_info.is_main:
                self._write(payload)

    def complete(self, checkpoint: Checkpoint) -> None:
        """Writes a state under the rest of its names, where the run was killed when it had written only some.

        All processes may call this; rank 0 writes.
        """
        payload = checkpoint.payload
        if "saved_as" in payload and rank() == 0:
            update = payload["progress"]["update"]
            self._write(payload, [path for path in self._paths(payload) if path.is_file() and _updates(path) == update])

    def _write(self, payload: dict[str, Any], done: Sequence[Path] = ()) -> None:
        """Writes a state under every name that it deserves, once, as far as the file system lets it have several.

        The file with the best average differs from the others in its metadata, which say that the average is what it
        was chosen by.
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
        self._delete_outdated()

    def _paths(self, payload: dict[str, Any]) -> list[Path]:
        """Returns the files that a state belongs into."""
        kinds, number = payload["saved_as"], f"ckpt_epoch_{payload['epoch']}.pth"
        names = [LATEST] + [BEST] * kinds["best"] + [BEST_EMA] * kinds["best_ema"] + [number] * kinds["numbered"]
        return [self.folder / name for name in names]

    def _delete_outdated(self) -> None:
        outdated = self.periodic()
        for path in outdated[: max(0, len(outdated) - self._keep)]:
            path.unlink()

    def periodic(self) -> list[Path]:
        """Returns the numbered checkpoints, oldest first."""
        numbers = {p: re.fullmatch(r"ckpt_epoch_(\d+)\.pth", p.name) for p in self.folder.glob("ckpt_epoch_*.pth")}
        return sorted((p for p, m in numbers.items() if m), key=lambda p: int(p.stem.rsplit("_", 1)[1]))

    def clear_leftovers(self) -> None:
        """Deletes the temporary files of a run that was killed while it wrote."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def start(self, logger: logging.Logger) -> Checkpoint | None:
        """Clears what a killed run has left behind, and reads what `newest` does; all processes take part.

        Rank 0 chooses, so that all resume from one file: the folder must be one that all of them see. Once the state
        is restored, and so known to be sound, `complete` writes the names that it lacks.
        """
        found: Checkpoint | None = None

        def find() -> Path | None:
            nonlocal found
            self.clear_leftovers()
            found = self.newest(logger)
            return None if found is None else found.path

        path = broadcast_from_rank0(find)
        return found if found is not None or path is None else read_state(path)

    def newest(self, logger: logging.Logger) -> Checkpoint | None:
        """Reads the newest whole state, judged by the updates that it names; None in a fresh folder.

        A damaged file is passed over with a warning, in favour of the next newest.

        Raises:
            ValueError: there are checkpoints, but none of them can be read, or they are of another experiment.
        """
        names = [self.folder / LATEST, *reversed(self.periodic()), self.folder / BEST, self.folder / BEST_EMA]
        found = [path for path in names if path.is_file()]
        for path in sorted(found, key=_updates, reverse=True):
            try:
                checkpoint = read_state(path)
            except ValueError as error:
                logger.warning(f"passing over a checkpoint: {error}")
            else:
                self.check_experiment(checkpoint)
                return checkpoint
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.folder} can be read: move them away to start anew, or "
                "give this run another TAG"
            )
        return None

    def check_experiment(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError where a checkpoint is of another architecture, data set, image size or class count."""
        known = self._meta.keys() & checkpoint.meta.keys() - INCIDENTAL
        other = [key for key in self._meta if key in known and checkpoint.meta[key] != self._meta[key]]
        if other:
            changes = ", ".join(f"{key} {checkpoint.meta[key]} instead of {self._meta[key]}" for key in other)
            raise ValueError(
                f"{checkpoint.path} is of another experiment, with {changes}: restore these settings, give this run "
                "another TAG, or start from the weights with MODEL.PRETRAINED"
            )


def _link(existing: Path, path: Path) -> bool:
    """Gives a file a second name; returns whether the file system can do that."""
    try:
        link_checkpoint(existing, path)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            return False
        raise
    return True


def _updates(path: Path) -> int:
    """Returns how many updates a checkpoint had seen, without reading its tensors; the most for one that is damaged.

    A damaged file sorts first so that it is tried, and named in a warning, like the newest one that it may have been.
    """
    try:
        update = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]["update"]
        schema.integer()("update", update)
    except Exception:  # a damaged file makes the reader raise nearly anything; reading it in full says what is wrong
        return 2**63
    return update
