"""The commands that made a run, put together from what it recorded, so that they can be typed.

A short form with flags is given only where it resolves to the very recipe that was recorded;
otherwise the recipe is taken from the run's own folder (`--recipe RUN`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epdistill._sources import TORCHVISION
from epdistill.errors import EpdistillError
from epdistill.loading import model_name
from epdistill.nested import leaves
from epdistill.recipes import BUNDLED, EP_CNN, EvaluateRecipe, load_recipe, section_of
from epdistill.recipes.loading import PREFIX
from epdistill.runs import Run, open_run
from epdistill.workflows.request import chosen_suite

# Recipe keys that have a flag, beside the epochs, which belong to a section.
_COMMON = {"precision": "--precision", "seed": "--seed"}
_TEACH = {
    "model": "--model",
    "teacher.rule": "--rule",
    "data.name": "--data",
    "data.image_size": "--image-size",
}
_DISTILL = {
    "student.name": "--student",
    "student.width": "--width",
    "student.loss": "--loss",
    "student.match": "--match",
    "student.distance": "--distance",
    "student.readout": "--readout",
    "student.inputs": "--inputs",
    "student.cached_views": "--cached-views",
}


def training_command(run: Run, *, shared: bool = False) -> str:
    """What to type to train a run again.

    Args:
        run: A finished run.
        shared: For others: folders are called by their names, without this machine's paths.
    """
    place = run.name if shared else str(run.path)
    if run.kind == "teacher":
        words = ["epdistill", "teach", *(_teaching(run) or ["--recipe", place])]
    else:
        teacher = str(run.config["teacher"]["name" if shared else "path"])
        words = ["epdistill", "distill", "--teacher", teacher]
        words += _distilling(run) or ["--recipe", place]
    # Digits come with a package; other data sets have to lie somewhere.
    if run.config["data"]["root"]:
        words += ["--data-root", "DIR" if shared else str(run.config["data"]["root"])]
    return shlex.join(words)


def _teaching(run: Run) -> list[str] | None:
    """The flags of `teach`; None where flags do not make the recorded recipe."""
    recorded = run.config["recipe"]
    name = recorded["name"]
    if name not in BUNDLED:
        return None
    base = load_recipe(name, environment={}).model_dump(mode="json")
    epochs = f"{section_of(model_name(run))}.epochs"
    known = {**_COMMON, **_TEACH, epochs: "--epochs"}
    changed = _changed(base, recorded, known)
    try:
        again = load_recipe(name, changed, environment={}).model_dump(mode="json")
    except EpdistillError:
        return None
    if again != recorded or (model_name(run) != EP_CNN and "teacher.rule" in changed):
        return None
    return ["--recipe", name, *_flags(changed, known)]


def _distilling(run: Run) -> list[str] | None:
    """The flags of `distill` beside the teacher; None where they do not make the recipe."""
    from epdistill.workflows.training import inherit

    recorded = run.config["recipe"]
    try:
        teacher = open_run(Path(run.config["teacher"]["path"]), "teacher").config["recipe"]
        known = {"seed": "--seed", **_DISTILL, "student.epochs": "--epochs"}
        name = {"student.name": recorded["student"]["name"]}
        # Another student than the recipe's does not inherit what is its own.
        base = inherit(teacher, name, "").model_dump(mode="json")
        changed = {**name, **_changed(base, recorded, known)}
        again = inherit(teacher, changed, "").model_dump(mode="json")
    except (EpdistillError, KeyError):
        return None
    return _flags(changed, known) if again == recorded else None


def _changed(
    base: Mapping[str, Any], recorded: Mapping[str, Any], known: Mapping[str, str]
) -> dict[str, Any]:
    """The known keys, with dots, that were given another value."""
    found = {}
    for dotted in known:
        before, after = _at(base, dotted), _at(recorded, dotted)
        if after is not None and before != after:
            found[dotted] = after
    return found


def _at(content: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _flags(changed: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
    return [word for key, value in changed.items() for word in (known[key], str(value))]


def evaluation_command(results: Mapping[str, Any], models: Sequence[str]) -> str:
    """What to type to evaluate again, from the content of results.json.

    Args:
        results: The content.
        models: The paths of the runs and files, in the order of the results.
    """
    settings = results["settings"]
    words = ["epdistill", "evaluate", *models, "--suite", settings["name"]]
    words += ["--limit", str(results["n"]), "--subset", settings["subset"]]
    words += ["--seed", str(settings["seed"])]
    only = settings.get("only")
    if only:
        words += ["--attacks", ",".join(only)]
    # All of `full` has both in any case.
    if settings["name"] != "full" or only:
        if any(model["verdict"] for model in results["models"]):
            words.append("--diagnose")
        if settings["temporal"]:
            words.append("--horizons")
    if settings["name"] != "paper":
        for norm in ("linf", "l2"):
            if settings.get(norm):
                words += [f"--{norm}", ",".join(map(str, settings[norm]))]
        steps = settings["pgd"]["steps"]
        if steps != chosen_suite(settings["name"], EvaluateRecipe()).pgd.steps:
            words += ["--steps", str(steps)]
    if settings.get("split", "test") != "test":
        words += ["--split", settings["split"]]
    return shlex.join(words)


def ablation_command(content: Mapping[str, Any]) -> str:
    """What to type to ablate again, from the content of ablation.json.

    What the recipe of that name did not say at the time stands in front, as variables.
    """
    recipe = content["recipe"]
    name, rows = recipe["name"], [row["row"] for row in content["rows"]]
    words = ["epdistill", "ablate", "--recipe", name, "--rows", ",".join(rows)]
    said = {"ablate.rows"}
    seeds = {len(row["seeds"]) for row in content["rows"]}
    if len(seeds) == 1:
        words += ["--seeds", str(seeds.pop())]
        said |= {"ablate.deciding", "ablate.seeds", "ablate.other_seeds"}
    words += ["--split", content["split"]] if content["split"] == "test" else []
    variables = []
    if name in BUNDLED:
        base = dict(leaves(load_recipe(name, environment={}).model_dump(mode="json")))
        for key, value in leaves(recipe):
            # Keys that came after the record, and null, which no variable can say, are left out.
            if key not in base or value == base[key] or value is None or key in said:
                continue
            if key == "seed":
                words += ["--seed", str(value)]
            else:
                text = value if isinstance(value, str) else json.dumps(value)
                variables.append(f"{PREFIX}{key.upper().replace('.', '__')}={shlex.quote(text)}")
    words += ["--data-root", "DIR"] if recipe["data"]["name"] in TORCHVISION else []
    return " ".join([*variables, shlex.join(words)])


def export_command(run: str, precisions: Sequence[str]) -> str:
    """What to type to export a run again.

    Args:
        run: How its folder is called.
        precisions: Of the files beside the float32 one.
    """
    flags = {"int8": "--int8", "float16": "--fp16"}
    return shlex.join(["epdistill", "export", run, *(flags[name] for name in precisions)])
