"""Reading a YAML file: safe, strict about repeated keys, and leaving it to the schema what a plain word means.

Files come from anybody: what is read is bounded in bytes and in values, and holds nothing but text, lists and mappings.
"""

from pathlib import Path
from typing import Any

import yaml

from utils.cli import did_you_mean

MAX_BYTES = 2**20  # of a file
MAX_VALUES = 10_000  # of a file, an alias counted as all that it stands for

_PLAIN_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that keeps every plain scalar but null as text, and that refuses a key given twice.

    YAML 1.1 reads `AMP: off` and `CACHE_MODE: no` as false, `TAG: 0123` as 83 and `1e-3` as text. The schema knows
    what each key holds, so the words go there as they were written; the tags of other types are refused.
    """

    # Class attributes are how PyYAML is told.
    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}  # noqa: RUF012

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._values = 0
        self._values_below: dict[int, int] = {}  # by the identity of a node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes what comes next; raises MarkedYAMLError for too many values, which aliases of aliases soon are."""
        before, mark = self._values, self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._values_below:
            raise yaml.MarkedYAMLError(problem="holds itself", problem_mark=mark)
        self._values += self._values_below[id(node)] if is_alias else 1
        if self._values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"holds more than {MAX_VALUES} values", problem_mark=mark)
        self._values_below[id(node)] = self._values - before
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Composes a mapping; raises MarkedYAMLError at a key that came before."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor refuses a list or a mapping as a key
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice, keep one", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: Path, origin: str) -> dict[Any, Any]:
    """Returns the mapping that a YAML file holds, with its scalars as text (or None).

    Args:
        path: the file.
        origin: who asked for it, for the error messages: `--cfg`, or the file that names it in BASE.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, too large, no YAML, has a key twice, holds anything but text, lists and
            mappings, or no mapping.
    """
    tree = parse_yaml(_content(path, origin), str(path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} ({origin}): holds {'nothing' if tree is None else 'no mapping'}; write KEY: VALUE lines"
        )
    return tree


def parse_yaml(content: bytes, place: str) -> Any:
    """Returns what YAML holds: text, None, lists and mappings of them; `place` says where it is from, for messages.

    Raises:
        ValueError: too long, no YAML, too many values, a key twice, or anything but these types.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{place}: is larger than {MAX_BYTES} bytes, which no configuration is")
    try:
        return yaml.load(content, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place}{line}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{place}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def _content(path: Path, origin: str) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} ({origin}): is a folder; give a YAML file")
    if not path.exists():
        close = did_you_mean(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"{path} ({origin}): no such file{close}")
    if not path.is_file():  # reading a pipe or a device may have no end
        raise ValueError(f"{path} ({origin}): is no regular file; give a YAML file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
