"""What runs within the process of the tests leaves nothing behind in it."""

import logging
import os
import random
import signal
import warnings
from pathlib import Path

import in_process
import torch

from utils.log import NAME, create_logger


def state() -> list[object]:
    return [
        Path.cwd(),
        dict(os.environ),
        [signal.getsignal(number) for number in in_process.SIGNALS],
        [get() for get, _ in in_process.FLAGS],
        list(logging.getLogger(NAME).handlers),
        list(warnings.filters),
        random.getstate(),
        torch.random.get_rng_state().tolist(),
    ]


def test_everything_is_as_it_was(tmp_path):
    before = state()
    with in_process.contained():
        os.chdir(tmp_path)
        os.environ["RANK"] = "3"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(torch.get_num_threads() + 1)
        create_logger(tmp_path)
        warnings.simplefilter("ignore")
        random.random()
        torch.rand(1)
        changed = state()
    after = state()
    assert all(first != second for first, second in zip(before, changed, strict=True))
    assert after == before


def test_a_script_runs_in_a_clean_environment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # which would need a launcher
    assert in_process.status_of("test.py", "digits", "train", "absent.pth", folder=tmp_path) == 2
    assert capsys.readouterr().err == "error: no checkpoint at absent.pth: no such file\n"
