"""What a run writes for people and for programs: log files, metrics.jsonl, TensorBoard events."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from termcolor import colored

COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}


class _ConsoleFormatter(logging.Formatter):
    """Time in green and warnings in yellow on a terminal, plain elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno in COLORS:
            text = colored(f"{record.levelname.lower()}: {text}", COLORS[record.levelno])
        return f"{colored(self.formatTime(record, '%H:%M:%S'), 'green')} {text}"


class _FileHandler(logging.FileHandler):
    """A full disk costs lines of the log, but no messages about each of them on the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def create_logger(folder: Path | None = None, rank: int = 0) -> logging.Logger:
    """Returns the project's logger: `log_rank<r>.txt` in `folder`, and the console, where other ranks only warn."""
    logger = logging.getLogger("repmlpnet")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_ConsoleFormatter())
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.addHandler(console)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(folder / f"log_rank{rank}.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    return logger


def log_failure(logger: logging.Logger, error: Exception) -> None:
    """Writes what ends a run to the log file alone; the console gets it from whoever ends the process.

    A mistake of the user or the system's refusal is one line, everything else comes with its traceback.
    """
    trace = None if isinstance(error, ValueError | OSError) else (type(error), error, error.__traceback__)
    text = f"stopped: {' '.join(str(error).split())}"
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), trace)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def strict_json(value: Any) -> str:
    """Returns plain values as JSON, which knows no numbers that are not finite: null stands for them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Appends records to `metrics.jsonl` and to TensorBoard; a no-op everywhere but on rank 0.

    `metrics.jsonl` holds what a run computed and nothing that a clock says, so that equal runs write equal files.

    Args:
        folder: where both go; None writes nothing.
        start: the updates done so far. A run that resumes drops what an earlier one recorded after that many, because
            it will record that again.
        epoch: the one to go on in; its mean and its evaluation are still to come, even where all updates are done.
    """

    def __init__(self, folder: Path | None, start: int = 0, epoch: int | None = None) -> None:
        self._file = None
        self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "metrics.jsonl"
            kept = [line for line in _lines(path) if not _is_ahead(json.loads(line), start, epoch)]
            temporary = folder / ".metrics.jsonl.tmp"
            temporary.write_text("".join(kept))
            os.replace(temporary, path)
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, kind: str, update: int, values: dict[str, Any], clock: dict[str, float] | None = None) -> None:
        """Records values under `kind` ("train", "eval", ...); those in `clock` go to TensorBoard alone."""
        if self._file is None or self._board is None:
            return
        self._file.write(strict_json({"kind": kind, "update": update, **values}) + "\n")
        for name, value in {**values, **(clock or {})}.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, update)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _lines(path: Path) -> list[str]:
    """Returns the whole lines of a file; a last one that was cut off in writing is left out."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _is_ahead(record: dict[str, Any], start: int, epoch: int | None) -> bool:
    """Returns whether a record is of what a run that goes on after `start` updates, in `epoch`, will do again."""
    ends_epoch = record["kind"] != "train"
    ahead = ends_epoch and epoch is not None and record.get("epoch", -1) >= epoch
    return ahead or record["update"] > start
