"""A training run: builds its parts; then, epoch by epoch, trains, evaluates, saves and logs."""

import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from tqdm import tqdm

from data import BatchLoader
from models.checkpoints import Checkpoint
from models.inserted_bn import calibrate, inserted_norms
from models.reparam import is_reparameterizable
from utils import distributed
from utils.files import write_text
from utils.log import MetricsWriter
from utils.memory import clear_about_memory
from utils.signals import Stopped, StopRequest

from .checkpoint import CheckpointFolder, clear_leftovers, find_checkpoint
from .classes import check_resumed_classes
from .compilation import compile_for_training
from .ema import ModelEma
from .evaluate import evaluate
from .optimizer import build_optimizer
from .parallel import wrap
from .plan import plan_training
from .precision import autocast
from .run import Run, open_log, run_folder
from .schedule import build_schedule
from .state import read_state, restore
from .statistics import RunningStatistics
from .sync_batch_norm import synchronise_batch_norms
from .trainer import Trainer
from .usage import workload_of

# Batches of each process from which inserted BatchNorms get their first statistics.
CALIBRATION_BATCHES = 32
# Keys, or what they begin with, on which it depends which images are held out.
DIVISION = ("DATA.VAL_FRACTION", "DATA.FOLD", "DATA.SPLIT_SEED")
# Keys, besides the seed, on which the order of the images of an epoch depends.
ORDER = ("DATA.SAMPLING", "DATA.REPEATED_AUG", "DATA.FORMAT", "DATA.ZIP_MODE", "DATA.CACHE_MODE part")


def train(run: Run) -> None:
    """Trains in the folder of the run, which is locked meanwhile; resumes from a checkpoint found there."""
    with open_log(run, run.task.arch, lock=True) as logger:
        cfg, task, folder = run.cfg, run.task, run_folder(run.cfg, run.task.arch)
        images, test_images = task.train_source, task.val_source
        logger.info(f"{len(images)} training and {len(test_images)} validation images of {len(images.classes)} classes")
        for note in images.notes:
            logger.info(note)
        loader, eval_loader = task.train_loader(), task.eval_loader(task.train_size)
        resumed = checkpoint_to_resume(run, folder, logger)
        network, form = build_network(run, resumed, logger)
        stop = StopRequest()
        meta = task.metadata(task.arch, network, task.train_size, form, task.images_meta)
        checkpoints = CheckpointFolder(folder, cfg, meta, task.metric)
        trainer = build_trainer(run, network, loader, logger)
        recorded = start_or_resume(run, trainer, checkpoints, resumed, loader)
        del resumed  # a copy of the whole state
        if run.rank_info.is_main:
            trainer.metrics = MetricsWriter(folder, recorded, trainer.progress.epoch)
            write_text(folder / "config.yaml", cfg.dump(sort_keys=False))
        with closing(trainer.metrics):
            run_epochs(run, trainer, checkpoints, loader, eval_loader, stop)
        log_end(run, trainer, folder)


def checkpoint_to_resume(run: Run, folder: Path, logger: logging.Logger) -> Checkpoint | None:
    """Returns the run's own newest checkpoint, or else MODEL.RESUME; None for a new run."""
    cfg, own = run.cfg, None
    if cfg.TRAIN.AUTO_RESUME:
        own = find_checkpoint(folder, logger)
    else:
        distributed.broadcast_from_rank0(lambda: clear_leftovers(folder))
    if own is not None and cfg.MODEL.RESUME and not own.path.samefile(cfg.MODEL.RESUME):
        logger.warning(f"resuming from this run's own {own.path} instead of {cfg.MODEL.RESUME}")
    return read_state(cfg.MODEL.RESUME) if own is None and cfg.MODEL.RESUME else own


