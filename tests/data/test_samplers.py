import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import EvalSampler, SampleKey, TrainSampler

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


def test_positions_that_cannot_be_resumed():
    with pytest.raises(ValueError, match="after 101 images of an epoch of 100"):
        TrainSampler(100, batch_size=10).set_position(0, 101)
    with pytest.raises(ValueError, match="after -1 images of an epoch of 100"):
        TrainSampler(100, batch_size=10).set_position(0, -1)
    sampler = TrainSampler(100, batch_size=10, world_size=4, fixed_shards=True)
    with pytest.raises(ValueError, match=r"DATA\.CACHE_MODE no"):
        sampler.set_position(0, 30)


@unhurried
@given(st.integers(0, 100), worlds)
def test_evaluation_sees_each_image_once(length, world_size):
    ranks = [EvalSampler(length, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [key.index for rank in ranks for key in rank]
    assert sorted(seen) == list(range(length))
    assert sum(len(rank) for rank in ranks) == length
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
