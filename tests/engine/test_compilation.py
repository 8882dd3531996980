"""COMPILE: what auto comes to, and a compiler that fails in one process, which leaves nothing behind in any."""

import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from distributed_ranks import in_ranks
from settings import settings
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from training_parts import ALONE

from engine.compilation import GAINS, compile_for_training, kind_of
from engine.precision import PRECISIONS
from utils.distributed import RankInfo

SHAPE = (4, 3, 2, 2)
CPU = torch.device("cpu")


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that has shown a gain on CPUs."""
    monkeypatch.setitem(GAINS, ("cpu", "off"), True)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code is left from other tests, nor for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@contextmanager
def no_compiler() -> Iterator[None]:
    """Without a C++ compiler, and without anything that one has made before."""
    with fresh_cache(), inductor.patch({"cpp.cxx": ("/nonexistent",)}):
        yield


def network() -> nn.Module:
    """With weights, running statistics and random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))


def compiled(model: nn.Module, opts: str, process: RankInfo = ALONE, amp: str = "off") -> nn.Module:
    return compile_for_training(model, settings(opts), process, amp, SHAPE, logging.getLogger("tests.engine"))


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a trial could change."""
    states = {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist()}
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"torch": torch.get_rng_state(), **states, **gradients, **deepcopy(model.state_dict())}


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def test_auto_compiles_only_where_a_gain_is_known(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level(logging.INFO):
        assert compiled(model, "COMPILE auto") is model
        assert compiled(model, "COMPILE auto", amp="fp16") is model
        assert compiled(model, "COMPILE false") is model
    assert caplog.messages == [
        "COMPILE auto: not compiled, it was no faster on cpu with AMP off",
        "COMPILE auto: not compiled, it has not been measured on cpu with AMP fp16",
    ]


def test_the_table_of_gains_names_devices_and_precisions() -> None:
    for kind, precision in GAINS:
        assert re.fullmatch(r"cpu|cuda \d+\.\d", kind)
        assert precision in PRECISIONS
    assert kind_of(CPU) == "cpu"


def test_auto_needs_a_trial_that_can_not_hang(gaining: None, caplog: pytest.LogCaptureFixture) -> None:
    """With SYNC_BN, a forward pass in which one process fails leaves the others waiting."""
    model = network()
    with caplog.at_level(logging.INFO):
        assert compiled(model, "COMPILE auto TRAIN.SYNC_BN True", RankInfo(0, 2, 0, CPU)) is model
    assert caplog.messages == ["COMPILE auto: not compiled, TRAIN.SYNC_BN leaves no way to try the compiler first"]


def test_what_does_not_compile_together_is_refused() -> None:
    with pytest.raises(ValueError, match="COMPILE does not work with both TRAIN.SYNC_BN and TRAIN.USE_CHECKPOINT"):
        compiled(network(), "COMPILE true TRAIN.SYNC_BN True TRAIN.USE_CHECKPOINT True", RankInfo(0, 2, 0, CPU))


def test_a_compiler_that_fails_is_left_out(gaining: None, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    before = everything(model)
    with caplog.at_level(logging.WARNING), no_compiler():
        assert compiled(model, "COMPILE auto") is model
    assert_untouched(before, everything(model))
    assert [m for m in caplog.messages if m.startswith("COMPILE auto: not compiled, the compiler failed (rank 0: ")]
    assert "\n" not in caplog.text.rstrip("\n")


def test_a_compiler_that_must_work_and_fails_is_an_error() -> None:
    said = r"COMPILE true: the compiler failed \(rank 0: .*\); mend the compiler, or set COMPILE false"
    with pytest.raises(ValueError, match=said), no_compiler():
        compiled(network(), "COMPILE true")


def test_a_trial_that_succeeds_leaves_nothing_either(gaining: None) -> None:
    model = network()
    before = everything(model)
    result = compiled(model, "COMPILE auto")
    assert isinstance(result, OptimizedModule)
    assert_untouched(before, everything(model))
    torch.manual_seed(1)
    expected = model(torch.ones(SHAPE))
    torch.manual_seed(1)
    assert result(torch.ones(SHAPE)).shape == expected.shape


def in_process(process: RankInfo) -> tuple[bool, str]:
    """Compiles in a process; only the second one has no compiler. Returns whether auto was eager, and the error."""
    GAINS["cpu", "off"] = True
    model = network()
    before = everything(model)
    with no_compiler() if process.rank else nullcontext():
        eager = compiled(model, "COMPILE auto", process) is model
        assert_untouched(before, everything(model))
        with pytest.raises(ValueError, match="the compiler failed") as error:
            compiled(model, "COMPILE true", process)
    assert_untouched(before, everything(model))
    return eager, str(error.value)


def test_all_processes_decide_alike() -> None:
    for eager, error in in_ranks(in_process, 2):
        assert eager
        assert error.startswith("COMPILE true: the compiler failed (rank 1: ")
