"""Errors of allocations that fail: one line with what was asked for, what was in use, and what to lower."""

import re

import pytest
import torch
import torch.distributed as dist

from utils import cli
from utils.memory import OutOfMemory, clear_about_memory, readable

GPU = (
    "CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 3 has a total capacity of 79.11 GiB of which 512.00 KiB is "
    "free. Including non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and {unused} is reserved by PyTorch but unallocated. {advice}"
)
ADVICE = (
    "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid "
    "fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html)"
)
FIGURES = (
    "asked for 1024.00 MiB more, tensors use 70.00 GiB, {unused} are reserved but unused, 512.00 KiB of 79.11 GiB are "
    "free"
)
PIECES = "; what is reserved would do, but is in pieces: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def line_of(error: Exception) -> str:
    with pytest.raises(OutOfMemory) as caught, clear_about_memory("lower it"):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.mark.parametrize(
    ("unused", "advice", "end"),
    [
        ("0 bytes", ADVICE, ""),
        ("1023.00 MiB", ADVICE, ""),
        ("1.00 GiB", ADVICE, PIECES),
        ("2.50 GiB", ADVICE, PIECES),
        ("2.50 GiB", "", ""),  # the segments can expand already
    ],
)
def test_a_gpu_without_memory(unused, advice, end):
    error = torch.OutOfMemoryError(GPU.format(unused=unused, advice=advice))
    assert line_of(error) == f"GPU 3 is out of memory: {FIGURES.format(unused=unused)}{end}: lower it"


def test_figures_that_a_version_of_torch_does_not_give_are_left_out():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has not enough")
    assert line_of(error) == "GPU 0 is out of memory: asked for 2.00 GiB more: lower it"


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"])
def test_memory_that_the_libraries_of_cuda_ask_for(text):
    found = "CUDA error: out of memory" if "out of" in text else "CUBLAS_STATUS_ALLOC_FAILED"
    assert line_of(RuntimeError(f"{text}\nCompile with TORCH_USE_CUDA_DSA")) == (
        f"the GPU is out of memory ({found}): lower it"
    )


MACHINE = r"the machine is out of memory: this process uses [\d.]+ [MG]iB of [\d.]+ GiB"


def test_a_tensor_that_no_machine_has_room_for():
    with pytest.raises(OutOfMemory) as caught, clear_about_memory("lower it"):
        torch.empty(2**44)
    assert re.fullmatch(MACHINE + ", asked for 65536.00 GiB more: lower it", str(caught.value))


def test_an_object_that_no_machine_has_room_for():
    with pytest.raises(OutOfMemory) as caught, clear_about_memory("lower it"):
        bytearray(2**50)
    assert re.fullmatch(f"{MACHINE}: lower it", str(caught.value))


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ValueError("memory"), KeyError("out of memory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, clear_about_memory("lower it"):
        raise error
    assert caught.value is error


def test_the_innermost_remedy_is_given():
    with pytest.raises(OutOfMemory, match=": inner$"), clear_about_memory("outer"), clear_about_memory("inner"):
        torch.empty(2**50)


def test_no_rank_is_named_in_one_process_and_the_own_one_of_several(monkeypatch: pytest.MonkeyPatch):
    assert line_of(MemoryError()).startswith("the machine")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    assert line_of(MemoryError()).startswith("rank 2: the machine")


def test_every_program_ends_with_the_line(capsys):
    assert cli.status_of(lambda: int(torch.empty(2**50).sum())) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {MACHINE}, asked for .* more: {cli.MORE_MEMORY}\n", err)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (7 * 2**30, "7.00 GiB")]
)
def test_sizes_are_readable(size, text):
    assert readable(size) == text
