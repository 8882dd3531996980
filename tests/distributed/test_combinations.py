"""Settings that work alone work together: three processes, a small network, a few updates of each combination."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import in_ranks
from settings import settings
from torch import Tensor, nn
from training_parts import ALONE, checkpoint_folder, ema_of, optimizer_of, resume, trainer_of

import models
from data import Batch, Normalize
from engine.parallel import wrap
from engine.sync_batch_norm import synchronise_batch_norms
from engine.trainer import Trainer
from utils.distributed import RankInfo

WORLD, SIZE, UPDATES = 3, 4, 3


@dataclass(frozen=True)
class Combination:
    """What is switched on."""

    half: torch.dtype | None = None
    double: bool = False
    sync_bn: bool = False
    checkpointing: bool = False
    channels_last: bool = False
    compiled: bool = False
    accumulation: int = 1
    ema: bool = False
    drop_path: float = 0.0
    clip_grad: float = 0.0
    optimizer: str = "adamw"


COMBINATIONS = {
    "bf16, SYNC_BN, checkpointing, accumulation, average": Combination(
        half=torch.bfloat16, sync_bn=True, checkpointing=True, accumulation=2, ema=True, drop_path=0.3
    ),
    "fp16, SYNC_BN, channels_last, clipping, average": Combination(
        half=torch.float16, sync_bn=True, channels_last=True, clip_grad=1.0, ema=True
    ),
    "fp16, channels_last, checkpointing, accumulation, SGD": Combination(
        half=torch.float16, channels_last=True, checkpointing=True, accumulation=2, drop_path=0.3, optimizer="sgd"
    ),
    "bf16, channels_last, accumulation, clipping": Combination(
        half=torch.bfloat16, channels_last=True, accumulation=3, clip_grad=1.0
    ),
}
COMPILED = {
    "compiled, bf16, accumulation, average": Combination(
        compiled=True, half=torch.bfloat16, accumulation=2, ema=True, optimizer="sgd"
    ),
    "compiled, checkpointing, accumulation, clipping": Combination(
        compiled=True,
        double=True,
        checkpointing=True,
        accumulation=2,
        clip_grad=1.0,
        drop_path=0.3,
        optimizer="sgd",
    ),
}


def batches(process: RankInfo, count: int) -> Iterator[Batch]:
    """The same images for any number of processes, each with its share of a batch."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, WORLD * SIZE, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count, WORLD * SIZE), generator=generator)
    share = slice(process.rank, None, process.world_size)
    for image, label in zip(images, labels, strict=True):
        yield Batch(image[share], label[share], torch.arange(WORLD * SIZE)[share], [])


def build(process: RankInfo, wanted: Combination, seed: int = 0) -> Trainer:
    """Puts a run together as the scripts do."""
    # Of kernels of one pixel, which have the same memory in either layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.manual_seed(seed)
    dtype = torch.float64 if wanted.double else torch.float32
    model: nn.Module = models.create_model("RepMLPNet-Digits", 10, drop_path_rate=wanted.drop_path).to(dtype)
    if wanted.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(wanted.checkpointing)
    if wanted.sync_bn and process.world_size > 1:
        model = synchronise_batch_norms(model)
    # This backend computes as torch does without compilation, and needs no compiler.
    forward = torch.compile(model, backend="aot_eager") if wanted.compiled else model
    criterion = nn.CrossEntropyLoss()
    cfg = settings(f"TRAIN.ACCUMULATION_STEPS {wanted.accumulation}")
    ema = ema_of(model, alpha=0.01, period=1, global_batch=WORLD * SIZE, epochs=1, warmup_updates=0)
    return trainer_of(
        model,
        forward=wrap(forward, criterion, cfg, process),
        criterion=criterion,
        optimizer=optimizer_of(model, name=wanted.optimizer, lr=0.01, weight_decay=0.05),
        normalize=Normalize((0.3,) * 3, (0.4,) * 3, dtype=dtype),
        rank_info=process,
        images=WORLD * SIZE * UPDATES * wanted.accumulation,
        updates_per_epoch=UPDATES,
        global_batch=WORLD * SIZE * wanted.accumulation,
        ema=ema if wanted.ema else None,
        dtype=wanted.half,
        accumulation=wanted.accumulation,
        clip_grad=wanted.clip_grad,
        epochs=1,
    )


