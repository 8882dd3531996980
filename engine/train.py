"""The training loop: one epoch of updates, without making the host wait for the device in any of them."""

import datetime
import itertools
import logging
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Batch, Mixing
from utils.distributed import Process
from utils.log import MetricsWriter
from utils.meters import Mean, Pace
from utils.seed import seed_everything

from .ema import ModelEma
from .finite import FiniteGuard


@dataclass
class Progress:
    """How far a run has come; with the weights and the optimizer, all that it needs to resume."""

    epoch: int = 0  # the one being trained
    consumed: int = 0  # images of it that have been trained on, over all processes
    update: int = 0  # optimizer updates done since the start
    best_top1: float = 0.0
    best_ema_top1: float = 0.0
    skipped: int = 0  # updates left out because a number was not finite


# Backward passes after which DistributedDataParallel has ordered its buckets for good: one records the order in which
# gradients are ready, and where the graph is static, the very first one records the graph alone.
BUCKET_ORDERING_PASSES = 2
# Mixed precision by the words that users have for it.
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Returns the precision of a forward pass: that of the weights for None, else mixed with `dtype`."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


def data_parallel(forward: nn.Module, process: Process, *, static_graph: bool) -> nn.Module:
    """Synchronises a network's gradients wherever there is more than one process.

    Args:
        forward: the network, compiled or not, on the device.
        process: this one.
        static_graph: every backward pass synchronises the same gradients.
    """
    if process.world_size == 1:
        return forward
    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers; the old name is the one that 2.11 knows too.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            forward,
            device_ids=[process.device.index] if process.device.type == "cuda" else None,
            broadcast_buffers=False,  # the statistics are brought together once, before they are used
            gradient_as_bucket_view=True,
            static_graph=static_graph,
        )


