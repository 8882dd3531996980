"""The fused inference form of a RepMLP-ResNet gives the logits of the network that it was made from."""

from dataclasses import replace

import pytest
import torch
from model_helpers import random_tensor, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models.fused_resnet
from models import RepMLPResNet, RepMLPResNetSpec
from models.fused_resnet import FusedBlock, FusedPointwise, FusedRepMLPResNet
from models.fusion import fuse_batch_norms, fuse_verified, is_fusible
from models.reparam import relative_difference, to_deploy

# c2 ... c5 are 16x24, 8x12, 4x6 and 2x3.
SPEC = RepMLPResNetSpec("bottleneck", (2, 1, 2, 0), (1, 2, 4, 1), 2, (64, 96), (8, 16, 32, 64), (2, 3, 2, 2))
CASES = {
    "bottleneck": (SPEC, {}),
    "light": (replace(SPEC, style="light"), {}),
    "no RepMLP, wide bottlenecks": (replace(SPEC, reductions=(0, 0, 0, 0), bottleneck=1, stem_reduction=2), {}),
    "no Global Perceptron": (replace(SPEC, global_perceptron=False), {}),
    "an embedding": (replace(SPEC, embedding=True), {}),
    "dilated": (replace(SPEC, output_stride=8), {}),
    "one partition in c5": (replace(SPEC, reductions=(0, 0, 0, 1), image_size=64), {}),
    "without head, grey": (SPEC, {"num_classes": 0, "in_chans": 1}),
    "every position": (SPEC, {"global_pool": ""}),
    "every position, without head": (SPEC, {"global_pool": "", "num_classes": 0}),
}


def network(case: str, deploy: bool = False) -> RepMLPResNet:
    spec, options = CASES[case]
    return randomised(RepMLPResNet(spec, **{"num_classes": 5} | options, deploy=deploy)).eval()


def images(model: RepMLPResNet, n: int = 3) -> torch.Tensor:
    return random_tensor(n, model.in_chans, *model.img_size, seed=1)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_logits_are_the_networks_own(case: str, deploy: bool) -> None:
    model = network(case, deploy)
    x = images(model)
    expected, fused = model(x), fuse_batch_norms(model)
    assert isinstance(fused, FusedRepMLPResNet)
    actual = fused(x)
    assert actual.shape == expected.shape
    assert relative_difference(expected, actual) < 1e-13
    assert relative_difference(expected[:1], expected[1:2]) > 1e-3


@torch.no_grad()
def test_without_global_perceptrons_any_size_that_the_partitions_divide_will_do() -> None:
    model = network("no Global Perceptron")
    fused, x = fuse_batch_norms(model), random_tensor(2, 3, 32, 160)
    assert relative_difference(model(x), fused(x)) < 1e-13
    with pytest.raises(ValueError, match="an input of 40x160 must be a multiple of 32"):
        fused(random_tensor(2, 3, 40, 160))
    with pytest.raises(ValueError, match=r"input of 96x64 .* made for 64x96"):
        fuse_batch_norms(network("light"))(random_tensor(1, 3, 96, 64))


@torch.no_grad()
def test_no_batch_norm_is_left_and_nothing_else_is_changed() -> None:
    model = network("bottleneck")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused, x = fuse_batch_norms(model), images(model)
    assert is_fusible(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert not any(tensor.requires_grad for tensor in fused.state_dict(keep_vars=True).values())
    kept, first = x.clone(), fused(x)
    assert torch.equal(first, fused(x))
    assert torch.equal(x, kept), "the input belongs to the caller"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
@torch.no_grad()
def test_other_dtypes_differ_by_their_rounding_only(dtype: torch.dtype, tolerance: float) -> None:
    model = network("bottleneck")
    x = images(model)
    expected, fused = model(x), fuse_batch_norms(model.to(dtype))
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    assert relative_difference(expected, fused(x.to(dtype))) < tolerance


@torch.no_grad()
def test_it_has_the_operations_of_the_deploy_form() -> None:
    model = network("dilated").float()
    x, counts = images(model).float(), []
    for form in (to_deploy(model), fuse_batch_norms(model)):
        with FlopCounterMode(display=False) as counter:
            form(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@torch.no_grad()
def test_it_can_be_exported_for_any_batch() -> None:
    model = network("bottleneck").float()
    fused, x = fuse_batch_norms(model), images(model).float()
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(fused, (x,), dynamic_shapes=({**batch},)).module()
    assert relative_difference(fused(x[:2]), exported(x[:2])) < 1e-6


@pytest.mark.parametrize(
    ("kind", "name"), [(FusedBlock, "floor"), (FusedPointwise, "bias"), (models.fused_resnet.FusedRepMLP, "kernel")]
)
def test_a_wrong_fusion_is_noticed(kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = kind.__init__

    def broken(self: nn.Module, *args: object) -> None:
        built(self, *args)
        getattr(self, name).neg_()

    monkeypatch.setattr(kind, "__init__", broken)
    with torch.no_grad(), pytest.raises(ValueError, match="fusing the BatchNorms changes the logits by"):
        fuse_verified(network("light").float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_as_on_a_cpu() -> None:
    model = network("bottleneck").float()
    x = images(model).float()
    assert relative_difference(fuse_batch_norms(model)(x), fuse_batch_norms(model.cuda())(x.cuda()).cpu()) < 1e-4
