"""The parts of a training by a few keywords, built by the real builders from a real configuration."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from settings import settings
from timm.scheduler.scheduler import Scheduler
from torch import nn

from data import Normalize
from engine.checkpoint import CheckpointFolder
from engine.ema import ModelEma
from engine.optimizer import build_optimizer
from engine.parallel import NetworkWithLoss
from engine.plan import TrainingPlan
from engine.schedule import build_schedule
from engine.state import read_state, restore
from engine.trainer import Trainer
from utils.distributed import RankInfo
from utils.log import MetricsWriter

ALONE = RankInfo(0, 1, 0, torch.device("cpu"))
PLAN = TrainingPlan(
    global_batch=8,
    lr=0.1,
    warmup_lr=0.0,
    min_lr=0.0,
    updates_per_epoch=5,
    total_updates=1000,
    warmup_updates=0,
    decay_updates=1000,
    milestone_updates=(1000,),
)
# Keywords of `trainer_of` that are keys of the configuration, with the value that they have unless a test says so.
KEYS = {
    "accumulation": ("TRAIN.ACCUMULATION_STEPS", 1),
    "clip_grad": ("TRAIN.CLIP_GRAD", 0),
    "print_freq": ("PRINT_FREQ", 10),
    "seed": ("SEED", 0),
    "max_unreadable": ("DATA.MAX_UNREADABLE", 0),
    "max_skipped": ("TRAIN.MAX_SKIPPED", 0),
    "epochs": ("TRAIN.EPOCHS", 10),
}


def optimizer_of(
    model: nn.Module,
    name: str = "sgd",
    lr: float = 0.1,
    weight_decay: float = 0.01,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    criterion: nn.Module | None = None,
) -> torch.optim.Optimizer:
    cfg = settings(
        f"TRAIN.OPTIMIZER.NAME {name} TRAIN.WEIGHT_DECAY {weight_decay} TRAIN.OPTIMIZER.MOMENTUM {momentum} "
        f"TRAIN.OPTIMIZER.BETAS {betas[0]},{betas[1]} TRAIN.OPTIMIZER.EPS {eps}"
    )
    return build_optimizer(model, cfg.TRAIN, lr, criterion)


def schedule_of(
    optimizer: torch.optim.Optimizer,
    name: str = "step",
    *,
    decay_rate: float = 1.0,
    power: float = 0.9,
    warmup_prefix: bool = False,
    **plan: Any,
) -> Scheduler:
    """`plan` holds fields of a `TrainingPlan`."""
    keys = {"NAME": name, "DECAY_RATE": decay_rate, "POWER": power, "WARMUP_PREFIX": warmup_prefix}
    cfg = settings(" ".join(f"TRAIN.LR_SCHEDULER.{key} {value}" for key, value in keys.items()))
    return build_schedule(optimizer, cfg.TRAIN.LR_SCHEDULER, replace(PLAN, **plan))


def ema_of(
    model: nn.Module, *, alpha: float, period: int, global_batch: int, epochs: int, warmup_updates: int
) -> ModelEma:
    cfg = settings(
        f"TRAIN.EMA_ALPHA {alpha} TRAIN.EMA_UPDATE_PERIOD {period} TRAIN.EPOCHS {epochs} TRAIN.WARMUP_EPOCHS 0"
    )
    return ModelEma(model, cfg.TRAIN, replace(PLAN, global_batch=global_batch, warmup_updates=warmup_updates))


def trainer_of(network: nn.Module, **changes: Any) -> Trainer:
    """A trainer with a constant learning rate, on the CPU, alone; `changes` are keys of `KEYS`, and fields of a plan or
    of a trainer.
    """
    keys = {key: changes.pop(name, default) for name, (key, default) in KEYS.items()}
    plan = {name: changes.pop(name) for name in ("updates_per_epoch", "global_batch") if name in changes}
    plan["total_updates"] = keys["TRAIN.EPOCHS"] * plan.get("updates_per_epoch", PLAN.updates_per_epoch)
    criterion = changes.setdefault("criterion", nn.CrossEntropyLoss())
    optimizer = changes.setdefault("optimizer", optimizer_of(network))
    parts = {
        "cfg": settings("TRAIN.WARMUP_EPOCHS 0 " + " ".join(f"{key} {value}" for key, value in keys.items())),
        "rank_info": ALONE,
        "plan": replace(PLAN, **plan),
        "network": network,
        "forward": NetworkWithLoss(network, criterion),
        "schedule": schedule_of(optimizer),
        "normalize": Normalize((0.5,) * 3, (0.25,) * 3, dtype=next(network.parameters()).dtype),
        "images": 40,
        "logger": logging.getLogger("tests.engine"),
        "metrics": MetricsWriter(None),
    }
    return Trainer(**parts | changes)


def checkpoint_folder(path: Path, keep: int = 1, meta: dict[str, Any] | None = None) -> CheckpointFolder:
    return CheckpointFolder(path, settings(f"KEEP_CHECKPOINTS {keep} TAG test"), meta or {}, "top1")


def resume(trainer: Trainer, path: Path) -> int:
    """Reads a checkpoint and puts a run where it was left; returns the updates that are recorded."""
    return restore(trainer, read_state(path))
