"""The networks that RepMLPNet is compared with: their recipes name them, and they are what timm says they are."""

import re
from pathlib import Path

import pytest
import torch
from timm.layers import to_2tuple

import models
from configs import command_line

CONFIGS = Path(__file__).parents[2] / "configs"
# Recipe, architecture, image size, and millions of parameters as its authors give them, some of them rounded to one.
BASELINES = [
    ("imagenet_120ep", "resnet101", 224, 44.5),
    ("imagenet_120ep", "resnext101_32x4d", 224, 44.2),
    ("imagenet_120ep", "regnetx_064", 224, 26.2),
    ("imagenet_120ep", "efficientnet_b1", 240, 7.8),
    ("imagenet_120ep", "efficientnet_b2", 260, 9.2),
    ("imagenet_100ep", "mixer_b16_224", 224, 59),
    ("imagenet_100ep", "resmlp_24_224", 224, 30),
    ("imagenet_100ep", "gmlp_s16_224", 224, 20),
]


@pytest.mark.parametrize(("recipe", "arch", "side", "millions"), BASELINES)
def test_a_baseline_is_built_by_its_recipe(recipe, arch, side, millions):
    path = CONFIGS / f"{recipe}.yaml"
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    assert arch in re.findall(r"\w+", header)
    size = to_2tuple(side)
    given = [] if models.default_image_size(arch) == size else ["--opts", "DATA.IMG_SIZE", str(side)]
    assert not given or f"{' '.join(given)}, {arch}" in header
    cfg = command_line.parse(["--cfg", str(path), "--arch", arch, *given]).config
    with torch.device("meta"):
        model = models.create_model(cfg.MODEL.ARCH, 1000, img_size=size).eval()
        assert model(torch.empty(2, 3, *size)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_plain_recipe():
    cfg = command_line.parse(["--cfg", str(CONFIGS / "imagenet_120ep.yaml")]).config
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TRAIN.BASE_LR, cfg.TRAIN.WEIGHT_DECAY) == (120, 0, 0.1, 1e-4)
    assert (cfg.TRAIN.OPTIMIZER.NAME, cfg.TRAIN.OPTIMIZER.MOMENTUM, cfg.TRAIN.LR_SCHEDULER.NAME) == (
        "sgd",
        0.9,
        "cosine",
    )
    assert (cfg.AUG.PRESET, cfg.AUG.MIXUP, cfg.AUG.CUTMIX, cfg.MODEL.LABEL_SMOOTHING) == ("weak", 0, 0, 0)
