"""Labels and probabilities for image files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from epdistill.errors import DataError

_BATCH = 64
_MODES = {1: "L", 3: "RGB"}

Array = npt.NDArray[np.float32]


class Classifier(Protocol):
    """What predicting needs: `OnnxClassifier` has it."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the K classes in the order of the logits."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def run(self, images: Array, /) -> Array:
        """float32 (N, C, H, W) in [0,1] to logits (N, K)."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one file.

    Attributes:
        path: The image file.
        top: (class, probability) pairs, the most probable first.
    """

    path: Path
    top: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """The probability of `label`, in [0,1]."""
        return self.top[0][1]


def predict_files(classifier: Classifier, paths: Sequence[Path], top: int = 3) -> list[Prediction]:
    """Classify image files.

    Args:
        classifier: Gives logits for images in [0,1].
        paths: Image files in any format and size Pillow reads.
        top: How many classes to name per file (at most all).

    Returns:
        One prediction per path, in their order.

    Raises:
        DataError: A file is missing or no readable image (the message names it),
            or `top` is not positive.
    """
    if top < 1:
        raise DataError(f"received top {top}; expected at least 1")
    predictions: list[Prediction] = []
    for start in range(0, len(paths), _BATCH):
        chunk = paths[start : start + _BATCH]
        batch = np.stack([load_image(path, classifier.input_shape) for path in chunk])
        chances = softmax(classifier.run(batch))
        for path, row in zip(chunk, chances, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            named = tuple((classifier.classes[index], float(row[index])) for index in order)
            predictions.append(Prediction(path, named))
    return predictions


def load_image(path: Path, shape: tuple[int, int, int]) -> Array:
    """Read an image file as a model wants it.

    Grey or RGB as the model has 1 or 3 channels (transparency is dropped), the
    whole picture stretched to the model's size (bilinear, antialiased).

    Args:
        path: The file.
        shape: (C, H, W) with C 1 or 3.

    Returns:
        float32 (C, H, W) in [0,1].

    Raises:
        DataError: The file is missing or no readable image, or C is neither 1 nor 3.
    """
    channels, height, width = shape
    if channels not in _MODES:
        raise DataError(
            f"the model takes images of {channels} channels; expected 1 (grey) or 3 (RGB) "
            "to predict from image files"
        )
    try:
        with warnings.catch_warnings():
            # Pillow only warns about a picture of a size meant to exhaust memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                converted = _eight_bit(image).convert(_MODES[channels])
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; expected an image file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image Pillow can read; expected PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} is too large a picture ({error}); shrink it first") from error
    # Each of Pillow's decoders has its own errors for a broken file.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}); expected an intact image") from error
    resized = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float32).reshape(height, width, channels) / 255.0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture in a mode that converts to grey and RGB without clipping or a warning."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Probabilities (N, K) of logits (N, K), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
