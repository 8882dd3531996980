"""The kinds of problem that a network is trained for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a task reads of the configuration.

    Attributes:
        section: the section that is its own; None: it has none.
        unused: further sections and keys that it does not read.
    """

    section: str | None
    unused: tuple[str, ...]


TASKS: dict[str, Task] = {
    "classification": Task(None, ()),
    "segmentation": Task("SEG", ("AUG", "TEST.CROP")),
    "verification": Task(
        "FACE",
        (
            "AUG.MIXUP",
            "AUG.CUTMIX",
            "AUG.CUTMIX_MINMAX",
            "AUG.MIXUP_PROB",
            "AUG.MIXUP_SWITCH_PROB",
            "AUG.MIXUP_MODE",
            "MODEL.LABEL_SMOOTHING",
        ),
    ),
}
