"""The state of a run: what a checkpoint holds, how it is checked and how it is restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import holds_a_part
from models import schema
from models.checkpoints import Checkpoint, check_weights, read_checkpoint, take_weights, unusable_values
from utils.distributed import gather_rows
from utils.transfer import to_device

from .optimizer import match_layout, state_mismatch
from .statistics import RunningStatistics
from .trainer import Progress, Trainer

# What the counts of `Progress` and the order of the images depend on.
RUN = ("seed", "images", "world_size", "global_batch", "updates_per_epoch")
TENSORS = schema.mapping(str, schema.tensor)
_COUNT = schema.integer()
_SCALER = {
    "scale": schema.positive,
    "growth_factor": schema.positive,
    "backoff_factor": schema.positive,
    "growth_interval": schema.integer(1),
    "_growth_tracker": _COUNT,
}
_SUMS = schema.sequence(schema.number, length=2)
# What every checkpoint of a run holds; `training_state` adds SOMETIMES.
ALWAYS = {
    "model": TENSORS,
    "optimizer": schema.record(
        {
            "state": schema.mapping(
                int, schema.mapping(str, schema.any_of("a number or a tensor", schema.tensor, schema.number))
            ),
            "param_groups": schema.sequence(schema.record({"params": schema.sequence(_COUNT)}, required=True)),
        },
        required=True,
    ),
    "scaler": lambda where, value: schema.record(_SCALER, required=bool(value))(where, value),
    "epoch": schema.integer(-1),
    "max_accuracy": schema.number,
    "progress": schema.record(
        {f.name: _COUNT if f.type is int else schema.optional(schema.number) for f in fields(Progress)}, required=True
    ),
    "meters": schema.mapping(str, schema.any_of("the sums of each process", _SUMS, schema.sequence(_SUMS))),
    "run": schema.record({name: schema.integer(int(name != "seed")) for name in RUN}, required=True),
    "unreadable": schema.sequence(schema.text),
    "rank_statistics": schema.sequence(schema.tensor),
    "meta": schema.mapping(str, schema.anything),
    "config": schema.text,
    "saved_as": schema.record(dict.fromkeys(("numbered", "best", "best_ema"), schema.boolean), required=True),
}
# Old names of the fields of `Progress`.
RENAMED = {"best_top1": "best_metric", "best_ema_top1": "best_ema_metric"}
SOMETIMES = {"ema": TENSORS, "criterion": TENSORS, "metric": schema.text}


def read_state(path: str | Path) -> Checkpoint:
    """Reads and checks the checkpoint of a run, ours or published.

    Raises:
        ValueError: as `read_checkpoint`; the file holds no training state, or a part of it has a wrong type or value.
    """
    checkpoint = read_checkpoint(path, ema=False)
    payload = checkpoint.payload
    absent = [key for key in ("optimizer", "epoch") if key not in payload]
    if absent:
        raise ValueError(
            f"{path} holds weights but not the state of a training ({' and '.join(absent)} is missing): "
            "start from it with MODEL.PRETRAINED instead of MODEL.RESUME"
        )
    if isinstance(payload.get("progress"), dict):
        payload["progress"] = {RENAMED.get(name, name): value for name, value in payload["progress"].items()}
    own = "saved_as" in payload  # published checkpoints lack it, and their `config` is not text
    always = ALWAYS if own else {key: check for key, check in ALWAYS.items() if key != "config"}
    try:
        schema.record(always, required=own)("", payload)
        schema.record(SOMETIMES)("", payload)
        if own:
            finished = payload["progress"]["epoch"] - 1
            schema.expect(payload["epoch"] == finished, "epoch", payload["epoch"], f"{finished}, as in progress")
    except ValueError as error:
        raise ValueError(f"{path} is not a valid checkpoint of a run: {error}") from None
    return checkpoint


@contextmanager
def mean_statistics(trainer: Trainer) -> Iterator[list[Tensor]]:
    """Yields the running statistics of each process; inside the context, the networks have their mean.

    Within an epoch they differ between processes, and a checkpoint must hold usable weights then, too.
    """
    statistics = RunningStatistics(*trainer.networks)
    own = statistics.read()
    of_ranks = gather_rows(own, trainer.rank_info.device)
    try:
        if trainer.progress.consumed:
            statistics.write(torch.stack(of_ranks).mean(0))
        yield of_ranks
    finally:
        statistics.write(own)


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Returns the state of a run, plain tensors and plain values; a collective operation.

    Learning rate, data order, augmentation and drop path are functions of progress and seed, so that no state of a
    random number generator is saved.
    """
    state = {
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": trainer.progress.epoch - 1,  # the last finished one, as in the published files
        "max_accuracy": trainer.progress.best_metric or 0.0,
        "progress": asdict(trainer.progress),
        "meters": {name: mean.state() for name, mean in trainer.meters.items()},
        "run": _run(trainer),
        "unreadable": sorted(trainer.unreadable),
    }
    learned = trainer.criterion.state_dict()  # such as the class centres of a margin loss
    state |= {"criterion": learned} if learned else {}
    return state | ({"ema": trainer.ema.module.state_dict()} if trainer.ema is not None else {})


