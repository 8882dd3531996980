"""The checkpoints of a run: which files there are, what is in them, how a run goes on from one."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.checkpoints import load_weights, read_checkpoint, write_checkpoint
from utils.distributed import gather_objects

from .statistics import RunningStatistics
from .train import Progress, Trainer

LATEST, BEST, BEST_EMA = "latest.pth", "best_ckpt.pth", "best_ema.pth"


class CheckpointFolder:
    """The checkpoints in a run's folder.

    `latest.pth` is the newest, `ckpt_epoch_<n>.pth` those that are kept by number, `best_ckpt.pth` the one with the
    highest accuracy, `best_ema.pth` that with the highest accuracy of the averaged weights. Each is a whole state.

    Args:
        folder: of the run.
        keep: how many numbered ones stay; older ones are deleted.
        meta: goes into every file.
        config: the settings of the run as text, goes into every file.
    """

    def __init__(self, folder: Path, *, keep: int, meta: dict[str, Any], config: str) -> None:
        self.folder, self._keep, self._meta, self._config = folder, keep, meta, config

    def save(self, trainer: Trainer, *, numbered: bool = False, best: bool = False, best_ema: bool = False) -> None:
        """Writes the state of a run under every name that it deserves; all processes take part, rank 0 writes.

        Raises:
            OSError: it could not be written; what had been written before is intact.
        """
        kinds = {"numbered": numbered, "best": best, "best_ema": best_ema}
        extra = {"meta": self._meta, "config": self._config, "saved_as": kinds}
        trainer.look()
        trainer.unreadable = set().union(*gather_objects(trainer.unreadable))
        with _mean_statistics(trainer) as of_ranks:
            payload = training_state(trainer) | {"rank_statistics": of_ranks} | extra
            if trainer.process.is_main:
                for path in self._paths(payload):
                    write_checkpoint(path, payload)
                self._delete_outdated()

    def complete(self, path: Path) -> None:
        """Writes a state under the rest of its names, where the run was killed when it had written only some."""
        payload = read_checkpoint(path).payload
        if "saved_as" in payload:
            for other in self._paths(payload):
                if not other.is_file() or _updates(other) != payload["progress"]["update"]:
                    write_checkpoint(other, payload)
            self._delete_outdated()

    def _paths(self, payload: dict[str, Any]) -> list[Path]:
        """Returns the files that a state belongs into."""
        kinds, number = payload["saved_as"], f"ckpt_epoch_{payload['epoch']}.pth"
        names = [LATEST] + [BEST] * kinds["best"] + [BEST_EMA] * kinds["best_ema"] + [number] * kinds["numbered"]
        return [self.folder / name for name in names]

    def _delete_outdated(self) -> None:
        outdated = self.numbered()
        for path in outdated[: max(0, len(outdated) - self._keep)]:
            path.unlink()

    def numbered(self) -> list[Path]:
        """Returns the numbered checkpoints, oldest first."""
        numbers = {p: re.fullmatch(r"ckpt_epoch_(\d+)\.pth", p.name) for p in self.folder.glob("ckpt_epoch_*.pth")}
        return sorted((p for p, m in numbers.items() if m), key=lambda p: int(p.stem.rsplit("_", 1)[1]))

    def clear_leftovers(self) -> None:
        """Deletes the temporary files of a run that was killed while it wrote."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def start(self, logger: logging.Logger) -> Path | None:
        """Puts the folder in order after a run that was killed, and returns what `newest` does."""
        self.clear_leftovers()
        path = self.newest(logger)
        if path is not None:
            self.complete(path)
        return path

    def newest(self, logger: logging.Logger) -> Path | None:
        """Returns the file of the newest whole state, judged by the updates that it names, or None in a fresh folder.

        A damaged file is passed over with a warning, in favour of the next newest.

        Raises:
            ValueError: there are checkpoints, but none of them can be read.
        """
        names = [self.folder / LATEST, *reversed(self.numbered()), self.folder / BEST, self.folder / BEST_EMA]
        found = [path for path in names if path.is_file()]
        for path in sorted(found, key=_updates, reverse=True):
            try:
                read_checkpoint(path)
            except ValueError as error:
                logger.warning(f"passing over a checkpoint: {error}")
            else:
                return path
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.folder} can be read: move them away to start anew, or "
                "give this run another --tag"
            )
        return None


def _updates(path: Path) -> int:
    """Returns how many updates a checkpoint had seen, without reading its tensors; the most for one that is damaged.

    A damaged file sorts first so that it is tried, and told of, like the newest one that it may have been.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]["update"]
    except Exception:  # a damaged file makes the reader raise nearly anything; whoever reads it in full says so
        return 2**63


@contextmanager
def _mean_statistics(trainer: Trainer) -> Iterator[list[Tensor]]:
    """Gives the running statistics of each process; inside, those of the networks are their mean.

    They differ in the middle of an epoch, and a file of that moment is to hold weights that are fit for use, too.
    """
    statistics = RunningStatistics(*trainer.networks)
    own = statistics.read()
    of_ranks = _gather(own)
    try:
        if trainer.progress.consumed:
            statistics.write(torch.stack(of_ranks).mean(0))
        yield of_ranks
    finally:
        statistics.write(own)


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Returns the state of a run by name, plain tensors and plain values; all processes must ask.

    Learning rate, data order, augmentation, mixing and drop path are functions of the progress and the seed, so that
    no generator has a state of its own to keep.
    """
    state = {
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": trainer.progress.epoch - 1,  # the last finished one, as in the published files
        "max_accuracy": trainer.progress.best_top1,
        "progress": asdict(trainer.progress),
        "meters": {name: mean.state() for name, mean in trainer.meters.items()},
        "run": _run(trainer),
        "unreadable": sorted(trainer.unreadable),
    }
    learned = trainer.criterion.state_dict()  # what a margin loss knows of the classes
    state |= {"criterion": learned} if learned else {}
    return state | ({"ema": trainer.ema.module.state_dict()} if trainer.ema is not None else {})


