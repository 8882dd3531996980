"""Which values make sense: one rule for each key that has one, and the combinations that contradict themselves."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from utils.cli import MAX_SIDE
from utils.text import shortened

from .schema import Setting


class Rule(NamedTuple):
    """What is allowed, in words that complete "must be ...", and whether a value (never null) holds to it."""

    allowed: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
    """One of these words."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def at_least(bound: float, most: float) -> Rule:
    """From the bound to what still makes sense; beyond that, a slip of the hand would take all memory or no end."""
    return Rule(f"at least {bound} and at most {most}", lambda value: bound <= value <= most)


def from_0_to(bound: float) -> Rule:
    """From 0 to the bound, both included."""
    return Rule(f"from 0 to {bound}", lambda value: 0 <= value <= bound)


def _inside_unit(value: float) -> bool:
    return 0 <= value < 1


def _possible_size(value: int | tuple[int, int]) -> bool:
    return all(1 <= side <= MAX_SIDE for side in (value if isinstance(value, tuple) else (value,)))


def _different_odd_sizes(value: tuple[int, ...]) -> bool:
    return all(k > 0 and k % 2 and k < MAX_SIDE for k in value) and len({*value}) == len(value)


def _names_a_folder(value: str) -> bool:
    short = len(value.encode(errors="replace")) <= 200
    return short and value.isprintable() and not {*value} & {*"/\\"} and value.strip() not in ("", ".", "..")


MANY = 10**6  # epochs, images of a batch, ...: more than any run has
COUNTER = 10**9

PROBABILITY = from_0_to(1)
BELOW_ONE = Rule("at least 0 and below 1", _inside_unit)
ODD = Rule(f"odd numbers, each once, below {MAX_SIDE}", _different_odd_sizes)
COUNTS = Rule(f"at least 1 each and at most {MANY}", lambda value: value and all(1 <= count <= MANY for count in value))
PIXELS = Rule(f"at least 1 pixel and at most {MAX_SIDE}", _possible_size)
NOT_EMPTY = Rule("given and not empty", lambda value: value.strip() != "")
# A run writes to OUTPUT/ARCH/TAG, and both are printed in every log.
FOLDER_NAME = Rule(
    "given and a plain name: printable, at most 200 bytes, without / and \\, not . or ..", _names_a_folder
)
PRINTABLE = Rule("printable text", str.isprintable)
POLICIES = ("rand", "augmix", "original", "v0", "3a")

