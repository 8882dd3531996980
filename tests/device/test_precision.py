"""Under autocast to bfloat16 no map is in float32: it would double the traffic, and all maps after it follow."""

from collections import Counter

import pytest
import torch
from torch import nn
from updates import classifier, recorded_update, segmenter

from benchmarks.operators import Operand, Operator
from models import default_image_size

BATCH = 251  # a prime that no shape of a parameter contains
MAP = 4096  # elements an image from which on a tensor is a map: more than all channels, fewer than the smallest map
# With fewer blocks, which are all alike.
CLASSIFIERS: dict[str, dict[str, object]] = {
    "RepMLPNet-T224": {"blocks": (1, 1, 2, 1)},
    "RepMLPNet-C100": {"blocks": (1, 1), "drop_path_rate": 0.1},
    "RepMLP-Res50-light-224": {"blocks": (1, 1, 1, 1)},
    "RepMLP-Res50-bottleneck-224": {"blocks": (1, 1, 1, 1)},
    "RepMLP-FaceRes": {},
    "FaceResNet": {},
    "ResMLP-S12-224": {"depth": 2},
    "PureMLP-C10": {},
    "WideConvNet-C10": {},
    "MobileFaceNet": {},
}
# Operators by which a network leaves bfloat16, where that is right or made by others.
KNOWN = {
    # timm's: a scale and a shift for each channel, which autocast leaves in float32.
    "ResMLP-S12-224": {"aten.addcmul", "aten.mul", "aten.div", "aten._to_copy"},
    # The loss is computed in float32, here for every pixel.
    "upernet": {"aten._to_copy"},
    "pspnet": {"aten._to_copy"},
}


def origins(operators: list[Operator], images: tuple[int, ...]) -> dict[str, int]:
    """Returns how often which operator writes a float32 map though it reads none, but the images."""

    def widen(operands: tuple[Operand, ...]) -> bool:
        maps = [o for o in operands if o.elements >= BATCH * MAP and o.elements % BATCH == 0 and o.shape != images]
        return any(o.dtype is torch.float32 for o in maps)

    return Counter(o.name for o in operators if not o.is_free and widen(o.writes) and not widen(o.reads))


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_no_map_of_a_classifier_is_float32(arch: str) -> None:
    size = default_image_size(arch)
    operators = recorded_update(classifier(arch, **CLASSIFIERS[arch]), BATCH, torch.bfloat16, size)
    assert origins(operators, (BATCH, 3, *size)).keys() == KNOWN.get(arch, set())


@pytest.mark.parametrize("decoder", ["upernet", "pspnet"])
def test_no_map_of_a_segmentation_network_is_float32(decoder: str) -> None:
    operators = recorded_update(segmenter(decoder, blocks=(1, 1, 1, 1)), BATCH, torch.bfloat16, (256, 256))
    assert origins(operators, (BATCH, 3, 256, 256)).keys() == KNOWN.get(decoder, set())


def test_a_map_in_float32_is_found() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 7)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.conv(x) * self.scale).mean((2, 3)))

    with torch.device("meta"):
        network = Scaled()
    operators = recorded_update(network, BATCH, torch.bfloat16, (32, 32))
    assert origins(operators, (BATCH, 3, 32, 32)) == {"aten.mul": 1, "aten.div": 1}  # and the gradient of the mean
