"""Differences between the configuration in a checkpoint and that of the run that resumes from it."""

from collections.abc import Iterator
from typing import Any

from yacs.config import CfgNode

from .files import parse_yaml
from .schema import DEFAULTS, FIELD_TYPES, flatten, read_setting

# Keys that do not affect what a run computes.
IGNORED = {"OUTPUT", "TAG", "MODEL.RESUME", "EVAL_MODE", "THROUGHPUT_MODE", "SUMMARY_MODE", "PROFILE_MODE"}


def changed_settings(recorded: str, cfg: CfgNode) -> list[str]:
    """Returns `KEY before -> after` for each key in which a configuration differs from a dumped one.

    Keys that the dump lacks count with their defaults; those that no longer exist are ignored.

    Raises:
        ValueError: the dump is not a valid configuration.
    """
    place = "the configuration in the checkpoint"
    known = [leaf for leaf in _leaves(parse_yaml(recorded.encode(), place)) if leaf[0] in FIELD_TYPES]
    before = DEFAULTS | {key: read_setting(key, value, place).value for key, value in known}
    after = flatten(cfg)
    changed = (key for key in FIELD_TYPES if key not in IGNORED and before[key] != after[key])
    return [f"{key} {before[key]!r} -> {after[key]!r}" for key in changed]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
