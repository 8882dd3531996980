"""Every recipe loads and says how to run it and what to expect; every key of the schema is explained."""

import re
from pathlib import Path

import pytest

from configs import flatten, load_config
from configs.schema import DEFAULTS

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


@pytest.mark.parametrize(
    ("recipe", "arch", "accuracies"),
    [
        ("cifar100", "RepMLPNet-C100", (59.07, 60.73, 65.36, 67.43)),
        ("resmlp_cifar100", "ResMLP-C100", (55.58, 57.96, 63.76, 65.09)),
    ],
)
def test_the_cifar_recipes_name_what_is_published(recipe, arch, accuracies):
    path = CONFIGS / f"{recipe}.yaml"
    given = flatten(load_config(path))
    assert (given["MODEL.ARCH"], given["DATA.DATASET"], given["DATA.IMG_SIZE"]) == (arch, "cf100", 32)
    found = re.findall(r"(\d+\.\d+) %", " ".join(path.read_text().split("Expected:")[1].splitlines()))
    assert tuple(map(float, found)) == accuracies


@pytest.mark.parametrize("key", DEFAULTS)
def test_every_key_of_the_schema_is_explained(key):
    lines = (CONFIGS / "defaults.py").read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(f"_C.{key} = "))
    above, beside = lines[at - 1], lines[at].partition("#")[2]
    comment = above if above.startswith("#") else beside
    assert re.search(r"[a-z]{2}", comment), f"no comment for {key}"
