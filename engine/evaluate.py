"""Evaluation of one network, or of two side by side, by the metric of the task, exact over all processes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from operator import getitem

import torch
from torch import nn

from data import Batch
from models.checkpoints import read_checkpoint
from models.reparam import relative
from utils import distributed
from utils.memory import clear_about_memory
from utils.transfer import CopyStream, send

from .metrics import Metric, Result
from .precision import autocast
from .run import Run, open_log

SMALLER_BATCHES = "set a lower DATA.TEST_BATCH_SIZE (-b)"


def evaluate_checkpoint(run: Run) -> None:
    """Evaluates the checkpoint MODEL.RESUME, in either form; the training set is not read.

    Architecture, image size and classes are those of the checkpoint unless the configuration sets them.
    """
    cfg, task, device = run.cfg, run.task, run.rank_info.device
    checkpoint = read_checkpoint(cfg.MODEL.RESUME, ema=cfg.TEST.EMA)
    trained_for = checkpoint.meta.get("task", task.name)
    if trained_for != task.name:
        raise ValueError(
            f"{checkpoint.path} is of TASK {trained_for}, the configuration of TASK {task.name}: give the recipe that "
            "it was trained by, or set TASK and DATA.DATASET"
        )
    arch = cfg.MODEL.ARCH if "MODEL.ARCH" in run.given else None
    network = task.network_to_evaluate(checkpoint, arch)
    with open_log(run, network.arch) as logger:
        task.check_classes(checkpoint.path, network.num_classes)
        for key, value in task.settings_of(network).items():
            given = reduce(getitem, key.split("."), cfg)
            if key in run.given and given != value:
                logger.warning(f"{key} {given} is ignored: the checkpoint has {value}")
        logger.info(f"{checkpoint}, {len(task.val_source)} images of {len(task.val_source.classes)} classes")
        for note in task.val_source.notes:
            logger.info(note)
        model = run.place(network.model.float())
        batches, metric = task.eval_loader(network.image_size), task.build_metric(network.num_classes)
        result = evaluate(model, batches, metric, task.normalize(), device, autocast(device, run.dtype))
        refuse_nonfinite(result)
        for line in result.details(task.val_source.classes):
            logger.info(f"  {line}")
        logger.info(f"* {result}")


@clear_about_memory(SMALLER_BATCHES)
@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    metric: Metric,
    normalize: nn.Module,
    device: torch.device,
    precision: AbstractContextManager,
) -> Result:
    """Evaluates a network in evaluation mode, and restores the mode that it was in.

    Args:
        network: on the device.
        batches: over all processes, every image once; their number may differ between processes.
        metric: a new one.
        normalize: maps uint8 images (N, C, H, W) on the device to the input of the network.
        device: of the network.
        precision: context of the forward pass.

    Raises:
        ValueError: an image can't be read, or there are none.
    """
    was_training, unreadable, copies = network.training, list[str](), CopyStream(device)
    network.eval()
    metric.begin(network)
    for batch in batches:
        with precision:
            outputs = network(normalize(copies.send(batch.images)))
        metric.update(outputs, batch)
        unreadable += batch.unreadable
    network.train(was_training)
    _refuse_unreadable(unreadable, device)
    return metric.compute()


def refuse_nonfinite(result: Result) -> None:
    """Raises ValueError if outputs of the network were not finite, so that the figures mean nothing."""
    if result.nonfinite:
        raise ValueError(
            f"the network's outputs for {result.nonfinite} of {result.images} images are not finite: its "
            "weights are broken, or too large for half precision (AMP off shows which)"
        )


def _refuse_unreadable(unreadable: list[str], device: torch.device) -> None:
    """Raises ValueError on all processes if any of them could not read an image."""
    count = int(distributed.all_reduce_sum(send(torch.tensor(len(unreadable)), device)))
    if count:
        example = unreadable[0] if unreadable else "see the error of another process"
        raise ValueError(f"{count} images can't be read, so the figures would be wrong: {example}")


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same images.

    Attributes:
        first: the figures of one.
        second: the figures of the other.
        agreement: percent of the images, or pixels, that both assign to the same class, with finite logits; None if the
            outputs are not logits.
        difference: max |second - first| / max |first| over all outputs, infinite if one is not finite.
    """

    first: Result
    second: Result
    agreement: float | None
    difference: float


@clear_about_memory(SMALLER_BATCHES)
@torch.inference_mode()
def compare(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Batch],
    metrics: tuple[Metric, Metric],
    normalize: nn.Module,
    device: torch.device,
    precision: AbstractContextManager,
) -> Comparison:
    """Evaluates two networks in evaluation mode side by side, in one process; otherwise as `evaluate`."""
    largest, scale, same, compared = torch.zeros(4, dtype=torch.float64, device=device)
    unreadable, copies = list[str](), CopyStream(device)
    for metric, network in zip(metrics, (first, second), strict=True):
        metric.begin(network)
    for batch in batches:
        images = normalize(copies.send(batch.images))
        with precision:
            outputs = first(images), second(images)
        for metric, output in zip(metrics, outputs, strict=True):
            metric.update(output, batch)
        unreadable += batch.unreadable
        expected, actual = (output.double() for output in outputs)
        largest = largest.maximum((actual - expected).abs().max())
        scale = scale.maximum(expected.abs().max())
        predictions = [metric.predictions(output) for metric, output in zip(metrics, outputs, strict=True)]
        if predictions[0] is not None:
            finite = (expected.isfinite() & actual.isfinite()).all(1)
            same += ((predictions[0] == predictions[1]) & finite).sum()
            compared += finite.numel()
    _refuse_unreadable(unreadable, device)
    agreement = 100 * float(same / compared) if compared else None
    return Comparison(metrics[0].compute(), metrics[1].compute(), agreement, relative(largest, scale))
