"""The training plan: the numbers that follow from the settings, the number of processes and the data set."""

from collections.abc import Sequence
from dataclasses import dataclass

from yacs.config import CfgNode

REFERENCE_BATCH = 256  # the global batch that the configured learning rates are for


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of a training; `str()` is one line for the log.

    Attributes:
        global_batch: images of one update, over all processes and accumulated batches.
        lr, warmup_lr, min_lr: TRAIN.BASE_LR, WARMUP_LR and MIN_LR x global_batch / 256.
        updates_per_epoch: optimizer updates in one epoch; remaining batches are dropped.
        total_updates: optimizer updates of the whole training, including the warm-up.
        warmup_updates: optimizer updates of the warm-up.
        decay_updates: optimizer updates between two decays of the schedule `step`.
        milestone_updates: optimizer updates before each decay of the schedule `multistep`, rounded.
    """

    global_batch: int
    lr: float
    warmup_lr: float
    min_lr: float
    updates_per_epoch: int
    total_updates: int
    warmup_updates: int
    decay_updates: int
    milestone_updates: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch}, learning rate {self.lr:g} "
            f"(warm-up from {self.warmup_lr:g}, down to {self.min_lr:g}), {self.updates_per_epoch} updates an epoch, "
            f"{self.total_updates} in all, {self.warmup_updates} of them warm-up"
        )


def plan_training(cfg: CfgNode, *, world_size: int, steps_per_epoch: int) -> TrainingPlan:
    """Computes the numbers of a training.

    Args:
        cfg: the configuration.
        world_size: number of processes.
        steps_per_epoch: batches that each process sees in one epoch.

    Raises:
        ValueError: the training images do not fill one batch, the batches do not fill one update, a milestone is no
            update of the training, or the moving average of the weights would be a mere copy.
    """
    if steps_per_epoch < 1:
        raise ValueError(
            f"DATA.BATCH_SIZE = {cfg.DATA.BATCH_SIZE}: the training images do not fill one batch in each of "
            f"{world_size} process(es); lower it"
        )
    accumulation = max(1, cfg.TRAIN.ACCUMULATION_STEPS)
    if steps_per_epoch < accumulation:
        raise ValueError(
            f"TRAIN.ACCUMULATION_STEPS = {accumulation}: an epoch has {steps_per_epoch} batches only, so that "
            "no update would ever be made; lower it, or DATA.BATCH_SIZE"
        )
    global_batch = cfg.DATA.BATCH_SIZE * world_size * accumulation
    _check_average(cfg.TRAIN, global_batch)
    updates_per_epoch = steps_per_epoch // accumulation
    milestones = tuple(round(epochs * updates_per_epoch) for epochs in cfg.TRAIN.LR_SCHEDULER.MILESTONES)
    _check_milestones(cfg.TRAIN, milestones, updates_per_epoch)
    return TrainingPlan(
        global_batch=global_batch,
        lr=cfg.TRAIN.BASE_LR * global_batch / REFERENCE_BATCH,
        warmup_lr=cfg.TRAIN.WARMUP_LR * global_batch / REFERENCE_BATCH,
        min_lr=cfg.TRAIN.MIN_LR * global_batch / REFERENCE_BATCH,
        updates_per_epoch=updates_per_epoch,
        total_updates=cfg.TRAIN.EPOCHS * updates_per_epoch,
        warmup_updates=cfg.TRAIN.WARMUP_EPOCHS * updates_per_epoch,
        decay_updates=cfg.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * updates_per_epoch,
        milestone_updates=milestones,
    )


def _check_milestones(cfg: CfgNode, milestones: Sequence[int], updates_per_epoch: int) -> None:
    """Raises ValueError if a decay of the schedule `multistep` would come before the first update or after the last."""
    total = cfg.EPOCHS * updates_per_epoch
    if cfg.LR_SCHEDULER.NAME == "multistep" and not all(0 < milestone < total for milestone in milestones):
        raise ValueError(
            f"TRAIN.LR_SCHEDULER.MILESTONES = {list(cfg.LR_SCHEDULER.MILESTONES)}: with {updates_per_epoch} updates "
            "per epoch, one is before the first update or after the last one; move it by an update or more"
        )


def ema_weight(cfg: CfgNode, global_batch: int) -> float:
    """Returns the weight of the newest values in the moving average, 1 - decay, as published.

    Args:
        cfg: the section TRAIN.
        global_batch: images of one update.
    """
    return cfg.EMA_ALPHA * global_batch / cfg.EPOCHS * cfg.EMA_UPDATE_PERIOD


def _check_average(cfg: CfgNode, global_batch: int) -> None:
    alpha, epochs, period, weight = cfg.EMA_ALPHA, cfg.EPOCHS, cfg.EMA_UPDATE_PERIOD, ema_weight(cfg, global_batch)
    if weight >= 1:
        scale = weight / alpha
        raise ValueError(
            f"TRAIN.EMA_ALPHA = {alpha:g}: with a global batch of {global_batch}, {epochs} epochs and "
            f"TRAIN.EMA_UPDATE_PERIOD {period} the newest weights would have the weight {weight:.3g} in their "
            f"moving average, which would be a copy of them (decay 0): it must be below {1 / scale:.2g}; "
            f"{0.01 / scale:.2g} gives a decay of 0.99, {0.001 / scale:.2g} one of 0.999"
        )
