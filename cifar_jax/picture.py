"""Any picture file becomes the 32 x 32 RGB image that the models take."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cifar_jax.errors import UserError

SIZE = (32, 32)
# What photos, screenshots and image data sets come as. Pillow knows many more, but a picture may be
# from anybody: EPS would start Ghostscript on the program that such a file is, and the decoders of
# rare formats are the least tried ones. (The MPO of cameras counts as JPEG.)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "ICO")
# What white may be in modes of more than 8 bits; the smallest that no value exceeds counts.
WHITE_LEVELS = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255, 65535)}
PIECE = 2**18  # pixels that are scaled at a time


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture as the notebook does: open, to RGB, to 32 x 32 with Pillow's default filter.

    The filter is bicubic and the proportions are not kept. What is not plain 8-bit RGB:

    - grey, 1-bit, palette, CMYK, YCbCr, Lab, HSV: Pillow's conversion to RGB (no colour profiles);
    - transparency (alpha channel, transparent palette entry or 8-bit colour): laid over white;
    - more than 8 bits a channel: scaled linearly to 0..255 and rounded, never clipped. White is
      65535 in 16-bit grey; the smallest of 255 and 65535 (in floating point also 1) that no value
      exceeds in 32-bit grey; where values are negative or larger still, the darkest becomes 0 and
      the brightest 255. Of 16-bit colour Pillow itself keeps the upper 8 bits;
    - an EXIF orientation: applied, so that the picture stands as its viewer shows it;
    - animations and pages: the first.

    Args:
        path: the file, in one of `FORMATS`.

    Returns:
        uint8 [32, 32, 3], RGB.

    Raises:
        UserError: not an intact picture file, or one of more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    path = Path(path).expanduser()
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of metadata, which do not touch the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image)).resize(SIZE))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not a picture; expected one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(
            f"{path}: has more than {limit} pixels (a decompression bomb?); shrink it first"
        ) from None
    except Exception as error:  # decoders meet broken bytes with errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded ({reason}); is the file whole?") from error


def _check_file(path: Path) -> None:
    """Raises `UserError` unless `path` is a file with something in it that may be read."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the path of a picture file")
        if not path.exists():
            raise UserError(f"{path}: no such file; give the path of a picture file")
        if not path.is_file():  # reading a pipe could wait for ever
            raise UserError(f"{path}: is not an ordinary file; give the path of a picture file")
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: is empty; expected a picture file")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    deep_mode = image.mode[:4]  # "I;16B" differs from "I;16" in byte order only
    if deep_mode in WHITE_LEVELS:
        image = Image.fromarray(_to_eight_bits(np.asarray(image), WHITE_LEVELS[deep_mode]))
    if image.mode == "La":
        image = image.convert("LA")  # from there on Pillow knows the way
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, white_levels: tuple[int, ...]) -> np.ndarray:
    """Scales grey values of any type to uint8."""
    black, brightest = float(values.min()), float(values.max())
    if not (np.isfinite(black) and np.isfinite(brightest)):
        raise UserError("holds NaN or infinite values")
    white = next((level for level in white_levels if brightest <= level), None)
    if black < 0 or white is None:
        white = brightest if brightest > black else black + 1
    else:
        black = 0.0
    scale = 255 / (white - black)
    # In pieces: the float64 values of a whole picture would take eight times its eight bits.
    pieces = np.array_split(values.ravel(), values.size // PIECE + 1)
    scaled = [np.rint((p.astype(np.float64) - black) * scale).astype(np.uint8) for p in pieces]
    return np.concatenate(scaled).reshape(values.shape)
