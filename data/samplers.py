"""Which images a process sees, in which order: a function of seed and epoch, not of the number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """An image to load, and the epoch it is loaded for: workers need no other state to augment it."""

    epoch: int
    index: int  # type: ignore[assignment]  # replaces tuple.index


class TrainSampler(Sampler[SampleKey]):
    """Shards one random order of all images, a function of (seed, epoch), into the batches of all processes.

    A step takes the next `batch_size * world_size` images of that order, and each rank its own `batch_size` of them.
    How far the epoch has come is therefore one number, and a run may resume from it with other processes or batches.
    Images at the end that fill no whole step are left out; which ones changes with the epoch.

    With `fixed_shards` a rank is assigned the images with `index % world_size == rank` alone, those that it holds in
    memory; a run can then only resume in the middle of an epoch with the number of processes that it began with.

    Raises ValueError if the images do not fill one step.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        fixed_shards: bool = False,
    ) -> None:
        assert batch_size > 0
        assert 0 <= rank < world_size
        if length < batch_size * world_size:
            raise ValueError(
                f"{length} training images do not fill one step of {batch_size * world_size} "
                f"({world_size} processes of {batch_size}): lower DATA.BATCH_SIZE"
            )
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.fixed_shards = fixed_shards
        self.set_position(0)

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Makes the next iteration begin in `epoch` after `consumed` images, counted over all processes.

        Raises ValueError where the epoch has fewer images, or where they cannot be divided among fixed shards.
        """
        if not 0 <= consumed <= self.length:
            raise ValueError(
                f"cannot resume after {consumed} images of an epoch of {self.length}: the training set has changed"
            )
        if self.fixed_shards and consumed % self.world_size:
            raise ValueError(
                f"cannot resume after {consumed} images with {self.world_size} processes that each hold a part in "
                "memory: use the same number of processes as before, or DATA.CACHE_MODE no"
            )
        self.epoch = epoch
        self.consumed = consumed

    @property
    def steps(self) -> int:
        """The number of steps left in the epoch."""
        if self.fixed_shards:  # the smallest shard decides, or some ranks would wait for others
            return (self.length // self.world_size - self.consumed // self.world_size) // self.batch_size
        return (self.length - self.consumed) // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        """Returns the number of images left in the epoch for this rank."""
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for index in self._order().tolist():
            yield SampleKey(epoch, index)

    def _order(self) -> np.ndarray:
        """Returns the indices (len(self),) of this rank's images, in order of use."""
        everything = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        if self.fixed_shards:
            shard = everything[everything % self.world_size == self.rank]
            return shard[self.consumed // self.world_size :][: len(self)]
        used = everything[self.consumed :][: len(self) * self.world_size]
        return used.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank].reshape(-1)


class EvalSampler(Sampler[SampleKey]):
    """Assigns every image to exactly one process, in order; processes may differ by one image, none sees padding."""

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[SampleKey]:
        for index in self.indices:
            yield SampleKey(0, index)
