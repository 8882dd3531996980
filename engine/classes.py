"""Which output of a network stands for which class of a data set: by name, or by position where names are missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import FolderSource, Source
from data.class_names import IMAGENET_CLASSES, are_numbers, are_positions, first_difference, imagenet_names
from models.checkpoints import Checkpoint, output_names
from utils.text import shortened

IMAGENET = "imagenet"  # the data set of image folders
EXAMPLES = 3  # of names, in a message


@dataclass(frozen=True)
class Outputs:
    """The outputs of the network of a checkpoint.

    Attributes:
        path: of the checkpoint.
        count: of the outputs.
        names: of the outputs, or of the first of them; None where the checkpoint names none.
        dataset: that the weights were trained on; None where the checkpoint does not say it.
    """

    path: Path
    count: int
    names: list[str] | None = None
    dataset: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, count: int) -> "Outputs":
        """Returns the outputs as the metadata of a checkpoint describe them."""
        return cls(checkpoint.path, count, output_names(checkpoint, count), checkpoint.meta.get("dataset"))

    @property
    def assumed(self) -> list[str] | None:
        """The names of ImageNet-1k's classes for 1000 outputs without names that were trained on image folders."""
        unnamed = self.names is None or (len(self.names) == self.count and are_positions(self.names))
        imagenet = self.count == IMAGENET_CLASSES and self.dataset in (None, IMAGENET)
        return imagenet_names() if unnamed and imagenet else None


@dataclass(frozen=True)
class ClassMatch:
    """The output of a network for each class of a data set.

    Attributes:
        outputs: by label; None: that of label k is output k, and all outputs are of classes of the data set.
        subset: whether the network has outputs for other classes besides.
        note: how they were matched, for the log; empty where both have the same classes in the same order.
    """

    outputs: tuple[int, ...] | None = None
    subset: bool = False
    note: str = ""


SAME_CLASSES = ClassMatch()


def match_classes(outputs: Outputs, source: Source, place: object, *, fewer: bool = False) -> ClassMatch:
    """Finds the output of each class of a data set.

    The names decide where the classes of the data set are among those of the network. Where one of them has no names
    but the numbers from 0 on, or none at all, the position decides, and the number of classes must be the same.
    1000 outputs without names are taken to be those of ImageNet-1k.

    Args:
        outputs: of the network.
        source: the images of the data set.
        place: of the data set, for messages.
        fewer: whether the data set may have fewer classes where the position decides.

    Raises:
        ValueError: they do not match, or the position would decide and is not certain.
    """
    classes = source.classes
    for names in (outputs.names, outputs.assumed):
        if names is not None and classes == names:
            return SAME_CLASSES
        if names is not None and _are_among(classes, names):
            return _by_name(classes, names, outputs.count, assumed=names is not outputs.names)
    _check_positions(outputs, source, place, fewer)
    if outputs.names is None and outputs.assumed is None and are_positions(classes):
        return SAME_CLASSES  # neither has names
    if are_positions(classes):
        return ClassMatch(note="the classes have numbers for names: each is the output of that number")
    return ClassMatch(note=f"the weights name no classes: {_shown(classes)} are their outputs in this order")


def _are_among(classes: Sequence[str], names: Sequence[str]) -> bool:
    """Returns whether each class has one name, and one output."""
    return len({*classes}) == len(classes) and len({*names}) == len(names) and {*classes} <= {*names}


def _by_name(classes: Sequence[str], names: Sequence[str], count: int, *, assumed: bool) -> ClassMatch:
    positions = {name: position for position, name in enumerate(names)}
    found = tuple(positions[name] for name in classes)
    subset = len(classes) < len(names)
    same = "the classes, which are in another order than those of the weights,"
    what = f"{len(classes)} of the {count} classes of the weights" if subset else same
    how = ": those of ImageNet-1k in the order of their WordNet ids, since the weights name none" * assumed
    return ClassMatch(found, subset, f"{what} are matched by name{how}")


