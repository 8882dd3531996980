"""The table of GPUs."""

import pytest

from utils.accelerators import ACCELERATORS, GB, GIB, Accelerator, find


@pytest.mark.parametrize(
    ("device", "name", "bf16"),
    [
        ("NVIDIA H200", "H200", 989.4),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", 312.0),
        ("A100-SXM4-40GB", "A100-SXM4-40GB", 312.0),  # of older drivers
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", "L40S", 362.0),
        ("NVIDIA L4", "L4", 121.0),
        ("NVIDIA A10G", "A10G", 70.0),
        ("Tesla T4", "T4", 8.1),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB", 15.7),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2),
        ("NVIDIA RTX A6000", "RTX A6000", 154.8),
    ],
)
def test_a_device_is_found_by_its_name_in_cuda(device: str, name: str, bf16: float) -> None:
    row = find(device)
    assert row is not None
    assert (row.name, row.peak("bf16")) == (name, bf16)


@pytest.mark.parametrize(
    "device",
    ["", "NVIDIA", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H20", "cpu"],
)
def test_another_device_has_no_row(device: str) -> None:
    assert find(device) is None


def test_every_name_is_given_once() -> None:
    names = [row.name for row in ACCELERATORS]
    assert len({*names}) == len(names)


@pytest.mark.parametrize("row", ACCELERATORS, ids=lambda row: row.name)
def test_the_figures_of_a_row_are_of_the_right_order(row: Accelerator) -> None:
    """Catches a row with a figure in another unit, one with sparsity, or two that are exchanged."""
    assert find(row.name) is row
    assert row.fp32 <= row.tf32 <= row.fp16
    assert row.bf16 in (row.fp16, row.fp32)
    assert 5 < row.fp32 < 120
    assert 60 < row.fp16 < 3000
    assert 250 * GB < row.bandwidth < 10_000 * GB
    assert 16 * GIB <= row.memory < 300 * GIB
    # Tensor cores double the rate from TF32 to half precision.
    assert row.tf32 == row.fp32 or 1.9 < row.fp16 / row.tf32 < 2.1


def test_precisions_are_told_apart() -> None:
    row = find("Tesla V100-SXM2-16GB")
    assert row is not None
    assert [row.peak(name) for name in ("bf16", "fp16", "tf32", "fp32")] == [15.7, 125.0, 15.7, 15.7]
