import errno
import multiprocessing
import os
import random
import re
import signal
import threading

import pytest
import torch
from PIL import Image
from settings import settings

from data import (
    DigitsSource,
    FolderSource,
    SampleKey,
    Source,
    TransformedDataset,
    build_eval_loader,
    build_train_loader,
    eval_transform,
    train_transform,
)
from data.loaders import MAX_TRIES, Sample, collate
from data.transport import REFUSALS
from utils.seed import local_rng


def fingerprint(loader) -> list[tuple[bytes, list[int], list[int]]]:
    return [(batch.images.numpy().tobytes(), batch.labels.tolist(), batch.indices.tolist()) for batch in loader]


def loading(batch_size: int, num_workers: int = 0, opts: str = ""):
    """Returns the section DATA with these values."""
    return settings(f"DATA.BATCH_SIZE {batch_size} DATA.NUM_WORKERS {num_workers} DATA.PIN_MEMORY False {opts}").DATA


def train_loader(num_workers: int = 0, seed: int = 0, **options):
    transform = train_transform((16, 16), settings("AUG.PRESET raug15").AUG)
    return build_train_loader(DigitsSource("val"), transform, loading(16, num_workers), seed=seed, **options)


def test_batches_do_not_depend_on_the_number_of_workers():
    epochs = []
    for num_workers in (0, 1, 2):
        loader = train_loader(num_workers, seed=5)
        two_epochs = []
        for epoch in (3, 4):
            loader.set_position(epoch)
            two_epochs.append(fingerprint(loader))
        assert two_epochs[0] != two_epochs[1]
        assert len(two_epochs[0]) == len(loader) == 359 // 16
        epochs.append(two_epochs)
    assert epochs[0] == epochs[1] == epochs[2]


def test_images_do_not_depend_on_who_loads_them_and_when():
    """The same image of the same epoch is augmented alike on another rank, and after resuming."""
    alone = train_loader()
    alone.set_position(1)
    expected = {
        index: image for batch in alone for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }
    rank = train_loader(rank=1, world_size=2)
    rank.set_position(1, consumed=64)
    seen = 0
    for batch in rank:
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert torch.equal(image, expected[index])
            seen += 1
    assert seen == (359 - 64) // 32 * 16


def test_an_image_is_augmented_anew_in_each_epoch_and_for_each_seed():
    images = set()
    for seed in range(4):
        transform = train_transform((16, 16), settings("AUG.PRESET weak").AUG)
        dataset = TransformedDataset(DigitsSource("val"), transform, seed)
        images |= {dataset[SampleKey(epoch, 3)].image.numpy().tobytes() for epoch in range(4)}
    assert len(images) == 16


def test_each_repeat_of_an_image_is_augmented_anew_and_the_first_as_ever():
    transform = train_transform((16, 16), settings("AUG.PRESET weak").AUG)
    dataset = TransformedDataset(DigitsSource("val"), transform, 3)
    first, *others = (dataset[SampleKey(1, 3, repeat)] for repeat in range(4))
    assert len({sample.image.numpy().tobytes() for sample in (first, *others)}) == 4
    assert torch.equal(first.image, transform(dataset.source.load(3)[0], local_rng(3, 1, 3, 0)))
    assert [sample.repeat for sample in others] == [1, 2, 3]


@pytest.mark.parametrize("opts", ["DATA.REPEATED_AUG 3", "DATA.SAMPLING balanced DATA.REPEATED_AUG 2"])
def test_sampled_batches_do_not_depend_on_workers_and_position(opts):
    """A batch says which repeats it holds, and each has the same draws wherever it is loaded."""
    transform = train_transform((16, 16), settings("AUG.PRESET weak").AUG)
    seen: list[dict] = []
    for num_workers, consumed in ((0, 0), (1, 0), (0, 128)):
        loader = build_train_loader(DigitsSource("val"), transform, loading(32, num_workers, opts), seed=0)
        loader.set_position(1, consumed)
        assert len(loader) == (359 - consumed) // 32
        images = {}
        for batch in loader:
            keys = zip(batch.indices.tolist(), batch.repeats.tolist(), strict=True)
            images |= {key: image.numpy().tobytes() for key, image in zip(keys, batch.images, strict=True)}
        assert len(images) == len(loader) * 32
        seen.append(images)
    assert seen[0] == seen[1]
    assert seen[2].items() <= seen[0].items()


