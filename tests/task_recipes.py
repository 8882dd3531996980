"""The shortest training of each task that has every part of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pictures import write_patterns, write_street

# 24 images to train on: three updates an epoch, in one process or, with half of the batch, in two. Everything is on
# that has a state: moving average, accumulation, clipping; every epoch leaves a numbered file.
COMMON = (
    "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 TRAIN.BASE_LR 0.3 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 "
    "TRAIN.ACCUMULATION_STEPS 2 TRAIN.CLIP_GRAD 1 TRAIN.EMA_ALPHA 0.05 TRAIN.EMA_UPDATE_PERIOD 2 "
    "PRINT_FREQ 1 SAVE_FREQ 1 KEEP_CHECKPOINTS 2 AMP off TAG run"
)
TWO_PROCESSES = "DATA.BATCH_SIZE 2"


def write_classes(root: Path) -> None:
    """Two classes, 12 images of each to train on, 7 to evaluate."""
    for split, counts in (("train", (12, 12)), ("val", (4, 3))):
        for label, count in enumerate(counts):
            write_patterns(root / split / f"class {label}", label, count)


def write_streets(root: Path) -> None:
    """24 streets to train on, 5 to evaluate."""
    for split, city, count in (("train", "aachen", 24), ("val", "lindau", 5)):
        for number in range(count):
            write_street(root, split, city, number)


def write_people(root: Path) -> None:
    """Six people to train on, 24 images in all; nine images of four others."""
    for split, counts in (("train", (4,) * 6), ("val", (3, 2, 2, 2))):
        for number, count in enumerate(counts):
            write_patterns(root / split / f"{split} {number}", number + 100 * (split == "val"), count)


class Recipe(NamedTuple):
    """A row of `RECIPES`.

    Attributes:
        write: writes the images into a folder that is not there yet.
        opts: what the task needs besides `COMMON`, as after `--opts`.
        log: a pattern for its figure in the log; its group is the figure.
    """

    write: Callable[[Path], None]
    opts: str
    log: str


RECIPES = {
    "classification": Recipe(
        write_classes,
        "MODEL.ARCH RepMLPNet-Digits DATA.DATASET imagenet AUG.MIXUP 0.4 AUG.PRESET raug15 AUG.DEVICE gpu "
        "DATA.REPEATED_AUG 2 TRAIN.CLASS_WEIGHTS balanced",
        r"Acc@1 ([\d.]+) ",
    ),
    "segmentation": Recipe(
        write_streets,
        "MODEL.ARCH RepMLPNet-D256 MODEL.CHANNELS 8,16,16,32 MODEL.BLOCKS 1,1,1,1 MODEL.SHARE_SETS 1,2,4,8 "
        "SEG.WIDTH 16 SEG.AUX_WEIGHT 0.4 SEG.DOWNSAMPLE conv3 SEG.BACKBONE_SIZE 32 "
        "DATA.DATASET cityscapes DATA.IMG_SIZE 64",
        r"mIoU ([\d.]+) ",
    ),
    "verification": Recipe(
        write_people,
        "MODEL.ARCH RepMLP-FaceRes MODEL.CHANNELS 16,32,64,128 MODEL.BLOCKS 2,1,1,1 DATA.DATASET faces "
        "FACE.EMBEDDING 8 FACE.NUM_PAIRS 12 FACE.FOLDS 2 AUG.PRESET flip DATA.SAMPLING sqrt",
        r"accuracy ([\d.]+) ",
    ),
}


def recipe_of(task: str) -> Recipe:
    """Returns the row of a task."""
    if task not in RECIPES:
        pytest.fail(f"no test covers the task {task}: give it a row in {Path(__file__).name}")
    return RECIPES[task]


def keys_of(task: str, changes: str = "") -> dict[str, str]:
    """Returns the whole recipe by its keys; `changes` are keys with other values, as after `--opts`."""
    words = f"TASK {task} {COMMON} {recipe_of(task).opts} {changes}".split()
    return dict(zip(words[::2], words[1::2], strict=True))


def evaluation_opts(task: Any) -> list[str]:
    """Returns the keys of a recipe that decide how an evaluation counts, as words; `task` is the fixture."""
    keys = {key: value for key, value in keys_of(task.kind.name).items() if key in ("FACE.NUM_PAIRS", "FACE.FOLDS")}
    return ["--opts", *(word for pair in keys.items() for word in pair)] if keys else []
