"""Random numbers as a function of a key, so that they do not depend on who draws them, or after what."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (on every device) from a key of non-negative integers.

    Keys that differ in any entry give independent streams, so `(seed, epoch, index)` needs no arithmetic.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def keyed_rng(*key: int) -> Iterator[None]:
    """Inside, the CPU generators are seeded by `key`; afterwards they continue from where they were.

    This is what makes an augmentation draw depend on (seed, epoch, index) alone: the number of workers, the order of
    the images and the step at which a run was resumed no longer matter.
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
