"""Pictures of every kind become the expected 32 x 32 RGB pixels; bad ones are one clear line."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from cifar_jax.errors import UserError
from cifar_jax.picture import read_picture

RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (32, 32), dtype=np.uint16)
PALETTE = RNG.integers(0, 256, (8, 3), dtype=np.uint8)
INDEX = RNG.integers(0, 8, (32, 32), dtype=np.uint8)
CMYK = RNG.integers(0, 256, (32, 32, 4), dtype=np.uint8)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(tmp_path, content, name="picture"):
    path = tmp_path / name
    path.write_bytes(content)
    return read_picture(path)


def palette_image():
    image = Image.fromarray(INDEX).convert("L")
    image.putpalette(PALETTE.tobytes())
    return image


def from_array(values, mode):
    image = Image.new(mode, (32, 32))
    image.frombytes(values.tobytes())
    return image


def grey_to_rgb(grey):
    return np.stack([grey] * 3, axis=-1)


def over_white(colour, alpha):
    weight = alpha[..., None] / 255
    return np.rint(colour * weight + 255 * (1 - weight))


def cmyk_to_rgb(cmyk):
    """Ink c on paper lit by 255 - k leaves (255 - k) * (1 - c / 255)."""
    light = 255.0 - cmyk[..., 3:]
    return np.rint(light * (1 - cmyk[..., :3] / 255))


def stretched(values, black, white):
    black, white = float(black), float(white)
    levels = np.rint((values.astype(np.float64) - black) / (white - black) * 255)
    return grey_to_rgb(levels.astype(np.uint8))


FLOATS = (DEEP / 65535).astype(np.float32)
WIDE = DEEP.astype(np.int32) * 1000 - 7
OPAQUE_RGBA = np.concatenate([RGB, np.full((32, 32, 1), 255, np.uint8)], axis=-1)
# The TIFF tag ExtraSamples (338) says 2 for plain alpha, 1 for grey already multiplied by it.
PREMULTIPLIED = encode(
    Image.fromarray(np.stack([GREY // 2, np.full_like(GREY, 128)], -1), "LA"), "TIFF"
).replace(struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1))
RGBA = np.concatenate([RGB, ALPHA[..., None]], axis=-1)
# name: file, expected pixels, tolerance in levels (1 where a blend is rounded in other steps)
MODES = {
    "rgb": (encode(Image.fromarray(RGB)), RGB, 0),
    "grey": (encode(Image.fromarray(GREY)), grey_to_rgb(GREY), 0),
    "one bit": (
        encode(Image.fromarray(GREY > 99)),
        grey_to_rgb(np.where(GREY > 99, 255, 0)),
        0,
    ),
    "palette": (encode(palette_image()), PALETTE[INDEX], 0),
    "gif": (encode(palette_image(), "GIF"), PALETTE[INDEX], 0),
    "cmyk": (encode(from_array(CMYK, "CMYK"), "TIFF"), cmyk_to_rgb(CMYK), 1),
    "opaque rgba": (encode(Image.fromarray(OPAQUE_RGBA)), RGB, 0),
    "rgba": (encode(Image.fromarray(RGBA)), over_white(RGB, ALPHA), 1),
    "grey with alpha": (
        encode(Image.fromarray(np.stack([GREY, ALPHA], -1), "LA")),
        over_white(grey_to_rgb(GREY), ALPHA),
        1,
    ),
    "grey multiplied by alpha": (PREMULTIPLIED, grey_to_rgb(GREY // 2 + 127.0), 1),
    "transparent palette entry": (
        encode(palette_image(), transparency=3),
        np.where((INDEX == 3)[..., None], 255, PALETTE[INDEX]),
        0,
    ),
    "palette with alphas": (
        encode(palette_image(), transparency=bytes(range(0, 240, 30))),
        over_white(PALETTE[INDEX], INDEX * 30),
        1,
    ),
    "transparent colour": (
        encode(Image.fromarray(PALETTE[INDEX]), transparency=tuple(map(int, PALETTE[5]))),
        np.where((INDEX == 5)[..., None], 255, PALETTE[INDEX]),
        0,
    ),
    "16-bit grey": (encode(Image.fromarray(DEEP)), stretched(DEEP, 0, 65535), 0),
    "16-bit grey, other byte order": (
        encode(from_array(DEEP.astype(">u2"), "I;16B"), "TIFF"),
        stretched(DEEP, 0, 65535),
        0,
    ),
    "16-bit pgm": (
        b"P5 32 32 65535\n" + DEEP.astype(">u2").tobytes(),
        stretched(DEEP, 0, 65535),
        0,
    ),
    "32-bit grey up to 255": (
        encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        grey_to_rgb(GREY),
        0,
    ),
    "32-bit grey up to 65535": (
        encode(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        stretched(DEEP, 0, 65535),
        0,
    ),
    "32-bit grey beyond": (
        encode(Image.fromarray(WIDE), "TIFF"),
        stretched(WIDE, WIDE.min(), WIDE.max()),
        0,
    ),
    "float up to 1": (encode(Image.fromarray(FLOATS), "TIFF"), stretched(FLOATS, 0, 1), 0),
    "float up to 255": (
        encode(Image.fromarray(FLOATS * 255), "TIFF"),
        stretched(FLOATS * np.float32(255), 0, 255),
        0,
    ),
    "float below 0": (
        encode(Image.fromarray(FLOATS - 0.5), "TIFF"),
        stretched(FLOATS - np.float32(0.5), (FLOATS - 0.5).min(), (FLOATS - 0.5).max()),
        0,
    ),
    "constant and negative": (
        encode(Image.fromarray(np.full((32, 32), -3, np.int32)), "TIFF"),
        np.zeros((32, 32, 3)),
        0,
    ),
    "animated gif: the first frame": (
        encode(
            palette_image(),
            "GIF",
            save_all=True,
            append_images=[Image.fromarray(GREY)],
        ),
        PALETTE[INDEX],
        0,
    ),
    "animated png: the first frame": (
        encode(
            Image.fromarray(RGB),
            save_all=True,
            append_images=[Image.fromarray(255 - RGB)],
        ),
        RGB,
        0,
    ),
    "tiff of two pages: the first": (
        encode(
            Image.fromarray(RGB),
            "TIFF",
            save_all=True,
            append_images=[Image.fromarray(255 - RGB)],
        ),
        RGB,
        0,
    ),
}


@pytest.mark.parametrize("content, expected, tolerance", MODES.values(), ids=MODES)
def test_pixels_of_every_mode(tmp_path, content, expected, tolerance):
    pixels = read(tmp_path, content)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= tolerance
    # A tolerance of one level must not hide a swapped channel or a transposed picture.
    assert np.ptp(expected) == 0 or np.abs(pixels[::-1].astype(int) - expected).max() > 20


FORMAT_FILES = {
    **{name: encode(Image.fromarray(RGB), name) for name in ("PNG", "BMP", "TIFF", "PPM")},
    "WEBP": encode(Image.fromarray(RGB), "WEBP", lossless=True),
    "ICO": encode(Image.fromarray(RGB), "ICO", sizes=[(32, 32)]),
}


@pytest.mark.parametrize("content", FORMAT_FILES.values(), ids=FORMAT_FILES)
def test_lossless_formats(tmp_path, content):
    np.testing.assert_array_equal(read(tmp_path, content), RGB)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "AVIF"])
def test_lossy_formats(tmp_path, format):
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp, ramp[:, None], np.uint8(90)), axis=-1)
    options = {"save_all": True, "append_images": [Image.fromarray(RGB)]} if format == "MPO" else {}
    pixels = read(tmp_path, encode(Image.fromarray(smooth), format, quality=95, **options))
    # Smooth colours survive compression within a few levels; swapped ones differ by up to 165.
    assert np.abs(pixels.astype(int) - smooth).max() <= 12


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_huge_deep_pictures_take_little_more_memory_than_their_pixels(tmp_path, dtype):
    path = tmp_path / "huge.tif"
    Image.fromarray(np.full((3000, 3000), 65535, dtype)).save(path)
    tracemalloc.start()
    try:
        pixels = read_picture(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pixels.min() == 255
    # Pillow hands its pixels over in two copies; one of 8 bytes each would be another 72 MB.
    assert peak < 9_000_000 * (2 * np.dtype(dtype).itemsize + 2)


ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(tmp_path, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read(tmp_path, encode(Image.fromarray(RGB), format, exif=exif))
    np.testing.assert_array_equal(pixels, ORIENTATIONS[orientation](RGB))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "P"])
@pytest.mark.parametrize("size", [(50, 40), (9, 33), (32, 32), (1, 1), (700, 3)])
def test_opaque_pictures_are_read_as_the_notebook_does(tmp_path, mode, size):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    path = tmp_path / "picture.tif"
    image.convert(mode).save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB").resize((32, 32)))
    np.testing.assert_array_equal(read_picture(path), expected)
    np.testing.assert_array_equal(
        expected, np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.BICUBIC))
    )


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def corrupted(content):
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 40 + content[middle + 40 :]


PNG = encode(Image.fromarray(RGB))
JPEG = encode(Image.fromarray(RGB), "JPEG")
BAD = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x89", "not a picture"),
    "text": (b"airplane\n", "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "eps": (encode(Image.fromarray(RGB), "EPS"), "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a picture"),
    "tga, which nothing marks as a picture": (encode(Image.fromarray(RGB), "TGA"), "not a picture"),
    "png signature alone": (PNG[:8], "not a picture"),
    "half a png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png without its last bytes of pixels": (PNG[:-40], "cannot be decoded"),
    "corrupted png": (corrupted(PNG), "cannot be decoded"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "jpeg cut in its header": (JPEG[:12], "cannot be decoded"),
    "half a gif": (encode(palette_image(), "GIF")[:400], "cannot be decoded"),
    "half a tiff": (encode(Image.fromarray(RGB), "TIFF")[:1500], "cannot be decoded"),
    "half a webp": (encode(Image.fromarray(RGB), "WEBP")[:300], "cannot be decoded"),
    "no width": (png_header(0, 10), "not a picture"),
    "bomb that Pillow only warns of": (png_header(10_000, 10_000), "more than 89,478,485 pixels"),
    "bomb": (png_header(60_000, 60_000), "more than 89,478,485 pixels"),
    "NaN": (
        encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        "NaN or infinite",
    ),
    "infinity": (
        encode(Image.fromarray(np.array([[0, np.inf]], np.float32)), "TIFF"),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_bad_file_is_one_clear_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, content, "bad.png")
    assert str(tmp_path / "bad.png") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.png", "no such file"),
        ("", "is a folder"),
        ("pipe", "not an ordinary file"),
        ("x" * 300, "no such file|cannot be read"),
        ("picture.png/inside", "no such file"),
        ("zero\0byte.png", "no such file|cannot be read"),
    ],
)
def test_bad_path_is_one_clear_line(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "picture.png").write_bytes(PNG)
    with pytest.raises(UserError, match=message) as raised:
        read_picture(f"{tmp_path}/{name}")
    assert "\n" not in str(raised.value)


def test_unreadable_metadata_does_not_matter(tmp_path):
    garbage = encode(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    np.testing.assert_array_equal(read(tmp_path, garbage), RGB)
