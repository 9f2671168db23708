"""One self-contained HTML page about some runs: no network, no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from epdistill.robustness.tables import threat_rows
from epdistill.runs import Run, atomic_write, read_metrics
from epdistill.workflows.benchmark import Benched, speed_rows
from epdistill.workflows.evaluation import Evaluated

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:56rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.92rem}
.scroll{overflow-x:auto}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom:2px solid #888}
img{max-width:100%;height:auto}
code{background:#f3f3f3;padding:.1rem .3rem}
@media print{body{margin:0}}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of escaped cells."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{inner}</div>'


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        results = run.config["results"]
        rows.append(
            [
                run.name,
                run.kind,
                run.config["data"]["name"],
                f"{100 * results['accuracy']:.2f} %",
                f"{100 * results['agreement']:.2f} %" if "agreement" in results else "",
                f"{results['sweeps']:.1f}" if "sweeps" in results else "1 pass",
                f"{results['seconds']:.0f}",
            ]
        )
    head = ["run", "kind", "data", "test accuracy", "agrees with teacher", "sweeps", "seconds"]
    return "<h2>Runs</h2>" + table(head, rows)


def _curves(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [
            [
                str(row["epoch"]),
                f"{row['train.loss']:.4f}",
                f"{100 * row['train.accuracy']:.1f}",
                f"{100 * row['validation.accuracy']:.1f}",
            ]
            for row in read_metrics(run.path)
        ]
        head = ["epoch", "loss", "training accuracy %", "validation accuracy %"]
        parts.append(f"<details><summary>{escape(run.name)}</summary>{table(head, rows)}</details>")
    return "<h2>Training</h2>" + "".join(parts)


def _robustness(evaluated: Evaluated) -> str:
    results = evaluated.results
    models = results["models"]
    head = ["threat", *(f"{model['name']} ({model['kind']})" for model in models)]
    settings = results["settings"]
    images = [
        f'<img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in sorted(evaluated.folder.glob("accuracy-*.png"))
    ]
    return (
        "<h2>Robustness</h2>"
        f"<p>Accuracy in percent on {results['n']} test images (Wilson 95 % interval), per image "
        "the worst case over all attacks, gradients and transfers. PGD: "
        f"{settings['pgd']['steps']} steps, {settings['pgd']['restarts']} restart(s); Square: "
        f"{settings['square']['queries']} queries; seed {settings['seed']}. An exported file "
        "gives no gradients: it is attacked by Square and by transfer.</p>"
        + table(head, threat_rows(models))
        + "".join(images)
    )


def _speed(benched: Benched) -> str:
    content = benched.content
    hardware = content["hardware"]
    return (
        "<h2>Speed</h2>"
        + table(
            ["what", "batch", "ms per image", "times the published teacher"], speed_rows(content)
        )
        + f"<p>{escape(str(hardware['cpu']))}, {hardware['torch_threads']} threads, "
        f"torch {escape(hardware['torch'])}, onnxruntime {escape(hardware['onnxruntime'])}; "
        "medians of interleaved rounds, quartile spread in brackets.</p>"
    )


def report(
    runs: Sequence[Run],
    path: Path,
    *,
    evaluated: Evaluated | None = None,
    benched: Benched | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        runs: Finished runs, teacher first.
        path: The HTML file.
        evaluated: Attacks and corruptions to show.
        benched: Timings to show.
    """
    parts = [_runs(runs)]
    if evaluated is not None:
        parts.append(_robustness(evaluated))
    if benched is not None:
        parts.append(_speed(benched))
    parts.append(_curves(runs))
    commands = "".join(
        f"<li><code>epdistill {'teach' if run.kind == 'teacher' else 'distill'}</code> with the "
        f"recipe in {escape(str(run.path / 'config.json'))}</li>"
        for run in runs
    )
    parts.append(f"<h2>Made by</h2><ul>{commands}</ul>")
    title = "epdistill: " + ", ".join(run.name for run in runs)
    atomic_write(
        path,
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n",
    )
    return path
