"""Every recipe loads, says how to run it and what to expect, and counts its network; every key is explained."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_parts import ALONE
from yacs.config import CfgNode

from configs import command_line, flatten, load_config
from configs.schema import DEFAULTS
from engine.plan import plan_training
from models import create_model, default_image_size, list_models
from models.segmentation import SegmentationNetwork
from tasks import TASKS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
PUBLISHED = {"T224": 76.62, "T256": 77.44, "B224": 80.32, "B256": 81.03, "D256": 80.83, "L256": 81.68}
SHARED = {
    "DATA.BATCH_SIZE": 32,
    "TRAIN.EPOCHS": 100,
    "TRAIN.WARMUP_EPOCHS": 10,
    "TRAIN.BASE_LR": 0.001,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 0.0,
    "TRAIN.WEIGHT_DECAY": 0.1,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "AUG.PRESET": "raug15",
    "AUG.MIXUP": 0.4,
    "AUG.CUTMIX": 1.0,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(recipe):
    assert load_config(recipe).is_frozen()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_what_to_expect(recipe):
    header = re.match(r"(#.*\n)+", recipe.read_text())[0]
    for word in ("Command", "Expected", "Hardware", "Cost"):
        assert re.search(rf"^# {word}: +\S", header, re.MULTILINE), f"no line {word}"
    assert f"--cfg configs/{recipe.name}" in header
    assert "main_repmlp.py" in header


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_recipes(size):
    path = CONFIGS / f"repmlpnet_{size.lower()}_100ep.yaml"
    expected = SHARED | {"MODEL.ARCH": f"RepMLPNet-{size}", "DATA.IMG_SIZE": int(size[1:])}
    given = flatten(load_config(path))
    assert {key: given[key] for key in expected} == expected
    assert f"{PUBLISHED[size]} % top-1, as published" in path.read_text()


def build(cfg: CfgNode, deploy: bool) -> tuple[nn.Module, tuple[int, int]]:
    """Returns the network of a recipe, and the size of the image that its multiply-adds are stated for."""
    size = default_image_size(cfg.MODEL.ARCH)
    if cfg.TASK == "segmentation":
        image, options = (1024, 2048), {"auxiliary": cfg.SEG.AUX_WEIGHT > 0 and not deploy}
        if cfg.SEG.DOWNSAMPLE:
            options |= {"downsample": cfg.SEG.DOWNSAMPLE, "rank": cfg.SEG.RANK}
        if cfg.SEG.BACKBONE_SIZE:  # a network whose cost is stated for a crop
            image = cfg.DATA.IMG_SIZE
            options |= {"img_size": (cfg.SEG.BACKBONE_SIZE,) * 2, "output_stride": cfg.SEG.OUTPUT_STRIDE}
            options |= {"gp_reduction": cfg.MODEL.GP_REDUCTION}
        if cfg.MODEL.ARCH in list_models():
            options |= {"deploy": deploy}
        decoder = cfg.SEG.DECODER, cfg.SEG.WIDTH
        return SegmentationNetwork(cfg.MODEL.ARCH, 19, *decoder, **options), image
    classes = {"cf10": 10, "cf100": 100}.get(cfg.DATA.DATASET, 1000)
    outputs = cfg.FACE.EMBEDDING if cfg.TASK == "verification" else classes
    return create_model(cfg.MODEL.ARCH, outputs, deploy=deploy), size


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_states_the_size_of_its_network(recipe):
    header = " ".join(re.match(r"(#.*\n)+", recipe.read_text())[0].replace("\n#", " ").split())
    stated = re.search(r"([\d.]+) M parameters(?:,| and)(?: ([\d.]+) M and)? ([\d.]+) ([GM]) multiply-adds", header)
    cfg = load_config(recipe)
    if stated is None:
        assert cfg.DATA.DATASET in ("digits", "shapes") or recipe.stem.startswith("imagenet_")
        return
    params, deploy_params, operations, unit = stated.groups()
    with torch.device("meta"):
        (network, _), (deploy, size) = build(cfg, deploy=False), build(cfg, deploy=True)
        image = torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as counter:
        deploy.eval()(image)
    counted = [
        (params, sum(p.numel() for p in network.parameters()) / 1e6),
        (deploy_params, sum(p.numel() for p in deploy.parameters()) / 1e6),
        (operations, counter.get_total_flops() / 2 / {"M": 1e6, "G": 1e9}[unit]),
    ]
    for text, count in counted:
        assert text in (None, f"{count:.{len((text or '').partition('.')[2])}f}")


def test_the_segmentation_recipe():
    given = flatten(load_config(CONFIGS / "cityscapes_upernet_d256.yaml"))
    expected = {
        "TASK": "segmentation",
        "DATA.DATASET": "cityscapes",
        "DATA.IMG_SIZE": (512, 1024),
        "DATA.BATCH_SIZE": 2,
        "DATA.TEST_BATCH_SIZE": 1,
        "MODEL.ARCH": "RepMLPNet-D256",
        "MODEL.LABEL_SMOOTHING": 0.0,
        "SEG.DECODER": "upernet",
        "SEG.WIDTH": 512,
        "SEG.DOWNSAMPLE": "conv3",
        "SEG.RANK": 1,
        "SEG.AUX_WEIGHT": 0.4,
        "TRAIN.EPOCHS": 215,
        "TRAIN.WARMUP_EPOCHS": 4,
        "TRAIN.WEIGHT_DECAY": 0.05,
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.OPTIMIZER.NAME": "adamw",
        "AMP": "off",
        "EVAL_FREQ": 5,
    }
    assert {key: given[key] for key in expected} == expected
    assert given["TRAIN.BASE_LR"] * 8 / 256 == pytest.approx(1e-4)
    other = flatten(load_config(CONFIGS / "cityscapes_pspnet_d256.yaml"))
    assert {key for key in given if given[key] != other[key]} == {"SEG.DECODER", "TAG"}


def test_the_recipe_of_pspnet_over_repmlp_resnet():
    given = flatten(load_config(CONFIGS / "cityscapes_pspnet_repmlp_res50.yaml"))
    expected = {
        "TASK": "segmentation",
        "DATA.DATASET": "cityscapes",
        "DATA.IMG_SIZE": (713, 713),
        "DATA.BATCH_SIZE": 2,
        "MODEL.ARCH": "RepMLP-Res50-g4-8-320",
        "MODEL.GP_REDUCTION": (1, 4, 8, 1),
        "SEG.DECODER": "pspnet",
        "SEG.AUX_WEIGHT": 0.4,
        "SEG.WIDTH": 512,
        "SEG.OUTPUT_STRIDE": 8,
        "SEG.BACKBONE_SIZE": 720,
        "TRAIN.EPOCHS": 200,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.WEIGHT_DECAY": 1e-4,
        "TRAIN.SYNC_BN": True,
        "TRAIN.LR_SCHEDULER.NAME": "poly",
        "TRAIN.LR_SCHEDULER.POWER": 0.9,
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    }
    assert {key: given[key] for key in expected} == expected
    assert given["TRAIN.BASE_LR"] * 16 / 256 == pytest.approx(0.01)


def test_the_segmentation_recipe_of_resnet():
    ours = flatten(load_config(CONFIGS / "cityscapes_upernet_d256.yaml"))
    given = flatten(load_config(CONFIGS / "cityscapes_upernet_resnet101.yaml"))
    expected = {
        "MODEL.ARCH": "resnet101c",
        "SEG.DOWNSAMPLE": None,
        "SEG.RANK": 4,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.BASE_LR": 0.32,
        "TRAIN.MIN_LR": 0.0032,
        "TRAIN.WEIGHT_DECAY": 5e-4,
        "TRAIN.SYNC_BN": True,
        "TRAIN.LR_SCHEDULER.NAME": "poly",
        "TRAIN.OPTIMIZER.NAME": "sgd",
    }
    assert {key: value for key, value in given.items() if ours[key] != value} == expected


def test_the_face_recipe():
    given = flatten(load_config(CONFIGS / "face_repmlp_faceres.yaml"))
    expected = {
        "TASK": "verification",
        "DATA.DATASET": "faces",
        "DATA.IMG_SIZE": 96,
        "DATA.BATCH_SIZE": 64,
        "MODEL.ARCH": "RepMLP-FaceRes",
        "FACE.EMBEDDING": 512,
        "FACE.LOSS": "amsoftmax",
        "FACE.MARGIN": None,
        "FACE.SCALE": None,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.WEIGHT_DECAY": 4e-5,  # "following [3]", which is MobileFaceNet
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.LR_SCHEDULER.NAME": "multistep",
        "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
        "AUG.PRESET": "flip",
        "AUG.REPROB": 0.0,
        "AMP": "off",
        "KEEP_CHECKPOINTS": 1,
    }
    assert {key: given[key] for key in expected} == expected
    images = 5_822_653  # of MS1M-V2
    plan = plan_training(load_config(CONFIGS / "face_repmlp_faceres.yaml"), world_size=8, steps_per_epoch=images // 512)
    assert plan.global_batch == 512
    assert plan.lr == pytest.approx(0.1)
    assert plan.updates_per_epoch == 11_372
    assert 420_000 <= plan.total_updates < 420_000 + plan.updates_per_epoch
    assert plan.milestone_updates == pytest.approx((252_000, 364_000, 406_000), abs=100)


def test_the_face_recipe_trains_the_network_that_the_paper_compares_with():
    path = CONFIGS / "face_repmlp_faceres.yaml"
    assert "by the same recipe: --arch FaceResNet, --arch MobileFaceNet." in path.read_text()
    cfg = command_line.parse(["--cfg", str(path), "--arch", "MobileFaceNet"]).config
    with torch.device("meta"):
        network = TASKS[cfg.TASK](cfg, ALONE).build_network(cfg.FACE.EMBEDDING).eval()
        assert network(torch.empty(2, 3, 96, 96)).shape == (2, 512)
    assert sum(p.numel() for p in network.parameters()) == 1_194_368


@pytest.mark.parametrize(
    ("recipe", "arch", "accuracies"),
    [
        ("cifar100", "RepMLPNet-C100", (59.07, 60.73, 65.36, 67.43)),
        ("resmlp_cifar100", "ResMLP-C100", (55.58, 57.96, 63.76, 65.09)),
    ],
)
def test_the_cifar_recipes_are_as_published(recipe, arch, accuracies):
    path = CONFIGS / f"{recipe}.yaml"
    given = flatten(load_config(path))
    imagenet = flatten(load_config(CONFIGS / "imagenet_100ep.yaml"))
    schedule = [key for key in given if key.startswith("TRAIN.") and key != "TRAIN.BASE_LR"]
    assert {key: given[key] for key in schedule} == {key: imagenet[key] for key in schedule}
    assert (given["TRAIN.BASE_LR"], given["DATA.BATCH_SIZE"], given["AUG.PRESET"]) == (0.002, 128, "crop")
    assert (given["MODEL.ARCH"], given["DATA.DATASET"], given["DATA.IMG_SIZE"]) == (arch, "cf100", 32)
    found = re.findall(r"(\d+\.\d+) %", " ".join(path.read_text().split("Expected:")[1].splitlines()))
    assert tuple(map(float, found)) == accuracies


def test_the_recipes_of_the_pure_mlp():
    given = flatten(load_config(CONFIGS / "cifar10_pure_mlp.yaml"))
    expected = {
        "DATA.DATASET": "cf10",
        "DATA.IMG_SIZE": 32,
        "DATA.BATCH_SIZE": 128,
        "MODEL.ARCH": "PureMLP-C10",
        "MODEL.LABEL_SMOOTHING": 0.0,
        "TRAIN.EPOCHS": 100,
        "TRAIN.WARMUP_EPOCHS": 0,
        "TRAIN.MIN_LR": 0.0,
        "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.LR_SCHEDULER.NAME": "cosine",
        "TRAIN.OPTIMIZER.NAME": "sgd",
        "AUG.PRESET": "crop",
        "AUG.REPROB": 0.0,
        "AUG.MIXUP": 0.0,
        "AUG.CUTMIX": 0.0,
    }
    assert {key: given[key] for key in expected} == expected
    assert given["TRAIN.BASE_LR"] * 128 / 256 == pytest.approx(0.2)
    other = flatten(load_config(CONFIGS / "cifar10_wide_convnet.yaml"))
    assert {key: other[key] for key in given if given[key] != other[key]} == {"MODEL.ARCH": "WideConvNet-C10"}
    for recipe, accuracy in (("cifar10_pure_mlp", 91.11), ("cifar10_wide_convnet", 91.99)):
        assert f"{accuracy} % top-1" in (CONFIGS / f"{recipe}.yaml").read_text()


@pytest.mark.parametrize("key", DEFAULTS)
def test_every_key_of_the_schema_is_explained(key):
    lines = (CONFIGS / "defaults.py").read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(f"_C.{key} = "))
    above, beside = lines[at - 1], lines[at].partition("#")[2]
    comment = above if above.startswith("#") else beside
    assert re.search(r"[a-z]{2}", comment), f"no comment for {key}"
