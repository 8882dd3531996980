"""Copies of states between host and device; on a CPU, how tensors are packed into one buffer."""

import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.transfer import CopyStream, _host_copies, send, to_device, to_host

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensors() -> list[Tensor]:
    """Of every layout and several dtypes, some of sizes that are no multiple of any alignment."""
    return [
        torch.randn(3, 5, 7),
        torch.arange(5),
        torch.tensor(2.5, dtype=torch.float64),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 5).t(),
        torch.randn(3).bfloat16(),
        torch.tensor([True, False, True]),
        torch.empty(0, 3),
        torch.randn(4, 6)[:, ::2],
    ]


def state() -> dict[str, Any]:
    """As a checkpoint holds it."""
    first, second, third, *rest = tensors()
    return {"model": nn.BatchNorm1d(2).state_dict(), "list": [first, (second, {7: third})], "rest": rest, "epoch": 3}


def leaves(value: object) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in [key, *leaves(inner)]]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


def assert_same(first: object, second: object, device: torch.device) -> None:
    for one, other in zip(leaves(first), leaves(second), strict=True):
        if isinstance(one, Tensor):
            assert other.device.type == device.type
            assert one.dtype == other.dtype
            assert torch.equal(one, other.cpu())
        else:
            assert one == other


def test_copies_are_equal_and_have_memory_of_their_own():
    originals = tensors()
    copies = _host_copies(originals)
    assert_same(originals, copies, CPU)
    for original, copy in zip(originals, copies, strict=True):
        assert copy.untyped_storage().nbytes() == original.nbytes
        assert copy.stride() == original.clone().stride()
    copies[0].zero_()
    assert_same(originals[1:], copies[1:], CPU)


def test_files_of_copies_hold_each_tensor_once_and_load_as_plain_data():
    copies, file, alone = _host_copies(tensors()), io.BytesIO(), io.BytesIO()
    torch.save(copies, file)
    torch.save([tensor.clone() for tensor in tensors()], alone)
    assert abs(len(file.getvalue()) - len(alone.getvalue())) < 512
    file.seek(0)
    assert_same(copies, torch.load(file, weights_only=True), CPU)


def test_on_a_cpu_nothing_is_copied():
    given = state()
    assert to_host(given) is given
    assert to_device(given, CPU) is given
    tensor = torch.ones(2)
    assert send(tensor, CPU) is CopyStream(CPU).send(tensor) is tensor


@pytest.mark.gpu
@gpu
def test_a_state_goes_to_the_gpu_and_back():
    device, given = torch.device("cuda"), state()
    there = to_device(given, device)
    assert_same(given, there, device)
    back = to_host(there)
    assert_same(given, back, CPU)
    assert isinstance(back["model"], OrderedDict)
    assert back["model"]._metadata == given["model"]._metadata


@pytest.mark.gpu
@gpu
def test_no_copy_to_the_gpu_waits():
    device, given = torch.device("cuda"), state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there, copies = to_device(given, device), CopyStream(device)
        sent = [copies.send(torch.full((1000,), float(i)).pin_memory()) for i in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(given, there, device)
    assert [value.cpu().unique().tolist() for value in sent] == [[float(i)] for i in range(20)]
