"""The fused inference form gives the logits of the network that it was made from."""

import pytest
import torch
from model_helpers import tiny_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import models.fusion
from models.fusion import FusedUnit, fuse_batch_norms, fuse_verified
from models.reparam import randomize_statistics, relative_difference
from models.repmlpnet import RepMLPNet, RepMLPNetSpec

SPECS = {
    "sets of every kind": (RepMLPNetSpec((8, 12, 16), (2, 1, 2), (1, 4, 16), 16, patch_size=2), {}),
    "no branches": (RepMLPNetSpec((8, 16), (1, 1), (2, 4), 8, patch_size=2, branches=()), {}),
    "not square, grey, three classes": (
        RepMLPNetSpec((8, 16), (1, 2), (2, 8), 8, patch_size=2),
        {"img_size": (8, 12), "in_chans": 1, "num_classes": 3},
    ),
    "without head": (RepMLPNetSpec((8, 16), (1, 1), (4, 2), 8, patch_size=2), {"num_classes": 0}),
    "no Global Perceptron": (
        RepMLPNetSpec((8, 16), (1, 2), (2, 4), 8, patch_size=2, global_perceptron=False),
        {},
    ),
    "one stage": (RepMLPNetSpec((6,), (3,), (3,), 12, patch_size=4), {}),
}


def network(name: str, deploy: bool = False) -> RepMLPNet:
    spec, options = SPECS[name]
    torch.manual_seed(0)
    model = RepMLPNet(spec, deploy=deploy, **options).double().eval()
    randomize_statistics(model)
    return model


def images(model: RepMLPNet, times: tuple[int, int] = (1, 1), n: int = 3) -> torch.Tensor:
    height, width = (size * t for size, t in zip(model.img_size, times, strict=True))
    return torch.randn(
        n, model.in_chans, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("times", [(1, 1), (2, 1), (2, 3)], ids=str)
@torch.no_grad()
def test_the_logits_are_the_networks_own_at_any_size_that_the_partitions_divide(name, deploy, times):
    model = network(name, deploy)
    x = images(model, times)
    assert relative_difference(model(x), fuse_batch_norms(model)(x)) < 1e-13


@torch.no_grad()
def test_the_operations_of_the_ffn_are_counted():
    counts = []
    for channels in (8, 16):
        fused = fuse_batch_norms(RepMLPNet(RepMLPNetSpec((channels,), (1,), (1,), 8, patch_size=2, ffn_expansion=3)))
        with FlopCounterMode(display=False) as counter:
            fused(torch.zeros(5, 3, 8, 8))
        counts.append(counter.get_flop_counts()["Global"][torch.ops.repmlpnet.add_ffn_in_pieces])
    assert counts == [2 * 5 * 4 * 4 * 2 * 3 * channels**2 for channels in (8, 16)]


@torch.no_grad()
def test_a_batch_norm_whose_scale_is_zero_somewhere_is_folded_too():
    model = network("sets of every kind")
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight[::3] = 0
    x = images(model)
    assert relative_difference(model(x), fuse_batch_norms(model)(x)) < 1e-13


@torch.no_grad()
def test_pieces_of_the_ffn_are_as_good_as_the_whole(monkeypatch):
    model = network("sets of every kind")
    fused, x = fuse_batch_norms(model), images(model)
    expected = fused(x)
    monkeypatch.setattr(models.fusion, "FFN_COLUMNS", 7)
    assert relative_difference(expected, fused(x)) < 1e-14


@torch.no_grad()
def test_no_batch_norm_is_left_and_the_network_stays_as_it_was():
    model = network("sets of every kind")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse_batch_norms(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    x = images(model)
    kept = x.clone()
    fused(x)
    assert torch.equal(x, kept), "the input belongs to the caller"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
@torch.no_grad()
def test_other_dtypes_differ_by_their_rounding_only(dtype, tolerance):
    model = network("sets of every kind")
    x = images(model)
    expected = model(x)
    fused = fuse_batch_norms(model.to(dtype))
    assert all(p.dtype == dtype for p in fused.parameters())
    assert relative_difference(expected, fused(x.to(dtype))) < tolerance


@torch.no_grad()
def test_the_fused_form_can_be_exported():
    model = models.create_model("RepMLPNet-Digits", num_classes=10).eval()
    randomize_statistics(model)
    x = torch.randn(2, 3, 16, 16)
    fused = fuse_batch_norms(model)
    exported = torch.export.export(fused, (x,)).module()
    assert relative_difference(fused(x), exported(x)) < 1e-5


def test_other_networks_and_other_sizes_are_refused():
    with pytest.raises(ValueError, match="only a RepMLPNet or RepMLPResNet can be fused, not a Linear"):
        fuse_batch_norms(nn.Linear(2, 2))
    model = network("not square, grey, three classes")
    with pytest.raises(ValueError, match=r"an input of 8x8 does not fit .* made for 8x12"):
        fuse_batch_norms(model)(torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("attribute", ["fc3_offset", "fc3_scale", "ffn2"])
def test_a_wrong_fusion_is_noticed(monkeypatch, attribute):
    built = FusedUnit.__init__

    def broken(self, *args):
        built(self, *args)
        getattr(self, attribute).data.neg_()

    monkeypatch.setattr(FusedUnit, "__init__", broken)
    with pytest.raises(ValueError, match="fusing the BatchNorms changes the logits by"):
        fuse_verified(network("sets of every kind").float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_as_on_a_cpu():
    model = tiny_network().float().eval()
    randomize_statistics(model)
    x = images(model).float()
    assert relative_difference(fuse_batch_norms(model)(x), fuse_batch_norms(model.cuda())(x.cuda()).cpu()) < 1e-4
