"""The networks that RepMLPNet is compared with, and its published variants: their recipes name them, and they count."""

import re
from pathlib import Path

import pytest
import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_parts import ALONE

import models
from configs import command_line, flatten
from tasks import TASKS

CONFIGS = Path(__file__).parents[2] / "configs"
# Recipe, architecture, image size, and millions of parameters and G multiply-adds: those of the RepMLPNet paper's
# table 2 where known, else as the network's authors give them; some are rounded to one, or leave BatchNorms out.
BASELINES = [
    ("imagenet_120ep", "resnet101", 224, 44.4, 8.1),
    ("imagenet_120ep", "resnext101_32x4d", 224, 44.1, 8.0),
    ("imagenet_120ep", "regnetx_064", 224, 26.2, 6.4),
    ("imagenet_120ep", "efficientnet_b1", 240, 7.8, 0.70),
    ("imagenet_120ep", "efficientnet_b2", 260, 9.2, 1.0),
    ("imagenet_100ep", "mixer_b16_224", 224, 59, 12.6),  # multiply-adds as counted here
    ("imagenet_100ep", "mixer_b16_224", 256, 60.4, 16.5),  # as counted here
    ("imagenet_100ep", "resmlp_24_224", 224, 30, 6.0),
    ("imagenet_100ep", "gmlp_s16_224", 224, 20, 4.5),
    ("imagenet_100ep", "gmlp_b16_224", 224, 73, 15.8),
    ("resmlp_s12_120ep", "ResMLP-S12-224", 224, 15.4, 3.0),
]
# Of the header of a recipe: options, millions of parameters, and top-1 where it is published.
VARIANT = re.compile(r"^#\s+--opts (MODEL\..+?) {2,}([\d.]+) M(?:  ([\d.]+) %)?$", re.MULTILINE)
# By recipe and options: parameters, counted once, and the millions and top-1 of the paper's tables 4 and 5.
VARIANTS = {
    ("repmlpnet_t224_100ep", "MODEL.GLOBAL_PERCEPTRON True"): (38_293_608, 38.3, "76.48"),
    ("repmlpnet_t224_100ep", "MODEL.GLOBAL_PERCEPTRON False"): (37_810_696, 37.8, "75.78"),
    ("repmlpnet_t224_100ep", "MODEL.SHARE_SETS [2,8,32,256]"): (67_188_232, 67.2, "77.19"),
    ("repmlpnet_t224_100ep", "MODEL.SHARE_SETS [2,8,32,256] MODEL.GLOBAL_PERCEPTRON False"): (
        66_705_320,
        66.7,
        "75.94",
    ),
    ("repmlpnet_t224_100ep", "MODEL.BRANCHES [1,3]"): (38_293_608, None, "76.48"),
    ("repmlpnet_t224_100ep", "MODEL.BRANCHES [3]"): (38_292_522, None, None),
    ("repmlpnet_t224_100ep", "MODEL.BRANCHES [1]"): (38_289_626, None, None),
    ("repmlpnet_t224_100ep", "MODEL.BRANCHES []"): (38_288_540, None, "74.33"),
    ("repmlpnet_d256_100ep", "MODEL.BRANCHES [1,3]"): (86_887_648, None, "80.88"),
    ("repmlpnet_d256_100ep", "MODEL.BRANCHES [3]"): (86_885_986, None, None),
    ("repmlpnet_d256_100ep", "MODEL.BRANCHES [1]"): (86_881_554, None, None),
    ("repmlpnet_d256_100ep", "MODEL.BRANCHES []"): (86_879_892, None, "78.58"),
}


def header_of(recipe: str) -> str:
    return re.match(r"(#.*\n)+", (CONFIGS / f"{recipe}.yaml").read_text())[0]


def build(recipe: str, *words: str) -> nn.Module:
    """Builds the network of a command line, without memory for its weights."""
    cfg = command_line.parse(["--cfg", str(CONFIGS / f"{recipe}.yaml"), *words]).config
    with torch.device("meta"):
        return TASKS[cfg.TASK](cfg, ALONE).build_network(1000).eval()


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("recipe", "arch", "side", "millions", "operations"), BASELINES)
def test_a_baseline_is_built_by_its_recipe(recipe, arch, side, millions, operations):
    header = header_of(recipe)
    assert arch in re.findall(r"[\w-]+", header + (CONFIGS / f"{recipe}.yaml").read_text())
    size = to_2tuple(side)
    given = [] if models.default_image_size(arch) == size else ["--opts", "DATA.IMG_SIZE", str(side)]
    assert not given or f"{' '.join(given)}, {arch}" in header
    model = build(recipe, "--arch", arch, *given)
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(2, 3, *size, device="meta")).shape == (2, 1000)
    assert count(model) / 1e6 == pytest.approx(millions, rel=0.03)
    assert counter.get_total_flops() / 4e9 == pytest.approx(operations, rel=0.04)  # of two images, two a multiply-add