def build_network(
    run: Run, resumed: Checkpoint | None, logger: logging.Logger
) -> tuple[nn.Module, Literal["train", "deploy"] | None]:
    """Builds the network on the device, with fresh or pretrained weights, in the structure of converted ones.

    Returns:
        The network and its form; None for a network that has one structure only.

    Raises:
        ValueError: the images do not suit the network or the task, or the weights do not fit.
    """
    cfg, task = run.cfg, run.task
    num_outputs = task.num_outputs()
    task.build_metric(num_outputs)  # fails now rather than after an epoch if the test images can't be evaluated
    pretrained = _read_pretrained(run)
    weights = pretrained or resumed
    network = run.place(task.build_network(num_outputs, weights))
    deploy = task.is_converted(weights)
    if weights is not None and deploy:
        logger.info(f"{task.arch} in the deploy structure, since the weights in {weights.path} are converted")
    test_size = task.test_size(task.train_size)
    if test_size and test_size != task.train_size:
        _check_size(network, (task.channels, *test_size), run.rank_info.device)
    if pretrained is not None:
        logger.info(f"starting from {task.load_pretrained(network, pretrained)}")
    cast(Any, network).set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
    return network, "train" if is_reparameterizable(network) else "deploy" if deploy else None


def _read_pretrained(run: Run) -> Checkpoint | None:
    """Reads MODEL.PRETRAINED, if it is set; raises ValueError for it, or a teacher, in the folder of the run."""
    folder = run_folder(run.cfg, run.task.arch).resolve()
    for path in (run.cfg.MODEL.PRETRAINED, run.cfg.DISTILL.TEACHER):
        if path and Path(path).resolve().parent == folder:
            raise ValueError(f"{path} would be replaced by this run's own: give the run another TAG")
    return run.task.read_pretrained()


@torch.inference_mode()
def _check_size(network: nn.Module, size: tuple[int, int, int], device: torch.device) -> None:
    """Raises the error of the first evaluation now if the network does not accept images of this size (C, H, W)."""
    network.eval()(torch.zeros(1, *size, device=device))
    network.train()


def build_trainer(run: Run, network: nn.Module, loader: BatchLoader, logger: logging.Logger) -> Trainer:
    """Builds everything that takes part in an update."""
    cfg, task, rank_info = run.cfg, run.task, run.rank_info
    plan = plan_training(cfg, world_size=rank_info.world_size, steps_per_epoch=len(loader))
    logger.info(f"{task.arch}, {sum(p.numel() for p in network.parameters()):,} parameters; {plan}")
    if place := task.rand_augment_place():
        logger.info(place)
    workload = workload_of(run, network, logger)
    if cfg.TRAIN.SYNC_BN and rank_info.world_size > 1:
        network = synchronise_batch_norms(network)
    num_outputs = task.num_outputs()
    shape = (cfg.DATA.BATCH_SIZE, task.channels, *task.train_size)
    compiled = compile_for_training(network, cfg, rank_info, run.amp, shape, logger)
    criterion = task.build_criterion(num_outputs).to(rank_info.device)
    optimizer = build_optimizer(network, cfg.TRAIN, plan.lr, criterion)
    ema = ModelEma(network, cfg.TRAIN, plan) if cfg.TRAIN.EMA_ALPHA > 0 else None
    if ema is not None:
        period = cfg.TRAIN.EMA_UPDATE_PERIOD
        logger.info(f"moving average of the weights: decay {ema.decay:.6g}, every {period} updates")
    return Trainer(
        cfg=cfg,
        rank_info=rank_info,
        plan=plan,
        network=network,
        forward=wrap(compiled, criterion, cfg, rank_info),
        criterion=criterion,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, cfg.TRAIN.LR_SCHEDULER, plan),
        normalize=task.normalize(),
        images=len(task.train_source),
        logger=logger,
        metrics=MetricsWriter(None),
        rand_augment=task.rand_augment(),
        batch_augmentation=task.batch_augmentation(),
        ema=ema,
        dtype=run.dtype,
        locate=task.train_source.locate,
        classes=task.class_names() or (),
        workload=workload,
    )


