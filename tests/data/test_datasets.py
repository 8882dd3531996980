import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import DATASETS, build_eval_loader, build_train_loader, eval_transform, open_source, resolve_name
from data.shapes import CLASSES, ShapesSource, coverage, render
from data.sources import DigitsSource, FolderSource
from data.zipped import ZipSource


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_gives_labelled_rgb_images(name, split, data_path):
    source = open_source(name, data_path(name), split)
    assert len(source) > 0
    for index in range(min(len(source), 20)):
        image, label = source.load(index)
        assert image.mode == "RGB"
        assert 0 <= label < len(source.classes)
        if DATASETS[name].image_size is not None:
            assert image.size == (DATASETS[name].image_size,) * 2
        assert source.locate(index)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_fills_batches(name, data_path):
    transform = eval_transform((16, 16))
    train = build_train_loader(open_source(name, data_path(name), "train"), transform, batch_size=4)
    batch = next(iter(train))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    val = open_source(name, data_path(name), "val")
    assert sum(len(batch.labels) for batch in build_eval_loader(val, transform, batch_size=4)) == len(val)


@pytest.mark.parametrize("name", DATASETS)
def test_every_source_can_be_sent_to_another_process(name, data_path):
    source = open_source(name, data_path(name), "val")
    received = pickle.loads(pickle.dumps(source))
    assert received.load(1)[0].tobytes() == source.load(1)[0].tobytes()
    assert received.classes == source.classes


def test_statistics_of_a_data_set_are_plausible():
    for spec in DATASETS.values():
        assert all(0 < mean < 1 for mean in spec.mean)
        assert all(0 < std < 0.5 for std in spec.std)


def test_names_resolve():
    assert resolve_name("imagenet", "/some/path") == "imagenet"
    assert resolve_name("cf100", "digits") == "digits"
    assert resolve_name("no such set", "digits") == "digits"
    assert resolve_name("imagenet", "shapes") == "shapes"
    assert resolve_name("imagenet", "./digits") == "imagenet"
    with pytest.raises(ValueError, match=r"'imgenet' in DATA.DATASET; did you mean imagenet\?"):
        resolve_name("imgenet", "/some/path")


def test_a_data_path_is_required_except_where_no_files_are():
    with pytest.raises(ValueError, match="--data-path PATH, or one of digits, shapes"):
        open_source("imagenet", "", "train")
    assert len(open_source("digits", "", "val")) == 359
    assert len(open_source("shapes", "", "val")) == 2000


class TestDigits:
    def test_split(self):
        train, val = DigitsSource("train"), DigitsSource("val")
        assert (len(train), len(val)) == (1438, 359)
        assert train.classes == list("0123456789")
        numbers = {source.locate(index) for source in (train, val) for index in range(len(source))}
        assert numbers == {f"digits image {number}" for number in range(1797)}
        assert val.locate(0) == "digits image 4"

    def test_pixels(self):
        image, label = DigitsSource("train").load(0)
        with np.load(DigitsSource.FILE, allow_pickle=False) as stored:
            assert label == stored["labels"][0] == 0
            expected = np.floor(stored["images"][0] * (255 / 16) + 0.5)
        assert expected.max() > 200
        assert (np.asarray(image) == expected[..., None]).all()

    def test_file_is_small_and_says_where_it_comes_from(self):
        assert DigitsSource.FILE.stat().st_size < 100_000
        with np.load(DigitsSource.FILE, allow_pickle=False) as stored:
            assert stored["images"].shape == (1797, 8, 8)
            assert stored["images"].dtype == stored["labels"].dtype == np.uint8
            assert stored["images"].max() == 16
            assert "Alpaydin" in str(stored["origin"])
            assert "CC BY 4.0" in str(stored["licence"])

    def test_statistics(self):
        source = DigitsSource("train")
        pixels = np.stack([np.asarray(source.load(index)[0]) for index in range(len(source))]) / 255
        np.testing.assert_allclose(pixels.mean((0, 1, 2)), DATASETS["digits"].mean, atol=1e-5)
        np.testing.assert_allclose(pixels.std((0, 1, 2)), DATASETS["digits"].std, atol=1e-5)


