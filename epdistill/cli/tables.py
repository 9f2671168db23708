"""The closing tables of the longer commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epdistill.cli.output import show_table
from epdistill.runs import machine_of

if TYPE_CHECKING:
    from epdistill.workflows.benchmark import Benched
    from epdistill.workflows.distilling_cost import DistillingCost
    from epdistill.workflows.dynamics import Dynamics
    from epdistill.workflows.evaluation import Evaluated
    from epdistill.workflows.path import Finished
    from epdistill.workflows.theorem import Checked
    from epdistill.workflows.training import Trained


def teacher_table(trained: Trained) -> None:
    """What a teacher does, what it costs, and what was published of its kind."""
    results = trained.results
    percents = {
        f"test accuracy (n = {results['test_images']})": "accuracy",
        "test accuracy without noise": "without_noise",
        "images settled": "converged",
    }
    rows = [
        [what, f"{100 * results[name]:.2f} %"] for what, name in percents.items() if name in results
    ]
    published = ", ".join(
        f"{100 * accuracy:.0f} % ({source})" for source, accuracy in results["published"].items()
    )
    rows.append(["published test accuracy, full size", published or "none known"])
    if "sweeps" in results:
        rows += [
            ["sweeps per image", f"{results['sweeps']:.1f}"],
            ["largest residual", f"{results['residual']:.1e}"],
        ]
    rows += [
        ["parameters", f"{results['parameters']:,}"],
        ["FLOPs per image", f"{results['flops']:.3g}"],
        ["seconds", f"{results['seconds']:.0f}"],
    ]
    show_table(
        str(trained.run.path),
        [trained.run.config["model"]["name"], "value"],
        rows,
        "epdistill distill --student resnet18",
    )


def student_table(trained: Trained) -> None:
    """What a student does, how near it is to its teacher, and what it costs."""
    from epdistill.workflows.cards import per_layer

    results = trained.results
    found = results["fidelity"]
    columns = [found["clean"], found["noise"], found["adversarial"]]

    def shares(field: str) -> list[str]:
        return [f"{100 * column[field]:.2f} %" for column in columns]

    def layers(field: str) -> list[str]:
        return [per_layer(column[field]) for column in columns]

    rows = [
        ["images", *(str(column["images"]) for column in columns)],
        ["accuracy", *shares("accuracy")],
        ["teacher's accuracy", *shares("teacher_accuracy")],
        ["same label as the teacher", *shares("agreement")],
        ["R² per layer", *layers("r2")],
        ["cosine per layer", *layers("cosine")],
        ["calibration error", *shares("ece")],
        ["parameters", f"{results['parameters']:,}", "", ""],
        ["FLOPs per image", f"{results['flops']:.3g}", "", ""],
        ["seconds", f"{results['seconds']:.0f}", "", ""],
    ]
    heads = [
        "test images",
        f"noise {found['noise']['std']:g}",
        f"PGD-10 Linf {found['adversarial']['eps']:.3g}",
    ]
    show_table(
        str(trained.run.path),
        [trained.run.config["model"]["name"], *heads],
        rows,
        "epdistill export",
    )


def evaluation_table(done: Evaluated) -> None:
    """Accuracy in percent under every threat, with Wilson's 95 % interval."""
    from epdistill.robustness.shares import ball
    from epdistill.robustness.tables import (
        diagnosis_rows,
        horizon_rows,
        published_rows,
        threat_rows,
    )

    models = done.results["models"]
    for model in models:
        if (found := model["diagnosis"]) is None:
            continue
        # A file without gradients may have no radius of its own that it was looked at.
        checks = diagnosis_rows(found)
        threat = "" if found["eps"] is None else ball(found["norm"], found["eps"])
        show_table(
            f"{found['text']}\nAt {threat}:" if threat else found["text"],
            ["check", "", "value", "fails where"],
            [row[:4] for row in checks],
            None,
            words=(0, 1, 3),
        )
        # Advice is long, and for the few that need it: beside the others it leaves no room.
        if advice := [[row[0], row[4]] for row in checks if row[4]]:
            show_table("what to do", ["check", ""], advice, None, words=(0, 1))
        if horizons := horizon_rows(found):
            show_table(
                f"{model['name']}: the same PGD along one gradient at a time, {threat}",
                ["gradient", "accuracy in %"],
                horizons,
                None,
            )
    cells = published_rows(models)
    if cells:
        show_table(
            "published protocol / adaptive: accuracy in %",
            ["cell", *(f"{model['name']}" for model in models)],
            cells,
            None,
        )
    show_table(
        f"{done.folder}: accuracy in %, n = {done.results['n']} (95 % interval)",
        ["threat", *(f"{model['name']}" for model in models)],
        threat_rows(models),
        "epdistill export" if models[-1]["kind"] == "student" else "epdistill bench",
    )


def bench_table(done: Benched) -> None:
    """Latency, throughput and cost of every contender, and what each of them is."""
    from epdistill.workflows.benchmark import bench_rows, contender_rows

    content = done.content
    hardware = content["hardware"]
    head = ["", "ms: p50 (quartiles)", "p99", "images/s", "matrix", "times published"]
    rate = max(product["flops_per_second"] for product in content["matrix"]) / 1e9
    for size in sorted({row["batch_size"] for row in content["rows"]}):
        title = (
            f"{done.folder}, batch {size}: {content['models']}; {hardware['cpu']}, "
            f"{hardware['torch_threads']} thread(s) pinned; 100 % matrix: {rate:.0f} GFLOP/s"
        )
        show_table(title, head, bench_rows(content, size), None)
    head = ["per image", "MFLOP", "parameters", "MiB", ""]
    show_table("contenders", head, contender_rows(content), None)


