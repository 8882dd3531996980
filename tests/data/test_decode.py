"""Image files of every kind: their pixels in RGB, and damaged ones, which are always a ValueError or an OSError."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from pictures import encoded, mutated
from PIL import Image, ImageCms
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.datasets import GREY
from data.decode import EXTENSIONS, FORMATS, MODES, decode_image, image_file

RAMP = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)  # 0x0000, 0x1111, ..., 0xffff
GREYS = (np.arange(16) * 17).reshape(4, 4)  # the same in 8 bits


def smooth(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def decoded(content: bytes) -> np.ndarray:
    image = decode_image(content)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(content: bytes) -> np.ndarray:
    """The one channel of an image that must be grey."""
    pixels = decoded(content)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def plain_pgm(values: np.ndarray, largest: int) -> bytes:
    height, width = values.shape
    return f"P2 {width} {height} {largest}\n{' '.join(map(str, values.ravel()))}\n".encode()


def tiff(samples: bytes, bits: int, sample_format: int = 1) -> bytes:
    """A grey TIFF file of 4 x 4 pixels, little-endian."""
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 4, 279: len(samples), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + samples


def four_bands(size: tuple[int, int] = (12, 10)) -> np.ndarray:
    """Noise, uint8 (H, W, 4), whose fourth band is 0 in places."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[::2, :, 3] = 0
    return pixels


class TestChannels:
    def test_grey_stays_as_it_is(self):
        content = encoded(Image.fromarray(GREYS.astype(np.uint8)), "PNG")
        assert (np.asarray(decode_image(content, "L")) == GREYS).all()
        assert (np.asarray(decode_image(encoded(Image.fromarray(RAMP), "PNG"), "L")) == GREYS).all()

    def test_colour_becomes_grey_by_the_shares_of_the_data_set(self):
        pixels = np.asarray(smooth()).astype(float)
        found = np.asarray(decode_image(encoded(smooth(), "PNG"), "L"))
        assert found.shape == pixels.shape[:2]
        assert abs(found - pixels @ GREY).max() < 1

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    def test_four_bands_are_those_that_were_saved(self, kind):
        """Also where the fourth, were it transparency, would hide the others."""
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        image = decode_image(encoded(Image.fromarray(four_bands()), kind, **options), MODES[4])
        assert (np.asarray(image) == four_bands()).all()
        resized = image.resize((5, 7), Image.Resampling.BICUBIC)
        for band, expected in zip(resized.split(), four_bands().transpose(2, 0, 1), strict=True):
            alone = Image.fromarray(expected).resize((5, 7), Image.Resampling.BICUBIC)
            assert (np.asarray(band) == np.asarray(alone)).all()

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_without_a_fourth_band_it_is_full(self, mode):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        found = np.asarray(decode_image(encoded(smooth(mode), kind), MODES[4]))
        assert (found[..., :3] == np.asarray(smooth(mode).convert("RGB"))).all()
        assert (found[..., 3] == 255).all()

    def test_a_fourth_band_that_pillow_does_not_decode(self):
        content = encoded(Image.merge("RGBX", Image.fromarray(four_bands()).split()), "TIFF")
        with pytest.raises(ValueError, match="fourth band of unspecified kind can't be read: store the image as RGBA"):
            decode_image(content, MODES[4])
        assert (decoded(content) == four_bands()[..., :3]).all()


