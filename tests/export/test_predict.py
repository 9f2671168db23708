"""Image files of every kind become what the model was trained on, or one clear line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from epdistill.data import load, to_float
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
    found = predict_files(Channels((1, 5, 5)), paths)
    assert [item.label for item in found] == ["lit", "dark", "dark"]
    assert all(len(item.top) == 2 for item in found)  # top 3 of 2 classes
    assert sum(chance for _, chance in found[0].top) == pytest.approx(1.0)


def test_pixels_arrive_unchanged_at_the_model_s_own_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png", (3, 7, 7))
    assert image.shape == (3, 7, 7) and image.dtype == np.float32
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_predicting_sees_the_pixels_of_training_to_the_bit(tmp_path: Path) -> None:
    """Oblong JPEGs lying on their side (EXIF 6 and 8), as a folder data set and as files."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for index in range(4):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
            exif = Image.Exif()
            exif[0x0112] = (6, 8)[index % 2]
            photo = coarse.resize((53, 32), Image.Resampling.BICUBIC)
            photo.save(tmp_path / label / f"{index}.jpg", exif=exif)
    dataset = load(f"folder:{tmp_path}", image_size=16)
    trained = Counter(
        (dataset.classes[label], to_float(image).numpy().tobytes())
        for split in (dataset.train, dataset.validation, dataset.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    files = sorted(tmp_path.rglob("*.jpg"))
    served = Counter((f.parent.name, load_image(f, (3, 16, 16)).tobytes()) for f in files)
    assert len(served) == 8
    assert served == trained
    with Image.open(files[0]) as photo:
        as_stored = np.asarray(photo.resize((16, 16), box=(10.5, 0, 42.5, 32))) / 255
    found = load_image(files[0], (3, 16, 16)).transpose(1, 2, 0)
    assert not np.allclose(found, as_stored, atol=0.1)


def test_every_grey_value_is_the_float_of_training(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = to_float(torch.from_numpy(values)).numpy()
    assert np.array_equal(load_image(tmp_path / "x.png", (1, 16, 16))[0], expected)


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


def test_top_and_the_model_s_shape_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", "L", 0, (4, 4))
    with pytest.raises(DataError, match="at least 1"):
        predict_files(Channels((1, 4, 4)), [path], top=0)
    for shape, received in (
        ((4, 4, 4), "4 channels, 4 high and 4 wide"),
        ((1, 4, 6), "1 channels, 4 high and 6 wide"),
    ):
        with pytest.raises(DataError, match=f"{received}; expected squares") as caught:
            predict_files(Channels(shape), [path])
        assert "\n" not in str(caught.value)


def test_softmax_survives_large_logits() -> None:
    chances = softmax(np.array([[1000.0, 1000.0, 0.0], [-1000.0, 0.0, -1000.0]], np.float32))
    np.testing.assert_allclose(chances, [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
