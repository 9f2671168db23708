"""Records of the folders that commands have written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from epdistill.errors import EpdistillError, EvaluationError
from epdistill.recorded.store import (
    ABLATION,
    BENCH,
    EVALUATION,
    RUN,
    Record,
    without_paths,
    write_record,
)
from epdistill.runs import CONFIG, Run, atomic_write, digest_of, open_run
from epdistill.sealed import read_sealed

# A few images as the models saw them, which no figure rests on.
EXAMPLES = "examples-*.png"
_SPLITS = ("validation", "test")
_KEPT = (
    "kind",
    "created",
    "finished",
    "recipe",
    "data",
    "environment",
    "weights_sha256",
    "results",
)
_OF_A_FILE = ("precision", "size_bytes", "sha256", "parity", "figures")


def record_all(folders: Sequence[Path], into: Path) -> list[Path]:
    """Write the records of some folders.

    Args:
        folders: Of finished runs, evaluations, ablations (whose runs are recorded too) and
            benchmarks, in any order.
        into: The folder of records.

    Returns:
        The files that were written.

    Raises:
        EvaluationError: A folder holds nothing of the kind.
        RunError: A run is damaged.
    """
    # All are read before the first is written: a mistake leaves the records as they were.
    found = {
        record.file: (record, source) for folder in folders for record, source in _found(folder)
    }
    written = []
    for record, source in found.values():
        written.append(path := write_record(record, into, digest_of(source)))
        if record.kind == EVALUATION:
            for picture in sorted(source.parent.glob(EXAMPLES)):
                atomic_write(into / f"{path.stem}-{picture.name}", picture.read_bytes())
    return written


def _found(folder: Path) -> list[tuple[Record, Path]]:
    from epdistill.robustness.results import JSON_NAME as RESULTS
    from epdistill.workflows.ablation_results import JSON_NAME as ABLATED
    from epdistill.workflows.evidence import BENCH as TIMED

    known: list[tuple[Record, Path]] = []
    for split in _SPLITS:
        path = folder / split / ABLATED
        if path.is_file():
            content = _read(path)
            known.append((_ablation(content), path))
            known += _runs_of(content, folder)
    if (folder / CONFIG).is_file():
        known.append((_run(open_run(folder)), folder / CONFIG))
    if (folder / RESULTS).is_file():
        known.append((_evaluation(folder), folder / RESULTS))
    if (folder / TIMED).is_file():
        content = _read(folder / TIMED)
        if "contenders" in content:
            known.append((_bench(content), folder / TIMED))
    if not known:
        raise EvaluationError(
            f"{folder} holds nothing to record; expected the folder of a finished run, evaluation, "
            "ablation or benchmark"
        )
    return known


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error}); measure it again, or leave its folder out"
        ) from error


def _runs_of(content: Mapping[str, Any], folder: Path) -> Iterator[tuple[Record, Path]]:
    """The runs that an ablation judged; a teacher may lie elsewhere."""
    seen: set[Path] = set()
    for row in content["rows"]:
        for seed in row["seeds"]:
            path = folder / seed["run"]  # itself where that is absolute
            if path not in seen and (path / CONFIG).is_file():
                seen.add(path)
                yield _run(open_run(path)), path / CONFIG


def _run(run: Run) -> Record:
    from epdistill.workflows.commands import training_command
    from epdistill.workflows.context import require_finished
    from epdistill.workflows.evidence import exports_of

    require_finished(run)
    config = run.config
    content: dict[str, Any] = {key: config[key] for key in _KEPT if key in config}
    # A place says nothing to others.
    content["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    if "teacher" in config:
        content["teacher"] = {
            key: config["teacher"][key]
            for key in ("name", "weights_sha256")
            if key in config["teacher"]
        }
    content["files"] = [
        {"name": found.name, **{key: getattr(found.manifest, key) for key in _OF_A_FILE}}
        for found in exports_of(run)
    ]
    try:
        command = training_command(run, shared=True)
    except EpdistillError:  # its teacher has gone
        command = ""
    return Record(RUN, run.name, command, config.get("environment"), content)


def _evaluation(folder: Path) -> Record:
    from epdistill.robustness.results import read_results
    from epdistill.workflows.commands import evaluation_command

    content = read_results(folder)
    command = evaluation_command(content, [model["name"] for model in content["models"]])
    return Record(EVALUATION, folder.name, command, None, content)


def _ablation(content: Mapping[str, Any]) -> Record:
    from epdistill.workflows.commands import ablation_command

    recipe, split = content["recipe"], content["split"]
    name = f"{recipe['data']['name']}-{recipe['name']}-{split}-from-seed-{recipe['seed']}"
    return Record(ABLATION, name, ablation_command(content), None, content)


def _bench(content: Mapping[str, Any]) -> Record:
    models = str(without_paths(content["models"]))
    command = shlex.join(["epdistill", "bench", models, *content.get("beside", [])])
    return Record(BENCH, models, command, content["hardware"], content)
