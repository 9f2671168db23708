"""What an ablation compares: its rows, and the cells that are trained for them.

A row differs from the base recipe by the recipe keys it names and by nothing else. A cell
is one training: a recipe, and for a student the cell of its teacher. Cells are known
by a fingerprint of all that their weights depend on, so two rows that ask for the
same training share a cell, and one that is there already is found again.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from epdistill.errors import RecipeError
from epdistill.recipes import EP_CNN, Recipe, section_of
from epdistill.recipes.ablation import only_teacher
from epdistill.workflows.training import inherit


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: As given to `--rows`.
        title: What it is, for readers.
        kind: Whether the teacher itself is judged, or a student.
        keys: What it changes in the base recipe.
    """

    name: str
    title: str
    kind: Literal["teacher", "student"]
    keys: Mapping[str, Any]


_LABELS = {
    "student.loss": "ce",
    "student.label_smoothing": 0.0,
    "student.label_weight": 0.0,  # it would be a second time the same
    "student.cached_views": 0,
}
_CLEAN = {**_LABELS, "student.inputs": "clean"}

# So much noise that a net pays for it on clean images: what robustness costs without a teacher.
_STRONG = {"student.inputs": "noise", "student.noise_std": 0.25}
_STRONGER = {"student.inputs": "noise", "student.noise_std": 0.5}

TEACHER, PLAIN, NOISE, INPUTS, DISTILLED = "ep-teacher", "ce", "noise", "ce-inputs", "distilled"
STRONG, STRONGER = "noise-strong", "noise-stronger"
# What every row is compared with over the same images, beside noise of further strengths.
REFERENCES = (TEACHER, PLAIN, NOISE, STRONG, STRONGER, INPUTS)

ROWS = (
    Row(TEACHER, "the EP teacher itself", "teacher", {}),
    Row(PLAIN, "labels, clean images", "student", _CLEAN),
    Row("smoothing", "smoothed labels", "student", {**_CLEAN, "student.label_smoothing": 0.1}),
    Row(NOISE, "labels, noise", "student", {**_LABELS, "student.inputs": "noise"}),
    Row(STRONG, "labels, strong noise", "student", {**_LABELS, **_STRONG}),
    Row(STRONGER, "labels, stronger noise", "student", {**_LABELS, **_STRONGER}),
    Row(INPUTS, "labels, recipe's inputs", "student", _LABELS),
    Row(
        "kd", "teacher's logits alone", "student",
        {"student.match": "logits", "student.readout": "learned", "student.label_weight": 0.0},
    ),
    Row(DISTILLED, "distilled by the recipe", "student", {}),
    Row("distilled-clean", "distilled, clean images", "student", {"student.inputs": "clean"}),
    Row("distilled-noise", "distilled, noise", "student", {"student.inputs": "noise"}),
    Row("distilled-strong", "distilled, strong noise", "student", _STRONG),
    Row("distilled-stronger", "distilled, stronger noise", "student", _STRONGER),
    Row(
        "distilled-adversarial", "distilled, adversarial images (trained for, not inherited)",
        "student", {"student.inputs": "adversarial", "student.cached_views": 0},
    ),
    Row(
        "distilled-invariant", "distilled, the clean image's answer on noisy ones", "student",
        {"student.targets": "clean"},
    ),
    Row("distilled-labels", "distilled, and labels", "student", {"student.label_weight": 1.0}),
    Row(
        "distilled-unlabelled", "distilled, labels unseen", "student", {"student.label_weight": 0.0}
    ),
    Row("distilled-cnn", "distilled into the small conv net", "student", {"student.name": "cnn"}),
    Row(
        "distilled-mobile", "distilled into MobileNetV3-small", "student",
        {"student.name": "mobilenet_v3_small"},
    ),
    Row("distilled-bptt", "distilled from the BPTT twin", "student", {"teacher.rule": "bptt"}),
    Row("bptt-teacher", "the BPTT twin itself", "teacher", {"teacher.rule": "bptt"}),
    Row("distilled-adv", "distilled from the adv-cnn", "student", {"model": "adv-cnn"}),
    Row("distilled-bp", "distilled from the bp-cnn", "student", {"model": "bp-cnn"}),
    Row("bp-cnn", "the EP-CNN's layers as an ordinary net", "teacher", {"model": "bp-cnn"}),
    Row("adv-cnn", "adversarial training itself", "teacher", {"model": "adv-cnn"}),
    Row(
        "adv-cnn-strong", "adversarial training, L2 1.0", "teacher",
        {"model": "adv-cnn", "baselines.adv_cnn.norm": "l2", "baselines.adv_cnn.eps": 1.0},
    ),
    Row("vit", "a vision transformer", "teacher", {"model": "vit"}),
    Row("wca", "a net with learned noise (WCA-Net)", "teacher", {"model": "wca"}),
)  # fmt: skip
NAMES = tuple(row.name for row in ROWS)
# Then comes its standard deviation: a twin as accurate as a student is found by trying some.
OTHER_NOISE = f"{NOISE}-"


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        label: The row that asked for it first, or the teacher's name.
        recipe: All of it; only a part of it counts for a teacher.
        keys: What differs in that from the base, but for the seed.
        teacher: Whom a student learns from; None for a teacher.
    """

    label: str
    recipe: Recipe
    keys: Mapping[str, Any] = field(default_factory=dict)
    teacher: Cell | None = None

    @property
    def fingerprint(self) -> str:
        """Ten hex digits of all that the weights depend on."""
        return _digest(self._facts())

    @property
    def kin(self) -> str:
        """The same without the seed: cells of one kin cost the same."""
        return _digest(_seedless(self._facts()))

    def _facts(self) -> dict[str, Any]:
        if self.teacher is None:
            return teacher_facts(self.recipe)
        own = self.recipe.model_dump(mode="json", include={"seed", "precision", "student"})
        return {**own, "of": self.teacher._facts()}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.label}-seed{self.recipe.seed}-{self.fingerprint}"


@dataclass(frozen=True)
class Entry:
    """A row on one seed.

    Attributes:
        row: Which.
        seed: Of teacher, student and data order.
        cell: What is judged.
        sender: The cell whose adversarial images are tried on it too, as on all others of
            this seed.
    """

    row: Row
    seed: int
    cell: Cell
    sender: Cell


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _seedless(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in facts.items() if key != "seed"}
    return {**kept, "of": _seedless(kept["of"])} if "of" in kept else kept


def teacher_facts(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that fixes a teacher's weights, JSON-ready."""
    content = recipe.model_dump(mode="json")
    # A baseline takes its layers from the EP-CNN's section.
    facts = {key: content[key] for key in ("seed", "model", "precision", "data", "teacher")}
    if recipe.model != EP_CNN:
        section = section_of(recipe.model).rpartition(".")[2]
        facts[section] = content["baselines"][section]
    return facts


