"""What there is to say of a stored image before anything is trained on it."""

import hashlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import PurePath
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile
from torch.utils.data import Dataset
from yacs.config import CfgNode

from .decode import EXTENSIONS, FORMATS, image_file
from .loaders import build_loader, most_workers
from .pixels import to_pillow
from .samplers import EvalSampler, SampleKey
from .sources import EncodedSource, Source
from .storage import PendingReads, check_folder
from .transport import REFUSALS, Failure, with_remedy

TINY_SIDE, TINY_FILE = 32, 1024  # pixels, bytes
HUGE = 2**25  # pixels: half a second to decode, 100 MB
DIGEST_BYTES = 16  # of SHA-256: two of ten million images share them by chance with a probability of 1e-25
UPRIGHT = 1  # the orientation in EXIF of an image that is stored as it is to be seen
CHUNK = 64  # images that a process inspects at a time


class Remark(NamedTuple):
    """Something to say of one image."""

    kind: str
    detail: str


class Inspection(NamedTuple):
    """An image that was read once.

    Attributes:
        digest: of the bytes of its file, or of its pixels where it is in no file of its own; empty if it is unreadable.
        bytes: the size of the file; 0 where there is none.
        format: of the file, such as `JPEG`; empty where there is none, or an unreadable one.
        mode: of its pixels as they are stored, in Pillow's words: `RGB`, `L` (grey), `P` (palette), `CMYK` ...
        remarks: `unreadable` or `truncated` alone, with the error that a training would meet; or any of `tiny`, `huge`,
            `16 bits`, `CMYK`, `rotated` and `extension` (of another format).
    """

    digest: bytes
    bytes: int
    format: str
    mode: str
    remarks: list[Remark]


def inspect(source: Source, index: int) -> Inspection:
    """Reads and decodes one image; raises OSError where the system refuses memory or files, or a folder is lost."""
    try:
        if isinstance(source, EncodedSource):
            return _inspect_file(source, index)
        image = to_pillow(source.load(index)[0])
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            if error.errno in REFUSALS:
                raise
            check_folder(error)
        return Inspection(b"", 0, "", "", [_failure(error)])
    pixels = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return Inspection(_digest(pixels), 0, "", image.mode, [])


def _inspect_file(source: EncodedSource, index: int) -> Inspection:
    """Reads and decodes an image file; raises OSError or ValueError where that fails."""
    content, extension = source.read(index), PurePath(source.locate(index)).suffix.lower()
    with image_file(BytesIO(content)) as image:
        kind, mode = "JPEG" if image.format == "MPO" else str(image.format), image.mode
        remarks = [*_remarks(image, len(content), kind, extension)]
    source.decoder(content, source.mode)
    return Inspection(_digest(content), len(content), kind, mode, remarks)


def _remarks(image: Image.Image, size: int, kind: str, extension: str) -> Iterator[Remark]:
    """Yields what there is to say of an image that is opened and not decoded yet, whose file has `size` bytes."""
    if min(image.size) < TINY_SIDE or size < TINY_FILE:
        yield Remark("tiny", f"{image.width}x{image.height} pixels, {size} bytes")
    if image.width * image.height > HUGE:
        yield Remark("huge", f"{image.width}x{image.height} pixels")
    if ";16" in _stored_as(image) or image.mode.startswith("I"):
        yield Remark("16 bits", image.mode)
    if image.mode == "CMYK":
        yield Remark("CMYK", "")
    orientation = _orientation(image)
    if orientation != UPRIGHT:
        yield Remark("rotated", f"orientation {orientation}")
    if extension in EXTENSIONS and extension not in FORMATS[kind]:
        yield Remark("extension", f"content is {kind}")


def _stored_as(image: Image.Image) -> str:
    """Returns the raw mode of the pixels in the file, such as `RGB;16B`; empty where the format has no such word."""
    args = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # damaged metadata may raise anything, and is no fault of the pixels
        return UPRIGHT
    return found if found in range(1, 9) else UPRIGHT


def _failure(error: OSError | ValueError) -> Remark:
    return Remark("truncated" if "truncated" in str(error).lower() else "unreadable", str(error))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


class _InspectedDataset(Dataset[Inspection]):
    """The images of a source, inspected."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.reads = PendingReads(source.locate, slots=most_workers())

    def __getitems__(self, keys: list[SampleKey]) -> list[Inspection] | Failure:
        try:
            with with_remedy():
                return [self._inspect(key.index) for key in keys]
        except OSError as error:
            return Failure.of(error)

    def _inspect(self, index: int) -> Inspection:
        with self.reads.of(index):
            return inspect(self.source, index)


def inspections(source: Source, cfg: CfgNode) -> Iterator[list[Inspection]]:
    """Yields what was found in all images, in order, some at a time; `cfg` is the section DATA. Raises as `inspect`."""
    yield from build_loader(_InspectedDataset(source), EvalSampler(len(source)), CHUNK, cfg)  # type: ignore[misc]
