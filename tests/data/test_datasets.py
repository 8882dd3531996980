import contextlib
import pickle
import random
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from settings import settings

import configs
from data import (
    DATASETS,
    IGNORED,
    CityscapesSource,
    DigitsSource,
    FolderSource,
    MaskedDataset,
    ShapesSource,
    Source,
    TransformedDataset,
    ZipSource,
    build_eval_loader,
    build_train_loader,
    eval_transform,
    open_source,
    resolve_name,
    segmentation_eval_transform,
    zipped,
)
from data.datasets import DEFAULT, GREY, WITHOUT_PATH
from data.decode import MODES
from data.pixels import size_of
from data.shapes import CLASSES, coverage, render

LOADING = settings("DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0").DATA


def opened(dataset: str, path: Path | str, split: str, opts: str = "", **place: int) -> Source:
    """Opens images with these settings, also with such as the schema refuses, which is another one's test."""
    cfg = settings(opts).DATA.clone()
    cfg.defrost()
    cfg.DATASET, cfg.DATA_PATH = dataset, str(path)
    cfg.freeze()
    return open_source(cfg, split, **place)


def division(name: str) -> str:
    """Returns the settings that a data set without images to evaluate on needs."""
    return "" if DATASETS[name].has_val else "DATA.VAL_FRACTION 0.5"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_gives_labelled_rgb_images(name, split, data_path):
    source = opened(name, data_path(name), split, division(name))
    assert len(source) > 0
    for index in range(min(len(source), 20)):
        image, label = source.load(index)
        assert np.asarray(image).shape == (*size_of(image), 3)
        assert np.shape(label) == (size_of(image) if DATASETS[name].labels == "masks" else ())
        assert set(np.unique(label)) <= {*range(len(source.classes)), IGNORED}
        if DATASETS[name].image_size is not None:
            assert size_of(image) == (DATASETS[name].image_size,) * 2
        assert source.locate(index)


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_images_of_1_3_and_4_channels(name, channels, data_path):
    path, opts = data_path(name), f"{division(name)} DATA.DECODER pillow"  # simplejpeg's grey of grey files is a tensor
    image = np.asarray(opened(name, path, "val", opts, channels=channels).load(0)[0])
    assert image.shape[2:] == ((channels,) if channels > 1 else ())
    colours = np.asarray(opened(name, path, "val", opts).load(0)[0])
    assert (image[..., :3] == colours).all() if channels > 1 else (abs(image - colours @ GREY) < 1).all()


@pytest.mark.parametrize("name", DATASETS)
def test_statistics_of_grey_images(name):
    """Those of the digits, whose colours are equal, are those of their pixels."""
    spec = DATASETS[name]
    assert spec.statistics(3) == (spec.mean, spec.std)
    assert spec.statistics(4) is None
    mean, std = spec.statistics(1)
    assert len(mean) == len(std) == 1
    assert min(spec.mean) - 1e-9 <= mean[0] <= max(spec.mean) + 1e-9
    assert min(spec.std) - 1e-9 <= std[0] <= max(spec.std) + 1e-9


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_fills_batches(name, data_path):
    masks = DATASETS[name].labels == "masks"
    transform = (segmentation_eval_transform if masks else eval_transform)((16, 16))
    dataset = MaskedDataset if masks else TransformedDataset
    path = data_path(name)
    train, val = (opened(name, path, split, division(name)) for split in ("train", "val"))
    batch = next(iter(build_train_loader(train, transform, LOADING, seed=0, dataset=dataset)))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.labels.shape == ((4, 16, 16) if masks else (4,))
    assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
    batches = build_eval_loader(val, transform, LOADING, dataset=dataset)
    assert sum(len(batch.labels) for batch in batches) == len(val)


@pytest.mark.parametrize("name", DATASETS)
def test_every_source_can_be_sent_to_another_process(name, data_path):
    source = opened(name, data_path(name), "val", division(name))
    received = pickle.loads(pickle.dumps(source))
    assert np.array_equal(received.load(1)[0], source.load(1)[0])
    assert received.classes == source.classes


def test_statistics_of_a_data_set_are_plausible():
    for spec in DATASETS.values():
        assert all(0 < mean < 1 for mean in spec.mean)
        assert all(0 < std <= 0.5 for std in spec.std)


