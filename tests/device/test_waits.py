"""The host does not wait for the device within an update, as far as the operators on a CPU and on `meta` show it.

A host waits where a value is read (`item`), where a shape depends on values (boolean masks, `nonzero`), and in a copy
that is not asked to run beside it. On `meta`, a device without values, every copy to the device can be seen; the fused
optimizers and autocast do not know it, so that updates with them run on the CPU.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from settings import settings
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_parts import checkpoint_folder, ema_of, optimizer_of, trainer_of

import data
import models
from data import Batch, Normalize
from engine.distillation import HardDistillation
from engine.optimizer import OPTIMIZERS
from engine.picture import take_sample
from engine.state import read_state, restore
from engine.trainer import Trainer
from tasks.verification import LOSSES, TargetsByIndex
from utils.distributed import RankInfo

ARCH, CLASSES, SIZE, COUNT = "RepMLPNet-Digits", 10, 16, 8
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, META = torch.device("cpu"), torch.device("meta")
# Operators whose result, or its shape, is a value of the device.
READING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "masked_scatter", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "_histogramdd_bin_edges", "repeat_interleave"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Raises for an operator that would make the host wait for a GPU; counts the copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name, out = func.overloadpacket.__name__, func(*args, **kwargs)
        assert name not in READING, f"{func} reads a value"
        if name == "lift_fresh":  # of torch.tensor
            assert out.device == CPU, f"{func} makes a tensor of numbers on the device"
        if name in INDEXING:
            kinds = {index.dtype for index in args[1] if index is not None}
            assert not kinds & {torch.bool, torch.uint8}, f"{func} by a mask"
            assert {index.device for index in args[1] if index is not None} == {args[0].device}, f"{func} from the CPU"
        devices = {tensor.device for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)}
        if name in ("_to_copy", "copy_", "copy") and len(devices) > 1:
            self.copies += 1
            asked = kwargs.get("non_blocking") or args[2:3] == (True,)
            assert asked, f"{func} waits for a copy"
        return out


class Untouched(torch.optim.SGD):
    """Leaves the weights as they are: the fused optimizers do not know `meta`."""

    def step(self, closure: None = None) -> None:
        pass


class WithoutAutocast(nn.Module):
    """A network and its loss, where there is no autocast."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.network(images), targets)


def augmentation(opts: str) -> data.BatchAugmentation | None:
    return data.build_batch_augmentation(
        settings(opts).AUG, num_classes=CLASSES, batch_size=COUNT, label_smoothing=0.1, seed=0
    )


def rand_augment(device: torch.device) -> data.BatchRandAugment | None:
    cfg = settings("AUG.DEVICE gpu AUG.PRESET raug15").AUG
    return data.build_rand_augment(cfg, device, interpolation="bilinear", seed=0)


def run_of(device: torch.device, opts: str = "AUG.REPROB 0", *, ema: bool = False, **changes: Any) -> Trainer:
    """A trainer of a tiny network, as the scripts put one together."""
    network = models.create_model(ARCH, CLASSES, drop_path_rate=0.2)
    if ema:
        changes["ema"] = ema_of(network, alpha=0.1, period=1, global_batch=COUNT, epochs=1, warmup_updates=0)
        changes["ema"].module.to(device)
    network.to(device)
    augment = augmentation(opts)
    criterion = SoftTargetCrossEntropy() if augment is not None and augment.soft_targets else nn.CrossEntropyLoss()
    changes = {"batch_augmentation": augment, "criterion": criterion} | changes
    if device == META:
        changes["forward"] = WithoutAutocast(network, changes["criterion"])
        changes["optimizer"] = Untouched(network.parameters(), lr=0.1)
    else:
        changes["optimizer"] = optimizer_of(network, name=changes.pop("name", "adamw"))
    place = {"rank_info": RankInfo(0, 1, 0, device), "normalize": Normalize((0.3,) * 3, (0.4,) * 3).to(device)}
    return trainer_of(network, **place | changes)


def batches(count: int) -> list[Batch]:
    images = torch.randint(0, 256, (count, COUNT, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count, COUNT))
    return [Batch(*pair, torch.arange(COUNT), []) for pair in zip(images, labels, strict=True)]


def second_update(run: Trainer) -> int:
    """Watches an update, not the first, which may make what later ones use; returns the number of copies."""
    first, second = batches(run.accumulation), batches(run.accumulation)
    run.forward.train()
    run._update(first)
    with Waits() as waits:
        run._update(second)
    assert run.progress.update == 2
    return waits.copies


def test_the_sample_for_tensorboard_is_taken_without_a_wait() -> None:
    images, labels = torch.zeros(COUNT, 3, SIZE, SIZE, device=META), torch.zeros(COUNT, CLASSES, device=META)
    normalize = Normalize((0.3,) * 3, (0.4,) * 3).to(META)
    with Waits() as waits:
        take_sample(images, labels, normalize, 1)
    assert waits.copies == 0


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Lets torch itself raise for what waits for a GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


ERASING = [f"AUG.REPROB 0.5 AUG.RECOUNT 2 AUG.REMODE {mode}" for mode in data.ERASING_MODES]
MIXING = [f"AUG.REPROB 0 AUG.MIXUP 0.4 AUG.CUTMIX 1 AUG.MIXUP_MODE {mode}" for mode in data.MIXUP_MODES]
# Of a batch: images and labels; the boxes of erasing; the shares and boxes of mixing by image or pair.
COPIES = [
    ("AUG.REPROB 0", 2),
    *((opts, 3) for opts in ERASING),
    *((opts, 2 if opts.endswith("batch") else 3) for opts in MIXING),
]


