import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import SAMPLINGS, EvalSampler, SampleKey, TrainSampler
from data.samplers import balanced_draws

unhurried = settings(deadline=None)  # the machine may be busy
worlds = st.integers(1, 8)
batches = st.integers(1, 6)
lengths = st.integers(48, 200)  # enough for one step of the largest world and batch


def shards(length: int, world_size: int, *, consumed: int = 0, epoch: int = 0, **options) -> list[list[int]]:
    """Returns the indices that each rank is assigned."""
    ranks = []
    for rank in range(world_size):
        sampler = TrainSampler(length, rank=rank, world_size=world_size, **options)
        sampler.set_position(epoch, consumed)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert {key.epoch for key in keys} <= {epoch}
        ranks.append([key.index for key in keys])
    return ranks


def in_order_of_use(ranks: list[list[int]], batch_size: int) -> list[int]:
    """Joins what the ranks are assigned, step by step and within a step rank by rank."""
    steps = len(ranks[0]) // batch_size
    return [index for step in range(steps) for rank in ranks for index in rank[step * batch_size :][:batch_size]]


@unhurried
@given(lengths, worlds, batches, st.integers(0, 3), st.integers(0, 5), st.booleans())
def test_ranks_share_an_epoch_without_repeats(length, world_size, batch_size, seed, epoch, fixed_shards):
    ranks = shards(length, world_size, batch_size=batch_size, seed=seed, epoch=epoch, fixed_shards=fixed_shards)
    assert len({len(rank) for rank in ranks}) == 1, "every rank takes the same number of steps"
    everything = [index for rank in ranks for index in rank]
    assert len(everything) == len(set(everything)) == length // (batch_size * world_size) * batch_size * world_size
    assert set(everything) <= set(range(length))
    if fixed_shards:
        assert all(index % world_size == rank for rank, indices in enumerate(ranks) for index in indices)


@unhurried
@given(lengths, worlds, batches)
def test_order_does_not_depend_on_the_number_of_processes(length, world_size, batch_size):
    alone = shards(length, 1, batch_size=1)[0]
    together = in_order_of_use(shards(length, world_size, batch_size=batch_size), batch_size)
    assert together == alone[: len(together)]


