"""Which images a process sees, in which order: a function of seed and epoch, not of the number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# By name, the exponent q of a sampling: a class of n images is drawn in proportion to n ** q (Kang et al., "Decoupling
# representation and classifier for long-tailed recognition", arXiv:1910.09217, Eq. 1).
SAMPLINGS = {"uniform": 1.0, "sqrt": 0.5, "balanced": 0.0}
UNIFORM = "uniform"


class SampleKey(NamedTuple):
    """An image to load, and the epoch it is loaded for: workers need no other state to augment it.

    `repeat` is another number for each time that an epoch has the same image, so that each is augmented differently.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # replaces tuple.index
    repeat: int = 0


class TrainSampler(Sampler[SampleKey]):
    """Shards one random order of images, a function of (seed, epoch), into the batches of all processes.

    An epoch has as many images as the data set. Each is one of its images, once, unless `sampling` or `repeats` say
    otherwise. A step takes the next `batch_size * world_size` images of that order, and each rank its own `batch_size`
    of them. How far the epoch has come is therefore one number, and a run may resume from it with other processes or
    batches. Images at the end that fill no whole step are left out; which ones changes with the epoch.

    With `sampling` other than uniform the order holds the classes in other shares, see `balanced_draws`.

    With `repeats` R it holds a part of the images only, each R times in a row (repeated augmentation: Hoffer et al.,
    arXiv:1901.09335; Berman et al., arXiv:1902.05509). The repeats of an image are in one global batch, except where a
    batch ends between them, and consecutive ones go to different ranks, as in DeiT (arXiv:2012.12877), where R is 3.

    With `fixed_shards` a rank is assigned the images with `index % world_size == rank` alone, those that it holds in
    memory; a run can then only resume in the middle of an epoch with the number of processes that it began with.

    Args:
        length: number of images.
        batch_size: images of a rank in a step.
        rank: of this process.
        world_size: number of processes.
        seed: of the order.
        fixed_shards: see above; with several processes, for uniform sampling without repeats only.
        sampling: a key of `SAMPLINGS`.
        repeats: R, at least 1.
        labels: the class of each image, int64 (length,); needed where `sampling` is not uniform.

    Raises:
        ValueError: the images do not fill one step, or fixed shards can't be sampled so.
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
        sampling: str = UNIFORM,
        repeats: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        assert batch_size > 0
        assert 0 <= rank < world_size
        assert sampling == UNIFORM or (labels is not None and len(labels) == length)
        if length < batch_size * world_size:
            raise ValueError(
                f"{length} training images do not fill one step of {batch_size * world_size} "
                f"({world_size} processes of {batch_size}): lower DATA.BATCH_SIZE"
            )
        self.fixed_shards = fixed_shards and world_size > 1  # with one, it holds everything
        if self.fixed_shards and (sampling != UNIFORM or repeats > 1):
            raise ValueError(
                f"DATA.SAMPLING {sampling} with DATA.REPEATED_AUG {repeats} chooses among all images, of which each of "
                f"the {world_size} processes holds a part in memory: set DATA.CACHE_MODE to full or no"
            )
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.sampling = sampling
        self.repeats = repeats
        self.labels = labels
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
                "memory: use the same number of processes as before"
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
        for index, repeat in zip(*(part.tolist() for part in self._order()), strict=True):
            yield SampleKey(epoch, index, repeat)

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of this rank's images and their repeats, each (len(self),), in order of use."""
        indices, repeats = self._draws()
        positions = self._positions(indices)
        return indices[positions], repeats[positions]

    def _draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the epoch's images, over all ranks, and their repeats, each (length,)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        count = -(-self.length // self.repeats)
        if self.sampling == UNIFORM:
            indices = rng.permutation(self.length)[:count]
            repeats = np.zeros_like(indices)
        else:
            assert self.labels is not None
            indices, repeats = balanced_draws(self.labels, SAMPLINGS[self.sampling], count, rng)
        if self.repeats > 1:
            indices = np.repeat(indices, self.repeats)[: self.length]
            repeats = (repeats[:, None] * self.repeats + np.arange(self.repeats)).reshape(-1)[: self.length]
        return indices, repeats

    def _positions(self, indices: np.ndarray) -> np.ndarray:
        """Returns where in the epoch's order (length,) the rest of this rank's images stand, (len(self),)."""
        if self.fixed_shards:
            own = np.flatnonzero(indices % self.world_size == self.rank)
            return own[self.consumed // self.world_size :][: len(self)]
        rest = np.arange(self.consumed, self.consumed + len(self) * self.world_size)
        if self.repeats > 1:
            return rest[self.rank :: self.world_size]
        return rest.reshape(self.steps, self.world_size, self.batch_size)[:, self.rank].reshape(-1)


def balanced_draws(
    labels: np.ndarray, exponent: float, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws images so that a class of n of them is drawn in proportion to n ** exponent, in random order.

    The draws vary as little as they can: a class gets the whole number below or above its share of `count`, and none
    of its images is drawn a second time before each has been drawn once.

    Args:
        labels: the class of each image, int64 (N,).
        exponent: 0 draws all classes that have images equally often, 1 all images.
        count: number of draws.
        rng: its state decides the draws.

    Returns:
        The indices of the images, and for each draw how many others of the same image are counted before it; both
        (count,).
    """
    sizes = np.bincount(labels)
    ends = np.where(sizes > 0, sizes.astype(np.float64) ** exponent, 0).cumsum()
    quotas = np.diff(np.floor(ends / ends[-1] * count + rng.random()), prepend=0).astype(np.int64)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes = labels[by_class]
    place = np.arange(len(labels)) - (sizes.cumsum() - sizes)[classes]  # of an image within its class
    rounds, rest = np.divmod(quotas, sizes.clip(min=1))
    draws = rounds[classes] + (place < rest[classes])
    indices = by_class.repeat(draws)
    earlier = np.arange(count) - (draws.cumsum() - draws).repeat(draws)
    order = rng.permutation(count)
    return indices[order], earlier[order]


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