def test_names_resolve():
    assert resolve_name("imagenet", "/some/path") == "imagenet"
    assert resolve_name("imagenet", "digits") == "digits"
    assert resolve_name("imagenet", "shapes") == "shapes"
    assert resolve_name("digits", "digits") == "digits"
    assert resolve_name("imagenet", "./digits") == "imagenet"
    with pytest.raises(ValueError, match=r"'imgenet' in DATA.DATASET; did you mean imagenet\?"):
        resolve_name("imgenet", "/some/path")
    with pytest.raises(ValueError, match="unknown data set 'no such set'"):
        resolve_name("no such set", "digits")


@pytest.mark.parametrize("path", ["", configs.defaults().DATA.DATA_PATH])
@pytest.mark.parametrize("name", WITHOUT_PATH)
def test_a_data_set_without_files_needs_no_path(name, path):
    assert resolve_name(name, path) == name


@pytest.mark.parametrize("path", ["/some/images", "./digits", "digits/", "Digits", ".", "/path/to/imgnet"])
@pytest.mark.parametrize("name", WITHOUT_PATH)
def test_a_folder_is_not_ignored_for_a_data_set_without_files(name, path):
    for act in (resolve_name, lambda *given: opened(*given, "val")):
        with pytest.raises(ValueError, match=f"^DATA.DATASET {name} has no folder") as error:
            act(name, path)
        assert f"leave DATA.DATA_PATH {path} unread: set DATA.DATASET to imagenet" in str(error.value)


@pytest.mark.parametrize("path", WITHOUT_PATH)
@pytest.mark.parametrize("name", [name for name in DATASETS if name != DEFAULT])
def test_a_word_is_not_preferred_to_another_data_set(name, path):
    if name == path:
        assert resolve_name(name, path) == name
        return
    for act in (resolve_name, lambda *given: opened(*given, "val")):
        with pytest.raises(ValueError, match=f"^DATA.DATASET {name} and DATA.DATA_PATH {path}.*DATASET to {path}$"):
            act(name, path)


@pytest.mark.parametrize("opts", ["DATA.ZIP_MODE True", "DATA.FORMAT tar"])
@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if not spec.has_formats])
def test_only_image_folders_can_be_zipped(name, opts, tmp_path):
    path = name if name in WITHOUT_PATH else tmp_path
    with pytest.raises(ValueError, match=f"^{opts.removesuffix(' True')} .* which {name} is not"):
        opened(name, path, "val", opts)


def test_a_data_path_is_required_except_where_no_files_are():
    for name in DATASETS:
        if name not in WITHOUT_PATH:
            with pytest.raises(
                ValueError, match=f"no data path for {name}: set DATA.DATA_PATH .* words digits, shapes"
            ):
                opened(name, "", "train")
    assert len(opened("digits", "", "val")) == 359
    assert len(opened("shapes", "", "val")) == 2000


def test_the_kinds_of_labels():
    kinds = {name: spec.labels for name, spec in DATASETS.items() if spec.labels != "classes"}
    assert kinds == {"cityscapes": "masks", "faces": "identities"}


def test_cityscapes_by_its_name(cityscapes_folder, tmp_path):
    source = opened("cityscapes", cityscapes_folder, "train")
    assert isinstance(source, CityscapesSource)
    assert (len(source), len(source.classes)) == (12, 19)
    assert len(opened("cityscapes", cityscapes_folder, "val")) == 4
    spec, imagenet = DATASETS["cityscapes"], DATASETS["imagenet"]
    assert (spec.mean, spec.std, spec.image_size) == (imagenet.mean, imagenet.std, None)
    with pytest.raises(ValueError, match=f"no images at {tmp_path}/leftImg8bit/val/<city>/"):
        opened("cityscapes", tmp_path, "val")