@dataclass
class Trainer:
    """Everything that takes part in an update.

    `network` is the module that is trained, `forward` the same behind DistributedDataParallel and compilation. `dtype`
    is that of autocast, None for the precision of the weights; float16 goes with a loss scale. `images` counts the
    training set, `global_batch` the images of one update over all processes.
    """

    network: nn.Module
    forward: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    normalize: nn.Module
    process: Process
    images: int
    epochs: int
    updates_per_epoch: int
    global_batch: int
    logger: logging.Logger
    metrics: MetricsWriter
    mixing: Mixing | None = None
    ema: ModelEma | None = None
    dtype: torch.dtype | None = None
    accumulation: int = 1
    clip_grad: float = 0.0
    print_freq: int = 10
    seed: int = 0
    max_unreadable: int = 0
    max_skipped: int = 0
    locate: Callable[[int], str] = str  # where an image of the training set lies
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=self.dtype is torch.float16)
        self.guard = FiniteGuard(
            self.network,
            self.optimizer,
            self.scaler,
            window=self.print_freq,
            limit=self.max_skipped,
            locate=self.locate,
            logger=self.logger,
        )
        self.unreadable: set[str] = set()  # paths, with the reason
        self._buckets_ordered = not isinstance(self.forward, DistributedDataParallel)
        # Two since the last report, and one for the whole epoch; checkpoints keep them.
        self.meters = {name: Mean(self.process.device) for name in ("loss", "grad_norm", "epoch_loss")}
        self._lap, self._epoch = Pace(), Pace()  # likewise, of this process's life

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and the averaged one where there is one."""
        return [self.network] + ([self.ema.module] if self.ema is not None else [])

    def train_epoch(self, batches: Iterable[Batch], after_update: Callable[[], bool] = lambda: False) -> bool:
        """Trains on the rest of the epoch that `progress` stands in and moves `progress` to the next one.

        Args:
            batches: this process's, from the position that `progress` names.
            after_update: called after each update; returns whether to stop there, in the middle of the epoch.

        Returns:
            Whether the epoch came to its end.

        Raises:
            ValueError: too many images that can't be read, or too many updates that had to be skipped.
        """
        self.forward.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._start_watches()
        for group in _groups(batches, self.accumulation):
            self._update(group)
            if self.progress.update % self.print_freq == 0:
                self._report()
            if after_update():
                return False
            self._start_watches()
        self._report_epoch()
        self.progress.epoch, self.progress.consumed = self.progress.epoch + 1, 0
        return True

    def _update(self, group: list[Batch]) -> None:
        """Runs forward and backward over a group of batches, then updates once."""
        if not self._buckets_ordered:
            self._order_buckets(group[0])
        progress = self.progress
        # Drop path and its like draw from the place in the run, so that a resumed run draws the same.
        seed_everything(self.seed, progress.epoch, progress.update, self.process.rank, 2)
        statistics = self.guard.before()
        losses = [self._backward(batch, i, len(group)) for i, batch in enumerate(group)]
        self.schedule.step_update(progress.update)
        self.scaler.unscale_(self.optimizer)
        # What the loss learns counts, too.
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(learning, self.clip_grad or torch.inf)
        loss = torch.stack(losses).mean()
        self.guard.step(progress.update, loss, grad_norm, statistics, [batch.indices for batch in group])
        self.optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        if self.ema is not None:
            self.ema.update(self.network, progress.update)
        images = sum(len(batch.labels) for batch in group)
        progress.consumed += images * self.process.world_size
        for name in ("loss", "epoch_loss"):
            self.meters[name].add(loss, images)
        self.meters["grad_norm"].add(grad_norm)
        for pace in (self._lap, self._epoch):
            pace.add(images * self.process.world_size)

    def _backward(self, batch: Batch, index: int, size: int) -> Tensor:
        """Adds the gradient of batch `index` of a group of `size`; returns its loss, on the device."""
        device, progress = self.process.device, self.progress
        self._note_unreadable(batch.unreadable)
        images = self.normalize(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        if self.mixing is not None:
            step = progress.update * self.accumulation + index
            images, labels = self.mixing(images, labels, epoch=progress.epoch, step=step)
        # Gradients need to meet once an update only: while the last batch of the group goes back.
        waits = index + 1 < size and isinstance(self.forward, DistributedDataParallel)
        with self.forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with autocast(device, self.dtype):
                loss = self.criterion(self.forward(images), labels)
            self.scaler.scale(loss / size).backward()
        return loss.detach()

    def _order_buckets(self, batch: Batch) -> None:
        """Runs backward passes that leave no trace, so that the first update already has the final gradient buckets.

        DistributedDataParallel groups gradients anew after the first backward passes of each process. The grouping
        decides how sums over three and more processes are rounded, so a resumed run would otherwise differ in its first
        update from one that was never interrupted.
        """
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        for _ in range(BUCKET_ORDERING_PASSES):
            self._backward(batch, 0, 1)
            self.optimizer.zero_grad(set_to_none=True)
        for buffer, saved in zip(self.network.buffers(), buffers, strict=True):
            buffer.copy_(saved)
        self._buckets_ordered = True

    def _note_unreadable(self, images: list[str]) -> None:
        """Logs each image that another one had to stand in for once, and stops the run when there are too many."""
        for image in images:
            if image not in self.unreadable:
                self.unreadable.add(image)
                self.logger.warning(f"unreadable image replaced: {image}")
        if len(self.unreadable) > self.max_unreadable:
            raise ValueError(
                f"{len(self.unreadable)} training images can't be read, DATA.MAX_UNREADABLE is {self.max_unreadable}; "
                f"the last one is {images[-1]}"
            )

    def look(self) -> None:
        """Counts the updates that were skipped since the last look; waits for the device, raises as `train_epoch`.

        What comes after it, a report, an evaluation or a checkpoint, takes none of the time that is measured.
        """
        self.progress.skipped = self.guard.look(self.progress.skipped)
        for pace in (self._lap, self._epoch):
            pace.stop()

    def _start_watches(self) -> None:
        """Starts measuring time again, where `look` has stopped it."""
        for pace in (self._lap, self._epoch):
            pace.start()

    def _report(self) -> None:
        """Logs what came together since the last report; in an epoch, only this and checkpoints wait for the device."""
        self.look()
        progress, lap = self.progress, self._lap
        loss, grad_norm = self._take("loss"), self._take("grad_norm")
        left = (self.epochs * self.updates_per_epoch - progress.update) * lap.seconds_per_update
        lr = self.optimizer.param_groups[0]["lr"]
        self.logger.info(
            f"Train: [{progress.epoch}/{self.epochs}]"
            f"[{progress.update - progress.epoch * self.updates_per_epoch}/{self.updates_per_epoch}]  "
            f"eta {datetime.timedelta(seconds=int(left))}  lr {lr:.6g}  loss {loss:.4f}  grad_norm {grad_norm:.4f}  "
            f"{lap.images_per_second:.1f} img/s  mem {_peak_memory(self.process.device):.0f} MiB"
        )
        values = {"epoch": progress.epoch, "lr": lr, "loss": loss, "grad_norm": grad_norm}
        self.metrics.write("train", progress.update, values, {"images_per_second": lap.images_per_second})
        lap.reset()

    def _report_epoch(self) -> None:
        """Logs what came together in the epoch that has ended."""
        self.look()
        progress, loss, rate = self.progress, self._take("epoch_loss"), self._epoch.images_per_second
        self.logger.info(f"Epoch {progress.epoch} train: loss {loss:.4f}  {rate:.1f} img/s")
        values = {"epoch": progress.epoch, "loss": loss}
        self.metrics.write("train_epoch", progress.update, values, {"images_per_second": rate})
        self._epoch.reset()

    def _take(self, name: str) -> float:
        """Returns a mean, which begins anew."""
        mean = self.meters[name].compute()
        self.meters[name].reset()
        return mean


def _peak_memory(device: torch.device) -> float:
    """Returns the most MiB in use so far: of the GPU's memory by tensors, or of the host's by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Cuts batches into lists of `size`; a shorter last one is left out, as images that fill no batch are."""
    iterator = iter(batches)
    while len(group := list(itertools.islice(iterator, size))) == size:
        yield group
