"""Adversarial images on disk, so that several evaluations share those of one model.

What an attack makes of a deterministic model depends on its weights, the settings and the
images, not on who else is evaluated. A file that is damaged is as good as none: its
images are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
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
from epdistill.sealed import with_digest, without_digest

# Adversarial images, and how many images the model was shown for them.
Made = tuple[Tensor, int]


@dataclass(frozen=True)
class Crafted:
    """A folder of adversarial images.

    Attributes:
        folder: Made when it is needed. Each file is a safetensors file behind its digest.
        model: The identity of the model whose images are kept (`Subject.identity`).
        facts: JSON-ready, all that images depend on beside the model: settings, data,
            versions, threads.
    """

    folder: Path
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def get(self, identity: str, key: object, make: Callable[[], Made]) -> Made:
        """The images of one unit of work, from the folder if they are there.

        Args:
            identity: The model's.
            key: JSON-ready, tells units of a model apart.
            make: Makes them: (n,C,H,W) float32 on the CPU, and how many images were shown.
        """
        if identity != self.model:
            return make()
        told = json.dumps([identity, key, dict(self.facts)], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()}.safetensors"
        found = _read(path)
        if found is None:
            found = make()
            images, shown = found
            tensors = {"images": images.contiguous(), "shown": torch.tensor(shown)}
            # Whoever is done may take the folder away meanwhile; what is not kept is made again.
            with suppress(DiskError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, with_digest(save_safetensors(tensors)))
        return found


def _read(path: Path) -> Made | None:
    """What a file holds; None if there is none, or it is not as it was written."""
    if not path.is_file():
        return None
    data = without_digest(path.read_bytes())
    if data is None:
        return None
    # A digest that is right stands for the whole content.
    tensors = load_safetensors(data)
    return tensors["images"], int(tensors["shown"])
