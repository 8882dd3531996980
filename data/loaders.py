"""Batches of transformed images, independent of the number of workers."""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from yacs.config import CfgNode

from utils.seed import local_rng
from utils.signals import SIGNALS
from utils.text import printable

from .formats import holds_a_part
from .pixels import DecodedImage
from .samplers import UNIFORM, EvalSampler, SampleKey, TrainSampler
from .sources import ImageSource, Source
from .storage import PATIENCE_S, PendingReads, check_folder
from .transport import REFUSALS, SHARED_MEMORY, Failure, Parcel, check_room, with_remedy

MAX_TRIES = 16  # this many unreadable images in a row mean that the storage is gone
DEATH_S = 2.0  # seconds until a dying worker, whose connections are closed, has exited


class Sample(NamedTuple):
    """One transformed image."""

    image: Tensor  # uint8 (C, H, W)
    label: int | Tensor  # of the image, int64 (H, W) of its pixels, or float (K,) of several labels
    index: int  # type: ignore[assignment]  # in the source
    unreadable: list[str]  # `path: reason` of the images that it replaces
    repeat: int = 0  # of the key


class Batch(NamedTuple):
    """Samples, stacked; the consumer decides how many unreadable images are too many."""

    images: Tensor  # uint8 (N, C, H, W), in memory by pixels: channels last
    labels: Tensor  # int64 (N,) or (N, H, W), or float (N, K)
    indices: Tensor  # int64 (N,)
    unreadable: list[str]
    repeats: Tensor | None = None  # int64 (N,), those of the keys; None: all 0

    def pin_memory(self) -> "Batch":
        """Returns the same, what goes to the device in page-locked memory."""
        images, labels, indices = (tensor.pin_memory() for tensor in self[:3])
        return self._replace(images=images, labels=labels, indices=indices)


def most_workers() -> int:
    """Returns how many data loading processes there may be: more than one per core would compete."""
    return len(os.sched_getaffinity(0))


class TransformedDataset(Dataset[Sample]):
    """The images of a source under a transform whose random numbers depend on the seed and the sample key alone."""

    def __init__(self, source: Source, transform: Callable[..., Any], seed: int = 0) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.reads = PendingReads(source.locate, slots=most_workers())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Returns the image of a sample key, or the next readable one.

        Raises OSError if `MAX_TRIES` images in a row cannot be read.
        """
        image, label, index, unreadable = self._load_readable(key.index)
        rng = local_rng(self.seed, *key)
        return Sample(*self.transformed(image, label, rng), index, unreadable, key.repeat)

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
            return collate((self[key] for key in keys), len(keys))

    def transformed(self, image: DecodedImage, label: Any, rng: random.Random) -> tuple[Tensor, Any]:
        """Returns the image, uint8 (C, H, W), and its label; `rng` is for all that is drawn."""
        return self.transform(image, rng), label

    def _load_readable(self, first: int) -> tuple[DecodedImage, Any, int, list[str]]:
        unreadable: list[str] = []
        for index in range(first, first + min(MAX_TRIES, len(self))):
            index %= len(self)
            try:
                with self.reads.of(index):
                    image, label = self.source.load(index)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError):
                    if error.errno in REFUSALS:
                        raise  # not the fault of the image
                    check_folder(error)
                unreadable.append(printable(f"{self.source.locate(index)}: {error}"))
            else:
                return image, label, index, unreadable
        raise OSError(f"{len(unreadable)} images in a row cannot be read, the first being {unreadable[0]}")


def collate(samples: Iterable[Sample], count: int) -> Batch:
    """Makes a batch of `count` samples; ValueError for images of different sizes.

    Each image is copied to its place as soon as it is there. In a data loading process, that is in the shared memory
    in which the batch is sent.
    """
    images, labels, indices, repeats, unreadable = None, [], [], [], list[str]()
    for position, sample in enumerate(samples):
        if images is None:
            images = _empty_images(count, *sample.image.shape)
        elif images.shape[1:] != sample.image.shape:
            raise ValueError(_differ(images, sample.image))
        images[position] = sample.image
        labels.append(sample.label)
        indices.append(sample.index)
        repeats.append(sample.repeat)
        unreadable += sample.unreadable
    assert images is not None
    return Batch(images, default_collate(labels), torch.tensor(indices), unreadable, torch.tensor(repeats))


def _empty_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Allocates images (N, C, H, W); by pixels, as they are decoded and resized."""
    size = count * height * width * channels
    if get_worker_info() is None:
        pixels = torch.empty(size, dtype=torch.uint8)
    else:  # as `default_collate` does, which would put the images there in another order
        pixels = torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    return pixels.view(count, height, width, channels).permute(0, 3, 1, 2)


def _differ(images: Tensor, image: Tensor) -> str:
    (h1, w1), (h2, w2) = sorted(tuple(some.shape[-2:]) for some in (images, image))
    return (
        f"images of {h1}x{w1} and {h2}x{w2} don't fit into one batch: set DATA.TEST_BATCH_SIZE to 1, or give all "
        "test images one size by DATA.TEST_SIZE"
    )


class BatchLoader(DataLoader[Sample]):
    """A loader that raises the errors of its workers as they were raised, and an OSError if one is killed.

    It logs which image it waits for when a read takes longer than `patience_s`.
    """

    patience_s = PATIENCE_S
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
            with self.dataset.reads.named(self.patience_s):  # type: ignore[attr-defined]  # all of ours have them
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
    a step, or can't be sampled as SAMPLING says.
    """
    sampler = TrainSampler(
        len(source),
        batch_size=cfg.BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        seed=seed,
        fixed_shards=holds_a_part(cfg),
        sampling=cfg.SAMPLING,
        repeats=cfg.REPEATED_AUG,
        labels=None if cfg.SAMPLING == UNIFORM else _classes_of_images(source),
    )
    return build_loader(dataset(source, transform, seed), sampler, cfg.BATCH_SIZE, cfg)


def _classes_of_images(source: Source) -> np.ndarray:
    """Returns the class of each image, int64 (N,); raises ValueError where images have labels of another kind."""
    if not isinstance(source, ImageSource):
        raise ValueError(
            "DATA.SAMPLING balances classes, and these images have no single class each: set it to uniform"
        )
    return source.labels


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
    return build_loader(dataset(source, transform), sampler, size, cfg)


def build_loader(
    dataset: Dataset[Any], sampler: TrainSampler | EvalSampler, batch_size: int, cfg: CfgNode
) -> BatchLoader:
    """Returns a loader of what `dataset` gives for a list of keys of the sampler; `cfg` is the section DATA.

    The dataset notes in `reads` what it reads.
    """
    num_workers = min(cfg.NUM_WORKERS, most_workers())
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
