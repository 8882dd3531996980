"""The training loop: an epoch of updates, none of which makes the host wait for the device."""

import datetime
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from data import Batch, BatchRandAugment, BatchTransform, Normalize
from utils.distributed import RankInfo
from utils.log import MetricsWriter
from utils.meters import Mean, Pace
from utils.seed import seed_everything
from utils.transfer import CopyStream

from .compilation import without_effect
from .ema import ModelEma
from .finite_guard import FiniteGuard
from .picture import Sample, captions, picture, take_sample
from .plan import TrainingPlan
from .precision import autocast
from .usage import Workload, usage

# Backward passes after which the buckets of DistributedDataParallel are final: one records the order in which gradients
# are ready; with a static graph, another one before it records the graph.
BUCKET_ORDERING_PASSES = 2


@dataclass
class Progress:
    """How far a run has come; with the weights and the optimizer, all it needs to resume."""

    epoch: int = 0  # the one being trained
    consumed: int = 0  # images of that epoch trained on, over all processes
    update: int = 0  # optimizer updates done, including skipped ones
    best_metric: float | None = None  # of the weights, in the evaluations so far
    best_ema_metric: float | None = None  # of their moving average
    skipped: int = 0  # updates skipped because the loss or a gradient was not finite

    def improve(self, name: str, figure: float) -> bool:
        """Stores a figure in the field `name` if it is the best so far, and returns whether it is (nan: no)."""
        best = getattr(self, name)
        better = figure > (-math.inf if best is None else best)
        if better:
            setattr(self, name, figure)
        return better


