"""How often processes talk to each other, and about how much: seen in a group of one, where every call is made."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from settings import settings
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from training_parts import checkpoint_folder, trainer_of

import models
from benchmarks.operators import Operator, record
from data import Batch, Normalize
from engine.evaluate import evaluate
from engine.metrics import ClassificationMetric
from engine.parallel import wrap
from engine.sync_batch_norm import synchronise_batch_norms
from engine.trainer import BUCKET_ORDERING_PASSES
from utils.distributed import RankInfo

CPU = torch.device("cpu")
ONE_OF_TWO = RankInfo(0, 2, 0, CPU)  # what the process is told; its group has no other, and nothing waits
BUCKET = 25 * 2**20  # bytes of gradients that are reduced at once, of torch's DistributedDataParallel
FIRST_BUCKET = 2**20


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def collectives(operators: list[Operator]) -> list[Operator]:
    return [operator for operator in operators if operator.name.startswith("c10d.")]


def reductions_of_an_update(model: nn.Module, config: str = "") -> tuple[nn.Module, list[int]]:
    """Returns the wrapped network and the bytes of every reduction of an update, in order, once they are settled."""
    forward = wrap(model.train(), nn.CrossEntropyLoss(), settings(config), ONE_OF_TWO)
    images, targets = torch.randn(2, 3, *model.img_size), torch.zeros(2, dtype=torch.long)
    for _ in range(BUCKET_ORDERING_PASSES + 2):  # the pass after these agrees on the order
        forward.zero_grad()
        operators = record(lambda: forward(images, targets).backward())
    found = collectives(operators)
    assert {operator.name for operator in found} == {"c10d.allreduce_"}
    return forward, [sum(o.bytes for o in operator.reads) for operator in found]


def test_gradients_are_reduced_in_few_buckets_while_others_are_computed() -> None:
    torch.manual_seed(0)
    model = models.create_model("RepMLPNet-T224", num_classes=10, blocks=(1, 1, 1, 1))
    sizes = [4 * p.numel() for p in model.parameters()]
    _, buckets = reductions_of_an_update(model)
    assert sum(buckets) == sum(sizes)
    assert max(buckets) < BUCKET + max(sizes)
    assert len(buckets) <= sum(sizes) / BUCKET + 2
    assert buckets[0] < FIRST_BUCKET + max(sizes[-20:]), "the first one is small, and leaves at once"


def test_gradients_are_views_of_the_buckets() -> None:
    model = models.create_model("RepMLPNet-Digits", num_classes=10)
    forward, buckets = reductions_of_an_update(model)
    stored = {p.grad.untyped_storage().data_ptr() for p in forward.parameters() if p.grad is not None}
    assert len(stored) == len(buckets) == 1, "a copy of all gradients would take their memory again"


def test_synchronised_batch_norms_send_statistics_alone() -> None:
    """On CPUs: two sums for the outputs, two for the gradients. SyncBatchNorm on a GPU has one of each."""
    model = synchronise_batch_norms(models.create_model("RepMLPNet-Digits", num_classes=10))
    norms = [norm.num_features for norm in model.modules() if isinstance(norm, _BatchNorm)]
    _, sent = reductions_of_an_update(model)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert sent[-1] == gradients, "they follow at the end, in one bucket"
    assert len(sent) - 1 <= 4 * len(norms)
    assert max(sent[:-1]) <= 4 * (2 * max(norms) + 1)


def images(count: int) -> Iterator[Batch]:
    for i in range(count):
        yield Batch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2).long(), torch.tensor([2 * i]), [])


def talk_of_evaluation(batches: int) -> list[str]:
    model, normalize = models.create_model("RepMLPNet-Digits", num_classes=10), Normalize((0.5,) * 3, (0.25,) * 3)
    run = (model, images(batches), ClassificationMetric(CPU), normalize, CPU, nullcontext())
    return [operator.name for operator in collectives(record(lambda: evaluate(*run)))]


def test_an_evaluation_sums_once_in_the_end() -> None:
    assert talk_of_evaluation(1) == talk_of_evaluation(4)
    assert set(talk_of_evaluation(1)) == {"c10d.allreduce_"}
    assert len(talk_of_evaluation(1)) <= 3


def talk_of_a_save(blocks: tuple[int, int], folder: Path) -> list[str]:
    model = models.create_model("RepMLPNet-Digits", num_classes=10, blocks=blocks)
    trainer, checkpoints = trainer_of(model), checkpoint_folder(folder)
    return [operator.name for operator in collectives(record(lambda: checkpoints.save(trainer)))]


def test_a_checkpoint_takes_as_many_messages_for_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    shallow, deep = talk_of_a_save((1, 1), tmp_path / "a"), talk_of_a_save((2, 2), tmp_path / "b")
    assert shallow == deep
    assert 0 < len(deep) <= 12, deep


def test_a_call_is_seen() -> None:
    tensor: Tensor = torch.ones(5)
    found = collectives(record(lambda: dist.all_reduce(tensor)))
    assert [(operator.name, operator.reads[0].bytes) for operator in found] == [("c10d.allreduce_", 20)]
