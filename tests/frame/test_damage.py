"""Single bytes changed at random in everything a run leaves behind: all are noticed.

Loading notices what decides a model's answers, a report its rows, a table its results;
`epdistill check` notices all of it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from epdistill.checkpoints import PREVIOUS, STATE, load_checkpoint
from epdistill.cli import main
from epdistill.console import SILENT
from epdistill.errors import EpdistillError
from epdistill.export.runtime import OnnxClassifier
from epdistill.loading import load_student, load_teacher
from epdistill.recipes import Recipe, load_recipe
from epdistill.robustness.examples import read_examples
from epdistill.robustness.journal import NAME as JOURNAL
from epdistill.robustness.journal import Journal, read_header
from epdistill.robustness.results import checked_csv, read_results
from epdistill.runs import open_run, read_metrics
from epdistill.workflows import training
from epdistill.workflows.checking import DAMAGED, INTACT, UNKNOWN, check
from epdistill.workflows.context import Context
from epdistill.workflows.deployment import export
from epdistill.workflows.evaluation import evaluate

COUNT, SEED = 200, 2026


def tiny() -> Recipe:
    return load_recipe(
        "digits",
        {
            "teacher.channels": [4, 6], "teacher.batch_size": 256, "teacher.epochs": 2,
            "student.name": "cnn", "student.width": None, "student.batch_size": 256,
            "student.epochs": 1, "evaluate.limit": 4, "evaluate.linf": [0.05],
            "evaluate.l2": [0.5], "evaluate.steps": 1, "evaluate.queries": 1,
        },
        {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, an exported file, an evaluation, and both unfinished."""
    top = tmp_path_factory.mktemp("made")
    context = Context(runs=top, reporter=SILENT)
    training.teach(tiny(), context, out=top / "teacher")
    training.distill(tiny(), context, teacher=top / "teacher", out=top / "student")
    export(context, run=top / "student")
    evaluate([top / "student"], context, out=top / "evaluation")
    with pytest.MonkeyPatch.context() as patched:

        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(training, "_finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            training.teach(tiny(), context, out=top / "unfinished")
        left, put = [5], Journal.put

        def mortal(journal: Journal, key: str, found: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            put(journal, key, found)

        patched.setattr(Journal, "put", mortal)
        with pytest.raises(KeyboardInterrupt):
            evaluate([top / "student"], context, out=top / "stopped")
    return top


def journal_notices(folder: Path) -> None:
    """Dropped lines are told, and computed again."""
    with Journal.resume(folder, read_header(folder)) as journal:
        if journal.notes:
            raise EpdistillError(journal.notes[0])


def checkpoint_notices(folder: Path) -> None:
    found = load_checkpoint(folder)
    assert found is not None
    if found.notes:
        raise EpdistillError(found.notes[0])


# What is used where it matters; the other files are there to be read by people.
LOADED: dict[str, Callable[[Path], object]] = {
    "teacher/config.json": lambda path: open_run(path.parent),
    "teacher/model.safetensors": lambda path: load_teacher(open_run(path.parent)),
    "teacher/metrics.jsonl": lambda path: read_metrics(path.parent),
    "student/config.json": lambda path: open_run(path.parent),
    "student/model.safetensors": lambda path: load_student(open_run(path.parent)),
    "student/metrics.jsonl": lambda path: read_metrics(path.parent),
    "student/model.onnx": lambda path: OnnxClassifier.open_checked(path, threads=1),
    "student/model.json": lambda path: OnnxClassifier.open_checked(
        path.with_suffix(".onnx"), threads=1
    ),
    "evaluation/results.json": lambda path: read_results(path.parent),
    "evaluation/results.csv": lambda path: checked_csv(path.parent),
    "evaluation/examples.safetensors": lambda path: read_examples(path.parent),
    "unfinished/config.json": lambda path: open_run(path.parent),
    f"unfinished/{STATE}": lambda path: checkpoint_notices(path.parent),
    f"stopped/{JOURNAL}": lambda path: journal_notices(path.parent),
}
CHECKED = (
    "teacher/README.md", "student/README.md", "student/model.md", f"unfinished/{PREVIOUS}",
)  # fmt: skip


def judged(top: Path) -> dict[str, set[str]]:
    """The files in every state."""
    found: dict[str, set[str]] = {INTACT: set(), UNKNOWN: set(), DAMAGED: set()}
    for one in check([top]):
        found[one.state].add(str(one.path.relative_to(top)))
    return found


@pytest.mark.slow
def test_changed_bytes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / "top"
    shutil.copytree(made, top)
    names = [*LOADED, *CHECKED]
    before = judged(top)
    assert not before[DAMAGED] and not before[UNKNOWN]
    assert before[INTACT] == set(names)
    for name, load in LOADED.items():
        load(top / name)
    generator = np.random.default_rng(SEED)
    detected = 0
    for number in range(COUNT):
        # Every file in turn, and then at random.
        name = names[number] if number < len(names) else str(generator.choice(names))
        path = top / name
        good = path.read_bytes()
        position, change = int(generator.integers(len(good))), int(generator.integers(1, 256))
        bad = bytearray(good)
        bad[position] ^= change
        path.write_bytes(bad)
        where = f"{name}, byte {position} ^ {change}"
        if name in LOADED:
            with pytest.raises(EpdistillError) as caught:
                LOADED[name](path)
            assert "\n" not in str(caught.value) and path.name in str(caught.value), where
        else:
            open_run(path.parent)
        found = judged(top)
        # A journal's last newline may be what was changed: then its line is merely cut.
        assert name in found[DAMAGED], where
        detected += 1
        path.write_bytes(good)
    assert judged(top) == before
    with capsys.disabled():
        print(f"\n{detected} of {COUNT} changed bytes detected")  # noqa: T201
    assert detected == COUNT


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOADED, *CHECKED])
def test_the_command_says_one_line(
    name: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def typed() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["epdistill", "check"])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    assert typed() == (0, "")
    path = Path("runs") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, said = typed()
    (line,) = said.splitlines()
    assert code == 2 and path.name in line and "not as they were written" in line


@pytest.mark.slow
def test_a_card_may_be_edited_and_an_old_run_has_no_checksums(made: Path, tmp_path: Path) -> None:
    from epdistill.sealed import read_sealed

    folder = tmp_path / "teacher"
    shutil.copytree(made / "teacher", folder)
    (folder / "README.md").write_text("my own words")
    load_teacher(open_run(folder))
    assert judged(tmp_path)[DAMAGED] == {"teacher/README.md"}
    config = read_sealed(folder / "config.json")
    del config["files_sha256"]
    import json

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    load_teacher(open_run(folder))
    read_metrics(folder)
    assert judged(tmp_path) == {
        INTACT: {"teacher/model.safetensors"}, UNKNOWN: {"teacher/config.json"}, DAMAGED: set(),
    }  # fmt: skip


def test_the_teacher_of_the_package_has_none_and_loads() -> None:
    from epdistill.teachers import pretrained

    assert load_teacher(open_run(Path(pretrained.__file__).parent / pretrained.FOLDER))