def _check_positions(outputs: Outputs, source: Source, place: object, fewer: bool) -> None:
    """Raises ValueError, unless label k can only be of output k."""
    names, classes, found = outputs.names, source.classes, len(source.classes)
    if names is not None and not are_positions(names) and not are_positions(classes):
        unknown = [name for name in classes if name not in {*names}]
        if not unknown:
            raise ValueError(f"{outputs.path} and {place} can't be matched by name: one has two classes of one name")
        raise ValueError(
            f"{outputs.path} does not know {len(unknown)} of the {found} classes in {place}: {_shown(unknown)}; it "
            f"knows {_shown(names)}: rename the folders, or name its outputs in a file, TEST.CLASSES"
        )
    places = {name: place for place, name in enumerate(names or ())}
    if any(places.get(name, label) != label for label, name in enumerate(classes)):
        raise ValueError(
            f"{outputs.path} and {place} have classes of the same names at different places, and each has others "
            f"besides ({first_difference(classes, names or ())}): rename the folders, or name the outputs in a file, "
            "TEST.CLASSES"
        )
    expected = outputs.count if names is None else len(names)
    if found != expected and not (fewer and found <= outputs.count):
        raise ValueError(f"{outputs.path} is for {expected} classes, {place} has {found}")
    if names is None and fewer and are_numbers(classes) and not are_positions(classes):
        raise ValueError(
            f"{outputs.path} names no classes, and those of {place} are numbers that are not 0, 1, 2, ... "
            f"({_shown(classes)}): name the outputs in a file, TEST.CLASSES"
        )
    if names is None and outputs.assumed is None and _were_by_text(source):
        raise ValueError(f"{outputs.path} {_unknown_order(classes)}, or name its outputs in a file, TEST.CLASSES")


def check_resumed_classes(checkpoint: Checkpoint, names: list[str] | None, source: Source, place: object) -> None:
    """Checks that a run goes on with the classes that it had.

    Args:
        checkpoint: of the run.
        names: of the outputs; None for a network whose outputs are not classes.
        source: the training images.
        place: of the data set, for messages.

    Raises:
        ValueError: the classes are others now, or in another order, or may be.
    """
    before = checkpoint.meta.get("class_names")
    if names is None:
        return
    if before is None and _were_by_text(source):
        raise ValueError(f"{checkpoint.path} {_unknown_order(names)}")
    if before is None or _are_the_same_positions(before, names):
        return
    difference = first_difference(names, before)
    if difference:
        raise ValueError(
            f"{checkpoint.path} is of another experiment, since in {place} {difference}: restore the classes, give "
            "this run another TAG, or start from the weights with MODEL.PRETRAINED"
        )


def _are_the_same_positions(names: Sequence[str], others: Sequence[str]) -> bool:
    """Returns whether one of two lists of classes has no names but positions, and the other does not contradict it."""
    if len(names) != len(others) or not (are_positions(names) or are_positions(others)):
        return False
    return (are_positions(names) and are_positions(others)) or not {*names} & {*others}


def _were_by_text(source: Source) -> bool:
    """Returns whether a source's classes are in another order than earlier versions, and other programs, had them."""
    return isinstance(source, FolderSource) and source.classes != sorted(source.classes)


def _unknown_order(classes: Sequence[str]) -> str:
    """Continues the path of weights whose classes may have been in another order."""
    return (
        f"does not name its classes: those in folders of these names were ordered by text ({_shown(sorted(classes))}) "
        f"and are ordered by number now ({_shown(classes)}): put a letter before each name, for the order by text"
    )


def _shown(names: Sequence[str]) -> str:
    """Returns the first names, printable and short."""
    first = ", ".join(shortened(repr(name), 60) for name in names[:EXAMPLES])
    return first + ", ..." * (len(names) > EXAMPLES)
