"""Several processes compute what one would with all of their images: gradients, statistics, accumulated updates."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import in_ranks
from settings import settings
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from training_parts import ALONE, checkpoint_folder, resume, trainer_of

import models
from data import Batch
from engine.parallel import wrap
from engine.statistics import RunningStatistics
from engine.sync_batch_norm import synchronise_batch_norms
from engine.trainer import BUCKET_ORDERING_PASSES, Trainer
from utils.distributed import RankInfo

B = 4
CPU = torch.device("cpu")
CONFIG = "DATA.DATA_PATH digits"


def network() -> nn.Module:
    """The smallest RepMLPNet in float64, with BatchNorms that are not as they were initialised."""
    torch.manual_seed(1)
    model = models.create_model("RepMLPNet-Digits", 10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 10, (count,), generator=generator)


def wrapped(model: nn.Module, process: RankInfo, config: str = CONFIG) -> nn.Module:
    return wrap(model, nn.CrossEntropyLoss(), settings(config), process)


def backward(process: RankInfo, count: int, sync_bn: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Runs one batch of `count` images, of all processes together; returns gradients, running statistics, the kind."""
    model = network()
    if sync_bn and process.world_size > 1:
        model = synchronise_batch_norms(model)
    forward = wrapped(model, process)
    share = slice(process.rank, None, process.world_size)
    images, labels = (tensor[share] for tensor in examples(count))
    forward(images, labels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: t for name, t in model.state_dict().items() if "running" in name or "num_batches" in name}
    return gradients, statistics, type(forward).__name__


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """To 1e-12 of each tensor's norm, at least of a thousandth of all: what a BatchNorm takes back out is near zero."""
    assert first.keys() == second.keys()
    total = torch.stack([tensor.double().norm() for tensor in first.values()]).norm()
    for name, tensor in first.items():
        scale = max(tensor.double().norm(), 1e-3 * total)
        assert (second[name].double() - tensor.double()).norm() <= 1e-12 * scale, name


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_equal_one_with_all_images(world_size):
    expected_gradients, expected_statistics, kind = backward(ALONE, world_size * B, sync_bn=True)
    assert kind == "NetworkWithLoss", "one process synchronises nothing"
    for gradients, statistics, kind in in_ranks(backward, world_size, world_size * B, True):
        assert kind == "DistributedDataParallel"
        assert_equal(expected_gradients, gradients)
        assert_equal(expected_statistics, statistics)


def test_the_comparison_can_fail():
    """Without the synchronisation of the BatchNorms, two processes are something else."""
    expected, _, _ = backward(ALONE, 2 * B, sync_bn=True)
    (gradients, _, kind), (other, _, _) = in_ranks(backward, 2, 2 * B, False)
    assert kind == "DistributedDataParallel", "several processes always synchronise their gradients"
    assert_equal(gradients, other)
    with pytest.raises(AssertionError):
        assert_equal(expected, gradients)


def trainer(process: RankInfo, model: nn.Module, forward: nn.Module, accumulation: int, clip_grad: float) -> Trainer:
    return trainer_of(
        model,
        forward=forward,
        rank_info=process,
        images=48,
        updates_per_epoch=3,
        global_batch=16,
        accumulation=accumulation,
        clip_grad=clip_grad,
    )


def batches(process: RankInfo, size: int, count: int) -> Iterator[Batch]:
    """Shards the same images, in the same order, to any number of processes and batches."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (size * count * process.world_size, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (len(images),), generator=generator)
    for step in range(count):
        start = (step * process.world_size + process.rank) * size
        share = slice(start, start + size)
        yield Batch(images[share], labels[share], torch.arange(start, start + size), [])


def updates(process: RankInfo, size: int, accumulation: int, clip_grad: float) -> tuple[dict[str, Tensor], int]:
    """Makes three updates of 16 images; returns the weights and how often gradients were reduced."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(20, 4)).double()
    forward, reductions = wrapped(model, process, f"{CONFIG} TRAIN.ACCUMULATION_STEPS {accumulation}"), []
    if isinstance(forward, DistributedDataParallel):

        def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            reductions.append(bucket.is_last())
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

        forward.register_comm_hook(None, count)
    run = trainer(process, model, forward, accumulation, clip_grad)
    assert run.train_epoch(batches(process, size, 3 * accumulation))
    assert run.progress.update == 3
    return model.state_dict(), reductions.count(True)


@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
def test_accumulation_over_processes_equals_the_big_batch(clip_grad):
    """And gradients meet once an update, not once a batch; a limit of 0.05 is one that every update hits."""
    expected, reductions = updates(ALONE, 16, 1, clip_grad)
    assert reductions == 0
    for world_size, size, accumulation in ((2, 4, 2), (2, 8, 1), (2, 2, 4)):
        for weights, reductions in in_ranks(updates, world_size, size, accumulation, clip_grad):
            assert reductions == 3 + BUCKET_ORDERING_PASSES
            assert_equal(expected, weights)


def test_gradient_clipping_has_an_effect():
    assert any(
        not torch.equal(free, limited)
        for free, limited in zip(
            updates(ALONE, 16, 1, 0.0)[0].values(), updates(ALONE, 16, 1, 0.05)[0].values(), strict=True
        )
    )


def saved_within_an_epoch(process: RankInfo, folder) -> tuple[Tensor, Tensor]:
    """Trains two updates, saves, and resumes from the file; returns its own statistics before and after."""
    own = []
    for start in range(2):
        torch.manual_seed(1 + start)
        model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4)).double()
        run = trainer(process, model, wrapped(model, process), 1, 0.0)
        if start == 0:
            run.train_epoch(batches(process, 8, 2), lambda run=run: run.progress.update == 2)
            checkpoint_folder(folder, keep=1).save(run)
            dist.barrier()
        else:
            resume(run, folder / "latest.pth")
        own.append(RunningStatistics(model).read())
    return own[0], own[1]


def test_running_statistics_within_an_epoch(tmp_path):
    """Each process gets its own back; the weights in the file have the mean, as have those of another world."""
    ranks = in_ranks(saved_within_an_epoch, 2, tmp_path)
    assert all(torch.equal(before, after) for before, after in ranks)
    assert not torch.equal(ranks[0][0], ranks[1][0])
    mean = (ranks[0][0] + ranks[1][0]) / 2
    state = torch.load(tmp_path / "latest.pth", weights_only=True)["model"]
    assert torch.equal(torch.cat([state["1.running_mean"], state["1.running_var"]]), mean)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4)).double()
    alone = trainer(ALONE, model, wrapped(model, ALONE), 1, 0.0)
    resume(alone, tmp_path / "latest.pth")
    assert torch.equal(RunningStatistics(model).read(), mean)


class Counting(nn.CrossEntropyLoss):
    """Keeps in a buffer how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input, target)


def calls_of_the_loss(process: RankInfo) -> int:
    """Trains three updates; returns how many of them a buffer of the loss has seen."""
    torch.manual_seed(1)
    model, criterion = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double(), Counting()
    forward = wrap(model, criterion, settings(CONFIG), process)
    run = trainer_of(model, criterion=criterion, forward=forward, rank_info=process)
    assert run.train_epoch(batches(process, 4, 3))
    return int(criterion.calls)


def test_ordering_the_buckets_leaves_no_trace_in_the_loss():
    assert in_ranks(calls_of_the_loss, 2) == [3, 3]
