"""Shipping: exports, predictions, servers, reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from epdistill.api.common import RUNS, Place, context_of, path_of, paths_of
from epdistill.errors import ExportError

if TYPE_CHECKING:
    from epdistill.export.predict import Prediction
    from epdistill.export.runtime import OnnxClassifier
    from epdistill.students.model import Student
    from epdistill.teachers.baselines.base import Baseline
    from epdistill.teachers.model import EPCNN
    from epdistill.workflows.deployment import Exported
    from epdistill.workflows.keeping import Kept

FORMATS = ("onnx", "triton")


def export(
    run: Place | None = None,
    *,
    int8: bool = False,
    fp16: bool = False,
    max_drop: float = 0.5,
    uint8_input: bool = False,
    sweeps: int | None = None,
    robustness: int | None = None,
    format: str = "onnx",
    out: Place | None = None,
    runs: Place = RUNS,
    data_root: Place | None = None,
    download: bool = False,
    quiet: bool = False,
) -> Exported:
    """Export a run to ONNX; a file that fails its gate is not written.

    Args:
        run: A student's, baseline's or teacher's run; the newest student without it.
        int8: Also a quantised file, model-int8.onnx.
        fp16: Also a float16 file, model-float16.onnx.
        max_drop: Points of top-1 accuracy that those may lose.
        uint8_input: Take bytes, channels last, instead of floats.
        sweeps: Of a teacher's loop; its schedule's without it.
        robustness: Attack the run and its files on so many test images.
        format: `onnx`, or `triton`: also a model repository for Triton (docs/triton.md).
        out: The `.onnx` file; `model.onnx` in the run's folder without it.
        runs, data_root, download, quiet: See the module.

    Returns:
        The run, and the float32 file (`result.path`, `result.parity`) with the others (`reduced`).
    """
    from epdistill.workflows.deployment import Wanted
    from epdistill.workflows.deployment import export as work

    if format not in FORMATS:
        raise ExportError(f"format {format!r}; expected {' or '.join(FORMATS)}")
    wanted = Wanted(
        int8, fp16, uint8_input, max_drop, sweeps, robustness, triton=format == "triton"
    )
    place = context_of(runs, data_root, download, "cpu", quiet)
    return work(place, run=path_of(run), out=path_of(out), wanted=wanted)


def load(path: Place) -> EPCNN | Baseline | Student | OnnxClassifier:
    """The model in a run's folder or an exported file, ready to answer, offline.

    Args:
        path: A run's folder, or an `.onnx` file.

    Returns:
        Images float32 (N, C, H, W) in [0,1] to logits (N, K), on the CPU: a torch module in
        eval mode, or for a file an `OnnxClassifier`, which takes numpy arrays as well.
    """
    from epdistill.loading import load as work

    return work(path)


def predict(
    images: Place | Sequence[Place],
    *,
    model: Place | None = None,
    top: int = 3,
    runs: Place = RUNS,
    quiet: bool = False,
) -> list[Prediction]:
    """Labels and probabilities for image files.

    Args:
        images: PNG or JPEG files.
        model: The `.onnx` file, or `shipped`; the newest exported one without it.
        top: How many classes per image.
        runs, quiet: See the module.
    """
    from epdistill.workflows.deployment import predict as work

    place = context_of(runs, None, False, "cpu", quiet)
    return work(place, paths_of(images), model=path_of(model), top=top)[1]


def report(
    models: Place | Sequence[Place] = (), *, out: Place | None = None, runs: Place = RUNS
) -> Path:
    """One self-contained HTML page about runs, and what was measured of them.

    Args:
        models: Runs; the newest teacher and student without any.
        out: The HTML file; `report.html` in `runs` without it.
        runs: See the module.

    Returns:
        The page.
    """
    from epdistill.workflows.report import report_on as work

    return work(paths_of(models), Path(runs), out=path_of(out))


def results(
    folders: Place | Sequence[Place] = (),
    *,
    records: Place = "docs/results",
    page: Place = "RESULTS.md",
) -> Kept:
    """Keep results as small sealed records, and write one page of all that is recorded.

    Args:
        folders: Finished runs, evaluations, ablations and benchmarks to record first.
        records: The folder of the records; `notes.md` in it comes first on the page.
        page: The Markdown file.

    Returns:
        The page, the records written now, how many there are, and the pictures' names.
    """
    from epdistill.workflows.keeping import keep

    return keep(paths_of(folders), Path(records), Path(page))


def serve(
    models: Place | Sequence[Place] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    provider: Sequence[str] = ("CPUExecutionProvider",),
    threads: int | None = None,
    batch: int = 64,
    delay: float = 2.0,
    queue: int = 1024,
    deadline: float = 10.0,
    body: int = 64,
    linger: float | None = None,
    engine: str = "uvicorn",
    replicas: int | None = None,
    ray_options: Place | None = None,
    token: str | None = None,
    runs: Place = RUNS,
) -> None:
    """Serve exported models until SIGTERM or Ctrl-C (docs/serving.md); needs no torch.

    Args:
        models: Exported files; the newest without any.
        host: Address to listen on.
        port: 0 takes a free one.
        provider: onnxruntime's execution providers, the preferred one first.
        threads: Per model; all cores without it.
        batch: Most images in a batch.
        delay: Longest wait for others to share a batch, in milliseconds.
        queue: Most images waiting per model.
        deadline: Seconds until a request is given up.
        body: Largest request, in MiB.
        linger: Seconds of serving on after SIGTERM, 1 without it; not of ray.
        engine: `uvicorn`, one process; or `ray`, replicas on Ray Serve.
        replicas: Of ray; 1 without it.
        ray_options: A TOML file with Ray's options of a deployment.
        token: Asked of clients; that of the environment variable EPDISTILL_TOKEN without it.
        runs: See the module.
    """
    from epdistill.export.serving.settings import limits_from
    from epdistill.export.serving.start import TOKEN, check_engine, start
    from epdistill.export.serving.start import ray_options as options_of

    file = path_of(ray_options)
    check_engine(engine, replicas, file, linger)
    start(
        paths_of(models),
        runs=Path(runs),
        host=host,
        port=port,
        limits=limits_from(
            batch=batch, delay_ms=delay, queue=queue, deadline=deadline, body_mib=body,
            linger=linger,
        ),
        providers=list(provider),
        threads=threads,
        token=token or os.environ.get(TOKEN) or None,
        engine=engine,
        options=options_of(replicas, file),
    )  # fmt: skip
