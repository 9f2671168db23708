"""What the records say about each model, whoever measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from epdistill.recipes import BUNDLED, EP_CNN, load_recipe, section_of
from epdistill.recorded.store import RUN, Record, of_kind
from epdistill.teachers.figures import published_name

TITLES = {
    "ep-cnn": "EP-CNN", "bp-cnn": "BP-CNN", "adv-cnn": "Adv-CNN", "vit": "ViT", "wca": "WCA-Net"
}  # fmt: skip
DISTILLED, LOGITS = "distilled", "logits alone"
_RULES = {"ep": "", "bptt": " by BPTT", "implicit": " by the implicit gradient"}
_INPUTS = {"clean": "", "mix": ", half with noise", "noise": ", noise", "corruption": ", corrupted"}


@dataclass(frozen=True)
class Kin:
    """The runs of one kind: all that differs between them is the seed.

    Attributes:
        title: For readers.
        runs: Their records, by seed.
    """

    title: str
    runs: tuple[Record, ...]

    @property
    def seeds(self) -> list[int]:
        """Of the runs."""
        return [run.content["recipe"]["seed"] for run in self.runs]


def title_of(run: Mapping[str, Any]) -> str:
    """What a run is, from its recipe: `EP-CNN`, `resnet18, distilled, half with noise`.

    Args:
        run: The content of its record.
    """
    recipe = run["recipe"]
    if run["kind"] == "teacher":
        words, length = _teacher(recipe), _teaching_length(recipe)
    else:
        words, length = _student(recipe), _length(recipe, "student")
    return f"{words}, {length}" if length else words


def _teaching_length(recipe: Mapping[str, Any]) -> str:
    return _length(recipe, section_of(recipe.get("model", EP_CNN)))


def _length(recipe: Mapping[str, Any], section: str) -> str:
    """How many epochs, where the bundled recipe of that name has another number of them."""
    found, usual = _epochs(recipe, section), _usual_epochs(recipe.get("name", ""), section)
    if None in (found, usual) or found == usual:
        return ""
    return f"{found} epoch" + "s" * (found != 1)


@cache
def _usual_epochs(name: str, section: str) -> int | None:
    if name not in BUNDLED:
        return None
    return _epochs(load_recipe(name, environment={}).model_dump(mode="json"), section)


def _epochs(recipe: Mapping[str, Any], section: str) -> int | None:
    """None for a recipe that does not say it."""
    content: Mapping[str, Any] = recipe
    for key in section.split("."):
        content = content.get(key, {})
    return content.get("epochs")


def _student(recipe: Mapping[str, Any]) -> str:
    own = recipe["student"]
    words = f"{own['name']}" + (f" x{own['width']}" if own.get("width") else "")
    if own.get("loss", "distill") == "ce":
        words += ", labels" if not own.get("label_smoothing") else ", smoothed labels"
    else:
        words += f", {LOGITS if own.get('match') == 'logits' else DISTILLED}"
        words += " with labels" if own.get("label_weight") else ""
        teacher, length = _teacher(recipe), _teaching_length(recipe)
        if length:
            words += f" from {teacher} ({length})"
        elif teacher != TITLES[EP_CNN]:
            words += f" from {teacher}"
    if own["inputs"] == "adversarial":
        return f"{words}, adversarial images (trained for)"
    words += _INPUTS[own["inputs"]]
    if own["inputs"] in ("mix", "noise"):
        words += f" {own['noise_std']:g}"
    return words + (", the clean image's answer" if own.get("targets") == "clean" else "")


def _teacher(recipe: Mapping[str, Any]) -> str:
    name = recipe.get("model", EP_CNN)
    if name == EP_CNN:
        return TITLES[EP_CNN] + _RULES[recipe["teacher"].get("rule", "ep")]
    if name == "adv-cnn":
        own = recipe["baselines"]["adv_cnn"]
        return f"{TITLES[name]} {own['norm']} {own['eps']:g}"
    return TITLES[name]


def has_teacher(title: str) -> bool:
    """Whether what `title_of` calls so has learnt from a teacher."""
    return any(f", {how}" in title for how in (DISTILLED, LOGITS))


def published_key(run: Mapping[str, Any]) -> str | None:
    """The name that a teacher has in `epdistill.recorded.published`; None for all others."""
    return published_name(run["recipe"]) if run["kind"] == "teacher" else None


def place_of(run: Mapping[str, Any]) -> tuple[str, str]:
    """The data set and the recipe that a run belongs to."""
    return str(run["data"]["name"]), str(run["recipe"]["name"])


def kins(records: Sequence[Record]) -> dict[tuple[str, str], list[Kin]]:
    """The recorded runs by data set and recipe, teachers first."""
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in of_kind(records, RUN):
        run = record.content
        found.setdefault(place_of(run), {}).setdefault(title_of(run), []).append(record)

    def order(kin: Kin) -> tuple[bool, str]:
        return kin.runs[0].content["kind"] != "teacher", kin.title

    return {
        place: sorted(
            (
                Kin(title, tuple(sorted(runs, key=lambda run: run.content["recipe"]["seed"])))
                for title, runs in by_title.items()
            ),
            key=order,
        )
        for place, by_title in sorted(found.items())
    }


def titles(records: Sequence[Record]) -> dict[str, str]:
    """By the name of a recorded run, and of its exported files: what it is."""
    named = {}
    for record in of_kind(records, RUN):
        title = title_of(record.content)
        named[record.name] = title
        for file in record.content["files"]:
            named[f"{record.name}/{file['name']}"] = f"{title}, {file['precision']} file"
    return named


def told_apart(
    names: Sequence[str], named: Mapping[str, str], runs: Mapping[str, Record]
) -> dict[str, str]:
    """What models of one table are; with the seed where two of them would read alike.

    Args:
        names: Of the models.
        named: As `titles` has it.
        runs: The recorded runs by name.
    """
    read = [named.get(name, name) for name in names]
    return {
        name: f"{title}, seed {runs[run].content['recipe']['seed']}"
        if read.count(title) > 1 and (run := name.partition("/")[0]) in runs
        else title
        for name, title in zip(names, read, strict=True)
    }
