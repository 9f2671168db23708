"""One decoder: every kind of file becomes the same upright square of pixels, or one clear line."""

import io
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from epdistill import images
from epdistill.errors import DataError
from epdistill.images import FORMATS, SUFFIXES, decode, read_header, read_image

MARKED = np.zeros((8, 8), dtype=np.uint8)
MARKED[:4, :4] = 250  # top left bright, top right less, the rest dark: every turn shows
MARKED[:4, 4:] = 120


def encode(image, file_format="PNG", **options) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def refused(content: bytes, **arguments) -> str:
    with pytest.raises(DataError) as raised:
        decode(content, "x.png", **{"channels": 1, "size": 8, **arguments})
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_importing_needs_no_torch():
    code = (
        "import sys, epdistill.images, epdistill.export.predict\n"
        "heavy = {'torch', 'torchvision', 'onnxruntime', 'onnx', 'scipy', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# what comes out


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_the_own_size_are_unchanged(channels):
    shape = (9, 9) if channels == 1 else (9, 9, 3)
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = decode(encode(array), "x", channels=channels, size=9)
    assert pixels.shape == (channels, 9, 9) and pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.array_equal(pixels, array.reshape(9, 9, channels).transpose(2, 0, 1))


def test_the_centre_square_is_taken(tmp_path):
    array = np.zeros((8, 24), dtype=np.uint8)
    array[:, 8:16] = 50
    (tmp_path / "wide.png").write_bytes(encode(array))
    image = read_image(tmp_path / "wide.png", channels=1, size=8)
    assert image.shape == (1, 8, 8)
    assert (image == 50).all()
    whole = np.asarray(Image.fromarray(array).resize((12, 4), Image.Resampling.BILINEAR))
    smaller = read_image(tmp_path / "wide.png", channels=3, size=4)
    assert np.array_equal(smaller, np.stack([whole[:, 4:8]] * 3))


def test_shrinking_averages():
    """Without antialiasing a fine checkerboard would shrink to black or white, not grey."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = decode(encode(board), "x", channels=1, size=8)
    assert np.abs(shrunk - 127.5).max() < 12


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, MARKED),
        (2, MARKED[:, ::-1]),
        (3, MARKED[::-1, ::-1]),
        (4, MARKED[::-1]),
        (5, MARKED.T),
        (6, MARKED.T[:, ::-1]),
        (7, MARKED.T[::-1, ::-1]),
        (8, MARKED.T[::-1]),
        (9, MARKED),
        (0, MARKED),
    ],
)
def test_pictures_are_turned_as_exif_says(file_format, orientation, upright):
    """EXIF 2.3, tag 274: 6 says that the stored first row is the right-hand side."""
    content = encode(
        Image.fromarray(MARKED).convert("RGB"), file_format, exif=oriented(orientation), quality=100
    )
    found = decode(content, "x", channels=3, size=8).astype(int)
    tolerance = 0 if file_format in ("PNG", "TIFF") else 6
    assert np.abs(found - upright.astype(int)).max() <= tolerance


def test_oblong_sixteen_bit_pictures_are_turned():
    deep = np.zeros((8, 16), dtype=np.uint16)
    deep[:, 4:8] = 257 * 200
    expected = np.zeros((8, 8), dtype=np.uint8)
    expected[:4] = 200  # of columns 4..11, the left half comes to the top
    for file_format in ("PNG", "TIFF"):
        content = encode(deep, file_format, exif=oriented(6))
        assert np.array_equal(decode(content, "x", channels=1, size=8)[0], expected)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "damaged", [b"neither II nor MM", b"II*\x00\x08\x00\x00\x00\x05\x00\x12\x01"]
)
def test_damaged_exif_leaves_the_picture_as_stored(file_format, damaged):
    contents = [
        encode(MARKED, file_format),
        encode(MARKED, file_format, exif=b"Exif\x00\x00" + damaged),
    ]
    assert damaged in contents[1]
    assert np.array_equal(*(decode(content, "x", channels=1, size=8) for content in contents))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 3), [77, 77, 77]),
        ("RGB", (9, 99, 199), [9, 99, 199]),
        ("RGBA", (9, 99, 199, 0), [9, 99, 199]),
        ("I;16", 128 * 257, [128, 128, 128]),
    ],
)
def test_modes(mode, colour, expected):
    content = encode(Image.new(mode, (8, 8), colour))
    assert decode(content, "x", channels=3, size=8)[:, 5, 5].tolist() == expected
    grey = decode(content, "x", channels=1, size=8)
    assert np.array_equal(
        grey[0], np.asarray(Image.new("RGB", (8, 8), tuple(expected)).convert("L"))
    )


def test_palettes_with_and_without_transparency():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for options in ({}, {"transparency": b"\x00\x80"}, {"transparency": 1}):
        content = encode(palette, **options)
        assert decode(content, "x", channels=3, size=8)[:, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pgm = b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes()
    for content in (encode(ramp), encode(ramp, "TIFF"), pgm):
        found = decode(content, "x", channels=1, size=8)[0]
        assert np.array_equal(found, np.rint(ramp / 257).astype(np.uint8))


def test_cmyk_photographs():
    content = encode(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG")
    red, green, blue = decode(content, "x", channels=3, size=8)[:, 4, 4].astype(int)
    assert green > 200 and max(red, blue) < 60


def test_of_an_animation_the_first_picture():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(content, "x", channels=3, size=8)[:, 0, 0].tolist() == [255, 0, 0]


def test_every_suffix_has_a_decoder():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in SUFFIXES} <= set(FORMATS)


def test_headers_say_grey_and_size(tmp_path):
    for name, picture, grey in (
        ("grey.png", Image.new("L", (8, 9)), True),
        ("deep.png", Image.new("I;16", (8, 9)), True),
        ("colour.png", Image.new("RGB", (8, 9)), False),
        ("palette.png", Image.new("P", (8, 9)), False),
    ):
        picture.save(tmp_path / name)
        assert read_header(tmp_path / name) == (grey, (8, 9))


# what is refused


def test_what_cannot_be_decoded_is_named_in_one_line():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    whole = encode(noise)
    assert "(unrecognised content); expected one of PNG, JPEG" in refused(b"this is no picture")
    assert "unrecognised" in refused(b"")
    # A decoder that is not on the list is not reached under another name.
    assert "unrecognised" in refused(encode(MARKED, "GIF"))
    assert "unrecognised" in refused(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    for content in (whole[:-400], encode(noise, "JPEG")[:-200], encode(noise, "WEBP")[:-200]):
        assert refused(content).startswith("x.png is not a readable image (")
    assert "floating-point" in refused(encode(np.zeros((8, 8), np.float32), "TIFF"))
    assert "32-bit or signed" in refused(encode(np.full((8, 8), 70, np.int32), "TIFF"))


def test_a_cut_png_is_refused_though_its_exif_is_sought_behind_the_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    content = encode(noise, exif=oriented(3))
    assert "is not a readable image" in refused(content[: len(content) // 2])


def test_missing_files_and_folders(tmp_path):
    for reader in (read_header, lambda path: read_image(path, channels=1, size=8)):
        with pytest.raises(DataError, match=r"none\.png does not exist; expected"):
            reader(tmp_path / "none.png")
        with pytest.raises(DataError, match="Is a directory") as raised:
            reader(tmp_path)
        assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path):
    for side in (9_460, 13_000, 100_000):  # above the limit; near and above twice the limit
        content = b"P5 %d %d 255\n" % (side, side)
        assert "x.png is too large a picture" in refused(content)
        (tmp_path / "bomb.pgm").write_bytes(content)
        with pytest.raises(DataError, match="too large a picture") as raised:
            read_header(tmp_path / "bomb.pgm")
        assert "at most 89,478,485 pixels" in str(raised.value)
    # Of an allowed size, so its missing pixels are what is wrong with it.
    assert "not a readable" in refused(b"P5 9000 9 255\n")


def test_the_limit_is_our_own(monkeypatch):
    content = encode(Image.new("L", (30, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 899)
    assert "(30x30 pixels); expected at most 899" in refused(content)
    monkeypatch.setattr(images, "MAX_PIXELS", 900)
    assert decode(content, "x", channels=1, size=8).shape == (1, 8, 8)


def test_channels_and_size_are_checked():
    content = encode(MARKED)
    assert "received 2 channels" in refused(content, channels=2)
    assert "size 0" in refused(content, size=0)


def test_threads_take_turns_at_the_warning_filters(monkeypatch):
    inside, together = [], []
    really_open = Image.open

    def slow_open(*arguments, **options):
        inside.append(None)
        time.sleep(0.005)
        together.append(len(inside))
        image = really_open(*arguments, **options)
        inside.pop()
        return image

    monkeypatch.setattr(Image, "open", slow_open)
    contents = [encode(np.full((40, 40), value, np.uint8)) for value in range(16)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda content: decode(content, "x", channels=1, size=8), contents))
    assert [int(pixels[0, 0, 0]) for pixels in found] == list(range(16))
    assert together == [1] * 16
    assert list(warnings.filters) == before
