"""Networks in training compile to one graph: with half precision, drop path, checkpointing and several processes.

A graph break, at which compiled code returns to Python, is an error of `fullgraph=True`. The backend `aot_eager` traces
forward and backward as every backend does, and needs no compiler.
"""

from collections.abc import Iterator

import pytest
import torch
from distributed_ranks import in_ranks
from model_helpers import small_options
from settings import settings
from torch import Tensor, nn
from training_parts import ema_of, optimizer_of, trainer_of

from data import Batch
from engine.parallel import wrap
from models import PureMLP, create_model
from models.build import FAMILIES, REGISTRY
from models.segmentation import SegmentationNetwork
from utils.distributed import RankInfo

# The smallest of every family, and what a GPU trains.
ARCHITECTURES = ["RepMLPNet-T224", *(list(family.specs)[-1] for family in FAMILIES)]
CLASSES = 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code is left from other tests, nor for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(arch: str) -> nn.Module:
    residual = not issubclass(REGISTRY[arch].network, PureMLP)  # which has nothing that could be dropped
    return create_model(arch, CLASSES, drop_path_rate=0.2 if residual else 0.0, **small_options(arch)).train()


def in_one_graph(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def assert_one_graph(model: nn.Module, images: Tensor) -> None:
    """Forward and backward of two batches, under bf16 autocast; the second one must not compile anew."""
    compiled = in_one_graph(model)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance), torch.autocast("cpu", torch.bfloat16):
            outputs = compiled(images)
        outputs.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_family(arch: str, checkpointing: bool) -> None:
    model = small(arch)
    model.set_grad_checkpointing(checkpointing)
    assert_one_graph(model, torch.randn(4, 3, *model.img_size))


@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
def test_segmentation(decoder: str) -> None:
    options = {"channels": [4, 8, 8, 16], "blocks": [1, 1, 1, 1], "share_sets": [1, 2, 4, 8], "img_size": (32, 32)}
    model = SegmentationNetwork("RepMLPNet-D256", CLASSES, decoder, width=8, drop_path_rate=0.2, **options).train()
    assert_one_graph(model, torch.randn(4, 3, 64, 64))


def updates(process: RankInfo) -> int:
    """Trains as a run does, in bf16 with drop path, checkpointing, accumulation and a moving average."""
    torch.manual_seed(0)
    model = small("RepMLPNet-Digits")
    model.set_grad_checkpointing(True)
    criterion, cfg = nn.CrossEntropyLoss(), settings("TRAIN.ACCUMULATION_STEPS 2")
    run = trainer_of(
        model,
        forward=wrap(in_one_graph(model), criterion, cfg, process),
        criterion=criterion,
        optimizer=optimizer_of(model, name="adamw", lr=0.001),
        rank_info=process,
        ema=ema_of(model, alpha=0.01, period=1, global_batch=8, epochs=1, warmup_updates=0),
        dtype=torch.bfloat16,
        accumulation=2,
        epochs=1,
        updates_per_epoch=2,
    )
    images = torch.randint(0, 256, (4, 3, *model.img_size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(4), torch.arange(4), [])
    assert run.train_epoch([batch] * 4)
    return run.progress.update


@pytest.mark.parametrize("processes", [1, 2])
def test_updates_in_several_processes(processes: int) -> None:
    assert in_ranks(updates, processes) == [2] * processes