class TestModes:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "WEBP", "BMP", "GIF"])
    def test_lossless_formats_give_the_pixels_that_were_saved(self, kind):
        image = smooth().quantize(64).convert("RGB")
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (decoded(encoded(image, kind, **options)) == np.asarray(image)).all()

    @pytest.mark.parametrize("kind", ["JPEG", *(kind for kind in FORMATS if kind == "AVIF")])
    def test_lossy_formats_give_about_the_pixels_that_were_saved(self, kind):
        assert abs(decoded(encoded(smooth(), kind, quality=95)) - np.asarray(smooth())).mean() < 8

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_16_bit_grey_is_scaled_and_not_clipped(self, kind):
        assert (grey(encoded(Image.fromarray(RAMP), kind)) == GREYS).all()

    def test_16_bit_grey_is_rounded(self):
        values = np.array([[0, 128, 129, 385], [386, 32767, 32768, 65535]], dtype=np.uint16)
        expected = [[0, 0, 1, 1], [2, 127, 128, 255]]  # of x / 257
        assert grey(encoded(Image.fromarray(values), "PNG")).tolist() == expected

    def test_16_bit_grey_of_the_other_byte_order(self):
        image = Image.fromarray(RAMP.astype(">u2"))
        assert image.mode == "I;16B"
        assert (grey(encoded(image, "TIFF")) == GREYS).all()

    def test_16_bit_grey_from_white_to_black(self):
        assert (grey(encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})) == 255 - GREYS).all()

    def test_16_bit_grey_compressed(self):
        assert (grey(encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw")) == GREYS).all()

    def test_12_bit_grey(self):
        values = [(value >> 4) for value in RAMP.ravel().tolist()]
        packed = b"".join(
            bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in zip(values[::2], values[1::2], strict=True)
        )
        assert (grey(tiff(packed, 12)) == GREYS).all()

    def test_grey_maps_of_another_largest_value(self):
        assert (grey(plain_pgm(np.arange(16).reshape(4, 4), 15)) == GREYS).all()
        assert (grey(plain_pgm(np.arange(16).reshape(4, 4) * 66, 990)) == GREYS).all()

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [
            (np.float32, "32-bit float pixels have no known range: convert to 8 or 16 bit"),
            (np.int32, "32-bit integer pixels have no known range: convert to 8 or 16 bit"),
        ],
    )
    def test_pixels_without_a_range_are_refused(self, dtype, message):
        with pytest.raises(ValueError, match=message):
            decoded(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF"))

    def test_signed_pixels_are_refused(self):
        with pytest.raises(ValueError, match="signed or 32-bit integer pixels have no known range"):
            decoded(tiff(bytes(32), 16, sample_format=2))

    def test_float_maps_are_refused(self):
        with pytest.raises(ValueError, match="32-bit float pixels have no known range"):
            decoded(encoded(Image.fromarray(RAMP.astype(np.float32)), "PPM"))

    def test_16_bit_colour(self):
        """Pillow has no mode for it and keeps the upper byte."""
        rows = b"".join(b"\0" + RAMP.repeat(3).reshape(4, 12)[row].astype(">u2").tobytes() for row in range(4))
        header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
        assert (grey(content) == GREYS).all()

    @pytest.mark.parametrize("mode", ["L", "LA"])
    def test_grey_with_and_without_transparency(self, mode):
        image = smooth(mode)
        assert (grey(encoded(image, "PNG")) == np.asarray(smooth("L"))).all()

    def test_black_and_white(self):
        image = Image.fromarray((np.eye(4) * 255).astype(np.uint8)).convert("1")
        for kind in ("PNG", "TIFF", "BMP", "PPM"):
            assert (grey(encoded(image, kind)) == np.eye(4) * 255).all()

    def test_transparency_is_dropped_and_not_blended(self):
        image = smooth("RGBA")
        image.putalpha(40)
        assert (decoded(encoded(image, "PNG")) == np.asarray(smooth())).all()

    @pytest.mark.parametrize("transparency", [3, bytes(range(16)) * 4])
    def test_palettes_with_transparent_colours(self, transparency):
        palette = smooth().quantize(64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = decoded(encoded(palette, "PNG", transparency=transparency))
        assert (pixels == np.asarray(palette.convert("RGB"))).all()

    @pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("L", "JPEG")])
    def test_other_colour_spaces(self, mode, kind):
        expected = np.asarray(smooth(mode).convert("RGB")).astype(int)
        assert abs(decoded(encoded(smooth(mode), kind)) - expected).mean() < 4

    def test_lab(self):
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        lab = ImageCms.applyTransform(smooth(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
        try:
            pixels = decoded(encoded(lab, "TIFF"))
        except ValueError as error:
            pytest.skip(f"this version of Pillow does not know how: {error}")
        assert abs(pixels - np.asarray(smooth())).mean() < 4

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", *(kind for kind in FORMATS if kind == "AVIF")])
    def test_of_several_images_the_first_one_is_taken(self, kind):
        frames = [Image.new("RGB", (24, 20), colour) for colour in ("red", "blue", "green")]
        pixels = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert abs(pixels - (255, 0, 0)).max() <= 4

    def test_several_jpegs_in_one_file(self):
        frames = [smooth(), Image.new("RGB", (24, 20), "blue")]
        content = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(content)).format == "MPO"
        assert abs(decoded(content) - np.asarray(smooth())).mean() < 8


class TestFormats:
    def test_folders_take_what_is_decoded_and_all_that_torchvision_takes(self):
        assert set(IMG_EXTENSIONS) <= set(EXTENSIONS)
        known = Image.registered_extensions()
        assert {known[ending] for ending in EXTENSIONS} == set(FORMATS)

    @pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "DDS", "SGI", "MSP", "PDF", "JPEG2000"])
    def test_no_other_format_is_decoded(self, kind):
        image = smooth("1" if kind == "MSP" else "RGB")
        with pytest.raises(ValueError, match=r"^not an image of a known format \(JPEG, PNG, "):
            decoded(encoded(image, kind))

    def test_a_drawing_starts_no_program(self, start, tmp_path):
        """Pillow has Ghostscript interpret EPS, whatever the file is called; the start of a program ends this test."""
        (tmp_path / "cat.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n%%EOF\n")
        (tmp_path / "script.py").write_text(DRAWING)
        process = start(tmp_path / "script.py", tmp_path / "cat.jpg")
        assert process.wait() == 99, f"the attack itself must work: {process.err}"
        assert process.out.startswith("not an image of a known format")


