"""Random numbers of many keys at once: a function of the key, uniform and independent."""

import numpy as np
import pytest

from utils.seed import keyed_uniforms

# The first numbers of SplitMix64 from the seed 1234567, as its authors' C program prints them.
PRINTED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_the_generator_is_splitmix64():
    """Its state is the hash of the key; that of the empty key is the constant that hashes begin with."""
    numbers = keyed_uniforms(3)[0]
    state, expected = 0x9E3779B97F4A7C15, []
    for _ in range(3):
        state, number = splitmix64(state)
        expected.append(((number >> 12) + 0.5) / 2**52)
    assert numbers.tolist() == expected


def splitmix64(state: int) -> tuple[int, int]:
    """The published generator in plain integers: the next state and number."""
    word = state = (state + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return state, word ^ (word >> 31)


def test_the_plain_integers_are_those_of_the_published_program():
    state, numbers = 1234567, []
    for _ in PRINTED:
        state, number = splitmix64(state)
        numbers.append(number)
    assert numbers == PRINTED


def test_a_key_of_many_is_that_key_alone():
    indices = np.array([5, 0, 2**40, 5])
    together = keyed_uniforms(4, 7, 2, indices)
    assert together.shape == (4, 4)
    for row, index in zip(together, indices.tolist(), strict=True):
        assert row.tolist() == keyed_uniforms(4, 7, 2, index)[0].tolist()
    assert keyed_uniforms(2, 7, 2, indices).tolist() == together[:, :2].tolist()


@pytest.mark.parametrize("position", range(3))
def test_neighbouring_keys_give_uniform_and_independent_numbers(position):
    key: list[int | np.ndarray] = [3, 1, 4]
    key[position] = np.arange(20_000)
    numbers = keyed_uniforms(8, *key)
    assert 0 < numbers.min() < numbers.max() < 1
    counts = np.stack([np.histogram(column, 64, (0, 1))[0] for column in numbers.T])
    chi_squared = ((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum(1)
    assert (abs(chi_squared - 63) < 5 * np.sqrt(2 * 63)).all()
    within, between = np.corrcoef(numbers.T) - np.eye(8), np.corrcoef(numbers[1:].T, numbers[:-1].T)[:8, 8:]
    assert max(abs(within).max(), abs(between).max()) < 5 / np.sqrt(20_000)


def test_the_order_of_a_key_counts():
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (0, 0, 0), (0, 0), (0, 2)]
    assert len({keyed_uniforms(1, *key).item() for key in keys}) == len(keys)


def test_the_ends():
    """No number is 0 or 1, of which quantiles of a normal distribution are infinite."""
    words = np.array([0, 2**64 - 1], dtype=np.uint64) >> np.uint64(12)
    assert ((words + 0.5) * 2.0**-52).tolist() == [2.0**-53, 1 - 2.0**-53]
