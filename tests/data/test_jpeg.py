"""JPEG files by simplejpeg: the same pixels as by Pillow, which gets whatever is not plain."""

import random
import struct
import sys

import numpy as np
import pytest
import torch
from pictures import encoded, mutated, photo
from PIL import Image
from settings import settings

from data import JPEG_DECODERS, FolderSource, build_decoder, open_source
from data.decode import decode_image
from data.jpeg import COLOUR_SPACES, decode_jpeg

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encoded(image, "JPEG", **{"quality": 90, **options})


@pytest.mark.parametrize("mode", COLOUR_SPACES)
@pytest.mark.parametrize("subsampling", [*SUBSAMPLINGS.values(), "grey"])
def test_pixels_are_those_of_pillow(subsampling, mode):
    """At every remainder of a size by the 16 pixels of a block, where the borders are."""
    for height, width in ((1, 1), (1, 50), (47, 2), (3, 16), *((40 + rest, 70 - rest) for rest in range(16))):
        image = photo(height, width, height)
        content = jpeg(image.convert("L")) if subsampling == "grey" else jpeg(image, subsampling=subsampling)
        pixels = decode_jpeg(content, mode)
        if mode == "L" and subsampling != "grey":
            assert pixels is None  # Pillow makes grey of the colours
            continue
        expected = np.asarray(decode_image(content, mode))
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.numpy(), expected.reshape(height, width, -1))


@pytest.mark.parametrize("quality", [5, 50, 75, 95, 100])
def test_pixels_are_those_of_pillow_at_every_quality(quality):
    for options in ({}, {"optimize": True}, {"restart_marker_blocks": 3}, {"exif": oriented(), "comment": b"\xff\xc2"}):
        content = jpeg(photo(61, 83, quality), quality=quality, **options)
        assert np.array_equal(decode_jpeg(content, "RGB").numpy(), np.asarray(decode_image(content)))


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned, which is ignored
    return exif


def with_adobe_marker(content: bytes, transform: int) -> bytes:
    """Replaces the JFIF marker, so that the colour space is that of Adobe's marker."""
    length = struct.unpack(">H", content[4:6])[0]
    return content[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([transform]) + content[4 + length :]


def left_to_pillow() -> dict[str, bytes]:
    """Files that have something uncommon."""
    image = photo(40, 56, 0)
    plain = jpeg(image)
    frame = plain.index(b"\xff\xc0")
    return {
        "progressive": jpeg(image, progressive=True),
        "CMYK": jpeg(image.convert("CMYK")),
        "RGB": jpeg(image, keep_rgb=True),
        "RGB by Adobe's marker": with_adobe_marker(jpeg(image, subsampling=0), 0),
        "PNG": encoded(image, "PNG"),
        "cut off in its pixels": plain[: len(plain) // 2],
        "cut off in its header": plain[: frame + 4],
        "without its last marker": plain[:-2],
        "damaged": plain[:-60] + b"\xff\x42" + plain[-58:],
        "something between two segments": plain[:frame] + b"\0\0" + plain[frame:],
        "of 12 bits": plain[: frame + 4] + b"\x0c" + plain[frame + 5 :],
        "of arithmetic codes": plain[: frame + 1] + b"\xc9" + plain[frame + 2 :],
        "of unknown sampling": plain[: frame + 11] + b"\x33" + plain[frame + 12 :],
        "empty": b"",
        "short": b"\xff\xd8\xff",
    }


@pytest.mark.parametrize("kind", left_to_pillow())
def test_what_is_not_plain_is_left_to_pillow(kind):
    content = left_to_pillow()[kind]
    assert decode_jpeg(content, "RGB") is None
    results = []
    for name in ("simplejpeg", "pillow"):
        try:
            results.append(np.asarray(build_decoder(name)(content)).tobytes())
        except (OSError, ValueError) as error:
            results.append(f"{type(error).__name__}: {error}")
    assert results[0] == results[1]


def test_the_limit_of_pixels_is_that_of_pillow(monkeypatch):
    content = jpeg(photo(40, 50, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert decode_jpeg(content, "RGB") is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    assert decode_jpeg(content, "RGB") is None
    with pytest.raises(ValueError, match="decompression bomb"):
        build_decoder("simplejpeg")(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_jpeg(content, "RGB") is not None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS.values())
def test_damaged_files_are_what_pillow_makes_of_them(subsampling, capfd):
    """A file that simplejpeg decodes without complaint is one that Pillow decodes to the same pixels."""
    content, rng, decoded = jpeg(photo(24, 36, 0), subsampling=subsampling), random.Random(subsampling), 0
    for _ in range(400):
        damaged = mutated(content, rng)
        pixels = decode_jpeg(damaged, "RGB")
        if pixels is not None:
            decoded += 1
            try:
                expected = np.asarray(decode_image(damaged))
            except (OSError, ValueError):
                continue  # for its metadata, which do not matter here
            assert np.array_equal(pixels.numpy(), expected)
    assert 40 < decoded < 360
    assert capfd.readouterr() == ("", "")


def test_the_decoder_is_chosen_by_its_key(image_folder):
    photo(30, 40, 0).save(image_folder / "val/ant/0.png", "JPEG")
    kinds = {}
    for name in JPEG_DECODERS:
        cfg = settings(f"DATA.DATA_PATH {image_folder} DATA.DECODER {name}").DATA
        source = open_source(cfg, "val")
        kinds[name] = [type(source.load(index)[0]) for index in range(2)]
        assert source.notes == (f"JPEG files are decoded by {'pillow' if name == 'pillow' else 'simplejpeg'}",)
    assert kinds["auto"] == kinds["simplejpeg"] == [torch.Tensor, Image.Image]
    assert kinds["pillow"] == [Image.Image] * 2
    assert isinstance(FolderSource(image_folder, "val").load(0)[0], Image.Image)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert build_decoder("auto").name == build_decoder("pillow").name == "pillow"
    assert str(build_decoder("auto")) == "pillow (simplejpeg would be faster: pip install -r requirements-fast.txt)"
    with pytest.raises(ValueError, match=r"^DATA\.DECODER simplejpeg needs .*: pip install -r requirements-fast\.txt"):
        build_decoder("simplejpeg")