def _run(trainer: Trainer) -> dict[str, int]:
    """Returns what the counts of `Progress` and the order of the images depend on."""
    return {
        "seed": trainer.seed,
        "images": trainer.images,
        "world_size": trainer.process.world_size,
        "global_batch": trainer.global_batch,
        "updates_per_epoch": trainer.updates_per_epoch,
    }


def _gather(tensor: Tensor) -> list[Tensor]:
    """Returns a tensor (n,) of every process, on the CPU; within an epoch, each has statistics of its own."""
    if not dist.is_initialized():
        return [tensor.cpu()]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return [t.cpu() for t in gathered]


def resume(trainer: Trainer, path: Path) -> int:
    """Puts a run where a checkpoint left it: one of ours, or a published training checkpoint (after a whole epoch).

    Returns:
        The updates done so far as the earlier run counted and recorded them, which other processes or batches change.

    Raises:
        ValueError: no training state in the file, or that of another network, optimizer or order of images.
    """
    checkpoint = read_checkpoint(path)
    payload = checkpoint.payload
    absent = [key for key in ("optimizer", "epoch") if key not in payload]
    if absent:
        raise ValueError(
            f"{path} holds weights but not the state of a training ({' and '.join(absent)} is missing): "
            "start from it with --pretrained instead of --resume"
        )
    load_weights(trainer.network, checkpoint)
    if trainer.ema is not None:
        load_weights(trainer.ema.module, read_checkpoint(path, ema=True) if "ema" in payload else checkpoint)
    _load_criterion(trainer, payload.get("criterion", {}), path)
    _load_optimizer(trainer, payload["optimizer"], path)
    if payload.get("scaler"):
        trainer.scaler.load_state_dict(payload["scaler"])
    for name, sums in payload.get("meters", {}).items():
        trainer.meters[name].load_state(sums)
    _load_statistics(trainer, payload.get("rank_statistics", []), same_networks="ema" in payload or trainer.ema is None)
    trainer.unreadable = set(payload.get("unreadable", ()))
    return _load_progress(trainer, payload, path)


def _load_criterion(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Loads what the loss learns, if it does."""
    own = {name: value.shape for name, value in trainer.criterion.state_dict().items()}
    if own != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"{path} is of a run with another loss or other classes: give this run another --tag")
    trainer.criterion.load_state_dict(state)


def _load_optimizer(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    own = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    # torch takes in the state of any optimizer whose groups are as long; this setting tells AdamW from SGD.
    if {"betas" in group for group in state["param_groups"]} != {"betas" in group for group in own}:
        raise ValueError(
            f"the optimizer's state in {path} is that of another one than {type(trainer.optimizer).__name__}"
        )
    try:
        trainer.optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the optimizer's state in {path} does not fit this one: {error}") from error
    # The moments come from the file, the hyper-parameters from the configuration.
    for group, settings in zip(trainer.optimizer.param_groups, own, strict=True):
        group.update(settings)


def _load_statistics(trainer: Trainer, of_ranks: list[Tensor], same_networks: bool) -> None:
    """Gives each process its own running statistics back, or, where their number changed, the mean of all."""
    if len(of_ranks) < 2 or not same_networks:
        return
    process = trainer.process
    same = len(of_ranks) == process.world_size
    RunningStatistics(*trainer.networks).write(of_ranks[process.rank] if same else torch.stack(of_ranks).mean(0))


def _load_progress(trainer: Trainer, payload: dict[str, Any], path: Path) -> int:
    run, now = payload.get("run", {}), _run(trainer)
    known = {f.name for f in fields(Progress)}
    epoch = int(payload["epoch"]) + 1
    published = {"epoch": epoch, "best_top1": float(payload.get("max_accuracy", 0.0))}
    progress = Progress(**{k: v for k, v in payload.get("progress", published).items() if k in known})
    changed = {k: (run.get(k), v) for k, v in now.items() if run.get(k, v) != v}
    for key in ("seed", "images"):
        if progress.consumed and key in changed:
            raise ValueError(
                f"{path} stands in the middle of an epoch, whose order of images is another one with {key} "
                f"{changed[key][1]} instead of {changed[key][0]}: go on with the old value"
            )
    recorded = progress.update
    if changed or not run:
        progress.update = progress.epoch * trainer.updates_per_epoch + progress.consumed // trainer.global_batch
    if changed:
        what = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in changed.items())
        trainer.logger.warning(
            f"this run has changed ({what}); it goes on after image {progress.consumed} of epoch {progress.epoch}, "
            f"which is update {progress.update} by the new count"
        )
    trainer.progress = progress
    return recorded
