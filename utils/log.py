"""The records of a run: log files, metrics.jsonl, TensorBoard events."""

import json
import logging
import math
import sys
import threading
from pathlib import Path
from typing import Any

from termcolor import colored
from torch import Tensor
from tqdm import tqdm

from . import console
from .files import strict_json, write_text
from .text import printable

NAME = "repmlpnet"  # of the project's logger
COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}


class _ConsoleFormatter(logging.Formatter):
    """Time in green and warnings in yellow on a terminal, plain elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        if record.levelno in COLORS:
            text = colored(f"{record.levelname.lower()}: {text}", COLORS[record.levelno])
        return f"{colored(self.formatTime(record, '%H:%M:%S'), 'green')} {text}"


class _FileFormatter(logging.Formatter):
    """Time, level and message on one line, followed by the traceback, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class _ConsoleHandler(logging.StreamHandler):
    """Writes above a progress bar. If the console is closed, it is no longer used, and the log file gets a warning.

    The run continues: a closed pipe or a full disk behind stdout must not end a training.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except OSError as error:
            console.give_up(self.stream)
            self.setLevel(logging.CRITICAL + 1)
            logging.getLogger(NAME).warning(f"the console is gone ({error.strerror}), from here on see the log file")


class _FileHandler(logging.FileHandler):
    """Drops lines silently on a full disk, instead of printing an error for each on the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def create_logger(folder: Path | None = None, rank: int = 0) -> logging.Logger:
    """Returns the project's logger: `log_rank<r>.txt` in `folder`, and the console (only warnings on ranks > 0)."""
    logger = logging.getLogger(NAME)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    terminal = _ConsoleHandler(console.stdout_or_nowhere())
    terminal.setFormatter(_ConsoleFormatter())
    terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.addHandler(terminal)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(folder / f"log_rank{rank}.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    return logger


def log_failure(logger: logging.Logger, error: Exception) -> None:
    """Writes the error that ends a run to the log file only; `cli.run` prints it on the console.

    A user error or a refusal of the system is one line, any other error has its traceback.
    """
    trace = None if isinstance(error, ValueError | OSError) else (type(error), error, error.__traceback__)
    text = f"stopped: {' '.join(str(error).split())}"
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), trace)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class MetricsWriter:
    """Appends records to `metrics.jsonl` and to TensorBoard; does nothing without a folder, as on ranks above 0.

    `metrics.jsonl` holds computed values and no times, so that equal runs write equal files.

    Args:
        folder: where both go; None writes nothing.
        start: the updates done so far. Later records of an earlier run are dropped, because they will be repeated.
        epoch: the epoch to resume in; its records are dropped too, even if all its updates are done.
    """

    def __init__(self, folder: Path | None, start: int = 0, epoch: int | None = None) -> None:
        self._file = None
        self._board = None
        if folder is not None:
            path = folder / "metrics.jsonl"
            write_text(path, "".join(line for line, record in _records(path) if not _is_ahead(record, start, epoch)))
            self._file = path.open("a", buffering=1, encoding="utf-8")
            self._board = _Board(folder, start)

    def write(self, kind: str, update: int, values: dict[str, Any], clock: dict[str, float] | None = None) -> None:
        """Records values under `kind` ("train", "eval", ...); values in `clock` go to TensorBoard only."""
        if self._file is None or self._board is None:
            return
        self._file.write(strict_json({"kind": kind, "update": update, **values}) + "\n")
        numbers = {name: value for name, value in {**values, **(clock or {})}.items() if isinstance(value, int | float)}
        self._board.add(kind, update, {name: value for name, value in numbers.items() if math.isfinite(value)})

    @property
    def is_open(self) -> bool:
        """Whether anything is written."""
        return self._file is not None

    def show(self, update: int, picture: Tensor, captions: str) -> None:
        """Shows a batch in TensorBoard: a picture, uint8 (3, H, W), and the captions of its images, in Markdown."""
        if self._board is not None:
            self._board.show(update, picture, captions)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


class _Board:
    """TensorBoard's events. If they can't be written, the run continues without them, after one warning."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._previous = threading.excepthook
        threading.excepthook = self._in_a_thread
        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def add(self, kind: str, update: int, numbers: dict[str, float]) -> None:
        """Records numbers; a no-op after the warning."""
        try:
            for name, value in numbers.items() if self._writer else ():
                self._writer.add_scalar(f"{kind}/{name}", value, update)
        except OSError as error:
            self._give_up(error)

    def show(self, update: int, picture: Tensor, captions: str) -> None:
        """Records a picture and its captions; a no-op after the warning."""
        try:
            if self._writer:
                self._writer.add_image("batch/images", picture, update)
                self._writer.add_text("batch/labels", captions, update)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            if self._writer:
                self._writer.close()
        except OSError as error:
            self._give_up(error)
        threading.excepthook = self._previous

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        logging.getLogger(NAME).warning(f"no more events for TensorBoard, the figures are in metrics.jsonl: {error}")

    def _in_a_thread(self, args: Any) -> None:
        # The writing thread raises its error again in the next call; its own traceback would be redundant.
        if not isinstance(args.exc_value, OSError):
            self._previous(args)


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines of a file with their records; damaged lines are dropped with a warning.

    A last line without a line break was cut off when a run was killed; it is dropped without a warning.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [(line, _record(line)) for line in lines]
    found = [(f"{line.decode()}\n", record) for line, record in records if record is not None]
    if len(found) < len(lines):
        damaged = f"{len(lines) - len(found)} of {len(lines)} lines of {path}"
        logging.getLogger(NAME).warning(f"{damaged} are damaged and left out")
    return found


def _record(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line, or None if there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    sound = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("update"), int)
    return record if sound and isinstance(record.get("epoch", 0), int) else None


def _is_ahead(record: dict[str, Any], start: int, epoch: int | None) -> bool:
    """Returns whether a run that resumes after `start` updates, in `epoch`, will write this record again."""
    ends_epoch = record["kind"] != "train"
    ahead = ends_epoch and epoch is not None and record.get("epoch", -1) >= epoch
    return ahead or record["update"] > start
