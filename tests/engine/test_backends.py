"""What a run sets up for a GPU; the settings themselves are there without one."""

import os
from collections.abc import Iterator

import pytest
import torch
from in_process import contained
from settings import settings

from engine.backends import describe, set_up


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with contained():
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
            os.environ.pop(name, None)
        yield


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_for_products_and_convolutions_alike(allowed: bool) -> None:
    set_up(settings(f"TF32 {allowed}"))
    assert tf32() == (allowed, allowed)
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if allowed else "ieee")


def test_float32_is_not_rounded_unless_asked_for() -> None:
    """torch itself would round in convolutions."""
    torch.backends.cudnn.allow_tf32 = True
    set_up(settings())
    assert tf32() == (False, False)


@pytest.mark.parametrize(
    ("opts", "on", "said"),
    [
        ("", True, "cuDNN benchmark on"),
        ("CUDNN_BENCHMARK False", False, "cuDNN benchmark off"),
        ("DETERMINISTIC True", False, "cuDNN benchmark off, by DETERMINISTIC"),
        ("DETERMINISTIC True CUDNN_BENCHMARK False", False, "cuDNN benchmark off"),
    ],
)
def test_deterministic_wins_over_the_choice_of_convolutions(opts: str, on: bool, said: str) -> None:
    cfg = settings(opts)
    set_up(cfg)
    assert torch.backends.cudnn.benchmark is on
    assert describe(cfg) == f"TF32 off, {said}, allocator: default"
    assert torch.are_deterministic_algorithms_enabled() is cfg.DETERMINISTIC
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if cfg.DETERMINISTIC else None)


def test_the_memory_of_a_gpu_grows_in_segments() -> None:
    cfg = settings("EXPANDABLE_SEGMENTS True")
    set_up(cfg)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert describe(cfg).endswith("allocator: PYTORCH_ALLOC_CONF expandable_segments:True")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_environment_wins(name: str) -> None:
    os.environ |= {name: "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    cfg = settings("EXPANDABLE_SEGMENTS True DETERMINISTIC True")
    set_up(cfg)
    variables = {key: value for key, value in os.environ.items() if "ALLOC_CONF" in key}
    assert variables == {name: "max_split_size_mb:64"}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert f"allocator: {name} max_split_size_mb:64" in describe(cfg)
