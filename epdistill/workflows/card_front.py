"""The head of a model card that the Hugging Face Hub reads: YAML between two lines of dashes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from epdistill.loading import model_name
from epdistill.recipes import EP_CNN
from epdistill.runs import Run

# Whoever shares a model decides; until then the Hub's own word for that.
UNDECIDED = "unknown"
# What the Hub calls the data sets that have a page there; a folder of one's own has none.
_HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
}
_LICENSE = re.compile(r"^license: (.+)$", re.MULTILINE)


def front_matter(run: Run, robustness: Mapping[str, Any] | None, licence: str) -> list[str]:
    """The lines, from recorded numbers alone.

    Args:
        run: A finished run.
        robustness: Of the run, as `epdistill.workflows.measured.robustness_of` gives it.
        licence: Of the weights.
    """
    data = run.config["data"]
    name = data_name(run)
    tags = ["image-classification", "epdistill", run.kind]
    if run.kind == "teacher":
        tags += [model_name(run), *(["equilibrium-propagation"] if _by_ep(run) else [])]
    else:
        tags += [
            run.config["recipe"]["student"]["name"].replace(":", "-"),
            "knowledge-distillation",
        ]
    results = run.config["results"]
    metrics = [("accuracy", "test accuracy", results["accuracy"])]
    if robustness is not None and robustness["split"] == "test":
        metrics += [
            ("accuracy", threat(row), row["accuracy"])
            for row in robustness["threats"]
            if row["threat"] != "clean"
        ]
    described = f"{name}, {data['test_images']} test images"
    lines = [
        "---",
        f"license: {licence}",
        "library_name: epdistill",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {_text(tag)}" for tag in dict.fromkeys(tags)),
    ]
    if name in _HUB:
        lines += ["datasets:", f"- {_HUB[name]}"]
    lines += [
        "metrics:",
        "- accuracy",
        "model-index:",
        f"- name: {_text(run.name)}",
        "  results:",
        "  - task:",
        "      type: image-classification",
        "    dataset:",
        f"      name: {_text(described)}",
        f"      type: {_text(_HUB.get(name, name))}",
        "      split: test",
        "    metrics:",
    ]
    for kind, what, value in metrics:
        lines += [f"    - type: {kind}", f"      name: {_text(what)}", f"      value: {value!r}"]
    return [*lines, "---"]


def threat(row: Mapping[str, Any]) -> str:
    """A row of `threats` in words: `worst case, Linf 8/255`."""
    from epdistill.robustness.shares import ball

    if row["eps"] is None:
        return {"clean": "clean"}.get(row["threat"], f"mean over {row['threat']}")
    return f"worst case, {ball(row['threat'], row['eps'])}"


def data_name(run: Run) -> str:
    """The data set; a folder of one's own without its path."""
    name = str(run.config["data"]["name"])
    return "images of one's own" if name.startswith("folder:") else name


def licence_of(card: str) -> str:
    """The licence that a card states, or that nothing was decided."""
    found = _LICENSE.search(card)
    return found[1] if found else UNDECIDED


def without_licence(card: str) -> str:
    """A card with its licence taken out, to be compared."""
    return _LICENSE.sub("license:", card, count=1)


def _by_ep(run: Run) -> bool:
    return model_name(run) == EP_CNN and run.config["recipe"]["teacher"]["rule"] == "ep"


def _text(value: str) -> str:
    # A JSON string is a YAML string.
    return json.dumps(value, ensure_ascii=False)
