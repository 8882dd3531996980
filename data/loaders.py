"""Batches of transformed images, independent of the number of workers."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from yacs.config import CfgNode

from utils.seed import keyed_rng
from utils.signals import SIGNALS
from utils.text import printable

from .formats import holds_a_part
from .samplers import EvalSampler, SampleKey, TrainSampler
from .sources import Source
from .transport import REFUSALS, SHARED_MEMORY, Failure, Parcel, check_room, with_remedy

MAX_TRIES = 16  # this many unreadable images in a row mean that the storage is gone
DEATH_S = 2.0  # seconds until a dying worker, whose connections are closed, has exited


class Sample(NamedTuple):
    """One transformed image."""

    image: Tensor  # uint8 (C, H, W)
    label: int | Tensor  # of the image, int64 (H, W) of its pixels, or float (K,) of several labels
    index: int  # type: ignore[assignment]  # in the source
    unreadable: list[str]  # `path: reason` of the images that it replaces


class Batch(NamedTuple):
    """Samples, stacked; the consumer decides how many unreadable images are too many."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,) or (N, H, W), or float (N, K)
    indices: Tensor  # int64 (N,)
    unreadable: list[str]

    def pin_memory(self) -> "Batch":
        """Returns the same in page-locked memory."""
        images, labels, indices = (tensor.pin_memory() for tensor in self[:3])
        return Batch(images, labels, indices, self.unreadable)


