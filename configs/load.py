"""Loading: files and flags become one frozen configuration, which nothing changes afterwards."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from utils.files import user_path
from utils.text import shortened

from . import constraints
from .defaults import defaults
from .files import read_yaml
from .schema import DEFAULTS, FIELD_TYPES, SECTIONS, Setting, flatten, read_setting

__all__ = ["Override", "flatten", "load_config", "parse_opts"]

MAX_DEPTH = 20  # of nested BASE

Settings = dict[str, Setting]


class Override(NamedTuple):
    """A value from the command line: the flag it came with (`--batch-size`, `--opts`), the dotted key, the value."""

    source: str
    key: str
    value: object


def parse_opts(opts: Sequence[str]) -> list[Override]:
    """Pairs up the words after `--opts`; raises ValueError where the last key has no value."""
    if len(opts) % 2:
        raise ValueError(f"--opts: {opts[-1]!r} is left over; expects pairs KEY VALUE, separated by a space")
    return [Override("--opts", key, value) for key, value in zip(opts[::2], opts[1::2], strict=True)]


class Loaded(NamedTuple):
    """A frozen configuration, and the keys that a file or the command line gives a value."""

    config: CfgNode
    given: frozenset[str]


def load_config(cfg_file: str | Path | None = None, overrides: Sequence[Override] = ()) -> CfgNode:
    """Returns the configuration of `load`, with the same arguments and errors."""
    return load(cfg_file, overrides).config


def load(cfg_file: str | Path | None = None, overrides: Sequence[Override] = ()) -> Loaded:
    """Loads a configuration; in rising precedence: the defaults, the files of BASE, `cfg_file`, the overrides.

    Raises:
        FileNotFoundError: a file is missing; the message names the source of its path.
        ValueError: a file is not valid YAML or includes itself, a key is unknown, a value is of another type or not
            allowed, two overrides disagree, or keys contradict each other; with key, value, source and remedy.
    """
    given: Settings = {}
    if cfg_file is not None:
        given |= _Files().read(user_path(cfg_file))
    given |= _read_overrides(overrides)
    settings = {key: Setting(DEFAULTS[key], "default") for key in FIELD_TYPES} | given
    constraints.check(settings)
    return Loaded(_build(settings), frozenset(given))


class _Files:
    """The files of one configuration; each is read once, however often BASE names it."""

    def __init__(self) -> None:
        self._known: dict[str, Settings] = {}

    def read(self, path: Path, including: tuple[Path, ...] = ()) -> Settings:
        """Reads a file over those of its BASE; `including` is the chain of files that led here."""
        place = os.path.realpath(path)
        if place in map(os.path.realpath, including):
            raise ValueError(f"{path}: BASE is circular: {' -> '.join(map(str, (*including, path)))}; remove one")
        if len(including) > MAX_DEPTH:
            raise ValueError(f"{path}: BASE is nested {len(including)} files deep; {MAX_DEPTH} are allowed")
        if place not in self._known:
            tree = read_yaml(path, f"BASE of {including[-1]}" if including else "--cfg")
            settings: Settings = {}
            for name in _bases(tree.pop("BASE", []), path):
                settings |= self.read(path.parent / user_path(name), (*including, path))
            self._known[place] = settings | _read_tree(tree, str(path))
        return self._known[place]


def _bases(value: object, path: Path) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"BASE = {shortened(repr(value))} ({path}): expects a list of YAML files")
    return [name for name in names if name]  # the default [''] means none


def _read_tree(tree: Mapping[Any, Any], source: str) -> Settings:
    settings: Settings = {}
    for key, value in _leaves(tree):
        if key in settings:  # once nested and once dotted
            raise ValueError(f"{key} ({source}): is given twice, keep one")
        settings[key] = read_setting(key, value, source)
    return settings


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Descends into known sections only, so that an error names the key where it occurs."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _read_overrides(overrides: Sequence[Override]) -> Settings:
    settings: Settings = {}
    for source, key, value in overrides:
        new = read_setting(key, value, source)
        old = settings.setdefault(key, new)
        if old.value != new.value:
            both = [f"{shortened(repr(setting.value))} ({setting.source})" for setting in (old, new)]
            raise ValueError(f"{key} is given two values, {' and '.join(both)}; keep one")
    return settings


def _build(settings: Mapping[str, Setting]) -> CfgNode:
    cfg = defaults()
    for key, setting in settings.items():
        *sections, name = key.split(".")
        reduce(getitem, sections, cfg)[name] = setting.value
    cfg.freeze()
    return cfg
