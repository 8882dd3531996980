"""The benchmark of data loading: what it compares is comparable, and what it counts is counted."""

import json
import multiprocessing
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from benchmarks import data_loading, published_loading, start_up
from benchmarks.photos import write_photos
from data import index
from data.sources import PackedStrings

IMAGE_ROWS = ["weak", "evaluation", "raug15 (CPU)", "collate and transfer"]
START_ROWS = ["start-up (cold scan)", "start-up (saved index)", "memory", "start-up (generated index)"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", 24, classes=2)
    (folder / "val").symlink_to("train")
    return folder


@pytest.fixture
def _quick_trees(monkeypatch) -> None:
    monkeypatch.setattr(index, "GRANULARITY_S", 0.0)
    monkeypatch.setattr(start_up, "GRANULARITY_S", 0.0)
    monkeypatch.setattr(start_up, "FOLDERS", 10)


@pytest.mark.usefixtures("_quick_trees")
def test_it_writes_its_rows(tmp_path, capsys) -> None:
    file = tmp_path / "deep" / "result.json"
    tiny = ["--images", "5", "--batch-size", "2", "--rounds", "1", "--min-seconds", "0", "--tree", "10000"]
    data_loading.main([*tiny, "--entries", "10000", "--json", str(file), "--only", *IMAGE_ROWS, *START_ROWS])
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == IMAGE_ROWS + START_ROWS
    for row in rows:
        assert row["name"] == "memory" or row["ms"] > 0
        assert "generated" in row["name"] or row["x"] > 0
    assert {row["before_mib"] < row["after_mib"] for row in rows[-2:]} == {True}
    assert rows[-1]["entries"] == 10_000
    assert "5 JPEG files" in capsys.readouterr().out


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_photos_have_the_sizes_and_bytes_of_imagenet(photos, tmp_path) -> None:
    paths = sorted(photos.glob("train/*/*.jpg"))
    sizes = np.array([size_of(path) for path in paths])
    assert len(paths) == 24
    assert 100_000 < np.mean([path.stat().st_size for path in paths]) < 125_000
    assert 170_000 < sizes.prod(1).mean() < 215_000
    assert len(np.unique(sizes, axis=0)) > 3
    write_photos(tmp_path, 2, classes=2)
    for path in tmp_path.glob("*/*.jpg"):
        assert path.read_bytes() == (photos / "train" / path.parent.name / path.name).read_bytes()


def test_both_pipelines_evaluate_the_same_pixels(photos) -> None:
    args = data_loading.parse(["--images", "24", "--batch-size", "24", "--opts", "DATA.INTERPOLATION", "bilinear"])
    ours = next(iter(data_loading.task_of(photos, args, "").eval_loader((224, 224))))
    folder = published_loading.open_folder(photos / "val", "evaluation", 224)
    images, labels = next(iter(published_loading.loader(folder, 24, train=False)))
    spec = data.DATASETS["imagenet"]
    of_255 = 255 * torch.tensor(spec.std).view(1, 3, 1, 1)
    assert labels.equal(ours.labels)
    assert (of_255 * (data.Normalize(spec.mean, spec.std)(ours.images) - images)).abs().max() < 1.01


@pytest.mark.parametrize("recipe", ["weak", "raug15"])
def test_the_published_pipeline_augments(photos, recipe) -> None:
    random.seed(0)
    folder = published_loading.open_folder(photos / "train", recipe, 32)
    first, second = folder[0][0], folder[0][0]
    assert first.shape == second.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert not first.equal(second)


def test_the_published_policy_has_sixteen_operations() -> None:
    random.seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8))
    changed = 0
    for operation in published_loading.OPERATIONS:
        for magnitude in range(15):
            made = operation(image, magnitude / 10)
            assert (made.mode, made.size) == ("RGB", (30, 20))
            changed += made.tobytes() != image.tobytes()
    assert len(published_loading.OPERATIONS) == 16
    assert changed > 0.8 * 16 * 15


@pytest.mark.usefixtures("_quick_trees")
def test_a_tree_that_is_listed_wrong_stops_it(tmp_path) -> None:
    start_up.make_tree(tmp_path, 20)
    openings = start_up.openings(tmp_path)
    start_up.check(openings)
    openings[start_up.SAVED] = lambda: SimpleNamespace(
        folder=tmp_path / "train", paths=PackedStrings(["a"] * 20), labels=range(20)
    )
    with pytest.raises(ValueError, match="saved index.* is wrong"):
        start_up.check(openings)


def test_memory_and_time_of_other_processes_are_counted() -> None:
    kept = []
    before, after = start_up.in_process(lambda: kept.append(bytearray(2**25)))
    assert 30 < after - before < 40
    clock = data_loading.ProcessorClock("cpu")
    worker = multiprocessing.get_context("fork").Process(target=lambda: [sum(range(10**6)) for _ in range(1000)])
    worker.start()
    start, own, until = clock.now(), time.process_time(), time.monotonic() + 60
    while clock.now() - start < 0.2:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert time.process_time() - own < 0.1
    worker.terminate()
    worker.join()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "10"], "do not fill a batch of 100"),
        (["--tree", "100"], "saved from 10000 files on"),
        (["--only", "weka"], "matches no row"),
    ],
)
def test_what_it_cannot_run_is_named(words, message) -> None:
    with pytest.raises(ValueError, match=message):
        data_loading.main(words)
