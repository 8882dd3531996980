"""What an update of RepMLPNet-T224 in bfloat16 asks of a GPU: bytes, launches, and none on a part of the device."""

from collections import Counter
from functools import cache

import pytest
import torch
from updates import classifier, recorded_update

from benchmarks.operators import BATCH_NORMS, Operator, total_bytes
from models import training_form, training_ops

pytestmark = pytest.mark.xdist_group("traffic")  # the same record for all

BATCH = 256
# For one image, as eager operators move them, those of the optimizer among them. The published formulation moves 372.
CEILING_MB = 320
CEILING_LAUNCHES = 5000  # most on vectors of coefficients, which a compiler fuses
MULTIPROCESSORS = 132  # of an H200; torch's BatchNorm starts one block for each channel


@cache
def update() -> list[Operator]:
    return recorded_update(classifier("RepMLPNet-T224"), BATCH, torch.bfloat16, (224, 224))


def test_bytes_stay_below_the_ceiling() -> None:
    moved = Counter[str]()
    for operator in update():
        moved[operator.name] += operator.bytes
    by_name = {name: f"{size / BATCH / 1e6:.1f}" for name, size in moved.most_common(12)}
    assert total_bytes(update()) / BATCH / 1e6 < CEILING_MB, by_name


def test_launches_stay_below_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_ops, "PIECE", 2**31)  # a GPU takes no pieces
    monkeypatch.setattr(training_form, "MANY_ON_CPUS", 0)  # as with many images
    operators = recorded_update(classifier("RepMLPNet-T224"), 2, torch.bfloat16, (224, 224))
    calls = Counter(operator.name for operator in operators if not operator.is_free)
    assert calls.total() < CEILING_LAUNCHES, calls.most_common(20)


def test_batch_norms_use_the_whole_gpu() -> None:
    small: Counter[int] = Counter()
    for operator in update():
        channels = operator.reads[0].shape[1] if operator.name in BATCH_NORMS else MULTIPROCESSORS
        if channels < MULTIPROCESSORS and not operator.name.endswith("backward"):
            small[channels] += 1
    assert not small, "how many by their channels"


def test_bytes_grow_with_the_batch_alone() -> None:
    """An update moves so much for the weights, and so much for each image: nothing grows faster than the batch."""
    network = "RepMLPNet-Digits"
    few, some, many = (total_bytes(recorded_update(classifier(network), n, None, (16, 16))) for n in (512, 640, 1024))
    assert many == few + (some - few) * (1024 - 512) // (640 - 512)
