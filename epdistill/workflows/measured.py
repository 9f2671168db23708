"""What evaluations found out about a run or a file, in brief, for manifests and cards."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epdistill.errors import EvaluationError
from epdistill.runs import Run


def robustness_of(
    results: dict[str, Any], name: str, kind: str, folder: str
) -> dict[str, Any] | None:
    """One model of a results.json: its worst cases and corruptions; None if it is not in there.

    Args:
        results: The content of results.json.
        name: Of the model, as evaluated.
        kind: `"student"`, `"teacher"` or `"onnx"`.
        folder: Name of the evaluation's folder.
    """
    from epdistill.robustness.results import threats

    for model in results["models"]:
        if (model["name"], model["kind"]) == (name, kind):
            settings = results["settings"]
            return {
                "measured_on": f"{name} ({kind})",
                "evaluation": folder,
                "suite": settings["name"],
                "split": settings["split"],
                "seed": settings["seed"],
                "attacks": sorted({row["attack"] for row in model["attacks"]}),
                "threats": threats(model),
                "verdict": model["verdict"],
            }
    return None


def newest_first(runs: Path, name: str, also: Sequence[Path] = ()) -> list[tuple[float, Path]]:
    """All files of a name in the folders under `runs`, with the times they were written at.

    Args:
        runs: The folder of all folders.
        name: Of the files.
        also: Further folders.
    """
    paths = {*runs.glob(f"*/{name}"), *(folder / name for folder in also)}
    return sorted(((p.stat().st_mtime, p) for p in paths if p.is_file()), reverse=True)


def newest_robustness(runs: Path, run: Run, also: Sequence[Path] = ()) -> dict[str, Any] | None:
    """What the newest evaluation of a run found, None where there is none.

    Only evaluations later than the run's training count: an earlier run may have had its name.

    Args:
        runs: In whose folders evaluations are looked for.
        run: A finished run.
        also: Further folders of evaluations.
    """
    from epdistill.robustness.results import JSON_NAME, read_results

    trained = datetime.datetime.fromisoformat(run.config["finished"]).timestamp()
    for when, path in newest_first(runs, JSON_NAME, also):
        if when < trained:
            break
        try:
            results = read_results(path.parent)
        except EvaluationError:  # damaged, or of another version
            continue
        found = robustness_of(results, run.name, run.kind, path.parent.name)
        if found is not None:
            return found
    return None