def start_or_resume(
    run: Run, trainer: Trainer, checkpoints: CheckpointFolder, checkpoint: Checkpoint | None, loader: BatchLoader
) -> int:
    """Resumes from a checkpoint, or starts at TRAIN.START_EPOCH without one.

    Returns:
        The last update whose record `metrics.jsonl` keeps.

    Raises:
        ValueError: the checkpoint is of another experiment.
    """
    cfg, logger = run.cfg, trainer.logger
    if checkpoint is None:
        trainer.progress.epoch = cfg.TRAIN.START_EPOCH
        if cfg.MODEL.PRETRAINED and inserted_norms(trainer.network):
            calibrate_inserted_norms(run, trainer, loader)
        trainer.progress.update = cfg.TRAIN.START_EPOCH * trainer.plan.updates_per_epoch
        return trainer.progress.update
    checkpoints.check_experiment(checkpoint)
    check_resumed_classes(checkpoint, run.task.class_names(), run.task.train_source, cfg.DATA.DATA_PATH)
    recorded = restore(trainer, checkpoint)
    logger.info(f"resuming from {checkpoint.path}, update {trainer.progress.update}")
    changed = run.changed_settings(checkpoint.payload["config"]) if "saved_as" in checkpoint.payload else []
    check_same_images(checkpoint.path, changed, middle=trainer.progress.consumed > 0)
    if changed:
        logger.warning(f"settings that have changed since: {', '.join(changed)}")
    if checkpoint.path.parent == checkpoints.folder:
        checkpoints.complete(checkpoint)
    if trainer.progress.epoch >= cfg.TRAIN.EPOCHS:
        logger.info(f"already complete: {trainer.progress.epoch} of {cfg.TRAIN.EPOCHS} epochs are done")
    return recorded


def check_same_images(path: Path, changed: list[str], *, middle: bool) -> None:
    """Raises ValueError if settings have changed so that a run would train on other images, or on some of them twice.

    Args:
        path: of the checkpoint.
        changed: the settings that have changed since, as `Run.changed_settings` returns them.
        middle: whether the checkpoint is from the middle of an epoch.
    """
    divided = [change for change in changed if change.startswith(DIVISION)]
    if divided:
        raise ValueError(
            f"{path} was trained on images that would be test images now ({', '.join(divided)}): resume with the old "
            "value, or give this run another TAG"
        )
    order = [change for change in changed if change.startswith(ORDER)]
    if middle and order:
        raise ValueError(
            f"{path} is from the middle of an epoch, whose order of images changes with {', '.join(order)}: "
            "resume with the old value"
        )


def calibrate_inserted_norms(run: Run, trainer: Trainer, loader: BatchLoader) -> None:
    """Gives the BatchNorms inserted into a trained network the statistics of training images; a collective operation.

    Training would otherwise begin by normalising outputs that the network was not trained to have normalised.
    """
    cfg = run.cfg
    left_out = max(0, len(loader) - CALIBRATION_BATCHES)
    loader.set_position(cfg.TRAIN.START_EPOCH, left_out * cfg.DATA.BATCH_SIZE * run.rank_info.world_size)
    with autocast(run.rank_info.device, run.dtype):
        calibrate(trainer.network, map(trainer.inputs, loader), distributed.all_reduce_sum)
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(trainer.network.state_dict())
    trainer.logger.info(f"inserted BatchNorms calibrated on {len(loader)} batches of each process")


