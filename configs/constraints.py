"""Which values are allowed: one constraint for each key that has one, the keys of a task, and contradictions.

Names of registries are listed where they are defined, and nowhere else.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from data import (
    AUGMENT_DEVICES,
    CACHE_MODES,
    ERASING_MODES,
    FORMATS,
    INTERPOLATIONS,
    JPEG_DECODERS,
    MIXUP_MODES,
    POLICIES,
    PRESETS,
    SAMPLINGS,
    WITHOUT_CROP,
    WITHOUT_FLIP,
    is_auto_augment_policy,
    is_known,
    is_rand_augment,
    known_names,
)
from data.decode import MODES
from data.samplers import UNIFORM
from engine.compilation import COMPILE_MODES, WITH_CUDA_GRAPHS
from engine.optimizer import OPTIMIZERS
from engine.precision import AUTO, PRECISIONS
from engine.schedule import SCHEDULES
from models.dense import DOWNSAMPLINGS, FULL_RANK
from models.pure_mlp import MIXERS
from models.repmlp_resnet import OUTPUT_STRIDES
from models.segmentation import DECODERS
from tasks import TASKS
from tasks.classification import CLASS_WEIGHTS
from tasks.verification import LOSSES
from utils.cli import MAX_SIDE, did_you_mean
from utils.text import shortened

from .schema import DEFAULTS, FIELD_TYPES, Setting


class Constraint(NamedTuple):
    """A condition on the value of a key.

    Attributes:
        allowed: what is allowed, in words that complete "must be ...".
        holds: whether a value, which is never null, is allowed.
        choices: all allowed values, or what they begin with, where they can be listed.
    """

    allowed: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(choices: Iterable[str]) -> Constraint:
    """One of these names."""
    names = tuple(choices)
    return Constraint(f"one of {', '.join(names)}", lambda value: value in names, names)


def at_least(bound: float, most: float) -> Constraint:
    """At least the bound; `most` catches typing errors, such as a batch that no memory could hold."""
    return Constraint(f"at least {bound} and at most {most}", lambda value: bound <= value <= most)


def from_to(lowest: float, highest: float) -> Constraint:
    """Between two bounds, both included."""
    return Constraint(f"from {lowest} to {highest}", lambda value: lowest <= value <= highest)


def range_within(lowest: float, highest: float) -> Constraint:
    """Two numbers within bounds, the smaller first."""
    return Constraint(
        f"two numbers from {lowest} to {highest}, the smaller first and not equal",
        lambda value: lowest <= value[0] < value[1] <= highest,
    )


def _is_below_one(value: float) -> bool:
    return 0 <= value < 1


def _is_image_size(value: int | tuple[int, int]) -> bool:
    return all(1 <= side <= MAX_SIDE for side in (value if isinstance(value, tuple) else (value,)))


def _are_distinct_odd_sizes(value: tuple[int, ...]) -> bool:
    return all(k > 0 and k % 2 and k < MAX_SIDE for k in value) and len({*value}) == len(value)


def _are_milestones(value: tuple[float, ...]) -> bool:
    rising = all(before < after for before, after in pairwise((0, *value)))
    return bool(value) and rising and value[-1] <= MANY


def _is_folder_name(value: str) -> bool:
    short = len(value.encode(errors="replace")) <= 200
    return short and value.isprintable() and not {*value} & {*"/\\"} and value.strip() not in ("", ".", "..")


MANY = 10**6  # epochs, images of a batch, ...: more than any run has
COUNTER = 10**9

PROBABILITY = from_to(0, 1)
BELOW_ONE = Constraint("at least 0 and below 1", _is_below_one)
ODD = Constraint(f"odd numbers, each once, below {MAX_SIDE}", _are_distinct_odd_sizes)
COUNTS = Constraint(
    f"at least 1 each and at most {MANY}", lambda value: value and all(1 <= count <= MANY for count in value)
)
COUNTS_OR_NONE = Constraint(
    f"at least 0 each and at most {MANY}", lambda value: value and all(0 <= count <= MANY for count in value)
)
PIXELS = Constraint(f"at least 1 pixel and at most {MAX_SIDE}", _is_image_size)
NOT_EMPTY = Constraint("given and not empty", lambda value: value.strip() != "")
# A run writes to OUTPUT/ARCH/TAG, and both are printed in every log.
FOLDER_NAME = Constraint(
    "given and a plain name: printable, at most 200 bytes, without / and \\, not . or ..", _is_folder_name
)
PRINTABLE = Constraint("printable text", str.isprintable)

CONSTRAINTS: dict[str, Constraint] = {
    "TASK": one_of(TASKS),
    "DATA.BATCH_SIZE": at_least(1, MANY),
    "DATA.DATA_PATH": NOT_EMPTY,
    "DATA.DATASET": Constraint(f"one of {', '.join(known_names())}", is_known, tuple(known_names())),
    "DATA.FORMAT": one_of(FORMATS),
    "DATA.VAL_FRACTION": BELOW_ONE,
    "DATA.FOLDS": Constraint("0, or at least 2 and at most 1000", lambda value: value == 0 or 2 <= value <= 1000),
    "DATA.FOLD": from_to(0, 999),
    "DATA.SPLIT_SEED": from_to(0, 2**32 - 1),
    "DATA.IMG_SIZE": PIXELS,
    "DATA.TEST_SIZE": PIXELS,
    "DATA.TEST_BATCH_SIZE": at_least(1, MANY),
    "DATA.INTERPOLATION": one_of(INTERPOLATIONS),
    "DATA.DECODER": one_of(JPEG_DECODERS),
    "DATA.CHANNELS": Constraint("1, 3 or 4", lambda value: value in MODES),
    "DATA.MEAN": Constraint("numbers from 0 to 1", lambda value: value and all(0 <= mean <= 1 for mean in value)),
    "DATA.STD": Constraint("numbers above 0 and at most 1", lambda value: value and all(0 < std <= 1 for std in value)),
    "DATA.CACHE_MODE": one_of(CACHE_MODES),
    "DATA.NUM_WORKERS": at_least(0, 1024),
    "DATA.SAMPLING": one_of(SAMPLINGS),
    "DATA.REPEATED_AUG": from_to(1, 100),
    "DATA.MAX_UNREADABLE": at_least(0, COUNTER),
    "MODEL.ARCH": FOLDER_NAME,
    "MODEL.NUM_CLASSES": at_least(1, 10 * MANY),
    "MODEL.LABEL_SMOOTHING": BELOW_ONE,
    "MODEL.DROP_PATH": BELOW_ONE,
    "MODEL.CHANNELS": COUNTS,
    "MODEL.BLOCKS": COUNTS,
    "MODEL.BRANCHES": ODD,
    "MODEL.SHARE_SETS": COUNTS,
    "MODEL.MIXER": one_of(MIXERS),
    "MODEL.GROUPS": COUNTS,
    "MODEL.REDUCTIONS": COUNTS_OR_NONE,
    "MODEL.GP_REDUCTION": COUNTS,
    "SEG.DECODER": one_of(DECODERS),
    "SEG.WIDTH": at_least(1, 2**14),
    "SEG.DOWNSAMPLE": one_of(DOWNSAMPLINGS),
    "SEG.RANK": from_to(1, FULL_RANK),
    "SEG.AUX_WEIGHT": from_to(0, 10),
    "SEG.BACKBONE_SIZE": PIXELS,
    "SEG.OUTPUT_STRIDE": Constraint("8, 16 or 32", lambda value: value in OUTPUT_STRIDES),
    "SEG.SCALE": range_within(0.1, 10),
    "FACE.EMBEDDING": at_least(1, 2**16),
    "FACE.LOSS": one_of(LOSSES),
    "FACE.MARGIN": from_to(0, 90),
    "FACE.SCALE": Constraint("above 0 and at most 1000", lambda value: 0 < value <= 1000),
    "FACE.NUM_PAIRS": at_least(4, COUNTER),
    "FACE.FOLDS": at_least(2, MANY),
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
    "TRAIN.CLASS_WEIGHTS": one_of(CLASS_WEIGHTS),
    "TRAIN.LR_SCHEDULER.NAME": one_of(SCHEDULES),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": at_least(1, MANY),
    "TRAIN.LR_SCHEDULER.MILESTONES": Constraint(
        f"numbers above 0 and at most {MANY}, in ascending order", _are_milestones
    ),
    "TRAIN.LR_SCHEDULER.POWER": Constraint("above 0 and at most 10", lambda value: 0 < value <= 10),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Constraint("above 0 and at most 1", lambda value: 0 < value <= 1),
    "TRAIN.OPTIMIZER.NAME": one_of(OPTIMIZERS),
    "TRAIN.OPTIMIZER.EPS": from_to(1e-30, 1),
    "TRAIN.OPTIMIZER.BETAS": Constraint(
        "two numbers, each at least 0 and below 1", lambda value: all(map(_is_below_one, value))
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": BELOW_ONE,
    "TRAIN.EMA_ALPHA": BELOW_ONE,
    "TRAIN.EMA_UPDATE_PERIOD": at_least(1, MANY),
    "DISTILL.ARCH": PRINTABLE,
    "DISTILL.WEIGHT": PROBABILITY,
    "AUG.MIXUP": at_least(0, 1000),
    "AUG.CUTMIX": at_least(0, 1000),
    "AUG.CUTMIX_MINMAX": range_within(0, 1),
    "AUG.MIXUP_PROB": PROBABILITY,
    "AUG.MIXUP_SWITCH_PROB": PROBABILITY,
    "AUG.MIXUP_MODE": one_of(MIXUP_MODES),
    "AUG.PRESET": one_of(PRESETS),
    "AUG.SCALE": range_within(0.001, 1),
    "AUG.RATIO": range_within(0.01, 100),
    "AUG.HFLIP": PROBABILITY,
    "AUG.VFLIP": PROBABILITY,
    "AUG.COLOR_JITTER": at_least(0, 10),
    "AUG.AUTO_AUGMENT": Constraint(
        "none, trivial, cifar10, svhn, or a policy of timm such as rand-m9-mstd0.5-inc1, augmix-m3-w3, "
        "original-mstd0.5, 3a",
        is_auto_augment_policy,
        POLICIES,
    ),
    "AUG.DEVICE": one_of(AUGMENT_DEVICES),
    "AUG.REPROB": PROBABILITY,
    "AUG.REMODE": one_of(ERASING_MODES),
    "AUG.RECOUNT": at_least(1, 1000),
    "DIST.TIMEOUT": from_to(0.01, 100_000),
    "AMP": one_of((AUTO, *PRECISIONS)),
    "COMPILE_MODE": one_of(COMPILE_MODES),
    "OUTPUT": PRINTABLE,
    "TAG": FOLDER_NAME,
    "SAVE_FREQ": at_least(1, MANY),
    "SAVE_STEPS": at_least(0, COUNTER),
    "KEEP_CHECKPOINTS": at_least(0, MANY),
    "EVAL_FREQ": at_least(1, MANY),
    "PRINT_FREQ": at_least(1, 10_000),
    "PEAK_TFLOPS": at_least(0, MANY),
    "SEED": from_to(0, 2**32 - 1),
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
        "a run does one of the two; give either EVAL_MODE or THROUGHPUT_MODE",
    ),
    Conflict(
        ("SUMMARY_MODE", "EVAL_MODE"),
        lambda summary, evaluate: summary and evaluate,
        "a run does one of the two; give either SUMMARY_MODE or EVAL_MODE",
    ),
    Conflict(
        ("SUMMARY_MODE", "THROUGHPUT_MODE"),
        lambda summary, throughput: summary and throughput,
        "a run does one of the two; give either SUMMARY_MODE or THROUGHPUT_MODE",
    ),
    *(
        Conflict(
            ("PROFILE_MODE", mode),
            lambda profile, other: profile and other,
            f"a run does one of the two; give either PROFILE_MODE or {mode}",
        )
        for mode in ("EVAL_MODE", "THROUGHPUT_MODE", "SUMMARY_MODE")
    ),
    *(
        Conflict(
            ("SUMMARY_MODE", weights),
            lambda summary, path: summary and path,
            f"a summary needs no weights, it counts the network of the configuration; leave {weights} out",
        )
        for weights in ("MODEL.RESUME", "MODEL.PRETRAINED")
    ),
    Conflict(
        ("EVAL_MODE", "MODEL.PRETRAINED"),
        lambda evaluate, pretrained: evaluate and pretrained,
        "MODEL.PRETRAINED starts a training; give the checkpoint to evaluate as MODEL.RESUME",
    ),
    Conflict(
        ("EVAL_MODE", "MODEL.RESUME"),
        lambda evaluate, resume: evaluate and not resume,
        "an evaluation needs weights; give a checkpoint as MODEL.RESUME",
    ),
    Conflict(
        ("DATA.ZIP_MODE", "DATA.FORMAT"),
        lambda zipped, form: zipped and form not in (None, "zip"),
        "the images are stored in one way; leave DATA.ZIP_MODE (--zip) out",
    ),
    Conflict(
        ("DATA.VAL_FRACTION", "DATA.FOLDS"),
        lambda fraction, folds: fraction and folds,
        "the images are divided in one way; give either DATA.VAL_FRACTION or DATA.FOLDS",
    ),
    Conflict(
        ("DATA.FOLD", "DATA.FOLDS"),
        lambda fold, folds: fold and fold >= folds,
        "folds are counted from 0; set DATA.FOLD below DATA.FOLDS",
    ),
    Conflict(
        ("SEG.RANK", "SEG.DOWNSAMPLE"),
        lambda rank, downsample: rank != FULL_RANK and downsample is None,
        "the rank is that of the replaced embeddings; set SEG.DOWNSAMPLE as well",
    ),
    Conflict(
        ("MODEL.INSERT_BN", "MODEL.BRANCHES"),
        lambda inserted, branches: inserted and branches,
        "a converted network has no branches; leave MODEL.BRANCHES out",
    ),
    *(
        Conflict(
            (key, "AUG.PRESET"),
            # By value: the configuration that a run writes gives every key.
            lambda value, preset, key=key, unused=unused: preset in unused and value != DEFAULTS[key],
            f"this preset does not {verb}; leave {key} out",
        )
        for verb, unused, keys in (
            ("crop", WITHOUT_CROP, ("AUG.SCALE", "AUG.RATIO")),
            ("flip", WITHOUT_FLIP, ("AUG.HFLIP", "AUG.VFLIP")),
        )
        for key in keys
    ),
    Conflict(
        ("DISTILL.ARCH", "DISTILL.TEACHER"),
        lambda arch, teacher: arch and not teacher,
        "the architecture is that of the teacher; give its weights as DISTILL.TEACHER",
    ),
    Conflict(
        ("FACE.MARGIN", "FACE.LOSS"),
        lambda margin, loss: loss != "arcface" and margin is not None and margin > 1,
        "the margin of cosface and amsoftmax is a cosine and not an angle; set FACE.MARGIN to 1 at most",
    ),
)

TRAINING_CONFLICTS = (
    *(
        Conflict(
            (key, "EVAL_MODE"),
            lambda value, _: value,
            f"it is for the evaluation of a checkpoint; leave {key} out of a training",
        )
        for key in ("TEST.CLASSES", "TEST.REAL_LABELS")
    ),
    Conflict(
        ("AUG.DEVICE", "AUG.AUTO_AUGMENT", "AUG.PRESET"),
        lambda device, policy, preset: device == "gpu" and not (preset or policy == "none" or is_rand_augment(policy)),
        "only RandAugment, a preset raug* or a policy rand-*, has a form for batches; set AUG.DEVICE auto",
    ),
    Conflict(
        ("MODEL.RESUME", "MODEL.PRETRAINED"),
        lambda resume, pretrained: resume and pretrained,
        "MODEL.RESUME resumes a run and MODEL.PRETRAINED starts a new one; give only one of them",
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
    Conflict(
        ("TRAIN.LR_SCHEDULER.MILESTONES", "TRAIN.LR_SCHEDULER.NAME", "TRAIN.EPOCHS"),
        lambda milestones, schedule, epochs: schedule == "multistep" and milestones[-1] >= epochs,
        "the last decay would never happen; set TRAIN.LR_SCHEDULER.MILESTONES, in epochs, below TRAIN.EPOCHS",
    ),
    Conflict(
        ("COMPILE", "COMPILE_MODE", "TRAIN.ACCUMULATION_STEPS"),
        lambda compiles, mode, steps: compiles and mode in WITH_CUDA_GRAPHS and steps > 1,
        "CUDA graphs overwrite gradients of earlier batches; set COMPILE_MODE default or max-autotune-no-cudagraphs",
    ),
    Conflict(
        ("TRAIN.CLASS_WEIGHTS", "DATA.SAMPLING"),
        lambda weights, sampling: weights != "none" and sampling != UNIFORM,
        "both make up for unequal classes, which would then be counted twice; set one of them to its default",
    ),
    Conflict(
        ("DATA.CHANNELS", "TASK", "AUG.PRESET", "AUG.AUTO_AUGMENT"),
        lambda channels, task, preset, policy: (
            channels in (1, 4)
            and "AUG" not in TASKS[task].unused
            and (policy != "none" if preset is None else preset.startswith("raug"))
        ),
        "policies are for 3 channels; set AUG.AUTO_AUGMENT to none, or for example AUG.PRESET to weak",
    ),
    Conflict(
        ("DATA.CHANNELS", "TASK", "AUG.PRESET", "AUG.COLOR_JITTER"),
        lambda channels, task, preset, jitter: (
            channels == 4 and "AUG" not in TASKS[task].unused and preset is None and jitter > 0
        ),
        "colour jitter is for 1 and 3 channels; set AUG.COLOR_JITTER to 0, or for example AUG.PRESET to weak",
    ),
    Conflict(
        ("TASK", "DATA.BATCH_SIZE"),
        lambda task, batch_size: batch_size < TASKS[task].least_batch_size,
        "the networks of this task normalize over the images of a batch; set DATA.BATCH_SIZE higher",
    ),
)


def check(settings: Mapping[str, Setting]) -> None:
    """Checks all settings, which must hold every key of the schema.

    Raises:
        ValueError: for the first constraint that is broken, with key, value, source and what is allowed; for a key that
            the task does not use and that is not at its default; for keys that contradict each other.
    """
    for key, constraint in CONSTRAINTS.items():
        value = settings[key].value
        if value is not None and not constraint.holds(value):
            raise ValueError(f"{_show(key, settings)}: must be {constraint.allowed}{_hint(value, constraint.choices)}")
    task = settings["TASK"].value
    for key in unused_keys(task):
        if settings[key].value != DEFAULTS[key]:  # by value: the configuration that a run writes gives every key
            raise ValueError(f"{_show(key, settings)}: TASK {task} does not use {key}; leave it out")
    training = not any(settings[mode].value for mode in ("EVAL_MODE", "THROUGHPUT_MODE", "SUMMARY_MODE"))
    for keys, clash, remedy in CONFLICTS + (TRAINING_CONFLICTS if training else ()):
        if clash(*(settings[key].value for key in keys)):
            raise ValueError(f"{' with '.join(_show(key, settings) for key in keys)}: {remedy}")


def _hint(value: Any, choices: Iterable[str]) -> str:
    """Names the choice that a text, or its part before the first hyphen, may have been meant to be."""
    text = str(value)
    return did_you_mean(text, choices) or did_you_mean(text.partition("-")[0], choices)


def unused_keys(task: str) -> Iterator[str]:
    """Yields the keys that a task does not use: those it names, and those in the own sections of other tasks."""
    own = TASKS[task].section
    others = {other.section for other in TASKS.values() if other.section not in (None, own)}
    unused = {*TASKS[task].unused, *others}
    for key in FIELD_TYPES:
        parts = key.split(".")
        if any(".".join(parts[:length]) in unused for length in range(1, len(parts) + 1)):
            yield key


def _show(key: str, settings: Mapping[str, Setting]) -> str:
    return f"{key} = {shortened(repr(settings[key].value))} ({settings[key].source})"
