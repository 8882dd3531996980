"""The networks that the first RepMLP paper varies, by configuration keys, with their size and cost."""

from typing import Any, cast

import pytest
import torch
from settings import settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from tasks import Classification

ARCH = "RepMLP-Res50-bottleneck-224"
# Keys below MODEL, parameters and multiply-adds in deploy form.
ABLATIONS = {
    "ResNet-50": ("REDUCTIONS 0,0,0,0", 25_530_472, 4.0892e9),
    # Table 2: r and g in c4 only
    "r 2, g 4": ("REDUCTIONS 0,0,2,0 GROUPS 8,8,4,8", 77_361_512, 4.2885e9),
    "r 2, g 8": ("REDUCTIONS 0,0,2,0", 52_775_272, 4.1902e9),
    "r 4, g 2": ("REDUCTIONS 0,0,4,0 GROUPS 8,8,2,8", 49_316_072, 3.8991e9),
    "r 4, g 4": ("REDUCTIONS 0,0,4,0 GROUPS 8,8,4,8", 37_022_952, 3.8500e9),
    "r 4, g 8": ("REDUCTIONS 0,0,4,0", 30_876_392, 3.8254e9),
    "r 8, g 8": ("REDUCTIONS 0,0,8,0", 25_028_392, 3.6620e9),
    # Table 3: stages; r = 2, 2, 4, 4 for c2 to c5; c4 alone is above
    "c3": ("REDUCTIONS 0,2,0,0", 35_525_608, 4.1545e9),
    "c3, c4": ("REDUCTIONS 0,2,4,0", 40_871_528, 3.8907e9),
    "c2, c3, c4": ("REDUCTIONS 2,2,4,0", 58_274_792, 3.9468e9),
    "c2, c3, c4, c5": ("REDUCTIONS 2,2,4,4", 65_762_792, 3.8411e9),
    "c4, c5": ("REDUCTIONS 0,0,4,4", 38_364_392, 3.7196e9),
    # Parts of the RepMLP
    "no branches": ("BRANCHES []", 40_871_528, 3.8907e9),
    "no Global Perceptron": ("GLOBAL_PERCEPTRON False", 33_916_008, 3.8838e9),
    "a narrow Global Perceptron": ("GP_REDUCTION 1,4,8,1", 35_576_072, 3.8854e9),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_networks_that_the_paper_varies_are_reached_by_keys(name: str) -> None:
    keys, parameters, multiply_adds = ABLATIONS[name]
    words = keys.split()
    opts = " ".join(f"MODEL.{key} {value}" for key, value in zip(words[::2], words[1::2], strict=True))
    task = Classification(settings(f"MODEL.ARCH {ARCH} {opts}"), cast(Any, None))
    with torch.device("meta"):
        trained, deploy = task.build_network(1000), create_model(ARCH, deploy=True, **task.structure).eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        deploy(images)
    assert sum(p.numel() for p in deploy.parameters()) == parameters
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=5e-5)
    assert trained.spec == deploy.spec
    assert isinstance(trained.stage1[0].conv1.bn, nn.BatchNorm2d)
