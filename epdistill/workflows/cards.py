"""The model card of a run, made from recorded numbers alone.

It is written when the training ends and again when something more is measured. A card that
somebody edited is left alone, but for its licence, which is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from epdistill.disk import alone
from epdistill.errors import EpdistillError
from epdistill.loading import model_name
from epdistill.recipes import EP_CNN
from epdistill.runs import CARD, CONFIG, FILES, Run, machine_of, open_run, write_together
from epdistill.sealed import seal
from epdistill.workflows.card_evidence import evidence_sections, limits, making
from epdistill.workflows.card_front import (
    UNDECIDED,
    data_name,
    front_matter,
    licence_of,
    without_licence,
)
from epdistill.workflows.evidence import Evidence, evidence_of

_MARK = "<!-- made by epdistill from recorded numbers; "

_RULES = {
    "ep": "Equilibrium Propagation",
    "bptt": "backpropagation through time",
    "implicit": "the implicit gradient at its fixed points",
}
_BASELINES = {
    "bp-cnn": "Convolutional network trained by backpropagation",
    "adv-cnn": "Convolutional network trained on adversarial images",
    "vit": "Vision transformer",
    "wca": "Stochastic network with weight-covariance alignment (WCA-Net)",
}


def card(run: Run, found: Evidence = Evidence(), licence: str = UNDECIDED) -> str:
    """Markdown text for the run's README.md.

    Args:
        run: A finished run.
        found: What was measured after the training.
        licence: Of the weights.
    """
    lines = [*front_matter(run, found.robustness, licence), "", *_training(run)]
    lines += [*evidence_sections(run, found), *making(run, found), *limits(run, found)]
    text = "\n".join([*lines, ""])
    return f"{text}\n{_mark(text)}\n"


def refresh(path: Path, runs: Path, *also: Path) -> None:
    """Write the card of a run anew, with everything that is known by now.

    A run that is not finished, damaged, not ours to write or just being written by another
    process, what comes with the package, and a card that was edited by hand, are left as they
    are: a card is never worth an error. Its digest in config.json changes with it.

    Args:
        path: The run's folder.
        runs: In whose folders evaluations and timings lie.
        also: Further such folders.
    """
    from epdistill.teachers.pretrained import shipped_folder

    if path.resolve() == shipped_folder().resolve():
        return
    with suppress(EpdistillError, OSError, UnicodeDecodeError), alone(path) as ours:
        run = open_run(path)
        written = (run.path / CARD).read_text() if (run.path / CARD).is_file() else ""
        edited = bool(written) and not _untouched(written)
        if not ours or not run.config.get("finished") or edited:
            return
        text = card(run, evidence_of(run, runs, also), licence_of(written))
        files: dict[Path, bytes | str] = {run.path / CARD: text}
        told = run.config.get(FILES)
        if told is not None:  # a run from before there were checksums stays without
            digest = hashlib.sha256(text.encode()).hexdigest()
            files[run.path / CONFIG] = seal({**run.config, FILES: {**told, CARD: digest}})
        write_together(files)


def _mark(text: str) -> str:
    digest = hashlib.sha256(without_licence(text).encode()).hexdigest()
    return f"{_MARK}edit it and it stays as you leave it: {digest[:16]} -->"


def _untouched(written: str) -> bool:
    """Whether a card is as it was made, but perhaps for its licence."""
    text, mark, _ = written.rpartition(f"\n{_MARK}")
    return bool(mark) and written == f"{text}\n{_mark(text)}\n"


def _training(run: Run) -> list[str]:
    """What it is, what it does on clean images, and how it was trained."""
    config, results, data = run.config, run.config["results"], run.config["data"]
    recipe = config["recipe"]
    lines = [f"# {run.name}", ""]
    if run.kind == "teacher":
        name = model_name(run)
        if name == EP_CNN:
            section = recipe["teacher"]
            lines += _relaxing(run)
        else:
            section = recipe["baselines"][name.replace("-", "_")]
            lines += _feedforward(run)
        lines += [
            f"| parameters | {results['parameters']:,} |",
            f"| floating-point operations per image | {results['flops']:.3g} |",
        ]
        for source, accuracy in results["published"].items():
            lines.append(f"| published test accuracy on {source}, full size | {accuracy} |")
    else:
        lines += _student(run)
        section = recipe["student"]
    environment = config["environment"]
    machine = machine_of(environment, "unknown")
    lines += [
        f"| data | {data_name(run)}: {data['train_images']} training, "
        f"{data['validation_images']} validation and {data['test_images']} test images, "
        f"{len(data['classes'])} classes |",
        f"| epochs | {section['epochs']} |",
        f"| seed | {recipe['seed']} |",
        f"| seconds of training | {results['seconds']:.0f} |",
        f"| hardware | {machine}, torch {environment['torch']} |",
        f"| epdistill | {environment['epdistill']} |",
    ]
    return lines


def _relaxing(run: Run) -> list[str]:
    """What is told of an EP-CNN."""
    config, results = run.config, run.config["results"]
    schedule = config["model"]["schedule"]
    layers = config["model"]["architecture"]["layers"]
    channels = "-".join(str(layer["channels"]) for layer in layers)
    rule = _RULES[config["recipe"]["teacher"]["rule"]]
    return [
        f"EP-CNN teacher ({channels}), trained by {rule} on {data_name(run)}.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| test accuracy | {results['accuracy']:.4f} (n = {results['test_images']}) |",
        f"| mean sweeps per test image | {results['sweeps']:.1f} |",
        f"| test images settled to {schedule['tolerance']:g} | {results['converged']:.4f} |",
        f"| largest residual | {results['residual']:.3g} |",
        f"| relaxation | {schedule['kind']}, omega {schedule['omega']:g}, "
        f"at most {schedule['sweeps']} sweeps |",
    ]


def _feedforward(run: Run) -> list[str]:
    """What is told of a baseline."""
    config, results = run.config, run.config["results"]
    lines = [
        f"{_BASELINES[model_name(run)]}, on {data_name(run)}.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| test accuracy | {results['accuracy']:.4f} (n = {results['test_images']}) |",
    ]
    if "without_noise" in results:
        lines.append(f"| test accuracy without noise | {results['without_noise']:.4f} |")
    if model_name(run) == "adv-cnn":
        own = config["recipe"]["baselines"]["adv_cnn"]
        lines.append(f"| trained within | {own['norm']} {own['eps']:g}, {own['steps']} PGD steps |")
    return lines


def _student(run: Run) -> list[str]:
    """What is told of a student."""
    config, results = run.config, run.config["results"]
    own, found = config["recipe"]["student"], results["fidelity"]
    taught = f"the teacher `{config['teacher']['name']}` on {data_name(run)}"
    if own["loss"] == "ce":
        smoothed = (
            f", {own['label_smoothing']:g} of them smoothed" if own["label_smoothing"] else ""
        )
        story = [
            f"{own['name']} trained on the labels alone{smoothed}, on `{own['inputs']}` inputs: a "
            f"control beside the students of {taught}."
        ]
    else:
        matched = {"states": "states", "last": "last state", "logits": "logits alone"}[own["match"]]
        story = [
            f"{own['name']} student of {taught}, matched to its {matched} on `{own['inputs']}` "
            "inputs."
        ]
    if own["inputs"] == "adversarial":
        story += [
            "",
            f"Trained on adversarial inputs ({own['adversarial_norm']} "
            f"{own['adversarial_eps']:.4g}, {own['adversarial_steps']} steps): its robustness is "
            "trained for, not inherited from the teacher.",
        ]
    if own["inputs"] == "corruption":
        story += [
            "",
            f"Trained on corrupted inputs ({', '.join(own['corruptions'])}): accuracy under these "
            "and similar corruptions is trained for, not inherited from the teacher.",
        ]
    return [
        *story,
        "",
        "| figure | value |",
        "|---|---|",
        f"| test accuracy | {results['accuracy']:.4f} (n = {results['test_images']}) |",
        f"| teacher's test accuracy | {results['teacher_accuracy']:.4f} |",
        f"| expected calibration error, 15 bins | {results['ece']:.4f} |",
        f"| parameters | {results['parameters']:,} |",
        f"| floating-point operations per image | {results['flops']:.3g} |",
        "",
        "How near it is to its teacher, which sees the same images:",
        "",
        "| test images | same label | R^2 per layer | cosine per layer |",
        "|---|---|---|---|",
        *(
            f"| {name} (n = {row['images']}) | {row['agreement']:.4f} | "
            f"{per_layer(row['r2'])} | {per_layer(row['cosine'])} |"
            for name, row in (
                ("clean", found["clean"]),
                (f"noise {found['noise']['std']:g}", found["noise"]),
                (f"PGD-10 Linf {found['adversarial']['eps']:.4g}", found["adversarial"]),
            )
        ),
        "",
        "How it was trained:",
        "",
        "| figure | value |",
        "|---|---|",
    ]


def per_layer(values: Sequence[float | None]) -> str:
    """One figure per layer, a dash for those that are not matched."""
    return ", ".join("-" if value is None else f"{value:.3f}" for value in values)
