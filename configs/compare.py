"""What has changed between the configuration in a checkpoint and that of the run which resumes from it."""

from collections.abc import Iterator
from typing import Any

from yacs.config import CfgNode

from .files import parse_yaml
from .schema import DEFAULTS, KINDS, flatten, read_setting

# Keys that say where a run is or how it was started, and nothing about what it computes.
ABOUT_THE_START = {"OUTPUT", "TAG", "MODEL.RESUME", "EVAL_MODE", "THROUGHPUT_MODE"}


def changed_settings(recorded: str, cfg: CfgNode) -> list[str]:
    """Returns `KEY before -> after` for each key in which a configuration differs from one that was dumped as text.

    A key that the text does not have counts with its default.

    Raises:
        ValueError: the text is no configuration.
    """
    place = "the configuration in the checkpoint"
    known = [leaf for leaf in _leaves(parse_yaml(recorded.encode(), place)) if leaf[0] in KINDS]
    before = DEFAULTS | {key: read_setting(key, value, place).value for key, value in known}
    after = flatten(cfg)
    changed = (key for key in KINDS if key not in ABOUT_THE_START and before[key] != after[key])
    return [f"{key} {before[key]!r} -> {after[key]!r}" for key in changed]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
