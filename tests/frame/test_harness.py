"""The harness: what is counted, how it is put together, and what is written down."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness.attacks import PGDSettings, SquareSettings
from epdistill.robustness.drawing import draw
from epdistill.robustness.harness import evaluate
from epdistill.robustness.intervals import wilson
from epdistill.robustness.outcomes import AttackOutcome, Evaluation, SubjectOutcome
from epdistill.robustness.results import SCHEMA_VERSION, summary, write_results
from epdistill.robustness.rows import COLUMNS
from epdistill.robustness.subjects import Subject, module_subject
from epdistill.robustness.suites import Attack, QuickSuite, find_suite

SMALL = QuickSuite(
    linf=(4 / 255, 32 / 255),
    l2=(0.2, 1.0),
    pgd=PGDSettings(steps=5),
    square=SquareSettings(queries=20),
    corruptions=("gaussian_noise", "contrast"),
    severities=(1, 5),
)


class Logits(nn.Module):
    """A linear classifier of 8x8 grey images with given weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = (torch.tensor(data.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.tensor(data.target, dtype=torch.int64)


@pytest.fixture(scope="module")
def nets(digits) -> tuple[nn.Module, nn.Module]:
    """A linear and a convolutional classifier of digits, trained on 500."""
    images, labels = digits[0][:500].float() / 255, digits[1][:500]
    trained = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        for net in (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), conv):
            optimiser = torch.optim.Adam(net.parameters(), 1e-2)
            for _ in range(40):
                optimiser.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimiser.step()
            optimiser.zero_grad()
            trained.append(net.eval())
    return trained[0], trained[1]


@pytest.fixture(scope="module")
def found(digits, nets) -> Evaluation:
    """Two models and a black box that is the second one, over 60 unseen digits."""
    images, labels = digits[0][1000:], digits[1][1000:]
    linear, conv = nets
    subjects = [
        module_subject("linear", "student", linear),
        module_subject("conv", "student", conv),
        Subject("conv.onnx", "onnx", lambda x: conv(x)),
    ]
    return evaluate(subjects, images, labels, suite=SMALL, limit=60, seed=3, batch_size=25)


def accuracy(evaluation: Evaluation, name: str, norm: str, eps: float) -> float:
    (subject,) = (s for s in evaluation.subjects if s.name == name)
    return 1 - float(subject.broken(norm, eps).float().mean())


def test_wilson_against_known_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(29, 29)[1] == 1.0 and wilson(0, 3)[0] == 0.0
    assert wilson(20, 20) == pytest.approx([1 - end for end in reversed(wilson(0, 20))])


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_the_impossible(successes, n):
    with pytest.raises(EvaluationError, match=f"received {successes} successes of n = {n}"):
        wilson(successes, n)


def test_worst_case_is_per_image_and_monotone_by_hand():
    def row(attack: str, eps: float, success: list[int], norm: str = "linf") -> AttackOutcome:
        flags = torch.tensor(success, dtype=torch.bool)
        zeros = torch.zeros(len(success))
        return AttackOutcome(attack, "", norm, eps, flags, flags, zeros, flags | True, zeros)

    subject = SubjectOutcome(
        "fake",
        "student",
        clean_wrong=torch.tensor([True, False, False, False, False]),
        attacks=(
            row("pgd", 0.1, [1, 1, 0, 0, 0]),
            row("square", 0.1, [1, 0, 1, 0, 0]),
            # PGD loses image 1 at the larger radius, where it must stay broken.
            row("pgd", 0.2, [1, 0, 0, 1, 0]),
            row("square", 0.2, [1, 0, 0, 0, 0]),
            row("pgd", 0.1, [1, 0, 0, 0, 1], norm="l2"),
        ),
        corruptions=(),
    )
    assert subject.broken("linf", 0.05).tolist() == [True, False, False, False, False]
    assert subject.broken("linf", 0.1).tolist() == [True, True, True, False, False]
    assert subject.broken("linf", 0.2).tolist() == [True, True, True, True, False]
    assert subject.broken("l2", 0.1).tolist() == [True, False, False, False, True]
    assert subject.radii() == (("linf", 0.1), ("linf", 0.2), ("l2", 0.1))


def brightness_threshold(at: float) -> Logits:
    """Class 1 where an image's mean is above `at`."""
    weight = torch.stack([torch.zeros(64), torch.full((64,), 1 / 64)])
    return Logits(weight, torch.tensor([0.0, -at]))


def test_attacks_find_exactly_the_breakable_images():
    # Flat images of class 0 at known distances from the threshold 128/255: the
    # smallest perturbation that breaks one is known in both norms.
    levels = torch.tensor([200, 126, 120, 100, 60], dtype=torch.uint8)
    images = levels[:, None, None, None].repeat(1, 1, 8, 8)
    labels = torch.zeros(5, dtype=torch.int64)
    subject = module_subject("step", "student", brightness_threshold(128 / 255))
    suite = QuickSuite(
        linf=(1 / 255, 4 / 255, 16 / 255, 40 / 255),
        l2=tuple(8 * e / 255 for e in (1, 4, 16, 40)),  # a flat shift of e is 8e long
        square=SquareSettings(queries=20),
        corruptions=(),
    )
    found = evaluate([subject], images, labels, suite=suite, seed=0)
    by_hand = {1: 0.8, 4: 0.6, 16: 0.4, 40: 0.2}
    for level, expected in by_hand.items():
        assert accuracy(found, "step", "linf", level / 255) == pytest.approx(expected)
        assert accuracy(found, "step", "l2", 8 * level / 255) == pytest.approx(expected)
    (outcome,) = found.subjects
    assert outcome.clean_wrong.tolist() == [True, False, False, False, False]
    for row in outcome.attacks:
        assert not row.attacked[0] and row.success[0] and row.perturbation[0] == 0
        assert float(row.perturbation.max()) <= row.eps * (1 + 1e-5) + 1e-6


def test_worst_case_over_views_and_judging_by_predict():
    # Of three views one has a useless gradient, one points the wrong way and one
    # is true: the subject falls as if only the true one were there.
    images = torch.full((4, 1, 8, 8), 120, dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.int64)
    true = brightness_threshold(128 / 255)
    backward = Logits(-true.weight.detach(), torch.tensor([0.0, 130 / 255]))
    views = {"flat": Logits(torch.zeros(2, 64)), "backward": backward, "true": true}
    suite = QuickSuite(linf=(12 / 255,), l2=(), corruptions=(), pgd=PGDSettings(steps=5))
    suite = dataclasses.replace(suite, square=SquareSettings(queries=1))

    def run(*names: str) -> Evaluation:
        chosen = {name: views[name] for name in names}
        subject = Subject("teacher", "teacher", true, chosen)
        return evaluate([subject], images, labels, suite=suite)

    both = run("flat", "backward", "true")
    rows = {row.view: row for row in both.subjects[0].attacks if row.attack == "pgd"}
    assert list(rows) == ["flat", "backward", "true"]
    # The backward view is broken by its own images, predict is not: no success.
    assert [int(rows[v].success.sum()) for v in rows] == [0, 0, 4]
    assert accuracy(both, "teacher", "linf", 12 / 255) == 0.0
    # With the true view first the others have nothing left to do.
    first = run("true", "flat").subjects[0].attacks
    assert [int(row.attacked.sum()) for row in first] == [4, 0, 0]
    assert [int(row.success.sum()) for row in first] == [4, 4, 4]
    assert torch.equal(first[1].perturbation, first[0].perturbation)


def test_exhaustive_attacks_all_and_leaves_the_worst_case(digits, nets):
    images, labels = digits[0][1000:1040], digits[1][1000:1040]
    views = {"conv": nets[1], "linear": nets[0]}
    subject = Subject("net", "student", nets[1], views)
    lazy = evaluate([subject], images, labels, suite=SMALL)
    eager = evaluate([subject], images, labels, suite=dataclasses.replace(SMALL, exhaustive=True))
    right = 40 - int(lazy.subjects[0].clean_wrong.sum())
    assert {int(row.attacked.sum()) for row in eager.subjects[0].attacks} == {right}
    assert any(int(row.attacked.sum()) < right for row in lazy.subjects[0].attacks)
    for norm, eps in eager.subjects[0].radii():
        assert torch.equal(eager.subjects[0].broken(norm, eps), lazy.subjects[0].broken(norm, eps))


def test_transfer_reaches_a_black_box(found):
    conv, boxed = found.subjects[1:]
    assert [row.view for row in boxed.attacks if row.attack == "transfer"].count("conv") == 4
    # The black box is the same function: the images crafted on it break it.
    for norm, eps in (("linf", 32 / 255), ("l2", 1.0)):
        own = next(r for r in conv.attacks if (r.attack, r.norm, r.eps) == ("pgd", norm, eps))
        sent = next(
            r
            for r in boxed.attacks
            if (r.attack, r.view, r.norm, r.eps) == ("transfer", "conv", norm, eps)
        )
        assert int(own.success.sum()) > int(conv.clean_wrong.sum()) + 5
        assert torch.equal(own.success, sent.success)
        assert torch.allclose(own.perturbation, sent.perturbation)
    # From the black box, which has no views, nothing is sent.
    assert all(row.view != "conv.onnx" for s in found.subjects for row in s.attacks)


def test_what_the_source_gets_wrong_is_sent_all_the_same():
    # The source errs on the clean image, so nothing is left to break there; the
    # target is right and falls to what is crafted on the source.
    images = torch.full((2, 1, 8, 8), 120, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    source = module_subject("source", "student", brightness_threshold(110 / 255))
    target = Subject("target", "onnx", brightness_threshold(128 / 255))
    suite = QuickSuite(linf=(12 / 255,), l2=(), corruptions=(), square=SquareSettings(queries=1))
    for order in ([source, target], [target, source]):
        found = evaluate(order, images, labels, suite=suite)
        by_name = {subject.name: subject for subject in found.subjects}
        (own, *_) = by_name["source"].attacks
        assert own.success.all() and not own.attacked.any() and not own.perturbation.any()
        (sent,) = (row for row in by_name["target"].attacks if row.attack == "transfer")
        assert not by_name["target"].clean_wrong.any()
        assert sent.attacked.all() and sent.success.all()
        assert sent.perturbation.tolist() == pytest.approx([12 / 255] * 2, abs=1e-6)


def test_own_rows_do_not_depend_on_company_or_batches(found, digits, nets):
    images, labels = digits[0][1000:], digits[1][1000:]
    subject = module_subject("conv", "student", nets[1])
    alone = evaluate([subject], images, labels, suite=SMALL, limit=60, seed=3, batch_size=7)
    rows = [row for row in found.subjects[1].attacks if row.attack != "transfer"]
    assert len(rows) == len(alone.subjects[0].attacks) == 6
    for one, other in zip(rows, alone.subjects[0].attacks, strict=True):
        # Batches of another size round differently: at most one image may tip over.
        assert int((one.attacked != other.attacked).sum()) <= 1
        assert int((one.success != other.success).sum()) <= 1
        assert int(((one.perturbation - other.perturbation).abs() > 1e-3).sum()) <= 1


def test_a_plain_net_falls_and_guessing_is_seen_as_guessing(found, digits):
    assert accuracy(found, "conv", "linf", 0.0) > 0.85
    assert accuracy(found, "conv", "l2", 1.0) < 0.3

    def guess(x: Tensor) -> Tensor:
        return torch.rand(len(x), 10)

    state = torch.get_rng_state()
    suite = dataclasses.replace(SMALL, linf=(), l2=())
    subject = Subject("guess", "control", guess)
    first = evaluate([subject], *digits, suite=suite, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert summary(first) == summary(evaluate([subject], *digits, suite=suite, seed=1))
    # Five shares of 1797 around .1, at four standard errors.
    model = summary(first)["models"][0]
    shares = [model["clean"], *model["corruptions"]]
    assert all(abs(share["accuracy"] - 0.1) < 4 * math.sqrt(0.09 / 1797) for share in shares)
    assert model["worst_case"] == [] and model["attacks"] == []


def test_same_seed_same_evaluation_whatever_the_global_rng(digits, nets):
    images, labels = digits[0][1000:], digits[1][1000:]
    subject = module_subject("linear", "student", nets[0])

    def run(seed: int) -> Evaluation:
        return evaluate([subject], images, labels, suite=SMALL, limit=30, seed=seed)

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert summary(first) == summary(again)
    for one, other in zip(first.subjects[0].attacks, again.subjects[0].attacks, strict=True):
        assert torch.equal(one.perturbation, other.perturbation)
    assert not torch.equal(first.examples, run(1).examples)


def test_limit_draws_from_all_images(digits, nets):
    order = digits[1].argsort()  # a folder of images is sorted by class
    subject = module_subject("linear", "student", nets[0])
    suite = dataclasses.replace(SMALL, linf=(), l2=(), corruptions=())
    images, labels = digits[0][order], digits[1][order]
    found = evaluate([subject], images, labels, suite=suite, limit=100, seed=0)
    assert len(found.examples) == 100 and len(found.labels.unique()) == 10
    assert torch.equal(found.labels, labels[found.examples])
    assert bool((found.examples.diff() > 0).all())
    assert len(evaluate([subject], images, labels, suite=suite, limit=10**6).labels) == 1797


def test_modes_are_restored_and_judging_is_in_evaluation_mode(digits):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.9), nn.Linear(64, 10))
    net.train()
    net[1].eval()
    subject = module_subject("net", "student", net)
    evaluate([subject], *(part[:20] for part in digits), suite=SMALL)
    assert [part.training for part in net] == [True, False, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert int(net[1].num_batches_tracked) == 0


def test_progress_grows_and_ends_at_the_total(digits, nets):
    calls: list[tuple[str, int, int]] = []
    subjects = [
        module_subject("linear", "student", nets[0]),
        Subject("box", "onnx", nets[1], {}),
    ]
    images, labels = (part[:30] for part in digits)
    evaluate(
        subjects,
        images,
        labels,
        suite=SMALL,
        batch_size=8,
        progress=lambda *call: calls.append(call),
    )
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == calls[-1][2] and len({c[2] for c in calls}) == 1
    assert any("pgd linf" in call[0] and "linear" in call[0] for call in calls)


def test_an_attack_that_cheats_is_caught(digits, nets):
    class Cheating(QuickSuite):
        def attacks(self) -> tuple[Attack, ...]:
            def far(model, images, labels, eps, *, seed, index=None):
                return (images + 3 * eps).clamp(0, 1)

            return (Attack("far", "linf", True, far, 1),)

    subject = module_subject("linear", "student", nets[0])
    images, labels = (part[:20] for part in digits)
    with pytest.raises(EvaluationError, match="away from its original in linf"):
        evaluate([subject], images, labels, suite=Cheating(linf=(0.1,)))


def test_a_model_that_cannot_be_judged_is_named(digits):
    images, labels = (part[:20] for part in digits)
    nan = Subject("broken.onnx", "onnx", lambda x: torch.full((len(x), 10), torch.nan))
    with pytest.raises(EvaluationError, match=r"broken.onnx: the model returned NaN") as caught:
        evaluate([nan], images, labels, suite=SMALL)
    assert "\n" not in str(caught.value)
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    fixed = Subject("s", "teacher", Logits(weight), {"cut": nn.Identity()})
    with pytest.raises(EvaluationError, match="s, view cut: the model returned"):
        evaluate([fixed], images, labels, suite=SMALL)


def test_bad_arguments_are_refused(digits, nets):
    images, labels = (part[:20] for part in digits)
    good = module_subject("a", "student", nets[0])
    cases = [
        ([], images, labels, {}, "at least one"),
        ([good, good], images, labels, {}, "different names"),
        ([good], images.float(), labels, {}, "uint8"),
        ([good], images[:0], labels[:0], {}, "N >= 1"),
        ([good], images, labels[:3], {}, r"expected \(20,\) int64"),
        ([good], images, labels, {"limit": 0}, "received limit 0"),
        ([good], images, labels, {"batch_size": 0}, "received batch_size 0"),
        (
            [good],
            images,
            labels,
            {"suite": "slow"},
            "received suite 'slow'; expected one of quick, paper",
        ),
        ([good], images, labels + 5, {"suite": SMALL}, "a: received labels 5..14"),
    ]
    for subjects, some_images, some_labels, extra, message in cases:
        with pytest.raises(EvaluationError, match=message):
            evaluate(subjects, some_images, some_labels, **extra)
    with pytest.raises(EvaluationError, match="without a name"):
        Subject("", "student", nets[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linf": (0.2, 0.1)}, "expected them increasing"),
        ({"l2": (0.1, 0.1)}, "expected them increasing"),
        ({"linf": (-0.1,)}, "eps = -0.1"),
        ({"corruptions": ("smog",)}, "corruption 'smog'"),
        ({"severities": (6,)}, "severity 6"),
    ],
)
def test_impossible_suites_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        dataclasses.replace(SMALL, **change)


def test_the_quick_suite_is_what_it_says():
    suite = find_suite("quick")
    assert [round(255 * eps) for eps in suite.linf] == [2, 4, 8, 16]
    assert suite.l2 == (0.1, 0.25, 0.5, 1.0) and suite.severities == (1, 3, 5)
    assert (suite.pgd.steps, suite.pgd.restarts, suite.square.queries) == (20, 1, 200)
    names = [(attack.name, attack.norm, attack.white_box) for attack in suite.attacks()]
    assert names == [("pgd", "linf", True), ("pgd", "l2", True), ("square", "linf", False)]


def test_results_json_and_csv_say_the_same(found, tmp_path: Path):
    json_path, csv_path = write_results(found, tmp_path / "new")
    content = json.loads(json_path.read_text())
    assert content["schema_version"] == SCHEMA_VERSION and content["n"] == 60
    assert content["settings"]["seed"] == 3 and content["settings"]["pgd"]["steps"] == 5
    assert content["settings"]["square"]["queries"] == 20 and content["settings"]["limit"] == 60
    assert set(content["versions"]) >= {"python", "torch", "torchattacks", "epdistill"}
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    kinds = ("attacks", "corruptions")
    counts = [1 + sum(len(model[kind]) for kind in kinds) for model in content["models"]]
    assert len(rows) == 60 * sum(counts)
    keys = [
        tuple(row[c] for c in ("example", "model", "attack", "view", "norm", "eps")) for row in rows
    ]
    assert len(set(keys)) == len(keys)
    for model, subject in zip(content["models"], found.subjects, strict=True):
        mine = [row for row in rows if row["model"] == model["name"]]
        clean = [row for row in mine if row["attack"] == "clean"]
        assert clean[0]["norm"] == "" and float(clean[0]["eps"]) == 0
        wrong = sum(row["success"] == "1" for row in clean)
        assert model["clean"]["accuracy"] == pytest.approx(1 - wrong / 60)
        assert model["clean"]["ci95"] == list(wilson(60 - wrong, 60))
        for entry in model["attacks"]:
            same = [
                row
                for row in mine
                if (row["attack"], row["view"], row["norm"])
                == (entry["attack"], entry["view"], entry["norm"])
                and float(row["eps"]) == entry["eps"]
            ]
            assert len(same) == 60
            broken = sum(row["success"] == "1" for row in same)
            assert entry["accuracy"] == pytest.approx(1 - broken / 60)
            assert entry["attacked"] == sum(row["attacked"] == "1" for row in same)
        # The worst case, once more from the CSV alone.
        for entry in model["worst_case"]:
            fallen = {row["example"] for row in clean if row["success"] == "1"} | {
                row["example"]
                for row in mine
                if row["norm"] == entry["norm"]
                and float(row["eps"]) <= entry["eps"]
                and row["success"] == "1"
            }
            assert entry["accuracy"] == pytest.approx(1 - len(fallen) / 60)
        expected = (
            ["square", "transfer"] if subject.kind == "onnx" else ["pgd", "square", "transfer"]
        )
        assert model["worst_case"][0]["attacks"] == expected
        conditions = [(row["corruption"], row["severity"]) for row in model["corruptions"]]
        assert conditions == [
            ("gaussian_noise", 1),
            ("gaussian_noise", 5),
            ("contrast", 1),
            ("contrast", 5),
        ]
        mean = sum(row["accuracy"] for row in model["corruptions"]) / 4
        assert model["corruption_mean"]["accuracy"] == pytest.approx(mean)
        assert model["corruption_mean"]["error"] == pytest.approx(1 - mean)


def test_what_nothing_attacked_is_not_called_robust(digits, nets):
    # Square runs in Linf only: in L2 nothing attacks a lone black box.
    images, labels = (part[:20] for part in digits)
    suite = dataclasses.replace(SMALL, corruptions=())
    model = summary(evaluate([Subject("box", "onnx", nets[1])], images, labels, suite=suite))
    (model,) = model["models"]
    assert {row["norm"] for row in model["worst_case"]} == {"linf"}
    assert model["corruption_mean"] is None


def test_pictures_are_drawn_and_the_same_twice(found, tmp_path: Path):
    content = json.loads(json.dumps(summary(found)))
    one, two = draw(content, tmp_path / "one"), draw(content, tmp_path / "two")
    assert [path.name for path in one] == [
        "accuracy-linf.png",
        "accuracy-l2.png",
        "transfer-linf.png",
        "transfer-l2.png",
        "corruptions-cifar10c-style.png",
    ]
    for path, other in zip(one, two, strict=True):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.read_bytes() == other.read_bytes()
        assert path.with_suffix(".svg").is_file()


def test_nothing_to_draw_draws_nothing(digits, nets, tmp_path: Path):
    suite = dataclasses.replace(SMALL, linf=(), l2=(), corruptions=())
    subject = module_subject("linear", "student", nets[0])
    found = evaluate([subject], *(part[:10] for part in digits), suite=suite)
    assert draw(summary(found), tmp_path) == [] and not any(tmp_path.iterdir())
