"""What the larger suites run, and that they count it as they say."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epdistill.errors import EvaluationError
from epdistill.robustness import extras
from epdistill.robustness.attacks import (
    APGDSettings,
    CWSettings,
    DeepFoolSettings,
    NoiseSettings,
    PGDSettings,
    SquareSettings,
)
from epdistill.robustness.full import FullSuite
from epdistill.robustness.harness import evaluate
from epdistill.robustness.outcomes import SubjectOutcome
from epdistill.robustness.paper import PaperSuite
from epdistill.robustness.published import PublishedPGD, published_pgd
from epdistill.robustness.results import summary
from epdistill.robustness.subjects import Horizons, MeanAnswer, Published, Subject, module_subject
from epdistill.robustness.suites import QuickSuite, TemporalSettings, find_suite

Images = tuple[Tensor, Tensor]


def linear(seed: int, classes: int = 4) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return net.eval()


def right_images(net: nn.Module, n: int) -> Images:
    """Random images with the labels that a net gives them."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, net(images.float() / 255).argmax(dim=1)


class Step(nn.Module):
    """Class 1 where the mean of an image is above a threshold; the gradient is true."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([torch.zeros_like(mean), mean - self.threshold], dim=1)


class Blind(Step):
    """The same answers, but a gradient that points the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x.detach() - x)


def flat(*levels: int) -> Images:
    """Flat images of class 0."""
    images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    return images, torch.zeros(len(levels), dtype=torch.int64)


def small_full(**changes: object) -> FullSuite:
    suite = FullSuite(
        linf=(0.02, 0.1, 0.3),
        l2=(0.5,),
        pgd=PGDSettings(steps=4),
        square=SquareSettings(queries=8),
        apgd=APGDSettings(steps=4),
        carlini_wagner=CWSettings(steps=10, binary_search_steps=3),
        deepfool=DeepFoolSettings(steps=5),
        noise=NoiseSettings(samples=3),
        hop_skip_jump_queries=60,
        hop_skip_jump_images=2,
        corruptions=("contrast",),
        severities=(2,),
        diagnosed_images=4,
    )
    return dataclasses.replace(suite, **changes)


class Undiagnosed(FullSuite):
    """The attacks alone."""

    def diagnosed(self) -> None:
        return None


def test_the_full_suite_has_every_attack():
    attacks = FullSuite().attacks()
    assert {(a.name, a.norm, a.white_box, a.nearest) for a in attacks} == {
        ("pgd", "linf", True, False),
        ("pgd", "l2", True, False),
        ("fgsm", "linf", True, False),
        ("apgd-dlr", "linf", True, False),
        ("apgd-dlr", "l2", True, False),
        ("deepfool", "l2", True, True),
        ("carlini-wagner", "l2", True, True),
        ("square", "linf", False, False),
        ("square", "l2", False, False),
        ("noise", "linf", False, False),
        ("noise", "l2", False, False),
        ("hop-skip-jump", "linf", False, True),
        ("hop-skip-jump", "l2", False, True),
        ("autoattack", "linf", True, False),
        ("autoattack", "l2", True, False),
    }
    suite = FullSuite()
    assert len(suite.corruptions) == 19 and suite.severities == (1, 2, 3, 4, 5)
    (ensemble,) = (a for a in attacks if (a.name, a.norm) == ("autoattack", "linf"))
    assert (ensemble.radii, ensemble.relaxed_images, ensemble.images) == ((8 / 255,), 100, None)
    with pytest.raises(EvaluationError, match="expected at least 1, 1 and 100"):
        FullSuite(autoattack_images=99)


def test_the_full_suite_on_a_plain_net():
    net = linear(0)
    images, labels = right_images(net, 6)
    plain = small_full()
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    calls: list[tuple[int, int]] = []
    found = evaluate(
        [module_subject("net", "student", net)],
        images,
        labels,
        suite=Undiagnosed(**fields),
        progress=lambda what, done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1]
    (outcome,) = found.subjects
    rows = {(r.attack, r.norm, r.eps): r for r in outcome.attacks}
    expected = {"pgd", "fgsm", "apgd-dlr", "deepfool", "carlini-wagner", "square", "noise"}
    expected |= {"hop-skip-jump"}
    if importlib.util.find_spec("pyautoattack"):
        expected |= {"autoattack"}
        assert not found.skipped
        # The whole ensemble, at the middle radius, on images that PGD has broken before too.
        assert rows["autoattack", "linf", 0.1].attacked.all()
        assert ("autoattack", "linf", 0.02) not in rows
    assert {attack for attack, _, _ in rows} == expected
    assert rows["hop-skip-jump", "linf", 0.02].scope.tolist() == [True] * 2 + [False] * 4
    assert rows["fgsm", "linf", 0.3].attacked.all() and rows["noise", "l2", 0.5].attacked.all()
    for row in outcome.attacks:
        assert bool((row.perturbation[row.success] <= row.eps + 1e-6).all())
        assert not (row.success & ~row.scope).any() or row.attack == "hop-skip-jump"
        assert torch.equal(row.queries > 0, row.attacked)
    worst = [float(outcome.broken("linf", eps).float().mean()) for eps in plain.linf]
    assert worst == sorted(worst) and worst[-1] == 1.0
    assert summary(found)["models"][0]["temporal"] is None