class TestShapes:
    def test_splits_are_balanced_and_share_no_image(self):
        train, val = ShapesSource("train"), ShapesSource("val")
        assert np.bincount(train.labels).tolist() == [400] * 10
        assert np.bincount(val.labels).tolist() == [200] * 10
        images = [source.load(i)[0].tobytes() for source in (train, val) for i in range(len(source))]
        assert len(set(images)) == 6000
        assert val.locate(7) == "shapes val image 7"

    def test_an_image_depends_on_split_and_number_alone(self):
        source = ShapesSource("val")
        for index in (1999, 3):
            expected = render(list(CLASSES.values())[index % 10], np.random.default_rng((1, index)))
            assert (np.asarray(source.load(index)[0]) == expected).all()

    def test_statistics(self):
        source = ShapesSource("train")
        pixels = np.stack([np.asarray(source.load(index)[0]) for index in range(len(source))]) / 255
        np.testing.assert_allclose(pixels.mean((0, 1, 2)), DATASETS["shapes"].mean, atol=1e-4)
        np.testing.assert_allclose(pixels.std((0, 1, 2)), DATASETS["shapes"].std, atol=1e-4)

    @pytest.mark.parametrize("name", CLASSES)
    def test_a_shape_covers_the_area_that_geometry_gives_it(self, name):
        shape, centre, radius = CLASSES[name], np.array([17.0, 15.0]), 12.0
        waist = shape.waist or np.cos(np.pi / shape.corners)  # the middle of a straight side is that far out
        area = shape.corners * np.sin(np.pi / shape.corners) * waist * radius**2 * (1 - shape.hole**2)
        for angle in (0.0, 0.3):
            covered = coverage(shape, centre, radius, angle)
            assert covered.sum() == pytest.approx(area, rel=0.06)
            assert covered[15, 17] == (shape.hole == 0)

    def test_shapes_are_turned_moved_and_scaled(self):
        centre, triangle = np.array([16.0, 16.0]), CLASSES["triangle"]
        first = coverage(triangle, centre, 8.0, 0.0)
        assert np.allclose(coverage(triangle, centre, 8.0, 2 * np.pi / 3), first, atol=0.3)
        assert abs(coverage(triangle, centre, 8.0, np.pi) - first).max() == 1
        assert (coverage(triangle, centre + np.array([3, 5]), 8.0, 0.0)[5:, 3:] == first[:-5, :-3]).all()
        assert coverage(triangle, centre, 4.0, 0.0).sum() == pytest.approx(first.sum() / 4, rel=0.1)


class TestFolder:
    def test_labels_follow_the_sorted_names(self, image_folder):
        source = FolderSource(image_folder, "train")
        assert source.classes == ["ant", "bee", "cat"]
        assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert source.locate(5) == str(image_folder / "train" / "bee" / "1.png")

    def test_nested_folders_and_links_and_upper_case(self, image_folder, tmp_path):
        deep = image_folder / "train" / "ant" / "more"
        deep.mkdir()
        (image_folder / "train" / "ant" / "0.png").rename(deep / "0.PNG")
        (image_folder / "train" / "bee").rename(tmp_path / "elsewhere")
        (image_folder / "train" / "bee").symlink_to(tmp_path / "elsewhere")
        (image_folder / "train" / "ant" / "notes.txt").write_text("not an image")
        source = FolderSource(image_folder, "train")
        assert len(source) == 12
        assert all(source.load(index) for index in range(12))

    def test_home_folder(self, image_folder, monkeypatch):
        monkeypatch.setenv("HOME", str(image_folder.parent))
        assert len(FolderSource("~/folder", "val")) == 6

    def test_grey_and_palette_images_become_rgb(self, image_folder):
        path = image_folder / "val" / "ant" / "0.png"
        for mode in ("L", "P", "RGBA", "1"):
            Image.open(path).convert(mode).save(path)
            assert FolderSource(image_folder, "val").load(0)[0].mode == "RGB"

    @pytest.mark.parametrize("missing", ["", "train"])
    def test_missing_folder(self, image_folder, missing):
        shutil.rmtree(image_folder / missing)
        with pytest.raises(ValueError, match="train/<class>/") as error:
            FolderSource(image_folder, "train")
        assert str(image_folder / "train") in str(error.value)
        assert "digits" in str(error.value)

    def test_class_without_images(self, image_folder):
        for path in (image_folder / "train" / "bee").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match=str(image_folder / "train" / "bee")):
            FolderSource(image_folder, "train")

    @pytest.mark.parametrize("opened", ["train", "val"])
    @pytest.mark.parametrize("smaller", ["train", "val"])
    def test_classes_of_train_and_val_must_agree(self, image_folder, opened, smaller):
        shutil.rmtree(image_folder / smaller / "bee")
        with pytest.raises(ValueError, match=f"'bee' and {image_folder / smaller} has not"):
            FolderSource(image_folder, opened)

    def test_evaluation_does_not_need_training_images(self, image_folder):
        for path in (image_folder / "train").rglob("*.png"):
            path.unlink()
        assert len(FolderSource(image_folder, "val")) == 6
        shutil.rmtree(image_folder / "train")
        assert len(FolderSource(image_folder, "val")) == 6
        (image_folder / "train").mkdir()
        assert len(FolderSource(image_folder, "val")) == 6

    @pytest.mark.parametrize("damage", ["empty", "not an image", "header only", "truncated", "torn", "gigantic"])
    def test_unreadable_image(self, image_folder, damage):
        path = image_folder / "val" / "ant" / "0.png"
        path.write_bytes(damaged(path.read_bytes(), damage))
        with pytest.raises((OSError, ValueError)):
            FolderSource(image_folder, "val").load(0)


def damaged(png: bytes, how: str) -> bytes:
    """Damages the bytes of a PNG file in one of the ways for which Pillow has different exceptions."""
    header_end = 8 + 25  # the signature, and the header chunk: length, name, width, height, five bytes, checksum
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    return {
        "empty": b"",
        "not an image": b"<html>not found</html>",
        "header only": png[:header_end],
        "truncated": png[:-200],
        "torn": png[:header_end] + struct.pack(">I", 50) + png[header_end + 4 :],  # the pixels' chunk is longer
        "gigantic": png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[header_end:],
    }[how]


