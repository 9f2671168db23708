"""The commands: they parse flags, call one workflow, and show what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epdistill.cli.ablate import ablate
from epdistill.cli.bench import bench
from epdistill.cli.check import check
from epdistill.cli.export import export
from epdistill.cli.flags import (
    RUNS,
    DataFlag,
    DeviceFlag,
    DownloadFlag,
    EpochsFlag,
    JsonFlag,
    OutFlag,
    PrecisionFlag,
    QuietFlag,
    RecipeFlag,
    ResumeFlag,
    RootFlag,
    RunsFlag,
    SeedFlag,
    SizeFlag,
    StreamFlag,
    TrackFlag,
    WorkersFlag,
    context_of,
    overrides_of,
    without_recipe,
)
from epdistill.cli.output import emit_json, show_table
from epdistill.cli.results import results
from epdistill.cli.serve import serve
from epdistill.errors import InterruptedByUserError


class _Group(TyperGroup):
    """Typer ends on Ctrl-C without a word; this says what became of the work."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedByUserError from error


app = typer.Typer(
    name="epdistill",
    cls=_Group,
    help="Teach an EP-CNN, distill its fixed points into a feedforward student, export it to ONNX, "
    "and measure all of it honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _version(value: bool) -> None:
    if value:
        from epdistill import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("run")
def run_command(
    recipe: RecipeFlag = None,
    data: DataFlag = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    image_size: SizeFlag = None,
    epochs: EpochsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = None,
    out: OutFlag = None,
    resume: ResumeFlag = False,
    runs: RunsFlag = RUNS,
    track: TrackFlag = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """The whole path on a recipe (default: real handwritten digits, nothing to download)."""
    from epdistill.cli.tables import path_table
    from epdistill.recipes import load_recipe, recipe_for
    from epdistill.workflows.path import run_path

    overrides = overrides_of(
        "teacher", data=data, image_size=image_size, epochs=epochs, seed=seed, precision=precision
    )
    overrides["student.epochs"] = epochs
    without_recipe(resume, recipe, overrides, "run")
    context = context_of(runs, data_root, download, device, quiet, track)
    base = None if resume else load_recipe(recipe or recipe_for(data), overrides)
    finished = run_path(base, context, out=out)
    if json:
        emit_json(finished.summary)
    else:
        path_table(finished)


@app.command()
def teach(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="ep-cnn (the default), or a baseline: bp-cnn, adv-cnn, vit, wca.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", help="How an ep-cnn learns: ep, bptt or implicit.", show_default=False
        ),
    ] = None,
    recipe: RecipeFlag = None,
    data: DataFlag = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    image_size: SizeFlag = None,
    stream: StreamFlag = None,
    workers: WorkersFlag = None,
    epochs: EpochsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = None,
    out: OutFlag = None,
    resume: ResumeFlag = False,
    runs: RunsFlag = RUNS,
    track: TrackFlag = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train a teacher: an EP-CNN by Equilibrium Propagation, or a baseline."""
    from epdistill.cli.tables import teacher_table
    from epdistill.errors import RecipeError
    from epdistill.recipes import EP_CNN, load_recipe, recipe_for, section_of
    from epdistill.workflows.training import teach as work

    source = recipe or recipe_for(data)
    chosen = load_recipe(source, {"model": model}).model
    if rule and chosen != EP_CNN:
        raise RecipeError(f"--rule {rule} for a {chosen}; expected it with an {EP_CNN} alone")
    overrides = overrides_of(
        section_of(chosen),
        model=model, data=data, image_size=image_size, epochs=epochs, seed=seed,
        precision=precision, stream=stream, workers=workers,
    )  # fmt: skip
    overrides["teacher.rule"] = rule
    context = context_of(runs, data_root, download, device, quiet, track, together=True)
    trained = work(load_recipe(source, overrides), context, out=out, resume=resume)
    if json:
        emit_json({"run": str(trained.run.path), **trained.results})
    else:
        teacher_table(trained)


@app.command()
def distill(
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            help="cnn, resnet18, resnet34, mobilenet_v3_small, vit_tiny or torchvision:NAME.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Its run, or `shipped`; the newest without it.")
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", min=1, help="Channels of the first stage.")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option("--pretrained", help="Weights to start the backbone from.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss", help="distill, or ce: a control on the labels, without a teacher."),
    ] = None,
    match: Annotated[
        str | None, typer.Option("--match", help="What is matched: states, last or logits.")
    ] = None,
    distance: Annotated[
        str | None, typer.Option("--distance", help="Between states: mse, bce or cosine.")
    ] = None,
    readout: Annotated[
        str | None, typer.Option("--readout", help="The teacher's, frozen, or learned.")
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs", help="Where it is matched: clean, noise, mix, corruption or adversarial."
        ),
    ] = None,
    cached_views: Annotated[
        int | None,
        typer.Option(
            "--cached-views", min=0, help="Replay so many views of every image; 0 asks online."
        ),
    ] = None,
    recipe: RecipeFlag = None,
    stream: StreamFlag = None,
    workers: WorkersFlag = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    epochs: EpochsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = "auto",
    out: OutFlag = None,
    resume: ResumeFlag = False,
    runs: RunsFlag = RUNS,
    track: TrackFlag = None,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train a feedforward student on a teacher's fixed points."""
    from epdistill.cli.tables import student_table
    from epdistill.recipes import load_recipe
    from epdistill.workflows.training import distill as work

    overrides = {
        "student.name": student,
        "student.width": width,
        "student.pretrained": None if pretrained is None else str(pretrained.absolute()),
        "student.loss": loss,
        "student.match": match,
        "student.distance": distance,
        "student.readout": readout,
        "student.inputs": inputs,
        "student.cached_views": cached_views,
        "student.epochs": epochs,
        "data.stream": stream,
        "data.workers": workers,
        "seed": seed,
    }
    context = context_of(runs, data_root, download, device, quiet, track, together=True)
    chosen = load_recipe(recipe) if recipe else None
    trained = work(chosen, context, teacher=teacher, out=out, resume=resume, overrides=overrides)
    if json:
        emit_json({"run": str(trained.run.path), **trained.results})
    else:
        student_table(trained)


app.command()(ablate)


@app.command()
def evaluate(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Runs, .onnx files, or shipped; the newest without any.", show_default=False
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="quick (the default), paper or full.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Test images.")] = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", help="Which ones: first or random.", show_default=False),
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Look for masked gradients and at basins; full always does."
        ),
    ] = False,
    horizons: Annotated[
        bool,
        typer.Option("--horizons", help="Sweep attack and prediction horizons; full always does."),
    ] = False,
    corruptions: Annotated[
        Path | None, typer.Option("--corruptions", help="Folder with the CIFAR-10-C arrays.")
    ] = None,
    linf: Annotated[
        str | None, typer.Option("--linf", help="Radii, as 2/255,8/255; by the recipe without it.")
    ] = None,
    l2: Annotated[
        str | None, typer.Option("--l2", help="Radii, as 0.5,1; by the recipe without it.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="PGD steps; by the recipe without it.", min=1),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option("--attacks", help="These alone, as pgd,square; all of the suite without it."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="test (without it) or validation.")
    ] = None,
    data_root: RootFlag = None,
    download: DownloadFlag = False,
    seed: SeedFlag = None,
    device: DeviceFlag = "auto",
    out: OutFlag = None,
    resume: ResumeFlag = False,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Attack and corrupt models side by side; the worst case per image counts."""
    from epdistill.cli.tables import evaluation_table
    from epdistill.robustness.results import threats
    from epdistill.workflows.evaluation import evaluate as work
    from epdistill.workflows.request import Asked, names_of, radii

    asked = Asked(
        (), suite, limit, subset, seed, diagnose or None, corruptions, split, horizons or None,
        None if linf is None else radii(linf, "--linf"), None if l2 is None else radii(l2, "--l2"),
        steps, None if attacks is None else names_of(attacks),
    )  # fmt: skip
    context = context_of(runs, data_root, download, device, quiet, together=True)
    done = work(models or [], context, asked=asked, out=out, resume=resume)
    if json:
        rows = [
            {key: model[key] for key in ("name", "kind", "verdict")} | {"threats": threats(model)}
            for model in done.results["models"]
        ]
        emit_json({"results": str(done.folder / "results.json"), "models": rows})
    else:
        evaluation_table(done)


app.command()(export)


@app.command()
def predict(
    files: Annotated[
        list[Path], typer.Argument(metavar="[MODEL.onnx|shipped] IMAGE...", help="Image files.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="Classes per image.")] = 3,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Labels and probabilities for image files."""
    from epdistill.errors import DataError
    from epdistill.runs import SHIPPED
    from epdistill.workflows.deployment import predict as work

    is_model = files[0].suffix == ".onnx" or files[0] == Path(SHIPPED)
    model = files[0] if is_model else None
    images = files[1:] if model else files
    if not images:
        raise DataError(f"received {model} and no image; expected image files after the model")
    used, found = work(context_of(runs, None, False, "cpu", quiet), images, model=model, top=top)
    if json:
        rows = [
            {
                "image": str(item.path),
                "label": item.label,
                "probability": item.probability,
                "top": [{"label": label, "probability": share} for label, share in item.top],
            }
            for item in found
        ]
        emit_json({"model": str(used), "predictions": rows})
        return
    show_table(
        str(used),
        ["image", "label", "probability", "runners-up"],
        [
            [
                str(item.path),
                item.label,
                _percent(item.probability),
                ", ".join(f"{label} {_percent(share)}" for label, share in item.top[1:]),
            ]
            for item in found
        ],
        None,
    )


app.command()(bench)


app.command()(serve)


app.command()(check)


app.command()(results)


@app.command("check-theorem")
def check_theorem(
    run: Annotated[
        Path | None, typer.Argument(help="A teacher's run; the newest without it.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Validation images.")] = 20,
    data_root: RootFlag = None,
    out: OutFlag = None,
    runs: RunsFlag = RUNS,
    quiet: QuietFlag = False,
    json: JsonFlag = False,
) -> None:
    """Compare EP with BPTT and the implicit gradient, layer by layer, in float64."""
    from epdistill.cli.tables import theorem_table
    from epdistill.workflows.theorem import check

    context = context_of(runs, data_root, False, "cpu", quiet)
    done = check(context, run=run, images=images, out=out)
    if json:
        emit_json({"theorem": str(done.folder / "theorem.json"), **done.content})
    else:
        theorem_table(done)


@app.command()
def report(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs; the newest student and its teacher without any."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file.")] = None,
    runs: RunsFlag = RUNS,
    json: JsonFlag = False,
) -> None:
    """One self-contained HTML page about runs."""
    from epdistill.workflows.report import report_on

    page = report_on(models or [], runs, out=out)
    if json:
        emit_json({"report": str(page)})
    else:
        show_table(
            str(page), ["report", "value"], [["KiB", f"{page.stat().st_size / 1024:,.0f}"]], None
        )
