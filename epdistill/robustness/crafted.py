"""Adversarial images on disk, so that several evaluations share those of one model.

What an attack makes of a deterministic model depends on its weights, the settings and the
images, not on who else is evaluated. A file that is damaged is as good as none: its
images are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from epdistill.errors import DiskError
from epdistill.runs import atomic_write

_DIGEST = hashlib.sha256().digest_size
# Adversarial images, and how many images the model was shown for them.
Made = tuple[Tensor, int]


@dataclass(frozen=True)
class Crafted:
    """A folder of adversarial images.

    Attributes:
        folder: Made when it is needed. Each file holds the SHA-256 of the rest in front (32
            bytes), then a safetensors file.
        models: The identities of the models whose images are kept (`Subject.identity`).
        facts: JSON-ready, all that images depend on beside the model: settings, data,
            versions, threads.
    """

    folder: Path
    models: Collection[str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def get(self, identity: str, key: object, make: Callable[[], Made]) -> Made:
        """The images of one unit of work, from the folder if they are there.

        Args:
            identity: The model's.
            key: JSON-ready, tells units of a model apart.
            make: Makes them: (n,C,H,W) float32 on the CPU, and how many images were shown.
        """
        if identity not in self.models:
            return make()
        name = hashlib.sha256(_text([identity, key, dict(self.facts)])).hexdigest()
        path = self.folder / f"{name}.safetensors"
        found = _read(path)
        if found is None:
            found = make()
            images, shown = found
            data = save_safetensors({"images": images.contiguous(), "shown": torch.tensor(shown)})
            # Whoever is done may take the folder away meanwhile; what is not kept is made again.
            with suppress(DiskError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, hashlib.sha256(data).digest() + data)
        return found


def _text(content: object) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _read(path: Path) -> Made | None:
    """What a file holds; None if there is none, or it is not as it was written."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    data = content[_DIGEST:]
    # A digest that is right stands for the whole content.
    if hashlib.sha256(data).digest() != content[:_DIGEST]:
        return None
    tensors = load_safetensors(data)
    return tensors["images"], int(tensors["shown"])
