"""Data sets by name: those of torchvision, of the Hugging Face hub and of TensorFlow Datasets."""

import importlib.util
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from named_sets import WRITERS
from PIL import Image
from settings import settings
from torchvision import datasets

from data import DATASETS, EncodedSource, build_eval_loader, eval_transform, open_source, spec_of
from data.readers import HfdsSource, part_of
from data.torchvision_sets import NAMED_SETS, open_torchvision


def test_every_set_has_files_to_test_it_with():
    assert {*WRITERS, "CIFAR10", "CIFAR100"} == set(NAMED_SETS)
    assert {f"torchvision/{name}" for name in NAMED_SETS} <= set(DATASETS)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_are_those_of_torchvision(name, part, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    arguments = getattr(NAMED_SETS[name], part)
    if arguments is None:
        return  # it has one part alone
    source = open_torchvision(name, tmp_path, part)
    expected = getattr(datasets, name)(tmp_path, **arguments)
    pairs = [(image.convert("RGB").tobytes(), int(label)) for image, label in expected]
    found = [(image.tobytes(), label) for image, label in map(source.load, range(len(source)))]
    assert len(set(pairs)) == len(pairs)
    assert sorted(found) == sorted(pairs)
    if not isinstance(source, EncodedSource):
        assert found == pairs
    assert source.labels.max() < len(source.classes)
    assert len(set(source.classes)) == len(source.classes)
    assert all(isinstance(name, str) for name in source.classes)


@pytest.mark.parametrize("name", ["SUN397", "INaturalist", "Flowers102"])
def test_files_are_in_the_order_of_their_names(name, tmp_path, monkeypatch):
    """Some of torchvision's are in that of the file system, which another machine does not have."""
    WRITERS[name](tmp_path, monkeypatch)
    source = open_torchvision(name, tmp_path, "train")
    names = [source.name(index) for index in range(len(source))]
    assert names == sorted(names)
    assert not names[0].startswith("/")


def test_what_names_and_counts_mean(tmp_path, monkeypatch):
    WRITERS["Imagenette"](tmp_path, monkeypatch)
    WRITERS["GTSRB"](tmp_path, monkeypatch)
    WRITERS["SVHN"](tmp_path, monkeypatch)
    assert open_torchvision("Imagenette", tmp_path, "val").classes == ["tench", "English springer"]
    assert open_torchvision("GTSRB", tmp_path, "train").classes == [str(label) for label in range(43)]
    svhn = open_torchvision("SVHN", tmp_path, "val")
    assert (svhn.classes, svhn.locate(2)) == ([str(label) for label in range(10)], "SVHN val image 2")


@pytest.mark.parametrize("name", NAMED_SETS)
def test_missing_files_are_one_line_and_leave_nothing(name, tmp_path):
    with pytest.raises(
        ValueError, match=r"is missing or damaged in .*set DATA.DATA_PATH to .*DATA.DOWNLOAD True"
    ) as error:
        open_torchvision(name, tmp_path / "nowhere", "train")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["torchvision/EuroSAT", "torchvision/Caltech101"])
def test_a_set_of_one_part_must_be_divided(name, tmp_path, monkeypatch):
    WRITERS[name.partition("/")[2]](tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"^{name} has no images to evaluate on: set DATA.VAL_FRACTION, such as 0.1"):
        open_source(settings(f"DATA.DATASET {name} DATA.DATA_PATH {tmp_path}").DATA, "train")


def test_statistics_are_those_of_imagenet_unless_others_are_usual():
    imagenet, mnist = DATASETS["imagenet"], DATASETS["torchvision/MNIST"]
    assert (mnist.mean, mnist.std) == ((0.1307,) * 3, (0.3081,) * 3)
    assert DATASETS["torchvision/CIFAR10"] is DATASETS["cf10"]
    assert DATASETS["torchvision/CIFAR100"] is DATASETS["cf100"]
    assert spec_of("torchvision/Food101").mean == spec_of("hfds/any").mean == imagenet.mean


