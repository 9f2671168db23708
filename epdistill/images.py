"""Image files to pixels, in the one way that training and predicting share.

    decode(content, "cat.jpg", channels=3, size=32)    bytes   -> uint8 (3, 32, 32)
    read_image(path, channels=3, size=32)              a file  -> uint8 (3, 32, 32)

A model sees in service what it saw in training: the picture upright as its EXIF
orientation says, its centre square, resized in Pillow's integer arithmetic (the
same pixels whatever the processor and the thread count), grey or RGB. Needs
numpy and Pillow only, so that it can be used where torch is not installed.
Decoding keeps no state and may run in several threads.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from epdistill.errors import DataError

# Pillow looks at the content, not at the name: without this list, a file that
# says .png could reach any of its decoders (one of them starts Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
# 256 MiB as RGB: where Pillow draws its line between photographs and files made
# to exhaust memory. Pillow only warns up to twice as many; here it is the limit.
MAX_PIXELS = 89_478_485

Pixels = npt.NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB"}
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B")
_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4, tag 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warnings_lock = threading.Lock()


def decode(content: bytes, source: str, *, channels: int, size: int) -> Pixels:
    """Decode an image file's content as a model expects it.

    Turned as its EXIF orientation says, the centre square resized (bilinear,
    antialiased), transparency dropped, 16-bit grey scaled to 8 bits; of an
    animation, the first picture.

    Args:
        content: The whole file.
        source: What error messages call it: a path, or the name of an upload.
        channels: C, 1 (grey) or 3 (RGB).
        size: S, the side in pixels of the result.

    Returns:
        uint8 (C, S, S), contiguous and writable.

    Raises:
        DataError: The content is damaged, of another format than `FORMATS`, has
            more than `MAX_PIXELS` pixels or pixels of more than 16 bits; or
            `channels` or `size` is out of range.
    """
    if channels not in _MODES or size < 1:
        raise DataError(
            f"received {channels} channels and size {size}; expected 1 (grey) or 3 (RGB) channels "
            "and at least 1 pixel to decode images"
        )
    with _one_line(source), _open(io.BytesIO(content), source) as image:
        file_format = image.format or ""
        image.load()  # before EXIF: Pillow turns TIFFs itself while it loads them
        return to_pixels(fit(_eight_bit(_upright(image), file_format, _MODES[channels]), size))


def read_image(path: Path, *, channels: int, size: int) -> Pixels:
    """Decode an image file; see `decode`.

    Args:
        path: The file.
        channels: C, 1 (grey) or 3 (RGB).
        size: S, the side in pixels of the result.

    Returns:
        uint8 (C, S, S).

    Raises:
        DataError: As `decode`, or the file is missing or cannot be read.
    """
    return decode(read_bytes(path), str(path), channels=channels, size=size)


def read_bytes(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    with _one_line(str(path)):
        return path.read_bytes()


def read_header(path: Path) -> tuple[bool, tuple[int, int]]:
    """Whether an image file is grey, and its (width, height), without decoding the pixels.

    Raises:
        DataError: As `read_image`, as far as the header shows it.
    """
    with _one_line(str(path)), _open(path, str(path)) as image:
        return image.mode in _GREY_MODES, image.size


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut out the centre (bilinear, antialiased).

    Only the part that is kept is computed; the filter still sees what lies beside it.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_pixels(image: Image.Image) -> Pixels:
    """uint8 (C, H, W) of an L or RGB image, contiguous and writable."""
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn whatever reading and decoding raise into a DataError that names the source."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist; expected an image file") from error
    except Image.DecompressionBombError as error:  # above twice Pillow's own limit
        raise _too_large(source, "far beyond the limit") from error
    except Exception as error:  # each of Pillow's decoders has its own errors for damaged files
        # Pillow's text would name a buffer by its address in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        text = "unrecognised content" if unknown else " ".join(str(error).split())
        raise DataError(
            f"{source} is not a readable image ({text or type(error).__name__}); expected one of "
            f"{', '.join(FORMATS)}: repair or remove it"
        ) from error


def _too_large(source: str, received: str) -> DataError:
    return DataError(
        f"{source} is too large a picture ({received}); expected at most {MAX_PIXELS:,} pixels: "
        "shrink it first"
    )


def _open(file: Path | io.BytesIO, source: str) -> Image.Image:
    """Read the header only, and refuse a picture of a size meant to exhaust memory."""
    with _no_warnings():
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise _too_large(source, f"{image.width}x{image.height} pixels")
    return image


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow on sizes (checked here, and refused) and damaged metadata (harmless)."""
    # The list of filters belongs to the process: without the lock, two threads
    # could leave theirs behind.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Turn a loaded image as its EXIF orientation says."""
    try:
        with _no_warnings():
            orientation = image.getexif().get(_ORIENTATION)
    # Damaged metadata say nothing about the pixels: as viewers do, show them as stored.
    except Exception:
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image, file_format: str, mode: str) -> Image.Image:
    """Convert to mode L or RGB."""
    if image.mode.startswith("I"):
        # PNG and PPM reach 16 bits at most; Pillow's "I" of a TIFF is 16 or 32 bits with a sign.
        if image.mode == "I" and file_format not in ("PNG", "PPM"):
            raise ValueError("32-bit or signed pixels, expected 8 or 16 bits")
        # Pillow's own conversion clips 16-bit values to 255, which leaves a white image.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels {values.min()}..{values.max()}, expected 0..65535")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns where a colour is transparent
    return image.convert(mode)
