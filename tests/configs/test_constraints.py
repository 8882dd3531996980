"""Values that are not allowed, keys that a task does not use, and keys that contradict each other are refused."""

import contextlib
import re
from pathlib import Path

import pytest

from configs import Override, load_config, parse_opts
from configs.command_line import FLAGS
from configs.constraints import CONFLICTS, CONSTRAINTS, TRAINING_CONFLICTS, unused_keys
from configs.field_types import BOOLEAN
from configs.schema import DEFAULTS, FIELD_TYPES, SECTIONS
from data import AUGMENT_DEVICES, DATASETS, FORMATS, PRESETS, SAMPLINGS
from data.batch_augmentation import ERASING_MODES, MIXUP_MODES
from data.decode import JPEG_DECODERS
from data.transforms import INTERPOLATIONS
from data.zipped import CACHE_MODES
from models.dense import DOWNSAMPLINGS, FULL_RANK
from models.pure_mlp import MIXERS
from models.segmentation import DECODERS
from tasks import TASKS
from tasks.classification import CLASS_WEIGHTS

CONFIGS = Path(__file__).parents[2] / "configs"
REGISTRIES = {
    "TASK": TASKS,
    "DATA.FORMAT": FORMATS,
    "DATA.INTERPOLATION": INTERPOLATIONS,
    "DATA.DECODER": JPEG_DECODERS,
    "DATA.CACHE_MODE": CACHE_MODES,
    "DATA.SAMPLING": SAMPLINGS,
    "TRAIN.CLASS_WEIGHTS": CLASS_WEIGHTS,
    "AUG.MIXUP_MODE": MIXUP_MODES,
    "AUG.PRESET": PRESETS,
    "AUG.REMODE": ERASING_MODES,
    "AUG.DEVICE": AUGMENT_DEVICES,
    "MODEL.MIXER": MIXERS,
    "SEG.DECODER": DECODERS,
    "SEG.DOWNSAMPLE": DOWNSAMPLINGS,
}
CHOICES = {key: " ".join(registry) for key, registry in REGISTRIES.items()} | {
    "TRAIN.LR_SCHEDULER.NAME": "cosine poly linear step multistep",
    "TRAIN.OPTIMIZER.NAME": "adamw lamb sgd",
    "FACE.LOSS": "arcface cosface amsoftmax",
    "AMP": "auto off bf16 fp16",
    "COMPILE_MODE": "default reduce-overhead max-autotune max-autotune-no-cudagraphs",
}
FREE_TEXT = {"TEST.CLASSES", "MODEL.RESUME", "MODEL.PRETRAINED", "FACE.PAIRS", "DISTILL.TEACHER"}