@pytest.mark.parametrize(("opts", "copies"), COPIES)
def test_copies_to_the_device_are_few_and_run_beside_the_host(opts, copies):
    run = run_of(META, opts, ema=True, accumulation=2, clip_grad=1.0)
    assert second_update(run) == 2 * copies


def test_randaugment_of_a_batch_is_one_copy_more():
    run = run_of(META, rand_augment=rand_augment(META), accumulation=2)
    assert second_update(run) == 2 * 3


def test_copies_of_distillation():
    teacher = models.create_model(ARCH, CLASSES).to(META).eval()
    opts = f"{MIXING[1]} AUG.REPROB 0.5".replace("AUG.REPROB 0 ", "")
    distillation = HardDistillation(augmentation(opts), teacher, 0.5, CLASSES, 0.1, nullcontext())
    run = run_of(META, batch_augmentation=distillation, criterion=SoftTargetCrossEntropy())
    assert second_update(run) == 4


# Every optimizer, precision, and whatever else takes part in an update.
SETTINGS: list[dict[str, Any]] = [
    *({"name": name, "clip_grad": 1.0} for name in OPTIMIZERS),
    *({"name": name, "dtype": torch.float16, "accumulation": 2} for name in OPTIMIZERS),
    {"dtype": torch.bfloat16, "ema": True},
    {"dtype": torch.float16, "ema": True, "opts": f"{MIXING[2]}"},
    {"rand_augment": rand_augment(CPU), "opts": f"{MIXING[0]}"},
]


def named(changes: dict) -> str:
    """Returns the name of a test, which must be the same in every process."""
    return ", ".join(f"{key} {'on' if key == 'rand_augment' else value}" for key, value in changes.items())


@pytest.mark.parametrize("changes", SETTINGS, ids=named)
def test_no_operator_of_an_update_reads_a_value(changes):
    assert second_update(run_of(CPU, **changes)) == 0


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # of torch, for its first call in another thread
@pytest.mark.parametrize("changes", [{"opts": opts} for opts, _ in COPIES] + SETTINGS, ids=named)
def test_an_update_does_not_wait_for_a_gpu(changes):
    run = run_of(torch.device("cuda", 0), **changes)
    run.forward.train()
    for index in range(4):
        group = [batch.pin_memory() for batch in batches(run.accumulation)]
        with waits_are_errors() if index > 1 else nullcontext():
            run._update(group)


@pytest.mark.gpu
@gpu
def test_a_run_on_a_gpu_resumes_without_a_wait_from_what_it_has_saved(tmp_path):
    run, other = (run_of(torch.device("cuda", 0), ema=True) for _ in range(2))
    run.forward.train()
    run._update([batch.pin_memory() for batch in batches(1)])
    for value in run.network.state_dict().values():
        value.copy_(torch.rand(value.shape, device=CPU).to(value.dtype))
    checkpoint_folder(tmp_path).save(run)
    saved = torch.load(tmp_path / "latest.pth", weights_only=True)
    for name, value in run.network.state_dict().items():
        copy = saved["model"][name]
        assert copy.device == CPU
        assert copy.untyped_storage().nbytes() == copy.nbytes == value.nbytes
        assert torch.equal(copy, value.cpu())
    state = read_state(tmp_path / "latest.pth")
    with waits_are_errors():
        restore(other, state)
    for own, theirs in zip(other.optimizer.state.values(), run.optimizer.state.values(), strict=True):
        assert all(torch.equal(own[name].cpu(), theirs[name].cpu()) for name in theirs)
    for own, theirs in zip(other.network.state_dict().values(), run.network.state_dict().values(), strict=True):
        assert torch.equal(own.cpu(), theirs.cpu())


class Broken(nn.CrossEntropyLoss):
    """A loss that is not finite."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) * torch.nan


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_update_reads_no_value(name, dtype):
    run = run_of(CPU, name=name, dtype=dtype, criterion=Broken(), max_skipped=2)
    assert second_update(run) == 0
    run.check_skipped()
    assert run.progress.skipped == 2


@pytest.mark.parametrize("kind", LOSSES.values(), ids=LOSSES)
def test_a_margin_softmax_reads_no_value(kind):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    own, theirs = (
        type("", (*mixed, getattr(losses, kind.loss)), {})(
            num_classes=CLASSES, embedding_size=4, margin=kind.margin, scale=kind.scale
        )
        for mixed in ((TargetsByIndex,), ())
    )
    theirs.load_state_dict(own.state_dict())
    embeddings, labels = torch.randn(COUNT, 4), torch.randint(0, CLASSES, (COUNT,))
    with Waits():
        loss = own(embeddings, labels)
        loss.backward()
    expected = theirs(embeddings, labels)
    expected.backward()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(own.W.grad, theirs.W.grad, rtol=1e-6, atol=1e-7)


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.isfinite().all()),
    "a mask": lambda x: x[x > 0],
    "an assignment by a mask": lambda x: x.__setitem__(x > 0, torch.zeros(x.numel())),
    "an index from a list": lambda x: x.to(META)[torch.tensor([0, 1])],
    "nonzero": lambda x: x.nonzero(),
    "a tensor from a list": lambda x: torch.tensor([1.0, 2.0], device=META),
    "a copy": lambda x: x.to(META),
    "timm's mixing by image": lambda x: Mixup(mode="elem", num_classes=CLASSES)(
        x.to(META), torch.zeros(8, device=META)
    ),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_waits_are_seen(wait):
    with pytest.raises((AssertionError, RuntimeError)), Waits():
        wait(torch.ones(COUNT, 3, 4, 4))


def test_an_update_that_reads_its_loss_is_seen():
    class Reading(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            loss = super().forward(input, target)
            return loss if loss.item() else 2 * loss

    with pytest.raises(AssertionError, match="_local_scalar_dense.default reads a value"):
        second_update(run_of(CPU, criterion=Reading()))
