"""The schema as a flat table: which keys exist, the type of each, and the conversion of a value to it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from yacs.config import CfgNode

from utils.cli import did_you_mean
from utils.text import shortened

from .defaults import RETIRED, SPECIAL, defaults
from .field_types import FieldType, field_type_of
from .words import meant_by


class Setting(NamedTuple):
    """A value of a key and its source: a file, a flag, or the defaults."""

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
FIELD_TYPES: dict[str, FieldType] = {
    key: SPECIAL.get(key) or field_type_of(default) for key, default in DEFAULTS.items() if key != "BASE"
}
# TRAIN, TRAIN.OPTIMIZER, ...
SECTIONS = frozenset(key[:at] for key in FIELD_TYPES for at, letter in enumerate(key) if letter == ".")


def read_setting(key: str, value: object, source: str) -> Setting:
    """Converts a value to the type of its key.

    Raises:
        ValueError: no such key, a section, a retired key, or a value of another type; with key, source and remedy.
    """
    if key not in FIELD_TYPES:
        raise ValueError(f"{shortened(key)} ({source}): {_why_unknown(key)}")
    field_type = FIELD_TYPES[key]
    try:
        return Setting(field_type.read(value), source)
    except ValueError:
        raise ValueError(
            f"{key} = {shortened(repr(value))} ({source}): expects {field_type.name}{_about_null(value)}"
        ) from None


def _why_unknown(key: str) -> str:
    if key in RETIRED:
        return f"no longer a key; {RETIRED[key]}"
    if key == "BASE":
        return "only a YAML file can include others; give the file itself with --cfg"
    if key in SECTIONS:
        example = next(known for known in FIELD_TYPES if known.startswith(f"{key}."))
        return f"a section and not a key; set its keys, such as {example}"
    for known in FIELD_TYPES:
        if key.startswith(f"{known}."):
            return f"{known} is a key and not a section; set {known} itself"
    meant = meant_by(key)
    if meant:
        return f"unknown key; did you mean {meant}?" if meant in FIELD_TYPES else f"unknown key; {meant}"
    return f"unknown key{did_you_mean(key, [*FIELD_TYPES, *SECTIONS]) or '; configs/defaults.py lists all'}"


def _about_null(value: object) -> str:
    return "; leave the key out for its default" if value is None or value in ("None", "null", "") else ""