def _run(trainer: Trainer) -> dict[str, int]:
    """Returns the entries of `RUN`."""
    return {
        "seed": trainer.cfg.SEED,
        "images": trainer.images,
        "world_size": trainer.rank_info.world_size,
        "global_batch": trainer.plan.global_batch,
        "updates_per_epoch": trainer.plan.updates_per_epoch,
    }


def restore(trainer: Trainer, checkpoint: Checkpoint) -> int:
    """Restores the state of a run from `read_state`: ours, or a published one, which is of a whole epoch.

    Returns:
        The updates done, as the earlier run counted them; another global batch changes the count.

    Raises:
        ValueError: the state is of another network, optimizer or order of images.
    """
    path, payload = checkpoint.path, checkpoint.payload
    _load_weights(trainer, trainer.network, checkpoint)
    if trainer.ema is not None:
        averaged = take_weights(path, payload, ema=True) if "ema" in payload else checkpoint
        _load_weights(trainer, trainer.ema.module, averaged)
    _load_criterion(trainer, payload.get("criterion", {}), path)
    _load_optimizer(trainer, payload["optimizer"], path)
    if payload.get("scaler"):
        trainer.scaler.load_state_dict(payload["scaler"])
    for name in trainer.meters.keys() & payload.get("meters", {}).keys():
        trainer.meters[name].load_state(payload["meters"][name])
    if "ema" in payload or trainer.ema is None:
        _load_statistics(trainer, payload.get("rank_statistics", []), path)
    trainer.unreadable = set(payload.get("unreadable", ()))
    return _load_progress(trainer, payload, path)


def _load_weights(trainer: Trainer, network: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the weights of a network, which are checked on the CPU."""
    check_weights(network, checkpoint)
    network.load_state_dict(to_device(checkpoint.state_dict, trainer.rank_info.device))


def _load_criterion(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Loads the parameters of the loss, if it has some."""
    own = {name: value.shape for name, value in trainer.criterion.state_dict().items()}
    if own != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"{path} is of a run with another loss or other classes: give this run another TAG")
    problems = unusable_values(trainer.criterion.state_dict(), state)
    if problems:
        raise ValueError(f"the parameters of the loss in {path} can't be used: {problems}")
    trainer.criterion.load_state_dict(to_device(state, trainer.rank_info.device))


def _load_optimizer(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Loads the moments; the hyper-parameters stay those of the configuration."""
    optimizer = trainer.optimizer
    problem = state_mismatch(optimizer, state)
    if problem:
        raise ValueError(
            f"the optimizer's state in {path} does not fit this {type(optimizer).__name__}: {problem}; restore "
            "TRAIN.OPTIMIZER.NAME, or start from the weights with MODEL.PRETRAINED"
        )
    groups = [
        own | {"params": saved["params"]}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    moments = to_device(state["state"], trainer.rank_info.device)
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    match_layout(optimizer)


def _load_statistics(trainer: Trainer, of_ranks: list[Tensor], path: Path) -> None:
    """Restores the running statistics of each process, or their mean if the number of processes has changed."""
    statistics, rank_info = RunningStatistics(*trainer.networks), trainer.rank_info
    own = statistics.read()
    if any(t.shape != own.shape or not t.is_floating_point() or not t.isfinite().all() for t in of_ranks):
        raise ValueError(f"the running statistics of the processes in {path} do not fit the network")
    if len(of_ranks) > 1:
        same = len(of_ranks) == rank_info.world_size
        statistics.write(of_ranks[rank_info.rank] if same else torch.stack(of_ranks).mean(0))


def _load_progress(trainer: Trainer, payload: dict[str, Any], path: Path) -> int:
    run, now = payload.get("run", {}), _run(trainer)
    known = {f.name for f in fields(Progress)}
    published = {"epoch": payload["epoch"] + 1, "best_metric": float(payload.get("max_accuracy", 0.0))}
    progress = Progress(**{k: v for k, v in payload.get("progress", published).items() if k in known})
    changed = {k: (run.get(k), v) for k, v in now.items() if run.get(k, v) != v}
    # Ranks that each hold a part in memory train on that part alone.
    order = ("seed", "images", "world_size") if holds_a_part(trainer.cfg.DATA) else ("seed", "images")
    for key in order:
        if progress.consumed and key in changed:
            raise ValueError(
                f"{path} is from the middle of an epoch, whose order of images changes with {key} {changed[key][1]} "
                f"instead of {changed[key][0]}: resume with the old value"
            )
    recorded = progress.update
    if changed or not run:
        progress.update = (
            progress.epoch * trainer.plan.updates_per_epoch + progress.consumed // trainer.plan.global_batch
        )
    if changed:
        what = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in changed.items())
        trainer.logger.warning(
            f"this run has changed ({what}); it resumes after image {progress.consumed} of epoch {progress.epoch}, "
            f"which is now update {progress.update}"
        )
    trainer.progress = progress
    return recorded
