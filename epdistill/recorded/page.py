"""RESULTS.md: everything that was recorded, as one page of tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epdistill.recorded.models import Kin, kins, titles, told_apart
from epdistill.recorded.pictures import draw_all
from epdistill.recorded.store import (
    ABLATION,
    BENCH,
    EVALUATION,
    RUN,
    Record,
    of_kind,
)
from epdistill.recorded.tables import (
    ablation_tables,
    fidelity_table,
    model_table,
    pooled_tables,
    protocol_table,
    radius_table,
    speed_table,
    worst_table,
)
from epdistill.runs import atomic_write, machine_of

NOTES = "notes.md"
_NO_GRADIENTS = (
    " Files have no gradients: they are attacked by what needs none and by images made on the "
    "other models, which leaves them looking a little better than they are."
)
_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def write_page(found: Sequence[Record], records: Path, page: Path) -> list[str]:
    """Write the page, and its pictures beside the records.

    Args:
        found: The records.
        records: Their folder; `notes.md` in it, where there is one, is what people
            have to say about them, and comes first.
        page: The Markdown file.

    Returns:
        The stems of the pictures.
    """
    named = titles(found)
    pictures = draw_all(found, named, records)
    notes = records / NOTES
    words = notes.read_text().strip().splitlines() if notes.is_file() else []
    lines = [
        "# Results",
        "",
        "Made by `epdistill results` from the records in "
        f"[{records.name}]({_link(records, page)}); figures are not edited by hand. Accuracies in "
        "%, in brackets 95 % intervals over images (Wilson; of differences Agresti and Min), ± the "
        "standard deviation over seeds. A dash is what nobody measured.",
        "",
        *words,
        *_sections(found, named),
        *_pictures(pictures, records, page),
        *_commands(found),
    ]
    text = "\n".join(lines) + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(page, text)
    return list(pictures)


def _link(target: Path, page: Path) -> str:
    """From the page to a file, as it is written in Markdown."""
    here, there = page.resolve().parent, target.resolve()
    return str(there.relative_to(here)) if there.is_relative_to(here) else str(target)


def _sections(records: Sequence[Record], named: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    runs = {record.name: record for record in of_kind(records, RUN)}
    used: set[str] = set()
    for (data, recipe), members in kins(records).items():
        names = {run.name for kin in members for run in kin.runs}
        lines += ["", f"## {_NAMES.get(data, data)}, recipe `{recipe}`", ""]
        lines += [_setting(members), *model_table(members, data)]
        ablations = [
            record
            for record in of_kind(records, ABLATION)
            if (record.content["recipe"]["data"]["name"], record.content["recipe"]["name"])
            == (data, recipe)
        ]
        for split in dict.fromkeys(record.content["split"] for record in ablations):
            some = [record for record in ablations if record.content["split"] == split]
            lines += _together(some, split) if len(some) > 1 else []
        for record in ablations:
            lines += _ablation(record)
        for record in of_kind(records, EVALUATION):
            if names & {model["name"].partition("/")[0] for model in record.content["models"]}:
                used.add(record.file)
                lines += _evaluation(record, named, runs, data)
        for record in of_kind(records, BENCH):
            if record.name in names:
                used.add(record.file)
                lines += _bench(record, named)
    # Of models whose runs nobody recorded.
    others = [record for record in records if record.file not in used]
    for record in of_kind(others, EVALUATION):
        lines += _evaluation(record, named, runs, "")
    for record in of_kind(others, BENCH):
        lines += _bench(record, named)
    return lines


def _setting(members: Sequence[Kin]) -> str:
    run = members[0].runs[0].content
    recipe, data = run["recipe"], run["data"]
    channels = "-".join(map(str, recipe["teacher"]["channels"] or ()))
    machines = {
        f"{machine_of(env)} ({env['cores']} cores, torch {env['torch']})"
        for kin in members
        for one in kin.runs
        if (env := one.content.get("environment"))
    }
    return (
        f"EP-CNN {channels}, {data['train_images']:,} training images, "
        f"{data['validation_images']:,} for validation, {data['test_images']:,} for testing. "
        f"Trained on {'; '.join(sorted(machines))}."
    )


def _together(ablations: Sequence[Record], split: str) -> list[str]:
    return [
        "",
        f"### All ablations together, {split} images",
        "",
        "The ablations below drew their images apart; a row is the mean over all its seeds, and n "
        "counts different images. Rows are named by what they are.",
        *pooled_tables(ablations),
    ]


def _ablation(record: Record) -> list[str]:
    content = record.content
    settings = content["recipe"]["evaluate"]
    return [
        "",
        f"### Students and controls, {content['split']} images, seeds from "
        f"{content['recipe']['seed']}",
        "",
        f"Suite `{content['suite']}`: PGD with {settings['steps']} steps and Square with "
        f"{settings['queries']} queries on the true labels, along every gradient of a model that "
        f"relaxes, and the images made on `{content['sender']}`. The worst case per image counts; "
        "`epdistill ablate --plan` tells how rows differ.",
        *ablation_tables(content),
        "Students beside their teachers (rows without a teacher: beside the EP-CNN):",
        *fidelity_table(content),
        *_radii(content),
    ]


def _radii(content: Mapping[str, Any]) -> list[str]:
    found = radius_table(content)
    if not found:
        return []
    return [
        "What is lost where: images of PGD-10 (L2) on the student, and in each cell: same label as "
        "the teacher in %, R² of the matched layers, student right in %, teacher right on the same "
        "images in %:",
        *found,
    ]


def _evaluation(
    record: Record, named: Mapping[str, str], runs: Mapping[str, Record], data: str
) -> list[str]:
    content = record.content
    settings, models = content["settings"], content["models"]
    named = told_apart([model["name"] for model in models], named, runs)
    where = (
        f"{content['n']} {settings['split']} images ({settings['subset']}), seed {settings['seed']}"
    )
    attacks = [one["name"] for one in settings["attacks"]]
    for model in models:
        attacks += [name for case in model["worst_case"] for name in case.get("attacks", ())]
    lines = [
        "",
        f"### Worst case under `--suite {settings['name']}`, {where}",
        "",
        f"Attacks: {', '.join(dict.fromkeys(attacks))}{_budget(settings, attacks)}."
        + (_NO_GRADIENTS if any(model.get("kind") == "onnx" for model in models) else ""),
        *worst_table(record, named),
    ]
    if any(model.get("published") for model in models):
        lines += [
            "",
            f"### The published protocol, {where}",
            "",
            "As published: predicted labels, last iterate, no clipping, one gradient (70 unrolled "
            "sweeps). Adaptive: the same cell under the worst case. In print: full-size networks.",
            *protocol_table(record, named, runs, data),
        ]
    for skip in content["skipped"]:
        lines.append(f"* Not run: {skip['what']} ({skip['why']})")
    return lines


def _budget(settings: Mapping[str, Any], attacks: Sequence[str]) -> str:
    """What the attacks of that name were given, after a semicolon; empty without either."""
    pgd, square = settings["pgd"], settings["square"]
    starts = f" from {pgd['restarts']} starts" if pgd["restarts"] > 1 else ""
    told = {
        "pgd": f"PGD takes {pgd['steps']} steps{starts}",
        "square": f"Square {square['queries']} queries",
    }
    found = [text for name, text in told.items() if name in attacks]
    return "; " + ", ".join(found) if found else ""


def _bench(record: Record, named: Mapping[str, str]) -> list[str]:
    content, hardware = record.content, record.hardware or {}
    return [
        "",
        f"### Speed: {named.get(record.name, record.name)}",
        "",
        f"{hardware['cpu']}, {hardware['torch_threads']} thread(s), torch {hardware['torch']}, "
        f"onnxruntime {hardware['onnxruntime']}; interleaved rounds.",
        *speed_table(content, named),
    ]


def _pictures(pictures: Mapping[str, str], records: Path, page: Path) -> list[str]:
    if not pictures:
        return []
    lines = ["", "## Pictures", ""]
    for stem, words in pictures.items():
        lines += [f"![{words}]({_link(records / f'{stem}.png', page)})", ""]
    return lines


def _commands(records: Sequence[Record]) -> list[str]:
    """What was typed, in the order in which it has to be."""
    ablated = {
        Path(seed["run"]).name
        for record in of_kind(records, ABLATION)
        for row in record.content["rows"]
        if row["kind"] == "student"
        for seed in row["seeds"]
    }
    runs = sorted(of_kind(records, RUN), key=lambda run: run.content["kind"] != "teacher")
    asked = [run for run in runs if run.name not in ablated]
    asked += [one for kind in (ABLATION, EVALUATION, BENCH) for one in of_kind(records, kind)]
    commands = dict.fromkeys(record.command for record in asked if record.command)
    return ["", "## Commands", "", "```", *commands, "```"]
