"""Each format in which images may be stored: the same images as the folder that they come from, exactly once."""

import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import pytest
from settings import settings
from stored_sets import CLASSES, STORED, store

from data import FORMATS, EncodedSource, build_eval_loader, build_train_loader, eval_transform, open_source

TRANSFORM = eval_transform((24, 24))


def section(opts: str, num_workers: int = 0):
    """Returns the section DATA for small batches."""
    return settings(f"DATA.BATCH_SIZE 2 DATA.NUM_WORKERS {num_workers} DATA.PIN_MEMORY False {opts}").DATA


@pytest.fixture(params=STORED)
def stored(request, image_folder, tmp_path) -> str:
    """The settings that read the images of `image_folder` in one of the forms."""
    return store(request.param, image_folder, tmp_path / "stored")


def contents(source: EncodedSource) -> Counter[tuple[str, bytes]]:
    """Counts each image with the name of its class."""
    loaded = (source.load(index) for index in range(len(source)))
    return Counter((source.classes[label], image.tobytes()) for image, label in loaded)


def test_every_format_is_tried_here():
    assert {form for form, _ in STORED.values()} == set(FORMATS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_images_and_labels_as_the_folder(stored, image_folder, split):
    source, folder = (open_source(section(opts), split) for opts in (stored, f"DATA.DATA_PATH {image_folder}"))
    assert isinstance(source, EncodedSource)
    assert source.classes == folder.classes == list(CLASSES)
    assert contents(source) == contents(folder)
    assert len(source) == len(source.labels) == {"train": 12, "val": 6}[split]
    assert len({source.name(index) for index in range(len(source))}) == len(source)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_loads_each_image_once(stored, world_size):
    seen: list[int] = []
    for rank in range(world_size):
        source = open_source(section(stored), "val", rank=rank, world_size=world_size)
        loader = build_eval_loader(source, TRANSFORM, section(stored), rank=rank, world_size=world_size)
        for batch in loader:
            assert not batch.unreadable
            assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_exactly_with_any_workers(stored, num_workers):
    opts = f"{stored} DATA.CACHE_MODE no"
    source = open_source(section(opts), "train")
    source.load(0)  # opens files before the workers start
    whole = build_train_loader(source, TRANSFORM, section(opts), seed=3)
    whole.set_position(1)
    expected = [(batch.indices.tolist(), batch.images.numpy().tobytes()) for batch in whole]
    assert sorted(index for indices, _ in expected for index in indices) == list(range(12))
    resumed = build_train_loader(source, TRANSFORM, section(opts, num_workers), seed=3)
    resumed.set_position(1, consumed=6)
    assert [(batch.indices.tolist(), batch.images.numpy().tobytes()) for batch in resumed] == expected[3:]


@pytest.mark.parametrize("how", STORED)
def test_an_unreadable_image_is_named_and_replaced(how, image_folder, tmp_path):
    (image_folder / "val/bee/1.png").write_bytes(b"no image at all")
    opts = store(how, image_folder, tmp_path / "stored")
    source = open_source(section(opts), "val")
    batches = list(build_eval_loader(source, TRANSFORM, section(opts)))
    (message,) = [message for batch in batches for message in batch.unreadable]
    (index,) = [index for index in range(len(source)) if message.startswith(f"{source.locate(index)}: ")]
    assert source.classes[source.labels[index]] == "bee"
    assert "not an image of a known format" in message
    with pytest.raises(ValueError, match="not an image"):
        source.load(index)


def test_a_source_can_be_sent_to_another_process(stored):
    source = open_source(section(stored), "train")
    source.load(0)
    received = pickle.loads(pickle.dumps(source))
    assert contents(received) == contents(source)
    assert [received.locate(i) for i in range(12)] == [source.locate(i) for i in range(12)]


def _pixels(source: EncodedSource) -> list[bytes]:
    return [source.load(index)[0].tobytes() for index in range(len(source))]


@pytest.mark.slow
def test_a_process_that_is_not_forked_reads_the_same(image_folder, tmp_path):
    sources = [
        open_source(section(store(how, image_folder, tmp_path / f"stored_{number}")), "train")
        for number, how in enumerate(STORED)
    ]
    expected = list(map(_pixels, sources))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_pixels, sources) == expected


def test_a_format_is_refused_where_another_is_stored(image_folder):
    for form, message in {"zip": "train.zip is missing", "tar": "no tar files of train", "list": "no list of"}.items():
        with pytest.raises(ValueError, match=message):
            open_source(section(f"DATA.DATA_PATH {image_folder} DATA.FORMAT {form}"), "train")


@pytest.mark.parametrize("how", ["folder", "tar of folders", "csv"])
def test_faces_may_be_other_people_in_each_split(how, face_folder, tmp_path):
    opts = store(how, face_folder, tmp_path / "stored")
    train, val = (open_source(section(f"{opts} DATA.DATASET faces"), split) for split in ("train", "val"))
    assert train.classes == list(CLASSES)
    assert val.classes == [f"other {name}" for name in CLASSES]
    with pytest.raises(ValueError, match="train and val need the same class"):
        open_source(section(opts), "val")


def test_the_published_flag_means_the_format_zip(image_zip: Path):
    by_flag = open_source(section(f"DATA.DATA_PATH {image_zip} DATA.ZIP_MODE True"), "val")
    by_key = open_source(section(f"DATA.DATA_PATH {image_zip} DATA.FORMAT zip"), "val")
    assert type(by_flag) is type(by_key)
    assert contents(by_flag) == contents(by_key)
