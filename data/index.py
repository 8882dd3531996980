"""What a scan of an image folder found, saved in the user's cache folder for as long as no folder in it changes.

To list 1.28 million files takes seconds on a local disk and minutes on others; to ask a thousand folders whether they
have changed takes milliseconds. The entries of a folder cannot change without its times: the saved index has those of
every folder, and is read only if all of them still hold.
"""

import fcntl
import hashlib
import logging
import os
import platform
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils.files import cache_folder
from utils.log import NAME
from utils.text import printable

from .decode import EXTENSIONS
from .sources import PackedStrings

FORMAT = (
    "image folder 1"  # to be raised when a scan would find something else in the same folder, or saves it otherwise
)
MANY = 10_000  # images from which on an index is worth its file
GRANULARITY_S = 2.0  # of the times of a file system, at most
PATIENCE_S = 600.0  # how long a process waits for another one's scan of the same folder

State = tuple[int, int, int]  # of a folder: inode, nanoseconds of the last change of its entries and of its status
NOWHERE = (0, 0, 0)  # the state of what a broken link points to


class Listing(NamedTuple):
    """The images of an image folder, and what they depend on."""

    paths: PackedStrings  # of the images, relative to the folder, class by class
    counts: np.ndarray  # int64 (classes,), images of each class
    places: PackedStrings  # every folder that was read, relative to the folder, and links that may become one
    states: np.ndarray  # uint64 (places, 3), of each before it was read


def state(status: os.stat_result) -> State:
    """Returns the state of a folder.

    The time of the last change of status counts as well: programs set that of the entries back to an older one, as
    `tar` and `rsync` do for what they have unpacked. The device does not count: network file systems number theirs
    anew on each machine.
    """
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def state_of(path: str | Path) -> State:
    """Returns the state of a folder, also by a link that leads to it; `NOWHERE` if there is none."""
    try:
        return state(os.stat(path))
    except OSError:
        return NOWHERE


def packed_states(states: Iterable[State]) -> np.ndarray:
    """Returns states as uint64 (N, 3)."""
    return np.array([[number % 2**64 for number in state] for state in states], dtype=np.uint64).reshape(-1, 3)


def find_listing(folder: Path, classes: Sequence[str], scan: Callable[[], Listing]) -> Listing:
    """Returns what `scan` would find in a folder with these classes: from its saved index, or by a scan, then saved.

    The arrays of a saved index are mapped into memory, so that the processes of a machine share them. Of several that
    start at once one scans, while the others wait. Where the cache can't be used, each scans, and the log says why.
    """
    asked = time.time_ns()
    try:
        file = cache_folder() / f"{_digest(str(folder.resolve()), str(state_of(folder)[0]))[:32]}.safetensors"
    except ValueError:  # there is no home folder
        return scan()
    fingerprint = _digest(FORMAT, str(folder.resolve()), *EXTENSIONS, *classes)
    listing = _current(file, fingerprint, folder, asked)
    if listing is None:
        with _alone(file):
            listing = _current(file, fingerprint, folder, asked) or _scan_and_save(file, fingerprint, folder, scan)
    return listing


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Lets the processes of a machine enter one after the other; all at once where no lock can be had."""
    path = file.with_name(f"{file.stem}.{platform.node()}.lock")
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if _locked(stack.enter_context(path.open("w"))):
                stack.callback(path.unlink, missing_ok=True)
        yield


def _locked(file: IO[str]) -> bool:
    """Waits for the lock of a file, but not for ever: the process that has it may have been stopped."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def _current(file: Path, fingerprint: str, folder: Path, asked: int) -> Listing | None:
    """Returns the saved listing if a scan would find the same; None if not, and if none is saved or it is damaged.

    What has changed shortly before a scan may change again without another time. That does not count for an index that
    was made after it was `asked` for, by a process that started together with this one.
    """
    try:
        with safe_open(file, framework="pt") as saved:  # maps the file; as NumPy arrays it would copy them
            about = saved.metadata() or {}
            if about.get("fingerprint") != fingerprint:
                return None
            arrays = {name: saved.get_tensor(name).numpy() for name in saved.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return None
    if about.get("checksum") != checksum(arrays):
        return None
    paths = PackedStrings.of(arrays["paths"], arrays["path_ends"])
    places = PackedStrings.of(arrays["places"], arrays["place_ends"])
    scanned, states = int(arrays["scanned"][0]), arrays["states"]
    if not np.array_equal(packed_states(state_of(f"{folder}/{place}") for place in places), states):
        return None
    settled = bool((states[:, 2] < scanned - int(GRANULARITY_S * 1e9)).all())
    return Listing(paths, arrays["counts"], places, states) if settled or scanned >= asked else None


def _scan_and_save(file: Path, fingerprint: str, folder: Path, scan: Callable[[], Listing]) -> Listing:
    scanned = time.time_ns()
    listing = scan()
    if len(listing.paths) < MANY:
        return listing
    arrays: dict[str, np.ndarray] = {
        "paths": listing.paths.content,
        "path_ends": listing.paths.ends,
        "counts": listing.counts,
        "places": listing.places.content,
        "place_ends": listing.places.ends,
        "states": listing.states,
        "scanned": np.array([scanned], dtype=np.uint64),
    }
    about = {"fingerprint": fingerprint, "checksum": checksum(arrays), "folder": printable(folder)}
    try:
        _write(file, arrays, about)
    except (OSError, SafetensorError) as error:
        logging.getLogger(NAME).info(f"the index of {printable(folder)} can't be saved, and is made anew: {error}")
    return listing


def _write(file: Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Writes a file under another name, and renames it: who reads the older one meanwhile goes on reading that."""
    for leftover in file.parent.glob(f".{file.name}.*"):  # of a killed process
        leftover.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        save_file(arrays, temporary, metadata=about)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the CRC-32 of arrays with their names, types and shapes."""
    total = 0
    for name, array in sorted(arrays.items()):
        total = zlib.crc32(array.data, zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total))
    return str(total)
