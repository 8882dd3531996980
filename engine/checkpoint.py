"""The checkpoints of a run: which files there are, what is in them, how a run goes on from one."""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from models.checkpoints import load_weights, read_checkpoint, write_checkpoint

from .train import Progress, Trainer

LATEST, BEST, BEST_EMA = "latest.pth", "best_ckpt.pth", "best_ema.pth"


class CheckpointFolder:
    """The checkpoints in a run's folder.

    `latest.pth` is the newest, `ckpt_epoch_<n>.pth` those that are kept by number, `best_ckpt.pth` the one with the
    highest accuracy, `best_ema.pth` that with the highest accuracy of the averaged weights.

    Args:
        folder: of the run.
        keep: how many numbered ones stay; older ones are deleted.
        meta: goes into every file, as does `config`, the configuration as YAML.
        config: the configuration as YAML.
    """

    def __init__(self, folder: Path, *, keep: int, meta: dict[str, Any], config: str) -> None:
        self.folder, self._keep, self._meta, self._config = folder, keep, meta, config

    def save(self, trainer: Trainer, *, numbered: bool = False, best: bool = False, best_ema: bool = False) -> None:
        """Writes the state of a run under every name that it deserves."""
        payload = training_state(trainer) | {"meta": self._meta, "config": self._config}
        finished = trainer.progress.epoch - 1
        names = [LATEST] + [BEST] * best + [BEST_EMA] * best_ema
        if numbered:
            names.append(f"ckpt_epoch_{finished}.pth")
        for name in names:
            write_checkpoint(self.folder / name, payload)
        outdated = self.numbered()
        for path in outdated[: max(0, len(outdated) - self._keep)]:
            path.unlink()

    def numbered(self) -> list[Path]:
        """Returns the numbered checkpoints, oldest first."""
        numbers = {p: re.fullmatch(r"ckpt_epoch_(\d+)\.pth", p.name) for p in self.folder.glob("ckpt_epoch_*.pth")}
        return sorted((p for p, m in numbers.items() if m), key=lambda p: int(p.stem.rsplit("_", 1)[1]))

    def newest(self) -> Path | None:
        """Returns the checkpoint to go on from, or None in a fresh folder."""
        candidates = [self.folder / LATEST, *reversed(self.numbered())]
        return next((path for path in candidates if path.is_file()), None)


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Returns the whole state of a run by name: plain tensors and plain values.

    Learning rate, data order, augmentation, mixing and drop path are functions of the progress and the seed, so that
    they need no state of their own.
    """
    state = {
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": trainer.progress.epoch - 1,  # the last finished one, as in the published files
        "max_accuracy": trainer.progress.best_top1,
        "progress": asdict(trainer.progress),
    }
    return state | ({"ema": trainer.ema.module.state_dict()} if trainer.ema is not None else {})


def resume(trainer: Trainer, path: Path) -> None:
    """Puts a run where a checkpoint left it: one of ours, or a published training checkpoint (after a whole epoch).

    Raises:
        ValueError: no training state in the file, or that of another network, optimizer or length of an epoch.
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
    _load_optimizer(trainer, payload["optimizer"], path)
    if payload.get("scaler"):
        trainer.scaler.load_state_dict(payload["scaler"])
    trainer.progress = _progress(payload, trainer.updates_per_epoch)
    if trainer.ema is not None:
        average = read_checkpoint(path, ema=True) if "ema" in payload else checkpoint
        load_weights(trainer.ema.module, average)


def _load_optimizer(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    own = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    try:
        trainer.optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the optimizer's state in {path} does not fit this one: {error}") from error
    # The moments come from the file, the hyper-parameters from the configuration.
    for group, settings in zip(trainer.optimizer.param_groups, own, strict=True):
        group.update(settings)


def _progress(payload: dict[str, Any], updates_per_epoch: int) -> Progress:
    if "progress" in payload:
        known = {f.name for f in fields(Progress)}
        return Progress(**{k: v for k, v in payload["progress"].items() if k in known})
    epoch = int(payload["epoch"]) + 1
    return Progress(epoch, 0, epoch * updates_per_epoch, best_top1=float(payload.get("max_accuracy", 0.0)))
