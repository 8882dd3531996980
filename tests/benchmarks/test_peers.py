"""Folding the BatchNorms of any network, whatever its modules are called."""

import pytest
import torch
from torch import nn

import models
from benchmarks.peers import fold_batch_norms, peer_forms
from models.reparam import randomize_statistics, relative_difference


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_all_are_folded_exactly(name) -> None:
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=10).double().eval()
    randomize_statistics(model)
    folded = fold_batch_norms(model, (32, 32))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_difference(model(images), folded(images)) < 1e-12
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_one_that_does_not_follow_a_convolution_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert fold_batch_norms(model, (8, 8)) is model


@pytest.mark.slow
def test_forms() -> None:
    forms = peer_forms("resmlp_12_224")
    assert list(forms) == ["as it comes", "channels-last"]
    with torch.no_grad():
        assert forms["as it comes"](torch.randn(1, 3, 224, 224)).abs().max() > 0
