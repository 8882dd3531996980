"""Which keys exist and what each holds: the schema as a flat table, and the reading of one setting against it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from yacs.config import CfgNode

from utils.cli import did_you_mean
from utils.text import shortened

from .defaults import RETIRED, SPECIAL, defaults
from .values import Kind, kind_of
from .words import meant_by


class Setting(NamedTuple):
    """A value of a key, and where it comes from: a file, a flag, or the defaults."""

    value: Any
    source: str


def flatten(cfg: CfgNode) -> dict[str, object]:
    """Returns the values of a configuration by dotted key, `TRAIN.OPTIMIZER.NAME`, in the order of the schema."""
    return dict(_leaves(cfg))


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DEFAULTS = flatten(defaults())
KINDS: dict[str, Kind] = {
    key: SPECIAL.get(key) or kind_of(default) for key, default in DEFAULTS.items() if key != "BASE"
}
# What stands before a dot of some key: TRAIN, TRAIN.OPTIMIZER, ...
SECTIONS = frozenset(key[:at] for key in KINDS for at, letter in enumerate(key) if letter == ".")


def read_setting(key: str, value: object, source: str) -> Setting:
    """Converts a value to what its key holds.

    Raises:
        ValueError: no such key, a section, a retired key, or a value of another kind; with key, source and remedy.
    """
    if key not in KINDS:
        raise ValueError(f"{shortened(key)} ({source}): {_why_no_key(key)}")
    kind = KINDS[key]
    try:
        return Setting(kind.read(value), source)
    except ValueError:
        raise ValueError(
            f"{key} = {shortened(repr(value))} ({source}): expects {kind.name}{_about_null(value)}"
        ) from None


def _why_no_key(key: str) -> str:
    if key in RETIRED:
        return f"no longer a key; {RETIRED[key]}"
    if key == "BASE":
        return "only a YAML file can include others; give the file itself with --cfg"
    if key in SECTIONS:
        example = next(known for known in KINDS if known.startswith(f"{key}."))
        return f"a section and not a key; set the keys below it, such as {example}"
    for known in KINDS:
        if key.startswith(f"{known}."):
            return f"{known} holds a value, there are no keys below it; set {known} itself"
    meant = meant_by(key)
    if meant:
        return f"unknown key; did you mean {meant}?" if meant in KINDS else f"unknown key; {meant}"
    return f"unknown key{did_you_mean(key, [*KINDS, *SECTIONS]) or '; configs/defaults.py lists all'}"


def _about_null(value: object) -> str:
    return "; leave the key out for its default" if value is None or value in ("None", "null", "") else ""
