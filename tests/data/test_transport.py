"""Batches on their way between processes, where the system has too little for them."""

import multiprocessing
import os
import resource
import sys

import pytest
import torch
from PIL import Image
from settings import settings

from data import Batch, DigitsSource, build_eval_loader, eval_transform
from data.transport import REFUSALS, Failure, Parcel, check_room, with_remedy


def batch() -> Batch:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    return Batch(images, torch.tensor([3, 4]), torch.tensor([7, 8]), ["a.png: no image"])


def send(connection) -> None:
    connection.send(Parcel(batch()))
    connection.recv()  # whether it has arrived


def test_a_batch_arrives_as_it_was_sent():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=send, args=(there,))
    process.start()
    received = here.recv().open()
    here.send(None)
    process.join()
    assert type(received) is Batch
    assert all(torch.equal(a, b) for a, b in zip(received[:3], batch()[:3], strict=True))
    assert all(tensor.is_shared() for tensor in received[:3])
    assert received.unreadable == batch().unreadable


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(24, "Too many open files"), 24),
        (OSError(28, "No space left on device"), 28),
        (RuntimeError("unable to write to file </torch_17_9_0>: No space left on device (28)"), 28),
        (RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"), 24),
        (RuntimeError("unable to mmap 128 bytes from file </torch_1>: Cannot allocate memory (12)"), 12),
        (RuntimeError("received 0 items of ancdata"), 24),
    ],
)
def test_a_refusal_comes_with_the_remedy(error, number):
    with pytest.raises(OSError, match=r": .*DATA\.NUM_WORKERS") as caught, with_remedy():
        raise error
    assert str(caught.value) == REFUSALS[number]


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), RuntimeError("sizes (28) and (24) differ"), ValueError("(28)")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, with_remedy():
        raise error
    assert caught.value is error


def test_a_failure_keeps_what_a_user_is_to_see():
    assert Failure.of(FileNotFoundError(2, "No such file", "a")) == (OSError, "[Errno 2] No such file: 'a'")
    assert Failure.of(UnicodeError("b")) == (ValueError, "b")


class Pinnable:
    """A batch that needs no GPU to be moved to page-locked memory."""

    def pin_memory(self) -> str:
        return "pinned"


def without_files() -> None:
    raise OSError(24, "Too many open files")


class Unopenable(Pinnable):
    def __reduce__(self):
        return without_files, ()


def test_a_parcel_is_opened_and_pinned_or_says_why_not():
    """torch would make a long text of an error in the thread that does it."""
    assert Parcel(Pinnable()).pin_memory() == "pinned"
    assert Parcel(Unopenable()).pin_memory() == Failure(OSError, REFUSALS[24])
    with pytest.raises(OSError, match="^too many open files"):
        Parcel(Unopenable()).open()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_pinned_and_mistakes_are_in_their_own_words(num_workers):
    cfg = settings(f"DATA.BATCH_SIZE 16 DATA.NUM_WORKERS {num_workers} DATA.PIN_MEMORY True").DATA
    found = next(iter(build_eval_loader(DigitsSource("val"), eval_transform((8, 8)), cfg)))
    assert all(tensor.is_pinned() for tensor in found[:3])
    with pytest.raises(OSError, match=r"^16 images in a row cannot be read, the first being digits image 4: torn$"):
        next(iter(build_eval_loader(Torn("val"), eval_transform((8, 8)), cfg)))


class Torn(DigitsSource):
    def _image(self, index: int) -> Image.Image:
        raise ValueError("torn")


def load_with(more: int) -> None:
    """Loads an epoch where so many more files may be opened; says by the exit status how it ended."""
    cfg = settings("DATA.BATCH_SIZE 16 DATA.NUM_WORKERS 2 DATA.PIN_MEMORY False").DATA
    loader = build_eval_loader(DigitsSource("val"), eval_transform((8, 8)), cfg)
    limit = len(os.listdir("/proc/self/fd")) + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        complete = sum(len(found.labels) for found in loader) == 359
    except OSError as error:
        os._exit(24 if str(error) == REFUSALS[24] else 1)
    os._exit(0 if complete else 1)


def test_too_few_open_files_are_an_error_and_no_wait():
    """With every limit it either works or ends in the one line; without a check some make the run wait for ever."""
    statuses = []
    for more in (0, 5, 15, 25, 33, 40, 60):
        process = multiprocessing.get_context("fork").Process(target=load_with, args=(more,))
        process.start()
        process.join(60)
        assert process.exitcode is not None, f"still waiting where {more} more files may be opened"
        statuses.append(process.exitcode)
    assert statuses == [24, 24, 24, 24, 24, 0, 0]


def test_room_is_checked_before_anything_is_started():
    check_room(1)
    with pytest.raises(OSError, match="^too many open files: raise the limit"):
        check_room(sys.maxsize)
