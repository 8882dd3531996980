"""What the log says of the machine: every figure beside the same one from the numbers of the test."""

import logging
import math
import re
import time

import pytest
import torch
from settings import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_parts import ALONE

from engine.run import Run
from engine.usage import Usage, Workload, precision_of_products, usage, workload_of
from tasks import TASKS
from utils.distributed import RankInfo
from utils.meters import Pace

LOGGER = logging.getLogger("tests.engine")
# One image of 6 x 6: 36 positions x 4 channels x 27 weights, and 144 x 4. Two operations each, three passes.
FLOPS = 6 * (36 * 4 * 27 + 144 * 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 4))


def run_of(opts: str = "", rank_info: RankInfo = ALONE) -> Run:
    cfg = settings(f"DATA.DATA_PATH digits DATA.DATASET digits DATA.IMG_SIZE 6 {opts}")
    return Run(TASKS["classification"](cfg, rank_info), frozenset(), [], lambda _: [])


def test_seconds_of_waiting_and_of_computing_are_told_apart(
    trainer_of, batch_of, caplog, monkeypatch, tmp_path, metrics
):
    """Two updates of two batches of 4 images: 0.75 s for each batch and 0.5 s for each forward pass, of 6 TFLOP."""
    now, model = [0.0], network()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def batches():
        for number in range(4):
            pass_time(0.75)
            yield batch_of(4, seed=number)

    model.register_forward_hook(lambda *_: pass_time(0.5))
    parts = {"accumulation": 2, "print_freq": 2, "workload": Workload(flops=6e12, peak=24.0), "metrics": metrics}
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        trainer_of(model, **parts).train_epoch(batches())
    line = caplog.records[0].getMessage()
    assert re.search(r"  3\.2 img/s  data 1\.500 s \(60 %\)  19\.2 TFLOP/s \(80\.0 % of the peak\)  mem \d+ MiB$", line)
    metrics.close()
    curves = EventAccumulator(str(tmp_path)).Reload()
    expected = {"images_per_second": 3.2, "data_seconds": 1.5, "data_share": 0.6, "tflops": 19.2, "peak_share": 0.8}
    values = {name: [event.value for event in curves.Scalars(f"train/{name}")] for name in expected}
    assert values == {name: [pytest.approx(value)] for name, value in expected.items()}


def test_the_time_of_a_real_loader(trainer_of, batch_of, caplog):
    def slow():
        for number in range(4):
            time.sleep(0.05)
            yield batch_of(4, seed=number)

    began = time.perf_counter()
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        trainer_of(network(), print_freq=4).train_epoch(slow())
    took = time.perf_counter() - began
    found = re.search(r"([\d.]+) img/s  data ([\d.]+) s \((\d+) %\)  mem", caplog.records[0].getMessage())
    rate, seconds, percent = map(float, found.groups())
    assert 0.05 <= seconds <= took / 4
    assert percent / 100 == pytest.approx(seconds * rate / 4, abs=0.02)


def test_a_process_has_its_share_of_the_images():
    pace = Pace()
    pace.start()
    time.sleep(0.01)
    pace.add(64)
    pace.stop()
    four = usage(pace, Workload(6e12, 24.0), RankInfo(1, 4, 1, torch.device("cpu")))
    assert four.tflops == pytest.approx(6.0 * pace.images_per_second / 4)
    assert four.peak_share == pytest.approx(four.tflops / 24)
    assert four.images_per_second == pace.images_per_second


def test_what_is_not_known_is_left_out():
    lines = {peak: str(usage(Pace(), Workload(flops, peak), ALONE)) for flops, peak in ((None, 1.0), (1e9, None))}
    assert re.fullmatch(r"nan img/s  data nan s \(nan %\)  mem \d+ MiB", lines[1.0])
    assert re.fullmatch(r"nan img/s  data nan s \(nan %\)  nan TFLOP/s  mem \d+ MiB", lines[None])
    assert usage(Pace(), Workload(), ALONE).as_dict().keys() == {
        "images_per_second",
        "data_seconds",
        "data_share",
        "memory",
    }


def test_the_line_of_a_gpu_has_what_is_reserved():
    line = str(Usage(2000.0, 0.01, 0.079, 33.4, 0.034, memory=9000.4, reserved=9800.0))
    assert line == "2000.0 img/s  data 0.010 s (8 %)  33.4 TFLOP/s (3.4 % of the peak)  mem 9000 MiB (9800 reserved)"


def test_a_waiting_that_is_reset_is_forgotten():
    pace = Pace()
    pace.wait(3.0)
    pace.reset()
    pace.start()
    time.sleep(0.01)
    pace.add(1)
    pace.stop()
    assert (pace.waiting_per_update, pace.waiting_share) == (0.0, 0.0)
    pace.reset()
    assert math.isnan(pace.waiting_per_update)
    assert math.isnan(pace.waiting_share)


def test_the_work_of_an_image_is_counted(caplog):
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        assert workload_of(run_of(), network(), LOGGER) == Workload(FLOPS, None)
        assert workload_of(run_of("PEAK_TFLOPS 0.5"), network(), LOGGER) == Workload(FLOPS, 0.5)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "0.00 GFLOP for an image of 6x6, forward and backward"
    assert second == f"{first}; peak of PEAK_TFLOPS: 0.5 TFLOP/s"


class Reader(nn.Module):
    """Reads a value, which no tensor on `meta` has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())


def test_work_that_can_not_be_counted_is_left_out(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Reader())
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        assert workload_of(run_of(), model, LOGGER) == Workload()
    line = caplog.records[0].getMessage()
    assert re.match(r"the work of RepMLPNet-B224 can't be counted, the log has no TFLOP/s: .*meta", line)


@pytest.mark.parametrize(
    ("name", "amp", "peak"),
    [
        ("NVIDIA H200", "auto", 989.4),
        ("NVIDIA H200", "off", 66.9),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", 8.1),
        ("NVIDIA Unheard-of", "bf16", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_in_the_precision_of_the_run(monkeypatch, name, amp, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    run = run_of(f"AMP {amp}", RankInfo(0, 1, 0, torch.device("cuda", 0)))
    assert workload_of(run, network(), LOGGER).peak == peak


def test_tf32_is_a_precision_of_its_own():
    assert precision_of_products(None) == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision_of_products(None) == "tf32"
        assert precision_of_products(torch.bfloat16) == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