def test_classes_of_images_that_have_none():
    cfg = loading(4, 0, "DATA.SAMPLING balanced")
    with pytest.raises(ValueError, match=r"DATA\.SAMPLING balances classes.* set it to uniform"):
        build_train_loader(Unlabelled(), eval_transform((8, 8)), cfg, seed=0)


class Unlabelled(Source):
    """Eight black images."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 8

    def load(self, index: int):
        return Image.new("RGB", (8, 8)), torch.zeros(2)

    def locate(self, index: int) -> str:
        return str(index)


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(train_loader()))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_are_written_into_the_batch_that_is_sent(num_workers):
    """By pixels; in shared memory where another process loads them, before they are packed."""
    transform = eval_transform((8, 12))
    loader = build_eval_loader(DigitsSource("val"), transform, loading(7, num_workers), dataset=TellingDataset)
    batch = next(iter(loader))
    assert batch.images.shape == (7, 3, 8, 12)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.unreadable == [f"shared: {bool(num_workers)}"]


class TellingDataset(TransformedDataset):
    """Says of a batch whether it is in shared memory."""

    def _batch(self, keys):
        batch = super()._batch(keys)
        return batch._replace(unreadable=[f"shared: {batch.images.is_shared()}"])


def test_seeds_give_different_batches():
    assert fingerprint(train_loader(seed=0)) != fingerprint(train_loader(seed=1))


def test_labels_belong_to_the_images():
    source = DigitsSource("val")
    batch = next(iter(build_train_loader(source, eval_transform((8, 8)), loading(16), seed=0)))
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
        expected, expected_label = source.load(int(index))
        assert image.permute(1, 2, 0).numpy().tobytes() == expected.tobytes()
        assert label == expected_label


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_each_image_once(world_size):
    source = DigitsSource("val")
    seen = []
    for rank in range(world_size):
        loader = build_eval_loader(source, eval_transform((8, 8)), loading(50), rank=rank, world_size=world_size)
        seen += [index for batch in loader for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(359))


def test_too_few_images():
    with pytest.raises(ValueError, match="lower DATA.BATCH_SIZE"):
        build_train_loader(DigitsSource("val"), eval_transform((8, 8)), loading(180), seed=0, world_size=2)


def test_evaluation_has_a_batch_size_of_its_own():
    source, transform = DigitsSource("val"), eval_transform((8, 8))
    cfg = loading(16, opts="DATA.TEST_BATCH_SIZE 100")
    assert [len(batch.labels) for batch in build_eval_loader(source, transform, cfg)] == [100, 100, 100, 59]
    assert len(next(iter(build_train_loader(source, transform, cfg, seed=0))).labels) == 16


@pytest.mark.parametrize(
    ("opts", "fixed"),
    [
        ("DATA.ZIP_MODE True DATA.CACHE_MODE part", True),
        ("DATA.ZIP_MODE True DATA.CACHE_MODE full", False),
        ("DATA.ZIP_MODE True DATA.CACHE_MODE no", False),
        ("DATA.ZIP_MODE False DATA.CACHE_MODE part", False),
    ],
)
def test_shards_are_fixed_where_each_process_has_a_part_in_memory(opts, fixed):
    place = {"seed": 0, "rank": 1, "world_size": 3}
    loader = build_train_loader(DigitsSource("val"), eval_transform((8, 8)), loading(16, opts=opts), **place)
    indices = [index for batch in loader for index in batch.indices.tolist()]
    assert all(index % 3 == 1 for index in indices) == fixed


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_continues_in_the_middle_of_an_epoch(num_workers):
    loader = train_loader(num_workers)
    loader.set_position(3)
    whole = fingerprint(loader)
    loader.set_position(3, 5 * 16)
    assert fingerprint(loader) == whole[5:]
    assert len(loader) == len(whole) - 5
    loader.set_position(4)
    assert fingerprint(loader)[0] != whole[0]
    with pytest.raises(ValueError, match="cannot resume after 360 images of an epoch of 359"):
        loader.set_position(3, 360)


def test_an_evaluation_has_no_position():
    with pytest.raises(AssertionError):
        build_eval_loader(DigitsSource("val"), eval_transform((8, 8)), loading(16)).set_position(1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_replaced_and_reported(image_folder, num_workers):
    broken = [image_folder / "val" / "ant" / "1.png", image_folder / "val" / "bee" / "0.png"]
    broken[0].write_bytes(b"not an image")
    broken[1].write_bytes(broken[1].read_bytes()[:-100])
    source = FolderSource(image_folder, "val")
    batch = next(iter(build_eval_loader(source, eval_transform((24, 24)), loading(6, num_workers))))
    assert batch.indices.tolist() == [0, 3, 3, 3, 4, 5]
    assert batch.labels.tolist() == [0, 1, 1, 1, 2, 2]
    reported = [message.split(": ")[0] for message in batch.unreadable]
    assert reported == [str(broken[0]), str(broken[1]), str(broken[1])]


def test_replacement_wraps_around(image_folder):
    (image_folder / "val" / "cat" / "1.png").write_bytes(b"")
    loader = build_eval_loader(FolderSource(image_folder, "val"), eval_transform((24, 24)), loading(6))
    assert next(iter(loader)).indices.tolist() == [0, 1, 2, 3, 4, 0]


def test_lost_storage_is_an_error(image_folder):
    source = FolderSource(image_folder, "train")
    for index in range(len(source)):
        os.unlink(source.locate(index))
    with pytest.raises(OSError, match="12 images in a row cannot be read"):
        next(iter(build_eval_loader(source, eval_transform((24, 24)), loading(1))))


def test_number_of_tries_is_bounded(image_folder):
    for number in range(MAX_TRIES + 1):
        (image_folder / "val" / "ant" / f"0{number:02}.png").write_bytes(b"")
    loader = build_eval_loader(FolderSource(image_folder, "val"), eval_transform((24, 24)), loading(1))
    with pytest.raises(OSError, match=f"{MAX_TRIES} images in a row"):
        list(loader)


def threads_in_use(_image: Image.Image, _rng: random.Random) -> torch.Tensor:
    return torch.tensor([[[torch.get_num_threads()]]])


def test_workers_have_one_thread():
    loader = build_eval_loader(DigitsSource("val"), threads_in_use, loading(1, 1))
    assert next(iter(loader)).images.tolist() == [[[[1]]]]


def connection_lost() -> None:
    raise ConnectionResetError("the worker's end is closed")


class Undeliverable(str):
    """Cannot be read from the process that has sent it."""

    def __reduce__(self):
        return connection_lost, ()


class DyingDataset(TransformedDataset):
    """Its process closes its connections and ends a little later, as one does that the system kills."""

    def __getitem__(self, key):
        threading.Timer(0.3, os._exit, [1]).start()
        return super().__getitem__(key)._replace(unreadable=[Undeliverable()])


def test_a_worker_that_dies_while_it_sends_a_batch():
    loader = train_loader(1, dataset=DyingDataset)
    with pytest.raises(OSError, match=r"^a data loading process was killed, .* lower DATA\.NUM_WORKERS \(the worker's"):
        next(iter(loader))


def test_a_worker_that_is_killed_between_two_epochs():
    loader = train_loader(1)
    assert len(fingerprint(loader)) == len(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    with pytest.raises(OSError, match=f"^a data loading process was killed, .*{worker.pid}"):
        next(iter(loader))


class FailingDataset(TransformedDataset):
    def __getitem__(self, key):
        raise RuntimeError("a fault of the transform")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_not_taken_for_its_death(num_workers):
    loader = train_loader(num_workers, dataset=FailingDataset)
    with pytest.raises(RuntimeError, match="a fault of the transform"):
        next(iter(loader))


class RefusingDataset(TransformedDataset):
    """Raises one of the errors that are one line to the user."""

    error: Exception

    def __getitem__(self, key):
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("a mistake, and the remedy"),
        OSError("the storage has gone"),
        FileNotFoundError(2, "No such file or directory", "a.png"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_a_mistake_reaches_the_run_in_its_own_words(num_workers, error):
    loader = train_loader(num_workers, dataset=type("Refusing", (RefusingDataset,), {"error": error}))
    with pytest.raises(type(error) if num_workers == 0 else (OSError, ValueError)) as caught:
        next(iter(loader))
    assert str(caught.value) == str(error)
    assert isinstance(caught.value, OSError) == isinstance(error, OSError)


@pytest.mark.parametrize("error", [TypeError("a defect"), KeyError("a defect"), AssertionError("a defect")])
def test_a_defect_keeps_its_traceback(error):
    loader = train_loader(1, dataset=type("Refusing", (RefusingDataset,), {"error": error}))
    with pytest.raises(type(error), match=r"(?s)in __getitem__.*a defect"):
        next(iter(loader))


def test_a_loader_goes_on_after_a_mistake():
    loader = train_loader(1, dataset=FirstTimeRefusing)
    with pytest.raises(ValueError, match="^not yet$"):
        next(iter(loader))
    assert len(fingerprint(loader)) == len(loader)


class FirstTimeRefusing(TransformedDataset):
    tries = 0

    def __getitem__(self, key):
        self.tries += 1
        if self.tries == 1:
            raise ValueError("not yet")
        return super().__getitem__(key)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_the_system_refuses_is_no_fault_of_an_image(num_workers, number):
    """It is no unreadable image, which another one would replace."""
    loader = build_eval_loader(RefusedSource(number), eval_transform((8, 8)), loading(4, num_workers))
    with pytest.raises(OSError, match=rf"^{re.escape(REFUSALS[number])}$"):
        next(iter(loader))


class RefusedSource(DigitsSource):
    def __init__(self, number: int) -> None:
        super().__init__("val")
        self.number = number

    def _image(self, index: int) -> Image.Image:
        raise OSError(self.number, os.strerror(self.number), "a.png")


def test_a_worker_that_finds_no_shared_memory_for_what_it_has_mapped():
    before = multiprocessing.active_children()  # of tests whose loaders are still there
    loader = train_loader(1)
    next(iter(loader))
    (worker,) = [child for child in multiprocessing.active_children() if child not in before]
    os.kill(worker.pid, signal.SIGBUS)
    worker.join()
    with pytest.raises(OSError, match=r"^the shared memory /dev/shm is full: start the container with --shm-size"):
        list(loader)


def test_images_whose_names_are_odd_are_reported_escaped(image_folder):
    (image_folder / "val" / "ant" / "\x1b[2J\n.png").write_bytes(b"no image")
    loader = build_eval_loader(FolderSource(image_folder, "val"), eval_transform((8, 8)), loading(7))
    (message,) = next(iter(loader)).unreadable
    assert message.startswith(f"{image_folder}/val/ant/\\x1b[2J\\n.png: not an image of a known format")


def test_images_of_different_sizes_are_no_batch():
    samples = [Sample(torch.zeros(3, side, 8, dtype=torch.uint8), 0, side, []) for side in (6, 7, 6)]
    message = "images of 6x8 and 7x8 don't fit into one batch: set DATA.TEST_BATCH_SIZE to 1"
    with pytest.raises(ValueError, match=message):
        collate(samples, 3)
    assert collate(samples[::2], 2).images.shape == (2, 3, 6, 8)
