"""A few images as the models saw them: clean, adversarial, the change, corrupted."""

from __future__ import annotations

from html import escape

from torch import Tensor

from epdistill.page.elements import letters, paragraph, picture, section
from epdistill.robustness.examples import ADVERSARIAL, CLEAN, STEPS, Examples
from epdistill.robustness.pictures.grid import change_factor
from epdistill.robustness.shares import ball


def examples(found: Examples | None) -> str:
    """The grid; one line where no images were kept.

    Args:
        found: What the evaluation kept.
    """
    if found is None:
        text = "None were kept: type `epdistill evaluate`, which keeps some since this version."
        return section("images", "Images", paragraph(text))
    marks = letters(list(found.answers))
    largest = max(
        (float((image - found.clean).abs().max()) for image in found.adversarial.values()),
        default=0.0,
    )
    factor = change_factor(largest)
    head = ["clean"]
    for name in found.adversarial:
        head += [f"attacked: {marks[name]}", f"change x {factor:g}"]
    head += list(found.corrupted)
    rows = "".join(
        f"<tr>{''.join(_row(found, place, marks, factor))}</tr>"
        for place in range(len(found.labels))
    )
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    legend = "; ".join(f"{mark} = {name}" for name, mark in marks.items())
    words = (
        f"{legend}. Below each image stands what the models answer, red with a cross where it "
        f"is wrong. Attacked: PGD, {STEPS} steps, {ball(found.norm, found.eps)}, along "
        f"{_views(found, marks)}; an illustration that counts for nothing in the tables. Change: "
        "grey is none."
    )
    left = [f"{name} was not attacked: {reason}." for name, reason in found.left_out.items()]
    return section(
        "images",
        "Images",
        paragraph(words),
        '<div class="scroll" role="region" tabindex="0" aria-label="Images">'
        f'<table class="images"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>',
        *(paragraph(text, "soft") for text in left),
    )


def _views(found: Examples, marks: dict[str, str]) -> str:
    attacked = [f"{found.views[name]} of {marks[name]}" for name in found.adversarial]
    return f"one gradient each ({', '.join(attacked)})" if attacked else "no gradient"


def _row(found: Examples, place: int, marks: dict[str, str], factor: float) -> list[str]:
    truth, number = found.labels[place], found.numbers[place]
    about = f"{found.split} image {number}, {truth}"
    clean = found.clean[place]
    cells = [_cell(found, place, marks, CLEAN, clean, about, list(marks))]
    for name, images in found.adversarial.items():
        attacked = images[place]
        words = f"{about}, attacked for {name}"
        cells.append(_cell(found, place, marks, ADVERSARIAL, attacked, words, [name]))
        change = 0.5 + factor * (attacked - clean)
        cells.append(f"<td>{picture(change, f'change of {about} for {name}')}</td>")
    for what, images in found.corrupted.items():
        words = f"{about}, {what}"
        cells.append(_cell(found, place, marks, what, images[place], words, list(marks)))
    return cells


def _cell(
    found: Examples,
    place: int,
    marks: dict[str, str],
    what: str,
    image: Tensor,
    about: str,
    names: list[str],
) -> str:
    """An image with the models' answers below; on the clean one the truth first."""
    truth = found.labels[place]
    lines = [f"<span><b>{escape(truth)}</b></span>"] if what == CLEAN else []
    for name in names:
        answer = found.answers[name][what][place]
        wrong = answer != truth
        kind = ' class="wrong"' if wrong else ""
        text = f"{marks[name]}: {answer}{' ✗' if wrong else ''}"
        lines.append(f"<span{kind}>{escape(text)}</span>")
    return f"<td>{picture(image, about)}{''.join(lines)}</td>"