def test_a_download_is_made_once(tmp_path, monkeypatch):
    """By the first process, after which all of them read the files."""
    asked = []

    class Fetched(datasets.MNIST):
        def download(self):
            asked.append(Path(self.root))
            WRITERS["MNIST"](Path(self.root), monkeypatch)

    Fetched.__name__ = "MNIST"
    monkeypatch.setattr(datasets, "MNIST", Fetched)
    cfg = settings(f"DATA.DATASET torchvision/MNIST DATA.DATA_PATH {tmp_path}/new DATA.DOWNLOAD True").DATA
    assert len(open_source(cfg, "val", rank=1, world_size=2)) == 4
    assert asked == [tmp_path / "new"]


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        """No network, and a cache of its own."""
        package = pytest.importorskip("datasets", reason="the extra hfds is not installed")
        monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")

        connect = socket.socket.connect

        def refuse(self: socket.socket, address: object) -> None:
            assert self.family == socket.AF_UNIX, "the network was used"
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", refuse)
        package.disable_progress_bars()

    @pytest.fixture
    def parquet(self, image_folder, tmp_path):
        """The images of `image_folder` as parquet files, whose labels have names."""
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
        )
        for split, name in (("train", "train"), ("val", "validation")):
            paths = sorted((image_folder / split).rglob("*.png"))
            rows = {
                "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
                "label": [path.parent.name for path in paths],
            }
            table = datasets.Dataset.from_dict(rows, features=features)
            (tmp_path / "hub/owner/pets").mkdir(parents=True, exist_ok=True)
            table.to_parquet(tmp_path / f"hub/owner/pets/{name}-00000-of-00001.parquet")
        return f"DATA.DATASET hfds/owner/pets DATA.DATA_PATH {tmp_path}/hub DATA.BATCH_SIZE 4"

    def test_parquet(self, parquet, image_folder):
        cfg, folder = settings(parquet).DATA, settings(f"DATA.DATA_PATH {image_folder}").DATA
        for split in ("train", "val"):
            source, expected = open_source(cfg, split), open_source(folder, split)
            assert isinstance(source, HfdsSource)
            assert source.classes == expected.classes
            assert source.labels.tolist() == expected.labels.tolist()
            received = pickle.loads(pickle.dumps(source))
            for index in range(len(expected)):
                assert received.load(index)[0].tobytes() == expected.load(index)[0].tobytes()
        assert source.locate(3) == "owner/pets validation image 3"

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_evaluation_loads_each_image_once(self, parquet, num_workers):
        cfg = settings(f"{parquet} DATA.NUM_WORKERS {num_workers} DATA.PIN_MEMORY False").DATA
        source, seen = open_source(cfg, "val"), []
        for rank in range(2):
            for batch in build_eval_loader(source, eval_transform((8, 8)), cfg, rank=rank, world_size=2):
                assert torch.equal(batch.labels, torch.from_numpy(source.labels)[batch.indices])
                seen += batch.indices.tolist()
        assert sorted(seen) == list(range(6))

    def test_an_image_folder_and_a_division(self, image_folder):
        root = image_folder.parent
        (image_folder / "val").rename(root / "away")
        opts = f"DATA.DATASET hfds/folder DATA.DATA_PATH {root}"
        with pytest.raises(ValueError, match=r"hfds/folder has the parts train and none of validation, .*VAL_FRACTION"):
            open_source(settings(opts).DATA, "val")
        train, val = (open_source(settings(f"{opts} DATA.VAL_FRACTION 0.25").DATA, split) for split in ("train", "val"))
        assert (len(train), len(val), val.classes) == (9, 3, ["ant", "bee", "cat"])

    def test_other_columns(self, tmp_path):
        import datasets

        (tmp_path / "texts").mkdir()
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "texts/train.parquet")
        with pytest.raises(ValueError, match=r"hfds/texts can't be read .* the column image is missing") as error:
            HfdsSource("texts", tmp_path, "train")
        assert "\n" not in str(error.value)

    def test_the_network_is_only_used_for_a_download(self, tmp_path):
        with pytest.raises(ValueError, match=r"there is no folder .*owner/pets: .* or set DATA.DOWNLOAD True"):
            HfdsSource("owner/pets", tmp_path, "train")


def test_parts_of_other_names():
    assert part_of(["train", "test"], "val", "a") == "test"
    assert part_of(["train", "test", "validation"], "val", "a") == "validation"
    assert part_of(["train", "test"], "train", "a") == part_of(["train"], "whole", "a") == "train"
    with pytest.raises(ValueError, match=r"a has the parts test and none of train"):
        part_of(["test"], "train", "a")


def test_tensorflow_datasets_is_an_extra(tmp_path):
    if importlib.util.find_spec("tensorflow_datasets"):
        pytest.skip("the extra tfds is installed")
    with pytest.raises(ValueError, match=r"tfds/mnist needs the extra `tfds`: pip install tensorflow-datasets"):
        open_source(settings(f"DATA.DATASET tfds/mnist DATA.DATA_PATH {tmp_path}").DATA, "train")


@pytest.mark.parametrize("name", ["wds/imagenet", "hfids/imagenet"])
def test_streams_are_no_data_sets(name):
    """They have no exact length, and no position to resume from."""
    with pytest.raises(ValueError, match=f"DATA.DATASET = '{name}' .*: must be one of imagenet"):
        settings(f"DATA.DATASET {name}")


def test_tensorflow_datasets_are_read_by_position(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["ant", "bee"])
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for number in range(count):
                Image.fromarray(np.full((8, 6, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
                yield number, {"image": str(tmp_path / f"{number}.png"), "label": number % 2}

    Tiny(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    cfg = settings(f"DATA.DATASET tfds/tiny DATA.DATA_PATH {tmp_path}/tfds").DATA
    train, val = open_source(cfg, "train"), open_source(cfg, "val")
    assert (len(train), len(val), train.classes) == (10, 4, ["ant", "bee"])
    loaded = [train.load(index) for index in range(10)]
    assert sorted(image.getpixel((0, 0))[0] for image, _ in loaded) == list(range(10))
    assert all(image.getpixel((0, 0))[0] % 2 == label for image, label in loaded)
