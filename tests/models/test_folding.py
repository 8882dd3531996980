"""Folding the BatchNorms of any network, whatever its modules are called; what can't be folded stays or is an error."""

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

import models
from models.folding import count_batch_norms, fold_batch_norms, fold_verified
from models.reparam import randomize_statistics, relative_difference, to_deploy


class Reading(nn.Module):
    """A convolution, a BatchNorm behind it, and a second reader of the convolution."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), second

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + self.second(x)


class Timesing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "tf_efficientnet_b0"])
def test_all_are_folded_exactly(name) -> None:
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=10).double().eval()
    randomize_statistics(model)
    folded = fold_batch_norms(model, (32, 32))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_difference(model(images), folded(images)) < 1e-12
    assert count_batch_norms(model) > 0
    assert count_batch_norms(folded) == 0


def test_a_verified_network_keeps_its_dtype_and_statistics() -> None:
    torch.manual_seed(0)
    model = models.create_model("resnet10t", num_classes=10).eval()
    folded = fold_verified(model, (32, 32))
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert model.bn1.running_mean.abs().max() == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_difference(model(images), folded(images)) < 1e-5


def test_our_own_networks_keep_what_has_no_bias() -> None:
    deploy = to_deploy(models.create_model("RepMLPNet-Digits", 10))
    folded = fold_verified(deploy, (16, 16))
    # The embeddings are folded; the FFNs' layers ignore a bias, and the BatchNorms before the blocks read a sum.
    assert count_batch_norms(deploy) - count_batch_norms(folded) == 2
    assert isinstance(folded.conv_embedding.bn, nn.Identity)
    assert isinstance(folded.stages[0][0].ffn_block.ffn_fc1.bn, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(StdConv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        Reading(nn.BatchNorm2d(4)),
    ],
    ids=["behind another layer", "of standardized weights", "of the batch", "one of two"],
)
def test_one_that_cannot_be_folded_stays(model: nn.Module) -> None:
    assert fold_batch_norms(model.eval(), (8, 8)) is model


def test_a_reader_that_is_not_seen_is_found_by_the_outputs() -> None:
    with pytest.raises(ValueError, match="folding the BatchNorms of a Reading changes its outputs"):
        fold_verified(Reading(Timesing()).eval(), (8, 8))


def test_a_network_that_needs_values_is_an_error() -> None:
    class Asking(Reading):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(ValueError, match="a Asking can't be traced to fold its BatchNorms"):
        fold_verified(Asking(nn.ReLU()).eval(), (8, 8))
