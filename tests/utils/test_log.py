"""What a run writes: the log of each process, records of numbers that no clock says, and the curves."""

import contextlib
import errno
import json
import logging
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.log import MetricsWriter, create_logger, log_failure


@pytest.fixture(autouse=True)
def _no_open_log_files():
    yield
    create_logger()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_the_log_goes_to_the_console_and_to_a_file(tmp_path, capsys):
    logger = create_logger(tmp_path / "run", rank=0)
    logger.info("accuracy 12.5")
    logger.warning("a flag is old")
    out, err = capsys.readouterr()
    assert [line.split(" ", 1)[1] for line in out.splitlines()] == ["accuracy 12.5", "warning: a flag is old"]
    assert err == ""
    lines = (tmp_path / "run" / "log_rank0.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO accuracy 12.5", "WARNING a flag is old"]


FORGED = "ant\n2026-01-01 00:00:00,000 INFO Best Acc@1 100.000\x1b[2J\udce9"
SHOWN = r"ant\n2026-01-01 00:00:00,000 INFO Best Acc@1 100.000\x1b[2J\udce9"


def test_a_name_forges_no_line_and_sends_no_escape_sequence(tmp_path, capsys):
    logger = create_logger(tmp_path)
    logger.info(FORGED)
    logger.warning(FORGED)
    log_failure(logger, ValueError(FORGED))
    out = capsys.readouterr().out
    assert [line.split(" ", 1)[1] for line in out.splitlines()] == [SHOWN, f"warning: {SHOWN}"]
    lines = (tmp_path / "log_rank0.txt").read_text(encoding="utf-8").splitlines()
    flat = f"stopped: {SHOWN.replace(chr(92) + 'n', ' ')}"  # an error is one line by its words
    assert [line.split(" ", 2)[2] for line in lines] == [f"INFO {SHOWN}", f"WARNING {SHOWN}", f"ERROR {flat}"]


def test_a_defect_has_its_traceback_in_the_log(tmp_path):
    logger = create_logger(tmp_path)
    try:
        raise KeyError("Ärger\udce9")
    except KeyError as error:
        log_failure(logger, error)
    first, *trace = (tmp_path / "log_rank0.txt").read_text(encoding="utf-8").splitlines()
    assert first.endswith(r"ERROR stopped: 'Ärger\udce9'")
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == r"KeyError: 'Ärger\udce9'"


def test_other_processes_have_their_own_file_and_only_warn_on_the_console(tmp_path, capsys):
    logger = create_logger(tmp_path, rank=3)
    logger.info("accuracy 12.5")
    logger.warning("a flag is old")
    out = capsys.readouterr().out
    assert "accuracy" not in out
    assert "a flag is old" in out
    assert "accuracy 12.5" in (tmp_path / "log_rank3.txt").read_text()
    assert not (tmp_path / "log_rank0.txt").exists()


def test_a_second_logger_replaces_the_first(tmp_path, capsys):
    create_logger(tmp_path / "first")
    create_logger(tmp_path / "second").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "first" / "log_rank0.txt").read_text() == ""


def test_a_file_grows_over_several_runs(tmp_path):
    create_logger(tmp_path).info("first run")
    create_logger(tmp_path).info("second run")
    assert len((tmp_path / "log_rank0.txt").read_text().splitlines()) == 2


def test_the_console_has_no_colours_where_it_is_no_terminal(capsys):
    create_logger().error("broken")
    assert "\x1b" not in capsys.readouterr().out


def test_the_root_logger_is_left_alone(tmp_path, caplog):
    create_logger(tmp_path).info("not for others")
    assert logging.getLogger("repmlpnet").propagate is False
    assert caplog.records == []