def test_what_cannot_be_run_is_said():
    net = linear(0, classes=2)
    suite = dataclasses.replace(QuickSuite(), linf=(0.1,), l2=(), corruptions=())

    class Sieve(QuickSuite):
        def attacks(self):
            wanted = ("apgd-dlr", "autoattack", "pgd")
            rows = small_full().attacks()
            rows = [row for row in rows if row.norm == "linf" and row.name in wanted]
            return (*rows[:1], dataclasses.replace(rows[1], requires="no_such_package"), rows[2])

    fields = {field.name: getattr(suite, field.name) for field in dataclasses.fields(suite)}
    subject = module_subject("net", "student", net)
    found = evaluate([subject], *right_images(net, 3), suite=Sieve(**fields))
    assert {row.attack for row in found.subjects[0].attacks} == {"pgd"}
    assert [skip["what"] for skip in found.skipped] == ["apgd-dlr linf", "autoattack linf"]
    assert "no_such_package is not installed" in found.skipped[0]["why"]
    assert found.skipped[1]["why"] == "its loss compares 4 classes, and there are 2"


def relaxing(views: dict[str, nn.Module], horizons: Horizons) -> Subject:
    return Subject("teacher", "teacher", Step(0.5), views, horizons=horizons)


class Swept(QuickSuite):
    """The sweep over horizons."""

    def temporal(self) -> TemporalSettings:
        return TemporalSettings((1, 5), (3, 8), PGDSettings(steps=3), images=3)


def test_the_sweep_is_the_worst_case_over_gradients_and_reads_at_every_horizon():
    # Long unrolls are blind, short ones see; after 3 sweeps the threshold is nearer.
    horizons = Horizons(
        lambda sweeps: Step(0.5) if sweeps == 1 else Blind(0.5),
        lambda sweeps: Step(0.45 if sweeps == 3 else 0.5),
        lambda images: (images, images),
    )
    subject = relaxing({"implicit": Blind(0.5), "unrolled-30": Blind(0.5)}, horizons)
    suite = Swept(
        linf=(0.08,), l2=(), corruptions=(), pgd=PGDSettings(2), square=SquareSettings(queries=1)
    )
    # .47 is broken clean after 3 sweeps; .40 falls there only; .2 never falls.
    found = evaluate([subject], *flat(120, 102, 50, 115), suite=suite)
    (model,) = summary(found)["models"]
    cells = {
        (c["gradient"], c["attack_sweeps"], c["prediction_sweeps"]): c["accuracy"]
        for c in model["temporal"]["cells"]
    }
    third = pytest.approx(1 / 3)
    assert cells["clean", None, None] == 1 and cells["clean", None, 3] == pytest.approx(2 / 3)
    assert cells["unrolled", 1, None] == pytest.approx(2 / 3) and cells["unrolled", 1, 3] == third
    assert cells["unrolled", 5, None] == 1 and cells["implicit", None, None] == 1
    assert ("unrolled", 30, None) not in cells and len(cells) == 3 * (1 + 3)
    assert {c["n"] for c in model["temporal"]["cells"]} == {3}
    worst = {row["prediction_sweeps"]: row["accuracy"] for row in model["temporal"]["worst"]}
    assert worst == {3: third, 8: pytest.approx(2 / 3), None: pytest.approx(2 / 3)}
    (headline,) = model["temporal"]["headline"]
    assert headline["accuracy"] == pytest.approx(2 / 3) and headline["n"] == 3
    # What the sweep broke counts in the worst case; the fourth image is outside the sweep.
    (case,) = model["worst_case"]
    assert case["accuracy"] == 0.75 and "pgd-temporal" in case["attacks"]


