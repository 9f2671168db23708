"""The model card of a run, made from recorded numbers alone."""

from __future__ import annotations

from epdistill.runs import Run


def card(run: Run) -> str:
    """Markdown text for the run's README.md."""
    config, results, data = run.config, run.config["results"], run.config["data"]
    recipe = config["recipe"]
    n = results["test_images"]
    lines = [f"# {run.name}", ""]
    if run.kind == "teacher":
        schedule = config["model"]["schedule"]
        channels = "-".join(
            str(layer["channels"]) for layer in config["model"]["architecture"]["layers"]
        )
        lines += [
            f"EP-CNN teacher ({channels}), trained by Equilibrium Propagation on {data['name']}.",
            "",
            "| figure | value |",
            "|---|---|",
            f"| test accuracy | {results['accuracy']:.4f} (n = {n}) |",
            f"| mean sweeps per test image | {results['sweeps']:.1f} |",
            f"| test images settled to {schedule['tolerance']:g} | {results['converged']:.4f} |",
            f"| largest residual | {results['residual']:.3g} |",
            f"| relaxation | {schedule['kind']}, omega {schedule['omega']:g}, "
            f"at most {schedule['sweeps']} sweeps |",
        ]
        section = recipe["teacher"]
    else:
        r2 = ", ".join(f"{value:.3f}" for value in results["r2"])
        lines += [
            f"{recipe['student']['name']} student of the EP-CNN teacher "
            f"`{config['teacher']['name']}` on {data['name']}, matched to its fixed points "
            f"on `{recipe['student']['inputs']}` inputs.",
            "",
            "| figure | value |",
            "|---|---|",
            f"| test accuracy | {results['accuracy']:.4f} (n = {n}) |",
            f"| teacher's test accuracy | {results['teacher_accuracy']:.4f} |",
            f"| same label as the teacher | {results['agreement']:.4f} |",
            f"| R^2 of the fixed points, per layer | {r2} |",
        ]
        section = recipe["student"]
    environment = config["environment"]
    lines += [
        f"| training images | {data['train_images']} |",
        f"| epochs | {section['epochs']} |",
        f"| seed | {recipe['seed']} |",
        f"| seconds of training (last process) | {results['seconds']:.0f} |",
        f"| hardware | {environment.get('cpu', 'unknown')}, torch {environment['torch']} |",
        f"| epdistill | {environment['epdistill']} |",
        "",
        "Accuracy alone says nothing about robustness: run `epdistill evaluate`.",
        "",
    ]
    return "\n".join(lines)
