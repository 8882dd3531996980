"""Gradients in training mode are those of BatchNorm written out, in either memory format.

Comparing two forms of a network would miss what both get wrong, such as an operator of torch that misreads strides.
"""

from copy import deepcopy
from functools import partial

import pytest
import torch
from model_helpers import random_tensor, randomised, small_options
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import create_model, training_form
from models.build import FAMILIES
from models.segmentation import SegmentationNetwork

STRUCTURE = {"channels": [4, 8, 8, 16], "blocks": [1, 1, 2, 1], "share_sets": [1, 2, 4, 8], "img_size": (32, 32)}


def batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm by the statistics of the batch, of operators whose gradients do not depend on strides."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    variance, mean = torch.var_mean(x, others, correction=0, keepdim=True)
    out = (x - mean) * (variance + norm.eps).rsqrt()
    return out * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else out


def written_out(model: nn.Module) -> nn.Module:
    """Returns a copy with such BatchNorms."""
    model = deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = partial(batch_norm, norm)
    return model


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    outputs = model.train()(images)
    (outputs * random_tensor(*outputs.shape, seed=1)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(model: nn.Module, images: Tensor) -> None:
    model = randomised(model)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):  # of PSPNet
            layer.p = 0.0
    expected = gradients(written_out(model), images)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        form = deepcopy(model).to(memory_format=memory_format)
        found = gradients(form, images.contiguous(memory_format=memory_format))
        wrong = [name for name in expected if float((found[name] - expected[name]).norm()) > 1e-8 * largest]
        assert wrong == [], memory_format


@pytest.fixture(params=[0, 2**12], ids=["training form", "layers"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_form, "MANY_ON_CPUS", request.param)


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("arch", ["RepMLPNet-Shapes"])
def test_of_both_forms_of_training(arch: str) -> None:
    model = create_model(arch, num_classes=5, **small_options(arch))
    check(model, random_tensor(4, 3, *model.img_size))


@pytest.mark.parametrize("arch", [list(family.specs)[-1] for family in FAMILIES])
def test_of_every_family(arch: str) -> None:
    model = create_model(arch, num_classes=5, **small_options(arch))
    check(model, random_tensor(4, 3, *model.img_size))


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("downsample", [None, "conv3"])
@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
def test_of_segmentation(decoder: str, downsample: str | None) -> None:
    """On images of four partitions each."""
    model = SegmentationNetwork("RepMLPNet-D256", 5, decoder, width=8, downsample=downsample, **STRUCTURE)
    check(model, random_tensor(4, 3, 64, 64))
