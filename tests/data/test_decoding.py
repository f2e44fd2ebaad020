"""What files hold as 8 bits a channel: scaled by their type or refused, upright or as they are stored."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest

from wsolkit.data import records
from wsolkit.data.decoding import rgb
from wsolkit.data.records import read_grey, read_image, read_orientations, read_sizes
from wsolkit.errors import DataError

STORED = np.kron(np.arange(20, 260, 40).reshape(2, 3), np.ones((8, 8))).astype(np.uint8)  # 24×16, no two corners alike


def noted(orientation: Any) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


def photo(path: Path, orientation: int, stored: np.ndarray = STORED, **options: Any) -> Path:
    """A file that notes how its pixels are to be turned."""
    colours = np.stack([stored, stored // 2, 255 - stored], axis=2)
    PIL.Image.fromarray(colours).save(path, exif=noted(orientation), **options)
    return path


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """A grey TIFF file, little-endian; tags by number, such as t339=2 for integers with a sign."""
    height, width = pixels.shape[:2]
    values = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    values |= {279: pixels.nbytes} | {int(key[1:]): value for key, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in sorted(values.items()))
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes() + directory


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, colour_type: int, behind: bytes = b"") -> bytes:
    """A PNG file of [H, W, C] pixels, with chunks behind them."""
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(pixels.dtype.newbyteorder(">")))
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), behind, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.jpg", {"quality": 95}),
        ("x.mpo", {"save_all": True}),
        ("x.png", {}),
        ("x.webp", {"lossless": True}),
        ("x.tif", {}),
        ("x.tiff", {"compression": "tiff_lzw"}),
    ],
)
def test_photos_are_read_upright_or_as_they_are_stored(
    tmp_path: Path, name: str, options: dict[str, Any], orientation: int
) -> None:
    with PIL.Image.open(photo(tmp_path / f"plain {name}", 1, **options)) as opened:
        stored = np.asarray(opened.convert("RGB"))
    in_memory = PIL.Image.fromarray(stored)
    in_memory.getexif()[0x0112] = orientation
    upright = np.asarray(PIL.ImageOps.exif_transpose(in_memory))
    path = photo(tmp_path / name, orientation, **options)
    assert np.array_equal(read_image(path), stored)
    assert np.array_equal(read_image(path, "ignore"), stored)
    assert np.array_equal(read_image(path, "apply"), upright)
    assert read_image(path, "apply").flags.c_contiguous
    for exif, expected in (("apply", upright), ("ignore", stored)):
        with PIL.Image.open(path) as opened:
            assert np.array_equal(rgb(opened, exif, "an image"), expected)  # type: ignore[arg-type]
    assert read_sizes(tmp_path, [name]).tolist() == [[24, 16]]
    assert read_orientations(tmp_path, [name]).tolist() == [[24, 16, orientation]]


def test_orientation_may_stand_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    exif = noted(8).tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "x.png").write_bytes(png(STORED, 0, chunk(b"eXIf", exif)))
    assert read_image(tmp_path / "x.png", "apply").shape == (24, 16, 3)
    assert read_image(tmp_path / "x.png").shape == (16, 24, 3)
    assert read_orientations(tmp_path, ["x.png"]).tolist() == [[24, 16, 8]]


def test_sizes_of_pngs_are_read_without_decoding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "x.png", 6)
    (tmp_path / "plain.png").write_bytes(png(STORED, 0))
    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert read_orientations(tmp_path, ["x.png", "plain.png"]).tolist() == [[24, 16, 6], [24, 16, 1]]


BROKEN = {
    "no EXIF": b"Exif\0\0 and then nothing of the kind",
    "nothing": b"",
    "cut short": noted(6).tobytes()[:14],
    "offset behind the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "no orientation 0": noted(0).tobytes(),
    "no orientation 9": noted(9).tobytes(),
    "text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0",
    "another type": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x63\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_broken_exif_data_turn_nothing(tmp_path: Path, name: str, kind: str) -> None:
    PIL.Image.fromarray(STORED).save(tmp_path / name, exif=BROKEN[kind])
    assert read_image(tmp_path / name, "apply").shape == (16, 24, 3)
    assert read_orientations(tmp_path, [name]).tolist() == [[24, 16, 1]]


GREY = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
DEEP = np.array([[0, 255, 256], [32767, 65279, 65535]], np.uint16)
DEEP_LEVELS = [[0, 0, 1], [127, 254, 255]]
FLOAT = (GREY / np.float32(255)).astype(np.float32)

KNOWN: dict[str, tuple[bytes, Any]] = {
    "16 bits.png": (png(DEEP, 0), DEEP_LEVELS),
    "16 bits and opacity.png": (png(np.stack([DEEP, DEEP[::-1]], 2), 4), DEEP_LEVELS),
    "16 bits of colour.png": (png(np.stack([DEEP] * 3, 2), 2), DEEP_LEVELS),
    "16 bits of colour and opacity.png": (png(np.stack([DEEP] * 4, 2), 6), DEEP_LEVELS),
    "16 bits.tif": (tiff(DEEP), DEEP_LEVELS),
    "16 bits, big-endian.tif": (b"", DEEP_LEVELS),
    "16 bits, 0 is white.tif": (tiff(DEEP, t262=0), 255 - np.array(DEEP_LEVELS)),
    "12 bits.tif": (tiff(np.frombuffer(bytes([0, 0, 16, 15, 255, 255]), np.uint8)[None], t258=12, t256=4), 0),
    "16 bits.pgm": (b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes(), DEEP_LEVELS),
    "10 bits.pgm": (b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes(), [[0, 128, 255]]),
    "float.tif": (tiff(FLOAT, t339=3), GREY),
    "float, 0 is white.tif": (tiff(FLOAT, t339=3, t262=0), 255 - GREY),
    "float.pfm": (b"Pf\n3 2\n-1.0\n" + FLOAT[::-1].tobytes(), GREY),
    "8 bits.tif": (tiff(GREY), GREY),
    "8 bits, 0 is white.tif": (tiff(GREY, t262=0), 255 - GREY),
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_scaled_by_their_type(tmp_path: Path, name: str) -> None:
    content, levels = KNOWN[name]
    path = tmp_path / name
    path.write_bytes(content)
    if name == "16 bits, big-endian.tif":
        PIL.Image.frombytes("I;16B", (3, 2), DEEP.astype(">u2").tobytes()).save(path)
    expected = [[0, 1, 15, 255]] if name == "12 bits.tif" else levels
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.tolist() == np.repeat(np.array(expected)[..., None], 3, axis=2).tolist()


def test_sixteen_bits_are_scaled_alike_where_pillow_widens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions differ in the mode of such a PNG."""
    monkeypatch.setitem(PIL.PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    (tmp_path / "x.png").write_bytes(png(DEEP, 0))
    with PIL.Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "I"
    assert read_image(tmp_path / "x.png")[..., 0].tolist() == DEEP_LEVELS


def test_colours_of_sixteen_bits_are_those_of_opencv(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    for name in ("x.png", "x.tif"):
        cv2.imwrite(str(tmp_path / name), deep)
        assert np.array_equal(read_image(tmp_path / name), (deep >> 8)[..., ::-1])


REFUSED = {
    "dark.tif": (tiff(np.array([[0, 200]], np.int32), t339=2), "mode I and holds int32 with values from 0 to 200"),
    "negative.tif": (tiff(np.array([[-3, 70000]], np.int32), t339=2), "int32 with values from -3 to 70000"),
    "unsigned.tif": (tiff(np.array([[5, 2**31 - 1]], np.uint32)), "int32 with values from 5 to 2147483647"),
    "signed.tif": (tiff(np.array([[0, 30000]], np.int16), t339=2), "int32 with values from 0 to 30000"),
    "signed bytes.tif": (
        tiff(np.array([[-1, 100]], np.int8), t339=2),
        "mode L and holds int8 with values from -1 to 100",
    ),
    "above.tif": (
        tiff(np.array([[0, 1.5]], np.float32), t339=3),
        "mode F and holds float32 with values from 0.0 to 1.5",
    ),
    "below.tif": (tiff(np.array([[-0.25, 1]], np.float32), t339=3), "float32 with values from -0.25 to 1.0"),
    "levels.tif": (tiff(np.array([[0, 255]], np.float32), t339=3), "float32 with values from 0.0 to 255.0"),
    "nan.tif": (tiff(np.array([[0, np.nan]], np.float32), t339=3), "float32 with values from nan to nan"),
    "inf.tif": (tiff(np.array([[0, np.inf]], np.float32), t339=3), "float32 with values from 0.0 to inf"),
    "depth.pfm": (b"Pf\n2 1\n-1.0\n" + np.array([3, 4], np.float32).tobytes(), "float32 with values from 3.0 to 4.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_unknown_scale_are_refused(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for read, what in ((read_image, "image"), (read_grey, "mask")):
        with pytest.raises(DataError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{what} '{tmp_path / name}' is of mode ")
        assert message in str(caught.value)
        assert "convert it to 8 bits" in str(caught.value)


COLOUR = (200, 40, 90)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("LA", "png", 0),
        ("1", "png", 0),
        ("1", "tif", 0),
        ("P", "png", 0),
        ("P", "tif", 0),
        ("PA", "tif", 0),
        ("RGBA", "png", 0),
        ("RGBA", "webp", 4),
        ("CMYK", "jpg", 4),
        ("CMYK", "tif", 0),
        ("LAB", "tif", 4),
    ],
)
def test_colours_of_any_mode_are_those_that_were_stored(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    image = PIL.Image.new("RGB", (8, 8), COLOUR)
    grey = mode in ("1", "L", "LA")
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB")) or image
    elif mode == "1":
        image = PIL.Image.new("1", (8, 8), 1)
    elif mode in ("P", "PA"):
        image = image.quantize().convert(mode)
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    level = 255 if mode == "1" else 94  # of the colour's luminance
    expected = np.array([level] * 3 if grey else COLOUR)
    assert np.abs(read_image(tmp_path / f"x.{suffix}").astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "YCbCr", "PA", "I;16", "I;16B", "I;16L"])
def test_images_in_memory_may_be_of_any_mode(mode: str) -> None:
    image = PIL.Image.new(mode, (3, 2))
    assert rgb(image, "apply", "an image").shape == (2, 3, 3)


def test_palettes_with_opacity_are_read_without_a_warning(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (4, 4), COLOUR).quantize()
    image.save(tmp_path / "x.png", transparency=b"\x30\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.png")[0, 0].tolist() == list(COLOUR)


@pytest.mark.parametrize(
    ("name", "options"), [("x.gif", {}), ("x.tif", {}), ("x.webp", {"lossless": True}), ("x.png", {}), ("x.mpo", {})]
)
def test_first_frame_of_several_is_read(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    frames = [PIL.Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert np.abs(read_image(tmp_path / name)[8, 8].astype(int) - [255, 0, 0]).max() <= 2


def cut(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file, format, **options)
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize(
    "content",
    [
        cut("PNG"),
        cut("JPEG"),
        cut("WEBP"),
        cut("TIFF"),
        cut("BMP"),
        b"II*\0\x08\0\0\0\xff\xff" + bytes(30),
        tiff(STORED, t258=7),
        tiff(STORED, t262=77),
        tiff(STORED, t256=0),
        png(np.zeros((0, 0), np.uint8), 0),
        b"P5 0 0 255\n",
    ],
)
def test_what_cannot_be_decoded_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for read in (read_image, read_grey):
        with pytest.raises(DataError, match=r"(image|mask) '.*x.png' (cannot be decoded \(.+\): replace it|has 0×0)"):
            read(tmp_path / "x.png")


def test_images_that_would_fill_the_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "x.jpg", 6)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"x.jpg' cannot be decoded \(Image size \(384 pixels\) exceeds limit"):
        read_image(tmp_path / "x.jpg", "apply")


def test_reading_as_stored_does_not_look_at_exif_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The research benchmarks' way takes no more time for it."""
    path = photo(tmp_path / "x.jpg", 6)
    monkeypatch.setattr(records, "orientation", lambda image: pytest.fail("it looked"))
    assert read_image(path).shape == (16, 24, 3)
