"""Every published size is ours, but for the rows that are known to differ."""

import pytest
import torch

from models import SPECS
from models.counts import BRANCHES, count, count_parts
from models.folding import fold_batch_norms
from models.layers import ConvNorm
from models.reparam import to_deploy
from models.reported import (
    CIFAR,
    CITYSCAPES,
    MMPRETRAIN,
    P1,
    README,
    REPORTED,
    TABLE2,
    TABLE5,
    Reported,
    agrees,
    count_reported,
)

# The quantities in which ours do not round to the published ones, each with a note.
DIFFERENT = {
    ("RepMLPNet-B256", README): {"parameters"},
    ("RepMLPNet-L256", README): {"parameters", "multiply_adds"},
    ("RepMLPNet-B256", MMPRETRAIN): {"multiply_adds"},
    ("RepMLPNet-B224", MMPRETRAIN): {"multiply_adds"},
    ("resnet101", TABLE2): {"parameters", "multiply_adds"},
    ("resnext101_32x4d", TABLE2): {"parameters"},
    ("regnetx_064", TABLE2): {"multiply_adds"},
    ("RepMLPNet-T224", TABLE5): {"added"},
    ("RepMLPNet-D256", TABLE5): {"added"},
    ("ResMLP-C100, branches=[]", CIFAR): {"multiply_adds"},
    ("WideConvNet-C10", P1): {"parameters"},
    ("resnet101c", CITYSCAPES): {"multiply_adds"},
    ("RepMLPNet-D256, downsample=conv3, rank=1", CITYSCAPES): {"multiply_adds"},
    ("RepMLPNet-D256, downsample=conv5, rank=1", CITYSCAPES): {"multiply_adds"},
}
COUNTED = [row for row in REPORTED if row.parameters or row.multiply_adds or row.added]


def identity(row: Reported) -> str:
    return f"{row.name} ({row.source})"


def test_rows_are_unique_and_say_what_they_report() -> None:
    assert len({identity(row) for row in REPORTED}) == len(REPORTED)
    assert {row.arch for row in REPORTED if row.source == README} == {
        arch for arch, spec in SPECS.items() if max(spec.channels) >= 512
    }
    for row in REPORTED:
        assert row.note or row.top1 or row.parameters
    assert DIFFERENT.keys() <= {(row.name, row.source) for row in REPORTED if row.note}


@pytest.mark.parametrize("row", COUNTED, ids=identity)
def test_our_count_is_the_published_one(row: Reported) -> None:
    ours = count_reported(row)
    different = {
        *(["parameters"] if not agrees(ours.training.parameters / 1e6, row.parameters) else []),
        *(["multiply_adds"] if not agrees(ours.deploy.multiply_adds / 1e9, row.multiply_adds) else []),
        *(["added"] if row.added and ours.added != int(row.added) else []),
    }
    assert different == DIFFERENT.get((row.name, row.source), set())
    # Those that differ do so by a unit of the last digit, or for the reason that the note gives.
    if row.source in (README, TABLE2):
        assert ours.training.parameters / 1e6 == pytest.approx(float(row.parameters), abs=0.16)
        assert ours.deploy.multiply_adds / 1e9 == pytest.approx(float(row.multiply_adds), abs=0.3)


def test_what_the_branches_add_on_imagenet() -> None:
    rows = [row for row in REPORTED if row.source == TABLE5 and row.added]
    assert [(row.arch, count_reported(row).added) for row in rows] == [
        ("RepMLPNet-T224", 5068),
        ("RepMLPNet-D256", 7756),
    ]


@pytest.mark.parametrize(("printed", "ours"), [("38.3", 38.251), ("38.3", 38.349), ("96", 95.5), ("", 7.0)])
def test_what_rounds_to_a_figure_agrees(printed: str, ours: float) -> None:
    assert agrees(ours, printed)


@pytest.mark.parametrize(("printed", "ours"), [("38.3", 38.351), ("38.30", 38.31), ("3.0", 2.9)])
def test_what_does_not_round_to_a_figure_differs(printed: str, ours: float) -> None:
    assert not agrees(ours, printed)


def test_the_note_on_folded_convolutions() -> None:
    """Cut off, the deploy structures with the BatchNorms behind convolutions folded have the published sizes."""
    for row in (row for row in REPORTED if row.source == README):
        with torch.device("meta"):
            deploy = to_deploy(row.build())
        folded = sum(m.bn.num_features for m in deploy.modules() if isinstance(m, ConvNorm))
        size = sum(p.numel() for p in deploy.parameters()) - folded
        assert f"{size // 10**5 / 10:.1f}" == row.parameters
        assert "folded" not in row.note or f"{size / 1e6:.2f} M" in row.note


@pytest.mark.parametrize(("arch", "size"), [("resnet101", "44.50"), ("resnext101_32x4d", "44.11")])
def test_the_note_on_folded_baselines(arch: str, size: str) -> None:
    row = next(row for row in REPORTED if (row.arch, row.source) == (arch, TABLE2))
    with torch.device("meta"):
        folded = fold_batch_norms(row.build(), (64, 64))
    assert f"{sum(p.numel() for p in folded.parameters()) / 1e6:.2f}" == size
    assert row.note.startswith(f"{size} M")


@pytest.mark.parametrize(
    ("arch", "operations"),
    [
        ("RepMLPNet-C100", {1: 294_912, 3: 2_654_208}),
        ("ResMLP-C100", {1: 12 * 256 * 16 * 16, 3: 12 * 256 * 16 * 16 * 9}),  # 12 blocks of 256 channels of 16x16
    ],
)
def test_multiply_adds_of_a_branch(arch: str, operations: dict[int, int]) -> None:
    """The RepMLPNet's are published; one multiply-add for each tap, channel and position."""
    rows = {tuple(row.changes["branches"]): row for row in REPORTED if (row.arch, row.source) == (arch, CIFAR)}
    with torch.device("meta"):
        plain = count(rows[()].build(), (1, 3, 32, 32))
        for k, expected in operations.items():
            network = rows[(k,)].build()
            parts = count_parts(network, (1, 3, 32, 32))
            assert sum(c.multiply_adds for (_, kind), c in parts.items() if kind == BRANCHES) == expected
            assert count(network, (1, 3, 32, 32)).multiply_adds - plain.multiply_adds == expected
