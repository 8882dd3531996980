"""Reading a YAML file: safe, strict about repeated keys, and leaving it to the schema what a plain word means."""

from pathlib import Path
from typing import Any

import yaml

from utils.cli import did_you_mean

_KEPT_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """A `SafeLoader` that keeps every plain scalar but null as text, and that refuses a key given twice.

    YAML 1.1 reads `AMP: off` and `CACHE_MODE: no` as false, `TAG: 0123` as 83 and `1e-3` as text. The schema knows
    what each key holds, so the words go there as they were written.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  a class attribute is how PyYAML is told
        letter: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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
        ValueError: it is a folder, is no YAML, has a key twice, asks for Python objects, or holds no mapping.
    """
    if path.is_dir():
        raise ValueError(f"{path} ({origin}): is a folder; give a YAML file")
    if not path.exists():
        close = did_you_mean(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"{path} ({origin}): no such file{close}")
    try:
        tree = yaml.load(path.read_bytes(), _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} ({origin}): holds {'nothing' if tree is None else 'no mapping'}; write KEY: VALUE lines"
        )
    return tree
