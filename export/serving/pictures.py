"""An uploaded picture becomes the tensor a model takes; logits become names."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from epdistill.errors import RequestError
from epdistill.export.predict import softmax
from epdistill.export.serving.corruptions import CORRUPTIONS, corrupt
from epdistill.export.serving.models import ServedModel
from epdistill.images import Pixels, decode

# A PNG or JPEG file begins so (PNG, 5.2; JPEG, B.1.1.3: SOI and the next marker). Fewer
# decoders than the toolkit knows are open to strangers.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


@dataclass(frozen=True)
class Change:
    """A corruption to be applied, or none.

    Attributes:
        corruption: A key of `CORRUPTIONS`, or None.
        severity: 1..5.
        seed: Fixes the noise.

    Raises:
        RequestError: 400; there is no such corruption.
    """

    corruption: str | None
    severity: int
    seed: int

    def __post_init__(self) -> None:
        if self.corruption is not None and self.corruption not in CORRUPTIONS:
            raise RequestError(
                400,
                f"received the corruption {self.corruption[:40]!r}; expected one of "
                f"{', '.join(CORRUPTIONS)}",
            )


def read(content: bytes, shape: tuple[int, int, int], change: Change) -> Pixels:
    """Decode an upload as training saw its images, and corrupt it at that size.

    Args:
        content: A PNG or JPEG file.
        shape: (C, H, W) of the model, squares of 1 or 3 channels.
        change: The corruption.

    Returns:
        uint8 (C, H, W).

    Raises:
        RequestError: 415, another kind of file; 400, a model for other images.
        DataError: The file is damaged or too large a picture.
    """
    channels, height, width = shape
    if channels not in (1, 3) or height != width:
        raise RequestError(
            400, f"the model takes images of shape {list(shape)}; expected grey or RGB squares "
            "to read from a file: send a tensor to its infer route",
        )  # fmt: skip
    if not content.startswith(_SIGNATURES):
        raise RequestError(415, "received neither PNG nor JPEG; expected such a file as the body")
    pixels = decode(content, "the upload", channels=channels, size=height)
    if change.corruption is None:
        return pixels
    return corrupt(pixels, change.corruption, change.severity, seed=change.seed)


def to_tensor(pixels: Pixels, model: ServedModel) -> npt.NDArray[Any]:
    """A batch of one, (1, ...) as the model takes it."""
    images = pixels[None].astype(np.float32) / np.float32(255)
    classifier = model.classifier
    return classifier.feed(images)[classifier.signature.input]


def named(logits: npt.NDArray[np.float32], classes: Sequence[str], top: int) -> dict[str, Any]:
    """The most probable classes of one image, as JSON.

    Args:
        logits: (1, K).
        classes: K names.
        top: How many to name, at most K.

    Raises:
        RequestError: 500; the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise RequestError(500, "the model's answer is not finite; expected logits")
    (chances,) = softmax(logits)
    order = np.argsort(-chances, kind="stable")[:top]
    best = [{"label": classes[k], "probability": float(chances[k])} for k in order]
    return {"label": best[0]["label"], "probability": best[0]["probability"], "top": best}


def data_url(pixels: Pixels) -> str:
    """uint8 (C, H, W) as a PNG in a `data:` URL."""
    picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
