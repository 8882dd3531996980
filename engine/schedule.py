"""The learning rate as a function of the update, by timm's schedulers."""

from collections.abc import Callable
from typing import Any

from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch.optim import Optimizer
from yacs.config import CfgNode

from .plan import TrainingPlan

LINEAR_FINAL_SHARE = 0.01  # of the base learning rate, at the end of the published linear schedule


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


def build_schedule(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan) -> Scheduler:
    """Builds one of `SCHEDULES`; `step_update(t)` sets the learning rate of update t = 0, 1, ...

    With WARMUP_PREFIX the schedule starts after the warm-up. Without it, as published, it starts with the warm-up, so
    that the learning rate drops from the base to the schedule's value when the warm-up ends.

    Args:
        optimizer: its present learning rates are the base.
        cfg: the section TRAIN.LR_SCHEDULER.
        plan: of the training.
    """
    warmup = {"warmup_t": plan.warmup_updates, "warmup_lr_init": plan.warmup_lr, "warmup_prefix": cfg.WARMUP_PREFIX}
    return SCHEDULES[cfg.NAME](optimizer, cfg, plan, warmup)


def _length(cfg: CfgNode, plan: TrainingPlan) -> int:
    """Returns the updates in which a schedule falls to MIN_LR."""
    return plan.total_updates - plan.warmup_updates if cfg.WARMUP_PREFIX else plan.total_updates


def _cosine(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan, warmup: dict[str, Any]) -> Scheduler:
    return CosineLRScheduler(optimizer, t_initial=_length(cfg, plan), lr_min=plan.min_lr, t_in_epochs=False, **warmup)


def _poly(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan, warmup: dict[str, Any]) -> Scheduler:
    return PolyLRScheduler(
        optimizer, t_initial=_length(cfg, plan), power=cfg.POWER, lr_min=plan.min_lr, t_in_epochs=False, **warmup
    )


def _linear(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan, warmup: dict[str, Any]) -> Scheduler:
    return LinearLRScheduler(optimizer, t_initial=plan.total_updates, **warmup)


def _step(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan, warmup: dict[str, Any]) -> Scheduler:
    return StepLRScheduler(
        optimizer, decay_t=plan.decay_updates, decay_rate=cfg.DECAY_RATE, t_in_epochs=False, **warmup
    )


def _multistep(optimizer: Optimizer, cfg: CfgNode, plan: TrainingPlan, warmup: dict[str, Any]) -> Scheduler:
    # timm decays one update before the milestone; here it is the first update of the lower rate. With WARMUP_PREFIX
    # timm counts from the end of the warm-up; milestones always count from the start of the training.
    counted_from = plan.warmup_updates if cfg.WARMUP_PREFIX else 0
    milestones = [update + 1 - counted_from for update in plan.milestone_updates]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=cfg.DECAY_RATE, t_in_epochs=False, **warmup)


SCHEDULES: dict[str, Callable[..., Scheduler]] = {
    "cosine": _cosine,  # down to MIN_LR
    "poly": _poly,  # down to MIN_LR, as (1 - progress) ** POWER
    "linear": _linear,  # down to a hundredth
    "step": _step,  # times DECAY_RATE every DECAY_EPOCHS
    "multistep": _multistep,  # times DECAY_RATE at each of MILESTONES
}