def test_records_have_no_clock_and_the_curves_have(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 10, {"loss": 0.5, "epoch": 0}, {"images_per_second": 100.0})
    writer.write("eval", 22, {"top1": 12.5})
    writer.close()
    assert records(tmp_path) == [
        {"kind": "train", "update": 10, "loss": 0.5, "epoch": 0},
        {"kind": "eval", "update": 22, "top1": 12.5},
    ]
    assert curves(tmp_path) == {
        "train/loss": [(10, 0.5)],
        "train/epoch": [(10, 0.0)],
        "train/images_per_second": [(10, 100.0)],
        "eval/top1": [(22, 12.5)],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_null_in_the_records_and_no_points_of_the_curves(tmp_path, value):
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    writer = MetricsWriter(tmp_path)
    writer.write("eval", 1, {"loss": value, "top1": 2.0, "iou": [1.0, value], "more": {"x": value}}, {"rate": value})
    writer.close()
    (record,) = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert record == {
        "kind": "eval",
        "update": 1,
        "loss": None,
        "top1": 2.0,
        "iou": [1.0, None],
        "more": {"x": None},
    }
    assert curves(tmp_path) == {"eval/top1": [(1, 2.0)]}


@pytest.mark.parametrize("kind", ["eval", "eval_ema", "train_epoch"])
@pytest.mark.parametrize(("epoch", "kept"), [(0, [10]), (1, [10, 20])])
def test_what_ends_an_epoch_is_dropped_where_the_epoch_is_still_to_end(tmp_path, kind, epoch, kept):
    """The run was saved after the last update of epoch 0, or after the epoch."""
    writer = MetricsWriter(tmp_path)
    writer.write("train", 10, {"epoch": 0})
    writer.write(kind, 20, {"epoch": 0})
    writer.close()
    MetricsWriter(tmp_path, start=20, epoch=epoch).close()
    assert [record["update"] for record in records(tmp_path)] == kept


def test_numbers_keep_all_their_digits(tmp_path):
    writer = MetricsWriter(tmp_path)
    value = 0.1 + 0.2
    writer.write("train", 1, {"loss": value})
    writer.close()
    assert records(tmp_path)[0]["loss"] == value


def test_records_are_on_the_disk_before_the_run_ends(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 10, {"loss": 0.5})
    assert len(records(tmp_path)) == 1
    writer.close()


def test_a_resumed_run_drops_what_it_will_record_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for update in (10, 20, 30):
        writer.write("train", update, {"loss": float(update)})
    writer.write("eval", 22, {"top1": 50.0})
    writer.close()
    writer = MetricsWriter(tmp_path, start=22)
    writer.write("train", 30, {"loss": 3.5})
    writer.close()
    assert [(r["kind"], r["update"]) for r in records(tmp_path)] == [
        ("train", 10),
        ("train", 20),
        ("eval", 22),
        ("train", 30),
    ]
    assert records(tmp_path)[-1]["loss"] == 3.5


def test_a_fresh_run_drops_everything(tmp_path):
    for loss in (1.0, 2.0):
        writer = MetricsWriter(tmp_path)
        writer.write("train", 10, {"loss": loss})
        writer.close()
    assert [record["loss"] for record in records(tmp_path)] == [2.0]


@pytest.mark.parametrize("rest", ['{"kind": "train", "upd', '{"kind": "train", "update": 20, "loss": 0.25}'])
def test_a_line_that_was_cut_off_in_writing_is_dropped(tmp_path, rest):
    whole = '{"kind": "train", "update": 10, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + rest)
    writer = MetricsWriter(tmp_path, start=20)
    writer.write("eval", 22, {"top1": 1.0})
    writer.close()
    assert [record["update"] for record in records(tmp_path)] == [10, 22]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = MetricsWriter(None)
    writer.write("train", 10, {"loss": 0.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


DAMAGED = [
    b"",
    b"no JSON",
    b"[]",
    b"3",
    b"null",
    b"{}",
    b'{"kind": "train"}',
    b'{"update": 3}',
    b'{"kind": 3, "update": 3}',
    b'{"kind": "train", "update": "3"}',
    b'{"kind": "train", "update": null}',
    b'{"kind": "eval", "update": 3, "epoch": "1"}',
    b'{"kind": "train", "update": 3, "name": "\xff"}',
    '{"kind": "train", "update": 3}'.encode("utf-16"),
    b"\x00" * 20,
    b"[" * 100_000,
    b"1" * 10_000,
]


def test_damaged_records_are_left_out_with_a_warning(tmp_path, capsys):
    whole = [b'{"kind": "train", "update": 10, "loss": 0.5}', b'{"kind": "eval", "update": 10, "epoch": 0}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([whole[0], *DAMAGED, whole[1], b'{"cut off']))
    create_logger()
    MetricsWriter(tmp_path, start=20, epoch=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join([*whole, b""])
    said = capsys.readouterr().out
    lines = len(b"\n".join(DAMAGED).split(b"\n"))
    assert f"warning: {lines} of {lines + 2} lines of {tmp_path}/metrics.jsonl are damaged and left out\n" in said
    MetricsWriter(tmp_path, start=20, epoch=1).close()
    assert capsys.readouterr().out == ""


def test_without_room_for_its_events_a_run_goes_on_without_them(disk_of, capsys):
    hook, disk = threading.excepthook, disk_of("64k")
    create_logger()
    writer = MetricsWriter(disk)
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    board = writer._board
    for update in range(2000):
        board.add("train", update, {"loss": 0.5, "lr": 0.1})
    writer.close()
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    assert "warning: no more events for TensorBoard, the figures are in metrics.jsonl: [Errno 28] No space left" in line
    assert threading.excepthook is hook


def test_a_defect_in_a_thread_is_still_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    writer = MetricsWriter(tmp_path)

    def fail(error: Exception) -> None:
        raise error

    for error in (KeyError("a defect"), OSError(errno.ENOSPC, "full")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    writer.close()
    assert shown == [KeyError]
