"""The losses are what they say, by hand and by their properties."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from epdistill.students.matching import (
    VARIANCE_FLOOR,
    Loss,
    Matching,
    bce_over_entropy,
    matching_loss,
    mse_over_variance,
    one_minus_cosine,
)


def maps(*values: float) -> Tensor:
    """One unit per image."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def states_loss(landed: Tensor, goal: Tensor, settled: Tensor) -> float:
    logits = torch.zeros(len(goal), 3)
    return float(matching_loss([landed], logits, [goal], logits, settled, Matching()).states)


def test_mse_over_variance_by_hand() -> None:
    # Errors 1 and 0, variance of (0, 2) is 1: (1 + 0) / 2 / 1.
    assert float(mse_over_variance(maps(1, 2), maps(0, 2))) == pytest.approx(0.5)
    # A constant goal: variance counts as the floor.
    assert float(mse_over_variance(maps(0.1, 0.1), maps(0, 0))) == pytest.approx(
        0.01 / VARIANCE_FLOOR
    )


def test_bce_by_hand() -> None:
    # Goals 0 and 1 have no entropy; a guess of 1/2 costs log 2 each, and so does the mean.
    assert float(bce_over_entropy(maps(0, 0), maps(0, 1))) == pytest.approx(1.0)
    # sigmoid(log 3) = 3/4: -log(1/4) and -log(3/4), over log 2.
    third = maps(log(3), log(3))
    expected = (log(4) + log(4 / 3)) / 2 / log(2)
    assert float(bce_over_entropy(third, maps(0, 1))) == pytest.approx(expected)
    # The right probability costs nothing, whatever its entropy.
    goal = maps(0.25, 0.75)
    assert float(bce_over_entropy(goal.logit(), goal)) == pytest.approx(0, abs=1e-12)


def test_cosine_by_hand() -> None:
    landed = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    goal = torch.tensor([[4.0, 3.0], [0.0, 5.0]]).view(2, 2, 1, 1)
    # Cosines 24/25 and 0.
    assert float(one_minus_cosine(landed, goal)) == pytest.approx(1 - 0.48)
    assert float(one_minus_cosine(7 * goal, goal)) == pytest.approx(0, abs=1e-6)


def test_the_total_by_hand() -> None:
    # Two layers: 0.5 (as above) and 0; logits at T = 2: p = (3/4, 1/4) against q = (1/2, 1/2).
    logits, theirs = torch.zeros(2, 2), torch.tensor([[2 * log(3), 0.0]] * 2)
    how = Matching("mse", state_weight=3.0, logit_weight=0.5, temperature=2.0)
    loss = matching_loss(
        [maps(1, 2), maps(1, 3)], logits, [maps(0, 2), maps(1, 3)], theirs, torch.ones(2) > 0, how
    )
    kl = 4 * (0.75 * log(1.5) + 0.25 * log(0.5))
    assert float(loss.states) == pytest.approx(0.25)
    assert float(loss.logits) == pytest.approx(kl, rel=1e-5)
    assert float(loss.total) == pytest.approx(3 * 0.25 + 0.5 * kl, rel=1e-5)


def total(distance: str, landed: list[Tensor], goal: list[Tensor]) -> Loss:
    logits = torch.zeros(len(landed[0]), 2) if landed else torch.zeros(2, 2)
    settled = torch.ones(len(logits)) > 0
    how = Matching(distance)  # type: ignore[arg-type]
    return matching_loss(landed, logits, goal, logits, settled, how)


def test_the_last_layer_of_bce_is_read_linearly() -> None:
    goal = maps(0.25, 0.75)
    both = total("bce", [goal.logit(), goal], [goal, goal])
    assert float(both.states) == pytest.approx(0, abs=1e-9)
    # The other way round neither is right.
    wrong = total("bce", [goal, goal.logit()], [goal, goal])
    assert float(wrong.states) > 1
    alone = total("bce", [goal + 0.25], [goal])
    assert float(alone.states) == pytest.approx(float(mse_over_variance(goal + 0.25, goal)))


def test_without_states_only_the_answers_count() -> None:
    loss = matching_loss(
        [], torch.zeros(1, 2), [], torch.tensor([[log(3), 0.0]]), torch.ones(1) > 0, Matching()
    )
    assert float(loss.states) == 0
    assert float(loss.total) == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5), rel=1e-5)


def test_mse_is_one_minus_r2() -> None:
    generator = torch.Generator().manual_seed(1)
    goal = torch.rand(50, 2, 3, 3, generator=generator)
    everyone = torch.ones(50, dtype=torch.bool)
    assert states_loss(goal, goal, everyone) == 0
    guess = torch.full_like(goal, float(goal.mean()))
    assert states_loss(guess, goal, everyone) == pytest.approx(1.0)
    assert states_loss(10 * goal, 10 * goal + 1, everyone) == pytest.approx(
        1 / (100 * float(goal.var(unbiased=False))), rel=1e-4
    )


@pytest.mark.parametrize("distance", ["mse", "bce", "cosine"])
def test_unsettled_images_do_not_count(distance: str) -> None:
    generator = torch.Generator().manual_seed(2)
    goal = torch.rand(6, 2, 3, 3, generator=generator)
    landed, other = torch.randn(2, 6, 2, 3, 3, generator=generator)
    ours, theirs = torch.randn(2, 6, 3, generator=generator)
    first = torch.tensor([True] * 3 + [False] * 3)
    how = Matching(distance)  # type: ignore[arg-type]

    def loss(landed: Tensor, settled: Tensor) -> float:
        return float(matching_loss([landed] * 2, ours, [goal] * 2, theirs, settled, how).total)

    mixed = torch.where(first[:, None, None, None], landed, other)
    assert loss(landed, first) == loss(mixed, first)
    assert loss(landed, first) != loss(mixed, ~first)
    alone = matching_loss(
        [landed[:3]] * 2, ours[:3], [goal[:3]] * 2, theirs[:3], first[:3], how
    ).total
    assert loss(landed, first) == pytest.approx(float(alone))


def test_a_batch_that_has_not_settled_moves_nothing() -> None:
    goal = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(4))
    logits = torch.zeros(6, 3, requires_grad=True)
    nobody = torch.zeros(6, dtype=torch.bool)
    parts = matching_loss([goal], logits, [goal], torch.ones(6, 3), nobody, Matching())
    parts.total.backward()  # type: ignore[no-untyped-call]
    assert float(parts.total.detach()) == 0
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0


def test_kl_is_zero_only_for_equal_answers() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(2, 8, 4, generator=generator)
    everyone = torch.ones(8, dtype=torch.bool)

    def kl(a: Tensor, b: Tensor) -> float:
        return float(matching_loss([], a, [], b, everyone, Matching()).logits)

    assert kl(theirs, theirs) == pytest.approx(0, abs=1e-7)
    p = theirs.softmax(1)
    expected = (p * (p.log() - ours.log_softmax(1))).sum(1).mean()
    assert kl(ours, theirs) == pytest.approx(float(expected), rel=1e-5)