def test_a_stochastic_model_is_attacked_in_expectation():
    class Noisy(nn.Module):
        """Right about an image near the threshold only in the mean."""

        def forward(self, x: Tensor) -> Tensor:
            logits = 10 * Step(0.5)(x)
            return logits + torch.randn_like(logits)

    suite = QuickSuite(
        linf=(0.2,), l2=(), corruptions=(), samples=200, pgd=PGDSettings(3),
        square=SquareSettings(queries=1),
    )  # fmt: skip
    images, labels = flat(90, 40)
    subject = module_subject("noisy", "control", Noisy(), stochastic=True)
    state = torch.get_rng_state()
    found = evaluate([subject], images, labels, suite=suite, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    (outcome,) = found.subjects
    # .35 + .2 is across, .16 + .2 is not; one draw would often say otherwise.
    assert outcome.clean_wrong.tolist() == [False, False]
    assert outcome.broken("linf", 0.2).tolist() == [True, False]
    assert "stochastic" in outcome.notes[0] and "200 draws" in outcome.notes[0]
    assert float(outcome.attacks[0].queries.max()) >= 3 * 200


def test_the_mean_answer_is_the_mean_of_probabilities():
    draws = iter([torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 3.0]])])
    answer = MeanAnswer(lambda images: next(draws), 2)(torch.zeros(1, 1, 1, 1))
    first, second = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(4))
    expected = torch.tensor([[first + second, 2 - first - second]]) / 2
    assert torch.allclose(answer.exp(), expected, atol=1e-6)


def test_the_paper_suite_is_the_published_protocol():
    suite = find_suite("paper")
    assert isinstance(suite, PaperSuite) and suite.subset() == "first"
    # The radii of the tables: l2 .079 .309 .486 1.0, linf .0046 .010 .0215 .0314.
    assert suite.table_l2 == pytest.approx((0.079, 0.309, 0.486, 1.0), abs=5e-4)
    assert suite.table_linf == pytest.approx((0.0046, 0.010, 0.0215, 0.0314), abs=5e-5)
    assert len(suite.l2) == len(suite.linf) == 11
    assert (suite.l2[0], suite.l2[-1], suite.linf[0], suite.linf[-1]) == (0.05, 3.0, 1e-4, 0.1)
    cells = suite.published()
    by_name = {(a.name, a.norm): a for a in cells}
    assert by_name["pgd", "l2"].settings == {"steps": 20, "relative_step": 2.5}
    assert by_name["square", "linf"].settings["queries"] == 1000
    assert by_name["square", "linf"].images == by_name["autoattack", "linf"].images == 200
    constants = [a.settings["c"] for a in cells if a.name == "carlini-wagner"]
    assert constants == [0.005, 0.01, 0.1, 1.0]
    assert by_name["carlini-wagner", "l2"].settings["binary_search_steps"] == 0
    counted = [eps for eps in suite.l2 if suite.averaged(by_name["pgd", "l2"], eps)]
    assert counted == list(suite.table_l2)
    assert not any(suite.averaged(by_name["pgd", "linf"], eps) for eps in suite.linf)


def test_images_of_the_published_attack_count_in_the_worst_case():
    # Only the published view sees; the judge of the protocol never errs, the model does.
    published = Published(Step(0.5), Step(2.0), "judged by a rock")
    subject = Subject("t", "teacher", Step(0.5), {"blind": Blind(0.5)}, published=published)
    suite = PaperSuite(
        linf=(0.1,), l2=(), pgd=PGDSettings(1, random_start=False), cw_steps=1,
        square=SquareSettings(queries=1), constants=(), table_linf=(), corruptions=(),
    )  # fmt: skip
    found = evaluate([subject], *flat(115, 50), suite=suite)
    (outcome,) = found.subjects
    assert not any(row.success.any() for row in outcome.attacks)
    assert outcome.broken("linf", 0.1).tolist() == [True, False]
    assert not outcome.broken("linf", 0.09).any() and not outcome.broken("l2", 9.0).any()
    assert paper_cells(outcome)["pgd", 0.1] == (1.0, 0.5)
    (worst,) = summary(found)["models"][0]["worst_case"]
    assert worst["accuracy"] == 0.5 and worst["attacks"] == ["pgd"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_published_pgd_step_by_step(norm: str):
    # By hand: from the image itself, towards more loss of the predicted label, unclipped.
    net, eps = linear(3), 0.6
    images = right_images(net, 5)[0].float() / 255
    guess = net(images).argmax(dim=1)
    run = published_pgd(norm)
    found = run(net, images, guess, eps, settings=PublishedPGD(steps=3))
    moved = images.clone()
    for _ in range(3):
        leaf = moved.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), guess), leaf)
        step = 2.5 * eps / 3
        if norm == "linf":
            moved = images + (moved - images + step * gradient.sign()).clamp(-eps, eps)
        else:
            far = moved - images + step * F.normalize(gradient.flatten(1)).view_as(gradient)
            long = far.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = images + far * (eps / long).clamp(max=1)
    assert torch.allclose(found, moved, atol=2e-4)
    assert float(found.min()) < 0 and float(found.max()) > 1
    with pytest.raises(EvaluationError, match="steps >= 1"):
        PublishedPGD(steps=0)


