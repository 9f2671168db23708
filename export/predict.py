"""Labels and probabilities for image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from epdistill.errors import DataError
from epdistill.images import read_image

_BATCH = 64

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
        paths: Image files of any size, in one of `epdistill.images.FORMATS`.
        top: How many classes to name per file (at most all).

    Returns:
        One prediction per path, in their order.

    Raises:
        DataError: A file is missing or no readable image (the message names it),
            the model does not take grey or RGB squares, or `top` is not positive.
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
    """Read an image file as the model saw its training images, to the bit.

    The centre square, upright, grey or RGB as the model has 1 or 3 channels; see
    `epdistill.images.decode`.

    Args:
        path: The file.
        shape: (C, H, W) with C 1 or 3 and H = W.

    Returns:
        float32 (C, H, W) in [0,1], value v of 0..255 becoming v / 255.

    Raises:
        DataError: The file is missing or no readable image, or the shape is
            another one.
    """
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise DataError(
            f"the model takes images of {channels} channels, {height} high and {width} wide; "
            "expected squares of 1 (grey) or 3 (RGB) channels to predict from image files"
        )
    pixels = read_image(path, channels=channels, size=height)
    return pixels.astype(np.float32) / np.float32(255)


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Probabilities (N, K) of logits (N, K), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