def test_faces_by_their_name(face_folder, tmp_path):
    train, val = (opened("faces", face_folder, split) for split in ("train", "val"))
    assert isinstance(train, FolderSource)
    assert (train.classes, val.classes) == (["ant", "bee", "cat"], ["other ant", "other bee", "other cat"])
    assert (len(train), len(val)) == (12, 6)
    spec = DATASETS["faces"]
    assert (spec.mean, spec.std, spec.image_size) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None)
    with pytest.raises(ValueError, match="the same class folders"):
        opened("imagenet", face_folder, "val")
    with pytest.raises(ValueError, match=f"no class folders at {tmp_path}/none/val") as error:
        opened("faces", tmp_path / "none", "val")
    assert "digits" not in str(error.value)


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
    @pytest.mark.parametrize(
        ("name", "full_name", "test_file"),
        [("cf10", "CIFAR-10", "cifar-10-batches-py/test_batch"), ("cf100", "CIFAR-100", "cifar-100-python/test")],
    )
    def test_missing_or_damaged(self, data_path, tmp_path, name, full_name, test_file, damage):
        root = Path(data_path(name)) if damage else tmp_path / "nowhere"
        if damage:
            (root / test_file).write_bytes(b"changed")
        with pytest.raises(ValueError, match=rf"^{full_name} is missing .* DATA\.DOWNLOAD True") as error:
            opened(name, root, "train")
        assert str((root / test_file).parent) in str(error.value)

    @pytest.mark.parametrize("name", ["cf10", "cf100"])
    def test_splits_differ(self, data_path, name):
        root = data_path(name)
        assert [len(opened(name, root, split)) for split in ("train", "val")] == [20, 10]

    def test_images_and_labels_are_those_of_the_files(self, cifar10_folder):
        source, start = opened("cf10", cifar10_folder, "train"), 0
        for number in range(1, 6):
            stored = pickle.loads((cifar10_folder / f"cifar-10-batches-py/data_batch_{number}").read_bytes())
            for pixels, label in zip(stored["data"], stored["labels"], strict=True):
                image, given = source.load(start)
                assert np.array_equal(np.asarray(image), pixels.reshape(3, 32, 32).transpose(1, 2, 0))
                assert (given, source.classes[given]) == (label, f"class {label}")
                start += 1
        assert start == len(source)
        assert source.locate(3) == "CIFAR-10 train image 3"
        assert opened("cf10", cifar10_folder, "val").locate(3) == "CIFAR-10 val image 3"


