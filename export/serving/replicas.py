"""What the replicas of a deployment have in common: the same files, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from epdistill.errors import ExportError
from epdistill.export.manifest import manifest_path, read_manifest
from epdistill.export.runtime import DEFAULT_PROVIDER
from epdistill.export.serving.app import create_app
from epdistill.export.serving.engine import Engine
from epdistill.export.serving.models import load_models
from epdistill.export.serving.settings import Limits


@dataclass(frozen=True)
class Plan:
    """What every replica is made from; it travels to them.

    Attributes:
        digests: Model files, as replicas find them, and the SHA-256 that each must have.
        threads: Of onnxruntime, per model and replica.
        providers: As for `OnnxClassifier`.
        limits: Of each replica. What concerns connections (`header_bytes`, `header_seconds`,
            `linger`) is up to what stands before the replicas.
        token: As for `create_app`.
    """

    digests: Mapping[str, str]
    threads: int = 1
    providers: tuple[str, ...] = (DEFAULT_PROVIDER,)
    limits: Limits = field(default_factory=Limits)
    token: str | None = None

    def build(self) -> FastAPI:
        """The application of one replica.

        Its models are verified against their manifests, and against the digests: a replica
        that comes late cannot serve another file than the first one.

        Raises:
            ExportError: As `load_models`; or a file is not the one that was planned.
        """
        paths = [Path(name) for name in self.digests]
        models = load_models(paths, threads=self.threads, providers=self.providers)
        for path, model in zip(paths, models.values(), strict=True):
            found, expected = model.manifest.sha256, self.digests[str(path)]
            if found != expected:
                raise ExportError(
                    f"{path} was replaced after it was deployed: its SHA-256 is {found[:12]}..., "
                    f"expected {expected[:12]}...; restore it, or deploy again"
                )
        return create_app(Engine(models, self.limits), self.token)


def planned(
    paths: Sequence[Path],
    *,
    threads: int = 1,
    providers: Sequence[str] = (DEFAULT_PROVIDER,),
    limits: Limits | None = None,
    token: str | None = None,
) -> Plan:
    """A plan for model files as they are now.

    Args:
        paths: `.onnx` files; every machine with a replica has them at the same place.
        threads: As for `Plan`, like all below.
        providers: As there.
        limits: As there.
        token: As there.

    Raises:
        ExportError: A manifest is missing or damaged.
    """
    found = [path.absolute() for path in paths]
    digests = {str(path): read_manifest(manifest_path(path)).sha256 for path in found}
    return Plan(digests, threads, tuple(providers), limits or Limits(), token)