@unhurried
@given(st.data(), lengths, worlds, batches, worlds, batches)
def test_resuming_with_other_processes_repeats_and_skips_nothing(data, length, world, batch, new_world, new_batch):
    steps = data.draw(st.integers(0, length // (world * batch)), label="steps before the interruption")
    consumed = steps * world * batch
    before = in_order_of_use(shards(length, world, batch_size=batch), batch)[:consumed]
    after = in_order_of_use(shards(length, new_world, batch_size=new_batch, consumed=consumed), new_batch)
    assert before + after == shards(length, 1, batch_size=1)[0][: consumed + len(after)]
    assert length - consumed - len(after) < new_world * new_batch, "only an incomplete step is left out"


@unhurried
@given(st.data(), lengths, worlds, batches)
def test_resuming_with_fixed_shards(data, length, world_size, batch_size):
    options = {"batch_size": batch_size, "fixed_shards": True}
    whole = shards(length, world_size, **options)
    steps = data.draw(st.integers(0, len(whole[0]) // batch_size), label="steps before the interruption")
    rest = shards(length, world_size, consumed=steps * batch_size * world_size, **options)
    assert rest == [rank[steps * batch_size :] for rank in whole]


def test_order_is_new_in_each_epoch_and_for_each_seed():
    orders = {tuple(shards(100, 1, batch_size=10, seed=seed, epoch=epoch)[0]) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert shards(100, 1, batch_size=1, seed=3, epoch=4)[0] == np.random.default_rng([3, 4]).permutation(100).tolist()


def test_a_new_sampler_begins_with_the_first_epoch_of_seed_0():
    order = np.random.default_rng([0, 0]).permutation(20)
    assert list(TrainSampler(20, batch_size=10)) == [SampleKey(0, index) for index in order]
    assert list(EvalSampler(3)) == [SampleKey(0, index) for index in range(3)]


@pytest.mark.parametrize("fixed_shards", [False, True])
def test_images_that_just_fill_a_step(fixed_shards):
    sampler = TrainSampler(16, batch_size=8, world_size=2, fixed_shards=fixed_shards)
    assert (sampler.steps, len(sampler)) == (1, 8)
    sampler.set_position(3, 16)
    assert (sampler.steps, list(sampler)) == (0, [])


def test_too_few_images_for_a_step():
    with pytest.raises(ValueError, match=r"15 training images .* step of 16 .*: lower DATA.BATCH_SIZE"):
        TrainSampler(15, batch_size=8, world_size=2)


# Repeated augmentation and sampling by class

SIZES = (60, 0, 24, 12, 4)  # of the classes: 100 images
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
SAMPLED = [{"repeats": 3}, *({"sampling": name, "labels": LABELS} for name in SAMPLINGS)]
SAMPLED += [options | {"repeats": 2} for options in SAMPLED[1:]]
sampled = st.sampled_from(SAMPLED)


def keys_of(world_size: int, *, consumed: int = 0, epoch: int = 0, **options) -> list[list[SampleKey]]:
    """Returns the keys that each rank is assigned, of 100 images."""
    ranks = []
    for rank in range(world_size):
        sampler = TrainSampler(len(LABELS), rank=rank, world_size=world_size, **options)
        sampler.set_position(epoch, consumed)
        ranks.append(list(sampler))
    return ranks


def in_the_order_of_the_epoch(ranks: list[list[SampleKey]], batch_size: int, repeats: int) -> list[SampleKey]:
    if repeats == 1:
        return in_order_of_use(ranks, batch_size)
    return [key for keys in zip(*ranks, strict=True) for key in keys]


@unhurried
@given(sampled, worlds, batches, st.integers(0, 3), st.integers(0, 5))
def test_a_sampled_epoch_is_as_long_and_no_draw_is_there_twice(options, world_size, batch_size, seed, epoch):
    ranks = keys_of(world_size, batch_size=batch_size, seed=seed, epoch=epoch, **options)
    everything = [key for rank in ranks for key in rank]
    assert len(everything) == len(set(everything)) == 100 // (batch_size * world_size) * batch_size * world_size
    assert {key.epoch for key in everything} == {epoch}
    assert {key.index for key in everything} <= set(range(100))


@unhurried
@given(st.data(), sampled, worlds, batches, worlds, batches)
def test_a_sampled_epoch_resumes_with_other_processes(data, options, world, batch, new_world, new_batch):
    repeats = options.get("repeats", 1)
    (alone,) = keys_of(1, batch_size=1, **options)
    consumed = data.draw(st.integers(0, 100 // (world * batch)), label="steps before the interruption") * world * batch
    before = in_the_order_of_the_epoch(keys_of(world, batch_size=batch, **options), batch, repeats)[:consumed]
    rest = keys_of(new_world, batch_size=new_batch, consumed=consumed, **options)
    after = in_the_order_of_the_epoch(rest, new_batch, repeats)
    assert before + after == alone[: consumed + len(after)]
    assert 100 - consumed - len(after) < new_world * new_batch


def test_repeats_of_an_image_are_in_one_batch_on_different_ranks():
    ranks = keys_of(3, batch_size=4, seed=1, epoch=2, repeats=3)
    order = np.random.default_rng([1, 2]).permutation(100)[:32]
    for rank, keys in enumerate(ranks):
        assert keys == [SampleKey(2, index, rank) for index in order]


def test_a_last_image_is_repeated_as_often_as_the_epoch_has_room():
    (keys,) = keys_of(1, batch_size=1, repeats=3)
    assert len(keys) == 100
    assert [key.repeat for key in keys] == [0, 1, 2] * 33 + [0]
    assert len({key.index for key in keys}) == 34


@pytest.mark.parametrize(("sampling", "exponent"), [("sqrt", 0.5), ("balanced", 0)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_share_of_a_class(sampling, exponent, repeats):
    """In each epoch that of its formula, rounded up or down, and over epochs that of its formula."""
    weights = np.array([size**exponent if size else 0 for size in SIZES])
    expected = weights / weights.sum() * (100 / repeats)
    total = np.zeros(len(SIZES))
    for epoch in range(60):
        (keys,) = keys_of(1, batch_size=1, epoch=epoch, sampling=sampling, repeats=repeats, labels=LABELS)
        counts = np.bincount([LABELS[key.index] for key in keys[::repeats]], minlength=len(SIZES))
        assert (abs(counts - expected) < 1).all()
        total += counts
    assert abs(total / 60 - expected).max() < 0.25


def test_images_of_a_class_are_drawn_equally_often():
    drawn = np.zeros(100)
    for epoch in range(40):
        indices, repeats = balanced_draws(LABELS, 0, 100, np.random.default_rng(epoch))
        counts = np.bincount(indices, minlength=100)
        for label, size in enumerate(SIZES):
            assert np.ptp(counts[label == LABELS]) <= 1 if size else True
        assert all(sorted(repeats[indices == i]) == list(range(counts[i])) for i in range(100))
        drawn += counts
    assert all(np.ptp(drawn[label == LABELS]) < 26 for label, size in enumerate(SIZES) if size)
    assert drawn.all(), "an image of a common class is left out of some epochs, not of all"


def test_draws_are_in_random_order():
    indices, _ = balanced_draws(LABELS, 0, 100, np.random.default_rng(0))
    first, second = LABELS[indices[:50]], LABELS[indices[50:]]
    assert abs(np.bincount(first, minlength=5) - np.bincount(second, minlength=5)).max() < 15


@pytest.mark.parametrize("options", [options for options in SAMPLED if options.get("sampling") != "uniform"])
def test_fixed_shards_that_cannot_be_sampled(options):
    with pytest.raises(ValueError, match=r"each of the 2 processes .* set DATA\.CACHE_MODE to full or no$"):
        TrainSampler(100, batch_size=4, world_size=2, fixed_shards=True, **options)
    (alone,) = keys_of(1, batch_size=4, fixed_shards=True, **options)  # it holds everything
    assert [alone] == keys_of(1, batch_size=4, **options)


def test_positions_that_cannot_be_resumed():
    with pytest.raises(ValueError, match="after 101 images of an epoch of 100"):
        TrainSampler(100, batch_size=10).set_position(0, 101)
    with pytest.raises(ValueError, match="after -1 images of an epoch of 100"):
        TrainSampler(100, batch_size=10).set_position(0, -1)
    sampler = TrainSampler(100, batch_size=10, world_size=4, fixed_shards=True)
    with pytest.raises(ValueError, match="memory: use the same number of processes as before$"):
        sampler.set_position(0, 30)


@unhurried
@given(st.integers(0, 100), worlds)
def test_evaluation_sees_each_image_once(length, world_size):
    ranks = [EvalSampler(length, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [key.index for rank in ranks for key in rank]
    assert sorted(seen) == list(range(length))
    assert sum(len(rank) for rank in ranks) == length
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
