"""Scripts within the process of the tests, which is afterwards as it was before."""

import logging
import os
import runpy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from processes import clean_environment

from utils import cli
from utils.log import NAME
from utils.seed import keyed_rng

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
FLAGS: tuple[tuple[Callable, Callable], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    *(
        (partial(getattr, backend, name), partial(setattr, backend, name))
        for backend, name in (
            (torch.backends.cudnn, "benchmark"),
            (torch.backends.cudnn, "allow_tf32"),
            (torch.backends.cuda.matmul, "allow_tf32"),
        )
    ),
)


def status_of(script: str, *words: object, folder: Path) -> int:
    """Runs a script of the project in a folder, as `clean_environment` has it; returns its exit status."""
    main = main_of(script)
    with contained():
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(clean_environment())
        torch.set_num_threads(1)
        return cli.status_of(partial(main, list(map(str, words))))


def main_of(script: str) -> Callable[[Sequence[str] | None], int | None]:
    """The `main` of a script, given by its path below the root."""
    return module_of(script)["main"]


@cache
def module_of(script: str) -> dict[str, Any]:
    """What a script defines, given by its path below the root."""
    return runpy.run_path(str(ROOT / script), run_name=script.removesuffix(".py").replace("/", "."))


@contextmanager
def contained() -> Iterator[None]:
    """Restores what a script may change in its process: all that is not a file."""
    with ExitStack() as stack:
        stack.callback(os.chdir, Path.cwd())
        stack.callback(_set_environment, dict(os.environ))
        stack.callback(setattr, threading, "excepthook", threading.excepthook)
        for number in SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        for get, put in FLAGS:
            stack.callback(put, get())
        stack.callback(_set_handlers, logging.getLogger(NAME), list(logging.getLogger(NAME).handlers))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(keyed_rng(0))
        yield


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _set_handlers(logger: logging.Logger, handlers: list[logging.Handler]) -> None:
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:] = handlers
