"""Files of checkpoints: read as data alone, written atomically.

Reading never runs code from a file: tensors and plain containers are all that is accepted. The published training
checkpoints also hold a pickled yacs configuration, which is read as a plain mapping.
"""

import json
import os
import re
import secrets
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# How a zipped checkpoint begins.
ZIP_START = b"PK\3\4"


def read_payload(path: Path) -> dict[str, Any]:
    """Reads the container in a `.pth` or `.safetensors` file, on the CPU.

    Returns:
        Its content; of a `.safetensors` file the weights (key `model`) and the metadata (key `meta`).

    Raises:
        ValueError: no such file, no checkpoint, a damaged one, or one that holds more than data.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: {'that is a folder' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("meta", "{}"))
                return {"model": {k: file.get_tensor(k) for k in file.keys()}, "meta": meta}  # noqa: SIM118
        _check_sums(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            warnings.simplefilter("ignore")  # the error below states the problem in one line
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise nearly any type for a damaged file
        raise ValueError(f"{path} is damaged or no checkpoint that can be read safely: {_reason(error)}") from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path} holds no weights but a {type(payload).__name__}")
    return payload


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if re.search("unsupported (global|class)", text, re.IGNORECASE):
        return "it holds Python objects, and loading those could run code"
    if not text or "weights_only" in text:  # there torch advises to trust the file
        return "its content is not that of a checkpoint"
    return text.split("\n")[0]


def _check_sums(path: Path) -> None:
    """Raises ValueError where a zipped checkpoint contradicts its check sums, which `torch.load` does not verify."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the check sum of {damaged} is wrong")
    else:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                raise ValueError("its end is missing")


def write_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Writes a container of plain tensors and plain values; readers see the old file or the complete new one.

    A `.safetensors` file holds the weights (key `model`) and the metadata (key `meta`) only.

    Raises:
        OSError: the disk is full or the folder can't be written; an older file of that name is intact.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_safetensors(path, payload["model"], {"meta": json.dumps(payload.get("meta", {}))})
    else:
        write_atomically(path, lambda file: torch.save(dict(payload), file))


def write_weights(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Writes weights alone: names and tensors without a container, as the published `convert.py` does.

    Raises:
        OSError: the disk is full or the folder can't be written; an older file of that name is intact.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _write_safetensors(path, weights)
    else:
        write_atomically(path, lambda file: torch.save(dict(weights), file))


def _write_safetensors(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save

    content = save({k: v.contiguous() for k, v in weights.items()}, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))


def link_checkpoint(existing: Path, path: Path) -> None:
    """Gives a checkpoint a second name; a file of that name is replaced at once.

    Raises:
        OSError: the file system has no hard links, or is full.
    """
    temporary = _temporary(path)
    os.link(existing, temporary)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a temporary file beside `path`, syncs it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            try:
                write(file)
            except RuntimeError as error:  # torch.save raises it where the disk is full
                raise OSError(f"{path} could not be written, is the disk full? {error}") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
