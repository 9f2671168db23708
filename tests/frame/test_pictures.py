"""Pictures: files, sizes, labels as text, equal bytes, and nothing left behind."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from epdistill.errors import EvaluationError
from epdistill.robustness.intervals import wilson
from epdistill.robustness.pictures import (
    accuracy_curves,
    adversarial_grid,
    corruption_heat_map,
    save,
    sweep_curves,
    temporal_heat_map,
    transfer_matrix,
    uncertainty_plot,
)
from epdistill.robustness.pictures.style import look, wrap

# Names that matplotlib would hide (a leading underscore), set as formulas or break off.
NAMES = ["_hidden $a_b$", "resnet18-width-64-noise-matched-student-dynamic-int8-quantised.onnx"]


def accuracies(names: list[str]) -> Figure:
    rows = [{"eps": k / 255, "accuracy": 0.9 - 0.1 * k, "n": 200} for k in range(5)]
    return accuracy_curves(dict.fromkeys(names, rows), "linf", title="worst case")


def corruptions(names: list[str]) -> Figure:
    kinds = ["gaussian_noise", "fog", "spatter"]
    rows = [
        {
            "corruption": kind,
            "severity": severity,
            "extra": kind == "spatter",
            "accuracy": 0.99 - 0.1 * severity,
        }
        for kind in kinds
        for severity in (1, 2, 3)
    ]
    return corruption_heat_map(
        dict.fromkeys(names, rows), clean={names[0]: 0.987}, title="corrupted"
    )


def sweeps(names: list[str]) -> Figure:
    rows = [{"sweeps": t, "accuracy": 1 - 2.0**-t, "n": 64} for t in range(1, 6)]
    return sweep_curves(dict.fromkeys(names, rows), title="settling")


def temporal(names: list[str]) -> Figure:
    grid = [[0.5, 0.25], [0.125, float("nan")], [0.75, 1.0]]
    return temporal_heat_map(
        dict.fromkeys(names, grid), ["implicit", 5, 30], [70, "settled"], title="horizons"
    )


def transfers(names: list[str]) -> Figure:
    values = np.linspace(0.05, 0.95, len(names) ** 2).reshape(len(names), -1)
    return transfer_matrix(values, names, names, title="transfer")


def uncertain(names: list[str]) -> Figure:
    eps = [1e-3, 1e-2, 1e-1]
    row = {
        "eps": eps,
        "f": [0.4 * e**0.3 for e in eps],
        "n": 500,
        "alpha": 0.3,
        "intercept": float(np.log(0.4)),
        "ci95": (0.25, 0.36),
    }
    return uncertainty_plot(dict.fromkeys(names, row), title="basins")


def grid(names: list[str], n: int = 3) -> Figure:
    clean = np.random.default_rng(0).random((n, 1, 8, 8)) * 0.8 + 0.1
    attacked = {name: clean + 0.02 * (-1) ** k for k, name in enumerate(names)}
    answers = {name: [7, *range(1, n)] for name in names}
    return adversarial_grid(clean, list(range(n)), attacked, answers, title="attacked images")


PICTURES: dict[str, tuple[Callable[[list[str]], Figure], list[str]]] = {
    "accuracy": (accuracies, ["worst case", "accuracy (%), 95 % interval"]),
    "corruption": (corruptions, ["gaussian noise", "spatter", "mean of extras", "89.0", "69.0"]),
    "sweeps": (sweeps, ["sweeps", "settling", "accuracy (%), 95 % interval"]),
    "temporal": (temporal, ["implicit", "settled", "12.5", "100", "\N{EN DASH}"]),
    "transfer": (transfers, ["made on (source)", "tried on (target)", "5.0", "95.0"]),
    "uncertainty": (uncertain, ["uncertain fraction f", "0.001"]),
    "grid": (grid, ["clean", "attacked", "change x 25", "7", "attacked images"]),
}


def texts(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_text())
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


def pixels(png: Path) -> NDArray[np.uint8]:
    with Image.open(png) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("picture", PICTURES)
def test_both_files_hold_the_picture(picture: str, tmp_path: Path) -> None:
    draw, labels = PICTURES[picture]
    figure = draw(NAMES)
    # The ending is added, also where the name holds a point.
    png, svg = save(figure, tmp_path / "new" / "radius-0.5")
    assert (png.name, svg.name) == ("radius-0.5.png", "radius-0.5.svg")
    assert sorted(tmp_path.rglob("*.*")) == sorted([png, svg])
    shown = pixels(png)
    assert shown.std() > 5
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 20
    found = texts(svg)
    for label in labels:
        assert label in found
    # A name may be wrapped: its lines follow each other.
    for name in NAMES:
        assert name.replace(" ", "") in "".join(found).replace(" ", "")


@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_is_cut_off_at_the_edges(picture: str, tmp_path: Path) -> None:
    png, _ = save(PICTURES[picture][0](NAMES), tmp_path / "picture")
    shown = pixels(png)
    for edge in (shown[0], shown[-1], shown[:, 0], shown[:, -1]):
        assert (edge == 255).all()


@pytest.mark.parametrize("picture", PICTURES)
def test_texts_do_not_overlap(picture: str) -> None:
    figure = PICTURES[picture][0]([*NAMES, "teacher", "student.onnx"])
    figure.draw_without_rendering()
    level = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text.get_rotation() % 90 == 0
    ]
    boxes = [text.get_window_extent().padded(-0.5) for text in level]
    for (one, first), (two, second) in combinations(zip(level, boxes, strict=True), 2):
        assert not first.overlaps(second), (one.get_text(), two.get_text())


@pytest.mark.parametrize("picture", PICTURES)
def test_equal_input_gives_equal_bytes(picture: str, tmp_path: Path) -> None:
    draw = PICTURES[picture][0]
    first = save(draw(NAMES[:1]), tmp_path / "a")
    figure = draw(NAMES[:1])
    second, third = save(figure, tmp_path / "b"), save(figure, tmp_path / "c")
    for one, two, three in zip(first, second, third, strict=True):
        assert one.read_bytes() == two.read_bytes() == three.read_bytes()


def test_a_users_configuration_neither_matters_nor_changes(tmp_path: Path) -> None:
    plain = save(accuracies(NAMES), tmp_path / "plain")
    mine = {"font.size": 30.0, "axes.facecolor": "red", "svg.fonttype": "path", "savefig.dpi": 20}
    with matplotlib.rc_context(mine):
        before = dict(matplotlib.rcParams)
        styled = save(accuracies(NAMES), tmp_path / "styled")
        assert dict(matplotlib.rcParams) == before
    for one, two in zip(plain, styled, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_drawing_leaves_the_global_random_numbers_alone(tmp_path: Path) -> None:
    np.random.seed(3)  # noqa: NPY002 - the legacy global generator is what is watched
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    save(grid(NAMES), tmp_path / "grid")
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]  # noqa: NPY002


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("kept")
    with pytest.raises(EvaluationError, match=r"cannot be written .*; expected a folder"):
        save(transfers(["a"]), tmp_path / "taken" / "picture")
    assert (tmp_path / "taken").read_text() == "kept"


def test_letters_that_the_font_lacks_do_not_stop_a_picture(tmp_path: Path) -> None:
    _, svg = save(accuracies(["教师"]), tmp_path / "picture")
    assert "教师" in texts(svg)


def test_models_are_told_apart_without_colour() -> None:
    looks = [look(number) for number in range(12)]
    assert len({(one.marker, str(one.dash)) for one in looks}) == 12
    assert len({one.colour for one in looks[:7]}) == 7


def test_more_models_make_a_larger_grid_with_the_same_images() -> None:
    small, wide, high = grid(["a"], 2), grid(["a", "b", "c"], 2), grid(["a"], 12)
    assert wide.get_size_inches()[0] > small.get_size_inches()[0]
    assert high.get_size_inches()[1] - small.get_size_inches()[1] == pytest.approx(10 * 1.23)
    # One original, and for each model an attacked image and its change.
    assert [len(f.axes[0].images) for f in (small, wide, high)] == [2 * 3, 2 * 7, 12 * 3]


def test_wrapping_loses_nothing_and_fits() -> None:
    for name in (*NAMES, "x" * 90, "short"):
        lines = wrap(name, 1.5, 9).split("\n")
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
        assert max(map(len, lines)) <= 19  # at 0.6 em of 9 points each
    assert wrap("short\nname", 1.5, 9) == "short\nname"


def test_accuracy_bars_are_wilsons_intervals() -> None:
    rows = [{"eps": 0.5, "accuracy": 0.0, "n": 40}, {"eps": 0.0, "accuracy": 0.75, "n": 40}]
    (panel,) = accuracy_curves({"net": rows}, "l2").axes
    (bars,) = (c for c in panel.collections if type(c).__name__ == "LineCollection")
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    for drawn, right in zip(ends, (30, 0), strict=True):
        assert drawn == pytest.approx([100 * end for end in wilson(right, 40)])
    assert panel.lines[0].get_xdata() == pytest.approx([0, 0.5])


def test_linf_radii_are_drawn_in_grey_levels() -> None:
    rows = [{"eps": 8 / 255, "accuracy": 0.5, "n": 10}]
    (panel,) = accuracy_curves({"net": rows}, "linf").axes
    assert panel.lines[0].get_xdata() == pytest.approx([8])


def test_means_of_corruptions(tmp_path: Path) -> None:
    rows = [
        {"corruption": "fog", "severity": 1, "accuracy": 0.9},
        {"corruption": "fog", "severity": 2, "accuracy": 0.5},
        {"corruption": "snow", "severity": 1, "accuracy": 0.4},
        {"corruption": "mud", "severity": 1, "accuracy": 0.1, "extra": True},
        {"corruption": "mud", "severity": 2, "accuracy": 0.3, "extra": True},
    ]
    _, svg = save(corruption_heat_map({"net": rows}), tmp_path / "c")
    cells = [text for text in texts(svg) if text == "\N{EN DASH}" or "." in text]
    gap = "\N{EN DASH}"
    # Row by row: severities 1 and 2, then their mean. Snow lacks severity 2: so do the means.
    # (Mud's mean row equals its only row.)
    expected = ["90.0", "50.0", "70.0", "40.0", gap, gap, "65.0", gap, gap]
    assert cells == [*expected, *["10.0", "30.0", "20.0"] * 2]


def test_the_factor_of_the_change_clips_nothing() -> None:
    clean = np.full((1, 1, 8, 8), 0.5)
    attacked = clean + (8 / 255) * np.sign(np.arange(64).reshape(1, 1, 8, 8) - 31.5)
    figure = adversarial_grid(clean, [0], {"net": attacked}, {"net": [1]})
    change = np.asarray(figure.axes[0].images[2].get_array())
    # 0.5 / (8/255) = 15.9..., of which two digits are 15.
    assert np.unique(change.round(6)) == pytest.approx([0.5 - 120 / 255, 0.5 + 120 / 255], abs=1e-6)


def test_frames_mark_the_worst_of_each_column() -> None:
    panels = {"one": [[0.5, 0.2], [0.3, 0.6]], "two": [[0.1, 0.9], [0.4, 0.8]]}

    def frames(figure: Figure) -> list[list[tuple[int, int]]]:
        return [
            [
                (int(p.get_y()), int(p.get_x()))  # type: ignore[attr-defined]
                for p in panel.patches
                if not p.get_fill()
            ]
            for panel in figure.axes[:2]
        ]

    figure = temporal_heat_map(panels, [1, 2], [3, 4])
    assert frames(figure) == [[(0, 1), (1, 0)], [(0, 0), (1, 1)]]


def test_the_fitted_line_is_the_power_law() -> None:
    (panel,) = uncertain(["net"]).axes
    (line,) = (line for line in panel.lines if len(line.get_xdata()) == 60)  # type: ignore[arg-type]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert y == pytest.approx(0.4 * x**0.3)


def test_no_doubt_at_all_is_said(tmp_path: Path) -> None:
    row = {"eps": [0.01, 0.1], "f": [0.0, 0.0], "n": 50, "alpha": None}
    for number, given in enumerate((row, {**row, "n": None})):
        _, svg = save(uncertainty_plot({"net": given}), tmp_path / str(number))
        assert "net: no exponent" in texts(svg)