class TransformedDataset(Dataset[Sample]):
    """The images of a source under a transform whose random numbers depend on (seed, epoch, index) alone."""

    def __init__(self, source: Source, transform: Callable[..., Any], seed: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Returns the image of a sample key, or the next readable one.

        Raises OSError if `MAX_TRIES` images in a row cannot be read.
        """
        image, label, index, unreadable = self._load_readable(key.index)
        with keyed_rng(self.seed, key.epoch, key.index):
            return Sample(*self.transformed(image, label), index, unreadable)

    def __getitems__(self, keys: list[SampleKey]) -> Batch | Parcel | Failure:
        """Returns the batch of these keys; in a data loading process, packed, or a `Failure`."""
        if get_worker_info() is None:
            return self._batch(keys)
        try:
            return Parcel(self._batch(keys))
        except (OSError, ValueError) as error:
            return Failure.of(error)

    def _batch(self, keys: list[SampleKey]) -> Batch:
        with with_remedy():
            return collate([self[key] for key in keys])

    def transformed(self, image: Image.Image, label: Any) -> tuple[Tensor, Any]:
        """Returns the image, uint8 (C, H, W), and its label."""
        return self.transform(image), label

    def _load_readable(self, first: int) -> tuple[Image.Image, Any, int, list[str]]:
        unreadable: list[str] = []
        for index in range(first, first + min(MAX_TRIES, len(self))):
            index %= len(self)
            try:
                image, label = self.source.load(index)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in REFUSALS:
                    raise  # not the fault of the image
                unreadable.append(printable(f"{self.source.locate(index)}: {error}"))
            else:
                return image, label, index, unreadable
        raise OSError(f"{len(unreadable)} images in a row cannot be read, the first being {unreadable[0]}")


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples into a batch; ValueError for images of different sizes."""
    sizes = {tuple(sample.image.shape[1:]) for sample in samples}
    if len(sizes) > 1:
        (h1, w1), (h2, w2) = sorted(sizes)[:2]
        raise ValueError(
            f"images of {h1}x{w1} and {h2}x{w2} don't fit into one batch: set DATA.TEST_BATCH_SIZE to 1, or give all "
            "test images one size by DATA.TEST_SIZE"
        )
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.stack([torch.as_tensor(sample.label) for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        unreadable=[message for sample in samples for message in sample.unreadable],
    )


class BatchLoader(DataLoader[Sample]):
    """A loader that raises the errors of its workers as they were raised, and an OSError if one is killed."""

    _workers: Sequence[multiprocessing.process.BaseProcess] = ()  # they stay for all epochs

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Makes the next iteration begin in `epoch` after `consumed` images; see `TrainSampler.set_position`."""
        assert isinstance(self.sampler, TrainSampler)
        self.sampler.set_position(epoch, consumed)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yields the batches; raises OSError if the system refuses a resource or kills a worker."""
        for item in self._items():
            if isinstance(item, Failure):
                raise item.kind(item.text)
            yield item

    def _items(self) -> Iterator[Batch | Failure]:
        at_death, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
        try:
            if self.num_workers and not self._workers:
                check_room(self.num_workers)
            batches = super().__iter__()
            self._workers = self._workers or [p for p in multiprocessing.active_children() if p not in others]
            if threading.current_thread() is threading.main_thread():
                # torch's handler would raise at any point, even within an update; without it, the loader notices a
                # dead worker within seconds when it waits for a batch.
                signal.signal(signal.SIGCHLD, at_death or signal.SIG_DFL)
            for item in batches:
                yield item.open() if isinstance(item, Parcel) else item
        except (RuntimeError, ConnectionError, EOFError) as error:
            # torch reports the workers that have exited; one that is exiting has already closed its connections.
            reported = str(error).startswith("DataLoader worker (pid")
            if not reported and not connection.wait([worker.sentinel for worker in self._workers], timeout=DEATH_S):
                raise
            if any(worker.exitcode == -signal.SIGBUS for worker in self._workers):
                raise OSError(SHARED_MEMORY) from error
            reason = (str(error) or type(error).__name__).splitlines()[-1]
            raise OSError(
                f"a data loading process was killed, probably for want of memory: lower DATA.NUM_WORKERS ({reason})"
            ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(_worker: int) -> None:
    """Makes a worker ignore signals to all processes of a job: the run needs batches until it has saved.

    Only signals of the run itself end a worker.
    """
    run = multiprocessing.parent_process()
    assert run is not None

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != run.pid:
            pass
        os._exit(0)

    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch's handler would print
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=wait, daemon=True).start()


def build_train_loader(
    source: Source,
    transform: Callable[..., Any],
    cfg: CfgNode,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    dataset: type[TransformedDataset] = TransformedDataset,
) -> BatchLoader:
    """Returns a loader of this rank's `Batch`es, all of exactly BATCH_SIZE images; `cfg` is the section DATA.

    `dataset` applies the transform. Call `set_position` before each epoch. Raises ValueError if the images do not fill
    a step.
    """
    sampler = TrainSampler(
        len(source),
        batch_size=cfg.BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        seed=seed,
        fixed_shards=holds_a_part(cfg),
    )
    return _build_loader(dataset(source, transform, seed), sampler, cfg.BATCH_SIZE, cfg)


def build_eval_loader(
    source: Source,
    transform: Callable[..., Any],
    cfg: CfgNode,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    dataset: type[TransformedDataset] = TransformedDataset,
) -> BatchLoader:
    """Returns a loader of this rank's `Batch`es: each image once over all ranks; the last batch may be smaller.

    `cfg` is the section DATA; `dataset` applies the transform. `batch_size` replaces BATCH_SIZE as the default of
    TEST_BATCH_SIZE.
    """
    sampler = EvalSampler(len(source), rank=rank, world_size=world_size)
    size = cfg.TEST_BATCH_SIZE or batch_size or cfg.BATCH_SIZE
    return _build_loader(dataset(source, transform), sampler, size, cfg)


def _build_loader(
    dataset: TransformedDataset, sampler: TrainSampler | EvalSampler, batch_size: int, cfg: CfgNode
) -> BatchLoader:
    num_workers = min(cfg.NUM_WORKERS, len(os.sched_getaffinity(0)))  # more than one per core would compete
    return BatchLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=num_workers,  # torch gives each worker a single thread
        worker_init_fn=_leave_signals_to_the_run,
        persistent_workers=num_workers > 0,
        pin_memory=cfg.PIN_MEMORY and torch.cuda.is_available(),
        generator=torch.Generator(),  # each iteration draws from it, and must not disturb the global one
    )
