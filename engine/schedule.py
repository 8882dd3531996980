"""The learning rate as a function of the update, by timm's schedulers."""

from typing import Any

from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch.optim import Optimizer

LINEAR_FINAL_SHARE = 0.01  # of the base learning rate, where the published linear schedule ends


class LinearLRScheduler(Scheduler):
    """Warm-up, then a straight line down to a share of the base learning rate; counts updates."""

    def __init__(
        self, optimizer: Optimizer, t_initial: int, warmup_t: int, warmup_lr_init: float, warmup_prefix: bool
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.t_initial, self.warmup_t, self.warmup_lr_init = t_initial, warmup_t, warmup_lr_init
        self.warmup_prefix = warmup_prefix
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            rise = t / self.warmup_t
            return [self.warmup_lr_init + rise * (base - self.warmup_lr_init) for base in self.base_values]
        if self.warmup_prefix:
            done = (t - self.warmup_t) / max(1, self.t_initial - self.warmup_t)
        else:
            done = t / self.t_initial
        share = 1 - (1 - LINEAR_FINAL_SHARE) * min(1.0, done)
        return [base * share for base in self.base_values]


def build_schedule(
    optimizer: Optimizer,
    *,
    name: str,
    total_updates: int,
    warmup_updates: int,
    warmup_lr: float,
    min_lr: float,
    decay_updates: int,
    decay_rate: float,
    warmup_prefix: bool = False,
) -> Scheduler:
    """Builds a schedule that `step_update(t)` sets to the learning rate of update t = 0, 1, ...

    Args:
        optimizer: its learning rates at this moment are the base.
        name: `cosine` (down to `min_lr`), `linear` (down to a hundredth), `step` (times `decay_rate` every
            `decay_updates`).
        total_updates: length of the run, warm-up included.
        warmup_updates: length of the linear warm-up from `warmup_lr`.
        warmup_lr: learning rate of update 0.
        min_lr: where cosine ends.
        decay_updates: distance of the steps.
        decay_rate: factor of one step.
        warmup_prefix: False starts the schedule beneath the warm-up, as published: at its end the learning rate drops
            from the base to what the schedule has come to by then. True starts it after the warm-up, without a drop.

    Raises:
        ValueError: an unknown name.
    """
    warmup: dict[str, Any] = {"warmup_t": warmup_updates, "warmup_lr_init": warmup_lr, "warmup_prefix": warmup_prefix}
    if name == "cosine":
        length = total_updates - warmup_updates if warmup_prefix else total_updates
        return CosineLRScheduler(optimizer, t_initial=length, lr_min=min_lr, t_in_epochs=False, **warmup)
    if name == "linear":
        return LinearLRScheduler(optimizer, t_initial=total_updates, **warmup)
    if name == "step":
        return StepLRScheduler(optimizer, decay_t=decay_updates, decay_rate=decay_rate, t_in_epochs=False, **warmup)
    raise ValueError(f"unknown schedule {name!r}: choose cosine, linear or step")
