"""Training: the whole path, teachers, students, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epdistill.api.common import RUNS, Place, context_of, path_of, recipe_of, shared_keys
from epdistill.errors import RecipeError

if TYPE_CHECKING:
    from epdistill.recipes import Recipe
    from epdistill.tracking import Track
    from epdistill.workflows.ablation import Ablated, Asked
    from epdistill.workflows.path import Finished
    from epdistill.workflows.training import Trained


def run(
    recipe: Place | None = None,
    *,
    data: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    precision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    device: str = "auto",
    track: Sequence[Track] = (),
    quiet: bool = False,
) -> Finished:
    """The whole path on a recipe: teach, distill, export, evaluate, bench, report.

    Args:
        recipe: A bundled recipe, a TOML file, or a run's folder; `digits` without it.
        data: Another data set: `digits`, `mnist`, `cifar10`, ..., or `folder:PATH`.
        image_size: Resize the images of a folder to this side.
        epochs: Passes over the data, of teacher and student.
        seed: Of everything random.
        precision: `float32`, `bfloat16` or `float64`.
        overrides: Further recipe keys, as `{"teacher.beta": 0.3}`.
        out: Folder of the summary and the report.
        resume: Go on with the run in `out`, or with the newest unfinished one; its recipe counts.
        runs, data_root, download, device, track, quiet: See the module.
    """
    from epdistill.workflows.path import run_path

    changed = shared_keys("teacher", data, image_size, epochs, seed, precision)
    changed |= {"student.epochs": epochs, **(overrides or {})}
    place = context_of(runs, data_root, download, device, quiet, track)
    base = None if resume else recipe_of(recipe, data, changed)
    return run_path(base, place, out=path_of(out))


def teach(
    recipe: Place | None = None,
    *,
    model: str | None = None,
    rule: str | None = None,
    data: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    precision: str | None = None,
    stream: bool | None = None,
    workers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    device: str = "auto",
    track: Sequence[Track] = (),
    quiet: bool = False,
) -> Trained:
    """Train a teacher: an EP-CNN by Equilibrium Propagation, or a baseline.

    Args:
        recipe: As for `run`.
        model: `ep-cnn` (the default), or a baseline: `bp-cnn`, `adv-cnn`, `vit`, `wca`.
        rule: How an ep-cnn learns: `ep`, `bptt` or `implicit`.
        data, image_size, epochs, seed, precision, overrides: As for `run`.
        stream: Decode a folder's images when needed; by itself if they fill a quarter of memory.
        workers: Processes that decode streamed images.
        out, resume, runs, data_root, download, device, track, quiet: See the module.

    Returns:
        The run, and its results by name (`accuracy`, `sweeps`, ...).
    """
    from epdistill.recipes import EP_CNN, section_of
    from epdistill.workflows.training import teach as work

    chosen = recipe_of(recipe, data, {"model": model}).model
    if rule and chosen != EP_CNN:
        raise RecipeError(f"rule {rule!r} for a {chosen}; expected it with an {EP_CNN} alone")
    changed = shared_keys(section_of(chosen), data, image_size, epochs, seed, precision)
    changed |= {"model": model, "teacher.rule": rule}
    changed |= {"data.stream": stream, "data.workers": workers, **(overrides or {})}
    place = context_of(runs, data_root, download, device, quiet, track)
    return work(recipe_of(recipe, data, changed), place, out=path_of(out), resume=resume)


def distill(
    teacher: Place | None = None,
    *,
    student: str | None = None,
    width: int | None = None,
    pretrained: Place | None = None,
    loss: str | None = None,
    match: str | None = None,
    distance: str | None = None,
    readout: str | None = None,
    inputs: str | None = None,
    cached_views: int | None = None,
    recipe: Place | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    device: str = "auto",
    track: Sequence[Track] = (),
    quiet: bool = False,
) -> Trained:
    """Train a feedforward student on a teacher's fixed points.

    Args:
        teacher: The teacher's run; the newest without it.
        student: `cnn`, `resnet18`, `resnet34`, `mobilenet_v3_small`, `vit_tiny` or
            `torchvision:NAME`.
        width: Channels of the first stage.
        pretrained: Weights to start the backbone from.
        loss: `distill`, or `ce`: a control on the labels, without a teacher.
        match: What is matched: `states`, `last` or `logits`.
        distance: Between states: `mse`, `bce` or `cosine`.
        readout: The teacher's, `frozen`, or `learned`.
        inputs: Where it is matched: `clean`, `noise`, `mix`, `corruption` or `adversarial`.
        cached_views: Replay so many views of every image; 0 asks the teacher online.
        recipe: As for `run`; the teacher's own without it.
        epochs, seed, overrides: As for `run`.
        stream, workers: As for `teach`.
        out, resume, runs, data_root, download, device, track, quiet: See the module.

    Returns:
        The run, and its results by name (`accuracy`, `agreement`, `fidelity`, ...).
    """
    from epdistill.workflows.training import distill as work

    changed = {
        "student.name": student,
        "student.width": width,
        "student.pretrained": None if pretrained is None else str(Path(pretrained).absolute()),
        "student.loss": loss,
        "student.match": match,
        "student.distance": distance,
        "student.readout": readout,
        "student.inputs": inputs,
        "student.cached_views": cached_views,
        "student.epochs": epochs,
        "seed": seed,
        "data.stream": stream,
        "data.workers": workers,
        **(overrides or {}),
    }
    place = context_of(runs, data_root, download, device, quiet, track)
    chosen = None if recipe is None else recipe_of(recipe, None, {})
    return work(
        chosen, place, teacher=path_of(teacher), out=path_of(out), resume=resume, overrides=changed
    )


def ablate(
    recipe: Place | None = None,
    *,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
    split: str | None = None,
    teacher: Sequence[Place] | None = None,
    limit: int | None = None,
    data: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    precision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    device: str = "auto",
    track: Sequence[Track] = (),
    quiet: bool = False,
) -> Ablated:
    """Train the same student under every control, and attack all of them alike.

    Args:
        recipe: As for `run`; with `resume` that of the ablation that goes on.
        rows: Their names; all without it.
        seeds: Of every row; by the recipe without it.
        split: `validation` (for choices) or `test` (for what is reported).
        teacher: Finished teachers of the same recipe to use.
        limit: Images attacked.
        data, image_size, epochs, seed, precision, overrides: As for `run`.
        out, resume, runs, data_root, download, device, track, quiet: See the module.

    Returns:
        The folder and the content of ablation.json; what failed stands in its `failed`.
    """
    from epdistill.workflows.ablation import ablate as work

    changed = shared_keys("teacher", data, image_size, epochs, seed, precision)
    changed |= _for_ablation(epochs, limit, overrides)
    base = _base(recipe, data, changed, resume)
    place = context_of(runs, data_root, download, device, quiet, track)
    asked = _asked(rows, seeds, split, teacher)
    return work(base, place, asked=asked, out=path_of(out), resume=resume)


def plan_ablation(
    recipe: Place | None = None,
    *,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
    split: str | None = None,
    teacher: Sequence[Place] | None = None,
    limit: int | None = None,
    epochs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    out: Place | None = None,
    resume: bool = False,
    runs: Place = RUNS,
    data_root: Place | None = None,
) -> list[dict[str, Any]]:
    """What `ablate` would train, with about how long it takes (`epdistill ablate --plan`).

    Args:
        recipe, rows, seeds, split, teacher, limit, epochs, overrides: As for `ablate`.
        out, resume, runs, data_root: See the module.

    Returns:
        One entry per network: what changes in the recipe, whether it is done, seconds.
    """
    from epdistill.workflows.ablation import planned as work

    changed = _for_ablation(epochs, limit, overrides) | {"teacher.epochs": epochs}
    base = _base(recipe, None, changed, resume)
    place = context_of(runs, data_root, False, "cpu", True)
    asked = _asked(rows, seeds, split, teacher)
    return work(base, place, asked=asked, out=path_of(out), resume=resume)


def _for_ablation(
    epochs: int | None, limit: int | None, overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "student.epochs": epochs,
        "baselines.adv_cnn.epochs": epochs,
        "ablate.limit": limit,
        **(overrides or {}),
    }


def _base(
    recipe: Place | None, data: str | None, changed: Mapping[str, Any], resume: bool
) -> Recipe | None:
    """The recipe that rows vary; None where the one that was begun counts."""
    given = [key for key, value in {"recipe": recipe, **changed}.items() if value is not None]
    if resume and given:
        raise RecipeError(
            f"resume with {', '.join(given)}; expected none of these: the recipe is that of the "
            "ablation that goes on"
        )
    return None if resume else recipe_of(recipe, data, changed)


def _asked(
    rows: Sequence[str] | None,
    seeds: int | None,
    split: str | None,
    teacher: Sequence[Place] | None,
) -> Asked:
    from epdistill.workflows.ablation import Asked

    if split not in (None, "test", "validation"):
        raise RecipeError(f"split {split!r}; expected validation or test")
    finished = tuple(Path(path) for path in teacher) if teacher else None
    return Asked(None if rows is None else tuple(rows), seeds, split, finished)