DRAWING = """
import os, sys
from PIL import EpsImagePlugin, Image
from data.decode import decode_image

sys.addaudithook(lambda event, _: os._exit(99) if event == "subprocess.Popen" else None)
try:
    decode_image(open(sys.argv[1], "rb").read())
except ValueError as error:
    print(error, flush=True)
EpsImagePlugin.gs_binary = "gs"
Image.open(sys.argv[1]).load()
"""


def samples() -> dict[str, bytes]:
    """A small valid file of every format, and of some of their variants."""
    image = smooth()
    found = {kind: encoded(image, kind) for kind in FORMATS}
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    return found | {
        "JPEG, progressive": encoded(image, "JPEG", progressive=True, exif=exif),
        "JPEG, CMYK": encoded(smooth("CMYK"), "JPEG"),
        "JPEG, several": encoded(image, "MPO", save_all=True, append_images=[image]),
        "PNG, palette": encoded(image.quantize(32), "PNG", transparency=bytes(range(32)), exif=exif),
        "PNG, 16 bit": encoded(Image.fromarray(RAMP), "PNG"),
        "PNG, animated": encoded(image, "PNG", save_all=True, append_images=[smooth("L").convert("RGB")]),
        "WEBP, lossless": encoded(image, "WEBP", lossless=True, exif=exif),
        "GIF, animated": encoded(image, "GIF", save_all=True, append_images=[smooth("L").convert("RGB")]),
        "TIFF, LZW": encoded(image, "TIFF", compression="tiff_lzw"),
        "TIFF, deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate", exif=exif),
        "TIFF, JPEG": encoded(image, "TIFF", compression="jpeg"),
        "TIFF, fax": encoded(smooth("1"), "TIFF", compression="group4"),
        "TIFF, 16 bit": encoded(Image.fromarray(RAMP), "TIFF"),
        "PPM, plain": plain_pgm(np.asarray(smooth("L")), 255),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_decode_or_are_refused_and_nothing_else(name, capfd):
    content, rng, refused = samples()[name], random.Random(name), []
    assert decoded(content).shape[2] == 3
    for _ in range(200):
        try:
            decoded(mutated(content, rng))
        except (OSError, ValueError) as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(refused)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "" or name.startswith("TIFF, ")  # libtiff has lines of its own


def test_a_decoder_may_raise_what_it_likes():
    """Decoders have been seen to raise these; which bytes make them do so changes with every version."""
    for error in (NotImplementedError("a"), RuntimeError("b"), OverflowError("c"), MemoryError(), KeyError(0)):
        message = rf"^not a readable image \({type(error).__name__}: "
        with pytest.raises(ValueError, match=message), image_file(io.BytesIO(encoded(smooth(), "PNG"))):
            raise error


def test_errors_of_storage_stay_what_they_are():
    with pytest.raises(OSError, match="Input/output error"), image_file(io.BytesIO(encoded(smooth(), "PNG"))):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("importing", "warns"), [("PIL", True), ("data.decode", False)])
def test_oddities_of_a_file_print_nothing(start, tmp_path, importing, warns):
    """In a process of its own, whose filters of warnings are those of a user."""
    (tmp_path / "a.png").write_bytes(encoded(smooth().quantize(32), "PNG", transparency=bytes(range(32))))
    code = f"import sys, warnings\nwarnings.resetwarnings()\nsys.modules.pop({importing!r}, None)\nimport {importing}\n"
    (tmp_path / "script.py").write_text(code + "from PIL import Image\nImage.open(sys.argv[1]).convert('RGB')")
    process = start(tmp_path / "script.py", tmp_path / "a.png")
    assert process.wait() == 0
    assert ("UserWarning: Palette images with Transparency" in process.err) == warns
    assert bool(process.err) == warns
