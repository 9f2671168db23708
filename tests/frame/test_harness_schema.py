"""results.json, key by key, against its documentation; and what is refused when it is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import PGDSettings, SquareSettings
from epdistill.robustness.drawing import draw
from epdistill.robustness.harness import evaluate
from epdistill.robustness.outcomes import Evaluation
from epdistill.robustness.paper import PaperSuite
from epdistill.robustness.results import (
    JSON_NAME,
    SCHEMA_VERSION,
    read_results,
    summary,
    threats,
    write_results,
)
from epdistill.robustness.rows import COLUMNS
from epdistill.robustness.subjects import Horizons, Published, Subject, module_subject
from epdistill.robustness.suites import Attack, QuickSuite, TemporalSettings

DOCUMENT = Path(__file__).parents[2] / "docs" / "results-schema.md"
DIAGNOSIS = {"verdict": "no masking evidence found", "checks": []}
LAW = {"eps": [0.01, 0.1], "f": [0.0, 0.25], "n": 8, "alpha": None}
BASINS = {"states": LAW, "labels": LAW, "images": 4}


class Everything(QuickSuite):
    """All parts of an evaluation, each as small as it can be."""

    def temporal(self) -> TemporalSettings:
        return TemporalSettings((2, 5), (1, 9), PGDSettings(steps=2), images=3)

    def published(self) -> tuple[Attack, ...]:
        paper = PaperSuite(square=SquareSettings(queries=2), cw_steps=2, table_linf=(0.1,))
        return tuple(attack for attack in paper.published() if attack.requires is None)


SUITE = Everything(
    linf=(0.1,),
    l2=(0.5,),
    pgd=PGDSettings(steps=2),
    square=SquareSettings(queries=2),
    corruptions=("contrast", "speckle_noise", "frost"),
    severities=(1, 4),
)


def linear(seed: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(generator=generator)
    return net.eval()


class Arrays:
    """Four test images, corrupted by someone else."""

    family = "cifar10c"
    names = ("fog", "saturate")

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def load(self, name: str, severity: int, examples: Tensor) -> tuple[Tensor, Tensor]:
        return (255 - self.images[examples]) // severity, self.labels[examples]

    def describe(self) -> dict[str, Any]:
        return {"family": self.family, "source": "nowhere", "tar_md5": None, "sha256": {}}


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return pictures, torch.tensor([0, 1, 2, 3])


@pytest.fixture(scope="module")
def found(images) -> Evaluation:
    """Two models, one of which relaxes, with every part of the results filled in."""
    views = {"implicit": linear(1), "unrolled-2": linear(2)}
    judge = linear(3)
    teacher = Subject(
        "teacher",
        "teacher",
        linear(1),
        views,
        horizons=Horizons(linear, lambda sweeps: linear(10 + sweeps), lambda x: (x, x)),
        published=Published(judge, judge, "in its own way", linear(4)),
    )
    student = module_subject("student", "student", linear(5))
    evaluation = evaluate([teacher, student], *images, suite=SUITE, official=Arrays(*images))
    first, second = evaluation.subjects
    diagnosed = dataclasses.replace(first, diagnosis=DIAGNOSIS, basins=BASINS)
    skipped = ({"what": "an attack", "why": "a reason"},)
    return dataclasses.replace(evaluation, subjects=(diagnosed, second), skipped=skipped)


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Every key of nested objects, `models[].attacks[].eps`."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield f"{above}{key}"
            yield from paths(inside, f"{above}{key}.")
    elif isinstance(value, list):
        for inside in value:
            yield from paths(inside, f"{above.removesuffix('.')}[].")


def documented() -> set[str]:
    """The keys in the first columns of the document's tables, `{a, b}` written out."""
    _, _, text = DOCUMENT.read_text().partition("\n## results.json\n")
    text, _, _ = text.partition("\n## results.csv\n")
    found = set()
    for key in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
        head, brace, rest = key.partition("{")
        names = rest.rstrip("}").split(", ") if brace else [""]
        found |= {head + name for name in names}
    return found


def test_the_document_lists_the_keys_of_the_file_and_no_others(found, tmp_path: Path):
    path, _ = write_results(found, tmp_path)
    known = documented()
    # Objects whose keys are names, or are described elsewhere.
    wide = tuple(key.removesuffix("*") for key in known if key.endswith("*"))
    real = set(paths(json.loads(path.read_text())))
    assert {key for key in real if not key.startswith(wide)} == known - {w + "*" for w in wide}
    assert all(any(key.startswith(prefix) for key in real) for prefix in wide)


def test_the_document_names_version_and_columns():
    text = DOCUMENT.read_text()
    assert f"`schema_version` {SCHEMA_VERSION}" in text
    assert f"`{','.join(COLUMNS)}`" in text


def test_all_pictures_are_drawn(found, tmp_path: Path):
    names = [path.stem for path in draw(json.loads(json.dumps(summary(found))), tmp_path)]
    assert names == [
        "accuracy-linf",
        "accuracy-l2",
        "transfer-linf",
        "transfer-l2",
        "corruptions-cifar10c-style",
        "corruptions-cifar10c",
        "temporal-1",
        "sweeps-1",
        "basins-1",
    ]


def test_families_of_corruptions_are_never_mixed(found, images):
    (model, _) = summary(found)["models"]
    rows = {
        (row["family"], row["extra"]): (row["conditions"], row["accuracy"])
        for row in model["corruption_means"]
    }
    counts = {key: count for key, (count, _) in rows.items()}
    assert counts == {
        ("cifar10c-style", False): 4,
        ("cifar10c-style", True): 2,
        ("cifar10c", False): 2,
        ("cifar10c", True): 2,
    }
    for (family, extra), (_, mean) in rows.items():
        same = [
            row["accuracy"]
            for row in model["corruptions"]
            if (row["family"], row["extra"]) == (family, extra)
        ]
        assert mean == pytest.approx(sum(same) / len(same))
    # The arrays' own images were judged.
    net, (pictures, labels) = linear(1), images
    with torch.no_grad():
        right = net(((255 - pictures) // 4).float() / 255).argmax(dim=1) == labels
    (row,) = (r for r in model["corruptions"] if (r["corruption"], r["severity"]) == ("fog", 4))
    assert row["accuracy"] == float(right.float().mean())
    threat = {row["threat"]: row["accuracy"] for row in threats(model)}
    assert threat["cifar10c"] == rows["cifar10c", False][1]
    assert threat["corruptions"] == rows["cifar10c-style", False][1]


def test_arrays_of_other_images_are_refused(images):
    pictures, labels = images
    subject = module_subject("student", "student", linear(5))
    for arrays in (Arrays(pictures, labels.flip(0)), Arrays(pictures[:, :, :4], labels)):
        with pytest.raises(EvaluationError, match="cifar10c arrays hold images of shape"):
            evaluate([subject], pictures, labels, suite=SUITE, official=arrays)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"schema_version": 2, "n": 4, "mod', "cannot be read"),
        ("[]", "cannot be read .it holds no JSON object"),
        ('{"schema_version": 1}', "schema version 1; expected 2: evaluate again"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / JSON_NAME).write_text(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_results_are_read_back(found, tmp_path: Path):
    write_results(found, tmp_path)
    content = read_results(tmp_path)
    assert content.pop("files_sha256").keys() == {"results.csv"}
    assert content == json.loads(json.dumps(summary(found)))