def paper_cells(outcome: SubjectOutcome) -> dict[tuple[str, object], tuple[float, float]]:
    def accuracy(wrong: Tensor) -> float:
        return 1 - float(wrong.float().mean())

    return {
        (cell.attack, cell.eps or cell.constant or cell.condition): (
            accuracy(cell.wrong),
            accuracy(cell.adaptive),
        )
        for cell in outcome.published
    }


def test_published_cells_stand_beside_adaptive_ones():
    # As published the attack is blind, and the judge of corruptions is another one.
    own, blind = Step(0.5), Blind(0.5)
    published = Published(blind, Step(0.5), "through a blind unroll", Step(0.0))
    subject = Subject("teacher", "teacher", own, {"implicit": own}, published=published)

    class Small(PaperSuite):
        def published(self):
            return tuple(a for a in super().published() if a.name != "autoattack")

    suite = Small(
        linf=(0.1,), l2=(0.8,), pgd=PGDSettings(2), square=SquareSettings(queries=1), cw_steps=60,
        cw_lr=0.1, constants=(100.0,), table_linf=(0.1,), table_l2=(0.8,),
        corruptions=("contrast", "frost"), severities=(1,),
    )  # fmt: skip
    found = evaluate([subject], *flat(115, 50), suite=suite)
    assert found.subset == "first"
    (outcome,) = found.subjects
    cells = paper_cells(outcome)
    assert cells["clean", ""] == (1.0, 1.0)
    assert cells["pgd", 0.8] == cells["pgd", 0.1] == (1.0, 0.5)
    assert cells["carlini-wagner", 100.0] == (1.0, 0.0)
    assert cells["corruption", "contrast/1"][0] == 0.0
    assert "through a blind unroll" in outcome.notes[0]
    average = summary(found)["models"][0]["published"]["average_robust_accuracy"]
    # PGD in Linf and frost are in no published table; AutoAttack is missing.
    assert average["families"]["pgd l2"] == {"published": 1.0, "adaptive": 0.5}
    assert average["families"]["corruption"]["published"] == 0.0
    counted = {(c.attack, c.norm, c.condition) for c in outcome.published if not c.counted}
    assert counted == {("pgd", "linf", ""), ("corruption", "", "frost/1")}
    means = [family["published"] for family in average["families"].values()]
    assert average["published"] == pytest.approx(sum(means) / len(means))


def test_a_diagnosis_on_request_looks_at_basins_too(monkeypatch):
    """Of what relaxes alone; what the checks themselves find is tested elsewhere."""
    verdict = {"verdict": "no masking evidence found", "checks": []}
    monkeypatch.setattr(extras, "_diagnose", lambda *_: verdict)
    threshold = Step(0.5)

    def settle(images: Tensor) -> tuple[Tensor, Tensor]:
        labels = threshold(images).argmax(dim=1)
        return labels, labels[:, None].to(images)

    relaxes = Subject(
        "relaxes", "teacher", threshold, {"model": threshold},
        horizons=Horizons(lambda _: threshold, lambda _: threshold, settle),
    )  # fmt: skip
    plain = module_subject("plain", "student", threshold)
    suite = dataclasses.replace(
        QuickSuite(), linf=(0.1,), l2=(), pgd=PGDSettings(1), square=SquareSettings(queries=1),
        corruptions=(),
    )  # fmt: skip
    for asked in (False, True):
        found = evaluate([relaxes, plain], *flat(127, 100, 60), suite=suite, diagnose=asked)
        first, second = found.subjects
        assert (first.diagnosis, second.diagnosis) == ((verdict,) * 2 if asked else (None,) * 2)
        assert second.basins is None and (first.basins is not None) == asked
    # The first image is next to the step; the others are far from it.
    assert max(first.basins["states"]["images_changed"]) == 1
    assert first.basins["images"] == 3
