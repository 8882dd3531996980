"""What a run writes for people and for programs: log files, metrics.jsonl, TensorBoard events."""

import json
import logging
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
        file = logging.FileHandler(folder / f"log_rank{rank}.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    return logger


class MetricsWriter:
    """Appends records to `metrics.jsonl` and to TensorBoard; a no-op everywhere but on rank 0.

    `metrics.jsonl` holds what a run computed and nothing that a clock says, so that equal runs write equal files.

    Args:
        folder: where both go; None writes nothing.
        start: the first update that is still to come. A run that resumes drops what an earlier one recorded from there
            on, because it will record that again.
    """

    def __init__(self, folder: Path | None, start: int = 0) -> None:
        self._file = None
        self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "metrics.jsonl"
            kept = [line for line in _lines(path) if json.loads(line)["update"] <= start]
            path.write_text("".join(kept))
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, kind: str, update: int, values: dict[str, Any], clock: dict[str, float] | None = None) -> None:
        """Records values under `kind` ("train", "eval", ...); those in `clock` go to TensorBoard alone."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")
        for name, value in {**values, **(clock or {})}.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, update)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _lines(path: Path) -> list[str]:
    """Returns the whole lines of a file; a last one that was cut off in writing is left out."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