def state(run: Trainer) -> dict[str, Tensor]:
    """Weights, averages and moments by name."""
    found = {f"model.{name}": value for name, value in run.network.state_dict().items()}
    if run.ema is not None:
        found |= {f"ema.{name}": value for name, value in run.ema.module.state_dict().items()}
    for number, moments in run.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in moments.items()}
    return {name: value.clone() for name, value in found.items()}


def straight(process: RankInfo, wanted: Combination) -> dict[str, Tensor]:
    """Trains an epoch."""
    run = build(process, wanted)
    assert run.train_epoch(batches(process, UPDATES * wanted.accumulation))
    return state(run)


def stopped(process: RankInfo, wanted: Combination, folder: Path) -> dict[str, Tensor]:
    """The same in two runs; the second has other weights until it resumes from the checkpoint."""
    first, second = (build(process, wanted, seed) for seed in (0, 1))
    own = list(batches(process, UPDATES * wanted.accumulation))
    assert not first.train_epoch(own, lambda: first.progress.update == 2)
    checkpoint_folder(folder, keep=1).save(first)
    dist.barrier()
    resume(second, folder / "latest.pth")
    assert second.train_epoch(own[2 * wanted.accumulation :])
    return state(second)


def both(process: RankInfo, combinations: dict[str, Combination], folder: Path) -> dict[str, Any]:
    return {
        name: (straight(process, wanted), stopped(process, wanted, folder / str(i)))
        for i, (name, wanted) in enumerate(combinations.items())
    }


def assert_whole(ranks: list[dict[str, Any]], name: str) -> None:
    """All weights are finite, have changed, and are equal on all processes and over a restart."""
    fresh = state(build(ALONE, COMBINATIONS.get(name) or COMPILED[name]))
    weights = [key for key in fresh if key.endswith(("conv.weight", "head.weight"))]
    assert weights
    for rank in ranks:
        once, twice = rank[name]
        assert all(value.isfinite().all() for value in once.values())
        assert [key for key in once if not torch.equal(once[key], twice[key])] == []
        assert not any(torch.equal(once[key], fresh[key]) for key in weights)
        apart = [key for key in once if not torch.equal(once[key], ranks[0][name][0][key])]
        assert all("running" in key for key in apart), "statistics alone may differ within an epoch"


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(both, WORLD, COMBINATIONS, folders(tmp_path_factory))


def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("combinations")
    for number in range(len(COMBINATIONS)):
        (root / str(number)).mkdir()
    return root


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_over_a_restart(eager, name):
    assert_whole(eager, name)


@pytest.mark.parametrize(
    "name", [name if wanted.double else pytest.param(name, marks=pytest.mark.slow) for name, wanted in COMPILED.items()]
)
def test_compiled(tmp_path_factory, name):
    """Also against the same without compilation, where nothing but the order of sums over processes differs."""
    wanted = COMPILED[name]
    ranks = in_ranks(both, WORLD, {name: wanted}, folders(tmp_path_factory))
    assert_whole(ranks, name)
    if wanted.double:
        plain = Combination(**{**vars(wanted), "compiled": False})
        for rank, expected in zip(ranks, in_ranks(straight, WORLD, plain), strict=True):
            torch.testing.assert_close(rank[name][0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_processes_layout_and_checkpointing_equal_one_plain_process(optimizer):
    """To rounding: SYNC_BN x channels_last x accumulation x checkpointing x clipping x average, in double precision."""
    common = {"double": True, "accumulation": 2, "clip_grad": 0.5, "ema": True, "optimizer": optimizer}
    expected = straight(ALONE, Combination(**common))
    full = Combination(**common, sync_bn=True, channels_last=True, checkpointing=True)
    for found in in_ranks(straight, WORLD, full):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
