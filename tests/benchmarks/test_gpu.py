"""The one command for a GPU: its parts are commands that exist, trainings end after their minutes, rates are read."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from configs.command_line import parse

LOG = """22:33 Train: [0/100][10/512]  eta 0:00:10  lr 1e-05  loss 6.9  grad_norm 1.0  10.5 img/s  mem 90 MiB
22:34 Train: [0/100][20/512]  eta 0:00:10  lr 1e-05  loss 6.9  grad_norm 1.0  800.0 img/s  mem 90 MiB
22:35 Train: [0/100][30/512]  eta 0:00:10  lr 1e-05  loss 6.9  grad_norm 1.0  900.0 img/s  mem 90 MiB
22:36 Train: [0/100][40/512]  eta 0:00:10  lr 1e-05  loss 6.9  grad_norm 1.0  850.0 img/s  mem 90 MiB
"""


def test_every_part_is_a_command_that_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    parts = gpu.parts(gpu.parse(["--output", str(tmp_path)]), tmp_path)
    trainings = {name: part for name, part in parts.items() if part.words[0] == "main_repmlp.py"}
    assert len(trainings) == 2 * len(gpu.TRAININGS)
    for name, part in trainings.items():
        assert parse(part.words[1:]).config.MODEL.ARCH in name
        assert part.minutes == 2.0
    for name, part in parts.items():
        if part.words[1].startswith("benchmarks."):
            script = part.words[1].removeprefix("benchmarks.")
            module = __import__(f"benchmarks.{script}", fromlist=["main"])
            reader = module.parser().parse_args if script == "table2" else module.parse
            assert reader(part.words[2:]).json == tmp_path / f"{name}.json"


def test_the_rate_is_the_median_without_the_first_report(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    assert gpu.images_per_second(log) == 850.0
    log.write_text(LOG.splitlines()[0])
    assert gpu.images_per_second(log) is None


def test_a_training_ends_after_its_minutes(tmp_path: Path) -> None:
    words, start = ("-c", "import time; print('started', flush=True); time.sleep(60)"), time.perf_counter()
    assert gpu.run(gpu.Part(words, minutes=0.05), tmp_path / "log") == 0
    assert time.perf_counter() - start < 30
    assert (tmp_path / "log").read_text() == "started\n"


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    result = "import json, pathlib; pathlib.Path('{}').write_text(json.dumps([1]))"
    found = {"bad": gpu.Part(("-c", "1 / 0")), "good": gpu.Part(("-c", result.format(tmp_path / "good.json")))}
    monkeypatch.setattr(gpu, "parts", lambda args, photos: found)
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["name"], row["status"], row["result"]) for row in rows] == [("bad", 1, None), ("good", 0, [1])]
    assert "ZeroDivisionError" in Path(rows[0]["log"]).read_text()
    assert "bad" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finds no GPU"):
        gpu.main(["--output", str(tmp_path)])