RULES: dict[str, Rule] = {
    "DATA.BATCH_SIZE": at_least(1, MANY),
    "DATA.DATA_PATH": NOT_EMPTY,
    "DATA.DATASET": one_of("imagenet", "cf100", "digits", "shapes"),
    "DATA.IMG_SIZE": PIXELS,
    "DATA.TEST_SIZE": PIXELS,
    "DATA.TEST_BATCH_SIZE": at_least(1, MANY),
    "DATA.INTERPOLATION": one_of("random", "bilinear", "bicubic"),
    "DATA.CACHE_MODE": one_of("no", "part", "full"),
    "DATA.NUM_WORKERS": at_least(0, 1024),
    "DATA.MAX_UNREADABLE": at_least(0, COUNTER),
    "MODEL.ARCH": FOLDER_NAME,
    "MODEL.NUM_CLASSES": at_least(1, 10 * MANY),
    "MODEL.LABEL_SMOOTHING": BELOW_ONE,
    "MODEL.DROP_PATH": BELOW_ONE,
    "MODEL.BRANCHES": ODD,
    "MODEL.SHARE_SETS": COUNTS,
    "TRAIN.START_EPOCH": at_least(0, MANY),
    "TRAIN.EPOCHS": at_least(1, MANY),
    "TRAIN.WARMUP_EPOCHS": at_least(0, MANY),
    "TRAIN.WEIGHT_DECAY": at_least(0, 1000),
    "TRAIN.BASE_LR": at_least(0, 1000),
    "TRAIN.WARMUP_LR": at_least(0, 1000),
    "TRAIN.MIN_LR": at_least(0, 1000),
    "TRAIN.CLIP_GRAD": at_least(0, COUNTER),
    "TRAIN.MAX_SKIPPED": at_least(0, COUNTER),
    "TRAIN.ACCUMULATION_STEPS": at_least(0, MANY),
    "TRAIN.LR_SCHEDULER.NAME": one_of("cosine", "linear", "step"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": at_least(1, MANY),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Rule("above 0 and at most 1", lambda value: 0 < value <= 1),
    "TRAIN.OPTIMIZER.NAME": one_of("adamw", "sgd"),
    "TRAIN.OPTIMIZER.EPS": Rule("above 0, from 1e-30 to 1", lambda value: 1e-30 <= value <= 1),
    "TRAIN.OPTIMIZER.BETAS": Rule(
        "two numbers, each at least 0 and below 1", lambda value: all(map(_inside_unit, value))
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": BELOW_ONE,
    "TRAIN.EMA_ALPHA": BELOW_ONE,
    "TRAIN.EMA_UPDATE_PERIOD": at_least(1, MANY),
    "AUG.MIXUP": at_least(0, 1000),
    "AUG.CUTMIX": at_least(0, 1000),
    "AUG.CUTMIX_MINMAX": Rule(
        "two numbers from 0 to 1, the smaller first and not equal", lambda value: 0 <= value[0] < value[1] <= 1
    ),
    "AUG.MIXUP_PROB": PROBABILITY,
    "AUG.MIXUP_SWITCH_PROB": PROBABILITY,
    "AUG.MIXUP_MODE": one_of("batch", "pair", "elem"),
    "AUG.PRESET": one_of("none", "flip", "weak", "raug10", "raug15", "raug20", "raug25", "shift", "crop"),
    "AUG.COLOR_JITTER": at_least(0, 10),
    "AUG.AUTO_AUGMENT": Rule(
        f"none, or a policy of timm, whose name starts with one of {', '.join(POLICIES)}",
        lambda value: value == "none" or value.startswith(POLICIES),
    ),
    "AUG.REPROB": PROBABILITY,
    "AUG.REMODE": one_of("const", "rand", "pixel"),
    "AUG.RECOUNT": at_least(1, 1000),
    "AMP": one_of("auto", "off", "bf16", "fp16"),
    "COMPILE_MODE": one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "OUTPUT": PRINTABLE,
    "TAG": FOLDER_NAME,
    "SAVE_FREQ": at_least(1, MANY),
    "SAVE_STEPS": at_least(0, COUNTER),
    "KEEP_CHECKPOINTS": at_least(0, MANY),
    "EVAL_FREQ": at_least(1, MANY),
    "PRINT_FREQ": at_least(1, 10_000),
    "SEED": from_0_to(2**32 - 1),
}


class Conflict(NamedTuple):
    """Keys that contradict each other where `clash`, called with their values in this order, is true."""

    keys: tuple[str, ...]
    clash: Callable[..., object]
    remedy: str


CONFLICTS = (
    Conflict(
        ("EVAL_MODE", "THROUGHPUT_MODE"),
        lambda evaluate, throughput: evaluate and throughput,
        "a run does one of the two; give either --eval or --throughput",
    ),
    Conflict(
        ("EVAL_MODE", "MODEL.PRETRAINED"),
        lambda evaluate, pretrained: evaluate and pretrained,
        "--pretrained is for starting a training; give the checkpoint to evaluate with --resume",
    ),
    Conflict(
        ("EVAL_MODE", "MODEL.RESUME"),
        lambda evaluate, resume: evaluate and not resume,
        "an evaluation needs weights; give a checkpoint with --resume",
    ),
)

TRAINING_CONFLICTS = (
    Conflict(
        ("MODEL.RESUME", "MODEL.PRETRAINED"),
        lambda resume, pretrained: resume and pretrained,
        "--resume continues a run and --pretrained starts a new one; give only one of them",
    ),
    Conflict(
        ("TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS"),
        lambda warmup, epochs: warmup >= epochs,
        "the warm-up must end before the training does; set TRAIN.WARMUP_EPOCHS lower (0: none)",
    ),
    Conflict(
        ("TRAIN.START_EPOCH", "TRAIN.EPOCHS"),
        lambda start, epochs: start >= epochs,
        "no epoch is left to train; set TRAIN.START_EPOCH lower or TRAIN.EPOCHS higher",
    ),
    Conflict(
        ("TRAIN.MIN_LR", "TRAIN.BASE_LR"),
        lambda lowest, base: lowest > base,
        "the learning rate must not rise after the warm-up; set TRAIN.MIN_LR to TRAIN.BASE_LR at most",
    ),
)


def check(settings: Mapping[str, Setting]) -> None:
    """Checks all settings, which must hold every key of the schema.

    Raises:
        ValueError: for the first rule that is broken, with key, value, source and what is allowed.
    """
    for key, rule in RULES.items():
        value = settings[key].value
        if value is not None and not rule.holds(value):
            raise ValueError(f"{_show(key, settings)}: must be {rule.allowed}")
    training = not (settings["EVAL_MODE"].value or settings["THROUGHPUT_MODE"].value)
    for keys, clash, remedy in CONFLICTS + (TRAINING_CONFLICTS if training else ()):
        if clash(*(settings[key].value for key in keys)):
            raise ValueError(f"{' with '.join(_show(key, settings) for key in keys)}: {remedy}")


def _show(key: str, settings: Mapping[str, Setting]) -> str:
    return f"{key} = {shortened(repr(settings[key].value))} ({settings[key].source})"