class TestZip:
    @pytest.mark.parametrize("cache_mode", ["no", "part", "full"])
    def test_same_images_as_the_folder(self, image_folder, image_zip, cache_mode):
        folder = opened("imagenet", image_folder, "train")
        opts = f"DATA.ZIP_MODE True DATA.CACHE_MODE {cache_mode}"
        zipped = opened("imagenet", image_zip, "train", opts, rank=1, world_size=3)
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
        cfg = settings("DATA.BATCH_SIZE 1 DATA.NUM_WORKERS 2").DATA
        loader = build_eval_loader(source, eval_transform((30, 40)), cfg)
        for index, batch in enumerate(loader):
            assert not batch.unreadable
            assert batch.images[0].permute(1, 2, 0).numpy().tobytes() == expected[index]

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
            ("ant/1.png\t\uff11", "'\uff11' is not an integer"),  # full-width digits
            ("ant/1.png\t\u00b2", "'\u00b2' is not an integer"),
            ("ant/1.png\t\u0663", "'\u0663' is not an integer"),
            ("ant/1.png\t1_0", "'1_0' is not an integer"),
            ("ant/1.png\t+1", "'\\+1' is not an integer"),
            ("ant/1.png\t", "'' is not an integer"),
            ("ant/1.png\t" + "9" * 5000, "'9+ \\.\\.\\. 9+' is not an integer"),
            ("ant/1.png\t1000000000", "'1000000000' is not an integer from 0 to 999999999"),
            ("ant/1.png\t999999999", "there would be 1000000000 classes, of which 2 have images"),
            ("ant/1.png\t1000", "there would be 1001 classes, of which 2 have images"),
            ("ant/0.png\t1", "'ant/0.png' is in line 1 already, and would count twice"),
            ("ant/1.png\0\t1", r"no entry 'ant/1.png\\x00'"),
            ("\x1b[2J\u202e\t1", r"no entry '\\x1b\[2J\\u202e'"),
            ("\ufeffant/1.png\t1", r"no entry '\\ufeffant/1.png'"),
            ("x" * 10**6 + "\t1", "no entry 'x+ "),
            ("x" * 10**6, "expected `path<TAB>label`, found 'x+ "),
            (b"ant/\xff.png\t1", "can't decode byte 0xff in position 4"),
        ],
    )
    def test_wrong_map_line(self, image_zip, line, message):
        map_file, line = image_zip / "train_map.txt", line if isinstance(line, bytes) else line.encode()
        map_file.write_bytes(b"ant/0.png\t0\r\n\n" + line + b"\n")
        with pytest.raises(ValueError, match=message) as error:
            ZipSource(image_zip, "train")
        assert f"{map_file}, line 3" in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000

    def test_labels_may_have_gaps(self, image_zip):
        """As in a part of ImageNet; up to a thousand classes, and ten for each one that has images."""
        map_file = image_zip / "train_map.txt"
        map_file.write_text("ant/0.png\t999\nant/1.png\t 7 \n")
        source = ZipSource(image_zip, "train")
        assert (source.labels.tolist(), len(source.classes)) == ([999, 7], 1000)

    def test_more_classes_need_more_images(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
            for number in range(200):
                archive.writestr(f"{number}.png", "")
        lines = [f"{number}.png\t{number}\n" for number in range(199)]
        for largest, accepted in ((1999, True), (2000, False)):
            (tmp_path / "val_map.txt").write_text("".join([*lines, f"199.png\t{largest}\n"]))
            if accepted:
                assert len(ZipSource(tmp_path, "val").classes) == 2000
            else:
                with pytest.raises(
                    ValueError, match=r"val_map\.txt, line 200: with the label 2000 there would be 2001"
                ):
                    ZipSource(tmp_path, "val")

    def test_val_has_the_classes_of_train(self, image_zip):
        """But train not those of val: a label that no training image has is an error of the task."""
        for split, largest in (("train", 7), ("val", 5)):
            (image_zip / f"{split}_map.txt").write_text(f"ant/0.png\t{largest}\n")
        for split, count in (("train", 8), ("val", 8), ("whole", 8)):
            assert ZipSource(image_zip, split).classes == [str(label) for label in range(count)]
        (image_zip / "val_map.txt").write_text("ant/0.png\t9\n")
        for split, count in (("train", 8), ("val", 10), ("whole", 8)):
            assert len(ZipSource(image_zip, split).classes) == count

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

    def test_bytes_that_only_look_like_a_zip(self, image_zip):
        """Whatever is damaged: the file is named, or an entry, or nothing is wrong with what is read."""
        archive, rng = image_zip / "train.zip", random.Random(0)
        content = archive.read_bytes()
        directory = content.index(b"PK\x01\x02")
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 4))):
                damaged[rng.randrange(directory if rng.random() < 0.8 else 0, len(damaged))] = rng.randrange(256)
            archive.write_bytes(damaged[: len(damaged) - (rng.randrange(200) if rng.random() < 0.2 else 0)])
            try:
                source = ZipSource(image_zip, "train", cache_mode="no")
            except ValueError as error:
                assert str(image_zip / "train") in str(error)  # noqa: PT017
                continue
            for index in range(12):
                with contextlib.suppress(OSError, ValueError):
                    source.load(index)

    @pytest.mark.parametrize("declared", [None, 100])
    def test_an_entry_that_unpacks_to_gigabytes(self, image_zip, declared, monkeypatch):
        """It is refused by what it declares, and never unpacked beyond that; for the test, 10 MB are too many."""
        monkeypatch.setattr(zipped, "MAX_BYTES", 10_000_000)
        with zipfile.ZipFile(image_zip / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.png", bytes(200_000_000))
        (image_zip / "train_map.txt").write_text("bomb.png\t0\n")
        if declared:
            content = (image_zip / "train.zip").read_bytes()
            size, lie = struct.pack("<I", 200_000_000), struct.pack("<I", declared)
            assert content.count(size) == 2
            (image_zip / "train.zip").write_bytes(content.replace(size, lie))
        source = ZipSource(image_zip, "train", cache_mode="full")
        tracemalloc.start()
        with pytest.raises(
            ValueError, match="damaged zip entry" if declared else "200000000 bytes unpacked are no image"
        ):
            source.load(0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 5_000_000

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compression_is_refused_by_name(self, image_zip, image_folder, method):
        with zipfile.ZipFile(image_zip / "train.zip", "w", method) as archive:
            archive.write(image_folder / "train/ant/0.png", "ant/0.png")
        (image_zip / "train_map.txt").write_text("ant/0.png\t0\n")
        with pytest.raises(ValueError, match=f"compression method {method}: pack the images stored or deflated"):
            ZipSource(image_zip, "train").load(0)

    def test_odd_names_are_found_and_shown_escaped(self, image_zip, image_folder):
        names = ["\x1b[2J.png", "\u202egnp.png", "a\rb.png", " .png", "\u00e9.png"]
        with zipfile.ZipFile(image_zip / "train.zip", "w") as archive:
            for name in names:
                archive.write(image_folder / "train/ant/0.png", name)
        (image_zip / "train_map.txt").write_bytes("".join(f"{name}\t0\n" for name in names).encode())
        source = ZipSource(image_zip, "train")
        for index in range(len(names)):
            assert source.load(index)[0].size == (40, 30)
            assert source.locate(index).isprintable()

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
