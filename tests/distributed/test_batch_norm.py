"""BatchNorm over all processes on CPUs against torch's own over all images at once, in every setting and precision."""

from collections.abc import Sequence

import pytest
import torch
from distributed_ranks import in_ranks
from torch import Tensor, nn

from engine.precision import autocast
from engine.sync_batch_norm import synchronise_batch_norms
from utils.distributed import RankInfo

ALONE = RankInfo(0, 1, 0, torch.device("cpu"))
CHANNELS, SIZE = 3, 5
# For each dtype of the input: the precision of the weights, that of autocast, and the error that rounding makes.
PRECISIONS = {
    torch.float64: (torch.float64, None, 1e-12),
    torch.float32: (torch.float32, None, 2e-6),
    torch.bfloat16: (torch.float32, torch.bfloat16, 2e-2),
    torch.float16: (torch.float32, torch.float16, 3e-3),
}
CASES = (
    ("default", {}),
    ("cumulative", {"momentum": None}),
    ("other", {"momentum": 0.7, "eps": 0.1}),
    ("not affine", {"affine": False}),
    ("no statistics", {"track_running_stats": False}),
    ("vectors", {"kind": nn.BatchNorm1d}),
)
WORLD, EVEN = 3, (4, 4, 4)
UNEVEN = ((1, 5, 2), (3, 1, 0), (0, 4, 0))
Figures = dict[str, Tensor]


def network(settings: dict, dtype: torch.dtype) -> nn.Module:
    """Two convolutions, or linear layers, with a norm between them that is not as it was initialised."""
    torch.manual_seed(1)
    kind, vectors = settings.get("kind", nn.BatchNorm2d), "kind" in settings
    norm = kind(CHANNELS, **{name: value for name, value in settings.items() if name != "kind"})
    for name, value in norm.named_parameters():
        nn.init.uniform_(value, 0.5, 1.5) if name == "weight" else nn.init.normal_(value)
    if vectors:
        first = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIZE * SIZE, CHANNELS, bias=False))
        return nn.Sequential(first, norm, nn.Linear(CHANNELS, 2)).to(dtype)
    return nn.Sequential(nn.Conv2d(2, CHANNELS, 3, padding=1), norm, nn.Conv2d(CHANNELS, 2, 3)).to(dtype)


def examples(count: int, dtype: torch.dtype) -> Tensor:
    """Images whose mean is far from zero, beside their deviation."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 2, SIZE, SIZE, generator=generator, dtype=torch.float64).add(3).to(dtype)


def share_of(process: RankInfo, counts: Sequence[int]) -> slice:
    """Which of the images a process has; all of them where it is alone."""
    start = sum(counts[: process.rank])
    return slice(start, start + counts[process.rank]) if process.world_size > 1 else slice(None)


def figures(process: RankInfo, input_dtype: torch.dtype, settings: dict, counts: Sequence[int]) -> Figures:
    """Two batches in training, one in evaluation: outputs, gradients of images and of weights, running statistics."""
    dtype, half, _ = PRECISIONS[input_dtype]
    model = network(settings, dtype)
    if process.world_size > 1:
        model = synchronise_batch_norms(model)
        assert type(model[1]).__name__.startswith("CpuSyncBatchNorm")
    share, found = share_of(process, counts), {}
    for step in range(2):
        images = (examples(sum(counts), dtype) * (step + 1))[share].requires_grad_()
        with autocast(process.device, half):
            hidden = model[0](images)
            normalised = model[1](hidden)
            output = model[2](normalised)
        assert hidden.dtype == normalised.dtype == input_dtype
        output.to(dtype).square().sum().backward()  # a sum, so that shares add up to the whole
        found[f"output {step}"], found[f"gradient {step}"] = output.detach(), images.grad
    model.eval()
    with torch.no_grad(), autocast(process.device, half):
        found["evaluation"] = model(examples(sum(counts), dtype)[share])
    found |= {f"sum {name}": p.grad for name, p in model.named_parameters()}
    return found | {f"state {name}": value for name, value in model[1].named_buffers()}


def together(ranks: list[Figures]) -> Figures:
    """What all processes found as one would have: pieces joined, gradients of weights added up, states the same."""
    joined = {}
    for name, first in ranks[0].items():
        values = [rank[name] for rank in ranks]
        if name.startswith("state"):
            assert all(torch.equal(first, value) for value in values), name
            joined[name] = first
        else:
            joined[name] = sum(values) if name.startswith("sum") else torch.cat(values)
    return joined


def assert_close(expected: Figures, found: Figures, tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        difference = (found[name].double() - value.double()).norm() / value.double().norm()
        # The bias before a norm is taken out by it, and its gradient nothing but rounding.
        assert difference <= tolerance or name == "sum 0.bias", f"{name}: {difference}"


def every_figure(process: RankInfo) -> dict[tuple, Figures]:
    even = {(dtype, case): figures(process, dtype, settings, EVEN) for dtype in PRECISIONS for case, settings in CASES}
    return even | {counts: figures(process, torch.float64, {}, counts) for counts in UNEVEN}


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple, Figures]]:
    """What each of three processes finds in every case."""
    return in_ranks(every_figure, WORLD)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("case", "settings"), CASES)
def test_three_processes_equal_one(ranks, dtype, case, settings):
    expected = figures(ALONE, dtype, settings, EVEN)
    found = together([rank[dtype, case] for rank in ranks])
    if case == "no statistics":  # then each process normalises by its own batch in evaluation
        del expected["evaluation"], found["evaluation"]
    assert_close(expected, found, PRECISIONS[dtype][2])


@pytest.mark.parametrize("counts", UNEVEN)
def test_processes_may_have_different_numbers_of_images(ranks, counts):
    expected = figures(ALONE, torch.float64, {}, counts)
    assert_close(expected, together([rank[counts] for rank in ranks]), 1e-12)


def few_values(process: RankInfo) -> list[str | list[float]]:
    """Normalises images of one pixel: none, one on the first process, and one on each."""
    found: list[str | list[float]] = []
    for counts in ((0, 0), (1, 0), (1, 1)):
        norm = synchronise_batch_norms(nn.BatchNorm2d(CHANNELS))
        images = torch.full((counts[process.rank], CHANNELS, 1, 1), float(process.rank))
        try:
            found.append(norm(images).flatten().tolist())
        except ValueError as error:
            found.append(str(error))
    return found


def test_fewer_than_two_values_are_refused_by_all():
    said = "BatchNorm in training needs more than one value per channel, not "
    first, second = in_ranks(few_values, 2)
    assert first[:2] == second[:2] == [f"{said}0", f"{said}1"]
    assert (first[2], second[2]) == (pytest.approx([-1.0] * 3, rel=1e-4), pytest.approx([1.0] * 3, rel=1e-4))
