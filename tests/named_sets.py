"""A few images of the data sets that torchvision knows by name, in the files in which their authors publish them."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

IMAGES = 4  # of each class and part


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    """Writes a noisy image of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def folders(root: Path, classes: Iterator[str] | tuple[str, ...], name: str = "{}.jpg", size: tuple = (40, 30)) -> None:
    """Writes a folder of images for each class."""
    for label, folder in enumerate(classes):
        for number in range(IMAGES):
            draw(root / folder / name.format(number + 1), 10 * label + number, size)


def mnist(root: Path, _: pytest.MonkeyPatch, name: str = "MNIST") -> None:
    folder, rng = root / name / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rng = root / "stl10_binary", np.random.default_rng(0)
    folder.mkdir(parents=True)
    write(folder / "class_names.txt", "".join(f"class {label}\n" for label in range(10)))
    sums = {}
    for part, count in (("train", 8), ("test", 4), ("unlabeled", 1)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        rng.integers(1, 11, count, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
        sums |= {name: md5(folder / name) for name in (f"{part}_X.bin", f"{part}_y.bin")}
    for files in ("train_list", "test_list"):
        known = getattr(datasets.STL10, files)
        monkeypatch.setattr(datasets.STL10, files, [[name, sums[name]] for name, _ in known])


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    rng, known = np.random.default_rng(0), dict(datasets.SVHN.split_list)
    for part, count in (("train", 8), ("test", 4)):
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        url, name, _ = known[part]
        savemat(root / name, {"X": pixels, "y": rng.integers(1, 11, (count, 1), dtype=np.uint8)})
        known[part] = [url, name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)


def flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number in range(1, 13):
        draw(folder / f"jpg/image_{number:05}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 102] * 4]})
    savemat(folder / "setid.mat", {"trnid": [range(1, 7)], "valid": [range(7, 10)], "tstid": [range(10, 13)]})
    known = datasets.Flowers102._file_dict
    sums = {key: (name, md5(folder / name)) for key, (name, _) in known.items() if key != "image"}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {**known, **sums})


def dtd(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "dtd/dtd/images", ("banded", "dotted"))
    for part, numbers in (("train", (1, 3)), ("val", (2,))):
        lines = [f"{name}/{number}.jpg\n" for name in ("banded", "dotted") for number in numbers]
        write(root / f"dtd/dtd/labels/{part}1.txt", "".join(lines))


def aircraft(root: Path, _: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    write(folder / "variants.txt", "707-320\nCessna 172\n")
    folders(folder, ("images",), "{:07}.jpg")
    write(folder / "images_variant_train.txt", "".join(f"{n:07} Cessna 172\n" for n in range(1, 5)))
    write(folder / "images_variant_val.txt", "0000003 707-320\n0000004 Cessna 172\n")


def sst2(root: Path, _: pytest.MonkeyPatch) -> None:
    for part in ("train", "valid"):
        folders(root / "rendered-sst2" / part, ("negative", "positive"), "{}.png")


def imagenette(root: Path, _: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        folders(root / "imagenette2" / part, ("n01440764", "n02102040"), "{}.jpeg")


def food(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "food-101/images", ("waffles", "tacos"))
    for part, numbers in (("train", (1, 3)), ("test", (2, 4))):
        names = {name: [f"{name}/{number}" for number in numbers] for name in ("waffles", "tacos")}
        write(root / f"food-101/meta/{part}.json", json.dumps(names))


def cars(root: Path, _: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    folders(folder, ("cars_train", "cars_test"))
    dtype = [("fname", object), ("class", object)]
    rows = np.array([(f"{number}.jpg", 1 + number % 2) for number in range(1, IMAGES + 1)], dtype=dtype)
    (folder / "devkit").mkdir()
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "Fiat"], dtype=object)})
    for name in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        savemat(folder / name, {"annotations": rows})


def gtsrb(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "gtsrb/GTSRB/Training", ("00000", "00001"), "{}.ppm")
    folders(root / "gtsrb/GTSRB/Final_Test", ("Images",), "{}.ppm")
    rows = "".join(f"{number}.ppm;40;30;5;5;9;9;42\n" for number in range(1, IMAGES + 1))
    write(root / "gtsrb/GT-final_test.csv", f"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n{rows}")


def pets(root: Path, _: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    for label, name in enumerate(("Abyssinian", "american_bulldog")):
        for number in range(1, 1 + IMAGES):
            draw(folder / f"images/{name}_{number}.jpg", 10 * label + number)
    for part, numbers in (("trainval", (1, 3)), ("test", (2, 4))):
        rows = [f"Abyssinian_{n} 1 1 1\namerican_bulldog_{n} 2 2 1\n" for n in numbers]
        write(folder / f"annotations/{part}.txt", "".join(rows))


def countries(root: Path, _: pytest.MonkeyPatch) -> None:
    for part in ("train", "valid"):
        folders(root / "country211" / part, ("AD", "ZW"))


def inaturalist(root: Path, _: pytest.MonkeyPatch) -> None:
    for part in ("2021_train", "2021_valid"):
        folders(root / part, ("00000_a_b_c_d_e_f_g", "00001_a_b_c_d_e_f_h"))


def eurosat(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "eurosat/2750", ("Forest", "River"), size=(64, 64))


def sun397(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "SUN397", ("a/abbey", "b/bar/indoor"), "sun_{}.jpg")
    write(root / "SUN397/ClassName.txt", "/a/abbey\n/b/bar/indoor\n")


def caltech101(root: Path, _: pytest.MonkeyPatch) -> None:
    folders(root / "caltech101/101_ObjectCategories", ("BACKGROUND_Google", "Faces", "ant"), "image_{:04}.jpg")


def caltech256(root: Path, _: pytest.MonkeyPatch) -> None:
    for label, name in enumerate(("001.ak47", "002.american-flag"), start=1):
        folders(root / "caltech256/256_ObjectCategories", (name,), f"{label:03}_{{:04}}.jpg")


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "MNIST": mnist,
    "FashionMNIST": lambda root, patch: mnist(root, patch, "FashionMNIST"),
    "KMNIST": lambda root, patch: mnist(root, patch, "KMNIST"),
    "STL10": stl10,
    "SVHN": svhn,
    "Flowers102": flowers,
    "DTD": dtd,
    "FGVCAircraft": aircraft,
    "RenderedSST2": sst2,
    "Imagenette": imagenette,
    "Food101": food,
    "StanfordCars": cars,
    "GTSRB": gtsrb,
    "OxfordIIITPet": pets,
    "Country211": countries,
    "INaturalist": inaturalist,
    "EuroSAT": eurosat,
    "SUN397": sun397,
    "Caltech101": caltech101,
    "Caltech256": caltech256,
}
