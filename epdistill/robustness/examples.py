"""A few images of an evaluation as they were shown to the models, kept to be looked at.

Beside the figures an evaluation writes

    examples.safetensors   clean, adversarial and corrupted images, and every model's answers
    examples-NORM.png/svg  clean images, adversarial ones and their change (`pictures.grid`)

They illustrate and count for nothing: one attack with one gradient, a handful of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from epdistill.data import Images
from epdistill.errors import EvaluationError
from epdistill.robustness.attacking import Ledger, open_ledger
from epdistill.robustness.attacks import PGDSettings, pgd_l2, pgd_linf
from epdistill.robustness.corruptions import corrupt
from epdistill.robustness.guards import L2, LINF, derive_seed, evaluation_mode
from epdistill.robustness.pictures import adversarial_grid, save
from epdistill.robustness.results import checked
from epdistill.robustness.shares import ball as in_words
from epdistill.robustness.subjects import Subject
from epdistill.robustness.suites import QuickSuite
from epdistill.robustness.units import named, own_rng
from epdistill.runs import atomic_write

NAME = "examples.safetensors"
CLEAN, ADVERSARIAL = "clean", "adversarial"
COUNT = 6
KINDS = 3  # of corruption
STEPS = 20
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Examples:
    """Images, and what the models answered to them.

    Attributes:
        clean: (N,C,H,W) float32 in [0,1].
        labels: N true classes, by name.
        numbers: N places in the split.
        split: `test` or `validation`.
        norm: `linf` or `l2`, of the attack.
        eps: Its radius on pixels in [0,1].
        adversarial: By model's name, (N,C,H,W): what was made on it.
        views: By the same names, whose gradient was followed.
        corrupted: By corruption and severity (`fog 3`), (N,C,H,W).
        answers: By model's name, then by `clean`, `adversarial` or corruption, N classes.
        left_out: By model's name, why it was not attacked.
    """

    clean: Tensor
    labels: tuple[str, ...]
    numbers: tuple[int, ...]
    split: str
    norm: str
    eps: float
    adversarial: Mapping[str, Tensor] = field(default_factory=dict)
    views: Mapping[str, str] = field(default_factory=dict)
    corrupted: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def telling_radius(results: Mapping[str, Any], suite: QuickSuite) -> tuple[str, float]:
    """The norm and radius worth looking at: where half of the images of some model are broken.

    That is the smallest such radius among Linf (L2 without any), or the largest of all.

    Args:
        results: The content of results.json.
        suite: Whose radii stand for what was not attacked at all.
    """
    for norm in (LINF, L2):
        rows = [row for model in results["models"] for row in model["worst_case"]]
        found = sorted((row["eps"], row["accuracy"]) for row in rows if row["norm"] == norm)
        found = [(eps, accuracy) for eps, accuracy in found if eps > 0]
        if found:
            return norm, next((eps for eps, accuracy in found if accuracy <= 0.5), found[-1][0])
    norm = LINF if suite.linf or not suite.l2 else L2
    return norm, (suite.middle(norm) or (8 / 255,))[0]


def find_examples(
    subjects: Sequence[Subject],
    images: Images,
    labels: Tensor,
    *,
    numbers: Tensor,
    classes: Sequence[str],
    ball: tuple[str, float],
    suite: QuickSuite,
    seed: int,
    split: str,
) -> Examples:
    """Attack and corrupt the first images of an evaluation.

    Args:
        subjects: The models.
        images: (N,C,H,W) uint8, the whole split.
        labels: (N,) int64.
        numbers: (M,) int64, the images that were evaluated; the first few are taken.
        classes: Names of the classes.
        ball: Norm and radius of the attack, as `telling_radius` chooses them.
        suite: Whose corruptions and severities are shown.
        seed: Fixes everything random; the global generators are neither read nor moved.
        split: `test` or `validation`.
    """
    chosen = numbers[:COUNT]
    pixels, truth = images[chosen].cpu(), labels[chosen].cpu()
    clean = pixels.float() / 255
    norm, eps = ball
    corrupted = _corrupted(pixels, suite, seed)
    adversarial: dict[str, Tensor] = {}
    views: dict[str, str] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    left_out: dict[str, str] = {}
    modules = [module for subject in subjects for module in subject.modules]
    with evaluation_mode(modules):
        for subject in subjects:
            ledger = open_ledger(subject, suite.samples)
            shown = {CLEAN: clean, **corrupted}
            if not ledger.views:
                left_out[subject.name] = "gives no gradients"
            else:
                views[subject.name] = next(iter(ledger.views))
                try:
                    adversarial[subject.name] = _attacked(ledger, clean, truth, norm, eps, seed)
                    shown[ADVERSARIAL] = adversarial[subject.name]
                except EvaluationError as error:  # such as a gradient that is nothing but zero
                    left_out[subject.name] = str(error)
            with torch.no_grad(), own_rng([subject.device], derive_seed(seed, "examples")):
                answers[subject.name] = {
                    what: [
                        classes[int(place)]
                        for place in ledger.predict(some.to(subject.device)).argmax(1)
                    ]
                    for what, some in shown.items()
                }
    return Examples(
        clean,
        tuple(classes[int(label)] for label in truth),
        tuple(int(number) for number in chosen),
        split,
        norm,
        eps,
        adversarial,
        views,
        corrupted,
        answers,
        left_out,
    )


def _attacked(
    ledger: Ledger, clean: Tensor, truth: Tensor, norm: str, eps: float, seed: int
) -> Tensor:
    """PGD along a model's first gradient, (N,C,H,W) float32 on the CPU."""
    device = ledger.subject.device
    attack = pgd_linf if norm == LINF else pgd_l2
    view = next(iter(ledger.views.values()))
    own = derive_seed(seed, "examples", ledger.name)
    with named(ledger.name), own_rng([device], own):
        found = attack(
            view,
            clean.to(device),
            truth.to(device),
            eps,
            seed=own,
            settings=PGDSettings(steps=STEPS),
        )
    return found.detach().float().cpu()