def find_row(name: str) -> Row:
    """The row of a name: one of `NAMES`, or `noise-STD` for labels and noise of that strength.

    Raises:
        RecipeError: There is none.
    """
    std = _other_noise(name)
    if std is not None:
        keys = {**_LABELS, "student.inputs": "noise", "student.noise_std": std}
        return Row(f"{OTHER_NOISE}{std:g}", f"labels, noise {std:g}", "student", keys)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join((*NAMES, f"{OTHER_NOISE}STD"))
        raise RecipeError(f"unknown row {name!r}{hint}; expected some of {known}")
    return ROWS[NAMES.index(name)]


def _other_noise(name: str) -> float | None:
    """The strength that a row's name says; None where it says none."""
    try:
        return float(name.removeprefix(OTHER_NOISE)) if name.startswith(OTHER_NOISE) else None
    except ValueError:
        return None


def references_among(names: Iterable[str]) -> list[str]:
    """Those rows that all others are compared with, in the order of the table."""
    found = list(dict.fromkeys(names))
    further = [name for name in found if _other_noise(name) is not None]
    return [*(name for name in REFERENCES if name in found), *further]


@dataclass(frozen=True)
class Plan:
    """A base recipe, and the rows with their seeds.

    Attributes:
        recipe: The base.
        seeds: By row's name in the order of the table: how many.
    """

    recipe: Recipe
    seeds: Mapping[str, int]

    def entries(self) -> list[Entry]:
        """Every row on every seed, the first seed first."""
        entries = []
        for number in range(max(self.seeds.values())):
            seed = self.recipe.seed + number
            sender = self._cell(find_row(DISTILLED), seed)
            entries += [
                Entry(row, seed, self._cell(row, seed), sender)
                for row in map(find_row, self.seeds)
                if number < self.seeds[row.name]
            ]
        return entries

    def cells(self) -> list[Cell]:
        """What is trained, each once, teachers before their students."""
        found: dict[str, Cell] = {}
        for entry in self.entries():
            for cell in with_teachers(entry.cell, entry.sender):
                found.setdefault(cell.fingerprint, cell)
        return list(found.values())

    def _cell(self, row: Row, seed: int) -> Cell:
        base = self.recipe.model_dump(mode="json")
        recipe = inherit(base, {**row.keys, "seed": seed}, f"{self.recipe.name}, row {row.name}")
        one = only_teacher(base)
        taught = recipe if one is None else recipe.model_copy(update={"seed": one})
        keys = {key: value for key, value in row.keys.items() if _value(base, key) != value}
        above = {key: value for key, value in keys.items() if not key.startswith("student.")}
        rule = "" if recipe.model != EP_CNN else f"-{recipe.teacher.rule}"
        teacher = Cell(f"{recipe.model}{rule}", taught, above)
        return teacher if row.kind == "teacher" else Cell(row.name, recipe, keys, teacher)


def _value(content: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        content = content[key]
    return content


def with_teachers(*cells: Cell) -> Iterator[Cell]:
    """Cells, each after its teacher."""
    for cell in cells:
        if cell.teacher is not None:
            yield cell.teacher
        yield cell


def plan_for(recipe: Recipe, rows: Sequence[str] | None = None, seeds: int | None = None) -> Plan:
    """The plan that a recipe, `--rows` and `--seeds` make.

    Args:
        recipe: The base.
        rows: Their names; those of the recipe without it.
        seeds: Of every row; by the recipe's `[ablate]` without it.

    Raises:
        RecipeError: An unknown row, or a base that is not what the rows are variants of.
    """
    own = recipe.ablate
    for what, found, expected in (
        ("model", recipe.model, EP_CNN),
        ("teacher.rule", recipe.teacher.rule, "ep"),
        ("student.loss", recipe.student.loss, "distill"),
    ):
        if found != expected:
            raise RecipeError(
                f"recipe {recipe.name}: {what} = {found!r}; expected {expected!r} in the base of "
                "an ablation: its rows make the other variants"
            )
    for name in own.deciding:
        find_row(name)
    names = dict.fromkeys(rows or own.rows or NAMES)
    counts = {
        find_row(name).name: seeds or (own.seeds if name in own.deciding else own.other_seeds)
        for name in names
    }
    return Plan(recipe, counts)
