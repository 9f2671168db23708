"""A killed evaluation goes on where it was and ends with the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import PGDSettings, SquareSettings
from epdistill.robustness.crafted import Crafted
from epdistill.robustness.harness import evaluate
from epdistill.robustness.journal import (
    NAME,
    Journal,
    pack_bits,
    pack_floats,
    read_header,
    unpack_bits,
    unpack_floats,
)
from epdistill.robustness.outcomes import Evaluation
from epdistill.robustness.paper import PaperSuite
from epdistill.robustness.results import summary
from epdistill.robustness.rows import csv_text
from epdistill.robustness.subjects import Horizons, Predict, Subject, module_subject
from epdistill.robustness.suites import Attack, QuickSuite, TemporalSettings

HEADER = {"seed": 3, "settings": {"pgd": {"steps": 2}, "linf": (0.05, 0.2)}}


class Whole(QuickSuite):
    """Attacks of every sort, the sweep, and the published protocol."""

    def temporal(self) -> TemporalSettings:
        return TemporalSettings((2,), (1,), PGDSettings(steps=2), images=6)

    def published(self) -> tuple[Attack, ...]:
        paper = PaperSuite(square=SquareSettings(queries=3), cw_steps=2, table_linf=(0.1,))
        return tuple(attack for attack in paper.published() if attack.name != "autoattack")


SUITE = Whole(
    linf=(0.05, 0.2),
    l2=(0.5,),
    pgd=PGDSettings(steps=2),
    square=SquareSettings(queries=4),
    corruptions=("contrast", "gaussian_noise"),
    severities=(3,),
    samples=2,
)


class Noisy(nn.Module):
    """A classifier that answers at random about its own mean."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.5 * torch.randn_like(logits)


