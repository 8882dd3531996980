"""Counts: those of torch for every architecture, by hand for a layer, and whole where parts are summed."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import SPECS, create_model
from models.counts import BRANCHES, Counts, count, count_modules, count_parts
from models.fusion import fuse_batch_norms
from models.layers import ConvNorm
from models.reparam import to_deploy


def by_torch(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("arch", ["RepMLPNet-T224", "ResMLP-S12-224", "RepMLP-FaceRes", "resnet18", "mixer_s32_224"])
def test_all_parts_make_the_whole(arch: str) -> None:
    with torch.device("meta"):
        model = create_model(arch, 7).eval()
    shape = (2, 3, *getattr(model, "img_size", (224, 224)))
    total = count(model, shape)
    assert sum(count_parts(model, shape).values(), Counts()) == total
    assert total.parameters == sum(p.numel() for p in model.parameters())
    # A counter knows a branch of size 1 as a multiplication; the other parts are the same.
    scalings = sum(c.multiply_adds for n, c in count_modules(model, shape).items() if n.endswith("repconv1.conv"))
    if arch == "RepMLP-FaceRes":  # whose branches mix channels
        scalings = 0
    assert total.multiply_adds - scalings == by_torch(model, shape)


def test_a_layer_by_hand() -> None:
    model = nn.Sequential(ConvNorm(nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False)), nn.Conv2d(8, 4, 1))
    own = count_modules(model, (2, 3, 10, 6))
    assert own["0.conv"] == Counts(3 * 8 * 9, 0, 2 * 60 * 3 * 8 * 9)
    assert own["0.bn"] == Counts(16, 16, 0)
    assert own["1"] == Counts(4 * 8 + 4, 0, 2 * 60 * 4 * 8)
    assert own[""] == own["0"] == Counts()


def test_shared_weights_count_once_and_functions_belong_to_their_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x))
            return x @ self.a.weight

    own = count_modules(Tied(), (3, 4))
    assert own == {"": Counts(0, 0, 48), "a": Counts(16, 0, 48), "b": Counts(0, 0, 48)}


def test_a_module_of_two_names_counts_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Sequential(nn.Linear(4, 4), layer))
    assert count(model, (3, 4)) == Counts(40, 0, 3 * 48)


def test_every_form_of_a_network_counts_alike() -> None:
    model = create_model("RepMLPNet-Digits", 10).eval()
    deploy, shape = to_deploy(model), (4, 3, 16, 16)
    before = [p.clone() for p in model.parameters()]
    counts = [count(m, shape).multiply_adds for m in (deploy, fuse_batch_norms(model), deploy.double())]
    assert len(set(counts)) == 1
    branches = [counts for (_, kind), counts in count_parts(model, shape).items() if kind == BRANCHES]
    assert count(model, shape).multiply_adds - counts[0] == sum(c.multiply_adds for c in branches)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_kinds_and_places() -> None:
    spec = SPECS["RepMLPNet-Digits"]
    parts = count_parts(create_model("RepMLPNet-Digits", 10), (1, 3, 16, 16))
    places = list(dict.fromkeys(place for place, _ in parts))
    assert places == ["conv_embedding", "stages.0", "stages.1", "embeds.0", "head_norm", "head"]
    channels, sets, positions = spec.channels[0], spec.share_sets[0], 8 * 8
    stage = {kind: counts for (place, kind), counts in parts.items() if place == "stages.0"}
    assert stage == {
        "FC3": Counts(2 * sets * positions**2, 0, 2 * channels * positions**2),
        "FFN": Counts(2 * 8 * channels**2, 0, 2 * 8 * channels**2 * positions),
        "Global Perceptron": Counts(
            2 * (channels * channels // 2 + channels // 4 + channels), 0, 2 * channels * channels // 2
        ),
        "local branches": Counts(2 * sets * (1 + 9 + 4), 2 * sets * 4, 2 * channels * positions * (1 + 9)),
        "BatchNorm": Counts(2 * 2 * (sets + 7 * channels), 2 * 2 * (sets + 7 * channels), 0),
    }
