"""The report's page: what it holds, that it is whole by itself, and how Chromium shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from epdistill.console import SILENT
from epdistill.errors import EvaluationError, RunError
from epdistill.page.charts import Series, chart, powers, ticks
from epdistill.page.document import document
from epdistill.page.elements import Cell, letters, table
from epdistill.page.masking import masking
from epdistill.recipes import load_recipe
from epdistill.robustness.examples import NAME, read_examples
from epdistill.runs import open_run
from epdistill.workflows.context import Context
from epdistill.workflows.report import report_on

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SETTINGS = {
    "teacher.channels": [8, 16],
    "teacher.epochs": 3,
    "evaluate.limit": 12,
    "evaluate.linf": [0.05, 0.3],
    "evaluate.l2": [0.5],
    "evaluate.steps": 2,
    "evaluate.queries": 4,
}


class Reader(HTMLParser):
    """Tags with their attributes, and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its student, its file, an evaluation of all, and a page about them."""
    from epdistill.workflows.deployment import export
    from epdistill.workflows.evaluation import evaluate
    from epdistill.workflows.training import distill, teach

    runs = tmp_path_factory.mktemp("report") / "runs"
    context = Context(runs=runs, reporter=SILENT)
    teacher = teach(load_recipe("digits", SETTINGS), context).run
    student = distill(None, context, overrides={"student.name": "cnn", "student.epochs": 3}).run
    file = export(context).result.path
    evaluate([teacher.path, student.path, file], context)
    report_on([], runs)
    return runs


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs", copy_function=shutil.copy2)
    return tmp_path / "runs"


def test_the_page_is_whole_by_itself(made: Path) -> None:
    page = (made / "report.html").read_text()
    reader = read(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
        assert "style" not in attributes and not any(key.startswith("on") for key in attributes)
    assert (
        "@import" not in page
        and "url(" not in page
        and "http:" not in page
        and "https:" not in page
    )
    (policy,) = (
        attributes["content"]
        for tag, attributes in reader.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("style", "script"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_page_shows_what_was_recorded(made: Path) -> None:
    text = " ".join(" ".join(read((made / "report.html").read_text()).texts).split())
    results = json.loads((made / "evaluate-001/results.json").read_text())
    for model in results["models"]:
        for row in [model["clean"], *model["worst_case"]]:
            low, high = row["ci95"]
            assert f"{100 * row['accuracy']:.1f} ({100 * low:.1f}\u2013{100 * high:.1f})" in text
    for name in ("digits-ep-cnn-001", "digits-cnn-001"):
        found = open_run(made / name).config["results"]
        assert f"{100 * found['accuracy']:.2f} %" in text
    assert f"epdistill distill --teacher {made / 'digits-ep-cnn-001'} --student cnn" in text
    assert f"{made / 'digits-cnn-001/model.onnx'} --suite quick --limit 12" in text
    assert "Nobody looked for masked gradients" in text
    assert "Not measured: type `epdistill bench`" in text
    page = (made / "report.html").read_text()
    assert page.count("<svg class") == 2 + 5 + 6
    # Six images, clean, attacked and changed for two models, and three corruptions.
    assert page.count('class="pixels"') == 6 * (1 + 2 * 2 + 3)


def test_examples_are_kept_with_the_evaluation(made: Path) -> None:
    found = read_examples(made / "evaluate-001")
    assert found is not None
    assert set(found.adversarial) == {"digits-ep-cnn-001", "digits-cnn-001"}
    assert found.left_out == {"digits-cnn-001/model.onnx": "gives no gradients"}
    for image in found.adversarial.values():
        assert float((image - found.clean).abs().max()) <= found.eps + 1e-6
        assert float((image - found.clean).abs().max()) > 0.5 * found.eps
    # What is said of an answer is what the model answers.
    import epdistill

    model = epdistill.load(made / "digits-cnn-001")
    classes = open_run(made / "digits-cnn-001").config["data"]["classes"]
    with torch.no_grad():
        given = model(found.adversarial["digits-cnn-001"]).argmax(1)  # type: ignore[arg-type]
    answers = found.answers["digits-cnn-001"]["adversarial"]
    assert [classes[int(place)] for place in given] == list(answers)
    assert (made / f"evaluate-001/examples-{found.norm}.png").is_file()


def test_damaged_examples_are_left_out_of_the_page(runs: Path) -> None:
    path = runs / "evaluate-001" / NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EvaluationError, match="damaged or was edited"):
        read_examples(path.parent)
    alone = runs / "examples-alone"
    alone.mkdir()
    (alone / NAME).write_bytes(path.read_bytes())
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_examples(alone)
    page = report_on([], runs).read_text()
    assert "None were kept" in page and 'class="pixels"' not in page


def test_a_run_alone_is_worth_a_page(runs: Path) -> None:
    shutil.rmtree(runs / "evaluate-001")
    page = report_on([runs / "digits-ep-cnn-001"], runs, out=runs / "deep/er/page.html")
    text = " ".join(read(page.read_text()).texts)
    for words in ("Not measured: type `epdistill evaluate`", "None: type `epdistill export`"):
        assert words in text
    assert "digits-cnn-001" not in text
    shutil.rmtree(runs / "digits-ep-cnn-001")  # the student has lost its teacher
    assert "digits-cnn-001" in report_on([], runs).read_text()


def test_bad_places_are_told(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished teacher run"):
        report_on([], tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        report_on([], runs, out=tmp_path / "file/page.html")


def test_everything_from_outside_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    rows = [[evil, Cell(evil, 1.0)]]
    page = document(evil, [("a", evil, table(evil, [evil, evil], rows))], "")
    page += chart(evil, [Series(evil, [(1, 1), (2, 2)]), Series(evil, [(1, 2)])], x=evil)
    assert [tag for tag, _ in read(page).tags].count("script") == 1
    assert "alert(&quot;" in page


def diagnosis(status: str) -> dict[str, Any]:
    check = {"number": 1, "name": "determinism", "value": 0.5, "threshold": "> 1",
             "status": status, "detail": "seen", "todo": "act", "table": []}  # fmt: skip
    other = {**check, "number": 2, "name": "logits", "value": "logits", "status": "PASS"}
    quiet = {**check, "number": 3, "name": "shift", "value": None, "status": "not applicable"}
    found = {"checks": [check, other, quiet], "n": 8, "norm": "linf", "eps": 8 / 255,
             "text": "the verdict", "masking_evidence": status == "FAIL"}  # fmt: skip
    return {"models": [{"name": "net", "kind": "student", "diagnosis": found}]}


def test_the_checks_are_shown_with_what_to_do() -> None:
    page = masking(diagnosis("FAIL"))
    assert "seen: act" in page and "note FAIL" in page and "the verdict" in page
    assert "Not applicable: 3 shift." in page
    assert "seen: act" not in masking(diagnosis("PASS"))
    assert "Nobody looked" in masking(None)


def test_charts() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(1, 3) == [1, 1.5, 2, 2.5, 3]
    assert powers(-2, -1) == pytest.approx([-2, -1.69897, -1.30103, -1])
    assert chart("nothing", [Series("a", [])], x="x") == ""
    assert chart("nan", [Series("a", [(1, float("nan"))])], x="x") == ""
    assert chart("log", [Series("a", [(1, 0.0)])], x="x", log=True) == ""
    one = chart("one", [Series("a", [(3, 0.5)])], x="epoch", percent=True)
    assert one.count("<circle") == 1 and "a: 50.0 % at 3" in one
    flat = chart("flat", [Series("a", [(1, 2.0), (2, 2.0)])], x="x")
    assert "nan" not in flat and "inf" not in flat
    both = chart(
        "two", [Series("a", [(1, 1), (2, 3)], [(0, 2), (2, 4)]), Series("b", [(1, 1)])], x="x"
    )
    assert both.count("polygon") == 1 and both.count("<li>") == 2


def test_letters_never_run_out() -> None:
    found = letters([str(place) for place in range(60)])
    assert len(set(found.values())) == 60 and found["0"] == "A" and found["26"] == "A2"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        engine = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield engine
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_it(
    made: Path, browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    url = (made / "report.html").as_uri()
    page.goto(url)
    # No line of the page is wider than the screen; wide tables scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('table.sortable th button').length") > 20
    broken = "Array.from(document.images).filter(image => !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    shot = page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(shot) > 20_000

    column = page.locator("#robustness table").first.locator("tbody tr td:nth-child(2)")
    head = page.locator("#robustness table").first.locator("th:nth-child(2)")
    before = column.all_text_contents()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = [float(text.split()[0]) for text in column.all_text_contents()]
    assert rising == sorted(rising) and rising != sorted(rising, reverse=True)
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    falling = column.all_text_contents()
    assert [float(text.split()[0]) for text in falling] == sorted(rising, reverse=True)
    assert sorted(falling) == sorted(before)

    # The policy holds: what the page would fetch is refused before it leaves.
    page.evaluate("fetch('http://127.0.0.1:9/x').catch(() => null)")
    assert [target for target in asked if not target.startswith(("data:", url))] == []
    refused = [text for text in told if "Content Security Policy" in text]
    assert refused and told == refused
    if width == 1280 and scheme == "light":
        assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