def _corrupted(pixels: Tensor, suite: QuickSuite, seed: int) -> dict[str, Tensor]:
    """A few of the suite's corruptions at its middle severity."""
    names, severities = suite.corruptions, suite.severities
    if not names or not severities:
        return {}
    severity = severities[len(severities) // 2]
    spread = range(0, len(names), max(1, -(-len(names) // KINDS)))
    return {
        f"{names[place].replace('_', ' ')} {severity}": (
            corrupt(pixels, names[place], severity, seed=seed).float() / 255
        )
        for place in spread
    }


def write_examples(examples: Examples, folder: Path) -> None:
    """Write `examples.safetensors`, and the grid as PNG and SVG where there was an attack."""
    tensors = {CLEAN: examples.clean}
    for kind, images in ((ADVERSARIAL, examples.adversarial), ("corrupted", examples.corrupted)):
        for place, value in enumerate(images.values()):
            tensors[f"{kind}.{place}"] = value.contiguous()
    facts = {
        "format_version": FORMAT_VERSION,
        "labels": examples.labels,
        "numbers": examples.numbers,
        "split": examples.split,
        "norm": examples.norm,
        "eps": examples.eps,
        ADVERSARIAL: list(examples.adversarial),
        "corrupted": list(examples.corrupted),
        "views": dict(examples.views),
        "answers": examples.answers,
        "left_out": dict(examples.left_out),
    }
    atomic_write(folder / NAME, save_safetensors(tensors, metadata={"facts": json.dumps(facts)}))
    if examples.adversarial:
        figure = adversarial_grid(
            examples.clean,
            examples.labels,
            examples.adversarial,
            {name: examples.answers[name][ADVERSARIAL] for name in examples.adversarial},
            title=f"PGD, {STEPS} steps, {in_words(examples.norm, examples.eps)}",
        )
        save(figure, folder / f"examples-{examples.norm}")


def read_examples(folder: Path) -> Examples | None:
    """What `write_examples` wrote; None where there is nothing.

    Raises:
        EvaluationError: The file is damaged, was edited, or is of another version.
    """
    path = checked(folder, NAME)
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        tensors = load_safetensors(data)
        length = int.from_bytes(data[:8], "little")
        facts: dict[str, Any] = json.loads(
            json.loads(data[8 : 8 + length])["__metadata__"]["facts"]
        )
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {facts['format_version']}")

        def images(kind: str) -> dict[str, Tensor]:
            return {name: tensors[f"{kind}.{place}"] for place, name in enumerate(facts[kind])}

        return Examples(
            tensors[CLEAN],
            tuple(facts["labels"]),
            tuple(facts["numbers"]),
            facts["split"],
            facts["norm"],
            facts["eps"],
            images(ADVERSARIAL),
            facts["views"],
            images("corrupted"),
            facts["answers"],
            facts["left_out"],
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({' '.join(str(error).split())}); delete it, or evaluate again"
        ) from error
