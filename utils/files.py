"""Writing files atomically, and never over an input."""

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def user_path(path: str | Path) -> Path:
    """Returns a path with `~` or `~user` at its beginning replaced by that home folder.

    Raises:
        ValueError: there is no such user, or a NUL character in the path.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} has a NUL character in it, which no path can have")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user; write ./~... for a name that begins with ~") from None


def cache_folder() -> Path:
    """Returns the folder for what can be made anew; it need not exist. ValueError where the user has no home folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else user_path("~/.cache")) / "repmlpnet"


def check_target(target: Path, inputs: Iterable[str | Path]) -> None:
    """Checks before any work that a file can be written and is not an input.

    Args:
        target: the file to write; an older file of that name may be replaced.
        inputs: files and folders that are read; paths that do not exist, such as the word `digits`, are ignored.

    Raises:
        ValueError: the target is not a file, can't be written, is one of the inputs, also by a link, or lies in one.
    """
    if target.is_dir() or not target.name:
        raise ValueError(f"{target} is a folder: give the name of a file to write")
    if target.exists() and not target.is_file():  # replacing a device or a pipe would remove it
        raise ValueError(f"{target} is no regular file: give another name to write to")
    folders = [folder for folder in Path(os.path.realpath(target)).parents if folder.exists()]
    if not folders[0].is_dir() or not os.access(folders[0], os.W_OK | os.X_OK):
        raise ValueError(f"{target} can't be written, {folders[0]} takes no files: give another name to write to")
    for source in map(user_path, inputs):
        if source.is_file() and target.exists() and target.samefile(source):
            raise ValueError(f"{target} is read, and would be replaced: give another name to write to")
        if source.is_dir() and any(folder.samefile(source) for folder in folders):
            raise ValueError(f"{target} lies in {source}, which is read: give a name elsewhere to write to")


def write_json(path: Path, figures: object) -> None:
    """Writes figures as JSON, atomically.

    Raises:
        OSError: the disk is full or the folder can't be written; an older file of that name is intact.
    """
    write_text(path, strict_json(figures, indent=1) + "\n")


def strict_json(value: object, indent: int | None = None) -> str:
    """Returns plain values as JSON, with null in place of non-finite numbers, which JSON does not have."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically: a reader sees, also after a crash, the old file or the complete new one.

    Raises:
        OSError: the disk is full or the folder can't be written; an older file of that name is intact.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with clear_about_space(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def clear_about_space(path: Path, remedy: str = "make room and start again") -> Iterator[None]:
    """Adds the path and the remedy to an error of the system that says only that there is no space left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"{error.filename or path} can't be written to: {error.strerror}; {remedy}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
