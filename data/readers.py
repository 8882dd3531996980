"""Data sets of the Hugging Face hub (`hfds/NAME`) and of TensorFlow Datasets (`tfds/NAME`), which are extras.

Both are read by position, so that an epoch, an evaluation and the position of a resumed run are as exact as for files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers import create_reader

from utils.files import user_path
from utils.text import printable, shortened

from .labels import number_labels
from .sources import SPLITS, WHOLE, EncodedSource, stored_split

# What a data set may call the part to evaluate on; the first one that it has.
VALIDATION = ("validation", "val", "valid", "test")
IMAGE, LABEL = "image", "label"  # the columns


class HfdsSource(EncodedSource):
    """A data set of the Hugging Face hub, read by timm, with the columns `image` and `label`.

    It is the local folder `root/name` where there is one, else that of the hub, which is downloaded to `root` and is
    read from there the next time; this needs `download`.

    Raises ValueError where the package datasets is missing, where the network would be needed without `download`, and
    where the data set has no such part or columns.
    """

    def __init__(self, name: str, root: str | Path, split: str, *, download: bool = False) -> None:
        assert split in (*SPLITS, WHOLE)
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"hfds/{name} needs the extra `hfds`: pip install datasets") from error
        local = user_path(root) / name
        if not local.is_dir() and not download:
            raise ValueError(
                f"there is no folder {local}: put the files of the data set there, or set DATA.DOWNLOAD True to take "
                f"{name} from the hub"
            )
        place = str(local) if local.is_dir() else name
        try:
            part = part_of(datasets.get_dataset_split_names(place), split, f"hfds/{name}")
            cache = None if local.is_dir() else str(user_path(root))
            self._reader = create_reader(f"hfds/{place}", cache, part, input_key=IMAGE, target_key=LABEL)
            table = self._reader.dataset.data
            if table.column(IMAGE).null_count == len(table):  # the reader adds the column where there is none
                raise ValueError(f"the column {IMAGE} is missing or empty, of {', '.join(table.column_names)}")
            column: Sequence[Any] = self._reader.dataset[LABEL]
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise _unreadable(f"hfds/{name}", root, error) from error
        self._title = f"{name} {part}"
        self.classes = list(self._reader.class_to_idx)
        if self.classes:
            self.labels = np.array(column, dtype=np.int64)
        else:  # plain numbers or names
            self.labels, self.classes = number_labels([str(label) for label in column], self._title, self.locate)

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        with self._reader[index][0] as file:
            return file.read()

    def locate(self, index: int) -> str:
        """Returns the number of the image in its part of the data set."""
        return printable(f"{self._title} image {index}")


class TfdsSource(EncodedSource):
    """A data set of TensorFlow Datasets in `root`, with the features `image` and `label`, stored as ArrayRecord.

    It is read by the library's own random access, which needs no TensorFlow: timm's reader goes through the images in
    the order of the files, and has no position to resume from. Opening it reads all records for their labels.

    Raises ValueError where the package tensorflow_datasets is missing, or what is read, which `download` prepares.
    """

    def __init__(self, name: str, root: str | Path, split: str, *, download: bool = False) -> None:
        assert split in (*SPLITS, WHOLE)
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"tfds/{name} needs the extra `tfds`: pip install tensorflow-datasets array-record"
            ) from error
        try:
            builder = tfds.builder(name, data_dir=str(user_path(root)), file_format="array_record")
            if download:
                builder.download_and_prepare()
            part = part_of(list(builder.info.splits), split, f"tfds/{name}")
            self._records = builder.as_data_source(split=part, decoders={IMAGE: tfds.decode.SkipDecoding()})
            feature = builder.info.features[LABEL]
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, AssertionError) as error:
            raise _unreadable(f"tfds/{name}", root, error) from error
        self._title = f"{name} {part}"
        self.classes = [feature.int2str(label) for label in range(feature.num_classes)]
        self.labels = np.array([self._records[index][LABEL] for index in range(len(self._records))], dtype=np.int64)

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        return self._records[index][IMAGE]

    def locate(self, index: int) -> str:
        """Returns the number of the image in its part of the data set."""
        return printable(f"{self._title} image {index}")


def _unreadable(name: str, root: str | Path, error: Exception) -> ValueError:
    reason = shortened(" ".join(str(error).split()))
    return ValueError(
        f"{name} can't be read as images with labels in {root}, where DATA.DOWNLOAD True puts it: {reason}"
    )


def part_of(parts: Sequence[str], split: str, name: str) -> str:
    """Returns what a data set calls a split; raises ValueError where it has none."""
    wanted = VALIDATION if split == "val" else (stored_split(split),)
    found = [part for part in wanted if part in parts]
    if not found:
        raise ValueError(
            f"{name} has the parts {', '.join(parts)} and none of {', '.join(wanted)}: set DATA.VAL_FRACTION or "
            "DATA.FOLDS to divide its training images"
        )
    return found[0]


READERS: dict[str, Callable[..., EncodedSource]] = {"hfds": HfdsSource, "tfds": TfdsSource}