def linear(seed: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return net.eval()


def asked(model: Predict, calls: list[int]) -> Predict:
    def predict(images: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images)

    return predict


@pytest.fixture(scope="module")
def run() -> Callable[..., tuple[Evaluation, int]]:
    """Evaluates two models with a journal; also says how many batches were judged."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=generator)
    clean = linear(1)(images.float() / 255).argmax(dim=1)

    def work(
        journal: Journal | None = None, crafted: Crafted | None = None
    ) -> tuple[Evaluation, int]:
        calls: list[int] = []
        net = linear(1)
        settles = Horizons(linear, lambda sweeps: linear(sweeps + 5), lambda x: (x, x))
        teacher = Subject(
            "teacher", "teacher", asked(net, calls), {"implicit": net}, horizons=settles,
            identity="its weights",
        )  # fmt: skip
        noisy = module_subject("noisy", "control", Noisy(linear(2)), stochastic=True)
        found = evaluate(
            [teacher, noisy], images, clean, suite=SUITE, limit=13, batch_size=5, journal=journal,
            crafted=crafted,
        )  # fmt: skip
        return found, len(calls)

    return work


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, int, bytes]:
    """The evaluation that nobody disturbed, with its whole journal."""
    folder = tmp_path_factory.mktemp("straight")
    with Journal.create(folder, HEADER) as journal:
        found, calls = run(journal)
    return found, calls, (folder / NAME).read_bytes()


def same(one: Evaluation, other: Evaluation) -> bool:
    return csv_text(one) == csv_text(other) and summary(one) == summary(other)


def test_a_journal_changes_nothing(run, straight):
    assert same(run()[0], straight[0])


@pytest.mark.parametrize("share", [0.0, 0.07, 0.31, 0.5, 0.77, 0.9, 0.999, 1.0])
def test_killed_anywhere_and_resumed(run, straight, tmp_path: Path, share: float):
    found, calls, content = straight
    first = content.index(b"\n") + 1
    cut = first + int(share * (len(content) - first))
    (tmp_path / NAME).write_bytes(content[:cut])
    with Journal.resume(tmp_path, HEADER) as journal:
        again, more = run(journal)
    assert same(again, found)
    # What was done is not done again; one batch tells how many classes there are.
    assert more <= 1 + (1 - share) * calls + 12
    assert bool(journal.notes) == (content[cut - 1 : cut] != b"\n")
    # And the mended journal is whole: a second crash right at the end costs nothing.
    with Journal.resume(tmp_path, HEADER) as journal:
        last, none = run(journal)
    assert same(last, found) and none == 1 and not journal.notes


def test_killed_between_two_units(run, straight, tmp_path: Path):
    class Killed(Exception):
        pass

    class Mortal(Journal):
        left = 9

        def put(self, key: str, found: Any) -> None:
            if self.left == 0:
                raise Killed
            self.left -= 1
            super().put(key, found)

    with pytest.raises(Killed), Mortal.create(tmp_path, HEADER) as journal:
        run(journal)
    with Journal.resume(tmp_path, HEADER) as journal:
        assert not journal.empty
        assert same(run(journal)[0], straight[0])


def test_a_damaged_line_is_done_again(run, straight, tmp_path: Path):
    lines = straight[2].splitlines(keepends=True)
    lines[4] = lines[4].replace(b"wrong", b"wrung")
    lines[7] = b"\x00\xff\n"
    (tmp_path / NAME).write_bytes(b"".join(lines))
    with Journal.resume(tmp_path, HEADER) as journal:
        assert [note.split(": ")[1] for note in journal.notes] == [
            "line 5 is damaged; its unit is done again",
            "line 8 is damaged; its unit is done again",
        ]
        assert same(run(journal)[0], straight[0])


def refused(message: str, work: Callable[[], object]) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_resumed(tmp_path: Path):
    refused("has no journal.jsonl", lambda: Journal.resume(tmp_path, HEADER))
    refused("has no journal.jsonl", lambda: read_header(tmp_path / "nothing"))
    (tmp_path / "results.json").write_text("{}")
    refused("is complete", lambda: Journal.resume(tmp_path, HEADER))
    journal = Journal.create(tmp_path, HEADER)
    refused("holds an unfinished evaluation", lambda: Journal.create(tmp_path, HEADER))
    refused("another process is writing", lambda: Journal.resume(tmp_path, HEADER))
    journal.close()
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(b"\xff" + whole)
    refused("first line of .* is damaged", lambda: Journal.resume(tmp_path, HEADER))
    # Killed before the first line was on the disk: there is nothing to resume, nor in the way.
    for begun in (b"", whole[:-9]):
        (tmp_path / NAME).write_bytes(begun)
        refused("stopped before its first line", lambda: Journal.resume(tmp_path, HEADER))
        Journal.create(tmp_path, HEADER).close()
        assert (tmp_path / NAME).read_bytes() == whole
    (tmp_path / NAME).write_bytes(whole)
    other = json.loads(json.dumps(HEADER))
    other["settings"]["pgd"]["steps"] = 40
    del other["seed"]
    refused(
        r"begun with seed = 3, not null; settings.pgd.steps = 2, not 40; expected the same",
        lambda: Journal.resume(tmp_path, other),
    )
    Journal.resume(tmp_path, HEADER).close()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300])
def test_packing_loses_nothing(n: int):
    generator = torch.Generator().manual_seed(n)
    flags = torch.rand(n, generator=generator) < 0.5
    values = torch.randn(n, dtype=torch.float64, generator=generator)
    assert torch.equal(unpack_bits(pack_bits(flags), n), flags)
    assert torch.equal(unpack_floats(pack_floats(values)), values)


def test_images_that_are_kept_are_not_made_again(run, straight, tmp_path: Path):
    def kept(**facts: int) -> Crafted:
        return Crafted(tmp_path / "kept", "its weights", facts)

    found, calls, _ = straight
    once, again = run(crafted=kept(seed=1)), run(crafted=kept(seed=1))
    # The black box asks the model that is judged; the images of others are tried all the same.
    assert same(once[0], found) and same(again[0], found)
    assert once[1] == calls > again[1]
    files = sorted((tmp_path / "kept").iterdir())
    whole = [file.read_bytes() for file in files]
    # Other settings have files of their own, and another model leaves none.
    assert same(run(crafted=kept(seed=2))[0], found)
    assert len(list((tmp_path / "kept").iterdir())) == 2 * len(files)
    assert same(run(crafted=Crafted(tmp_path / "none", "other weights"))[0], found)
    assert not (tmp_path / "none").exists()
    # What is damaged or cut short is made again.
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content[:-1])
    files[0].write_bytes(b"")
    mended = run(crafted=kept(seed=1))
    assert same(mended[0], found) and mended[1] == calls
    assert [file.read_bytes() for file in files] == whole
    # Where nothing can be kept, everything is found out all the same.
    (tmp_path / "file").write_text("")
    assert same(run(crafted=Crafted(tmp_path / "file" / "kept", "its weights"))[0], found)