def run_epochs(
    run: Run,
    trainer: Trainer,
    checkpoints: CheckpointFolder,
    loader: BatchLoader,
    eval_loader: BatchLoader,
    stop: StopRequest,
) -> None:
    """Trains, evaluates and saves the remaining epochs.

    Raises:
        Stopped: by a signal, with the state saved.
    """
    cfg, progress = run.cfg, trainer.progress

    def after_update() -> bool:
        stopping = bool(stop.agreed())
        if stopping or (cfg.SAVE_STEPS and progress.update % cfg.SAVE_STEPS == 0):
            checkpoints.save(trainer)
        return stopping

    for epoch in range(progress.epoch, cfg.TRAIN.EPOCHS):
        loader.set_position(epoch, progress.consumed)
        bar = tqdm(loader, f"epoch {epoch}", leave=False, disable=None if run.rank_info.is_main else True)
        with clear_about_memory(ways_to_need_less(run)):
            completed = trainer.train_epoch(bar, after_update)
        if not completed:
            trainer.logger.info(f"stopping on request, state saved after update {progress.update}")
            raise Stopped(stop.number)
        RunningStatistics(*trainer.networks).average()
        last = epoch + 1 == cfg.TRAIN.EPOCHS
        due = last or (epoch + 1) % cfg.EVAL_FREQ == 0
        best, best_ema = evaluate_epoch(run, trainer, eval_loader) if due else (False, False)
        periodic = last or (epoch + 1) % cfg.SAVE_FREQ == 0
        checkpoints.save(trainer, periodic=periodic, best=best, best_ema=best_ema)


def ways_to_need_less(run: Run) -> str:
    """Returns the settings with which the same training needs less memory, for an error."""
    cfg, accumulation, ways = run.cfg, max(1, run.cfg.TRAIN.ACCUMULATION_STEPS), list[str]()
    if run.task.least_batch_size <= cfg.DATA.BATCH_SIZE // 2:
        ways.append(
            f"DATA.BATCH_SIZE {cfg.DATA.BATCH_SIZE // 2} with TRAIN.ACCUMULATION_STEPS {2 * accumulation} (the global "
            "batch stays)"
        )
    if not cfg.TRAIN.USE_CHECKPOINT:
        ways.append("TRAIN.USE_CHECKPOINT True")
    if run.dtype is None:
        ways.append("AMP bf16")
    return f"set {' or '.join(ways)}" if ways else "take a machine with more, or a smaller network"


def evaluate_epoch(run: Run, trainer: Trainer, batches: BatchLoader) -> tuple[bool, bool]:
    """Evaluates the weights and their moving average; returns for each whether it is the best so far."""
    best = trainer.progress.improve("best_metric", evaluate_network(run, trainer, trainer.network, "eval", batches))
    if trainer.ema is None:
        return best, False
    figure = evaluate_network(run, trainer, trainer.ema.module, "eval_ema", batches)
    return best, trainer.progress.improve("best_ema_metric", figure)


def evaluate_network(run: Run, trainer: Trainer, network: nn.Module, kind: str, batches: BatchLoader) -> float:
    """Evaluates a network, logs the figures under `kind` and returns the one that selects the best checkpoint."""
    task, device, progress = run.task, run.rank_info.device, trainer.progress
    metric = task.build_metric(task.num_outputs())
    result = evaluate(network, batches, metric, trainer.normalize, device, autocast(device, run.dtype))
    level = logging.WARNING if result.nonfinite and run.rank_info.is_main else logging.INFO
    trainer.logger.log(level, f"Epoch {progress.epoch - 1} {kind}: {result}")
    figures = result.as_dict()
    trainer.metrics.write(kind, progress.update, {"epoch": progress.epoch - 1, **figures})
    # A network without a finite output for any image is never the best one.
    return figures[task.metric] if result.nonfinite < result.images else math.nan


def log_end(run: Run, trainer: Trainer, folder: Path) -> None:
    """Logs a summary of the run."""
    progress, label = trainer.progress, run.task.metric_label
    best = "none" if progress.best_metric is None else f"{progress.best_metric:.3f}"
    trainer.logger.info(
        f"Best {label} {best}; {len(trainer.unreadable)} unreadable images, {progress.skipped} skipped updates; "
        f"weights in {folder}"
    )