# key, values at the edge of what is allowed, values just beyond it, the words for what is allowed
EDGES = [
    ("DATA.BATCH_SIZE", "1", "0 -1", "at least 1"),
    (
        "DATA.DATASET",
        "imagenet cf10 cf100 digits shapes cityscapes faces torchvision/MNIST hfds/owner/name tfds/name",
        "unheard-of torchvision/NAME torchvision/ hfds/ tfds wds/name",
        "one of imagenet, cf10, cf100, digits, shapes, cityscapes, faces, torchvision/NAME, hfds/NAME, tfds/NAME",
    ),
    ("DATA.VAL_FRACTION", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("DATA.FOLDS", "0 2 1000", "1 -1 1001", "0, or at least 2"),
    ("DATA.FOLD", "0", "-1 1000", "from 0 to 999"),
    ("DATA.SPLIT_SEED", "0 4294967295", "-1 4294967296", "from 0 to 4294967295"),
    ("DATA.IMG_SIZE", "1 1,2", "0 -224 0,224 224,-1", "at least 1 pixel"),
    ("DATA.TEST_SIZE", "1 1,2", "0 0,224", "at least 1 pixel"),
    ("DATA.TEST_BATCH_SIZE", "1 None", "0", "at least 1"),
    ("DATA.CHANNELS", "3 None", "0 2 5", "1, 3 or 4"),
    ("DATA.MEAN", "0,0.5,1 0.5 None", "-0.1 1.1 0.5,2 []", "numbers from 0 to 1"),
    ("DATA.STD", "1 0.001,0.5,1 None", "0 1.1 0.5,0 []", "numbers above 0 and at most 1"),
    ("DATA.NUM_WORKERS", "0", "-1", "at least 0"),
    ("DATA.REPEATED_AUG", "1 100", "0 101", "from 1 to 100"),
    ("DATA.MAX_UNREADABLE", "0", "-1", "at least 0"),
    ("MODEL.NUM_CLASSES", "1 None", "0", "at least 1"),
    ("MODEL.LABEL_SMOOTHING", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("MODEL.DROP_PATH", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("MODEL.BRANCHES", "1 [] 7,3 None", "2 1,2 3,3 -1 0", "odd numbers, each once"),
    ("MODEL.CHANNELS", "1 64,128 None", "[] 0 1,0 -1", "at least 1 each"),
    ("MODEL.BLOCKS", "1 2,2,6,2 None", "[] 0 1,0 -1", "at least 1 each"),
    ("MODEL.SHARE_SETS", "1 4,16 None", "[] 0 1,0 -1", "at least 1 each"),
    ("MODEL.GROUPS", "1 8,8,16,8 None", "[] 0 1,0 -1", "at least 1 each"),
    ("MODEL.REDUCTIONS", "0 0,2,4,0 None", "[] -1 0,-1", "at least 0 each"),
    ("MODEL.GP_REDUCTION", "1 1,4,8,1 None", "[] 0 1,0 -1", "at least 1 each"),
    ("SEG.WIDTH", "1 16384", "0 16385", "at least 1"),
    ("SEG.RANK", "4", "0 5", "from 1 to 4"),
    ("SEG.AUX_WEIGHT", "0 10", "-0.1 10.1", "from 0 to 10"),
    ("SEG.BACKBONE_SIZE", "1 1,2 None", "0 0,224", "at least 1 pixel"),
    ("SEG.OUTPUT_STRIDE", "8 16 32 None", "0 4 12 64", "8, 16 or 32"),
    ("SEG.SCALE", "0.1,10 0.5,0.6", "0,1 1,1 2,0.5 -1,1 1,11", "two numbers from 0.1 to 10, the smaller first"),
    ("FACE.EMBEDDING", "1 65536", "0 65537", "at least 1"),
    ("FACE.MARGIN", "0 90 None", "-1 91", "from 0 to 90"),
    ("FACE.SCALE", "0.1 1000 None", "0 -1 1001", "above 0 and at most 1000"),
    ("FACE.NUM_PAIRS", "4", "3 -4", "at least 4"),
    ("FACE.FOLDS", "2", "1", "at least 2"),
    ("TRAIN.START_EPOCH", "0 99", "-1", "at least 0"),
    ("TRAIN.EPOCHS", "11", "0 -1", "at least 1"),
    ("TRAIN.WARMUP_EPOCHS", "0 99", "-1", "at least 0"),
    ("TRAIN.WEIGHT_DECAY", "0", "-0.1", "at least 0"),
    ("TRAIN.BASE_LR", "0", "-0.1", "at least 0"),
    ("TRAIN.WARMUP_LR", "0", "-0.1", "at least 0"),
    ("TRAIN.MIN_LR", "0 0.002", "-0.1", "at least 0"),
    ("TRAIN.CLIP_GRAD", "0", "-1", "at least 0"),
    ("TRAIN.MAX_SKIPPED", "0", "-1", "at least 0"),
    ("TRAIN.ACCUMULATION_STEPS", "0 1", "-1", "at least 0"),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "1", "0", "at least 1"),
    (
        "TRAIN.LR_SCHEDULER.MILESTONES",
        "0.5 30 [30,60.5,90]",
        "[] 0 -1 30,30 60,30 1,1000001",
        "numbers above 0 and at most 1000000, in ascending order",
    ),
    ("TRAIN.LR_SCHEDULER.POWER", "0.1 10", "0 -1 10.1", "above 0 and at most 10"),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", "0.01 1", "0 1.1", "above 0 and at most 1"),
    ("TRAIN.OPTIMIZER.EPS", "1e-30 1", "0 -1e-8 1.1", "from 1e-30 to 1"),
    ("TRAIN.OPTIMIZER.BETAS", "0,0.99", "0.9,1 -0.1,0.9", "two numbers, each at least 0 and below 1"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("TRAIN.EMA_ALPHA", "0 0.9999", "-0.1 1", "at least 0 and below 1"),
    ("TRAIN.EMA_UPDATE_PERIOD", "1", "0", "at least 1"),
    ("DISTILL.ARCH", "", "a\x1b[2J", "printable text"),
    ("DISTILL.WEIGHT", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.MIXUP", "0 2", "-0.1", "at least 0"),
    ("AUG.CUTMIX", "0 2", "-0.1", "at least 0"),
    (
        "AUG.CUTMIX_MINMAX",
        "0,1 0.5,0.6 None",
        "0.5,0.2 0.5,0.5 0,0 1,1 -0.1,1 0,1.1",
        "two numbers from 0 to 1, the smaller first",
    ),
    ("AUG.MIXUP_PROB", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.MIXUP_SWITCH_PROB", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.SCALE", "0.001,1 0.5,0.6", "0,1 1,1 0.5,0.2 0.5,1.1", "two numbers from 0.001 to 1, the smaller first"),
    ("AUG.RATIO", "0.01,100", "0,1 1,1 2,1 1,101", "two numbers from 0.01 to 100, the smaller first"),
    ("AUG.HFLIP", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.VFLIP", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.COLOR_JITTER", "0", "-0.1", "at least 0"),
    ("AUG.REPROB", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.RECOUNT", "1", "0", "at least 1"),
    (
        "AUG.AUTO_AUGMENT",
        "none rand-m9 augmix-m3 original v0r 3a trivial cifar10 svhn",
        "nothing off m9 trivial-m9",
        "none, trivial, cifar10, svhn, or a policy of timm",
    ),
    ("SAVE_FREQ", "1", "0", "at least 1"),
    ("PEAK_TFLOPS", "0", "-1", "at least 0"),
    ("DIST.TIMEOUT", "0.01", "0", "from 0.01 to 100000"),
    ("SAVE_STEPS", "0", "-1", "at least 0"),
    ("KEEP_CHECKPOINTS", "0", "-1", "at least 0"),
    ("EVAL_FREQ", "1", "0", "at least 1"),
    ("PRINT_FREQ", "1", "0", "at least 1"),
    ("OUTPUT", "a/b .. /tmp \u00c4", "a\x1b[2J a\x00b \udce9", "printable text"),
    (
        "TAG",
        "a 1 a..b .a a:b \u00c4 ~a",
        "a/b .. . / a\\b a\x1b[2J a\x00b \udce9 \u202e " + "x" * 201,
        "given and a plain name",
    ),
    ("MODEL.ARCH", "resnet18 a.b-c", "../resnet18 .. /tmp/x a\\b a\x1b[2J a\x00b", "given and a plain name"),
    ("SEED", "0 4294967295", "-1 4294967296", "from 0 to 4294967295"),
    *((key, words, "unheard-of", f"one of {words.replace(' ', ', ')}") for key, words in CHOICES.items()),
]
EMPTY = ["DATA.DATA_PATH", "MODEL.ARCH", "TAG"]

CONTRADICTIONS = [
    ("TEST.CLASSES names.txt", "TEST.CLASSES EVAL_MODE", "leave TEST.CLASSES out of a training"),
    ("TEST.REAL_LABELS True", "TEST.REAL_LABELS EVAL_MODE", "leave TEST.REAL_LABELS out of a training"),
    ("EVAL_MODE true THROUGHPUT_MODE true", "EVAL_MODE THROUGHPUT_MODE", "either EVAL_MODE or THROUGHPUT_MODE"),
    ("EVAL_MODE true SUMMARY_MODE true", "SUMMARY_MODE EVAL_MODE", "either SUMMARY_MODE or EVAL_MODE"),
    (
        "THROUGHPUT_MODE true SUMMARY_MODE true",
        "SUMMARY_MODE THROUGHPUT_MODE",
        "SUMMARY_MODE or THROUGHPUT_MODE",
    ),
    ("PROFILE_MODE true EVAL_MODE true", "PROFILE_MODE EVAL_MODE", "PROFILE_MODE or EVAL_MODE"),
    ("PROFILE_MODE true THROUGHPUT_MODE true", "PROFILE_MODE THROUGHPUT_MODE", "PROFILE_MODE or THROUGHPUT_MODE"),
    ("PROFILE_MODE true SUMMARY_MODE true", "PROFILE_MODE SUMMARY_MODE", "PROFILE_MODE or SUMMARY_MODE"),
    ("SUMMARY_MODE true MODEL.RESUME a", "SUMMARY_MODE MODEL.RESUME", "leave MODEL.RESUME out"),
    ("SUMMARY_MODE true MODEL.PRETRAINED a", "SUMMARY_MODE MODEL.PRETRAINED", "leave MODEL.PRETRAINED out"),
    ("EVAL_MODE true MODEL.PRETRAINED a", "EVAL_MODE MODEL.PRETRAINED", "checkpoint to evaluate as MODEL.RESUME"),
    ("EVAL_MODE true", "EVAL_MODE MODEL.RESUME", "give a checkpoint as MODEL.RESUME"),
    ("MODEL.RESUME a MODEL.PRETRAINED b", "MODEL.RESUME MODEL.PRETRAINED", "give only one of them"),
    ("TRAIN.EPOCHS 10", "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", "set TRAIN.WARMUP_EPOCHS lower"),
    ("TRAIN.EPOCHS 5", "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", "set TRAIN.WARMUP_EPOCHS lower"),
    ("TRAIN.START_EPOCH 100", "TRAIN.START_EPOCH TRAIN.EPOCHS", "set TRAIN.START_EPOCH lower"),
    ("TRAIN.MIN_LR 0.01", "TRAIN.MIN_LR TRAIN.BASE_LR", "set TRAIN.MIN_LR to TRAIN.BASE_LR at most"),
    (
        "TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MILESTONES 50,100",
        "TRAIN.LR_SCHEDULER.MILESTONES TRAIN.LR_SCHEDULER.NAME TRAIN.EPOCHS",
        "the last decay would never happen; set TRAIN.LR_SCHEDULER.MILESTONES, in epochs, below TRAIN.EPOCHS",
    ),
    ("DATA.ZIP_MODE true DATA.FORMAT tar", "DATA.ZIP_MODE DATA.FORMAT", "leave DATA.ZIP_MODE .--zip. out"),
    ("DATA.ZIP_MODE true DATA.FORMAT folder", "DATA.ZIP_MODE DATA.FORMAT", "stored in one way"),
    ("DATA.VAL_FRACTION 0.1 DATA.FOLDS 5", "DATA.VAL_FRACTION DATA.FOLDS", "either DATA.VAL_FRACTION or DATA.FOLDS"),
    ("DATA.FOLDS 5 DATA.FOLD 5", "DATA.FOLD DATA.FOLDS", "set DATA.FOLD below DATA.FOLDS"),
    ("DATA.FOLD 1", "DATA.FOLD DATA.FOLDS", "set DATA.FOLD below DATA.FOLDS"),
    ("TASK segmentation SEG.RANK 1", "SEG.RANK SEG.DOWNSAMPLE", "set SEG.DOWNSAMPLE as well"),
    ("MODEL.INSERT_BN true MODEL.BRANCHES 3", "MODEL.INSERT_BN MODEL.BRANCHES", "leave MODEL.BRANCHES out"),
    ("DISTILL.ARCH resnet50", "DISTILL.ARCH DISTILL.TEACHER", "give its weights as DISTILL.TEACHER"),
    (
        "TASK verification FACE.LOSS cosface FACE.MARGIN 28.6",
        "FACE.MARGIN FACE.LOSS",
        "set FACE.MARGIN to 1 at most",
    ),
    *(
        (
            f"COMPILE {compiles} COMPILE_MODE {mode} TRAIN.ACCUMULATION_STEPS 2",
            "COMPILE COMPILE_MODE TRAIN.ACCUMULATION_STEPS",
            "set COMPILE_MODE default or max-autotune-no-cudagraphs",
        )
        for compiles, mode in (("true", "reduce-overhead"), ("auto", "max-autotune"))
    ),
    *(
        (
            opts,
            "DATA.CHANNELS TASK AUG.PRESET AUG.AUTO_AUGMENT",
            "set AUG.AUTO_AUGMENT to none, or for example AUG.PRESET",
        )
        for opts in (
            "DATA.CHANNELS 1",
            "DATA.CHANNELS 4 AUG.PRESET raug15",
            "TASK verification DATA.CHANNELS 1 AUG.AUTO_AUGMENT trivial",
        )
    ),
    (
        "DATA.CHANNELS 4 AUG.AUTO_AUGMENT none",
        "DATA.CHANNELS TASK AUG.PRESET AUG.COLOR_JITTER",
        "set AUG.COLOR_JITTER to 0, or for example AUG.PRESET to weak",
    ),
    (
        "TRAIN.CLASS_WEIGHTS balanced DATA.SAMPLING sqrt",
        "TRAIN.CLASS_WEIGHTS DATA.SAMPLING",
        "set one of them to its default",
    ),
    *(
        (f"AUG.DEVICE gpu AUG.AUTO_AUGMENT {policy}", "AUG.DEVICE AUG.AUTO_AUGMENT AUG.PRESET", "set AUG.DEVICE auto")
        for policy in ("original", "augmix-m3-w3", "rand-m9-t3a")
    ),
    ("TASK segmentation DATA.BATCH_SIZE 1", "TASK DATA.BATCH_SIZE", "set DATA.BATCH_SIZE higher"),
    ("AUG.SCALE 0.5,1 AUG.PRESET crop", "AUG.SCALE AUG.PRESET", "this preset does not crop; leave AUG.SCALE out"),
    ("AUG.RATIO 0.5,1 AUG.PRESET flip", "AUG.RATIO AUG.PRESET", "this preset does not crop; leave AUG.RATIO out"),
    ("AUG.HFLIP 0 AUG.PRESET shift", "AUG.HFLIP AUG.PRESET", "this preset does not flip; leave AUG.HFLIP out"),
    ("AUG.VFLIP 0.5 AUG.PRESET none", "AUG.VFLIP AUG.PRESET", "this preset does not flip; leave AUG.VFLIP out"),
]
AGREEMENTS = [
    "DATA.ZIP_MODE true DATA.FORMAT zip",
    "DATA.ZIP_MODE true DATA.FORMAT null",
    "DATA.FOLDS 5 DATA.FOLD 4",
    "EVAL_MODE true MODEL.RESUME a",
    "EVAL_MODE true MODEL.RESUME a TRAIN.EPOCHS 5",
    "THROUGHPUT_MODE true",
    "THROUGHPUT_MODE true TRAIN.EPOCHS 1",
    "SUMMARY_MODE true TRAIN.EPOCHS 1",
    "MODEL.RESUME a",
    "MODEL.PRETRAINED a",
    "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0",
    "TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MILESTONES 50,99.5",
    "TRAIN.LR_SCHEDULER.NAME step TRAIN.EPOCHS 20",
    "COMPILE false COMPILE_MODE reduce-overhead TRAIN.ACCUMULATION_STEPS 2",
    "COMPILE true COMPILE_MODE reduce-overhead TRAIN.ACCUMULATION_STEPS 1",
    "COMPILE true COMPILE_MODE max-autotune-no-cudagraphs TRAIN.ACCUMULATION_STEPS 2",
    "DATA.BATCH_SIZE 1",
    "DATA.CHANNELS 3",
    "DATA.CHANNELS 1 AUG.PRESET weak",
    "DATA.CHANNELS 1 AUG.AUTO_AUGMENT none",
    "DATA.CHANNELS 4 AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0",
    "TASK segmentation DATA.CHANNELS 4",
    "DATA.CHANNELS 4 EVAL_MODE true MODEL.RESUME a",
    "AUG.DEVICE gpu AUG.PRESET raug15 AUG.AUTO_AUGMENT original",
    "AUG.DEVICE gpu AUG.AUTO_AUGMENT rand-m9-tweights",
    "AUG.DEVICE gpu AUG.AUTO_AUGMENT none",
    "AUG.DEVICE gpu AUG.PRESET weak",
    "AUG.DEVICE cpu AUG.AUTO_AUGMENT original",
    "TASK segmentation DATA.BATCH_SIZE 2",
    "TASK segmentation DATA.BATCH_SIZE 1 EVAL_MODE true MODEL.RESUME a",
    "TASK segmentation SEG.RANK 1 SEG.DOWNSAMPLE conv3",
    "TASK segmentation SEG.BACKBONE_SIZE 320",
    "TASK segmentation SEG.BACKBONE_SIZE 320 MODEL.PRETRAINED a",
    "TASK segmentation MODEL.PRETRAINED a",
    "TASK verification FACE.MARGIN 28.6",
    "AUG.SCALE 0.08,1 AUG.HFLIP 0.5 AUG.PRESET shift",
    "AUG.SCALE 0.5,1 AUG.RATIO 1,2 AUG.HFLIP 0 AUG.VFLIP 1 AUG.PRESET raug15",
    "AUG.SCALE 0.5,1 AUG.HFLIP 0",
    "TASK verification FACE.LOSS cosface FACE.MARGIN 1",
    "TASK verification FACE.LOSS amsoftmax FACE.MARGIN 0.4",
]
# task, key, a value that is not its default
UNUSED = [
    ("classification", "SEG.WIDTH", "256"),
    ("classification", "FACE.PAIRS", "pairs.txt"),
    ("segmentation", "AUG.MIXUP", "0.4"),
    ("segmentation", "AUG.PRESET", "flip"),
    ("segmentation", "TEST.CROP", "true"),
    ("segmentation", "DATA.SAMPLING", "balanced"),
    ("segmentation", "TEST.MASK", "false"),
    ("verification", "TEST.PER_CLASS", "true"),
    ("segmentation", "FACE.LOSS", "cosface"),
    ("segmentation", "DISTILL.WEIGHT", "0.1"),
    ("verification", "DISTILL.TEACHER", "a.pth"),
    ("verification", "SEG.SCALE", "[1,2]"),
    ("verification", "AUG.MIXUP", "0.4"),
    ("verification", "MODEL.LABEL_SMOOTHING", "0"),
    ("verification", "TRAIN.CLASS_WEIGHTS", "balanced"),
]


def load(opts: str):
    return load_config(overrides=parse_opts(opts.split()))


def task_of(key: str) -> str:
    """Returns a task that uses a key."""
    return next(task for task in TASKS if key not in set(unused_keys(task)))


@pytest.mark.parametrize(("key", "inside", "beyond", "allowed"), EDGES, ids=[row[0] for row in EDGES])
def test_edges(key, inside, beyond, allowed):
    for text in inside.split():
        load(f"TASK {task_of(key)} {key} {text}" if key != "TASK" else f"TASK {text}")
    for text in beyond.split():
        with pytest.raises(ValueError, match=rf"^{key} = .* \(--opts\): must be ") as caught:
            load(f"{key} {text}")
        assert f"must be {allowed}" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("AUG.AUTO_AUGMENT", "TrivialAugment", "trivial"),
        ("AUG.AUTO_AUGMENT", "rnd-m9-mstd0.5", "rand"),
        ("AUG.AUTO_AUGMENT", "cifar", "cifar10"),
        ("AUG.PRESET", "raug", "raug10"),
        ("DATA.SAMPLING", "ballanced", "balanced"),
        ("TRAIN.LR_SCHEDULER.NAME", "multi-step", "multistep"),
    ],
)
def test_the_closest_choice_is_named(key, written, meant):
    with pytest.raises(ValueError, match=rf"^{key} = .*; did you mean {meant}\?$"):
        load(f"{key} {written}")


@pytest.mark.parametrize("key", EMPTY)
def test_empty_names(key):
    with pytest.raises(ValueError, match=rf"{key} = '' \(--opts\): must be given"):
        load_config(overrides=parse_opts([key, ""]))


@pytest.mark.parametrize("key", REGISTRIES)
def test_choices_are_those_of_the_registry(key):
    assert CONSTRAINTS[key].choices == tuple(REGISTRIES[key])


def test_every_data_set_of_the_registry_is_a_choice():
    assert all(map(CONSTRAINTS["DATA.DATASET"].holds, DATASETS))


def test_the_default_rank_is_exact():
    assert DEFAULTS["SEG.RANK"] == FULL_RANK


def test_flags_offer_the_choices_of_their_keys():
    offered = {key: arguments["choices"] for key, arguments in FLAGS.values() if "choices" in arguments}
    assert set(offered) == {"DATA.CACHE_MODE", "AMP"}
    assert offered == {key: CONSTRAINTS[key].choices for key in offered}
    assert all(name in FLAGS["--dataset"][1]["help"].split(", ") for name in CONSTRAINTS["DATA.DATASET"].choices)


@pytest.mark.parametrize("key", ["DATA.DATASET", *CHOICES])
def test_the_comment_of_a_key_names_all_choices(key):
    above = (CONFIGS / "defaults.py").read_text().split(f"\n_C.{key} = ")[0]
    comment = []
    for line in reversed(above.splitlines()):
        if not line.startswith("# "):
            break
        comment.insert(0, line.removeprefix("# "))
    words = set(re.findall(r"[\w/-]+", " ".join(comment)))
    assert set(CONSTRAINTS[key].choices) <= words


def test_a_broken_constraint_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("DATA: {BATCH_SIZE: 0}")
    with pytest.raises(ValueError, match=rf"DATA.BATCH_SIZE = 0 \({path}\): must be at least 1"):
        load_config(path)


@pytest.mark.parametrize(("opts", "keys", "remedy"), CONTRADICTIONS)
def test_contradictions_name_both_keys_and_the_remedy(opts, keys, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        load(opts)
    assert all(f"{key} = " in str(caught.value) for key in keys.split())


def test_every_contradiction_is_tried_here():
    tried = {keys for _, keys, _ in CONTRADICTIONS}
    assert tried == {" ".join(conflict.keys) for conflict in (*CONFLICTS, *TRAINING_CONFLICTS)}


@pytest.mark.parametrize("opts", AGREEMENTS)
def test_what_only_looks_like_a_contradiction(opts):
    load(opts)


@pytest.mark.parametrize(("task", "key", "value"), UNUSED)
def test_a_key_that_the_task_does_not_use(task, key, value):
    with pytest.raises(ValueError, match=rf"^{key} = .* \(--opts\): TASK {task} does not use {key}; leave it out$"):
        load(f"TASK {task} {key} {value}")


def test_an_unused_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("AUG: {MIXUP: 0.4}")
    with pytest.raises(ValueError, match=rf"^AUG.MIXUP = 0.4 \({path}\): TASK segmentation does not use AUG.MIXUP"):
        load_config(path, parse_opts(["TASK", "segmentation"]))


@pytest.mark.parametrize("task", TASKS)
def test_an_unused_key_may_be_given_its_default(task, tmp_path):
    cfg = load(f"TASK {task}")
    (tmp_path / "config.yaml").write_text(cfg.dump(sort_keys=False))  # gives every key
    assert load_config(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_does_not_use(task):
    named = TASKS[task].unused
    own, others = TASKS[task].section, {t.section for name, t in TASKS.items() if name != task and t.section}
    assert {*named, *others} <= {*FIELD_TYPES, *SECTIONS}
    unused = set(unused_keys(task))
    for key in FIELD_TYPES:
        assert (key in unused) == (key in named or key.split(".")[0] in {*named, *others}), key
    assert own is None or not any(key.startswith(f"{own}.") for key in unused)


def test_every_key_is_used_by_some_task():
    assert set.intersection(*(set(unused_keys(task)) for task in TASKS)) == set()


HUGE = (10**12, 10**16, 10**400, "1" * 5000, -(10**12))
TINY = ("1e300", "-1e300", "1e308", "1e-300")


@pytest.mark.parametrize(
    "key", [key for key, field_type in FIELD_TYPES.items() if field_type.name.startswith(("an integer", "integers"))]
)
def test_no_integer_is_huge(key):
    for value in HUGE:
        with pytest.raises(ValueError, match=rf"^{key} = .*: (must be|expects) .*") as caught:
            load_config(overrides=[Override("--opts", key, str(value) if value != 10**400 else value)])
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", [key for key, field_type in FIELD_TYPES.items() if "number" in field_type.name])
def test_no_number_is_huge(key):
    for value in TINY:
        text = f"{value},{value}" if "pair" in FIELD_TYPES[key].name else value
        overrides = [Override("--opts", key, text)]
        if value == "1e-300":
            with contextlib.suppress(ValueError):
                load_config(overrides=overrides)
            continue
        with pytest.raises(ValueError, match=rf"^{key} = .*: must be "):
            load_config(overrides=overrides)


def test_every_key_has_a_constraint_or_needs_none():
    free = {key for key, field_type in FIELD_TYPES.items() if field_type.name.startswith(BOOLEAN.name)} | FREE_TEXT
    assert set(CONSTRAINTS) == set(FIELD_TYPES) - free


def test_every_constraint_is_tried_here():
    assert {row[0] for row in EDGES} | set(EMPTY) == set(CONSTRAINTS)


def test_the_defaults_are_allowed():
    assert all(DEFAULTS[key] is None or constraint.holds(DEFAULTS[key]) for key, constraint in CONSTRAINTS.items())
