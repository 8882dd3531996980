"""Every network runs where its input is: no operator makes a tensor on another device, or in another precision."""

import pytest
import torch
from model_helpers import small_options
from torch import nn
from updates import classifier, segmenter

from benchmarks.operators import Operator, record, without_memory
from models import list_models
from models.fusion import fuse_batch_norms, is_fusible
from models.reparam import to_deploy

DECODERS = ["upernet", "pspnet"]


def network_of(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """Returns a network on `meta` and the size of its images."""
    if name in DECODERS:
        return segmenter(name, blocks=(1, 1, 1, 1)), (256, 256)
    network = classifier(name, **small_options(name))
    return network, network.img_size


def check(operators: list[Operator], device: str) -> None:
    """Fails for a tensor elsewhere, those of no dimension included, and for one in float64."""
    for operator in operators:
        assert {operand.device for operand in (*operator.reads, *operator.writes)} <= {device}, operator
        assert all(operand.dtype is not torch.float64 for operand in operator.writes), operator


@pytest.mark.parametrize("name", [*list_models(), *DECODERS])
def test_training(name: str) -> None:
    network, size = network_of(name)
    images = torch.empty(4, 3, *size, device="meta")
    check(record(lambda: network(images).square().mean().backward()), "meta")
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device, parameter.grad.dtype) == (images.device, torch.float32), name


@pytest.mark.parametrize("form", ["train", "deploy", "fused"])
@pytest.mark.parametrize("name", [*list_models(), *DECODERS])
def test_evaluation(name: str, form: str) -> None:
    network, size = network_of(name)
    network.eval()
    if form == "fused" and not is_fusible(network):
        pytest.skip("this network has no fused form")
    network = {"train": lambda model: model, "deploy": to_deploy, "fused": fuse_batch_norms}[form](network)
    with torch.no_grad():
        check(record(lambda: network(torch.empty(2, 3, *size, device="meta"))), "meta")


@pytest.mark.parametrize("name", ["RepMLPNet-T224", "RepMLP-Res50-bottleneck-224", "ResMLP-S12-224"])
def test_inference_of_a_gpu(name: str) -> None:
    """The operators that run on a GPU only; torch raises where a tensor of the CPU meets them."""
    network, size = network_of(name)
    fused = fuse_batch_norms(network.eval()) if is_fusible(network) else to_deploy(network.eval())
    with without_memory(), torch.no_grad():
        fused.to_empty(device="cuda")
        check(record(lambda: fused(torch.empty(2, 3, *size, device="cuda"))), "cuda")


def test_a_tensor_of_the_cpu_is_found() -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.arange(3).sum()

    operators = record(lambda: Shifted()(torch.empty(2, 3, device="meta")))
    with pytest.raises(AssertionError, match="arange"):
        check(operators, "meta")
