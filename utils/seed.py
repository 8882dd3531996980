"""Random numbers as a function of a key, independent of the process that draws them and of earlier draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the step of SplitMix64, 2**64 divided by the golden ratio


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (on every device) from a key of non-negative integers.

    Keys that differ in any entry give independent streams, so that `(seed, epoch, index)` can be used as it is.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def local_rng(*key: int) -> random.Random:
    """Returns a generator of its own for a key of non-negative integers, at a twentieth of the cost of `keyed_rng`."""
    return random.Random(" ".join(map(str, key)))  # it hashes text, so that similar keys are independent


@contextmanager
def keyed_rng(*key: int) -> Iterator[None]:
    """Seeds the CPU generators by `key` within the context and restores their state afterwards.

    Augmentation then depends on (seed, epoch, index) alone, and not on the number of workers, the order of the images
    or the update at which a run was resumed.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(pytorch)


def keyed_uniforms(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Returns uniform numbers, strictly between 0 and 1, as a function of a key, for many keys at once.

    The numbers of a key are those of the generator SplitMix64 (Steele, Lea and Flood, 2014), started at a hash of the
    key. No generator is made or seeded, so that a whole batch costs little more than one image.

    Args:
        count: how many numbers each key gives.
        *key: non-negative integers, or integer arrays (N,) with one for each key.

    Returns:
        float64 (N, count); (1, count) for a single key.
    """
    state = np.array([_GAMMA], dtype=np.uint64)
    for word in key:
        state = _mixed(state ^ np.asarray(word).astype(np.uint64))
    numbers = _mixed(state[:, None] + _GAMMA * np.arange(1, count + 1, dtype=np.uint64))
    return ((numbers >> np.uint64(12)) + 0.5) * 2.0**-52


def _mixed(words: np.ndarray) -> np.ndarray:
    """Maps 64-bit words one to one to words whose bits all depend on all of theirs (the finalizer of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