def dynamics_table(done: Dynamics) -> None:
    """Ratios to the published algorithm, with quartiles."""
    content = done.content

    def ratio(found: dict[str, float]) -> str:
        return f"{found['ratio']:.1f}x ({found['low']:.1f}-{found['high']:.1f})"

    def residual(found: dict[str, float]) -> str:
        return f"{found['median']:.1e}, worst {found['max']:.1e}"

    shares, reference = content["converged_share"], content["reference_converged_share"]
    inferred = {"mixed": "infer_speedup", "float32": "infer_speedup_float32"}
    if len(content["teach_speedups"]) == 1:
        del inferred["mixed"]
    rows = [
        *([f"teaching step, {name}", ratio(found), ""]
          for name, found in content["teach_speedups"].items()),
        *([f"inference to its residual, {name}", ratio(content[key]), ""]
          for name, key in inferred.items()),
        ["implicit gradient over 70 unrolled", ratio(content["implicit_gradient_speedup"]), ""],
        *([f"worst layer's gradient cosine, {name}", f"{min(found):.4f}",
           f"{content['reference_gradient_cosine_min']:.4f}"]
          for name, found in content["gradient_cosines"].items()),
        *([f"residual, {name}", residual(found), residual(content["reference_residual"])]
          for name, found in content["residual"].items()),
        *([f"settled in {sweeps} sweeps", f"{100 * shares[sweeps]:.1f} %",
           f"{100 * reference[sweeps]:.1f} %"] for sweeps in shares),
    ]  # fmt: skip
    hardware = content["hardware"]
    show_table(
        f"{done.folder}: {content['model']}, batch {content['batch']}; {hardware['cpu']}, "
        f"{hardware['torch_threads']} threads",
        ["", "ours", "published"],
        rows,
        None,
    )


def distilling_table(done: DistillingCost) -> None:
    """Times the cost of a step on labels alone, with quartiles."""
    content = done.content
    rows = [
        [
            found["name"],
            f"{found['times']:.2f} ({found['low']:.2f}-{found['high']:.2f})",
            "" if found["sweeps"] is None else f"{found['sweeps']:.1f}",
        ]
        for found in content["costs"]
    ]
    hardware = content["hardware"]
    show_table(
        f"{done.folder}: {content['teacher']}; {machine_of(hardware)}, "
        f"{hardware['torch_threads']} threads",
        ["a training step", "times the cost of one on labels alone", "sweeps"],
        rows,
        None,
    )


def theorem_table(done: Checked) -> None:
    """Relative error, cosine and sign agreement per layer."""
    found = done.theorem
    rows = [
        [
            row.estimator if row.beta is None else f"{row.estimator}, beta {row.beta:g}",
            row.parameter,
            f"{row.relative_error:.1e}",
            f"{row.cosine:.6f}",
            f"{100 * row.sign_agreement:.2f} %",
            "" if row.beta is None else str(found.tipped[row.beta]),
        ]
        for row in found.comparisons
    ]
    worst = max((max(moment.relative_error) for moment in found.moments), default=float("nan"))
    show_table(
        f"{done.folder}: {found.images} of {found.offered} images settled; against the implicit "
        f"gradient. EP against BPTT sweep by sweep ({found.synchronous_images} images): "
        f"largest relative error {worst:.1e}",
        ["estimator", "parameter", "relative error", "cosine", "same sign", "tipped images"],
        rows,
        None,
    )


def path_table(finished: Finished) -> None:
    """What the whole path found, and what to type next."""
    models = finished.evaluated.results["models"]
    summary = finished.summary
    teacher, student = finished.teacher.results, finished.student.results
    content = finished.benched.content
    times = {(row["name"], row["batch_size"]): row for row in content["rows"]}

    def ms(name: str) -> str:
        return f"{1e3 * times[(name, 1)]['seconds_per_image']:.2f}"

    from epdistill.robustness.tables import threat_rows
    from epdistill.workflows.bench_models import ONNX, PUBLISHED, SETTLED

    n = finished.evaluated.results["n"]
    rows = [
        [
            f"test accuracy, n = {teacher['test_images']}",
            f"{100 * teacher['accuracy']:.1f}",
            f"{100 * student['accuracy']:.1f}",
            "",
        ],
        ["same label as the teacher", "", f"{100 * student['agreement']:.1f}", ""],
        *([f"{row[0]} (n = {n})" if i == 0 else row[0], *row[1:]]
          for i, row in enumerate(threat_rows(models))),
        ["ms per image, batch 1", ms(SETTLED), "", ms(ONNX)],
        ["as published, 250 sweeps", ms(PUBLISHED), "", ""],
        [
            "times the published speed",
            f"{summary['speedup']['settled_over_published']:.1f}",
            "",
            f"{summary['speedup']['student_over_published']:.1f}",
        ],
        ["largest parity error of a logit", "", "", f"{summary['parity']['max_abs_error']:.1e}"],
    ]  # fmt: skip
    recipe, paths = finished.student.run.config["recipe"], summary["paths"]
    show_table(
        f"recipe {summary['recipe']}, seed {summary['seed']}: accuracy in % (95 % interval)",
        ["", "EP-CNN teacher", f"{recipe['student']['name']} student", "exported ONNX"],
        rows,
        f"epdistill predict {paths['onnx']} IMAGE    (report: {paths['report']})",
    )