@pytest.mark.parametrize("recipe", sorted({recipe for recipe, _ in VARIANTS}))
def test_the_variants_of_the_paper_are_built_by_the_options_of_the_header(recipe):
    stated = {(recipe, opts): (millions, top1 or None) for opts, millions, top1 in VARIANT.findall(header_of(recipe))}
    expected = {key: row for key, row in VARIANTS.items() if key[0] == recipe}
    assert stated.keys() == expected.keys()
    for (_, opts), (params, published, top1) in expected.items():
        assert count(build(recipe, "--opts", *opts.split())) == params
        assert stated[recipe, opts] == (f"{params / 1e6:.1f}", top1)
        assert published in (None, round(params / 1e6, 1))


def test_what_branches_add_follows_the_rule_of_the_cifar_network():
    """Each share-set of each block has a kernel, and a scale and a shift of its BatchNorm."""
    by_recipe = {"cifar100": 3360, "repmlpnet_t224_100ep": 5068, "repmlpnet_d256_100ep": 7756}
    for recipe, added in by_recipe.items():
        model, plain = build(recipe), build(recipe, "--opts", "MODEL.BRANCHES", "[]")
        share_sets = sum(s * blocks for s, blocks in zip(model.spec.share_sets, model.spec.blocks, strict=True))
        assert count(model) - count(plain) == share_sets * (1 + 2 + 9 + 2) == added
        assert recipe == "cifar100" or str(added) in header_of(recipe)


def settings_of(recipe: str) -> dict[str, object]:
    return flatten(command_line.parse(["--cfg", str(CONFIGS / f"{recipe}.yaml")]).config)


def assert_settings(recipe: str, expected: dict[str, object]) -> None:
    given = settings_of(recipe)
    assert {key: given[key] for key in expected} == expected


def test_the_strong_and_the_plain_recipe():
    shared = {
        "DATA.BATCH_SIZE": 32,
        "TRAIN.EPOCHS": 120,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.BASE_LR": 0.1,
        "TRAIN.WEIGHT_DECAY": 1e-4,
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "AUG.CUTMIX": 0.0,
        "TEST.CROP": True,
    }
    keys = ("AUG.PRESET", "AUG.MIXUP", "MODEL.LABEL_SMOOTHING")
    assert_settings("imagenet_120ep", shared | dict(zip(keys, ("raug15", 0.4, 0.1), strict=True)))
    assert_settings("imagenet_120ep_plain", shared | dict(zip(keys, ("weak", 0.0, 0.0), strict=True)))
    strong, plain = settings_of("imagenet_120ep"), settings_of("imagenet_120ep_plain")
    assert {key for key in strong if strong[key] != plain[key]} == {*keys}


def test_the_recipe_of_resmlp():
    expected = {
        "MODEL.BRANCHES": (),
        "MODEL.DROP_PATH": 0.1,
        "MODEL.LABEL_SMOOTHING": 0.1,
        "DATA.BATCH_SIZE": 32,
        "DATA.INTERPOLATION": "bicubic",
        "TRAIN.EPOCHS": 120,
        "TRAIN.WARMUP_EPOCHS": 5,
        "TRAIN.WEIGHT_DECAY": 0.2,
        "TRAIN.CLIP_GRAD": 1.0,
        "TRAIN.OPTIMIZER.NAME": "lamb",
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "AUG.PRESET": None,
        "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
        "AUG.MIXUP": 0.8,
        "AUG.CUTMIX": 1.0,
        "AUG.MIXUP_PROB": 1.0,
        "AUG.MIXUP_SWITCH_PROB": 0.5,
        "AUG.REPROB": 0.25,
        "TEST.CROP": True,
    }
    assert_settings("resmlp_s12_120ep", expected)
    given = settings_of("resmlp_s12_120ep")
    rates = [given[f"TRAIN.{name}_LR"] * 1024 / 256 for name in ("BASE", "WARMUP", "MIN")]
    assert rates == pytest.approx([5e-3, 1e-6, 1e-5])