class TestCifar:
    @pytest.mark.parametrize("damage", [False, True])
    def test_missing_or_damaged(self, cifar_folder, tmp_path, damage):
        if damage:
            (cifar_folder / "cifar-100-python" / "test").write_bytes(b"changed")
        root = cifar_folder if damage else tmp_path / "nowhere"
        with pytest.raises(ValueError, match=r"DATA\.DOWNLOAD True") as error:
            open_source("cf100", root, "train")
        assert str(root / "cifar-100-python") in str(error.value)

    def test_splits_differ(self, cifar_folder):
        assert [len(open_source("cf100", cifar_folder, split)) for split in ("train", "val")] == [20, 10]


class TestZip:
    @pytest.mark.parametrize("cache_mode", ["no", "part", "full"])
    def test_same_images_as_the_folder(self, image_folder, image_zip, cache_mode):
        folder = open_source("imagenet", image_folder, "train")
        zipped = open_source("imagenet", image_zip, "train", zip_mode=True, cache_mode=cache_mode, rank=1, world_size=3)
        assert len(zipped) == len(folder)
        assert zipped.classes == ["0", "1", "2"]
        for index in range(len(folder)):
            (image, label), (expected, expected_label) = zipped.load(index), folder.load(index)
            assert label == expected_label
            assert image.tobytes() == expected.tobytes()
        assert zipped.locate(0) == f"{image_zip / 'train.zip'}/ant/0.png"

    @pytest.mark.parametrize(("cache_mode", "cached"), [("no", []), ("part", [1, 4, 7, 10]), ("full", range(12))])
    def test_cached_images_need_no_file(self, image_zip, cache_mode, cached):
        source = ZipSource(image_zip, "train", cache_mode=cache_mode, rank=1, world_size=3)
        source = pickle.loads(pickle.dumps(source))
        (image_zip / "train.zip").unlink()
        for index in range(12):
            if index in cached:
                source.load(index)
            else:
                with pytest.raises(FileNotFoundError):
                    source.load(index)

    def test_workers_read_at_the_same_time(self, image_zip):
        source = ZipSource(image_zip, "train", cache_mode="no")
        expected = [source.load(index)[0].tobytes() for index in range(12)]  # opens the file before the workers start
        loader = build_eval_loader(source, eval_transform((30, 40)), batch_size=1, num_workers=2)
        for index, batch in enumerate(loader):
            assert not batch.unreadable
            assert batch.images[0].permute(1, 2, 0).numpy().tobytes() == expected[index]

    def test_unknown_cache_mode(self, image_zip):
        with pytest.raises(ValueError, match=r"DATA\.CACHE_MODE is 'some'"):
            ZipSource(image_zip, "train", cache_mode="some")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("ant/0.png 0", "expected `path<TAB>label`"),
            ("ant/0.png\t0\t0", "expected `path<TAB>label`"),
            ("ant/0.png\tant", "'ant' is not an integer"),
            ("ant/0.png\t-1", "'-1' is not an integer"),
            ("ant/0.png\t1.0", "'1.0' is not an integer"),
            ("ant/9.png\t0", "no entry 'ant/9.png'"),
            ("/ant/0.png\t0", "not a path inside the zip"),
            ("../train.zip\t0", "not a path inside the zip"),
            ("ant/../../0.png\t0", "not a path inside the zip"),
        ],
    )
    def test_wrong_map_line(self, image_zip, line, message):
        map_file = image_zip / "train_map.txt"
        map_file.write_text(f"ant/0.png\t0\r\n\n{line}\n")
        with pytest.raises(ValueError, match=message) as error:
            ZipSource(image_zip, "train")
        assert f"{map_file}, line 3" in str(error.value)

    def test_empty_map(self, image_zip):
        (image_zip / "val_map.txt").write_text("\n")
        with pytest.raises(ValueError, match="lists no image"):
            ZipSource(image_zip, "val")

    @pytest.mark.parametrize("name", ["train.zip", "train_map.txt"])
    def test_missing_file(self, image_zip, name):
        (image_zip / name).unlink()
        with pytest.raises(ValueError, match=f"{image_zip / name} is missing"):
            ZipSource(image_zip, "train")

    def test_not_a_zip(self, image_zip):
        (image_zip / "train.zip").write_bytes(b"not a zip")
        with pytest.raises(ValueError, match=r"train\.zip is not a readable zip file"):
            ZipSource(image_zip, "train")

    @pytest.mark.parametrize("cache_mode", ["no", "full"])
    def test_damaged_entry_is_found_when_it_is_due(self, image_zip, cache_mode):
        archive = image_zip / "train.zip"
        with zipfile.ZipFile(archive) as opened:
            content = opened.read("ant/1.png")
        archive.write_bytes(archive.read_bytes().replace(content, bytes(len(content))))
        source = ZipSource(image_zip, "train", cache_mode=cache_mode)
        source.load(0)
        with pytest.raises(ValueError, match="damaged zip entry"):
            source.load(1)
