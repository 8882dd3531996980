"""Reading YAML files: safely, without repeated keys, and with scalars as text, which the schema converts.

Files are not trusted: they are bounded in bytes and in values, and hold nothing but text, lists and mappings.
"""

from pathlib import Path
from typing import Any

import yaml

from utils.cli import did_you_mean
from utils.text import shortened

MAX_BYTES = 2**20  # of a file
MAX_VALUES = 10_000  # of a file; an alias counts as the values that it stands for

_PLAIN_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that keeps all plain scalars but null as text, and refuses repeated keys.

    YAML 1.1 reads `AMP: off` and `CACHE_MODE: no` as false, `TAG: 0123` as 83 and `1e-3` as text. The schema knows the
    type of each key, so scalars are passed on as written; the tags of other types are refused.
    """

    # PyYAML is configured by class attributes.
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
        """Composes a node; raises MarkedYAMLError for too many values, as aliases of aliases make them."""
        before, mark = self._values, self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._values_below:
            raise yaml.MarkedYAMLError(problem="contains itself", problem_mark=mark)
        self._values += self._values_below[id(node)] if is_alias else 1
        if self._values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"contains more than {MAX_VALUES} values", problem_mark=mark)
        self._values_below[id(node)] = self._values - before
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Composes a mapping; raises MarkedYAMLError for a repeated key."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor refuses other keys
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice, keep one", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: Path, origin: str) -> dict[Any, Any]:
    """Returns the mapping in a YAML file, with its scalars as text (or None).

    Args:
        path: the file.
        origin: the source of the path, for error messages: `--cfg`, or the file that names it in BASE.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a regular file, too large, not valid YAML, a repeated key, anything but text, lists and
            mappings, or no mapping.
    """
    tree = parse_yaml(_content(path, origin), str(path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} ({origin}): {'is empty' if tree is None else 'is not a mapping'}; write KEY: VALUE lines"
        )
    return tree


def parse_yaml(content: bytes, place: str) -> Any:
    """Parses YAML into text, None, lists and mappings; `place` names its origin in error messages.

    Raises:
        ValueError: too large, not valid YAML, too many values, a repeated key, or anything but these types.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{place}: is larger than {MAX_BYTES} bytes")
    try:
        return yaml.load(content, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = shortened(", ".join(filter(None, (error.context, error.problem))))  # it may quote the file
        raise ValueError(f"{place}{line}: {problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{place}: cannot be read as YAML: {' '.join(str(error).split())}") from None


def _content(path: Path, origin: str) -> bytes:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{path} ({origin}): {error.strerror}") from None
    if is_folder:
        raise ValueError(f"{path} ({origin}): is a folder; give a YAML file")
    if not exists:
        close = did_you_mean(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"{path} ({origin}): no such file{close}")
    if not path.is_file():  # reading a pipe or a device may never end
        raise ValueError(f"{path} ({origin}): is not a regular file; give a YAML file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
