"""Image files of every kind become what the model was trained on, or one clear line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from epdistill.errors import DataError
from epdistill.export.predict import load_image, predict_files, softmax

Array = npt.NDArray[np.float32]


class Channels:
    """Logits = 10 times the mean of each channel (grey: of the image, and its negative)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.input_shape = shape
        self.classes: Sequence[str] = ("red", "green", "blue") if shape[0] == 3 else ("lit", "dark")
        self.batches: list[int] = []

    def run(self, images: Array, /) -> Array:
        assert images.dtype == np.float32 and images.shape[1:] == self.input_shape
        self.batches.append(len(images))
        means = images.mean(axis=(2, 3)) * np.float32(10)
        return means if self.input_shape[0] == 3 else np.concatenate([means, 10 - means], axis=1)


def save(path: Path, mode: str, colour: float | tuple[int, ...], size: tuple[int, int]) -> Path:
    Image.new(mode, size, colour).save(path)
    return path


def test_colour_files_of_any_size_and_mode(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / "red.png", "RGB", (255, 0, 0), (8, 8)),
        save(tmp_path / "green.png", "RGBA", (0, 255, 0, 128), (31, 5)),
        save(tmp_path / "blue.jpg", "RGB", (0, 0, 255), (3, 40)),
        save(tmp_path / "grey.png", "L", 128, (8, 8)),
    ]
    found = predict_files(Channels((3, 8, 8)), paths, top=2)
    assert [item.path for item in found] == paths
    assert [item.label for item in found[:3]] == ["red", "green", "blue"]
    assert all(item.probability > 0.99 for item in found[:3])
    assert all(len(item.top) == 2 for item in found)
    assert [chance for _, chance in found[3].top] == pytest.approx([1 / 3, 1 / 3])


def test_a_grey_model_gets_grey(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / "white.png", "RGB", (255, 255, 255), (9, 9)),
        save(tmp_path / "black.png", "L", 0, (4, 4)),
        save(tmp_path / "palette.png", "P", 0, (4, 4)),
    ]
    found = predict_files(Channels((1, 6, 5)), paths)
    assert [item.label for item in found] == ["lit", "dark", "dark"]
    assert all(len(item.top) == 2 for item in found)  # top 3 of 2 classes
    assert sum(chance for _, chance in found[0].top) == pytest.approx(1.0)


def test_pixels_arrive_unchanged_at_the_model_s_own_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", (3, 5, 7))
    assert image.shape == (3, 5, 7) and image.dtype == np.float32
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_shrinking_averages(tmp_path: Path) -> None:
    """Without antialiasing a fine checkerboard would shrink to black or white, not grey."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "x.png")
    assert np.abs(load_image(tmp_path / "x.png", (1, 8, 8)) - 0.5).max() < 0.05


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", (1, 4, 4))
    np.testing.assert_allclose(image[0], ramp / 65535, atol=1 / 255)


def test_transparent_palettes_raise_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    red = load_image(tmp_path / "x.png", (3, 4, 4))
    assert red[0].min() == 1.0 and red[1:].max() == 0.0


def test_many_files_go_in_batches(tmp_path: Path) -> None:
    path = save(tmp_path / "red.png", "RGB", (255, 0, 0), (4, 4))
    model = Channels((3, 4, 4))
    assert len(predict_files(model, [path] * 130)) == 130
    assert model.batches == [64, 64, 2]
    assert predict_files(model, []) == []


def broken_files(folder: Path) -> list[Path]:
    whole = save(folder / "whole.png", "RGB", (1, 2, 3), (32, 32)).read_bytes()
    cut, text, empty = folder / "cut.png", folder / "text.png", folder / "empty.png"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("this is no picture")
    empty.write_bytes(b"")
    noise = folder / "noise.jpg"
    noise.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    real = folder / "float.tiff"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(real)
    return [cut, text, empty, noise, real, folder / "missing.png", folder]


def test_broken_files_are_named_in_one_line(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", "RGB", (1, 2, 3), (4, 4))
    for path in broken_files(tmp_path):
        with pytest.raises(DataError) as caught:
            predict_files(Channels((3, 8, 8)), [good, path])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", "L", 0, (30, 30))
    for limit in (800, 100):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="too large"):
            load_image(path, (1, 4, 4))


def test_top_and_channels_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", "L", 0, (4, 4))
    with pytest.raises(DataError, match="at least 1"):
        predict_files(Channels((1, 4, 4)), [path], top=0)
    with pytest.raises(DataError, match="4 channels"):
        load_image(path, (4, 4, 4))


def test_softmax_survives_large_logits() -> None:
    chances = softmax(np.array([[1000.0, 1000.0, 0.0], [-1000.0, 0.0, -1000.0]], np.float32))
    np.testing.assert_allclose(chances, [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