@dataclass
class Trainer:
    """Everything that takes part in an update.

    Attributes:
        network: the module that is trained.
        forward: network and criterion, compiled and distributed; returns the loss of images and targets.
        criterion: the loss; its parameters are saved with the run.
        images: the size of the training set.
        dtype: of autocast; None for no autocast; float16 uses a loss scale.
        locate: returns the path of an image of the training set.
        rand_augment: of whole batches, before `normalize`.
        classes: the names of the classes, for TensorBoard.
        workload: what an image costs, for the log.
    """

    cfg: CfgNode
    rank_info: RankInfo
    plan: TrainingPlan
    network: nn.Module
    forward: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    normalize: Normalize
    images: int
    logger: logging.Logger
    metrics: MetricsWriter
    rand_augment: BatchRandAugment | None = None
    batch_augmentation: BatchTransform | None = None
    ema: ModelEma | None = None
    dtype: torch.dtype | None = None
    locate: Callable[[int], str] = str
    classes: Sequence[str] = ()
    workload: Workload = field(default_factory=Workload)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        device = self.rank_info.device
        self.accumulation = max(1, self.cfg.TRAIN.ACCUMULATION_STEPS)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._guard = FiniteGuard(self.network, self.cfg, self.scaler, self.locate, self.logger)
        self.unreadable: set[str] = set()  # paths, with the reason
        self._copies = CopyStream(device)
        self._buckets_ordered = not isinstance(self.forward, DistributedDataParallel)
        # Since the last report, and for the whole epoch; saved in checkpoints.
        self.meters = {name: Mean(device) for name in ("loss", "grad_norm", "epoch_loss")}
        self._lap, self._epoch = Pace(), Pace()  # likewise, but not saved
        self._sampled = False
        self._sample: Sample | None = None  # the first batch of this start, until TensorBoard shows it

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and its moving average if there is one."""
        return [self.network] + ([self.ema.module] if self.ema is not None else [])

    def train_epoch(self, batches: Iterable[Batch], after_update: Callable[[], bool] = lambda: False) -> bool:
        """Trains on the rest of the current epoch and advances `progress` to the next one.

        Args:
            batches: of this process, from the position of `progress` on.
            after_update: called after each update; returns whether to stop within the epoch.

        Returns:
            Whether the epoch was completed.

        Raises:
            ValueError: too many unreadable images or skipped updates.
        """
        self.forward.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._start_clocks()
        for group in _groups(self._timed(batches), self.accumulation):
            self._update(group)
            if self.progress.update % self.cfg.PRINT_FREQ == 0:
                self._report()
            if after_update():
                return False
            self._start_clocks()
        self._report_epoch()
        self.progress.epoch, self.progress.consumed = self.progress.epoch + 1, 0
        return True

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and counts the seconds that the host waits for each."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            for pace in (self._lap, self._epoch):
                pace.wait(time.perf_counter() - start)
            if batch is None:
                return
            yield batch

    def _update(self, group: list[Batch]) -> None:
        """Runs forward and backward on each batch of a group, then updates the weights once."""
        if not self._buckets_ordered:
            self._order_buckets(group[0])
        progress = self.progress
        # Drop path is a function of the position in the run, so that a resumed run draws the same.
        seed_everything(self.cfg.SEED, progress.epoch, progress.update, self.rank_info.rank, 2)
        self._guard.before_update()
        loss = torch.stack([self._backward(batch, i, len(group)) for i, batch in enumerate(group)]).mean()
        self.schedule.step_update(progress.update)
        grad_norm = self._clip_gradients()
        skipped = ~grad_norm.isfinite()  # the gradients are averaged over all processes, so all decide alike
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused optimizers skip the update if this is 1, as they do for a loss scale.
            vars(self.optimizer).update(found_inf=skipped.float(), grad_scale=None)
            self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        self._guard.after_update(progress.update, skipped, loss, lr, [batch.indices for batch in group])
        self.optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        if self.ema is not None:
            self.ema.update(self.network, progress.update)
        self._count(loss, grad_norm, sum(len(batch.labels) for batch in group))

    def inputs(self, batch: Batch) -> Tensor:
        """Returns the images of a batch of the current epoch on the device, normalised, before batch augmentation."""
        images = self._copies.send(batch.images)
        if self.rand_augment is not None:
            images = self.rand_augment(images, batch.indices, epoch=self.progress.epoch, repeats=batch.repeats)
        normalized: Tensor = self.normalize(images)
        return normalized

    def _backward(self, batch: Batch, index: int, size: int) -> Tensor:
        """Accumulates the gradient of batch `index` in a group of `size`; returns its loss, on the device."""
        device, progress = self.rank_info.device, self.progress
        self._note_unreadable(batch.unreadable)
        images, targets = self.inputs(batch), self._copies.send(batch.labels)
        if self.batch_augmentation is not None:
            step = progress.update * self.accumulation + index
            images, targets = self.batch_augmentation(images, targets, epoch=progress.epoch, step=step)
        if not self._sampled and self.metrics.is_open:
            self._sampled = True
            self._sample = take_sample(images, targets, self.normalize, progress.update + 1)
        # Gradients are synchronised once per update, in the backward pass of the last batch.
        waits = index + 1 < size and isinstance(self.forward, DistributedDataParallel)
        with self.forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with autocast(device, self.dtype):
                loss = self.forward(images, targets)
            self.scaler.scale(loss / size).backward()
        return loss.detach()

    def _clip_gradients(self) -> Tensor:
        """Clips the norm of the gradients; returns the norm before clipping, without loss scale."""
        self.scaler.unscale_(self.optimizer)
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(learning, self.cfg.TRAIN.CLIP_GRAD or torch.inf)

    def _count(self, loss: Tensor, grad_norm: Tensor, images: int) -> None:
        """Adds an update on this number of images of this process to the progress and the meters."""
        everywhere = images * self.rank_info.world_size
        self.progress.consumed += everywhere
        for name in ("loss", "epoch_loss"):
            self.meters[name].add(loss, images)
        self.meters["grad_norm"].add(grad_norm)
        for pace in (self._lap, self._epoch):
            pace.add(everywhere)

    def _order_buckets(self, batch: Batch) -> None:
        """Runs backward passes without effect, so that the first update already uses the final gradient buckets.

        DistributedDataParallel regroups gradients after the first backward passes of each process. The grouping affects
        the rounding of sums over three or more processes, so the first update of a resumed run would otherwise differ.
        """
        with without_effect(self.forward):
            for _ in range(BUCKET_ORDERING_PASSES):
                self._backward(batch, 0, 1)
                self.optimizer.zero_grad(set_to_none=True)
        self._buckets_ordered = True

    def _note_unreadable(self, images: list[str]) -> None:
        """Logs each unreadable image once; raises ValueError if there are too many."""
        for image in images:
            if image not in self.unreadable:
                self.unreadable.add(image)
                self.logger.warning(f"unreadable image replaced: {image}")
        limit = self.cfg.DATA.MAX_UNREADABLE
        if len(self.unreadable) > limit:
            raise ValueError(
                f"{len(self.unreadable)} training images can't be read, DATA.MAX_UNREADABLE is {limit}; the last one "
                f"is {images[-1]}"
            )

    def check_skipped(self) -> None:
        """Counts the updates skipped since the last check; waits for the device, raises as `train_epoch`.

        Stops the clocks, so that the report, evaluation or checkpoint that follows is not timed.
        """
        self.progress.skipped = self._guard.check_skipped(self.progress.skipped)
        for pace in (self._lap, self._epoch):
            pace.stop()

    def _start_clocks(self) -> None:
        """Starts the clocks that `check_skipped` has stopped."""
        for pace in (self._lap, self._epoch):
            pace.start()

    def _report(self) -> None:
        """Logs the updates since the last report; within an epoch, only this and checkpoints wait for the device."""
        self.check_skipped()
        self._show_sample()
        progress, plan, lap = self.progress, self.plan, self._lap
        used = usage(lap, self.workload, self.rank_info)
        loss, grad_norm = self._take("loss"), self._take("grad_norm")
        left = (plan.total_updates - progress.update) * lap.seconds_per_update
        lr = self.optimizer.param_groups[0]["lr"]
        self.logger.info(
            f"Train: [{progress.epoch}/{self.cfg.TRAIN.EPOCHS}]"
            f"[{progress.update - progress.epoch * plan.updates_per_epoch}/{plan.updates_per_epoch}]  "
            f"eta {datetime.timedelta(seconds=int(left))}  lr {lr:.6g}  loss {loss:.4f}  grad_norm {grad_norm:.4f}  "
            f"{used}"
        )
        values = {"epoch": progress.epoch, "lr": lr, "loss": loss, "grad_norm": grad_norm}
        self.metrics.write("train", progress.update, values, used.as_dict())
        lap.reset()

    def _report_epoch(self) -> None:
        """Logs the epoch that has ended."""
        self.check_skipped()
        self._show_sample()
        progress, loss, rate = self.progress, self._take("epoch_loss"), self._epoch.images_per_second
        self.logger.info(f"Epoch {progress.epoch} train: loss {loss:.4f}  {rate:.1f} img/s")
        values = {"epoch": progress.epoch, "loss": loss}
        self.metrics.write("train_epoch", progress.update, values, {"images_per_second": rate})
        self._epoch.reset()

    def _show_sample(self) -> None:
        """Shows the first batch of this start in TensorBoard, once; the device has been waited for."""
        if self._sample is not None:
            self.metrics.show(self._sample.update, picture(self._sample), captions(self._sample, self.classes))
            self._sample = None

    def _take(self, name: str) -> float:
        """Returns a mean and resets it."""
        mean = self.meters[name].compute()
        self.meters[name].reset()
        return mean


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups batches into lists of `size`; a shorter last one is dropped."""
    iterator = iter(batches)
    while len(group := list(itertools.islice(iterator, size))) == size:
        yield group
