"""Values that make no sense are refused with what is allowed, and so are keys that contradict each other."""

import contextlib

import pytest

from configs import Override, load_config, parse_opts
from configs.constraints import CONFLICTS, CONSTRAINTS, TRAINING_CONFLICTS
from configs.schema import DEFAULTS, FIELD_TYPES
from configs.field_types import BOOLEAN

CHOICES = {
    "DATA.DATASET": "imagenet cf100 digits shapes",
    "DATA.INTERPOLATION": "random bilinear bicubic",
    "DATA.CACHE_MODE": "no part full",
    "TRAIN.LR_SCHEDULER.NAME": "cosine linear step",
    "TRAIN.OPTIMIZER.NAME": "adamw sgd",
    "AUG.MIXUP_MODE": "batch pair elem",
    "AUG.PRESET": "none flip weak raug10 raug15 raug20 raug25 shift crop",
    "AUG.REMODE": "const rand pixel",
    "AMP": "auto off bf16 fp16",
    "COMPILE_MODE": "default reduce-overhead max-autotune max-autotune-no-cudagraphs",
}
FREE_TEXT = {"MODEL.RESUME", "MODEL.PRETRAINED"}

# key, values at the edge of what is allowed, values just beyond it, the words for what is allowed
EDGES = [
    ("DATA.BATCH_SIZE", "1", "0 -1", "at least 1"),
    ("DATA.IMG_SIZE", "1 1,2", "0 -224 0,224 224,-1", "at least 1 pixel"),
    ("DATA.TEST_SIZE", "1 1,2", "0 0,224", "at least 1 pixel"),
    ("DATA.TEST_BATCH_SIZE", "1 None", "0", "at least 1"),
    ("DATA.NUM_WORKERS", "0", "-1", "at least 0"),
    ("DATA.MAX_UNREADABLE", "0", "-1", "at least 0"),
    ("MODEL.NUM_CLASSES", "1 None", "0", "at least 1"),
    ("MODEL.LABEL_SMOOTHING", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("MODEL.DROP_PATH", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("MODEL.BRANCHES", "1 [] 7,3 None", "2 1,2 3,3 -1 0", "odd numbers, each once"),
    ("MODEL.SHARE_SETS", "1 4,16 None", "[] 0 1,0 -1", "at least 1 each"),
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
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", "0.01 1", "0 1.1", "above 0 and at most 1"),
    ("TRAIN.OPTIMIZER.EPS", "1e-12", "0 -1e-8", "above 0"),
    ("TRAIN.OPTIMIZER.BETAS", "0,0.99", "0.9,1 -0.1,0.9", "two numbers, each at least 0 and below 1"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "0 0.99", "-0.1 1", "at least 0 and below 1"),
    ("TRAIN.EMA_ALPHA", "0 0.9999", "-0.1 1", "at least 0 and below 1"),
    ("TRAIN.EMA_UPDATE_PERIOD", "1", "0", "at least 1"),
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
    ("AUG.COLOR_JITTER", "0", "-0.1", "at least 0"),
    ("AUG.REPROB", "0 1", "-0.1 1.1", "from 0 to 1"),
    ("AUG.RECOUNT", "1", "0", "at least 1"),
    ("AUG.AUTO_AUGMENT", "none rand-m9 augmix-m3 original v0r 3a", "nothing off m9", "none, or a policy of timm"),
    ("SAVE_FREQ", "1", "0", "at least 1"),
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
    ("EVAL_MODE true THROUGHPUT_MODE true", "EVAL_MODE THROUGHPUT_MODE", "either --eval or --throughput"),
    ("EVAL_MODE true MODEL.PRETRAINED a", "EVAL_MODE MODEL.PRETRAINED", "checkpoint to evaluate with --resume"),
    ("EVAL_MODE true", "EVAL_MODE MODEL.RESUME", "give a checkpoint with --resume"),
    ("MODEL.RESUME a MODEL.PRETRAINED b", "MODEL.RESUME MODEL.PRETRAINED", "give only one of them"),
    ("TRAIN.EPOCHS 10", "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", "set TRAIN.WARMUP_EPOCHS lower"),
    ("TRAIN.EPOCHS 5", "TRAIN.WARMUP_EPOCHS TRAIN.EPOCHS", "set TRAIN.WARMUP_EPOCHS lower"),
    ("TRAIN.START_EPOCH 100", "TRAIN.START_EPOCH TRAIN.EPOCHS", "set TRAIN.START_EPOCH lower"),
    ("TRAIN.MIN_LR 0.01", "TRAIN.MIN_LR TRAIN.BASE_LR", "set TRAIN.MIN_LR to TRAIN.BASE_LR at most"),
]
AGREEMENTS = [
    "EVAL_MODE true MODEL.RESUME a",
    "EVAL_MODE true MODEL.RESUME a TRAIN.EPOCHS 5",
    "THROUGHPUT_MODE true",
    "THROUGHPUT_MODE true TRAIN.EPOCHS 1",
    "MODEL.RESUME a",
    "MODEL.PRETRAINED a",
    "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0",
]


def load(opts: str):
    return load_config(overrides=parse_opts(opts.split()))


@pytest.mark.parametrize(("key", "inside", "beyond", "allowed"), EDGES, ids=[row[0] for row in EDGES])
def test_edges(key, inside, beyond, allowed):
    for text in inside.split():
        load(f"{key} {text}")
    for text in beyond.split():
        with pytest.raises(ValueError, match=rf"^{key} = .* \(--opts\): must be ") as caught:
            load(f"{key} {text}")
        assert f"must be {allowed}" in str(caught.value)


@pytest.mark.parametrize("key", EMPTY)
def test_empty_names(key):
    with pytest.raises(ValueError, match=rf"{key} = '' \(--opts\): must be given"):
        load_config(overrides=parse_opts([key, ""]))


def test_a_broken_rule_in_a_file_names_the_file(tmp_path):
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


HUGE = (10**12, 10**16, 10**400, "1" * 5000, -(10**12))
TINY = ("1e300", "-1e300", "1e308", "1e-300")


@pytest.mark.parametrize(
    "key", [key for key, kind in FIELD_TYPES.items() if kind.name.startswith(("an integer", "integers"))]
)
def test_no_integer_is_huge(key):
    for value in HUGE:
        with pytest.raises(ValueError, match=rf"^{key} = .*: (must be|expects) .*") as caught:
            load_config(overrides=[Override("--opts", key, str(value) if value != 10**400 else value)])
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("key", [key for key, kind in FIELD_TYPES.items() if "number" in kind.name])
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


def test_every_key_has_a_rule_or_needs_none():
    free = {key for key, kind in FIELD_TYPES.items() if kind.name.startswith(BOOLEAN.name)} | FREE_TEXT
    assert set(CONSTRAINTS) == set(FIELD_TYPES) - free


def test_every_rule_is_tried_here():
    assert {row[0] for row in EDGES} | set(EMPTY) == set(CONSTRAINTS)


def test_the_defaults_hold_to_the_rules():
    assert all(DEFAULTS[key] is None or rule.holds(DEFAULTS[key]) for key, rule in CONSTRAINTS.items())
