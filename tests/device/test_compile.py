"""Networks in training compile to one graph: with half precision, drop path, checkpointing and several processes.

A graph break, at which compiled code returns to Python, is an error of `fullgraph=True`. The backend `eager` runs what
was traced as it stands: graphs break before any backend sees them. Only checkpointing takes `aot_eager`, which traces
forward and backward together.
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

SMALLEST = [list(family.specs)[-1] for family in FAMILIES]
CLASSES = 5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code is left from other tests, nor for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_one_graph(model: nn.Module, images: Tensor) -> None:
    """Forward and backward of two batches, under bf16 autocast; the second one must not compile anew."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance), torch.autocast("cpu", torch.bfloat16):
            outputs = compiled(images)
        outputs.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", SMALLEST)
def test_every_family(arch: str) -> None:
    residual = not issubclass(REGISTRY[arch].network, PureMLP)  # which has nothing that could be dropped
    model = create_model(arch, CLASSES, drop_path_rate=0.2 if residual else 0.0, **small_options(arch)).train()
    assert_one_graph(model, torch.randn(4, 3, *model.img_size))


@pytest.mark.slow
def test_segmentation() -> None:
    options = {"channels": [4, 8, 8, 16], "blocks": [1, 1, 1, 1], "share_sets": [1, 2, 4, 8], "img_size": (32, 32)}
    model = SegmentationNetwork("RepMLPNet-D256", CLASSES, width=8, drop_path_rate=0.2, **options).train()
    assert_one_graph(model, torch.randn(4, 3, 64, 64))


def updates(process: RankInfo) -> int:
    """Trains as a run does, in bf16 with drop path, checkpointing and a moving average."""
    torch.manual_seed(0)
    model = create_model("RepMLPNet-Digits", CLASSES, drop_path_rate=0.2, blocks=(1, 1)).train()
    model.set_grad_checkpointing(True)
    criterion, cfg = nn.CrossEntropyLoss(), settings()
    run = trainer_of(
        model,
        forward=wrap(torch.compile(model, backend="aot_eager", fullgraph=True), criterion, cfg, process),
        criterion=criterion,
        optimizer=optimizer_of(model, name="adamw", lr=0.001),
        rank_info=process,
        ema=ema_of(model, alpha=0.01, period=1, global_batch=8, epochs=1, warmup_updates=0),
        dtype=torch.bfloat16,
        epochs=1,
        updates_per_epoch=2,
    )
    images = torch.randint(0, 256, (4, 3, *model.img_size), dtype=torch.uint8)
    batch = Batch(images, torch.arange(4), torch.arange(4), [])
    assert run.train_epoch([batch] * 2)
    return run.progress.update


@pytest.mark.slow
def test_updates_in_two_processes() -> None:
    assert in_ranks(updates, 2) == [2, 2]
